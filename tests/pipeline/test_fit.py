"""`ptee.fit` does from Python what `ptee augment` does: the same steps, the same defaults, the same numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import slow
from command import BRIEF, MODEL, TEN, figures, pictures, quietly, read_json
from device import here, seeded
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import DataError, Interrupted, PteeError, RunError, UnknownName
from ptee._common.writing import LOCK
from ptee.backbones.load import load_backbone
from ptee.exits.plan import TimesOfModules
from ptee.pipeline import fit as fitting
from ptee.pipeline.fit import build_model
from ptee.pipeline.images import open_images
from ptee.pipeline.recipe import make_recipe
from ptee.pipeline.run_folder import PLACED_BY, kept_times
from ptee.training import trainer

SIZE, K = (3, 8, 8), 4
SETTINGS = {"exits": ["0", "2"], "head": "pool", "epochs": 2, "batch_size": 16, "precision": "no"}


def network() -> nn.Module:
    torch.manual_seed(1)
    stages = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stages, nn.Linear(6, K))


def images(n: int, seed: int = 0, labels: bool = True) -> TensorDataset:
    generator = seeded(seed)
    x, y = torch.randn(n, *SIZE, generator=generator), torch.randint(K, (n,), generator=generator)
    return TensorDataset(x, y) if labels else TensorDataset(x)


fit = partial(ptee.fit, input_size=SIZE, device=here(), **SETTINGS)
at_half = partial(fit, threshold=0.5)  # where thresholds do not matter: none are searched for


@contextmanager
def interrupted_after_an_epoch(monkeypatch: pytest.MonkeyPatch, said: str = "") -> Iterator[None]:
    """Ctrl-C is pressed in the second epoch."""
    epoch = trainer._Training._epoch

    def broken(self, number: int, *more: object) -> trainer.Epoch:
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number, *more)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=said):
        patch.setattr(trainer._Training, "_epoch", broken)
        yield


# ---------------------------------------------------------------------------------------------------- as the command does


@pytest.mark.parametrize("recipe", ["ptee", *map(slow, ("eenet", "pteenet"))])
def test_command_and_python_end_with_the_same_thresholds_and_the_same_metrics(recipe, tmp_path):
    weights, folder = tmp_path / "weights.safetensors", pictures(tmp_path / "ten", TEN, 13)
    save_file(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), weights)
    name, value = ("calibration_share", 0.2) if recipe == "ptee" else ("targets", "pseudo")
    words = ("--weights", weights, "--data", folder, "--recipe", recipe, "--set", f"{name}={value}")
    words = (*words, "--head", "pool", "--no-speed", "--device", here(), "--out", tmp_path / "command")
    quietly("augment", *MODEL, *BRIEF, *words)
    source = {"weights": weights, "input_size": (3, 16, 16)}
    data, _ = open_images(str(folder), load_backbone("cifar_resnet8", **source), seed=0)
    settings = {
        "exits": ["layer1", "layer2"],
        "head": "pool",
        "epochs": 2,
        "batch_size": 12,
        "precision": "no",
        name: value,
    }
    parts = {"val_data": data.validation, "calibration_data": data.calibration}
    how = {"recipe": recipe, "out": tmp_path / "python", "device": here()}
    model = ptee.fit("cifar_resnet8", data.train, **parts, **how, **source, **settings)
    command, python = (read_json(tmp_path / name, "config.json") for name in ("command", "python"))
    assert command["threshold"] == python["threshold"] == list(model.threshold)
    assert command["confidence"] == python["confidence"]
    assert command["confidence"]["name"] == ("calibrated" if recipe == "ptee" else "max_prob")
    assert figures(command["results"]) == figures(python["results"]) == figures(model.results)
    one, other = (load_file(tmp_path / name / "heads.safetensors") for name in ("command", "python"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_every_setting_of_the_recipe_is_an_argument():
    with pytest.raises(UnknownName, match=r"^fit\(\) has no argument 'epoch'\. Did you mean 'epochs'"):
        fit(network(), images(60), epoch=3)
    with pytest.raises(UnknownName, match=r"no argument 'training\.epoch'\. Did you mean 'training\.epochs'"):
        fit(network(), images(60), **{"training.epoch": 3})
    with pytest.raises(PteeError, match=r"epochs=0 must be 1 or more, or 'auto'"):
        ptee.fit(network(), images(60), epochs=0)


@pytest.mark.parametrize("given", [{"train": 1}, {"traindata": 1}, {"train_data": 1, "outt": "run"}], ids=str)
def test_a_misspelt_argument_is_named_with_the_right_one_also_if_one_is_missing_therefore(given):
    wrong, right = ("outt", "out") if "outt" in given else (next(iter(given)), "train_data")
    with pytest.raises(UnknownName, match=rf"^fit\(\) has no argument '{wrong}'\. Did you mean '{right}'"):
        ptee.fit(network(), **given)


# ---------------------------------------------------------------------------------------------------- what comes back


def test_a_model_with_thresholds_and_results_comes_back_and_is_saved_with_its_recipe(tmp_path):
    said: list[str] = []
    model = fit(network(), images(80), out=tmp_path / "run", log=said.append, max_cost=0.9)
    assert not model.training
    assert model.results["samples"] == 8
    assert [known["images"] for known in model.results["trained_on"]] == [64], "and 8 for thresholds, 8 for the report"
    for words in ("epoch 2/2", "early exit, T = "):
        assert any(words in line for line in said)
    again = ptee.load(tmp_path / "run", network())
    assert again.threshold == model.threshold
    assert make_recipe(tmp_path / "run").resolved().thresholds.max_cost == 0.9


def test_the_recipe_of_a_run_gives_the_same_model_again(tmp_path):
    fit(network(), images(80), out=tmp_path / "one", seed=3)
    ptee.fit(network(), images(80), recipe=tmp_path / "one", out=tmp_path / "two", input_size=SIZE, device=here())
    one, two = (read_json(tmp_path / name, "config.json") for name in ("one", "two"))
    assert one["threshold"] == two["threshold"]
    assert figures(one["results"]) == figures(two["results"])
    assert (tmp_path / "one" / "recipe.yaml").read_text() == (tmp_path / "two" / "recipe.yaml").read_text()


def test_thresholds_by_time_are_chosen_by_what_was_measured_of_the_pieces(tmp_path, monkeypatch):
    from measured import values

    from ptee.timing.times import Times, read_times

    slow = values(device=here().type)
    slow["executors"][0]["heads"] = [[50.0, 50.0]] * 2
    monkeypatch.setattr(fitting, "measure", lambda model, sizes, executors: Times(**slow))
    model = fit(network(), images(40), max_cost=1.0, cost="time", at_batch=4, out=tmp_path / "run")
    assert model.off == (0, 1)
    assert model.results["tuning"]["unit"] == f"the bare backbone's time (hooks, batch 4, {here().type})"
    assert read_times(tmp_path / "run") == Times(**slow)


@pytest.mark.parametrize(
    ("usual", "names"),
    [
        slow({"exits": (0.4,)}, ["5"], id="one place"),
        pytest.param({"exits": None, "head": None}, ["5"], id="the default"),
    ],
)
def test_exits_are_placed_by_time_if_time_is_what_counts_and_a_training_that_goes_on_keeps_them(
    usual, names, tmp_path, monkeypatch
):
    def deep() -> nn.Module:
        torch.manual_seed(1)
        convs = [part for c in (3, 6, 6, 6) for part in (nn.Conv2d(c, 6, 3, 1, 1), nn.ReLU())]
        return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K))

    clocks = iter([{"3": 0.1, "5": 0.5, "7": 0.8}, {"3": 0.5, "5": 0.9, "7": 0.97}])  # the second time all is slower
    monkeypatch.setattr(fitting, "time_of_modules", lambda *_: TimesOfModules(next(clocks), 1.0, "a clock"))
    goal = {"max_cost": 1.5, "cost": "time", "at_batch": 2, "out": tmp_path / "run", "epochs": 2, **usual}
    with interrupted_after_an_epoch(monkeypatch):
        fit(deep(), images(40), **goal)
    kept = fit(deep(), images(40), resume=True, **goal)
    assert [e.name for e in kept.exits] == names
    assert kept.plan.unit == "a clock"
    assert len(list(clocks)) == 1  # nothing was measured again
    assert make_recipe(tmp_path / "run").exits.places == (usual["exits"] or (0.03, 0.4, 0.7))
    assert not (tmp_path / "run" / PLACED_BY).exists()


@pytest.mark.parametrize("overwrite", [slow(False, id="a new folder"), pytest.param(True, id="over another training")])
def test_times_that_exits_are_placed_by_are_kept_with_the_first_checkpoint(overwrite, tmp_path, monkeypatch):
    clocks = iter([{"0": 0.1, "2": 0.8}] * overwrite + [{"0": 0.2, "2": 0.6}, {"0": 0.5, "2": 0.97}])
    monkeypatch.setattr(fitting, "time_of_modules", lambda *_: TimesOfModules(next(clocks), 1.0, "a clock"))
    goal = {"max_cost": 1.5, "cost": "time", "at_batch": 2, "out": tmp_path / "run", "epochs": 2}
    if overwrite:
        with interrupted_after_an_epoch(monkeypatch):
            fit(network(), images(40), **goal)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(fitting, "take_over", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        fit(network(), images(40), overwrite=overwrite, **goal)
    assert kept_times(tmp_path / "run") == TimesOfModules({"0": 0.2, "2": 0.6}, 1.0, "a clock")
    fit(network(), images(40), resume=True, **goal)
    assert len(list(clocks)) == 1  # nothing was measured again


@pytest.mark.parametrize("step", ["labels_of", "build_model"])
def test_whoever_ends_it_before_the_training_is_told_that_nothing_was_kept(step, monkeypatch):
    monkeypatch.setattr(fitting, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match=r"^Nothing was kept, because no folder was given for the run\.$"):
        fit(network(), images(40), images(40, seed=1))


def test_a_run_that_is_to_be_overwritten_is_as_it_was_until_an_epoch_of_the_new_one_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "time_of_modules", lambda *_: TimesOfModules({"0": 0.2, "2": 0.6}, 1.0, "a clock"))
    goal = {"max_cost": 1.5, "cost": "time", "at_batch": 2, "out": tmp_path / "run"}
    at_half(network(), images(40), out=tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def stopped(self, number: int, *more: object) -> None:
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != LOCK} == before
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer._Training, "_epoch", stopped)
    with pytest.raises(Interrupted, match=r"What was in .* is as it was"):
        fit(network(), images(40), overwrite=True, **goal)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_times_that_a_training_before_was_placed_by_are_not_those_of_another_one(tmp_path, monkeypatch):
    (tmp_path / PLACED_BY).write_text('{"shares": {"0": 0.1, "2": 0.9}, "seconds": 1, "unit": "an older clock"}')
    with interrupted_after_an_epoch(monkeypatch):
        fit(network(), images(40), out=tmp_path)
    assert not (tmp_path / PLACED_BY).exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"shares": {"3": -1}, "seconds": 1, "unit": "a clock"}', '{"shares": {}}']
)
def test_times_that_were_kept_and_are_damaged_are_refused_in_one_line(text, tmp_path):
    (tmp_path / PLACED_BY).write_text(text)
    with pytest.raises(RunError, match=rf"{PLACED_BY} is damaged") as refused:
        kept_times(tmp_path)
    assert "\n" not in str(refused.value)


def test_no_argument_of_fit_is_called_changes():
    with pytest.raises(PteeError, match="changes") as refused:
        fit(network(), images(40), changes={"epochs": 1})
    assert "'changes'?" not in str(refused.value)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at_half(network(), images(60))
    assert list(tmp_path.iterdir()) == []


def test_images_of_another_size_than_was_said_are_refused():
    with pytest.raises(
        PteeError, match=r"^input_size=\(3, 16, 16\), and the first image of train_data has the size \(3, 8, 8\)"
    ):
        fit(network(), images(64), input_size=(3, 16, 16))


@pytest.mark.parametrize("log", [None, lambda text: None])
def test_exits_that_do_not_pay_are_warned_of_where_no_log_says_so(log, recwarn):
    fit(network(), images(64), threshold=0, log=log)
    said = [str(warning.message) for warning in recwarn if "leave at exit 0" in str(warning.message)]
    assert bool(said) == (log is None)


def test_where_warnings_are_errors_the_run_is_whole_all_the_same(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*leave at exit 0")
        with pytest.raises(UserWarning, match="leave at exit 0"):
            fit(network(), images(64), threshold=0, out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert ptee.load(tmp_path / "run", backbone=network()).results["rows"]


def test_a_fit_that_fails_gives_the_network_back_though_somebody_keeps_the_error(monkeypatch):
    backbone = network()
    monkeypatch.setattr(trainer._Training, "_epoch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        fit(backbone, images(64))
    assert kept.tb is not None
    assert all(p.requires_grad for p in backbone.parameters())
    assert not any(part._forward_hooks for part in backbone.modules())


def test_a_target_that_was_missed_is_warned_of(monkeypatch):
    monkeypatch.setattr(fitting, "describe_outcome", lambda *_: ("Target: .... Missed.", True))
    with pytest.warns(UserWarning, match="Missed") as told:
        fit(network(), images(64), max_fidelity_drop=0.5)
    assert {warning.filename for warning in told if "Missed" in str(warning.message)} == {__file__}


@pytest.mark.parametrize("more", [{}, {"confidence": "learned", "threshold": 0.5}, {"epochs": 0}], ids=str)
def test_the_callers_random_numbers_go_on_as_if_nothing_had_been_drawn(more):
    backbone = network()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    try:
        fit(backbone, images(140), **more)
    except PteeError:
        assert more == {"epochs": 0}
    assert torch.equal(torch.rand(3), expected)


def test_heads_are_built_without_the_callers_random_numbers():
    backbone, before = load_backbone(network(), input_size=SIZE), torch.random.get_rng_state()
    build_model(backbone, make_recipe(None, {"exits": ["0"], "head": "pool"}))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_backbone_is_used_as_it_is_and_given_back_by_detach():
    backbone, x = network(), images(4).tensors[0]
    before = backbone(x)
    model = at_half(backbone, images(60))
    assert model.backbone is backbone
    assert torch.equal(backbone(x), before)
    model.detach()
    assert torch.equal(backbone(x), before)


@pytest.mark.parametrize("name", ["config.json", "recipe.yaml", *map(slow, ("heads.safetensors", "metrics.json"))])
def test_if_a_file_cannot_be_written_all_files_of_the_run_stay_as_they_were(name, tmp_path, monkeypatch):
    """The run is written before and after the measurement; here the disk is full at the second time."""
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target == tmp_path / "run" / name and target.exists() and self.parent.name != "kept":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunError, match="No space left"):
        at_half(network(), images(80), out=tmp_path / "run")
    monkeypatch.undo()
    config, metrics = (read_json(tmp_path / "run", file) for file in ("config.json", "metrics.json"))
    assert config["results"] == metrics["results"]
    assert "rows" not in config["results"]
    assert ptee.load(tmp_path / "run", network()).results == config["results"]


# ---------------------------------------------------------------------------------------------------- labels


def test_without_labels_the_heads_learn_the_backbones_answers_and_fidelity_is_kept():
    said: list[str] = []
    unlabelled = images(60, labels=False)
    model = fit(network(), unlabelled, log=said.append)
    assert "The images have no labels." in said[0]
    assert {row["accuracy"] for row in model.results["rows"]} == {None}
    assert model.results["tuning"]["target"]["kind"] == "max_fidelity_drop"
    fit(network(), unlabelled, recipe="eenet")  # which learns labels where there are any


@pytest.mark.parametrize("argument", ["val_data", "calibration_data"])
def test_labels_of_one_data_set_are_doubted_though_those_of_the_many_training_images_are_right(argument):
    x, few = images(800).tensors[0], images(60, seed=1).tensors[0]
    right, wrong = (TensorDataset(each, (network()(each).argmax(-1) + n) % K) for n, each in enumerate((x, few)))
    with pytest.raises(PteeError, match=rf"max_drop=0\.01 needs labels .*{argument}: The backbone is right on 0\.0%"):
        ptee.fit(network(), right, **{argument: wrong}, max_drop=0.01, input_size=SIZE, device=here())


def test_labels_under_which_the_backbone_is_never_right_are_not_believed():
    pictures = images(80).tensors[0]
    wrong = TensorDataset(pictures, (network()(pictures).argmax(-1) + 1) % K)
    said = r"max_drop=0\.01 needs labels under which the backbone is right.*class numbers"
    with pytest.raises(PteeError, match=said):
        fit(network(), wrong, max_drop=0.01)
    assert fit(network(), wrong).results["tuning"]["target"]["kind"] == "max_fidelity_drop"


@pytest.mark.parametrize("part", ["train_data", "val_data"])
def test_one_label_that_is_no_class_is_refused_by_name_before_the_training(part, monkeypatch):
    monkeypatch.setattr(fitting, "run_training", None)
    x, y = images(60).tensors
    y[7] = 255
    data = {"train_data": images(60), part: TensorDataset(x, y)}
    with pytest.raises(DataError, match=r"no classes of the backbone, which are 0 to 3: 255 \(1 of \d+ images\)"):
        fit(network(), data.pop("train_data"), **data)


def test_an_image_that_the_backbone_does_not_answer_is_named_by_its_place_in_the_data_set_that_was_given():
    x, y = images(60, seed=1).tensors
    x[41] = float("nan")
    with pytest.raises(DataError, match=r"\(the first has the index 41 in the TensorDataset of 60\)"):
        fit(network(), images(60), val_data=TensorDataset(x, y))


def test_labels_of_which_none_is_a_class_are_not_used_and_it_is_said():
    said: list[str] = []
    x, y = images(60).tensors
    model = fit(network(), TensorDataset(x, y + K), log=said.append)
    assert "The labels are 4 to 7, the backbone's classes 0 to 3. Check that the labels are" in said[0]
    assert model.results["tuning"]["target"]["kind"] == "max_fidelity_drop"


def test_labels_of_minus_one_among_classes_are_named_where_an_accuracy_is_asked_for_and_what_to_do_with_them():
    x, y = images(60).tensors
    y[::7] = -1
    said = (
        r"^max_drop=0\.02 needs labels under which the backbone is right\. Some of the labels are no classes of the backbone, which are "
        r"0 to 3: -1\. Leave such images out, or number them as the backbone's classes\. Or give max_fidelity_drop=0\.02\.$"
    )
    with pytest.raises(DataError, match=said):
        fit(network(), TensorDataset(x, y), max_drop=0.02)


# ---------------------------------------------------------------------------------------------------- refusals

X, Y = images(60).tensors
STOPPED = {"epochs": 9, "training.patience": 3}
REFUSED = {
    "a log that is no function": ({"log": True}, "log=True must be a function"),
    "a class": ({"train_data": dict}, "train_data is a type.*map-style data set"),
    "a loader": ({"train_data": iter([])}, "train_data is a .*map-style data set"),
    "an iterable for validation": ({"val_data": iter([])}, "val_data is a .*map-style data set"),
    "a tuple of tensors": ({"train_data": (X, Y)}, r"train_data is a tuple of tensors.*torch\.utils\.data\.TensorDataset\(X, y\)"),
    "a list of tensors": ({"val_data": [X, Y]}, r"val_data is a list of tensors.*torch\.utils\.data\.TensorDataset\(X, y\)"),
    "a tensor": ({"train_data": X}, r"train_data is a Tensor.*TensorDataset\(train_data\)"),
    "arrays": ({"train_data": (X.cpu().numpy(), Y.cpu().numpy())}, r"train_data is a tuple of values.*TensorDataset\(X, y\)"),
    "a folder": ({"train_data": "images/train"}, "train_data is a str .'images.train'.. Give.*ImageFolder"),
    "one image to choose thresholds on and to report on": ({"val_data": images(1)}, r"two images at least, and there is one\. Give more: val_data=DATASET, or others: calibration_data=DATASET"),
    "no image for validation": ({"val_data": images(0)}, "val_data is empty"),
    "no image for calibration": ({"calibration_data": []}, "calibration_data is empty"),
    "no image to train on": ({"train_data": [], "val_data": images(9), "calibration_data": images(9)}, "train_data is empty"),
    "too few images": ({"train_data": images(2)}, "'train_data' has too few training images: it has 2, and at least 3 are needed"),
    "a target about labels without labels": ({"train_data": images(60, labels=False), "max_drop": 0.1}, "no labels.*max_fidelity_drop"),
    "a question about labels without labels": ({"train_data": images(60, labels=False), "question": "right"}, "question='right'.*question='agrees'"),
    "an unknown confidence": ({"confidence": "max_probb"}, "'max_probb'.*Did you mean 'max_prob'"),
    "a threshold in percent": ({"threshold": 70}, r"nobody leaves.*did you mean 0\.7\?$"),
    "thresholds for other exits": ({"threshold": (0.5, 0.5, 0.5)}, "3 thresholds for 2"),
    "a cost that cannot be reached": ({"max_cost": 0.001}, r"max_cost=0\.001 cannot be reached"),
    "a shift of vectors": ({"shift": 2}, "shift=2 moves feature maps"),
    "a resumption without a folder": ({"resume": True}, "Give out=FOLDER"),
    "a guarantee by images that early stopping goes by": (
        {"val_data": images(9), "calibration_data": images(400), "max_fidelity_drop": 0.1, **STOPPED, "thresholds.confidence": 0.9},
        r"^patience=3 picks the epoch by the calibration images, so these cannot show what confidence=0\.9 guarantees\. Leave one of the two out\. "
        r"With patience, other images can show it afterwards: ptee tune RUN --data FOLDER --max-fidelity-drop 0\.1 --confidence 0\.9, or ptee\.tune in Python\.$",
    ),
    "a guarantee by images that are drawn and that early stopping goes by": (
        {"train_data": images(4000), "max_fidelity_drop": 0.1, **STOPPED, "thresholds.confidence": 0.9}, r"^patience=3 picks the epoch",
    ),
    "an unknown device": ({"device": "tpu"}, "tpu.*cpu"),
    "a front network with other classes": ({"front": "resnet18"}, "front"),
    "a batch where no seconds count": ({"at_batch": 7}, r"^at_batch=7 is about costs in seconds.* Give cost='time', too"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_possible_is_refused_in_one_line_before_the_training(given, said, monkeypatch):
    monkeypatch.setattr(fitting, "run_training", None)
    arguments = {"train_data": images(60), "device": here(), "input_size": SIZE, **SETTINGS, **given}
    with pytest.raises(PteeError, match=said) as refusal:
        ptee.fit(network(), arguments.pop("train_data"), **arguments)
    assert "\n" not in str(refusal.value)


def test_early_stopping_goes_with_a_guarantee_by_images_that_it_does_not_watch():
    how = {"max_fidelity_drop": 0.9, **STOPPED, "thresholds.confidence": 0.9}
    model = fit(
        network(), images(60), val_data=images(40, seed=3), **how
    )  # images drawn from the training images are watched
    assert model.results["tuning"]["promise"]["confidence"] == 0.9


def samples(change) -> list:
    """The data set as a list, each of whose items is changed."""
    return [change(x, int(y), i) for i, (x, y) in enumerate(images(60))]


UNFIT = {
    "the channels last": (lambda x, y, _: (x.permute(1, 2, 0), y), r"with the channels last\. Give x\.permute"),
    "grey images": (lambda x, y, _: (x[:1], y), "have 1 channel, and the model takes 3"),
    "whole numbers": (lambda x, y, _: (x.mul(9).byte(), y), "are uint8, and the model takes floating-point"),
    "flat images": (lambda x, y, _: (x.flatten(), y), r"A batch should be \(images \(b, c, h, w\)"),
    "several sizes": (lambda x, y, i: (x[:, : 8 - i % 2], y), "differ in size.*resize all images"),
    "too small": (lambda x, y, _: (x[:, :2], y), r"cannot take images of size \(3, 2, 8\)"),
    "pictures": (lambda x, y, _: (Image.new("RGB", (8, 8)), y), r"gives PIL images: give it transform=ToTensor\(\)"),
    "no label": (lambda x, *_: (x, None), "cannot form a batch: give .image tensor, class number"),
    "no label for some": (lambda x, y, i: (x, None if i == 50 else y), "cannot form a batch|differ"),
    "words for labels": (lambda x, *_: (x, "cat"), "The label of 1 image should be 1 class number, but it is"),
    "a label of 70 bits": (lambda x, *_: (x, 2**70), "cannot form a batch"),
    "an id beside it": (lambda x, y, i: (x, y, f"no {i}"), r"Each item is \(image, label\) or \(image,\): leave out the rest\."),
    "the label first": (lambda x, y, _: (y, x), r"the other way round: each item is \(image, label\)\."),
    "no channel": (lambda x, y, _: (x[0], y), r"Grey images need an axis for their channel \(image\[None\]\)"),
    "names of one's own": (lambda x, y, _: {"spec": x, "y": y}, "image stands under 'image' or .* its label under 'label' or"),
    "other names": (lambda x, y, i: {"image": x, "label" if i else "class": y}, "cannot form a batch|should be"),
}  # fmt: skip


@pytest.mark.parametrize("size", [SIZE, None], ids=["size given", "size of the first image"])
@pytest.mark.parametrize(("change", "said"), UNFIT.values(), ids=UNFIT)
def test_images_that_fit_cannot_use_are_refused_in_words_before_the_training(change, said, size, monkeypatch):
    monkeypatch.setattr(fitting, "run_training", None)
    with pytest.raises(PteeError, match=said if size else rf"{said}|cannot take an image of size \(") as refusal:
        ptee.fit(network(), samples(change), input_size=size, device=here(), **SETTINGS)
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def of_pairs() -> ptee.EarlyExitModel:
    """What pairs of images and labels teach."""
    return fit(network(), images(60))


@pytest.mark.parametrize("names", [("image", "label"), ("pixel_values", "labels")], ids=str)
def test_mappings_are_a_data_set_as_pairs_are(names, of_pairs):
    mappings = samples(lambda x, y, _: dict(zip(names, (x, y), strict=True)))
    model = ptee.fit(network(), mappings, device=here(), **SETTINGS)
    assert model.threshold == of_pairs.threshold


def test_after_a_refusal_the_backbone_can_be_given_again():
    backbone = network()
    with pytest.raises(PteeError, match="cannot be reached"):
        fit(backbone, images(60), max_cost=0.001)
    assert at_half(backbone, images(60)).results


def test_to_go_on_and_to_begin_anew_at_once_is_refused(tmp_path):
    said = r"^resume=True goes on with a training, and overwrite=True begins it anew\. Give one of them\.$"
    with pytest.raises(RunError, match=said):
        fit(network(), images(60), out=tmp_path / "run", resume=True, overwrite=True)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"something else than a run\. Give a new folder with out="):
        fit(network(), images(60), out=tmp_path)
    at_half(network(), images(60), out=tmp_path / "run")
    said = r"holds a run\. Give another folder with out=, or replace it with overwrite=True"
    with pytest.raises(RunError, match=said):
        fit(network(), images(60), out=tmp_path / "run")
    assert at_half(network(), images(60), out=tmp_path / "run", overwrite=True).results


def test_an_interrupted_fit_goes_on_with_resume(tmp_path, monkeypatch):
    whole = fit(network(), images(60))
    with interrupted_after_an_epoch(monkeypatch, r"1 complete epoch.* Call ptee\.fit again with resume=True"):
        fit(network(), images(60), out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    model = fit(network(), images(60), out=tmp_path, resume=True)
    assert model.threshold == whole.threshold
    assert figures(model.results) == figures(whole.results)


def test_a_picture_of_the_users_own_data_that_breaks_is_an_error_of_the_data():
    class Broken(TensorDataset):
        def __getitem__(self, index: int):
            if index == 37:
                raise DataError("Picture 37 cannot be read.")
            return super().__getitem__(index)

    with pytest.raises(DataError, match="Picture 37"):
        fit(network(), Broken(*images(60).tensors), val_data=images(9), calibration_data=images(9))


NO_PATHS = {
    "out": partial(fit, network(), images(60)),
    "weights": partial(ptee.fit, "cifar_resnet8", images(60), **SETTINGS),
    "recipe": partial(fit, network(), images(60)),
}


@pytest.mark.parametrize("given", [b"", "", 3, object()], ids=["bytes", "nothing", "a number", "an object"])
@pytest.mark.parametrize("name", NO_PATHS)
def test_what_is_no_path_is_refused_by_the_name_of_its_argument(name, given):
    with pytest.raises(PteeError, match=rf"^(Unknown |The )?{name}"):
        NO_PATHS[name](**{name: given})


def test_the_folder_of_a_run_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    at_half(network(), images(60), out="~/run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert ptee.load("~/run", network()).results


# ---------------------------------------------------------------------------------------------------- odd data sets


def right_images(n: int, seed: int = 0) -> TensorDataset:
    """Images with the network's own answers as labels."""
    (x,) = images(n, seed, labels=False).tensors
    with torch.no_grad():
        return TensorDataset(x, network().eval()(x).argmax(-1))


