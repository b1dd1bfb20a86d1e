"""A model's confidence: what predict decides by is what a slow loop finds, what traces say, and what is saved."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from device import seeded
from small import made
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError, RunError, UnknownName
from ptee.exits.confidence import CONFIDENCES, Calibrated
from ptee.model.early_exit import EarlyExitModel
from ptee.model.run_files import CONFIG
from ptee.tuning.traces import record

N = 24
each_confidence = pytest.mark.parametrize("name", CONFIDENCES)
MODELS = {"alone": "pool", "on one another": "pool+"}  # how the two heads build, and their names
each_kind = pytest.mark.parametrize("kind", MODELS)


def with_confidence(name: str, kind: str = "alone") -> EarlyExitModel:
    model = made(MODELS[kind])
    with torch.no_grad():
        every = model.all_exits(images(model)).logits
        for head, logits in zip(model.heads, every[:-1], strict=True):
            head.logits.bias -= logits.mean(0)  # so that answers differ, and some agree with those before
    model.calibrated = Calibrated((0.5, 1.5), (0.0, 0.1))
    model.confidence = name
    return model


def images(model: EarlyExitModel, n: int = N) -> Tensor:
    return torch.randn(n, *model.plan.input_size, generator=seeded(1))


def splitting(h: Tensor) -> list[float]:
    """Thresholds (E,) between two confidences (E, n) of each exit; above 1 where an exit has the same for all rows."""
    values = [own.unique() for own in h.detach().double()]
    return [v[len(v) // 2 - 1 : len(v) // 2 + 1].mean().item() if len(v) > 1 else 2.0 for v in values]


def slow_confidence(model: EarlyExitModel, logits: list[list[float]], n: int, confidence_logit: float) -> float:
    """h of one row, from the definition."""
    log_p = [y - max(logits[n]) - math.log(sum(math.exp(z - max(logits[n])) for z in logits[n])) for y in logits[n]]
    p = sorted((math.exp(y) for y in log_p), reverse=True)
    if model.confidence == "learned":
        return 1 / (1 + math.exp(-confidence_logit))
    if model.confidence == "max_prob":
        return p[0]
    if model.confidence == "margin":
        return p[0] - p[1]
    if model.confidence == "entropy":
        return 1 + sum(q * math.log(q) for q in p) / math.log(len(p))
    if model.confidence == "patience":
        own = [y.index(max(y)) for y in logits[: n + 1]]
        streak = next((i for i, answer in enumerate(reversed(own)) if answer != own[n]), n + 1)
        return streak / (len(model.exits) + 1)
    odds = math.log(p[0] / sum(p[1:]))
    return 1 / (1 + math.exp(-(model.calibrated.scale[n] * odds + model.calibrated.shift[n])))


def slow_predict(model: EarlyExitModel, x: Tensor, limits: list[float]) -> tuple[list[int], list[float]]:
    """Where each row leaves, and its h there: one row after another, in Python."""
    exits, found = [], []
    for image in x:
        every = model.all_exits(image[None])
        logits = every.logits[:-1, 0].double().tolist()
        h = [
            slow_confidence(model, logits, n, sure)
            for n, sure in enumerate(every.confidence_logits[:, 0].double().tolist())
        ]
        leaving = next((n for n, own in enumerate(h) if own >= limits[n]), len(h))
        exits.append(leaving)
        found.append([*h, 1.0][leaving])
    return exits, found


@each_kind
@each_confidence
def test_predict_a_slow_loop_and_traces_agree_on_who_leaves_where(name, kind):
    model = with_confidence(name, kind)
    x = images(model)
    limits = splitting(model.all_exits(x).confidence[:-1])
    out = model.predict(x, limits)
    exits, h = slow_predict(model, x, limits)
    assert len(set(exits)) > 1
    assert out.exit_index.tolist() == exits
    torch.testing.assert_close(out.confidence, torch.tensor(h), rtol=1e-4, atol=1e-5)
    assert record(model, list(x)).leaving(limits).tolist() == exits
    model.confidence = "learned"
    under = record(model, list(x)).under(name)
    assert under.leaving(limits).tolist() == exits
    assert under.confidence_name == name


@each_confidence
def test_what_was_read_is_answered_as_the_images(name):
    model = with_confidence(name, "on one another")
    x = images(model, 6)
    torch.testing.assert_close(model.answer(model.read(x)), model.all_exits(x), rtol=1e-4, atol=1e-4)


@each_confidence
def test_a_row_of_nan_never_leaves_and_its_neighbours_leave_as_without_it(name):
    model = with_confidence(name)
    x = images(model)
    limits = splitting(model.all_exits(x).confidence[:-1])
    clean = model.predict(x, limits).exit_index.tolist()
    x[5] = math.nan
    E = len(model.exits)
    assert model.predict(x, -math.inf).exit_index.tolist() == [E if i == 5 else 0 for i in range(N)]
    assert model.predict(x, limits).exit_index.tolist() == [E if i == 5 else n for i, n in enumerate(clean)]


class Wide(nn.Module):
    """A network of 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.one(x).mean((2, 3)))


