"""Damaged and hostile run folders: each is refused in one line, or loads and answers as the run that was saved."""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from device import seeded
from safetensors.torch import save_file
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError
from ptee._common.files import to_json
from ptee._common.text import printable
from ptee._common.writing import write_json
from ptee.backbones.load import load_backbone
from ptee.exits.confidence import Calibrated
from ptee.model.build import build
from ptee.model.early_exit import EarlyExitModel
from ptee.model.run_files import read_metrics
from ptee.pipeline.recipe import make_recipe

SIZE = (3, 16, 16)
PATIENCE_S = 120  # until a load counts as one that never ends
FILES = ("config.json", "config.json", "config.json", "heads.safetensors", "metrics.json", "recipe.yaml")
HOSTILE = [
    *(None, True, False, 0, -1, 1, 0.5, 1e308, 2**63, 2**64, 10**40, float("nan"), float("inf"), "", "Infinity", "NaN", "/", "..", "x" * 5000),
    *([], {}, [[]], [None], [0.5, 0.5], "\x1b[2J", "\ud800", "\u202e", "\x00", "//host/share", "\\/host\\share", "hf-hub:stranger/net"),
    *("pool", "conv2", "auto", "res-8x8", "one", "two", "fc", "max_prob", "entropy", "calibrated", "learned", [3, 20000, 20000], [0], [1], [0, 1]),
]  # fmt: skip


