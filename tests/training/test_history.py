from __future__ import annotations

import pytest
from small import made

from ptee.training.config import TrainingConfig
from ptee.training.history import Epoch, History, collapse_of


def test_a_history_prints_as_a_table_of_epochs():
    epochs = [
        Epoch(1, 1.5, [0.25, 0.5], [0.5, 1.0], [0.75, 0.25], None, 3.2),
        Epoch(2, 1.25, None, [1, 1], [0, 1], 2.0, 3),
    ]
    lines = str(History(epochs, stopped_early=True, warning="It collapsed.")).splitlines()
    assert lines[2].split() == ["1", "1.5000", "0.250", "0.500", "0.500", "1.000", "0.750", "0.250", "-", "3"]
    assert lines[3].split() == ["2", "1.2500", "-", "1.000", "1.000", "0.000", "1.000", "2.0000", "3"]
    assert lines[-3] == "All but the validation loss were measured on the training images."
    assert lines[-2:] == ["Stopped early: the loss no longer fell.", "It collapsed."]


def test_a_collapse_is_that_of_the_validation_images_where_there_are_some():
    model, config = made("pool"), TrainingConfig(loss="joint").resolved()
    gone, mixed = [1.0, 0, 0], [0.5, 0.3, 0.2]
    of = [Epoch(1, 1.5, None, [1, 1, 1], leaving, 1.5, 3, val) for leaving, val in ((gone, mixed), (mixed, gone))]
    assert collapse_of(History(of[:1]), model, config) is None
    assert "100% of the validation images leave at exit 0" in collapse_of(History(of[1:]), model, config)


def test_the_line_of_an_epoch_says_what_was_measured_on_which_images():
    line = Epoch(1, 1.5, None, [0.5, 0.25, 1.0], [1, 0, 0], 2.0, 3).line(5)
    assert line == "epoch 1/5  loss 1.5000  fidelity on training images 0.500 0.250  validation loss 2.0000  3 s"


@pytest.mark.parametrize(
    ("cost_weight", "advice"),
    [(0.0, "Train longer, or set"), (0.5, "Lower the cost weight (it is 0.5), train longer, or set")],
)
def test_a_cost_weight_of_nothing_cannot_be_lower(cost_weight, advice):
    history = History([Epoch(1, 1.5, None, [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], None, 3)])
    said = collapse_of(history, made(), TrainingConfig(loss="joint", cost_weight=cost_weight))
    assert said is not None
    assert said.endswith(f"{advice} other thresholds.")