@each_confidence
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_half_precision_with_1000_classes_rows_differ_in_h_and_leave_as_traces_say(name, dtype):
    model = ptee.augment(Wide(), exits=["one"], input_size=(3, 8, 8)).to(dtype)
    with torch.no_grad():
        model.heads[0].logits.weight.mul_(20)
        model.heads[0].logits.bias[0] += 6
    model.calibrated = Calibrated((0.8,), (0.1,))
    model.confidence = name
    x = images(model).to(dtype)
    every = model.all_exits(x)
    exact = CONFIDENCES[name] if name != "calibrated" else model.calibrated
    want = exact.at_all_exits(every.logits[:-1].double(), every.confidence_logits.double())
    assert every.confidence.dtype == torch.float32
    torch.testing.assert_close(every.confidence, want, rtol=1e-5, atol=1e-6)
    if name != "patience":  # which has one value at the first exit
        assert len(every.confidence[0].unique()) > N / 2
    limits = splitting(every.confidence[:-1])
    assert torch.equal(record(model, list(x)).leaving(limits), model.predict(x, limits).exit_index.cpu())


# ---------------------------------------------------------------------------------------------------- set and saved


def test_a_new_model_has_the_learned_confidence_and_another_is_set_live():
    model = made()
    assert model.confidence == "learned"
    x = images(model)
    own = model.predict(x, 0).confidence
    model.confidence = "entropy"
    assert not torch.equal(model.predict(x, 0).confidence, own)
    model.confidence = "learned"
    assert torch.equal(model.predict(x, 0).confidence, own)


@pytest.mark.parametrize("name", ["max prob", None, 3], ids=repr)
def test_what_is_no_confidence_is_refused_by_name(name):
    model = made()
    with pytest.raises(UnknownName, match=f"Unknown confidence {name!r}.*calibrated, entropy, learned"):
        model.confidence = name
    assert model.confidence == "learned"


def test_calibrated_is_refused_for_a_model_that_is_not():
    with pytest.raises(PteeError, match="has not been fitted to this model"):
        made().confidence = "calibrated"
    with pytest.raises(PteeError, match="has not been fitted to this model"):
        record(made(), list(images(made()))).under("calibrated")


def test_patience_runs_the_heads_of_exits_that_are_off_and_pays_for_them():
    model = with_confidence("max_prob")
    model.off = [0]
    without = model.costs
    model.confidence = "patience"
    assert (model.plan.skipped, model.off) == ((), (0,))
    assert model.costs[1] == pytest.approx(without[1] + model.exits[0].head_cost)
    x = images(model)
    out = model.predict(x, 0.6)  # two in a row of E + 1 = 3
    agree = model.all_exits(x).logits[:2].argmax(-1)
    assert out.exit_index.tolist() == [1 if one == other else 2 for one, other in agree.T.tolist()]
    assert out.cost.tolist() == pytest.approx([model.costs[n] for n in out.exit_index.tolist()])


