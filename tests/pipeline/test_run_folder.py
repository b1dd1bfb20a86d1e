"""Who removes pictures that cannot be read, as told, goes on with the same training and the same split."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import slow
from PIL import Image
from safetensors.torch import save_file

from ptee._common.errors import RunError
from ptee.backbones.load import load_backbone
from ptee.cli.main import main
from ptee.data.pictures import File, decode
from ptee.pipeline import fit
from ptee.pipeline.run_folder import removed_pictures, sole_writer
from ptee.training import trainer

Run = Callable[..., tuple[int, str]]
WORDS = (
    "augment --model cifar_resnet8 --num-classes 2 --input-size 3,16,16 --weights w.safetensors --data images --out out "
    "--exits layer1 --head pool --recipe pteenet --epochs 3 --batch-size 8 --set precision=no --no-speed"
)
AT_HALF = f"{WORDS} --threshold 0.5"  # where thresholds do not matter: none are searched for


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    """Forty pictures of two classes, of which calibration and validation images are drawn."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for k in range(40):
        path = tmp_path / "images" / "ab"[k % 2] / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    save_file(load_backbone("cifar_resnet8", pretrained=False, num_classes=2).module.state_dict(), "w.safetensors")
    return tmp_path / "images"


@pytest.fixture
def ptee(images, capsys) -> Run:
    """The command in this process: its status and all that it says."""

    def ptee(command: str, *words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main([*command.split(), *words])
        said = capsys.readouterr()
        return end.value.code, said.out + said.err

    return ptee


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:100])
    return path


def recorded() -> dict:
    return json.loads(Path("out", "config.json").read_text())["results"]["data"]["split"]


def test_where_a_run_is_overwritten_the_advice_on_unreadable_pictures_is_one_that_works(ptee, images):
    broken = damage(images / "a" / "00.png")
    status, said = ptee(AT_HALF, "--overwrite")
    assert status == 2
    assert "If you remove it, add --resume in place of --overwrite: the other pictures" in said
    broken.unlink()
    status, said = ptee(AT_HALF, "--resume")
    assert status == 0, said


@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["the same command", "--resume"])
def test_all_of_them_are_named_before_the_training_and_without_them_it_goes_on(ptee, images, more):
    broken = [damage(images / "a" / "00.png"), damage(images / "b" / "07.png")]
    status, said = ptee(AT_HALF)
    assert status == 2 and "epoch" not in said
    assert all(str(path.relative_to(images.parent)) in said for path in broken)
    assert said.rstrip().endswith("If you remove them, add --resume: the other pictures stay in their parts.")
    for path in broken:
        path.unlink()
    status, said = ptee(AT_HALF, *more)
    assert status == 0, said
    assert not Path("out", "unreadable.json").exists()


def test_a_folder_in_place_of_the_lock_is_named(tmp_path):
    (tmp_path / ".ptee.lock").mkdir()
    with (
        pytest.raises(RunError, match=r"\.ptee\.lock cannot be locked: IsADirectoryError"),
        sole_writer(tmp_path, overwrite=False, resume=False),
    ):
        pytest.fail("it is written")


@pytest.mark.parametrize("was_there", [True, False])
def test_where_nothing_was_written_an_empty_folder_of_the_user_stays_and_a_new_one_goes(was_there, tmp_path):
    if was_there:
        (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt), sole_writer(tmp_path / "out", overwrite=False, resume=False):
        raise KeyboardInterrupt
    assert (tmp_path / "out").exists() == was_there


def test_a_pipe_in_place_of_the_record_of_pictures_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "unreadable.json")
    assert removed_pictures(tmp_path) == []


@pytest.fixture
def interrupted(ptee, monkeypatch) -> None:
    """A training that was interrupted in its second epoch."""
    whole = trainer._Training._epoch

    def epoch(self, number: int, *more: object) -> trainer.Epoch:
        if number == 2:
            raise KeyboardInterrupt
        return whole(self, number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Training, "_epoch", epoch)
        assert ptee(AT_HALF)[0] == 130


def test_a_training_that_has_begun_goes_on_without_them(ptee, images, interrupted, monkeypatch):
    broken = damage(images / "a" / "10.png")
    assert "images/a/10.png" in ptee(AT_HALF, "--resume")[1]
    broken.unlink()
    (images / "b" / "11.png").rename(images / "b" / "gone.png")
    assert "belongs to a training on other data" in ptee(AT_HALF, "--resume")[1]
    (images / "b" / "gone.png").rename(images / "b" / "11.png")
    with monkeypatch.context() as patch:  # and is interrupted again, when only the measurement is left
        patch.setattr(fit, "_measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        status, said = ptee(AT_HALF, "--resume")
    assert status == 130 and "epoch 1/3" not in said, said
    status, said = ptee(AT_HALF, "--resume")
    assert status == 0, said
    assert recorded()["removed"] == [["train", "a/10.png", "a"]]
    status, said = ptee("evaluate out --no-speed")
    assert status == 0, said


@pytest.mark.parametrize("step", ["run_training", *map(slow, ("_set_confidence", "evaluate"))])
def test_a_picture_that_breaks_at_any_step_is_recorded_and_no_epoch_is_lost(step, ptee, images, monkeypatch):
    broken = images / "b" / "13.png"

    def breaks(*_: object, **__: object) -> None:
        decode(File(str(damage(broken)), broken.name))

    with monkeypatch.context() as patch:
        patch.setattr(fit, step, breaks)
        status, said = ptee(WORDS)
    assert status == 2 and "1 of 40 pictures cannot be read" in said
    broken.unlink()
    status, said = ptee(WORDS, "--resume")
    assert status == 0, said
    assert ("epoch 1/3" in said) is (step == "run_training")


def test_near_chance_a_target_of_accuracy_is_refused_and_the_heads_learn_the_backbones_answers(ptee):
    with torch.no_grad():
        state = load_backbone("cifar_resnet8", pretrained=False, num_classes=2).module.state_dict()
        save_file({key: value * 0 if "fc" in key else value for key, value in state.items()}, "w.safetensors")
    for words in (["--max-drop", "0.01"], ["--targets", "labels"]):
        status, said = ptee(WORDS, *words)
        assert status == 2
        assert f"{' '.join(words)} needs labels under which the backbone is right" in said and "--classes FILE" in said
    status, said = ptee(WORDS)
    assert status == 0
    assert "by chance" in said


def test_a_file_of_class_names_is_recorded_and_used_again(ptee, images):
    Path("classes.txt").write_text("b\na\n")
    assert ptee(AT_HALF, "--classes", "classes.txt")[0] == 0
    assert recorded()["classes"] == ["b", "a"]
    Path("val").mkdir()
    (images / "a").rename("val/a")
    status, said = ptee("evaluate out --data val --no-speed")  # one of the two classes alone
    assert status == 0, said
    assert "The 1 class of the data has the backbone's numbers." in said
