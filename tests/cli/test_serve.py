"""`ptee serve`: what is refused before anything is served."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
from command import assert_refused
from served import free_port
from small import made

import ptee
from ptee._common.errors import PteeError

pytestmark = pytest.mark.cpu("what is exported is the same on every device")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ptee.export(made(), tmp_path_factory.mktemp("serve") / "exported")


def test_a_port_in_use_is_refused_before_the_model_is_opened(exported, run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", exported, "--local", "--port", port)
    assert_refused(
        done, rf"Port {port} of 127.0.0.1 cannot be taken: Address already in use. Give another: --port 8001"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bare"], r"--bare is about a run"),
        (["--max-fidelity-drop", "0.01"], "--max-fidelity-drop is about a run"),
        (["--min-threshold", "1.5", "--max-threshold", "1"], "--min-threshold 1.5 is above --max-threshold"),
        (
            ["--threshold", "70%"],
            r"^--threshold is no option of this command\. A request may bring its own, as /predict\?threshold=0\.7",
        ),
        (["--max-threshold", "70"], r"70\.0 is not in the range -1<=x<=2\. Did you mean 0\.7\?"),
        (["--max-threshold", "3"], r"3\.0 is not in the range -1<=x<=2\.$"),
        (["--max-threshold", "70%"], r"Did you mean 0\.7\?"),
        (["--port", "70000"], "70000"),
        (["--max-batch", "0"], "0"),
        (["--token-file", "no.txt"], "no file no.txt"),
    ],
)
def test_options_that_cannot_be_are_refused(exported, run, words, said):
    assert_refused(run("serve", exported, "--local", "--port", free_port(), *words), said)


@pytest.mark.parametrize("known", [True, False])
def test_where_nobody_gave_mean_and_std_a_line_says_that_pictures_are_refused(
    known, exported, tmp_path, run, monkeypatch
):
    def stop(*_: object) -> None:
        raise PteeError("Enough.")

    folder = exported  # of a module of one's own, whose pictures nobody has described
    if known:
        model = made()
        model.origin = replace(model.origin, pixels_known=True)
        folder = ptee.export(model, tmp_path / "exported")
    monkeypatch.setattr("ptee.cli.serving._opened", stop)
    done = run("serve", folder, "--local", "--port", free_port())
    said = "so pictures are refused. Send arrays that you prepared, or export the model again with them: ptee.export("
    assert (said in done.out) is not known
    assert done.err == "Enough.\n"


def test_a_folder_without_a_model_is_refused(run, tmp_path):
    assert_refused(run("serve", tmp_path, "--local"), "no run|config.json|holds")


def test_serving_on_windows_is_refused_with_what_to_do(exported, run, monkeypatch):
    monkeypatch.setattr("ptee.cli.serving.find_spec", lambda name: None if name == "resource" else name)
    assert_refused(run("serve", exported, "--local"), "Linux or macOS.*WSL")


@pytest.mark.parametrize("missing", ["ray", "uvicorn"])
def test_a_missing_library_is_named_with_what_to_type(exported, run, monkeypatch, missing):
    monkeypatch.setattr("ptee.cli.serving.find_spec", lambda name: None if name == missing else name)
    assert_refused(
        run("serve", exported, *(["--local"] if missing == "uvicorn" else [])), r"pip install 'ptee-exits\[serve\]'"
    )
