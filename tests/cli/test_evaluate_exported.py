"""`ptee evaluate` of an exported model: on images, by the files of its folder alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import assert_refused, pictures
from small import made

import ptee
from ptee.deploy.export import sign

pytestmark = pytest.mark.cpu("what is exported is the same on every device")
NAMES = ["bird", "cat", "dog", "frog"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose folder says what its classes are called."""
    model = made()
    model.results = {"data": {"split": {"classes": NAMES}}}
    return ptee.export(model, tmp_path_factory.mktemp("evaluate") / "exported", mean=0.5, std=0.5)


def test_classes_are_told_by_the_names_that_the_model_was_exported_with(exported, run):
    done = run("evaluate", exported, "--data", pictures(Path("some"), NAMES[1:], 3), "--json")
    assert "The 3 classes of the data have the backbone's numbers." in done.err
    assert json.loads(done.out)["accuracy"] is not None


def test_pictures_are_refused_if_nobody_said_how_they_are_normalised(exported, run, tmp_path):
    folder, images = shutil.copytree(exported, tmp_path / "own"), pictures(tmp_path / "images", NAMES, 1)
    sign(folder, json.loads((folder / "manifest.json").read_text()) | {"pixels_known": False})
    for command in ("evaluate", "bench"):
        done = run(command, folder, "--data", images)
        assert_refused(done, "mean and std of the images are not recorded .* so pictures cannot be prepared")


def test_a_class_that_was_renamed_does_not_shift_the_others(exported, run):
    assert_refused(
        run("evaluate", exported, "--data", pictures(Path("images"), ["bird", "dog", "frog", "kitten"], 2)),
        r"Classes of the data that the model does not know: kitten\. .*do not have: cat\. .*\(--classes FILE\)",
    )


def test_all_pictures_that_cannot_be_read_are_named_at_once(exported, run):
    images = pictures(Path("images"), NAMES, 3)
    for name in NAMES[1:3]:
        (images / name / "1.png").write_bytes(b"no picture")
    assert_refused(run("evaluate", exported, "--data", images), "2 of 12 pictures cannot be read.*cat/1.png.*dog/1.png")


def test_what_to_do_about_labels_is_said_as_it_is_typed(exported, run):
    done = run("evaluate", exported, "--data", pictures(Path("images"), ["a", "b"], 2))
    assert done.status == 0
    assert "cannot be mapped" in done.out and "(--classes FILE)" in done.out


def test_fidelity_to_a_backbone_in_whole_numbers_is_called_that(exported, run):
    images = pictures(Path("images"), NAMES, 2)
    whole = run("evaluate", exported, "--data", images)
    assert whole.status == 0
    assert "int8" not in whole.out
    values = json.loads((exported / "manifest.json").read_text())
    small = Path(shutil.copytree(exported, "small"))
    sign(small, values | {"int8": {"calibrated_on": 2, "compared_on": 2, "measured": []}})
    done = run("evaluate", small, "--data", images)
    assert "The backbone is that of these files, in int8. ptee export compared with the one in float32" in done.out
