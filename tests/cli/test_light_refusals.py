"""A run that is not there or cannot be trusted is refused before torch is imported, which takes seconds and a gigabyte."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "evaluate": ("evaluate", "{run}"),
    "tune": ("tune", "{run}", "--max-drop", "0.01"),
    "compare": ("compare", "{run}", "{run}"),
    "export": ("export", "{run}", "--out", "exported"),
}
HEAVY = """
import contextlib, io, json, sys
from ptee.cli.main import main
for words in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
    heavy = [name for name in ("torch", "numpy", "timm", "huggingface_hub") if name in sys.modules]
    print(json.dumps([status, heavy, said.getvalue()]))
"""
BACKBONE = {
    "name": "net", "hash": "0", "classes": 10,
    "input": {"input_size": [3, 20000, 20000], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"},
}  # fmt: skip
TOO_LARGE = {
    "schema_version": 1,
    "heads_file": "heads.safetensors",
    "backbone": BACKBONE,
    "exits": [{"name": "a", "head": "pool"}],
    "threshold": [0.5],
}
SMALL = {**TOO_LARGE, "backbone": BACKBONE | {"input": BACKBONE["input"] | {"input_size": [3, 8, 8]}}}
DEEP = functools.reduce(lambda inner, _: [inner], range(90), [])
CONFIGS = {
    "no JSON": ("{", "no complete JSON"),
    "90 deep": (json.dumps({"schema_version": 1, "a": DEEP}), "deep in each other"),
    "another program's": ("{}", "no schema_version"),
    "an image of a gigabyte": (json.dumps(TOO_LARGE), "larger than any image"),
    "heads in another folder": (json.dumps(SMALL | {"heads_file": "../heads.safetensors"}), "not in the folder"),
    "no heads": (json.dumps(SMALL), "holds no heads.safetensors"),
}


def refusals(folder: Path, *commands: list[str]) -> list[str]:
    """What commands say, one after another in one process, which imports nothing heavy."""
    done = subprocess.run(
        [sys.executable, "-c", HEAVY],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(status, heavy) for status, heavy, _ in found] == [(2, [])] * len(commands), done.stderr
    assert all(len(said.splitlines()) == 1 for *_, said in found)
    return [said for *_, said in found]


def test_a_run_that_is_not_there_is_refused_before_torch_is_imported(tmp_path):
    words = [[word.format(run="nope") for word in command] for command in COMMANDS.values()]
    assert all(said.startswith("There is no folder nope. Give ") for said in refusals(tmp_path, *words))


def test_a_run_that_cannot_be_trusted_is_refused_before_torch_is_imported(tmp_path):
    for case, (text, _) in CONFIGS.items():
        (tmp_path / case).mkdir()
        (tmp_path / case / "config.json").write_text(text)
    found = refusals(tmp_path, *(["evaluate", case] for case in CONFIGS))
    for (_, wanted), said in zip(CONFIGS.values(), found, strict=True):
        assert wanted in said
