"""Blended answers: what `predict` answers is the blend of the exits a row has passed, live, saved and measured."""

from __future__ import annotations

import copy
import json
from itertools import combinations

import pytest
import torch
from device import seeded
from small import blend_for, once
from torch import Tensor
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import PteeError, RunError
from ptee.backbones.load import load_backbone
from ptee.exits.blend import Blend
from ptee.model.build import build
from ptee.tuning.traces import record

SIZE, E, NEVER = (3, 32, 32), 3, 2.0
HEADS = {"heads alone": ("conv1",) * E, "heads that read earlier ones": ("conv1", "conv1+", "conv1+")}


@once
def early(heads: tuple[str, ...] = HEADS["heads alone"]) -> ptee.EarlyExitModel:
    exits = ["layer1.0", "layer2.0", "layer3.0"]
    return build(load_backbone("cifar_resnet8", pretrained=False), exits=exits, head=list(heads))


@pytest.fixture(params=HEADS)
def model(request) -> ptee.EarlyExitModel:
    model = early(HEADS[request.param])
    model.confidence = "max_prob"
    model.blend, model.answers = blend_for(E), "blended"
    return model


@pytest.fixture
def x() -> Tensor:
    return 3 * torch.randn(12, *SIZE, generator=seeded(1))


def spread(model: ptee.EarlyExitModel, x: Tensor) -> list[float]:
    """Thresholds at which some rows leave at each exit that is on."""
    h = model.blended(model.all_exits(x)).confidence
    return [h[n].quantile(0.7).item() for n in range(E)]


@pytest.mark.parametrize("off", [off for size in range(E) for off in combinations(range(E), size)], ids=str)
def test_each_row_gets_the_blend_of_the_exits_that_are_on_and_that_it_has_passed(model, x, off):
    model.off = off
    model.threshold = spread(model, x)
    own, out = model.all_exits(x).logits, model.predict(x)
    assert len(out.exit_index.unique()) > 1
    for row, n in enumerate(out.exit_index.tolist()):
        before = tuple(m for m in range(n) if m not in off)
        wanted = model.blend.logits(n, own[n, row], {m: own[m, row] for m in before})
        assert torch.allclose(out.logits[row], wanted, atol=1e-5)


def test_a_row_gets_the_same_alone_and_in_any_batch(model, x):
    model.threshold = spread(model, x)
    together = model.predict(x)
    alone = [model.predict(row) for row in x.split(1)]
    assert torch.cat([out.exit_index for out in alone]).tolist() == together.exit_index.tolist()
    assert torch.allclose(torch.cat([out.logits for out in alone]), together.logits, atol=1e-5)


def test_a_row_whose_thresholds_are_all_above_one_gets_the_backbones_own_answer_bit_for_bit(model, x):
    with torch.no_grad():
        bare = model.backbone(x)
    model.threshold = NEVER
    assert torch.equal(model(x), bare)
    table = torch.full((len(x), E), NEVER, dtype=torch.float64)
    table[::2, 1] = 1.0  # which no confidence here reaches
    out = model.predict(x, table)
    assert out.exit_index.tolist() == [E] * len(x)
    assert torch.equal(out.logits[1::2], bare[1::2])
    assert not any(torch.equal(a, b) for a, b in zip(out.logits[::2], bare[::2], strict=True))


def test_exits_that_are_off_say_nothing_and_all_of_them_off_is_the_backbone(model, x):
    with torch.no_grad():
        bare = model.backbone(x)
    model.off = [0, 1, 2]
    model.threshold = 0.5
    assert torch.equal(model(x), bare)


def test_a_row_with_an_answer_that_is_not_finite_goes_to_the_end_and_gets_the_backbones_answer(x):
    model = early()
    model.confidence, model.blend, model.answers = "max_prob", blend_for(E), "blended"
    with torch.no_grad():
        bare = model.backbone(x)
    model.threshold = [1.0, 0.0, 0.0]
    model.heads[0].logits.register_forward_hook(
        lambda _m, _a, y: y.masked_fill((torch.arange(len(y)) == 3)[:, None], torch.nan)
    )
    out = model.predict(x)
    assert out.exit_index.tolist() == [E if row == 3 else 1 for row in range(len(x))]
    assert torch.allclose(out.logits[3], bare[3], atol=1e-5)


