"""`ptee export`: files that answer as the model, and are refused if anything about them is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from copy import deepcopy as copy_of
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import slow
from device import drawn
from extras import needs_onnx
from images import picture
from PIL import Image
from small import SIZE, K, Normalises, blend_for, blended, chained, made
from torch import Tensor

import ptee
from ptee._common.errors import PteeError, RunError
from ptee._common.writing import is_left_over
from ptee.data.pictures import image_transform
from ptee.deploy.export import class_names_of, publish
from ptee.deploy.manifest import MANIFEST, fingerprint
from ptee.deploy.runner import Runner, load_exported
from ptee.deploy.runner import main as runner_main

pytestmark = pytest.mark.cpu("what is exported is the same on every device")
FORMATS = ["pt2", pytest.param("onnx", marks=needs_onnx)]
each_format = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    early = made()
    early.threshold = [0.3, 0.7]
    return ptee.export(early, tmp_path_factory.mktemp("exported") / "out", mean=0.5, std=0.5)


@pytest.fixture(scope="module")
def runner(exported: Path) -> Any:
    """What loads it, to be left as it is."""
    return ptee.load_exported(exported)


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def images(rows: int, size: tuple[int, ...] = SIZE) -> Tensor:
    return 3 * torch.randn(rows, *size, generator=drawn(1), device="cpu")


def require_same(runner: Any, model: ptee.EarlyExitModel, x: Tensor, threshold: Any) -> None:
    with torch.no_grad():
        want = model.predict(x, threshold)
    got = runner.predict(x.numpy() if runner.manifest.format == "onnx" else x, threshold)
    assert np.array_equal(np.asarray(got.exit_index), want.exit_index.numpy())
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a), b.numpy(), rtol=1e-4, atol=1e-4)


def reading_the_first() -> ptee.EarlyExitModel:
    """Its second head builds on the answer of the first."""
    return made("res-8x1+")


@pytest.mark.parametrize(
    ("model", "confidence", "format"),
    [
        (made, "learned", "pt2"),
        pytest.param(made, "learned", "onnx", marks=[needs_onnx, pytest.mark.slow]),
        pytest.param(made, "patience", "onnx", marks=[needs_onnx, pytest.mark.slow]),
        slow(reading_the_first, "learned", "pt2"),
        slow(chained, "learned", "pt2"),
    ],
)
def test_the_same_rows_leave_with_the_same_answers(model, confidence, format, tmp_path):
    early = model()
    early.confidence = confidence
    runner = ptee.load_exported(ptee.export(early, tmp_path / "out", format=format))
    for rows in (1, 2, 7, 32):
        x = images(rows, early.plan.input_size)
        for threshold in (
            0.0,
            0.5,
            2.0,
            [0.4, 0.6, 0.5][: len(early.exits)],
            torch.rand(rows, len(early.exits)).tolist(),
        ):
            require_same(runner, early, x, threshold)


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=[needs_onnx, pytest.mark.slow])])
def test_blended_answers_are_exported(format, tmp_path):
    early = blended()
    runner = ptee.load_exported(ptee.export(early, tmp_path / "out", format=format))
    of_rows = torch.tensor(
        [[0.4, 2.0], [2.0, 2.0], [2.0, 0.4]] * 3
    )  # rows that no exit could take get the backbone's own answer
    for threshold in (0.0, 0.4, 2.0, [0.4, 2.0], of_rows):
        require_same(runner, early, images(9), threshold)


@pytest.mark.slow
def test_nobody_leaves_at_an_exit_that_is_off_though_its_head_is_exported(tmp_path):
    early = reading_the_first()
    early.off = [0]
    require_same(ptee.load_exported(ptee.export(early, tmp_path / "out")), early, images(9), 0.0)


def test_an_exit_that_is_off_is_not_exported(tmp_path):
    early = made()
    early.off = [0]
    folder = ptee.export(early, tmp_path / "out")
    assert len(list(folder.glob("piece_*"))) == 2
    require_same(ptee.load_exported(folder), early, images(9), 0.5)


def test_the_threshold_of_the_model_is_in_force_and_can_be_changed(exported):
    runner = ptee.load_exported(exported)
    assert runner.threshold == [0.3, 0.7]
    runner.threshold = 2.0
    assert (runner.predict(images(4)).exit_index == 2).all()
    with pytest.raises(PteeError, match="3 thresholds for 2 exits"):
        runner.threshold = [1.0, 2.0, 3.0]
    with pytest.raises(PteeError, match="NaN"):
        runner.threshold = float("nan")
    with pytest.warns(UserWarning, match=r"did you mean 0\.7\?"):
        runner.threshold = 70


@pytest.mark.parametrize(
    "threshold",
    [
        torch.tensor(0.5, requires_grad=True),
        torch.tensor([0.5, 0.5], dtype=torch.bfloat16),
        np.float16(0.5),
        Decimal("0.5"),
        [Fraction(1, 2), 10**30],
        [1, 0],
    ],
)
def test_thresholds_are_numbers_of_any_type(threshold, runner):
    as_floats = np.asarray(torch.as_tensor(threshold, dtype=torch.float64).detach())
    want, got = (runner.predict(images(4), t).exit_index for t in (as_floats, threshold))
    assert want.tolist() == got.tolist()


@pytest.mark.parametrize("threshold", ["0.5", True, [True, False], [True, 0.5], None, [None, 0.5], 0.5j])
def test_thresholds_that_are_no_numbers_are_refused(threshold, exported):
    with pytest.raises(PteeError, match=r"^A threshold is a number or numbers, such as 0.7 or \[0.9, 0.8\], not"):
        ptee.load_exported(exported).threshold = threshold


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (images(2, (3, 9, 9)), r"\(b, 3, 8, 8\), b of 1 or more, not \(2, 3, 9, 9\)"),
        (
            images(2).double(),
            r"of type float32, not torch\.float64\. Give them normalised, as x\.to\(torch\.float32\)\.$",
        ),
        (images(2).numpy(), r"a tensor of torch \(b, c, h, w\), not ndarray\. Give torch\.from_numpy\(x\)\.$"),
        (images(1)[0], r"not \(3, 8, 8\)\. For one image give x\[None\]\.$"),
        (images(0), r"b of 1 or more, not \(0, 3, 8, 8\)\.$"),
        (images(2).to_sparse(), r"these are sparse \(sparse_coo\)\. Give x\.to_dense\(\)"),
        (images(2).to("meta"), r"these are on the meta device"),
        (torch.nested.nested_tensor([*images(2)], layout=torch.jagged), r"these are nested, .* Give torch\.stack"),
        (None, r"not NoneType"),
        ("a", r"not str"),
    ],
    ids=[
        "another size",
        "another type",
        "another kind",
        "one image",
        "no rows",
        "sparse",
        "meta",
        "nested",
        "nothing",
        "text",
    ],
)
def test_other_images_are_refused(x, match, runner):
    with pytest.raises(PteeError, match=match):
        runner.predict(x)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool = True) -> None:
    """Change the manifest, as a stranger could who makes the fingerprint anew."""
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values | ({"fingerprint": fingerprint(values)} if sign else {})))


def piece(n: int, **changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda m: m["pieces"][n].update(changes))


def entry(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda m: m.update(changes))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a changed piece": (lambda f: (f / "piece_1.pt2").write_bytes(b"x"), r"piece_1\.pt2 was changed"),
    "a missing piece": (lambda f: (f / "piece_1.pt2").unlink(), r"piece_1\.pt2 is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), r"there is no manifest\.json"),
    "no JSON": (lambda f: (f / MANIFEST).write_text("{"), r"cannot be read"),
    "no object": (lambda f: (f / MANIFEST).write_text("[]"), r"no JSON object"),
    "a changed entry": (
        lambda f: edit(f, lambda m: m.update(backbone="x"), sign=False),
        r"Only thresholds may be changed",
    ),
    "a newer schema": (entry(schema_version=2), r"Upgrade ptee"),
    "a schema that is no number": (entry(schema_version=True), r"schema_version"),
    "a path out of the folder": (
        piece(0, file="../x.pt2"),
        r"pieces\[0\]\.file='\.\./x\.pt2' must be text that fits \^piece_",
    ),
    "too few costs": (entry(costs=[0.1]), r"do not fit"),
    "an unknown key": (entry(**{"\x1b[31mmore": 1}), r"unknown"),
    "a name with an escape": (entry(backbone="\x1b[31mx"), r"backbone=.* must be text without control characters"),
    "an exit that is not there": (piece(1, exit=7), r"do not fit"),
    "an exit that is off and not there": (entry(off=[7]), r"do not fit"),
    "a deviation of 0": (entry(std=[0.0, 1.0, 1.0]), r"std"),
    "an unknown interpolation": (entry(interpolation="magic"), r"interpolation"),
    "images that are too large": (entry(input_size=[3, 20000, 20000]), r"larger than images can be"),
    "a std by which nothing can be divided": (entry(std=[1e-300]), r"std\[0\]=1e-300 must be 1e-06 or more"),
    "a name that turns the direction": (
        entry(backbone="a\u061cb"),
        r"backbone=.* must be text without control characters",
    ),
    "images of another size": (entry(input_size=[3, 9, 9]), r"do not fit its manifest"),
    "other classes": (entry(classes=7), r"do not fit its manifest"),
    "other names of classes": (entry(class_names=["one"]), r"other class_names than classes"),
    "no tensor alive": (piece(0, rows=[]), r"do not fit its manifest"),
    "another axis": (piece(0, rows=[[3, 1]]), r"do not fit its manifest"),
    "many entries for a row": (piece(0, rows=[[0, 10**6]]), r"do not fit its manifest"),
    "a piece twice": (lambda f: edit(f, lambda m: m["pieces"].insert(0, m["pieces"][0])), r"do not fit"),
    "a piece less": (lambda f: edit(f, lambda m: m["pieces"].pop(0)), r"do not fit its manifest"),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(damage, match, copy):
    damage(copy)
    with pytest.raises(RunError, match=match) as refused:
        ptee.load_exported(copy)
    assert str(refused.value).isprintable()


def test_a_threshold_may_be_changed_by_hand(copy):
    edit(copy, lambda m: m.update(thresholds=[0.1, 0.2]), sign=False)
    assert ptee.load_exported(copy).threshold == [0.1, 0.2]


def test_a_piece_that_is_no_program_is_refused_even_with_its_hash(copy):
    (copy / "piece_1.pt2").write_bytes(b"x")
    edit(copy, lambda m: m["pieces"][1].update(sha256=hashlib.sha256(b"x").hexdigest()))
    with pytest.raises(RunError, match=r"piece_1\.pt2 cannot be loaded") as refused:
        ptee.load_exported(copy)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("part", "text", "compressed", "said"),
    [
        ("models/model.json", b"{}", False, ""),
        ("more", b"0" * 10_000_000, True, r"unpacks to 10,\d+,\d+ bytes"),
    ],
    ids=["a part damaged", "a small file that unpacks to a large one"],
)
def test_a_piece_that_does_harm_is_refused_in_one_line_even_with_its_hash(part, text, compressed, said, copy, capfd):
    file, kind = copy / "piece_1.pt2", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file) as archive:
        parts = {each: archive.read(each) for each in archive.namelist()}
    top = next(iter(parts)).partition("/")[0]
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in (parts | {f"{top}/{part}": text}).items():
            archive.writestr(name, content)
    edit(copy, lambda m: m["pieces"][1].update(sha256=hashlib.sha256(file.read_bytes()).hexdigest()))
    with pytest.raises(RunError, match=rf"piece_1\.pt2 cannot be loaded.*{said}") as refused:
        ptee.load_exported(copy)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


class InFloat64(Normalises):
    """Its own answer has another number type than those of its exits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=[needs_onnx, pytest.mark.slow])])
