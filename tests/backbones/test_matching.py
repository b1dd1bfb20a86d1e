"""Which tensors of a file are a network's, as trainers and hubs write files."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from tiny import Tiny, changed, fresh, under
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ptee._common.errors import BackboneError
from ptee.backbones.checkpoint import read_checkpoint
from ptee.backbones.load import load_backbone
from ptee.backbones.small_networks import SmallDenseNet
from ptee.backbones.weights import load_weights, weights_hash

ONE = torch.ones(1)
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def changed_network(network: nn.Module) -> nn.Module:
    """Such a network with other weights, after some batches."""
    other = copy.deepcopy(network)
    other.load_state_dict(changed(network.state_dict()))
    for name, value in other.named_buffers():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
    return other


def averaged(network: nn.Module) -> dict[str, Tensor]:
    return AveragedModel(network).state_dict()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": {**under("model.", s), "criterion.weight": torch.ones(4)}, "epoch": 1},
        lambda s: {"state_dict": {**under("net.", s), "train_acc.tp": ONE, "val_metrics.auroc.preds": ONE}},
        lambda s: {"state_dict": {**s, "loss_fn.weight": ONE, "val_f1.total": ONE}},
        lambda s: {**under("module.", s), "n_averaged": torch.tensor(3)},
        lambda s: under("module.model.", s),
        lambda s: under("module._orig_mod.net.", s),
        *(
            lambda s, w=w: {k.replace("conv.", f"conv.{w}.").replace("fc.", f"{w}.fc."): v for k, v in s.items()}
            for w in WRAPPERS
        ),
        lambda s: {
            k.replace("conv.", "conv._fsdp_wrapped_module._orig_mod."): v for k, v in under("module.", s).items()
        },
        lambda s: {f"backbone.{k}" if "fc" not in k else k: v for k, v in s.items()},
        lambda s: {"state_dict": {f"model.backbone.{k}" if "fc" not in k else f"model.{k}": v for k, v in s.items()}},
        lambda s: {k.replace("fc.", "head."): v for k, v in s.items()},
        lambda s: {f"backbone.{k}" if "fc" not in k else f"classifier.{k[3:]}": v for k, v in s.items()},
        lambda s: {"params": s, "opt": {"lr": 0.1}},
        lambda s: {"checkpoint": {"model": {"state_dict": under("module.", s)}}, "best": 0.9},
        lambda s: {**s, "epoch": 3, "arch": "tiny"},
        lambda s: {**s, "total_ops": ONE, "conv.total_params": ONE},
        lambda s: {"model": s, "model_ema": s},
        lambda s: {**under("student.", s), **under("teacher.", nn.Conv2d(1, 1, 1).state_dict())},
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": ONE}}, "param_groups": [{"lr": 0.1}]}},
    ],
    ids=[
        *("Lightning with a loss weight", "Lightning with metrics", "leftovers without a prefix", "AveragedModel"),
        *("module.model.", "module._orig_mod.net.", *WRAPPERS, "two inside", "backbone. and a bare fc."),
        *("the same under model.", "the last layer is called head.", "backbone. and a bare classifier."),
        *("params", "four deep", "numbers and words beside", "a profiler's counters", "an equal average"),
        *("a teacher of another kind", "an optimizer"),
    ],
)
def test_what_trainers_put_around_a_network_is_taken_off(wrap, tmp_path):
    trained, module = Tiny(), fresh()
    torch.save(wrap(trained.state_dict()), tmp_path / "w.pth")
    load_weights(module, read_checkpoint(tmp_path / "w.pth"))
    assert weights_hash(module) == weights_hash(trained)


def test_a_network_among_thousands_of_other_dictionaries_is_found(tmp_path):
    trained, module = Tiny(), fresh()
    torch.save({**{f"{i}": {"a": ONE} for i in range(3000)}, "model": trained.state_dict()}, tmp_path / "w.pth")
    load_weights(module, read_checkpoint(tmp_path / "w.pth"))
    assert weights_hash(module) == weights_hash(trained)


def test_wrapped_and_plain_tensors_of_one_name_are_not_mixed(tmp_path):
    state = Tiny().state_dict()
    torch.save({**under("_orig_mod.", changed(state)), **state}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="several networks that fit"):
        load_weights(Tiny(), read_checkpoint(tmp_path / "w.pth"))


def test_versions_of_modules_are_found_without_the_names_of_wrappers(tmp_path):
    torch.save(torch.compile(Tiny()).state_dict(), tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth").places[""]._metadata["bn"] == {"version": 2}


@pytest.mark.parametrize(
    ("wrap", "average", "raw"),
    [
        (lambda s, raw: {"state_dict": raw, "state_dict_ema": s}, "state_dict_ema", "state_dict"),
        (
            lambda s, raw: {"model": raw, "model_ema": {**under("module.", s), "n_averaged": ONE}},
            "model_ema.module",
            "model",
        ),
        (lambda s, raw: {"model": raw, "ema": s}, "ema", "model"),
        (lambda s, raw: {"net": raw, "netEMA": s}, "netEMA", "net"),
        (lambda s, raw: {"params": raw, "params_ema": s}, "params_ema", "params"),
        (lambda s, raw: {**raw, **under("ema.", s)}, "ema", "at its top"),
        (
            lambda s, raw: {"state_dict": {**under("model.", raw), **under("ema.", s)}},
            "state_dict.ema",
            "state_dict.model",
        ),
        (
            lambda s, raw: {**under("online_model.", raw), **under("ema_model.module.", s), "initted": ONE},
            "ema_model.module",
            "online_model",
        ),
        (
            lambda s, raw: {
                "state_dict": raw,  # as mmengine's average
                "ema_state_dict": {
                    **under("module.", {k.replace("fc.", "head.fc."): v for k, v in s.items()}),
                    "steps": ONE,
                },
            },
            "ema_state_dict.module",
            "state_dict",
        ),
        (lambda s, raw: {"ema": {"decay": 0.99, "shadow": s}, "net": raw}, "ema.shadow", "net"),
        (lambda s, raw: {"state_dict": s, "current_model_state": raw}, "state_dict", "current_model_state"),
    ],
)
def test_of_averaged_and_raw_weights_the_averaged_ones_are_taken_and_that_is_said(wrap, average, raw, tmp_path):
    trained, module = Tiny(), fresh()
    torch.save(wrap(trained.state_dict(), changed(trained.state_dict())), tmp_path / "w.pth")
    note = load_weights(module, read_checkpoint(tmp_path / "w.pth"))
    assert weights_hash(module) == weights_hash(trained)
    assert f"its averaged weights ({average}) are taken, not the raw ones ({raw})" in note


def test_an_average_of_the_parameters_alone_is_not_taken_and_that_is_said(tmp_path):
    trained, module = Tiny(), fresh()
    average = {key: value + 1 for key, value in trained.named_parameters()}
    torch.save({"model": trained.state_dict(), "ema": average}, tmp_path / "w.pth")
    note = load_weights(module, read_checkpoint(tmp_path / "w.pth"))
    assert weights_hash(module) == weights_hash(trained)
    assert "its averaged weights (ema) are no whole network, so the raw ones are taken" in note


@pytest.mark.parametrize(
    ("kept", "where"),
    [
        (lambda t: {"ema": {"decay": 0.9, "shadow_params": t, "collected_params": None}}, "ema.shadow_params"),
        (lambda t: {"averager": {"shadow_params": t}}, "averager.shadow_params"),
        (lambda t: {"ema": tuple(t)}, "ema"),
    ],
)
def test_averaged_weights_without_names_are_not_taken_and_that_is_said(kept, where, tmp_path):
    trained, module = Tiny(), fresh()
    average = list(changed(trained.state_dict()).values())
    torch.save({"model": trained.state_dict(), "losses": average[:1], **kept(average)}, tmp_path / "w.pth")
    note = load_weights(module, read_checkpoint(tmp_path / "w.pth"))
    assert weights_hash(module) == weights_hash(trained)
    assert note.endswith(f"its averaged weights ({where}) have no names, so the raw ones are taken.")


def test_a_mask_of_infinite_values_is_loaded(tmp_path):
    trained, module = Tiny(), fresh()
    for network in (trained, module):
        network.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    load_weights(module, read_checkpoint(tmp_path / "w.pth"))
    assert weights_hash(module) == weights_hash(trained)


def test_an_average_of_buffers_is_taken_though_its_counters_are_no_longer_whole_numbers(tmp_path):
    raw = Tiny()
    average = {k: v.double() if k.endswith("num_batches_tracked") else v for k, v in changed(raw.state_dict()).items()}
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": average}, tmp_path / "w.pth")
    module = fresh()
    note = load_weights(module, read_checkpoint(tmp_path / "w.pth"))
    assert torch.equal(module.state_dict()["conv.weight"], average["conv.weight"])
    assert "its averaged weights (state_dict_ema) are taken" in note
    assert {v.dtype for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")} == {torch.int64}


@pytest.mark.parametrize("place", ["", "model_ema"])
def test_averages_of_torch_with_their_buffers_are_taken(place, tmp_path):
    raw = Tiny()
    average = AveragedModel(raw, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        average.update_parameters(changed_network(raw))
    torch.save(
        {"model": raw.state_dict(), place: average.state_dict()} if place else average.state_dict(), tmp_path / "w.pth"
    )
    module = fresh()
    load_weights(module, read_checkpoint(tmp_path / "w.pth"))
    assert torch.equal(module.state_dict()["conv.weight"], average.module.state_dict()["conv.weight"])


def test_names_of_a_file_do_not_steer_the_terminal(tmp_path):
    tensors = {k.replace("fc.", "f\x1b[2J\n."): v for k, v in Tiny().state_dict().items()}
    torch.save({"\x1b[2J\n\u202e_ema": tensors, "net": changed(Tiny().state_dict())}, tmp_path / "w.pth")
    note = load_weights(fresh(), read_checkpoint(tmp_path / "w.pth"))
    assert note.isprintable() and "ema" in note and "taken for fc" in note


def test_a_counter_of_a_huge_shape_is_refused_before_anything_is_computed(tmp_path):
    state = nn.BatchNorm2d(2).state_dict()
    state["num_batches_tracked"] = torch.zeros(()).expand(200_000, 200_000)  # 160 GB, were it written out
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="shape"):
        load_weights(nn.BatchNorm2d(2), read_checkpoint(tmp_path / "w.pth"))


def test_a_note_says_what_was_left_out_and_which_layer_has_another_name(tmp_path):
    state = {k.replace("fc.", "head."): v for k, v in Tiny().state_dict().items()}
    torch.save({**under("model.", state), "criterion.weight": ONE}, tmp_path / "w.pth")
    note = load_weights(fresh(), read_checkpoint(tmp_path / "w.pth"))
    assert "head is taken for fc" in note
    assert "criterion.weight is left out" in note


@pytest.mark.parametrize("word", ["recall_gate", "precision", "lossless", "teacher"])
def test_a_layer_within_the_network_is_never_left_out_because_of_its_name(word, tmp_path):
    torch.save({**Tiny().state_dict(), f"conv.{word}.weight": ONE}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=word):
        load_weights(fresh(), read_checkpoint(tmp_path / "w.pth"))


def test_the_backbone_keeps_the_note_if_there_was_a_choice(tmp_path):
    state = Tiny().state_dict()
    for content, said in ((state, None), ({"model": state, "model_ema": changed(state)}, "model_ema")):
        torch.save(content, tmp_path / "w.pth")
        note = load_backbone(fresh(), weights=tmp_path / "w.pth", input_size=(3, 16, 16)).note
        assert note is None if said is None else said in note


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: {"student": s, "teacher": changed(s)}, "several networks that fit: 'student', 'teacher'"),
        (lambda s: {"state_dict": {**under("a.", s), **under("b.", changed(s))}}, "several networks that fit"),
        (lambda s: {"ema": s, "ema2": changed(s), "model": s}, "several networks that fit: 'ema', 'ema2'"),
        (lambda s: {**under("net.", s), "adapter.weight": ONE}, "whole Tiny under 'net', and beside it adapter.weight"),
        (lambda s: {**s, "conv2.weight": ONE}, "has unknown conv2.weight beside a whole Tiny"),
        (lambda s: {**under("backbone.", s), "fc.weight": ONE, "fc.bias": ONE}, "beside it fc.weight, fc.bias"),
        (
            lambda s: {**under("m.", s), **{f"model_ema.{k.replace('.', '')}": v for k, v in s.items()}},
            "model_ema.convweight",
        ),
        (
            lambda s: {k.replace("conv.", "stem."): v for k, v in s.items()},
            r"lacks conv.weight, conv.bias and has unknown stem",
        ),
        (lambda s: {k: v for k, v in s.items() if "fc" not in k}, "lacks fc.weight, fc.bias and has conv.weight"),
        (lambda s: {"a": ONE, "b": {"c": ONE}}, "holds no Tiny: its tensors are called a"),
        (lambda s: {k: v for k, v in s.items() if k != "bn.weight"}, r"lacks bn\.weight"),
        (lambda s: {**s, "conv.weight": torch.ones(8, 1, 3, 3)}, r"conv\.weight \(8, 1, 3, 3\), not \(8, 3, 3, 3\)"),
        (lambda s: {k: torch.ones(7, 7) for k in s}, r"conv\.weight \(7, 7\), not .* and 4 more"),
        (
            lambda s: {**s, "fc.weight": s["fc.weight"].to(torch.complex64)},
            r"holds torch\.complex64 in fc\.weight, where the model has torch\.float32\. Save",
        ),
        (lambda s: {**s, "fc.weight": s["fc.weight"].to(torch.int8)}, "holds torch.int8 in fc.weight.*quantised"),
        (
            lambda s: {**s, "fc.weight": s["fc.weight"].to(torch.float8_e4m3fn)},
            "holds torch.float8_e4m3fn in fc.weight.*quantised",
        ),
        (lambda s: {**s, "bn.running_var": s["bn.running_var"] / 0}, r"not finite \(inf or NaN\) in bn.running_var\."),
        (lambda s: {**s, "fc.bias": s["fc.bias"] * torch.nan}, r"not finite \(inf or NaN\) in fc.bias\."),
        (lambda s: {**s, "fc.bias": s["fc.bias"].double() + 1e300}, r"not finite \(inf or NaN\) in fc.bias\."),
        (
            lambda s: {"model": {**s, "fc.weight": torch.ones(9, 8), "fc.bias": torch.ones(9)}},
            "9 classes.*num_classes=9",
        ),
        (
            lambda s: {k.replace("fc.", "head."): v[:3] if "fc" in k else v for k, v in s.items()},
            "3 classes.*num_classes=3",
        ),
    ],
)
def test_what_is_in_doubt_is_refused_with_the_names_that_are_there(wrap, said, tmp_path):
    torch.save(wrap(Tiny().state_dict()), tmp_path / "odd.pth")
    module = fresh()
    before = weights_hash(module)
    with pytest.raises(BackboneError, match=said) as refusal:
        load_weights(module, read_checkpoint(tmp_path / "odd.pth"))
    assert "\n" not in str(refusal.value)
    assert "odd.pth" in str(refusal.value)
    assert weights_hash(module) == before
    assert refusal.value.argument in ("weights", "num_classes")


@pytest.mark.parametrize("names", [("mean", "std"), ("normalize.mean", "normalize.std"), ("mu", "sigma")])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_mean_and_a_deviation_beside_a_network_are_to_be_given_as_such(names, prefix, tmp_path):
    state = under(prefix, Tiny().state_dict()) if prefix else Tiny().state_dict()
    torch.save({**dict.fromkeys(names, torch.ones(3, 1, 1)), **state}, tmp_path / "w.pth")
    said = r"They normalise images: save the state_dict without them, and give them as mean= and std=\.$"
    with pytest.raises(BackboneError, match=said):
        load_weights(fresh(), read_checkpoint(tmp_path / "w.pth"))


def test_long_names_and_terminal_codes_are_shown_short_and_harmless(tmp_path):
    torch.save({"\x1b[2Jevil": ONE, "x" * 5000: ONE}, tmp_path / "w.pth")
    with pytest.raises(BackboneError) as refusal:
        load_weights(Tiny(), read_checkpoint(tmp_path / "w.pth"))
    text = str(refusal.value)
    assert "\x1b" not in text
    assert re.search(r"x{30}\.\.\.x{30}", text)
    assert len(text) < 500


def old_dense(name: str) -> str:
    return re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", name)


def original_swin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that the authors of Swin gave: a stage ends with its downsampling, timm's begins with it."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        renamed[key.replace("head.fc.", "head.")] = value
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    return renamed


@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_that_timm_converts_are_converted(prefix, tmp_path):
    args = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    trained = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **args)
    torch.save({"model": under(prefix, original_swin(trained.state_dict()))}, tmp_path / "swin.pth")
    backbone = load_backbone(
        "swin_tiny_patch4_window7_224", weights=tmp_path / "swin.pth", num_classes=5, model_args=args
    )
    assert weights_hash(backbone.module) == weights_hash(trained)


OLD_NAMES = {  # a network, and what makes its names those of files that its library published
    "torchvision's DenseNet": (lambda: torchvision.models.DenseNet(4, (2, 1), 8, num_classes=3), old_dense),
    "timm's DenseNet": (lambda: timm.models.DenseNet(4, (2, 1), num_classes=3), old_dense),
    "a DenseNet for small images": (lambda: SmallDenseNet(3, growth_rate=4, block_config=(2, 1)), old_dense),
    "torchvision's ViT": (
        lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=3),
        lambda name: name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."),
    ),
    "timm's CrossViT": (
        lambda: timm.create_model("crossvit_tiny_240", depth=((1, 1, 0),) * 3, embed_dim=(12, 12), num_classes=3),
        lambda name: re.sub(r"(pos_embed|cls_token)_", r"\1.", name),
    ),
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("make", "older"), OLD_NAMES.values(), ids=OLD_NAMES)
def test_names_in_files_that_a_library_published_earlier_are_known(make, older, prefix, tmp_path):
    module = make()
    wanted = changed(module.state_dict())
    old = {older(name): value for name, value in wanted.items()}
    assert old.keys() != wanted.keys()
    torch.save(under(prefix, old), tmp_path / "w.pth")
    load_weights(module, read_checkpoint(tmp_path / "w.pth"))
    assert all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items())


def test_position_embeddings_of_another_image_size_are_refused_and_not_stretched(tmp_path):
    save_file(timm.create_model("test_vit", img_size=64).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match="other shapes: pos_embed"):
        load_backbone("test_vit", weights=tmp_path / "w.safetensors", input_size=(3, 160, 160))


def test_weights_that_deepspeed_keeps_elsewhere_are_called_so(tmp_path):
    torch.save({"module": {name: torch.empty(0) for name in Tiny().state_dict()}}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"holds no numbers in conv\.weight.*zero_to_fp32\.py"):
        load_weights(Tiny(), read_checkpoint(tmp_path / "w.pth"))


def test_a_last_layer_that_is_called_like_a_metric_is_named_in_the_refusal(tmp_path):
    state = {name.replace("fc.", "metric_fc."): value for name, value in Tiny().state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        BackboneError, match=r"lacks fc\.weight, fc\.bias and has unknown metric_fc\.weight, metric_fc\.bias"
    ):
        load_weights(Tiny(), read_checkpoint(tmp_path / "w.pth"))
