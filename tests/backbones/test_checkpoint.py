"""Files of weights: what is read from them, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import Tiny, fresh
from torch import Tensor

from ptee._common.errors import BackboneError
from ptee.backbones.checkpoint import read_checkpoint
from ptee.backbones.load import load_backbone
from ptee.backbones.weights import load_weights, weights_hash


def write_shards(folder: Path, state: dict[str, Tensor], suffix: str = ".safetensors") -> Path:
    """Two files and their index, as huggingface_hub writes them."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names, home = list(state), {}
    for i, part in enumerate((names[:3], names[3:]), 1):
        file = f"{stem}-0000{i}-of-00002{suffix}"
        tensors = {key: state[key].contiguous() for key in part}
        (save_file if suffix == ".safetensors" else torch.save)(tensors, folder / file)
        home |= dict.fromkeys(part, file)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": home}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_index_of_shards_loads_all_of_them(suffix, tmp_path):
    trained, module = Tiny(), fresh()
    load_weights(module, read_checkpoint(write_shards(tmp_path, trained.state_dict(), suffix)))
    assert weights_hash(module) == weights_hash(trained)


def test_one_shard_is_refused_and_the_index_is_named(tmp_path):
    index = write_shards(tmp_path, Tiny().state_dict())
    with pytest.raises(BackboneError, match=r"one of 2 shards .*model\.safetensors\.index\.json") as refusal:
        read_checkpoint(tmp_path / "model-00001-of-00002.safetensors")
    assert str(index) in str(refusal.value)


def test_a_file_that_is_the_only_shard_is_a_whole_file(tmp_path):
    save_file(Tiny().state_dict(), tmp_path / "model-00001-of-00001.safetensors")
    load_weights(fresh(), read_checkpoint(tmp_path / "model-00001-of-00001.safetensors"))


ELSEWHERE = [
    "../outside.safetensors",
    "/etc/passwd",
    "..\\outside.safetensors",
    "sub/w.safetensors",
    "..",
    "",
    "C:w",
    "gone",
    3,
]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_that_names_a_file_elsewhere_is_refused(name, tmp_path):
    inside = tmp_path / "run"
    inside.mkdir()
    save_file(Tiny().state_dict(), tmp_path / "outside.safetensors")
    index = write_shards(inside, Tiny().state_dict())
    index.write_text(json.dumps({"weight_map": {"fc.bias": name}}))
    with pytest.raises(BackboneError, match="is no file beside it"):
        read_checkpoint(index)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\udcff"],
    ids=["empty", "cut off", "a list", "no map", "a list as map", "an empty map", "too deep", "no text"],
)
def test_what_is_no_index_is_refused(text, tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BackboneError, match=r"index\.json cannot be read") as refusal:
        read_checkpoint(file)
    assert "\n" not in str(refusal.value)


def test_a_shard_without_a_tensor_of_the_index_is_refused(tmp_path):
    index = write_shards(tmp_path, Tiny().state_dict())
    found = json.loads(index.read_text())
    found["weight_map"]["more.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(found))
    with pytest.raises(BackboneError, match=r"lacks more\.weight"):
        read_checkpoint(index)


def test_a_file_that_unpacks_to_a_much_larger_one_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1000, 1000)}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as stored,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(BackboneError, match=r"packed\.pth cannot be read: .*unpacks to 4,"):
        read_checkpoint(tmp_path / "packed.pth")


def test_one_changed_byte_in_a_file_of_torch_is_refused(tmp_path):
    file = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1000)}, file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    with pytest.raises(BackboneError, match=r"w\.pth cannot be read: .*It is damaged in 'w/data/0'\. Get it again"):
        read_checkpoint(file)


def test_a_file_that_was_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "w.pth").names == ["a"]