def test_the_number_type_of_an_answer_does_not_depend_on_where_a_row_leaves(format, tmp_path):
    early = ptee.augment(InFloat64(), exits=["a"], head="pool", input_size=SIZE)
    runner = ptee.load_exported(ptee.export(early, tmp_path / "out", format=format))
    x = images(2)
    for t in (0.0, 2.0, [[0.0], [2.0]]):
        assert "float64" in str(runner.predict(x.numpy() if format == "onnx" else x, t).logits.dtype)


@pytest.mark.slow
@needs_onnx
def test_answers_of_several_number_types_are_blended_in_onnx(tmp_path):
    early = ptee.augment(InFloat64(), exits=["a"], head="pool", input_size=SIZE)
    early.confidence, early.blend, early.answers = "max_prob", blend_for(1), "blended"
    runner = ptee.load_exported(ptee.export(early, tmp_path / "out", format="onnx"))
    x = images(5)
    with torch.no_grad():
        want = early.predict(x.clone(), 1.0)
    np.testing.assert_allclose(runner.predict(x.numpy(), 1.0).logits, want.logits, rtol=1e-4, atol=1e-4)


def test_blended_answers_have_the_number_type_of_the_backbone_in_files_too(tmp_path):
    early = blended().bfloat16()
    runner = ptee.load_exported(ptee.export(early, tmp_path / "out"))
    x = images(7).bfloat16()
    for t in (0.0, 2.0):
        want, got = early.predict(x, t).logits, runner.predict(x, t).logits
        assert got.dtype == want.dtype == torch.bfloat16
        assert torch.allclose(got, want, atol=0.05)


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=[needs_onnx, pytest.mark.slow])])
def test_a_network_that_normalises_its_images_in_place_is_exported(format, tmp_path):
    early = ptee.augment(Normalises(), exits=["a"], head="pool", input_size=SIZE)
    runner = ptee.load_exported(ptee.export(early, tmp_path / "out", format=format))
    x = images(7)
    with torch.no_grad():
        want = early.predict(x.clone(), 2.0).logits
    for _ in range(2):  # the images stay as they are
        got = runner.predict(x.numpy() if format == "onnx" else x, 2.0)
        np.testing.assert_allclose(np.asarray(got.logits), want, rtol=1e-4, atol=1e-4)


