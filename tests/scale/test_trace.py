"""Traces of very many images: the same answers from every engine, and a folder that is whole or goes on."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from extras import needs_ray
from images import Oracle, write_folder
from shards import shard
from small import blend_for
from torch.utils.data import Subset

import ptee
from ptee._common.errors import DataError, PteeError
from ptee.data.batches import batches, sample_of_marks
from ptee.data.labels import class_orders
from ptee.data.pictures import decode_bytes, image_transform
from ptee.data.shards import Sample, Source, find_source, samples
from ptee.scale import ray_engine
from ptee.scale.trace import ENGINES, with_classes
from ptee.scale.worker import Job, Worker
from ptee.tuning.trace_folder import TraceFolder
from ptee.tuning.traces import Traces, record

pytestmark = pytest.mark.filterwarnings("ignore:.*The backbone is right on")  # the images are noise


def traces_of(run: Path, folder: TraceFolder, **how: bool) -> Traces:
    return folder.traces(ptee.load(run), rows=None, **{"logits": True, "own": True} | how)


class Pictures(torch.utils.data.Dataset):
    """The same images one by one, in the order of their keys in a folder of traces."""

    def __init__(self, run: Path, source: Path) -> None:
        view, found = ptee.load(run).origin.input, find_source(source)
        self.transform = image_transform(view.input_size, view.mean, view.std, view.interpolation)
        self.rows = list(samples(found, found.files))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> tuple[torch.Tensor, int]:
        return self.transform(decode_bytes(self.rows[n].image)), self.rows[n].label


@pytest.fixture(scope="module")
def folder(a_run, shards, tmp_path_factory) -> TraceFolder:
    """Traces of thirty images, written by one process in batches of seven."""
    return ptee.record(a_run, shards, tmp_path_factory.mktemp("traces") / "out", batch_size=7)


def test_a_folder_of_traces_holds_what_the_model_answers(a_run, shards, folder):
    model, pictures = ptee.load(a_run), Pictures(a_run, shards)
    expected, found = record(model, pictures, own=True, progress=False), traces_of(a_run, folder)
    order = torch.argsort(expected.confidence[0])
    places = torch.argsort(found.confidence[0])
    assert torch.equal(found.answers[:, places], expected.answers[:, order])
    assert torch.equal(found.targets[places], expected.targets[order])
    assert torch.allclose(found.confidence[:, places], expected.confidence[:, order], atol=1e-5)
    shown = [t.logits[:, rows].softmax(-1) for t, rows in ((found, places), (expected, order))]
    assert torch.allclose(*shown, atol=2e-3)
    assert torch.equal(found.costs, expected.costs)


def test_a_subset_of_a_folder_is_those_rows(a_run, folder):
    model, rows = ptee.load(a_run), [4, 20, 7]
    some = record(model, Subset(Subset(folder, [1, *rows]), [1, 2, 3]), own=True)
    assert torch.equal(some.answers, traces_of(a_run, folder).answers[:, rows])


def test_functions_take_a_folder_in_place_of_images(a_run, shards, folder):
    model, pictures = ptee.load(a_run), Pictures(a_run, shards)
    kept = [ptee.evaluate(model, data, speed=False).to_dict() for data in (folder, pictures)]
    for ours, theirs in zip(*(results["rows"] for results in kept), strict=True):
        for key in ("accuracy", "fidelity", "cost"):
            assert ours[key] == pytest.approx(theirs[key])
    fits = [ptee.calibrate(ptee.load(a_run), data).exits for data in (folder, pictures)]
    for ours, theirs in zip(*fits, strict=True):
        assert (ours.scale, ours.shift) == pytest.approx((theirs.scale, theirs.shift), abs=0.02)
    chosen = [
        ptee.tune(ptee.load(a_run), data, max_fidelity_drop=0.3, answers="own", margin=0) for data in (folder, pictures)
    ]
    assert chosen[0].score.cost == pytest.approx(chosen[1].score.cost)
    found = ptee.compare({"a": model}, folder, folder, lines=["own"], drops=[0.5], progress=False)
    assert found.samples == 30


def test_images_are_known_again_in_a_folder_of_traces_and_by_it(a_run, shards, folder, tmp_path):
    model, pictures = ptee.load(a_run), Pictures(a_run, shards)
    assert set(folder.marks(None).tolist()) == set(record(model, pictures).marks.tolist())
    some = torch.tensor([7, 2], device="cpu")
    assert torch.equal(folder.marks(some), folder.marks(None)[some])
    half = Subset(folder, range(15))
    ptee.calibrate(model, half)
    assert model.results["calibrated_on"]["marks"] == sample_of_marks(folder.marks(None)[:15])
    assert torch.equal(folder.traces(model, rows=None, logits=False, own=True).marks, folder.marks(None))
    ptee.calibrate(model, folder)  # h of these images cannot show what it guarantees on them
    with pytest.raises(DataError, match=r"^The confidence was calibrated on these images.* confidence=0\.9 guarantees"):
        ptee.tune(model, pictures, max_fidelity_drop=0.6, confidence=0.9)
    model = ptee.load(a_run)
    ptee.train(model, pictures, epochs=1, views=1)
    model.save_pretrained(tmp_path / "run")
    with pytest.warns(UserWarning, match="^The heads were trained on these images, so results may be better here"):
        found = ptee.record(tmp_path / "run", shards, tmp_path / "out")
    with pytest.raises(DataError, match=r"^Nothing can be guaranteed here\. The heads were trained on these images"):
        ptee.tune(model, found, max_fidelity_drop=0.6, confidence=0.9)


def test_a_model_that_was_calibrated_since_gets_its_new_confidence(a_run, folder):
    model = ptee.load(a_run)
    ptee.calibrate(model, folder)
    expected = traces_of(a_run, folder).logits[:-1].softmax(-1).amax(-1)
    h = folder.traces(model, rows=None, logits=False, own=True).confidence[:-1]
    assert not torch.allclose(h, expected)
    assert torch.equal(h.argsort(-1), expected.logit().argsort(-1))


def test_the_largest_logits_alone_give_nearly_the_same_confidence(a_run, shards, tmp_path, folder):
    few = ptee.record(a_run, shards, tmp_path / "few", logits=3)
    ours, theirs = (traces_of(a_run, each).logits.softmax(-1) for each in (few, folder))
    assert torch.allclose(ours.amax(-1), theirs.amax(-1), atol=2e-3)
    assert torch.allclose(ours.sum(-1), torch.ones(3, 30, device="cpu"), atol=1e-2)


def test_own_answers_need_no_logits(a_run, shards, tmp_path):
    none = ptee.record(a_run, shards, tmp_path / "none", logits=0)
    ptee.tune(ptee.load(a_run), none, max_fidelity_drop=0.3)
    with pytest.raises(DataError, match="holds no logits"):
        ptee.tune(ptee.load(a_run), none, max_fidelity_drop=0.3, answers="blended")


def test_of_several_runs_each_has_the_logits_that_its_own_folder_kept(a_run, shards, folder, tmp_path):
    other = ptee.load(a_run)
    with torch.no_grad():
        next(other.heads.parameters()).add_(1)
    other.save_pretrained(tmp_path / "run")
    none = ptee.record(tmp_path / "run", shards, tmp_path / "none", logits=0)
    for folders in ([folder, none], [none, folder]):
        both = ptee.open_traces(*(each.folders[0] for each in folders))
        ptee.tune(ptee.load(tmp_path / "run"), both, max_fidelity_drop=0.3)
        assert both.can_give_logits(ptee.load(a_run), None)


def test_logits_that_memory_cannot_hold_are_left_out_or_refused(a_run, folder, monkeypatch):
    monkeypatch.setattr("ptee.tuning.trace_folder.LIMIT", 100)
    ptee.tune(ptee.load(a_run), folder, max_fidelity_drop=0.3)
    with pytest.raises(DataError, match=r"answers='own'"):
        ptee.tune(ptee.load(a_run), folder, max_fidelity_drop=0.3, answers="blended")


def test_traces_give_blended_answers_only_where_these_are_asked_for(a_run, folder):
    model = ptee.load(a_run)
    model.confidence, model.blend, model.answers = "max_prob", blend_for(2), "blended"
    own, blended = (folder.traces(model, rows=None, logits=True, own=own) for own in (True, False))
    assert own.own is None and torch.equal(own.answers, own.logits.argmax(-1))
    assert torch.equal(record(model, folder, own=True).answers, own.answers)
    assert torch.equal(blended.own, own.answers) and not torch.equal(blended.answers, own.answers)


def test_traces_of_another_run_are_refused(a_run, folder):
    model = ptee.load(a_run)
    with torch.no_grad():
        next(model.heads.parameters()).add_(1)
    with pytest.raises(DataError, match=r"other heads, not of this run.*ptee trace"):
        ptee.evaluate(model, folder, speed=False)


@pytest.mark.parametrize("key", ["heads", "backbone", "confidence", "logits"])
def test_a_folder_whose_manifest_was_changed_is_refused(key, folder, tmp_path):
    manifest = json.loads((folder.folders[0] / "manifest.json").read_text())
    del manifest["about"][key]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"its manifest does not say {key}"):
        ptee.open_traces(tmp_path)


def test_traces_of_other_images_are_not_compared(a_run, folder, tmp_path):
    shard(tmp_path / "a.tar", range(30, 60))
    other = ptee.record(a_run, tmp_path / "a.tar", tmp_path / "out")
    both = ptee.open_traces(folder.folders[0], other.folders[0])
    for function in (traces_of, lambda run, data: ptee.calibrate(ptee.load(run), data)):
        with pytest.raises(DataError, match="other images than"):
            function(a_run, both)


def test_speed_and_smaller_networks_need_the_images(a_run, folder):
    model = ptee.load(a_run)
    with pytest.raises(PteeError, match=r"no images to time.*speed=False"):
        ptee.evaluate(model, folder, speed=True)
    assert ptee.evaluate(model, folder).rows[0].images_per_s is None
    assert str(folder) == f"{folder.folders[0]}: traces of 30 images."
    with pytest.raises(DataError, match=r"pass ptee\.open_traces\(FOLDER\)"):
        ptee.evaluate(model, str(folder.folders[0]))
    with pytest.raises(PteeError, match="needs the images"):
        ptee.compare({"a": model}, folder, folder, static={"b": model.backbone})
    with pytest.raises(DataError):
        batches(folder, batch_size=1, shuffle=False)


def test_damaged_pictures_are_counted_and_named_and_the_others_kept(a_run, tmp_path):
    shard(tmp_path / "a.tar", range(20), damaged=(3, 17))
    found = ptee.record(a_run, tmp_path / "a.tar", tmp_path / "out")
    assert len(found) == 18
    assert traces_of(a_run, found).answers.shape == (3, 18)
    named = json.loads((tmp_path / "out" / "unreadable.json").read_text())["images"]
    assert [image["key"] for image in named] == ["a.tar/00003", "a.tar/00017"]


def test_a_folder_in_which_too_many_cannot_be_read_is_refused_again_and_when_opened(a_run, tmp_path):
    shard(tmp_path / "a.tar", range(20), damaged=range(12))
    for again in (ptee.record, ptee.record, lambda *_: ptee.open_traces(tmp_path / "out")):
        with pytest.raises(DataError, match="12 of 20 images cannot be used"):
            again(a_run, tmp_path / "a.tar", tmp_path / "out")
    for again in (ptee.cache, ptee.cache, lambda *_: ptee.open_cache(tmp_path / "cache")):
        with pytest.raises(DataError, match="12 of 20 images cannot be used"):
            again(a_run, tmp_path / "a.tar", tmp_path / "cache")
    assert len(ptee.record(a_run, tmp_path / "a.tar", tmp_path / "out", max_unreadable=0.7)) == 8


def test_a_damaged_shard_ends_it_and_the_same_call_goes_on(a_run, tmp_path, small_parts):
    data = tmp_path / "data"
    data.mkdir()
    for k in range(3):
        shard(data / f"{k}.tar", range(10 * k, 10 * k + 10))
    whole = (data / "1.tar").read_bytes()
    (data / "1.tar").write_bytes(whole[:-9000] + bytes(9000))
    said: list[str] = []
    (data / "1.tar").write_bytes(b"\1" * len(whole))
    with pytest.raises(DataError, match=r"1\.tar cannot be read to its end"):
        ptee.record(a_run, data, tmp_path / "out")
    with pytest.raises(DataError, match="1 of its 3 parts"):
        ptee.open_traces(tmp_path / "out")
    (data / "1.tar").write_bytes(whole)
    assert len(ptee.record(a_run, data, tmp_path / "out", log=said.append)) == 30
    assert said[0] == "1 of 3 parts are there already."


def test_a_run_with_other_exits_off_does_not_go_on_in_the_same_folder(a_run, shards, tmp_path, small_parts):
    model = ptee.load(a_run)
    model.save_pretrained(tmp_path / "run")
    ptee.record(tmp_path / "run", shards, tmp_path / "out")
    model.off = [1]
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(
        DataError, match=r"another threshold \(0\.3, 0\.3; now 0\.3, off\)\. It is finished, and can be read"
    ):
        ptee.record(tmp_path / "run", shards, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"parts": manifest["parts"][:1]}))
    with pytest.raises(DataError, match=r"now 0\.3, off\)\. Give another folder"):
        ptee.record(tmp_path / "run", shards, tmp_path / "out")


def test_another_file_of_classes_is_other_labels(a_run, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.png").write_bytes((a_run.parent / "picture.png").read_bytes())
    others = [f"class{k}" for k in range(8)]
    (tmp_path / "one.txt").write_text("\n".join(["dog", "cat", *others]))
    (tmp_path / "two.txt").write_text("\n".join(["cat", "dog", *others]))
    for make in (ptee.record, ptee.cache):
        out = tmp_path / make.__name__
        for _ in range(2):
            make(a_run, tmp_path / "data", out, classes=tmp_path / "one.txt")
        with pytest.raises(DataError, match=r"of another class order .*finished.*overwrite"):
            make(a_run, tmp_path / "data", out, classes=tmp_path / "two.txt")


def test_folders_of_classes_get_the_numbers_that_a_file_gives_them(a_run, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.png").write_bytes(Path(a_run.parent / "picture.png").read_bytes())
    (tmp_path / "classes.txt").write_text("\n".join(["dog", "cat", *(f"class{k}" for k in range(8))]))
    found = ptee.record(a_run, tmp_path / "data", tmp_path / "out", classes=tmp_path / "classes.txt")
    assert sorted(found.labels.tolist()) == [0, 1]


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_class_folders_get_the_numbers_under_which_the_backbone_is_right(library, tmp_path):
    names = [f"class{k}" for k in range(1, 13)]
    for k in range(3):
        write_folder(tmp_path, [f"{name}/{k}.png" for name in names])
    (tmp_path / "class1" / "0.png").write_bytes(b"damaged")
    order = class_orders(names)[library]
    model = knowing([order.index(name) for name in names])
    job, labels = with_classes(Job("run"), model, find_source(tmp_path), None)
    assert job.classes == {name: n for n, name in enumerate(order)}
    assert labels.reason.startswith(f"The 12 classes are taken in {library}'s order")
    reverse = tmp_path / "classes.txt"
    reverse.write_text("\n".join(reversed(order)))
    _, labels = with_classes(Job("run"), model, find_source(tmp_path), reverse)
    assert "by chance" in labels.doubt


def test_a_class_folder_that_the_run_does_not_know_is_refused_and_not_numbered(tmp_path):
    write_folder(tmp_path, ["bird/1.png", "car/1.png", "dog/1.png"])
    model = knowing([0, 1, 2], ["automobile", "bird", "dog"])
    with pytest.raises(DataError, match=r"that the model does not know: car\..*do not have: automobile.*classes=FILE"):
        with_classes(Job("run"), model, find_source(tmp_path), None)


def test_names_in_shards_get_the_numbers_of_the_run_and_other_names_are_refused(a_run):
    names = {"cat": 3, "caf\u00e9": 5}
    worker = Worker(Job("run", classes=names), ptee.load(a_run))

    def labels(*rows: tuple[str, bool]) -> list[int]:
        return worker.table([Sample("a", b"", -1, *row) for row in rows])["label"].to_pylist()

    assert labels(("cafe\u0301", False), ("images", True), ("cat", True), ("", False)) == [5, -1, 3, -1]
    with pytest.raises(DataError, match="a: 'kitten' is no class that the run knows"):
        labels(("kitten", False))
    worker = Worker(Job("run"), worker.model)  # of a run that knows no names
    assert labels(("images", True)) == [-1]
    with pytest.raises(DataError, match="'cat' is no class that the run knows"):
        labels(("cat", False))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("background cat dog cow", "names 4 classes, but the backbone has 3: name all of them"),
        ("cat dog cat", "names cat more than once"),
    ],
    ids=["one more", "twice"],
)
def test_a_file_of_names_for_shards_names_each_class_of_the_backbone_once(lines, said, tmp_path):
    (tmp_path / "classes.txt").write_text(lines.replace(" ", "\n"))
    with pytest.raises(DataError, match=said):
        with_classes(Job("run"), knowing([0, 1, 2]), Source("", "webdataset", (), ()), tmp_path / "classes.txt")


@pytest.mark.parametrize("kind", ["traces", "cache"])
def test_an_image_that_the_backbone_does_not_answer_is_left_out_and_named(kind, a_run, shards):
    model, source = ptee.load(a_run), find_source(shards)
    second = torch.tensor([[False] * 10, [True] + [False] * 9, [False] * 10])  # one logit is enough
    model.backbone.fc.register_forward_hook(lambda _, given, out: out.masked_fill(second, float("nan")))
    given = list(samples(source, source.files))[:3]
    assert Worker(Job("run", kind), model).table(given)["fault"].to_pylist() == [
        "",
        "the backbone's logits are NaN",
        "",
    ]
    given[1] = given[1]._replace(image=b"no picture")  # why it was not decoded says more
    assert "the backbone" not in Worker(Job("run", kind), model).table(given)["fault"].to_pylist()[1]


def test_a_name_that_a_run_recorded_for_two_classes_is_no_label(tmp_path):
    model = knowing([0, 1, 2], ["crane", "owl", "crane"])
    job, _ = with_classes(Job("run"), model, Source("", "webdataset", (), ()), None)
    assert job.classes == {"owl": 1}


@pytest.mark.parametrize("recorded", [["cat", "dog", "cow"], ["a", "b", "c"]], ids=["the same names", "other names"])
def test_numbers_with_names_become_those_of_the_run_unless_it_has_other_names(recorded):
    source = Source("", "parquet", (), (), ("dog", "cow", "cat"))
    job, labels = with_classes(Job("run"), knowing([0, 1, 2], recorded), source, None)
    ours = recorded if "cat" in recorded else source.class_names
    assert job.classes == {name: ours.index(name) for name in ("dog", "cow", "cat")}
    assert labels.reason


def test_it_is_said_how_many_images_have_labels(a_run, tmp_path):
    said: list[str] = []
    for labelled in (2, 1, 0):
        shard(tmp_path / "a.tar", range(2), labelled=labelled)
        ptee.record(a_run, tmp_path / "a.tar", tmp_path / "out", overwrite=True, log=said.append)
    all_of_them, one, none = (words.partition(". ")[2] for words in said if " 1 part in" in words)
    assert all_of_them == "All of them have labels."
    assert one.startswith("1 of them has a label, and the others none")
    assert none.startswith("None of them has a label. In shards a label is the number or the name")


def knowing(level_to_class: list[int], recorded: Sequence[str] = ()) -> Any:
    """A model that knows the class of a picture by its grey level, and what its run recorded."""
    module = Oracle(level_to_class)
    view = SimpleNamespace(input_size=(3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest")
    backbone = SimpleNamespace(module=module, num_classes=len(level_to_class), input=view)
    results = {"data": {"split": {"classes": list(recorded)}}}
    return SimpleNamespace(origin=backbone, num_classes=backbone.num_classes, results=results)


def test_an_unknown_engine_and_no_workers_are_refused(a_run, shards, tmp_path):
    with pytest.raises(PteeError, match=r"Unknown engine 'rey'\. Did you mean 'ray'"):
        ptee.record(a_run, shards, tmp_path / "out", engine="rey")
    with pytest.raises(PteeError, match="workers=0 is too few"):
        ptee.record(a_run, shards, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_without_ray_one_line_says_how_to_get_it(a_run, shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PteeError, match=r"pip install 'ptee-exits\[ray\]'.*engine=.local"):
        ptee.record(a_run, shards, tmp_path / "out", engine="ray")


@pytest.mark.parametrize(
    ("why", "said"),
    [("Version mismatch: The cluster was started with: Ray: 2.9.0", "other versions than this machine"),
     ("Could not find any running Ray instance", "No connection to the cluster at there:6379")],
)  # fmt: skip
def test_a_cluster_that_cannot_be_joined_says_why_in_one_line(why, said, monkeypatch):
    class Ray:
        __version__ = "2.60.0"

        def is_initialized(self) -> bool:
            return False

        def init(self, **_: object) -> None:
            raise RuntimeError(f"{why}\n  Python: 3.9")

    monkeypatch.setattr(ray_engine, "require_ray", Ray)
    monkeypatch.setenv("RAY_ADDRESS", "there:6379")
    with pytest.raises(PteeError, match=said) as error, ray_engine.connected():
        pass
    assert "\n" not in str(error.value)


def test_rows_as_ray_reads_them_are_the_same_samples(shards):
    source = find_source(shards)
    ours = list(samples(source, source.files[:1]))
    batch = {
        "path": [str(shards / "0.tar")] * 10,
        "__key__": [sample.key.partition("/")[2] for sample in ours],
        "png": [sample.image for sample in ours],
        "cls": [str(sample.label).encode() for sample in ours],
    }
    assert ray_engine.samples_of(source, batch) == ours


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param(e, marks=needs_ray if e == "ray" else ()) for e in ENGINES])
def test_two_workers_of_each_engine_answer_the_same(engine, a_run, shards, tmp_path, folder, small_parts):
    found = ptee.record(a_run, shards, tmp_path / "out", engine=engine, workers=2, batch_size=7)
    ours, theirs = traces_of(a_run, found), traces_of(a_run, folder)
    assert torch.equal(ours.answers, theirs.answers)
    assert torch.equal(ours.targets, theirs.targets)
    assert torch.allclose(ours.confidence, theirs.confidence, atol=1e-5)
    assert found.images_sha256 == folder.images_sha256


@pytest.mark.slow
@needs_ray
@pytest.mark.parametrize("kind", ["parquet", "pictures"])
def test_ray_reads_tables_and_pictures_as_one_process_does(kind, a_run, shards, tmp_path):
    source, data = find_source(shards), tmp_path / "data"
    rows = list(samples(source, source.files))
    if kind == "pictures":
        for row in rows:
            (data / f"class{row.label}").mkdir(parents=True, exist_ok=True)
            (data / f"class{row.label}" / f"{row.key[-5:]}.png").write_bytes(row.image)
    else:
        import pyarrow as pa
        import pyarrow.parquet

        data.mkdir()
        images = [{"bytes": row.image, "path": row.key[-5:]} for row in rows]
        pa.parquet.write_table(pa.table({"image": images, "label": [row.label for row in rows]}), data / "a.parquet")
    one, other = (ptee.record(a_run, data, tmp_path / engine, engine=engine) for engine in ENGINES)
    assert torch.equal(traces_of(a_run, one).answers, traces_of(a_run, other).answers)
    assert torch.equal(one.labels, other.labels)


@pytest.mark.slow
@needs_ray
def test_ray_names_a_damaged_shard(a_run, tmp_path):
    whole = shard(tmp_path / "a.tar", range(10)).read_bytes()
    for damaged in (b"\1" * 20000, whole[: len(whole) // 1024 * 512]):
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.tar cannot be read to its end"):
            ptee.record(a_run, tmp_path / "a.tar", tmp_path / "out", engine="ray", overwrite=True)


@pytest.mark.slow
@needs_ray
def test_a_machine_that_is_lost_in_between_changes_no_answer(a_run, shards, tmp_path, folder, small_parts, monkeypatch):
    ray = ray_engine.require_ray()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    other = cluster.add_node(num_cpus=2)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    make, parts = ray_engine._make, []

    def loses_it(*given):
        parts.append(given)
        killer = threading.Timer(2.0, cluster.remove_node, (other,), {"allow_graceful": False})
        if len(parts) == 2:
            killer.start()
        make(*given)
        if len(parts) == 2:
            killer.join()

    monkeypatch.setattr(ray_engine, "_make", loses_it)
    try:
        found = ptee.record(a_run, shards, tmp_path / "out", engine="ray", workers=2, batch_size=7)
        alive = sum(node["Alive"] for node in ray.nodes())
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert (len(parts), alive) == (3, 1)
    ours, theirs = traces_of(a_run, found), traces_of(a_run, folder)
    assert torch.equal(ours.answers, theirs.answers)
    assert found.images_sha256 == folder.images_sha256