def test_all_exits_gives_own_answers_and_what_is_trained_is_own_answers(model, x):
    blended = model.all_exits(x).logits
    model.answers = "own"
    assert torch.equal(model.all_exits(x).logits, blended)


def test_traces_and_measurements_are_what_running_the_model_gives(model, x):
    labels = model.backbone(x).argmax(1)
    model.threshold = spread(model, x)
    out = model.predict(x)
    traces = record(model, TensorDataset(x, labels), progress=False)
    leaving = traces.leaving(model.threshold)
    assert torch.equal(leaving, out.exit_index.cpu())
    assert torch.equal(traces.answers.gather(0, leaving[None])[0], out.logits.argmax(1).cpu())
    results = ptee.evaluate(model, TensorDataset(x, labels), speed=False)
    assert results.rows[0].fidelity == results.rows[0].accuracy == 1, "the backbone's row is the backbone's"
    assert results.early_exit.accuracy == pytest.approx((out.logits.argmax(1) == labels).double().mean().item())
    assert results.blended_end.cost == pytest.approx(model.costs[-1])
    assert "all go to the end, blended" in str(results)


def test_a_saved_model_answers_the_same(model, x, tmp_path):
    model.threshold, model.off = spread(model, x), [1]
    model.save_pretrained(tmp_path / "run")
    again = ptee.load(tmp_path / "run", copy.deepcopy(model.backbone))
    assert (again.answers, again.blend.weights) == ("blended", model.blend.weights)
    for one, other in zip(model.predict(x), again.predict(x), strict=True):
        assert torch.equal(one, other)


DAMAGED = {
    "no weights": {"blend": None},
    "another kind": {"name": "both"},
    "a weight below 0": {"weights": [{"exit": 0, "with": [], "weights": [-1.0]}]},
    "a weight too few": {"weights": [{"exit": 2, "with": [0, 1], "weights": [1.0]}]},
    "exits of no order": {"weights": [{"exit": 1, "with": [2], "weights": [1.0, 1.0]}]},
    "weights of other exits": {"weights": [{"exit": 0, "with": [], "weights": [1.0]}]},
    "no numbers": {"weights": [{"exit": 0, "with": [], "weights": ["NaN"]}]},
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_run_whose_weights_are_damaged_is_refused_in_one_line(damage, tmp_path):
    model = early()
    model.confidence, model.blend, model.answers = "max_prob", blend_for(E), "blended"
    model.save_pretrained(tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    part = config["answers"] if damage.keys() & {"blend", "name"} else config["answers"]["blend"]
    part |= damage
    file.write_text(json.dumps(config))
    with pytest.raises(RunError) as refusal:
        ptee.load(tmp_path / "run", copy.deepcopy(model.backbone))
    assert "\n" not in str(refusal.value)


def test_blended_answers_are_refused_before_they_are_fitted():
    with pytest.raises(PteeError, match=r"not blended yet.*ptee\.tune"):
        early().answers = "blended"


def test_another_kind_of_answers_is_refused_with_the_kinds_there_are():
    with pytest.raises(PteeError, match=r"'both'.*blended, own"):
        early().answers = "both"


def test_a_confidence_that_needs_own_answers_is_refused(model):
    with pytest.raises(PteeError, match="'patience' needs the exits' own answers"):
        model.confidence = "patience"


def test_training_is_refused_while_answers_are_blended(model, x):
    with pytest.raises(PteeError, match=r"answers are blended.*model\.answers = 'own'"):
        ptee.train(model, TensorDataset(x, torch.zeros(len(x), dtype=torch.int64)), epochs=1)


def test_exits_are_switched_only_where_there_are_weights_for_the_rest(model, x):
    model.blend = Blend({(n, tuple(range(n))): (1.0,) * (n + 1) for n in range(E + 1)})  # as with many exits
    with pytest.raises(PteeError, match=r"blended for other exits than \[0, 2\]"):
        model.off = [1]
    assert model.off == ()


def other_weights(blend: dict) -> None:
    blend["weights"][2]["weights"] = [0.0, 0.5]


def other_end(blend: dict) -> None:
    blend["to_the_end"] = not blend["to_the_end"]


@pytest.mark.parametrize("change", [other_weights, other_end])
def test_weights_that_were_changed_by_hand_are_refused(change, model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["answers"]["blend"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="changed or damaged"):
        ptee.load(tmp_path, model.detach())
