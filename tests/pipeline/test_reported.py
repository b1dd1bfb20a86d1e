import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from learning import SIZE, K, Net, data
from tiny import one_line
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import PteeError, RunError
from ptee.data.batches import known_by
from ptee.pipeline.reported import class_names, read_recorded
from ptee.timing.measure import measure
from ptee.timing.times import save_times

ROW = {"name": "backbone", "accuracy": 0.9, "fidelity": 1.0, "cost": 1.0, "right": 0.5}
RESULTS = {
    "rows": [ROW, {**ROW, "name": "exit 0"}, {**ROW, "name": "early exit"}],
    "leaving": [0.5, 0.5],
    "samples": 100,
    "verdict": [],
    "tuning": {"target": {"kind": "max_drop", "limit": 0.01}},
}
EPOCH = {"number": 1, "loss": 2.0, "val_loss": None, "accuracy": None, "fidelity": [0.5, 1.0]}


def test_what_a_run_recorded_is_read(tmp_path):
    metrics = {"results": RESULTS, "training": {"epochs": [EPOCH]}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert read_recorded(str(tmp_path)) == metrics


@pytest.mark.parametrize(
    "results",
    [
        {"samples": "x"},
        {"verdict": 5},
        {"rows": [{**ROW, "cost": "x"}] * 3},
        {"rows": [{**ROW, "fidelity": None}] * 3},
        {"tuning": {"target": {"kind": [1], "limit": 0.01}}},
        {"tuning": {"target": {"kind": "max_drop", "limit": "0.01"}}},
    ],
    ids=str,
)
def test_what_no_run_records_is_refused_in_one_line(tmp_path, results):
    (tmp_path / "metrics.json").write_text(json.dumps({"results": RESULTS | results}))
    with pytest.raises(RunError, match="does not hold what a run records") as refusal:
        read_recorded(str(tmp_path))
    one_line(refusal)


def test_a_loss_that_is_a_link_is_refused(tmp_path):
    loss = {**EPOCH, "loss": '<a href="javascript:alert(1)">x</a>'}
    (tmp_path / "metrics.json").write_text(json.dumps({"results": RESULTS, "training": {"epochs": [loss]}}))
    with pytest.raises(RunError, match="does not hold what a run records"):
        read_recorded(str(tmp_path))


@pytest.mark.parametrize(("classes", "names"), [(["dog", "cat"], ("dog", "cat")), (["dog"], ()), (None, ())])
def test_classes_are_named_in_the_order_of_the_backbone_or_not_at_all(classes, names):
    split = {} if classes is None else {"classes": classes}
    data = SimpleNamespace(class_names=("cat", "dog"), split=split)  # as the folders stand
    run = SimpleNamespace(unseen=SimpleNamespace(data=data), model=SimpleNamespace(num_classes=2))
    assert class_names(run) == names


# ---------------------------------------------------------------------------------------------------- from Python


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A network of one's own with exits, and the folder of its run."""
    folder = tmp_path_factory.mktemp("own") / "run"
    how = {"exits": ["one", "two"], "head": "pool", "epochs": 1, "max_cost": 2.0}
    return ptee.fit(Net(), data(), val_data=data(), input_size=SIZE, out=folder, **how), folder


def shown(page) -> set[str]:
    """The parts of a page."""
    return set(re.findall(r'<section id="([a-z]+)"', page.read_text(encoding="utf-8")))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_of_a_network_without_a_name_is_reported_with_python_to_type(fitted, tmp_path):
    model, _ = fitted
    page = ptee.write_report(
        model,
        data(),
        out=tmp_path / "own.html",
        class_names=["ant", "bee", "cat", "dog"],
        lines=["own", "one_threshold"],
        drops=[0.1],
    )
    text = page.read_text(encoding="utf-8")
    assert {"summary", "thresholds", "network", "gallery", "made"} <= shown(page) and "training" not in shown(page)
    assert "model.threshold = 0.5" in text and "ptee.tune(model, calibration_data, max_" in text
    assert "ptee evaluate" not in text and "ptee tune" not in text.replace("reserve of ptee tune", "")
    assert "24 of the 48 validation images" in text and re.search("ant|bee|cat|dog", text)
    assert [file.name for file in tmp_path.iterdir()] == ["own.html"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_folder_of_its_run_adds_the_training_and_the_recipe(fitted, tmp_path):
    model, folder = fitted
    unlabelled = [(image,) for image, _ in data()]
    how = {"pictures": False, "lines": ["own"], "drops": [0.1], "calibration_data": unlabelled}
    page = ptee.write_report(folder, unlabelled, out=tmp_path / "own.html", backbone=model.backbone, **how)
    assert "training" in shown(page) and "gallery" not in shown(page)
    text = page.read_text(encoding="utf-8")
    assert "max_cost: 2.0" in text and re.search(r">thresholds</t[dh]>\s*<td>Thresholds are chosen on ", text)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_a_run_that_keeps_times_is_reported_by_what_they_cost_beside_a_smaller_network(fitted, tmp_path):
    model, folder = fitted
    own = shutil.copytree(folder, tmp_path / "run")
    save_times(measure(model, [4], rounds=3), own)
    how = {"pictures": False, "lines": ["own"], "static": {"small": Net()}, "cost": "time", "at_batch": 4}
    page = ptee.write_report(own, data(), out=tmp_path / "own.html", backbone=model.backbone, **how)
    assert "share of the bare backbone&#39;s time (hooks, batch 4" in page.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_where_nobody_names_drops_that_of_the_run_is_among_them(fitted, tmp_path):
    model, _ = fitted
    before = model.results
    tuning = {"target": {"kind": "max_drop", "limit": 0.03}, "threshold": list(model.threshold), "off": list(model.off)}
    model.results = {**model.results, "tuning": tuning}
    how = {"out": tmp_path / "own.html", "pictures": False, "lines": ["own"]}
    own = "At most 0.03 lost: .* This drop is the run&#39;s own target\\."
    few = TensorDataset(*data()[:20])
    assert re.search(own, ptee.write_report(model, few, **how).read_text(encoding="utf-8"))
    text = ptee.write_report(model, few, drops=[0.01], **how).read_text(encoding="utf-8")
    assert "The thresholds were chosen to lose at most 0.03 of accuracy, and no sentence here is about that." in text
    model.results = before


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_page_doubts_images_that_are_known_or_that_the_backbone_is_suddenly_wrong_on(fitted, tmp_path):
    model, x = fitted[0], data().tensors[0]
    right = model.bare(x).argmax(-1)
    good, bad = (TensorDataset(x, (right + n * (torch.arange(len(x), device=x.device) % 3 > 0)) % K) for n in (0, 1))
    before, new, outcome = (
        model.results,
        " images that the exits had not seen, ",
        r"was (lost|gained)[^.]*\..*: (kept|missed)\.",
    )
    tuning = {"target": {"kind": "max_drop", "limit": 0.03}, "threshold": list(model.threshold), "off": list(model.off)}
    how = {"out": tmp_path / "own.html", "pictures": False, "lines": ["own"], "drops": [0.03]}
    model.results = {"tuning": tuning}
    text = ptee.write_report(model, good, **how).read_text(encoding="utf-8")
    assert new in text and re.search(outcome, text)
    model.results = {"tuning": tuning, "usual_right": [1.0, 1000], "trained_on": [known_by(bad)]}
    text = ptee.write_report(model, bad, **how).read_text(encoding="utf-8")
    assert new not in text and "The heads were trained on these images, so results may be better here" in text
    assert "The backbone is right on" in text
    assert not re.search(outcome, text)
    model.results = before


def test_a_run_of_a_network_of_ones_own_without_times_is_refused_with_what_keeps_them(fitted, tmp_path):
    model, folder = fitted
    with pytest.raises(PteeError, match=r"keeps no times.*ptee\.fit\(cost='time'\)"):
        ptee.write_report(folder, data(), out=tmp_path / "own.html", backbone=model.backbone, cost="time")


def test_a_file_that_is_no_page_is_left_alone(fitted, tmp_path):
    page = tmp_path / "own.html"
    page.write_text("<p>my own</p>")
    with pytest.raises(
        PteeError, match=r"own\.html is there, and no page of ptee\. .* such as out='.*own-ptee\.html'\.$"
    ):
        ptee.write_report(fitted[0], data(), out=page)
    assert page.read_text() == "<p>my own</p>"


@pytest.mark.parametrize(
    ("change", "words", "argument"),
    [
        ({"class_names": ["ant"]}, "1 name for 4 classes. Give one for each class", "class_names"),
        ({"out": "page.png"}, "is not the name of a page", "out"),
        ({"val_data": torch.zeros(3, *SIZE)}, "val_data is a Tensor", "val_data"),
        ({"model": Net()}, "not an early-exit model", None),
        ({"model": "nowhere"}, "no folder nowhere", None),
        ({"cost": "seconds"}, "cost='seconds' is unknown", "cost"),
        ({"cost": "time"}, "cost='time' needs times, .*Give the folder", "cost"),
        ({"at_batch": 4}, "at_batch=4 is about costs in seconds", "at_batch"),
    ],
    ids=["names", "picture", "tensor", "network", "folder", "cost", "times", "batch"],
)
def test_what_cannot_be_reported_is_refused_before_anything_is_measured(
    fitted, tmp_path, monkeypatch, change, words, argument
):
    monkeypatch.chdir(tmp_path)
    given = {"model": fitted[0], "val_data": data()} | change
    with pytest.raises(PteeError, match=words) as refusal:
        ptee.write_report(**given)
    one_line(refusal)
    assert refusal.value.argument == argument
    assert list(tmp_path.iterdir()) == []
