import json
from types import SimpleNamespace

import pytest
from tiny import one_line

from ptee._common.errors import RunError
from ptee.pipeline.reported import class_names, read_recorded

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