def test_the_plan_says_by_what_rows_leave_where_it_is_not_the_learned_confidence():
    model = with_confidence("entropy")
    assert "Rows leave by the confidence 'entropy'." in str(model.plan)
    model.confidence = "learned"
    assert "Rows leave by" not in str(model.plan)


def saved(model: EarlyExitModel, folder: Path) -> EarlyExitModel:
    model.save_pretrained(folder)
    return ptee.load(folder, copy.deepcopy(model).detach())


@each_confidence
def test_a_saved_model_comes_back_with_its_confidence_bit_for_bit(name, tmp_path):
    model = with_confidence(name, "on one another")
    model.calibrated = Calibrated((1 / 3, 2e-7), (-1 / 7, 0.1))  # no round numbers
    model.off = [0]
    back = saved(model, tmp_path)
    x = images(model)
    assert (back.confidence, back.calibrated, back.costs) == (name, model.calibrated, model.costs)
    assert torch.equal(back.all_exits(x).confidence, model.all_exits(x).confidence)
    assert torch.equal(back.predict(x, 0.4).confidence, model.predict(x, 0.4).confidence)


def edit(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def test_a_run_that_does_not_name_a_confidence_has_the_learned_one(tmp_path):
    model = made()
    saved(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["confidence"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    back = ptee.load(tmp_path, copy.deepcopy(model).detach())
    assert (back.confidence, back.calibrated) == ("learned", None)


@pytest.mark.parametrize("gate", ["answers", "features"])
def test_a_run_of_0_1_0_with_gates_is_refused_with_what_to_do(gate, tmp_path):
    model = made()
    saved(model, tmp_path)
    rows = json.loads((tmp_path / CONFIG).read_text())["exits"]
    edit(tmp_path, exits=[{**rows[0], "gate": None}, {**rows[1], "gate": gate}])
    said = (
        "its confidence comes from gates, which this version does not have. Train it again, or load it with ptee 0.1.0"
    )
    with pytest.raises(RunError, match=said):
        ptee.load(tmp_path, copy.deepcopy(model).detach())
    edit(tmp_path, exits=[{**row, "gate": None, "looks_back": False} for row in rows])
    assert ptee.load(tmp_path, copy.deepcopy(model).detach()).confidence == "learned"


NUMBERS = "confidence.scale and confidence.shift must have 2 numbers each, or none"


@pytest.mark.parametrize(
    ("confidence", "said"),
    [
        ("learned", "confidence='learned' must be a mapping"),
        ({"name": 3, "scale": [], "shift": []}, "confidence.name=3 must be text"),
        ({"name": "learned"}, "confidence.scale is missing"),
        ({"name": "entorpy", "scale": [], "shift": []}, r"'entorpy'.*register_confidence.*Did you mean 'entropy'"),
        ({"name": "calibrated", "scale": [], "shift": []}, "no numbers for the confidence 'calibrated'"),
        ({"name": "calibrated", "scale": [1.0], "shift": [0.0]}, NUMBERS),
        ({"name": "calibrated", "scale": [1.0, 1.0], "shift": []}, NUMBERS),
        ({"name": "learned", "scale": [], "shift": [1.0]}, NUMBERS),
        (
            {"name": "calibrated", "scale": [1.0, -1.0], "shift": [0.0, 0.0]},
            r"confidence.scale\[1\]=-1.0 must be above 0",
        ),
        (
            {"name": "learned", "scale": [1.0, 1.0], "shift": ["Infinity", 0.0]},
            r"confidence.shift\[0\]='Infinity' must be a number",
        ),
    ],
    ids=str,
)
def test_a_run_whose_confidence_cannot_be_is_refused(confidence, said, tmp_path):
    model = made()
    saved(model, tmp_path)
    edit(tmp_path, confidence=confidence)
    with pytest.raises(RunError, match=said):
        ptee.load(tmp_path, copy.deepcopy(model).detach())