class Net(nn.Module):
    """A user's network, with modules of equal shape that an exit could be moved to."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Conv2d(8, 8, 3, 2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.one(x)).mean((2, 3)))


@pytest.fixture
def original(tmp_path) -> tuple[EarlyExitModel, Path]:
    """A calibrated model of two exits with everything that a run folder can hold."""
    model = build(load_backbone(Net(), input_size=SIZE), exits=["one", "two"], head=["conv1", "res-8x1+"])
    model.calibrated = Calibrated((1.5, 2.0), (0.25, -0.5))
    model.confidence, model.threshold = "calibrated", [0.6, 0.4]
    model.results = {
        "rows": [{"exit": 0, "cost": 0.5}],
        "data": {"source": "digits", "split": {"seed": 1}},
        "samples": 3,
    }
    model.save_pretrained(tmp_path / "run")
    write_json(tmp_path / "run" / "metrics.json", {"results": model.results, "plan": model.plan.to_dict()})
    (tmp_path / "run" / "recipe.yaml").write_text(make_recipe().to_yaml())
    return model, tmp_path / "run"


@pytest.fixture
def named(tmp_path) -> tuple[EarlyExitModel, Path]:
    """A model whose backbone and front network are built again from what config.json says."""
    weights = tmp_path / "weights.safetensors"
    save_file(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), weights)
    model = ptee.augment(
        "cifar_resnet8", weights=weights, front="cifar_resnet8", front_weights=weights, exits=["layer2"]
    )
    model.results = {"rows": [], "samples": 3}
    model.save_pretrained(tmp_path / "run")
    return model, tmp_path / "run"


# ---------------------------------------------------------------------------------------------------- damage


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """A file after a bad disk, a bad transfer or a bad editor."""
    at, length = rng.randrange(len(content)), rng.choice([1, 2, 8, 100, 1000])
    some = rng.randbytes(length)
    flipped = bytes([content[at] ^ (1 << rng.randrange(8))])
    return rng.choice([
        content[:at] + flipped + content[at + 1 :],
        content[:at] + flipped + content[at + 1 :],
        content[:at] + some + content[at + length :],
        content[:at] + some + content[at:],
        content[:at] + content[at + length :],
        content[:at] + content[at : at + length] * 2 + content[at + length :],
        content[:at],
        content[at:],
        content + some,
    ])  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list and object with each of its keys."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(inside):
        yield value, key
        yield from places(inner)


def damaged_values(values: Any, rng: random.Random) -> None:
    """JSON that is JSON, with one thing in it that should not be there."""
    holder, key = rng.choice(list(places(values)))
    other_holder, other_key = rng.choice(list(places(values)))
    what = rng.choice(["value", "value", "value", "delete", "swap", "nudge", "nest"])
    if what == "delete":
        del holder[key]
    elif what == "swap":
        holder[key] = copy.deepcopy(other_holder[other_key])
    elif what == "nest":
        for _ in range(rng.choice([1, 50, 500])):
            holder[key] = [holder[key]]
    elif what == "nudge" and isinstance(holder[key], int | float):
        holder[key] += rng.choice([-1, 1, 0.125])
    else:
        holder[key] = rng.choice(HOSTILE)


def damaged(name: str, content: bytes, rng: random.Random) -> bytes:
    """A file of a run with one thing wrong."""
    if rng.random() < 0.4 or name == "recipe.yaml":
        return damaged_bytes(content, rng)
    if name != "heads.safetensors":
        values = json.loads(content)
        damaged_values(values, rng)
        return json.dumps(values).encode()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    damaged_values(header, rng)
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + content[8 + length :]


# ---------------------------------------------------------------------------------------------------- what comes of it


def answers(model: EarlyExitModel) -> tuple[Tensor, ...]:
    """What no edit of config.json may change."""
    x = torch.randn(4, *model.plan.input_size, generator=seeded(1))
    with torch.no_grad():
        model.predict(x)
        found = model.all_exits(x)
    return found.logits, found.confidence_logits


def outcome(folder: Path, name: str, model: EarlyExitModel) -> str:
    """What became of a run with one damaged file."""
    if name == "metrics.json":
        to_json(read_metrics(folder))
        return "read"
    if name == "recipe.yaml":
        make_recipe(folder, {}).resolved()
        return "read"
    own = copy.deepcopy(model.backbone) if model.origin.source is None else None
    loaded = ptee.load(folder, backbone=own)
    assert all(map(torch.equal, answers(loaded), answers(model))), "another answer"
    assert loaded.origin.input == model.origin.input, "another input"
    assert loaded.plan.switched_off(()).costs == model.costs, "other costs"
    to_json(loaded.results)
    free = ("threshold", "off", "confidence", "calibrated")
    same = all(getattr(loaded, field) == getattr(model, field) for field in free)
    return "loaded, the same" if same else "loaded, other thresholds or confidence"


def tried(folder: Path, name: str, model: EarlyExitModel) -> str:
    """The outcome; whatever is not a refusal in one line is a fault."""
    try:
        return outcome(folder, name, model)
    except PteeError as why:
        said = str(why)
        good = "\n" not in said and len(said) < 1000 and printable(said) == said
        return "refused" if good else f"FAULT: not one line: {said[:2000]!r}"
    except BaseException as why:
        return f"FAULT: {type(why).__name__}: {why!s:.300}"


def too_long(*_: object) -> None:
    raise TimeoutError("it never ends")


def fuzz(original: tuple[EarlyExitModel, Path], tries: int, seed: int, files: Sequence[str] = FILES) -> Counter[str]:
    """How often what came of a damaged file, by file."""
    model, folder = original
    whole = {name: (folder / name).read_bytes() for name in set(files)}
    counts: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, too_long)
    for n in range(tries):
        rng = random.Random(f"{seed} {n}")
        name = files[n % len(files)]
        (folder / name).write_bytes(damaged(name, whole[name], rng))
        signal.alarm(PATIENCE_S)
        found = tried(folder, name, model)
        signal.alarm(0)
        counts[f"{name}: {found}" + (f" (try {n})" if found.startswith("FAULT") else "")] += 1
        (folder / name).write_bytes(whole[name])
    return counts


def show(counts: Counter[str]) -> str:
    return "\n".join(f"{number:5} {words}" for words, number in sorted(counts.items()))


def check(counts: Counter[str], say: Callable[[str], Any]) -> None:
    say(show(counts))
    assert not [words for words in counts if "FAULT" in words]


needs_alarm = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs an alarm clock for what never ends")


@needs_alarm
def test_a_few_damaged_runs_are_refused_or_answer_as_before(original):
    check(fuzz(original, 24, seed=0), print)


@needs_alarm
@pytest.mark.fuzz
def test_thousands_of_damaged_runs_are_refused_or_answer_as_before(original, capsys):
    with capsys.disabled():
        check(fuzz(original, 3000, seed=1), print)


@needs_alarm
def test_a_few_damaged_runs_of_named_networks_are_refused_or_answer_as_before(named):
    check(fuzz(named, 8, seed=0, files=FILES[:4]), print)


@needs_alarm
@pytest.mark.fuzz
def test_hundreds_of_damaged_runs_of_named_networks_are_refused_or_answer_as_before(named, capsys):
    with capsys.disabled():
        check(fuzz(named, 600, seed=1, files=FILES[:4]), print)


def test_the_undamaged_run_loads_as_it_was(original):
    model, folder = original
    shutil.copytree(folder, folder.parent / "copy")
    assert tried(folder.parent / "copy", "config.json", model) == "loaded, the same"
