"""Who removes pictures that cannot be read, as told, goes on with the same training and the same split."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ptee.backbones.load import load_backbone
from ptee.cli.main import main
from ptee.pipeline import fit
from ptee.training import trainer

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    """Forty pictures of two classes, of which calibration and validation images are drawn."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for k in range(40):
        path = tmp_path / "images" / "ab"[k % 2] / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    save_file(load_backbone("cifar_resnet20", pretrained=False, num_classes=2).module.state_dict(), "w.safetensors")
    return tmp_path / "images"


@pytest.fixture
def augment(images, capsys) -> Run:
    """`ptee augment` in this process: its status and all that it says."""
    model = (
        "--model cifar_resnet20 --num-classes 2 --input-size 3,16,16 --weights w.safetensors --data images --out out"
    )
    how = "--exits layer1 --head pool --recipe pteenet --epochs 3 --batch-size 8 --set precision=no --no-speed"

    def augment(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["augment", *model.split(), *how.split(), *words])
        said = capsys.readouterr()
        return end.value.code, said.out + said.err

    return augment


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:100])
    return path


@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["the same command", "--resume"])
def test_all_of_them_are_named_before_the_training_and_without_them_it_goes_on(augment, images, more):
    broken = [damage(images / "a" / "00.png"), damage(images / "b" / "07.png")]
    status, said = augment()
    assert status == 2 and "epoch" not in said
    assert all(str(path.relative_to(images.parent)) in said for path in broken)
    for path in broken:
        path.unlink()
    status, said = augment(*more)
    assert status == 0, said
    assert not Path("out", "unreadable.json").exists()


def test_a_training_that_has_begun_goes_on_without_them(augment, images, monkeypatch, capsys):
    whole = trainer._Training._epoch

    def epoch(self, number: int, *more: object) -> trainer.Epoch:
        if number == 2:
            raise KeyboardInterrupt
        return whole(self, number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Training, "_epoch", epoch)
        assert augment()[0] == 130
    broken = damage(images / "a" / "10.png")
    assert "images/a/10.png" in augment("--resume")[1]
    broken.unlink()
    (images / "b" / "11.png").rename(images / "b" / "gone.png")
    assert "belongs to a training with data" in augment("--resume")[1]
    (images / "b" / "gone.png").rename(images / "b" / "11.png")
    status, said = augment("--resume")
    assert status == 0 and "epoch 1/3" not in said, said
    split = json.loads(Path("out", "config.json").read_text())["results"]["data"]["split"]
    assert split["removed"] == [["train", "a/10.png", "a"]]
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "out", "--no-speed"])
    assert end.value.code == 0, capsys.readouterr().err


def test_a_picture_that_breaks_during_the_training_is_recorded_too(augment, images, monkeypatch):
    broken = images / "b" / "13.png"

    def train(*_: object, **__: object) -> None:
        damage(broken)
        from ptee.data.pictures import File, decode

        decode(File(str(broken), broken.name))

    with monkeypatch.context() as patch:
        patch.setattr(fit, "train", train)
        status, said = augment()
    assert status == 2 and "1 of 40 pictures cannot be read" in said
    broken.unlink()
    assert augment("--resume")[0] == 0


def test_near_chance_a_wish_about_accuracy_is_refused_and_the_heads_learn_the_backbones_answers(augment):
    with torch.no_grad():
        state = load_backbone("cifar_resnet20", pretrained=False, num_classes=2).module.state_dict()
        save_file({key: value * 0 if "fc" in key else value for key, value in state.items()}, "w.safetensors")
    for words in (["--max-drop", "0.01"], ["--targets", "labels"]):
        status, said = augment(*words)
        assert status == 2
        assert f"{' '.join(words)} needs labels under which the backbone is right" in said and "--classes FILE" in said
    status, said = augment()
    assert status == 0
    assert "by chance" in said


def test_a_file_of_class_names_is_recorded_and_used_again(augment, images, capsys):
    Path("classes.txt").write_text("b\na\n")
    assert augment("--classes", "classes.txt")[0] == 0
    split = json.loads(Path("out", "config.json").read_text())["results"]["data"]["split"]
    assert split["classes"] == ["b", "a"]
    (images / "a").rename("a")
    Path("val").mkdir()
    Path("a").rename("val/a")
    with pytest.raises(SystemExit) as end:  # one of the two classes alone
        main(["evaluate", "out", "--data", "val", "--no-speed"])
    said = capsys.readouterr()
    assert end.value.code == 0, said.err
    assert "The 1 classes of the data have the backbone's numbers." in said.out