def save_old(state: dict[str, Tensor], file: Path) -> None:
    torch.save(state, file, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("save", "name", "said"),
    [
        (torch.save, "w.safetensors", r"was written by torch\.save and is no safetensors file\. Name it w\.pth\.$"),
        (save_old, "w.safetensors", r"was written by torch\.save and is no safetensors file\. Name it w\.pth\.$"),
        (save_file, "w.pth", r"w\.pth is a safetensors file\. Name it w\.safetensors\.$"),
        (save_file, "w", r"w is a safetensors file\. Name it w\.safetensors\.$"),
    ],
    ids=["torch's", "torch's oldest", "safetensors", "safetensors without a suffix"],
)
def test_a_file_with_the_suffix_of_another_kind_is_refused_and_the_right_one_named(save, name, said, tmp_path):
    save(Tiny().state_dict(), tmp_path / name)
    with pytest.raises(BackboneError, match=said):
        read_checkpoint(tmp_path / name)


def tar_of(file: Path, target: Path) -> None:
    with tarfile.open(target, "w") as archive:
        archive.add(file, file.name)


def zip_of(file: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w") as archive:
        archive.write(file, file.name)


ARCHIVES = {
    "a zip archive": (zip_of, r"is a zip archive of w\.pth, not written by torch\.save\. Unpack it"),
    "a tar archive": (tar_of, r"is a tar archive\. Unpack it, and give the file"),
    "zeros, which tarfile takes for an empty archive": (
        lambda _, target: target.write_bytes(bytes(20_480)),
        r"Get it again",
    ),
    "compressed": (
        lambda file, target: target.write_bytes(gzip.compress(file.read_bytes())),
        r"is compressed \(gzip\)\. Unpack it: gzip -dc odd > FILE\.pth\.",
    ),
    "arrays": (
        lambda _, target: np.savez(target.open("wb"), a=np.zeros(3)),
        r"holds arrays of numpy\. Save them as tensors",
    ),
    "an array": (
        lambda _, target: np.save(target.open("wb"), np.zeros(3)),
        r"holds arrays of numpy\. Save them as tensors",
    ),
}


@pytest.mark.parametrize(("write", "said"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_or_arrays_in_place_of_weights_are_refused_and_called_so(write, said, tmp_path):
    torch.save(Tiny().state_dict(), tmp_path / "w.pth")
    write(tmp_path / "w.pth", tmp_path / "odd")
    with pytest.raises(BackboneError, match=said):
        read_checkpoint(tmp_path / "odd")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.safetensors.index.json", "shard"])
def test_a_pointer_of_git_lfs_is_refused_and_the_command_that_fetches_the_file_named(name, tmp_path):
    index = write_shards(tmp_path, Tiny().state_dict())
    file = tmp_path / ("model-00002-of-00002.safetensors" if name == "shard" else name)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n")
    with pytest.raises(BackboneError, match=rf"{file.name} is a pointer of git-lfs, .*: git lfs pull\.$"):
        read_checkpoint(index if name == "shard" else file)


@pytest.mark.filterwarnings("ignore")
def test_a_program_of_torch_export_is_refused_and_what_to_save_named(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "w.pt2")
    with pytest.raises(BackboneError, match=r"is a program of torch\.export .*torch\.export\.load.*state_dict\.$"):
        read_checkpoint(tmp_path / "w.pt2")


@pytest.mark.filterwarnings("ignore")
def test_a_program_of_torchscript_is_refused_and_what_to_save_named(tmp_path):
    torch.jit.save(torch.jit.trace(Tiny().eval(), torch.zeros(1, 3, 8, 8)), tmp_path / "w.pt")
    with pytest.raises(BackboneError, match=r"w\.pt is TorchScript, .* save model\.state_dict\(\)\.$"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="There is no weights file"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["config.json", "model.safetensors"], "w/model.safetensors"),
        (["a-00001-of-00002.bin", "a-00002-of-00002.bin", "a.bin.index.json"], "w/a.bin.index.json"),
        (["config.json"], "w/model.safetensors"),
    ],
    ids=["one", "shards", "none"],
)
def test_a_folder_is_refused_as_such_and_the_file_in_it_named(files, named, tmp_path):
    (tmp_path / "w").mkdir()
    for name in files:
        (tmp_path / "w" / name).touch()
    with pytest.raises(BackboneError, match=rf"w is a folder\. Give the file of weights in it: [^,]*{named}\.$"):
        read_checkpoint(tmp_path / "w")


@pytest.mark.parametrize("given", ["w", "w/__0_0.distcp"])
def test_a_distributed_checkpoint_is_refused_and_what_makes_one_file_of_it_named(given, tmp_path):
    (tmp_path / "w").mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / "w" / name).touch()
    said = rf"is a distributed checkpoint of torch, in several files\. Make one of them: .* dcp_to_torch {tmp_path}/w FILE\.pth\.$"
    with pytest.raises(BackboneError, match=said):
        read_checkpoint(tmp_path / given)


