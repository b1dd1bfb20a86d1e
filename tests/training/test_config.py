from __future__ import annotations

import json
import math
from typing import get_args

import numpy as np
import pytest

from ptee._common.errors import PteeError, UnknownName
from ptee.training.config import Loss, Targets, TrainingConfig, epochs_for, shift_for

REFUSED = [
    ({"targets": "pseudos"}, "targets='pseudos' is unknown. Did you mean 'pseudo'? Choices: labels, pseudo, soft."),
    (
        {"loss": "v3"},
        "loss='v3' is unknown. Did you mean 'v2' or 'v1'? Choices: branchynet, cost, db, each, joint, joint_each_exit, mc, separate, v1, v2, weighted.",
    ),
    (
        {"precision": "bf61"},
        "precision='bf61' is unknown. Did you mean 'bf16' or 'fp16'? Choices: auto, bf16, fp16, no.",
    ),
    ({"optimizer": "muonn"}, "optimizer='muonn' is unknown. Did you mean 'muon'? Choices: adam, adamw, muon."),
    ({"schedule": "cosin"}, "schedule='cosin' is unknown. Did you mean 'cosine'? Choices: constant, cosine."),
    ({"epochs": 0}, "epochs=0 must be 1 or more, or 'auto'."),
    ({"epochs": True}, "epochs=True must be a whole number, or 'auto'."),
    ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number."),
    ({"lr": 0.0}, "lr=0.0 must be above 0."),
    ({"lr": 1e38}, "lr=1e+38 must be 1e+30 or less."),
    ({"cost_weight": 1e39, "loss": "joint"}, "cost_weight=1e+39 must be 1e+12 or less."),
    ({"lr": math.nan}, "lr=nan must be a finite number."),
    ({"weight_decay": -1.0}, "weight_decay=-1.0 must be 0 or more."),
    ({"cost_weight": math.nan, "loss": "joint"}, "cost_weight=nan must be a finite number."),
    ({"temperature": 0}, "temperature=0 must be above 0."),
    ({"patience": 0}, "patience=0 must be 1 or more."),
    ({"seed": -1}, "seed=-1 must be 0 or more."),
    ({"seed": 10**18}, "seed=1000000000000000000 must be below 4294967296."),
    ({"views": 0}, "views=0 must be 1 or more, or 'auto'."),
    ({"shift": -1}, "shift=-1 must be 0 or more, or 'auto'."),
    ({"mirror": "yes"}, "mirror='yes' must be True or False."),
    ({"cache": 1}, "cache=1 must be True or False, or 'auto'."),
    ({"weightdecay": 0.1}, "weightdecay=0.1 is unknown. Did you mean 'weight_decay'"),
    (
        {"temperature": 2, "loss": "joint", "targets": "soft"},
        "temperature=2.0 needs loss='separate' and targets='soft', and this training has loss='joint' and targets='soft'. "
        "Leave temperature out, or change the others.",
    ),
    (
        {"temperature": 2, "targets": "labels"},
        "temperature=2.0 needs loss='separate' and targets='soft', and this training has loss='separate' and "
        "targets='labels'. Leave temperature out, or change the others.",
    ),
    (
        {"cost_weight": 0.5},
        "cost_weight=0.5 needs a joint loss, such as loss='joint', and this training has loss='separate'. Leave cost_weight "
        "out, or change the others.",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_a_setting_that_cannot_be_is_refused_in_one_line_with_its_name_and_value(settings, message):
    with pytest.raises(PteeError) as refusal:
        TrainingConfig(**settings)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)
    assert refusal.value.argument in settings
    assert isinstance(refusal.value, UnknownName) == ("is unknown" in message)


def test_numbers_of_numpy_become_numbers_of_python():
    config = TrainingConfig(epochs=np.int64(2), lr=np.float32(0.5), mirror=np.bool_(False), seed=np.uint8(3))
    assert json.loads(json.dumps(config.model_dump())) == config.model_dump()
    assert (config.epochs, config.lr, config.mirror, config.seed) == (2, 0.5, False, 3)


def test_heads_that_learn_separately_and_together_have_defaults_of_their_own():
    separate, joint = TrainingConfig().resolved(), TrainingConfig(loss="joint").resolved()
    assert (separate.targets, separate.temperature, separate.cost_weight) == ("soft", 2.0, None)
    assert (separate.optimizer, separate.lr, separate.weight_decay, separate.schedule) == ("muon", 0.01, 0.05, "cosine")
    assert (joint.targets, joint.temperature, joint.cost_weight) == ("labels", 1.0, 1.0)
    assert (joint.optimizer, joint.lr, joint.weight_decay, joint.schedule) == ("adam", 0.001, 0.0, "constant")


@pytest.mark.parametrize("loss", get_args(Loss))
@pytest.mark.parametrize("targets", [None, *get_args(Targets)])
def test_a_resolved_config_can_be_written_down_and_given_back(loss, targets):
    resolved = TrainingConfig(loss=loss, targets=targets, lr=0.5).resolved()
    assert resolved.lr == 0.5
    assert TrainingConfig(**json.loads(json.dumps(resolved.model_dump()))).resolved() == resolved


def test_the_learning_rate_that_is_not_given_is_that_of_the_optimizer():
    assert TrainingConfig(optimizer="adam").resolved().lr == 0.001
    assert TrainingConfig(loss="joint", optimizer="muon").resolved().lr == 0.01


def test_changes_are_checked_and_leave_the_defaults_that_follow_other_settings():
    config = TrainingConfig(epochs=3)
    assert config.changed(loss="joint").resolved().optimizer == "adam"
    assert config.changed(loss="joint").epochs == 3
    with pytest.raises(PteeError, match=r"batchsize=3 is unknown\. Did you mean 'batch_size'"):
        config.changed(batchsize=3)


@pytest.mark.parametrize(("old", "new"), [("each", "separate"), ("v1", "joint"), ("v2", "joint_each_exit")])
def test_the_older_names_of_losses_mean_the_same(old, new):
    assert TrainingConfig(loss=old) == TrainingConfig(loss=new)


@pytest.mark.parametrize("name", TrainingConfig.model_fields)
def test_every_setting_is_described(name):
    assert TrainingConfig.model_fields[name].description.endswith(".")


@pytest.mark.parametrize(("images", "epochs"), [(100, 40), (16_000, 40), (45_000, 15), (10**6, 12)])
def test_auto_epochs_give_enough_updates_and_not_too_many_passes(images, epochs):
    assert epochs_for(images, 128) == epochs


def test_auto_shift_is_an_eighth_of_the_smaller_side():
    assert shift_for((3, 224, 96)) == 12
