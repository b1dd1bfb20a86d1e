"""Exits that are added one by one: each learns with those before it as they are, and is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from learning import data, fit, heads, images, made, same
from tiny import one_line
from torch import Tensor

import ptee
from ptee._common.errors import PteeError
from ptee.model.early_exit import EarlyExitModel

ORDER = {"order": "one by one"}


def of_exit(model: EarlyExitModel, n: int) -> dict[str, Tensor]:
    """Weights and statistics of a head, copied."""
    return {name: value.clone() for name, value in model.heads[n].state_dict().items()}


@pytest.mark.parametrize("loss", ["separate", "weighted", "joint", "joint_each_exit", "mc"])
def test_a_head_is_kept_while_the_next_learns_and_not_touched_before_its_turn(loss):
    model = made()
    begin, seen = [of_exit(model, n) for n in range(2)], []
    history = fit(
        model, **ORDER, loss=loss, epochs=2, on_epoch=lambda _: seen.append([of_exit(model, n) for n in range(2)])
    )
    assert len(history.epochs) == 4
    assert [same(seen[i][1], begin[1]) for i in range(4)] == [True, True, False, False]
    assert [same(seen[i][0], seen[1][0]) for i in range(4)] == [False, True, True, True]
    assert all(p.requires_grad for p in model.heads.parameters())


@pytest.mark.parametrize("order", ["together", "one by one"])
def test_a_parameter_that_the_user_froze_stays_as_it_is(order):
    model = made()
    frozen = [next(head.parameters()) for head in model.heads]
    for p in frozen:
        p.requires_grad_(False)
    before, values = heads(model), [p.clone() for p in frozen]
    fit(model, order=order, epochs=1)
    assert [p.requires_grad for p in frozen] == [False, False]
    assert sum(not p.requires_grad for p in model.heads.parameters()) == 2
    assert all(torch.equal(p, value) for p, value in zip(frozen, values, strict=True))
    assert not same(heads(model), before)


@pytest.mark.parametrize(("order", "said"), [("together", "of the heads"), ("one by one", "of head 1")])
def test_heads_of_which_nothing_learns_are_refused(order, said):
    model = made()
    (model.heads if order == "together" else model.heads[1]).requires_grad_(False)
    with pytest.raises(PteeError, match=f"No parameter {said} requires gradients"):
        fit(model, order=order)
    assert not any(p.requires_grad for p in model.heads[1].parameters())


@pytest.mark.parametrize(
    ("loss", "of_both", "of_one"),
    [("joint", {}, {}), ("weighted", {"exit_weights": (1.0, 3.0, 2.0)}, {"exit_weights": (1.0, 2.0)})],
    ids=["joint", "weighted"],
)
def test_the_first_exit_learns_what_it_would_learn_alone(loss, of_both, of_one):
    model, alone = made(), copy.deepcopy(made().backbone)
    torch.manual_seed(0)
    single = ptee.augment(alone, exits=["one"], head="conv1", input_size=(3, 16, 16))
    single.heads[0].load_state_dict(model.heads[0].state_dict())
    both, one = fit(model, **ORDER, loss=loss, **of_both), fit(single, loss=loss, **of_one)
    assert [epoch.loss for epoch in one.epochs] == [epoch.loss for epoch in both.epochs[: len(one.epochs)]]
    assert same(of_exit(model, 0), of_exit(single, 0))


def test_who_does_not_leave_at_the_exits_so_far_is_counted_at_the_end():
    model = made()
    model.threshold = 2.0
    history = fit(model, **ORDER, epochs=1)
    assert [epoch.leaving for epoch in history.epochs] == [[0, 0, 1]] * 2


def test_the_cost_of_the_end_counts_the_heads_so_far():
    from ptee.training.config import TrainingConfig
    from ptee.training.step import Step, operation_costs, parameter_costs

    model = made().eval()
    config = TrainingConfig(loss="joint").resolved()
    first, both = model.plan.exits
    assert Step(model, config, 1).costs == pytest.approx((first.cost, 1 + first.head_cost))
    assert Step(model, config, 2).costs == Step(model, config).costs == operation_costs(model, 2) == model.costs
    assert parameter_costs(model, 1)[-1] < parameter_costs(model, 2)[-1]
    assert operation_costs(model, 1)[-1] == pytest.approx(operation_costs(model, 2)[-1] - both.head_cost)


def test_the_cosine_begins_again_for_each_exit(monkeypatch):
    from ptee.training import trainer

    places = []
    real = trainer.set_cosine_rate
    monkeypatch.setattr(trainer, "set_cosine_rate", lambda o, *place: places.append(place) or real(o, *place))
    fit(made(), **ORDER, epochs=3, schedule="cosine")
    assert places == 2 * [(n, 9) for n in range(9)]  # three batches an epoch


@pytest.mark.parametrize("stopped", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_training_that_was_interrupted_goes_on_to_the_same_heads(tmp_path, stopped, schedule):
    how = {**ORDER, "epochs": 2, "schedule": schedule, "loss": "joint"}
    whole, parted = made(), made()
    fit(whole, **how)

    def stop(epoch):
        if epoch.number == stopped:
            raise KeyboardInterrupt

    fit(parted, **how, checkpoint=tmp_path / "training", on_epoch=stop)
    parted = made()
    history = fit(parted, **how, checkpoint=tmp_path / "training", resume=True)
    assert [epoch.number for epoch in history.epochs] == [1, 2, 3, 4]
    assert same(heads(whole), heads(parted))


def test_the_backbone_is_as_it_was_and_answers_come_from_all_exits():
    model = made()
    before = copy.deepcopy(model.backbone.state_dict())
    fit(model, **ORDER, loss="joint", cost_weight=0.1)
    assert same(before, model.backbone.state_dict())
    assert len(model.all_exits(images()).logits) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backbone": "joint", "loss": "joint"}, "needs backbone='frozen'"),
        ({"patience": 3}, "fixed number of epochs"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(settings, words):
    with pytest.raises(PteeError, match=words) as refusal:
        fit(made(), data(), **ORDER, **settings)
    one_line(refusal)
