"""The scripts in recipes/scripts that summarise several runs."""

from __future__ import annotations

import ast
import csv
import importlib
import io
import json
import re
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from extras import needs_onnx
from torch import nn

from ptee.recording.graphs import Rerun
from ptee.timing import measure

RECIPES = Path(__file__).parents[1] / "recipes" / "scripts"


def run(script: str, *arguments: Path) -> str:
    """What a script prints."""
    command = [sys.executable, str(RECIPES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_spread_prints_mean_and_spread_of_comparisons_with_several_seeds(tmp_path):
    files = [tmp_path / f"compare-{seed}.json" for seed in (0, 1)]
    for seed, file in enumerate(files):
        entries = [{"allowed": 0.01, "cost": 0.4 + 0.2 * seed, "drop": 0.01 * seed}]
        lines = [{"name": f"ours{seed}, one T", "kind": "adaptive", "entries": entries}]
        lines += [{"name": "resnet20", "kind": "static", "entries": [{"allowed": None, "cost": 0.3, "drop": 0.02}]}]
        file.write_text(json.dumps({"backbone": "b", "samples": 9, "drops": [0.01], "lines": lines}))
    printed = run("spread.py", *files)
    assert "2 seeds" in printed
    assert "ours, one T  0.5000 ± 0.1414 (+0.0050 ± 0.0071)" in printed
    assert re.search(r"resnet20 +0.3000 ± 0.0000 \(\+0.0200 ± 0.0000\)", printed)


def test_means_prints_mean_and_spread_of_runs_with_several_seeds(tmp_path):
    for name, cost in {"lite0": 0.4, "lite1": 0.6, "vit0": 0.3}.items():
        (tmp_path / name).mkdir()
        rows = [{"accuracy": 0.8, "fidelity": 1.0, "cost": 1.0}, {"accuracy": 0.7, "fidelity": 0.9, "cost": cost}]
        (tmp_path / name / "metrics.json").write_text(json.dumps({"results": {"rows": rows}}))
    lite, vit = (line.split() for line in run("means.py", *sorted(tmp_path.iterdir())).splitlines()[2:])
    assert lite[:5] == ["lite", "2", "0.5000", "±", "0.1414"]
    assert vit == ["vit", "1", "0.3000", "0.9000", "0.7000", "0.8000"]


def test_seeds_prints_mean_and_spread_of_tables_of_several_seeds(tmp_path):
    title = "run,leave at,accuracy,fidelity,backbone alone,cost,paper,parameters,epochs,s\n"
    for seed, more in enumerate(("head=plain,1 9,0.5,1,0.5,1,1,1,4,3\n", "")):
        row = f"head=pool,{seed} 3,0.{4 + 2 * seed},0.9,0.5,1.0,0.9,0.7,4,3\n"
        (tmp_path / f"{seed}.csv").write_text(title + row + more)
    out = tmp_path / "out.csv"
    printed = run("seeds.py", *sorted(tmp_path.iterdir()), "--csv", out).splitlines()
    assert printed[2:] == [
        "| head=pool | 2 | 0.500 ± 0.141 | 0.900 ± 0.000 | 1.000 ± 0.000 | 0.900 ± 0.000 | 0.700 ± 0.000 | 0 3; 1 3 |",
        "| head=plain | 1 | 0.500 | 1.000 | 1.000 | 1.000 | 1.000 | 1 9 |",
    ]
    assert [f"| {' | '.join(row)} |" for row in csv.reader(out.read_text().splitlines())] == [printed[0], *printed[2:]]
    assert run("seeds.py", tmp_path / "0.csv", tmp_path / "1.csv", "--least", "2").splitlines() == printed[:3]


def test_seeds_takes_tables_by_threshold(tmp_path):
    for seed in range(2):
        row = f"0.5,0.{4 + 2 * seed},0.9,1.0,0.9,{seed} 3\n"
        (tmp_path / f"{seed}.csv").write_text("T,accuracy,fidelity,cost,paper,leave at\n" + row)
    printed = run("seeds.py", *sorted(tmp_path.iterdir())).splitlines()
    assert printed[0] == "| T | seeds | accuracy | fidelity | cost | paper | leave at, by seed |"
    assert printed[2:] == ["| 0.5 | 2 | 0.500 ± 0.141 | 0.900 ± 0.000 | 1.000 ± 0.000 | 0.900 ± 0.000 | 0 3; 1 3 |"]


def test_seeds_refuses_tables_of_two_kinds(tmp_path):
    (tmp_path / "a.csv").write_text("T,accuracy,cost,leave at\n0.5,0.4,1.0,3\n")
    (tmp_path / "b.csv").write_text("run,accuracy,cost,leave at\nx,0.4,1.0,3\n")
    command = [sys.executable, str(RECIPES / "seeds.py"), *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and done.stderr.endswith(
        "b.csv has other columns than the tables before it: run, accuracy, cost, leave at.\n"
    )


def spread_of(folder, *comparisons):
    """What is printed of comparisons, each with the costs of its lines by name."""
    for n, lines in enumerate(comparisons):
        lines = [
            {"name": name, "kind": "adaptive", "entries": [{"allowed": None, "cost": cost, "drop": 0}]}
            for name, cost in lines.items()
        ]
        (folder / f"{n}.json").write_text(json.dumps({"backbone": "b", "samples": 9, "drops": [], "lines": lines}))
    return run("spread.py", *sorted(folder.iterdir()))


def test_runs_in_two_comparisons_do_not_count_as_more_seeds(tmp_path):
    printed = spread_of(tmp_path, {"ours0": 0.2, "ours1": 0.4}, {"ours0": 0.3, "ours1": 0.5, "front0": 0.1})
    assert printed.startswith("b, 9 images, 2 seeds, 2 comparisons\n")
    assert re.search(r"^ours +0.3500 ± 0.1291", printed, re.M)
    assert re.search(r"^front \(1 of 4\) +0.1000 \(", printed, re.M)


def test_a_seed_may_have_two_digits_and_a_line_that_some_seeds_lack_says_how_many_have_it(tmp_path):
    printed = spread_of(tmp_path, {"ours9": 0.2, "ours9, truncation at exit 1": 0.5}, {"ours10": 0.4})
    assert re.search(r"^ours +0.3000 ± 0.1414", printed, re.M)
    assert re.search(r"^ours, truncation at exit 1 \(1 of 2\) +0.5000 \(", printed, re.M)


@pytest.mark.slow
@pytest.mark.cpu("what is exported is the same on every device")
@needs_onnx
def test_all_ways_to_run_a_trained_model_answer_real_images_alike(tmp_path):
    train = [sys.executable, "-m", "ptee", "augment", "--no-speed", "--device", "cpu", "--out", str(tmp_path / "run")]
    subprocess.run(train, check=True, capture_output=True)
    printed = run("same_answers.py", tmp_path / "run").splitlines()  # its status says whether they are the same
    assert [line.split("  ")[0] for line in printed[-4:]] == ["predict", "optimize, eager", "pt2", "onnx"]


@pytest.mark.slow
@pytest.mark.cpu("the compiler of C++ is for the CPU")
def test_the_backbones_beside_which_a_gpu_is_timed_answer(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES.parent / "gpu")
    speed = importlib.import_module("speed")
    backbone, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), torch.randn(4, 3, 2, 2)
    monkeypatch.setattr(measure, "Graphs", Rerun)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with torch.no_grad():
        for bare in speed.BARE.values():
            torch.testing.assert_close(bare(backbone, x)(), backbone(x))


def test_a_piece_of_tar_files_has_every_so_manieth_picture_by_name(tmp_path):
    for name, pictures in {"train": 20, "validation": 4}.items():
        (tmp_path / "whole").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "whole" / f"{name}.tar", "w") as tar:
            for n in reversed(range(pictures)):
                member = tarfile.TarInfo(f"{'ab'[n % 2]}/{n:02}.jpg")
                member.size = 1
                tar.addfile(member, io.BytesIO(bytes([n])))
    command = [
        sys.executable,
        RECIPES / "piece.py",
        tmp_path / "whole",
        tmp_path / "piece",
        "--every",
        "5",
        "--report",
        "2",
    ]
    for _ in range(2):  # the second time all is there
        subprocess.run(command, check=True, capture_output=True)
    with tarfile.open(tmp_path / "piece" / "train.tar") as tar:
        assert tar.getnames() == ["a/00.jpg", "a/10.jpg", "b/01.jpg", "b/11.jpg"]
        assert tar.extractfile("b/11.jpg").read() == bytes([11])
    with tarfile.open(tmp_path / "piece" / "validation.tar") as tar:
        assert tar.getnames() == ["a/00.jpg", "b/01.jpg"]


def test_the_tables_of_the_papers_are_those_that_were_measured():
    papers = RECIPES.parent / "papers"
    text = (papers / "README.md").read_text(encoding="utf-8")
    for file in (papers / "measured").glob("*.csv"):
        for row in csv.reader(file.read_text(encoding="utf-8").splitlines()):
            assert f"| {' | '.join(row)} |" in text, file.name


@pytest.mark.parametrize(
    "script", sorted((Path(__file__).parents[1] / "recipes").rglob("*.py")), ids=lambda script: script.stem
)
def test_all_that_a_script_imports_from_ptee_is_there(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ptee"):
            module = importlib.import_module(node.module)
            for each in node.names:
                assert hasattr(module, each.name) or find_spec(f"{node.module}.{each.name}"), (node.module, each.name)