def test_a_model_in_training_mode_is_not_exported_and_learns_nothing(tmp_path):
    early = made("res-8x1").train()
    before = copy_of(early.state_dict())
    with pytest.raises(PteeError, match=r"eval mode.*model\.eval\(\)"):
        ptee.export(early, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in early.state_dict().items())


FULL = """
import resource, sys
from small import made
import ptee
early = made()
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # bytes of a file
try:
    ptee.export(early, sys.argv[1])
except ptee.PteeError as why:
    print(why)
"""


@pytest.mark.slow
def test_a_disk_that_takes_no_more_of_a_piece_is_named_and_ends_no_process(tmp_path):
    pytest.importorskip("resource", reason="limits of files are Unix's")
    command = [sys.executable, "-W", "ignore", "-c", FULL, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert re.fullmatch(r"Cannot write .*piece_0\.pt2: File too large\. .*\n", done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_in_use_stays_as_it_is(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(RunError, match="exists"):
        ptee.export(made(), tmp_path)
    assert (tmp_path / "a").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_export_that_was_killed_does_not_stand_in_the_way_of_the_next(tmp_path):
    (tmp_path / "out" / ".writing-x").mkdir(parents=True)
    (tmp_path / "out" / ".writing-x" / "piece_0.pt2").write_text("half")
    assert not list(ptee.export(made(), tmp_path / "out").glob(".writing-*"))


def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("ptee.deploy.export._require_same", lambda *_: (_ for _ in ()).throw(PteeError("no")))
    with pytest.raises(PteeError, match="no"):
        ptee.export(made(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(PteeError, match="tflite"):
        ptee.export(made(), tmp_path / "out", format="tflite")


@pytest.mark.parametrize("size", [(20, 16), (16, 20), (8, 8), (60, 20), (5, 7), (33, 9)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pictures_become_the_images_that_ptee_makes_of_them(mode, size, runner, tmp_path):
    noise = torch.randint(256, (size[1], size[0], 3), generator=drawn(2), dtype=torch.uint8, device="cpu").numpy()
    Image.fromarray(noise).convert(mode).save(tmp_path / "a.png")
    m = runner.manifest
    with Image.open(tmp_path / "a.png") as file:
        want = image_transform(m.input_size, m.mean, m.std, m.interpolation)(file)
    torch.testing.assert_close(runner.images([tmp_path / "a.png"])[0], want, rtol=1e-5, atol=1e-5)


def test_a_picture_of_16_bits_is_not_clipped_to_white(runner, tmp_path):
    Image.fromarray(np.full((8, 8), 20000, dtype=np.uint16)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as file:
        want = image_transform(runner.manifest.input_size, runner.manifest.mean, runner.manifest.std)(file)
    torch.testing.assert_close(runner.images([tmp_path / "a.png"])[0], want)


def test_a_file_that_is_no_picture_is_refused_by_name(runner, tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(PteeError, match=r"a\.png is no picture"):
        runner.images([tmp_path / "a.png"])
    with pytest.raises(PteeError, match=r"^There is no file .*b\.png\.$"):
        runner.images([tmp_path / "b.png"])
    with pytest.raises(PteeError, match=r"is a folder\. Name the pictures in it, such as .*/\*\.jpg\.$"):
        runner.images([tmp_path])


@pytest.mark.slow
@needs_onnx
def test_a_model_in_onnx_answers_pictures_without_torch(tmp_path):
    folder = ptee.export(made(), tmp_path / "out", format="onnx", mean=0.5, std=0.5)
    picture(200, "RGB", (20, 16)).save(tmp_path / "a.png")
    code = f"""
import sys
sys.modules["torch"] = sys.modules["timm"] = None
from ptee.deploy.runner import main
sys.exit(main([{str(folder)!r}, {str(tmp_path / "a.png")!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(ptee.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    assert "a.png: class" in done.stdout and "exit" in done.stdout


def test_the_runner_calls_the_classes_as_the_data_of_the_run_does(tmp_path, capsys):
    model = made()
    names = [f"kind {k}" for k in range(model.num_classes)]
    model.results = {"data": {"split": {"classes": names}}}
    folder = ptee.export(model, tmp_path / "out", mean=0.5, std=0.5)
    picture(200, "RGB", (20, 16)).save(tmp_path / "a.png")
    assert runner_main([str(folder), str(tmp_path / "a.png")]) == 0
    number, name = re.search(r"class (\d+) \((.+?)\)", capsys.readouterr().out).groups()
    assert name == names[int(number)]


def test_names_that_are_none_of_the_classes_stay_out_of_the_manifest():
    model = made()
    for names in (["one"], ["a\x1b[2J"] * K, ["a\tb"] * K, ["a\nb"] * K, [1] * K, "abc", ["a" * 256] * K, None):
        model.results = {"data": {"split": {"classes": names}}}
        assert class_names_of(model) == []


# ---------------------------------------------------------------------------------------------------- the program's output

GONE = "import os; reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1); "
RUNNER = """
import sys
from ptee.deploy import runner
runner._answered = lambda folder, *pictures, **more: (["an answer"] * len(pictures), [])
sys.exit(runner.main(sys.argv[1:]))
"""
OUTPUTS = {
    "closed": (">&-", 0, ""),
    "full": (
        ">/dev/full",
        2,
        "The output cannot be written: No space left on device. Send it elsewhere, such as > FILE.\n",
    ),
    "both full": (">/dev/full 2>/dev/full", 2, ""),
    "without a reader": ("", 141, "Nobody reads the output any more"),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("where", OUTPUTS)
def test_output_of_the_runner_that_cannot_be_written_is_told_in_one_line(where):
    to, status, said = OUTPUTS[where]
    begin = GONE if status == 141 else ""
    command = f'exec "$0" -c "$1" folder a.png {to}'
    done = subprocess.run(["bash", "-c", command, sys.executable, begin + RUNNER], capture_output=True, text=True)
    assert (done.returncode, done.stderr[: len(said)]) == (status, said)
    assert len(done.stderr.splitlines()) == bool(said)


def test_the_runner_says_how_it_is_called_with_status_2(capsys):
    said = "usage: python -m ptee.deploy.runner FOLDER IMAGE ..., such as exported cat.jpg. --help says more.\n"
    for words in ([], ["folder"]):
        assert runner_main(words) == 2
        assert capsys.readouterr().err == said


def test_the_runner_takes_a_threshold_for_one_call(tmp_path, capsys):
    folder = str(ptee.export(made(), tmp_path / "out", mean=0.5, std=0.5))
    picture(200, "RGB", (20, 16)).save(tmp_path / "a.png")
    image = str(tmp_path / "a.png")
    for words, said in (
        (["--threshold", "0"], "exit 0"),
        (["--threshold=2,0"], "exit 1"),
        (["--threshold", "2"], "end"),
    ):
        assert runner_main([folder, *words, image]) == 0
        assert f", {said}" in capsys.readouterr().out
    refused = {
        ("--threshold", "70"): "did you mean 0.7?",
        ("--threshold", "high"): "--threshold 'high' is no number. Give one, or one for each exit: 0.9,0.8.",
        ("--threshold",): "is no number",
        ("--threshold", "1,1,1"): "3 thresholds for 2 exits",
        ("--treshold", "1"): "Unknown option '--treshold'. Did you mean '--threshold'?",
    }
    for more, why in refused.items():
        assert runner_main([folder, image, *more]) == 2
        assert why in (told := capsys.readouterr()).err and not told.out and len(told.err.splitlines()) == 1


@pytest.mark.parametrize("slip", ["treshold", "off", "confidence"])
def test_what_is_no_setting_of_an_exported_model_is_refused(exported, slip):
    runner = ptee.load_exported(exported)
    with pytest.raises(PteeError, match=f"Unknown setting of an exported model '{slip}'.* Choices: threshold"):
        setattr(runner, slip, 0.5)


def test_the_help_of_the_runner_has_an_example(capsys):
    assert runner_main(["--help"]) == 0
    shown = capsys.readouterr()
    assert "\npython -m ptee.deploy.runner exported cat.jpg dog.jpg\n" in shown.out
    assert shown.err == ""


def test_beside_a_picture_that_cannot_be_read_the_runner_answers_the_others(tmp_path, capsys):
    folder = str(ptee.export(made(), tmp_path / "out", mean=0.5, std=0.5))
    good, bad, nowhere = (str(tmp_path / name) for name in ("good.png", "bad.png", "nowhere.png"))
    picture(200, "RGB", (20, 16)).save(good)
    Path(bad).write_text("no picture")
    assert runner_main([folder, good, bad, nowhere, good]) == 2
    shown = capsys.readouterr()
    assert [line.partition(": class ")[0] for line in shown.out.splitlines()] == [good, good]
    first, second = shown.err.splitlines()
    assert first.startswith(f"{bad} is no picture that can be read: ")
    assert second == f"There is no file {nowhere}."
    assert (runner_main([folder, bad]), capsys.readouterr().out) == (2, "")


@needs_onnx
@pytest.mark.slow
def test_the_threads_of_a_piece_that_is_done_do_not_spin(tmp_path, monkeypatch):
    import onnxruntime

    folder, spins, session = ptee.export(made(), tmp_path / "out", format="onnx"), [], onnxruntime.InferenceSession

    def opened(file, options, **how):
        spins.append(options.get_session_config_entry("session.intra_op.allow_spinning"))
        return session(file, options, **how)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    ptee.load_exported(folder)
    assert spins == ["0"] * 3


@needs_onnx
@pytest.mark.slow
def test_confidences_that_are_nearly_nothing_may_be_rounded_to_nothing(tmp_path):
    model = made()
    with torch.no_grad():  # ONNX Runtime gives 0 where torch gives 1e-12
        model.heads[1].confidence.bias.fill_(-27.0)
        model.heads[1].confidence.weight.mul_(0.01)
    ptee.export(model, tmp_path / "out", format="onnx")


def test_other_answers_are_seen_where_all_rows_are_equally_sure(tmp_path, monkeypatch):
    model = made()
    with torch.no_grad():  # no threshold lies between two rows
        for head in model.heads:
            head.confidence.weight.zero_()
    ptee.export(model, tmp_path / "right")

    def wrong(folder, *how):
        runner = load_exported(folder, *how)
        first, *others = runner.pieces

        def off_by_one(x):
            *alive, logits, h = first(x)
            return *alive, logits + (len(x) > 1), h

        return Runner(runner.manifest, [off_by_one, *others], "cpu")

    monkeypatch.setattr("ptee.deploy.export.load_exported", wrong)
    with pytest.raises(PteeError, match="gives other answers than the model to a batch of 7"):
        ptee.export(model, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_classes_get_the_names_that_are_given(tmp_path):
    folder = ptee.export(made(), tmp_path / "out", class_names=["cat", "dog", "owl", "fox"])
    assert ptee.load_exported(folder).manifest.class_names == ("cat", "dog", "owl", "fox")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["cat"], "1 name for 4 classes. Give one for each class"),
        (["a", "b", "c", "d\ne"], r"'d\\ne' is no name of a class"),
        ("abcd", "class_names='abcd' must"),
    ],
    ids=["too few", "two lines", "one text"],
)
def test_names_that_no_classes_can_have_are_refused(names, said, tmp_path):
    with pytest.raises(PteeError, match=said):
        ptee.export(made(), tmp_path / "out", class_names=names)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_a_system_could_not_remove_is_not_handed_on(tmp_path):
    (tmp_path / "made").mkdir()
    for name in ("manifest.json", "exit_0.onnx", ".ptee.lock"):
        (tmp_path / "made" / name).touch()
    publish(tmp_path / "made", tmp_path / "target")
    assert sorted(file.name for file in (tmp_path / "target").iterdir()) == ["exit_0.onnx", "manifest.json"]


def test_what_another_process_wrote_there_during_an_export_stays(tmp_path, monkeypatch):
    def meanwhile(*_: Any) -> None:
        (tmp_path / "out" / "README.md").write_text("mine")

    monkeypatch.setattr("ptee.deploy.export._require_same", meanwhile)
    with pytest.raises(RunError, match="out exists"):
        ptee.export(made(), tmp_path / "out")
    assert [file.read_text() for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_export_works_in_its_own_folder_where_the_next_one_clears_what_a_killed_one_left(tmp_path, monkeypatch):
    seen: list[Path] = []
    monkeypatch.setattr("ptee.deploy.export._require_same", lambda _, place: seen.append(place))
    ptee.export(made(), tmp_path / "out")
    assert [place.parent for place in seen] == [tmp_path / "out"]
    assert is_left_over(seen[0].name)
