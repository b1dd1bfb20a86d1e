"""What the public functions say of an argument of the wrong kind: its name, what was given, and what to give."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import PteeError
from ptee.production.curve import Curve, Wish, best_within
from ptee.timing.measure import measure


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


@cache
def model() -> ptee.EarlyExitModel:
    return ptee.augment(net(), exits=["1"], head="pool", input_size=(3, 8, 8))


def images() -> TensorDataset:
    return TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 2)


def unlabelled() -> TensorDataset:
    return TensorDataset(torch.randn(40, 3, 8, 8))


def untimed() -> Curve:
    """A curve without times."""
    return Curve(
        confidence="max_prob",
        answers="own",
        points=[{"threshold": [0.5], "cost": 0.5, "drop": 0.1, "fidelity_drop": 0.1}],
        images=8,
    )


# ---------------------------------------------------------------------------------------------------- images

DATA = {
    "train_data": lambda wrong: ptee.train(model(), wrong),
    "val_data": lambda wrong: ptee.train(model(), images(), wrong),
    "train_data of fit": lambda wrong: ptee.fit(model().backbone, wrong),
    "val_data of fit": lambda wrong: ptee.fit(model().backbone, images(), val_data=wrong),
    "calibration_data of fit": lambda wrong: ptee.fit(model().backbone, images(), calibration_data=wrong),
    "data of calibrate": lambda wrong: ptee.calibrate(model(), wrong),
    "data of tune": lambda wrong: ptee.tune(model(), wrong, max_drop=0.01),
    "data of evaluate": lambda wrong: ptee.evaluate(model(), wrong),
    "calibration of compare": lambda wrong: ptee.compare({"a": model()}, wrong, images()),
    "report of compare": lambda wrong: ptee.compare({"a": model()}, images(), wrong),
}


@pytest.mark.parametrize(
    ("wrong", "described"),
    [
        ("photos", r"str \('photos'\)"),
        (3, r"int \(3\)"),
        (Path("photos"), r"PosixPath \(PosixPath\('photos'\)\)"),
        ({"a": 1}, "dict"),
    ],
    ids=["text", "number", "path", "mapping"],
)
@pytest.mark.parametrize("case", DATA)
def test_data_of_another_kind_are_named_as_the_argument_is_called(case, wrong, described):
    name = case.partition(" ")[0]
    with pytest.raises(PteeError, match=f"^{name} is a {described}[,.] ") as why:
        DATA[case](wrong)
    assert why.value.argument == name
    assert why.value.value is wrong
    assert len(str(why.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------------- models

OPTIMIZED = {
    "train": lambda fast: ptee.train(fast, images()),
    "calibrate": lambda fast: ptee.calibrate(fast, images()),
    "tune": lambda fast: ptee.tune(fast, images(), max_drop=0.01),
    "evaluate": lambda fast: ptee.evaluate(fast, images()),
    "compare": lambda fast: ptee.compare({"a": fast}, images(), images()),
    "export": lambda fast: ptee.export(fast, "folder"),
    "optimize": ptee.optimize,
    "record": lambda fast: ptee.traces.record(fast, images()),
    "measure": measure,
}


@pytest.mark.parametrize("what", OPTIMIZED)
def test_of_an_optimized_model_the_early_exit_model_is_asked_for(what):
    with pytest.raises(
        PteeError, match=r"^This is of type OptimizedModel, and the early-exit model is its \.model\. Give that\.$"
    ):
        OPTIMIZED[what](ptee.optimize(model(), mode="eager"))


ADD = {"augment": ptee.augment, "plan": ptee.plan, "fit": lambda given: ptee.fit(given, images())}


@pytest.mark.parametrize("add", ADD)
@pytest.mark.parametrize("given", [lambda: model(), lambda: ptee.optimize(model(), mode="eager")])
def test_no_exits_are_added_to_exits(add, given):
    with pytest.raises(PteeError, match="has exits already"):
        ADD[add](given())


# ---------------------------------------------------------------------------------------------------- values

WRONG = {
    "head": (lambda wrong: ptee.augment(net(), input_size=(3, 8, 8), exits=["1"], head=wrong), "pol"),
    "head of fit": (lambda wrong: ptee.fit(net(), images(), exits=["1"], head=wrong), "pol"),
    "head that is too large": (lambda wrong: ptee.plan("cifar_resnet8", pretrained=False, head=wrong), "res-9999x1"),
    "head_budget": (lambda wrong: ptee.plan("cifar_resnet8", pretrained=False, head="auto", head_budget=wrong), -1),
    "exits": (lambda wrong: ptee.plan("cifar_resnet8", pretrained=False, exits=wrong), "layr1"),
    "exits as numbers": (lambda wrong: ptee.plan("cifar_resnet8", pretrained=False, exits=wrong), [2.0]),
    "exits of fit": (lambda wrong: ptee.fit(net(), images(), exits=wrong), "layr1"),
    "num_exits": (lambda wrong: ptee.plan("cifar_resnet8", pretrained=False, num_exits=wrong), 0),
    "device": (lambda wrong: ptee.evaluate(model(), images(), device=wrong), "gpu"),
    "device of fit": (lambda wrong: ptee.fit(net(), images(), device=wrong), "gpu"),
    "threshold": (lambda wrong: setattr(model(), "threshold", wrong), "high"),
    "threshold of predict": (lambda wrong: model().predict(torch.randn(1, 3, 8, 8), threshold=wrong), [[[0.5]]]),
    "off": (lambda wrong: setattr(model(), "off", wrong), [7]),
    "answers": (lambda wrong: setattr(model(), "answers", wrong), "mixed"),
    "confidence": (lambda wrong: setattr(model(), "confidence", wrong), "entropi"),
    "target": (lambda wrong: ptee.calibrate(model(), images(), target=wrong), "rigth"),
    "format": (lambda wrong: ptee.export(model(), "new", format=wrong), "onx"),
    "mode": (lambda wrong: ptee.optimize(model(), mode=wrong), "egaer"),
    "max_batch": (lambda wrong: ptee.optimize(model(), max_batch=wrong), 0),
    "recipe": (lambda wrong: ptee.fit(net(), images(), recipe=wrong), "ptea"),
    "recipe that is no recipe": (lambda wrong: ptee.fit(net(), images(), recipe=wrong), "no.yaml"),
    "threshold for other exits": (lambda wrong: setattr(model(), "threshold", wrong), [0.9, 0.8]),
    "threshold for other exits in a call": (lambda wrong: ptee.evaluate(model(), images(), threshold=wrong), [0.9, 0.8]),
    "thresh": (lambda wrong: model().predict(torch.randn(1, 3, 8, 8), thresh=wrong), 0.5),
    "thresholds": (lambda wrong: setattr(model(), "thresholds", wrong), [0.5]),
    "num_exit": (lambda wrong: ptee.plan("cifar_resnet8", num_exit=wrong), 2),
    "soft": (lambda wrong: model().predict(torch.randn(1, 3, 8, 8), 0.5, soft=wrong), True),
    "models": (lambda wrong: ptee.compare(wrong, images(), images()), {}),
    "max_drop": (lambda wrong: ptee.fit(net(), unlabelled(), input_size=(3, 8, 8), max_drop=wrong), 0.02),
    "targets": (lambda wrong: ptee.fit(net(), unlabelled(), input_size=(3, 8, 8), targets=wrong), "labels"),
    "max_time_ms": (lambda wrong: best_within(untimed(), Wish(max_time_ms=wrong)), 3.0),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_argument_that_is_wrong_and_holds_what_was_given(case):
    call, wrong = WRONG[case]
    with pytest.raises(PteeError) as why:
        call(wrong)
    assert (why.value.argument, why.value.value) == (case.partition(" ")[0], wrong)


# ---------------------------------------------------------------------------------------------------- names

MISSPELT = {
    "augment": (lambda: ptee.augment("resnet18", num_exit=2), "augment", "num_exit", "num_exits"),
    "plan": (lambda: ptee.plan("resnet18", num_exit=2), "plan", "num_exit", "num_exits"),
    "calibrate": (lambda: ptee.calibrate(model(), images(), targets="right"), "calibrate", "targets", "target"),
    "tune": (lambda: ptee.tune(model(), images(), max_dropp=0.01), "tune", "max_dropp", "max_drop"),
    "evaluate": (lambda: ptee.evaluate(model(), images(), thresold=0.5), "evaluate", "thresold", "threshold"),
    "compare": (lambda: ptee.compare({}, images(), images(), drop=[0]), "compare", "drop", "drops"),
    "export": (lambda: ptee.export(model(), "new", formt="onnx"), "export", "formt", "format"),
    "load_exported": (lambda: ptee.load_exported("new", thread=1), "load_exported", "thread", "threads"),
    "optimize": (lambda: ptee.optimize(model(), maxbatch=2), "optimize", "maxbatch", "max_batch"),
    "record": (lambda: ptee.record("run", "data", "new", worker=2), "record", "worker", "workers"),
    "cache": (lambda: ptee.cache("run", "data", "new", worker=2), "cache", "worker", "workers"),
    "monitor": (lambda: model().monitor(on_alarms="never_leave"), "monitor", "on_alarms", "on_alarm"),
    "predict": (lambda: model().predict(torch.randn(1, 3, 8, 8), tresh=0.5), "predict", "tresh", "threshold"),
    "predict of optimize": (lambda: ptee.optimize(model()).predict(torch.randn(1, 3, 8, 8), tresh=0.5), "predict", "tresh", "threshold"),
    "threshold_for": (lambda: model().threshold_for(maxdrop=0.01), "threshold_for", "maxdrop", "max_drop"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSPELT)
def test_a_misspelt_argument_is_named_and_so_is_the_right_one(what):
    call, function, wrong, right = MISSPELT[what]
    with pytest.raises(
        PteeError, match=rf"^{function}\(\) has no argument '{wrong}'\. Did you mean .*'{right}'"
    ) as why:
        call()
    assert why.value.argument == wrong
    assert len(str(why.value).splitlines()) == 1


@pytest.mark.parametrize("call", [ptee.train, ptee.fit], ids=["train", "fit"])
def test_a_misspelt_setting_is_named_and_so_is_the_right_one(call):
    first = model().backbone if call is ptee.fit else model()
    with pytest.raises(PteeError, match=r"epoch.*Did you mean .*epochs"):
        call(first, images(), epoch=3)


@pytest.mark.parametrize("call", [ptee.train, ptee.fit], ids=["train", "fit"])
@pytest.mark.parametrize(("wrong", "right"), [("val", "val_data"), ("maxdata", "train_data"), ("Val_Data", "val_data")])
def test_a_misspelt_argument_beside_settings_is_answered_with_arguments_too(call, wrong, right):
    first = model().backbone if call is ptee.fit else model()
    with pytest.raises(PteeError, match=rf"'{wrong}'\. Did you mean .*'{right}'") as why:
        call(first, images(), **{wrong: images()})
    assert why.value.argument == wrong


def test_a_misspelt_setting_of_a_training_leaves_what_was_fitted(monkeypatch):
    given = model()
    monkeypatch.setattr(given, "calibrated", "as fitted")
    with pytest.raises(PteeError, match="epoch"):
        ptee.train(given, images(), epoch=3)
    assert given.calibrated == "as fitted"


@pytest.mark.parametrize(
    "call",
    [
        lambda wrong: ptee.compare(wrong, images(), images()),
        lambda wrong: ptee.compare({"a": model()}, images(), images(), device=wrong),
        lambda wrong: ptee.tune(model(), images(), max_drop=0.01, batch_size=wrong),
        lambda wrong: ptee.load(wrong),
        lambda wrong: ptee.optimize(model(), dtype=wrong),
        lambda wrong: ptee.optimize(model(), max_memory=wrong),
        lambda wrong: model().predict(torch.randn(1, 3, 8, 8), threshold=wrong),
    ],
    ids=["models", "device", "batch_size", "folder", "dtype", "max_memory", "threshold"],
)
def test_a_module_in_the_wrong_place_is_named_by_its_class_and_not_printed(call):
    with pytest.raises(PteeError, match=r"Sequential\(\.\.\.\)") as why:
        call(net())
    assert "Conv2d" not in str(why.value)
    assert len(str(why.value).splitlines()) == 1
