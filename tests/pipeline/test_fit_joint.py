"""A backbone that learns with its exits, from a network's name to the run and back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from device import seeded
from tiny import Tiny, one_line
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import DataError, PteeError
from ptee.backbones.weights import weights_hash
from ptee.pipeline.recipe import make_recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # such small trainings teach little
SHAPE, K = (3, 16, 16), 4
SMALL = {"epochs": 2, "exits": ["layer1", "layer2"], "head": "pool", "batch_size": 16, "lr": 0.01, "device": "cpu"}


def images(n: int = 48, labelled: bool = True) -> TensorDataset:
    """Images whose class is their brightest channel, nearly."""
    x, y = torch.randn(n, *SHAPE, generator=seeded(1)), torch.arange(n) % K
    x[torch.arange(n), y % 3] += 1.0
    return TensorDataset(x, y) if labelled else TensorDataset(x)


def joint(out=None, **settings) -> ptee.EarlyExitModel:
    how = {"recipe": "eenet-joint", "pretrained": False, "num_classes": K, "input_size": SHAPE, **SMALL} | settings
    return ptee.fit("cifar_resnet8", images(), out=out, **how)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A network from scratch: its run, and the model."""
    folder = tmp_path_factory.mktemp("joint") / "run"
    return folder, joint(folder)


def test_a_network_learns_from_scratch_and_its_run_gives_the_same_digits(run):
    folder, model = run
    again = ptee.load(folder)
    x = images().tensors[0]
    assert all(torch.equal(a, b) for a, b in zip(model.predict(x), again.predict(x), strict=True))
    assert (
        again.results
        == json.loads((folder / "metrics.json").read_text())["results"]
        == json.loads(json.dumps(model.results))
    )
    measured = [ptee.evaluate(each, images(), speed=False).to_dict()["rows"] for each in (model, again)]
    assert measured[0] == measured[1]


def test_one_seed_gives_the_same_network_and_another_seed_another(run):
    _, model = run
    assert weights_hash(joint().backbone) == weights_hash(model.backbone)
    assert weights_hash(joint(seed=1).backbone) != weights_hash(model.backbone)


def test_the_recipe_of_the_run_says_that_its_backbone_learnt(run):
    folder, _ = run
    recipe = make_recipe(folder).resolved()
    assert recipe.backbone == "joint"
    assert recipe == make_recipe("eenet-joint", {k: v for k, v in SMALL.items() if k != "device"}).resolved()


def test_an_interrupted_training_from_scratch_goes_on_to_the_same_bits(run, tmp_path):
    _, whole = run

    def interrupt(text: str) -> None:
        if text.startswith("epoch 1"):
            raise KeyboardInterrupt

    with pytest.raises(ptee._common.errors.Interrupted):
        joint(tmp_path / "run", log=interrupt)
    resumed = joint(tmp_path / "run", resume=True)
    assert weights_hash(resumed.backbone) == weights_hash(whole.backbone)
    assert weights_hash(resumed.heads) == weights_hash(whole.heads)


def test_a_frozen_run_in_place_of_one_whose_backbone_learnt_keeps_no_weights_of_it(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    assert (tmp_path / "run" / "backbone.safetensors").is_file()
    ptee.fit(
        Tiny(), images(), out=tmp_path / "run", overwrite=True, recipe="eenet", epochs=1, exits=["conv"], device="cpu"
    )
    assert not (tmp_path / "run" / "backbone.safetensors").exists()


def test_a_module_of_ones_own_learns_and_a_frozen_one_does_not():
    net = Tiny()
    before = weights_hash(net)
    ptee.fit(net, images(), recipe="eenet", epochs=1, exits=["conv"], device="cpu").detach()
    assert weights_hash(net) == before
    ptee.fit(net, images(), recipe="eenet-joint", epochs=1, exits=["conv"], device="cpu").detach()
    assert weights_hash(net) != before


def test_a_backbone_that_has_hardly_learned_is_named():
    with pytest.warns(UserWarning, match=r"The backbone is right on .* by chance: it has hardly learned. Train longer"):
        joint(lr=1e-9, backbone_lr=1e-9, epochs=1, val_data=images(40))


@pytest.mark.parametrize("name", ["eenet-joint", "branchynet-joint", "db-joint"])
def test_every_system_that_trains_its_backbone_has_a_recipe(name):
    recipe = make_recipe(name).resolved()
    assert (recipe.backbone, recipe.training.backbone_lr, recipe.training.targets) == ("joint", 0.001, "labels")


def test_frozen_is_the_default_and_stays_so_in_every_other_recipe():
    for name in ("ptee", "pteenet", "eenet", "branchynet", "ztw"):
        assert make_recipe(name).resolved().training.backbone == "frozen"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recipe": "eenet", "backbone_lr": 0.1}, "backbone_lr=0.1 needs backbone='joint'"),
        ({"recipe": "ptee", "backbone": "joint"}, "Give loss='joint_each_exit' or loss='weighted'"),
        ({"backbone": "thawed"}, "backbone='thawed'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_in_one_line_before_any_training(settings, words):
    with pytest.raises(PteeError, match=words) as refusal:
        joint(**settings)
    one_line(refusal)


def test_images_without_labels_are_refused_in_one_line():
    with pytest.raises(DataError, match="backbone that learns needs labels") as refusal:
        ptee.fit(Tiny(), images(labelled=False), recipe="eenet-joint", exits=["conv"], device="cpu")
    one_line(refusal)
