"""A run that is not there or cannot be trusted is refused before torch is imported, which takes seconds and a gigabyte."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {
    "evaluate": ("evaluate", "{run}"),
    "tune": ("tune", "{run}", "--max-drop", "0.01"),
    "compare": ("compare", "{run}", "{run}"),
    "export": ("export", "{run}", "--out", "exported"),
}
HEAVY = """
import sys
from ptee.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print([name for name in ("torch", "numpy", "timm", "huggingface_hub") if name in sys.modules])
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


def refusal(folder: Path, *words: str) -> str:
    """What a command says that imports nothing heavy."""
    done = subprocess.run([sys.executable, "-c", HEAVY, *words], capture_output=True, text=True, cwd=folder, timeout=60)
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_is_not_there_is_refused_before_torch_is_imported(command, tmp_path):
    words = [word.format(run="nope") for word in COMMANDS[command]]
    assert refusal(tmp_path, *words).startswith("There is no folder nope. Give ")


@pytest.mark.parametrize("case", CONFIGS)
def test_a_run_that_cannot_be_trusted_is_refused_before_torch_is_imported(case, tmp_path):
    text, said = CONFIGS[case]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    assert said in refusal(tmp_path, "evaluate", "run")
