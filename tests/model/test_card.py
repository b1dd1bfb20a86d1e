from __future__ import annotations

import pytest
from small import labelled, made, once
from torch import nn
from torch.utils.data import TensorDataset

import ptee
from ptee.model.card import text_for
from ptee.model.run_files import CARD


@once
def measured() -> ptee.EarlyExitModel:
    model = made()
    data = TensorDataset(*labelled(40))
    model.results = ptee.evaluate(model, data, about="Pictures of <b>cats</b> | dogs.", speed_seconds=0.1).to_dict()
    model.results["data"] = {"source": "folder"}
    return model


def text_of(model: ptee.EarlyExitModel, folder) -> str:
    model.save_pretrained(folder)
    return (folder / CARD).read_text()


def test_a_card_says_what_was_measured_and_how_to_use_it(tmp_path):
    model = measured()
    text = text_of(model, tmp_path)
    assert model.results is not None
    bare, own = (model.results["rows"][n] for n in (0, -1))
    for name, row in (("backbone", bare), ("early exits", own)):
        assert f"| {name} | {row['accuracy']:.4g} | {row['fidelity']:.4g} | {row['cost']:.4g} |" in text
    assert f"{1e3 / own['images_per_s']:.3g} ms for an image on {model.results['device']}" in text
    for line in (
        "- thresholds: 0.5, 0.5",
        "- confidence: learned",
        "- data: folder",
        "- licence of the backbone: not known",
        "import ptee",
    ):
        assert line in text
    assert "On 40 images. Data: Pictures of &lt;b&gt;cats&lt;/b&gt; \\| dogs." in text
    assert text.startswith("---\n")
    assert "library_name: ptee" in text


def test_a_card_follows_the_run_and_one_that_somebody_wrote_is_kept(tmp_path):
    model = measured()
    text_of(model, tmp_path)
    model.threshold = 0.25
    text = text_of(model, tmp_path)
    assert "- thresholds: 0.25, 0.25" in text
    assert "measured with other thresholds (0.5, 0.5) than the model has now (0.25, 0.25)" in text
    model.threshold = 0.5
    assert "other thresholds" not in text_of(model, tmp_path)
    (tmp_path / CARD).write_text("mine")
    assert text_of(model, tmp_path) == "mine"


def test_a_card_has_the_numbers_of_the_thresholds_that_were_measured_last_where_they_are_kept(tmp_path):
    model = measured()
    data = TensorDataset(*labelled(30))
    model.threshold = 0.25
    assert "`ptee.evaluate(model, data, keep=True)`" in text_of(model, tmp_path)
    found = ptee.evaluate(model, data, speed=False, keep=True)
    text = text_of(model, tmp_path)
    assert "On 30 images." in text and "other thresholds" not in text
    assert (
        f"| {found.early_exit.accuracy:.4g} | {found.early_exit.fidelity:.4g} | {found.early_exit.cost:.4g} |" in text
    )
    assert "- data: folder" in text


def test_a_card_says_that_its_numbers_are_of_another_confidence_or_of_other_answers(tmp_path):
    model = measured()
    model.confidence = "max_prob"
    assert "measured with another confidence (learned) than the model has now (max_prob), so" in text_of(
        model, tmp_path
    )
    model.threshold = 0.25
    said = "other thresholds (0.5, 0.5) than the model has now (0.25, 0.25) and another confidence (learned) than"
    assert said in text_of(model, tmp_path)
    assert model.results is not None
    model.threshold = 0.5
    model.results |= {"confidence": "max_prob", "answers": "blended"}
    assert "measured with other answers (blended) than the model has now (own), so" in text_of(model, tmp_path)


def test_a_card_that_cannot_be_read_is_kept(tmp_path, monkeypatch):
    model = measured()
    text_of(model, tmp_path)

    def refuse(path, *args, **more):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as there:
        there.setattr("pathlib.Path.open", refuse)
        assert text_for(model, tmp_path) is None
    assert text_for(model, tmp_path) is not None


@pytest.mark.parametrize(
    "results", [None, {}, {"rows": [1]}, {"rows": [{}], "samples": "many"}, {"data": 3, "tuning": 4}], ids=str
)
def test_a_card_without_sound_results_says_that_nothing_was_measured(results, tmp_path):
    model = made()
    model.results = results
    assert "## Measured\n\nNothing yet." in text_of(model, tmp_path)


def test_a_card_names_the_licence_that_the_library_knows(tmp_path):
    model = made()
    assert isinstance(model.backbone, nn.Module)
    model.backbone.pretrained_cfg = {"license": "apache-2.0"}
    assert "- licence of the backbone: apache-2.0" in text_of(model, tmp_path)


@pytest.mark.parametrize("known", [False, True])
def test_a_card_gives_a_mean_only_if_somebody_gave_it_or_a_library_knows_it(known, tmp_path):
    model = made()
    if known:
        model = ptee.augment("cifar_resnet8", exits=["layer1"], head="pool", pretrained=False)
    text = text_of(model, tmp_path)
    assert ("normalised by mean" in text) is known
    assert ("their mean and std are not recorded" in text) is not known
    if not known:
        again = ptee.load(tmp_path, model.detach())
        assert "their mean and std are not recorded" in text_of(again, tmp_path)