def test_heads_learn_from_images_without_labels_and_are_measured_on_others_with_labels():
    for recipe in ("ptee", "eenet"):
        model = at_half(network(), images(60, labels=False), val_data=right_images(40, 1), recipe=recipe)
        assert model.results["rows"][0]["accuracy"] == 1
    with pytest.raises(DataError, match="train_data have no labels for targets='labels'"):
        fit(network(), images(60, labels=False), val_data=right_images(40, 1), targets="labels")


def test_images_of_another_size_are_named_with_their_argument_and_both_sizes():
    other = TensorDataset(torch.randn(20, 3, 6, 6), torch.zeros(20, dtype=torch.long))
    with pytest.raises(
        DataError, match=r"val_data has the size \(3, 6, 6\), and that of train_data \(3, 8, 8\)"
    ) as error:
        fit(network(), images(60), val_data=other)
    assert error.value.argument == "val_data"


def test_the_same_images_for_two_purposes_are_warned_of():
    same = right_images(60)
    with pytest.warns(UserWarning, match="train_data and val_data are the same images"):
        model = at_half(network(), same, val_data=same)
    with pytest.warns(UserWarning, match="calibration and report are the same images"):
        ptee.compare({"one": model}, same, torch.utils.data.DataLoader(same, 20), lines=["own"], drops=[0.1])