@pytest.mark.parametrize("save", [torch.save, save_file], ids=["torch", "safetensors"])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"x{n}.weight" for n in range(50)], "holds 50 tensors, and at most 40 are read"),
        (
            ("a." * 40 + "weight",),
            r"has names of more than 512 letters or 32 parts: a\.a\..*weight\. Save the network's .*, rename them\.$",
        ),
        (("a" * 600,), r"has names of more than 512 letters"),
    ],
    ids=["many", "deep", "long"],
)
def test_more_or_longer_names_than_networks_have_are_refused(names, said, save, tmp_path, monkeypatch):
    monkeypatch.setattr("ptee.backbones.checkpoint.MOST_TENSORS", 40)
    save({name: torch.ones(1) for name in names}, tmp_path / ("w.pth" if save is torch.save else "w.safetensors"))
    with pytest.raises(BackboneError, match=said):
        read_checkpoint(next(tmp_path.iterdir()))


def test_where_names_are_long_beside_the_network_the_place_of_these_is_named(tmp_path):
    bank = {"/data/a.b.c/" * 60 + "1.JPEG": torch.ones(1)}
    torch.save({"model": Tiny().state_dict(), "loss_of_image": bank}, tmp_path / "w.pth")
    said = r"w\.pth has under 'loss_of_image' names of more .*JPEG\. Save the network's state_dict and nothing else"
    with pytest.raises(BackboneError, match=said):
        read_checkpoint(tmp_path / "w.pth")


def test_a_dictionary_that_holds_itself_is_read_once(tmp_path):
    found: dict = {"model": Tiny().state_dict()}
    found["again"] = found
    torch.save(found, tmp_path / "w.pth")
    assert list(read_checkpoint(tmp_path / "w.pth").places) == ["model"]


@pytest.mark.parametrize("how", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("place", ["", "model"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_weights_are_refused_by_name(place, how, tmp_path):
    state = Tiny().cpu().state_dict()
    state["fc.weight"] = getattr(state["fc.weight"], how)()
    torch.save({place: state} if place else state, tmp_path / "w.pth")
    under = "under 'model' " if place else ""
    said = rf"holds weights {under}that are sparse or packed \(fc\.weight\).*\.to_dense\(\)"
    with pytest.raises(BackboneError, match=said):
        read_checkpoint(tmp_path / "w.pth")


def test_tensors_without_numbers_are_no_weights(tmp_path):
    torch.save({"fc.weight": torch.empty(3, device="meta")}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="holds no state_dict"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_network_much_larger_than_its_file_is_refused_before_it_is_built(tmp_path):
    save_file(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"has 10 classes.*the model has 1000000"):
        load_backbone("cifar_resnet8", weights=tmp_path / "w.safetensors", num_classes=10**6)


def test_a_constructor_that_needs_numbers_is_not_asked_for_more_classes_than_the_file_can_have(tmp_path):
    save_file(Tiny().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"fewer numbers than torchvision/regnet_y_400mf has classes"):
        load_backbone("torchvision/regnet_y_400mf", weights=tmp_path / "w.safetensors", num_classes=10**6)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("test_vit", {"model_args": {"in_chans": 10**9}}),
        ("test_vit", {"model_args": {"img_size": 10**6}}),
        ("test_vit", {"model_args": {"img_size": [9]}}),
        ("test_vit", {"model_args": {"img_size": "large"}}),
        ("cifar_resnet8", {"input_size": (3, 20000, 20000)}),
    ],
)
def test_images_of_no_possible_size_are_refused_before_anything_is_built(name, given):
    with pytest.raises(BackboneError, match=r"too large|is \(channels, height, width\)") as refusal:
        load_backbone(name, pretrained=False, **given)
    assert [refusal.value.argument] == list(given)