def test_classes_without_an_image_to_report_on_are_named():
    x, y = images(60, 1).tensors
    lacking = torch.utils.data.Subset(TensorDataset(x, y), (y != y[0]).nonzero().flatten().tolist())
    with pytest.warns(UserWarning, match=f"No validation image shows .*class {int(y[0])}"):
        at_half(network(), right_images(60), val_data=lacking)


def test_a_doubt_about_labels_is_warned_of_once_where_nobody_reads_a_log():
    x, y = right_images(120).tensors
    with pytest.warns(UserWarning) as caught:
        fit(network(), TensorDataset(x, (y + 1) % K), val_data=TensorDataset(x[:60].clone(), (y[:60] + 1) % K))
    assert sum("may know its classes in another order" in str(w.message) for w in caught) == 1


def test_a_finished_run_is_tuned_again_in_python_and_not_by_a_command(tmp_path):
    at_half(network(), images(60), out=tmp_path / "run")
    with pytest.raises(RunError, match=r"ptee\.tune\(ptee\.load") as error:
        at_half(network(), images(60), out=tmp_path / "run", resume=True)
    assert "ptee tune" not in str(error.value)


def test_a_backbone_that_is_far_less_right_on_validation_images_is_told_before_the_training(monkeypatch):
    net, n = network().eval(), torch.arange(160)
    x = torch.randn(160, *SIZE, generator=seeded(0))
    with torch.no_grad():
        own = net(x).argmax(1)
    other = torch.where(n % 5 < 2, own, (own + 1 + n % 3) % K)
    monkeypatch.setattr(fitting, "fit_backbone", lambda *_: None)
    with pytest.warns(UserWarning, match=r"right on 40% of 60 validation images .* on 100% of 90 training images"):
        fit(net, TensorDataset(x[:100], own[:100]), val_data=TensorDataset(x[100:], other[100:]))


def test_a_class_in_place_of_a_network_is_refused_before_the_data_are():
    with pytest.raises(PteeError, match=r"not a class\. Give an instance: Linear\(\)"):
        fit(nn.Linear, [1, 2])
