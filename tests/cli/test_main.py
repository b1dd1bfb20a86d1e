"""The entrance: help without the heavy libraries, and errors in one line with a status that says whose fault they are."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from cases import slow
from command import RANDOM, Done, assert_refused

import ptee
from ptee._common.errors import Argument, Interrupted, PteeError
from ptee.cli.main import EXAMPLES, _failed, cli
from ptee.deploy import export as exporting

COMMANDS = (
    *("augment", "plan", "advise", "evaluate", "tune", "compare", "report", "bench"),
    *("export", "serve", "trace", "cache", "recipe", "sweep", "plot"),
)
HEAVY = ("torch", "timm", "numpy", "accelerate", "safetensors", "plotly", "sklearn")


@pytest.fixture
def plan_fails(run, monkeypatch):
    """Lets `ptee plan` raise an exception."""
    run("--version")  # which adds the commands

    def fails_with(error: BaseException | type[BaseException]) -> None:
        def fail(**_: object) -> None:
            raise error

        monkeypatch.setattr(cli.commands["plan"], "callback", fail)

    return fails_with


# ---------------------------------------------------------------------------------------------------- help


def test_help_comes_without_the_heavy_libraries():
    source = f"""
import sys
from ptee.cli.main import main
for words in ("--help", "augment --help", "sweep --help", "recipe ztw", "--version"):
    try:
        main(words.split())
    except SystemExit as end:
        print("HEAVY", words, end.code, [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    ends = [line for line in done.stdout.splitlines() if line.startswith("HEAVY")]
    assert len(ends) == 5 and all(line.endswith(" 0 []") for line in ends), done


def test_help_names_every_command_in_the_order_of_use(run):
    done = run("--help")
    assert done.status == 0
    assert tuple(cli.commands) == COMMANDS
    assert re.search(".*".join(COMMANDS), done.out[done.out.index("Commands") :], re.DOTALL)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_text(command, run):
    done = run(command, "--help")
    assert done.status == 0
    assert done.out.startswith(f"Usage: ptee {command}")


def test_without_a_command_the_help_is_shown(run):
    done = run()
    assert len((done.out + done.err).splitlines()) > 10


def test_the_version_is_the_packages(run):
    assert run("--version").out.strip().endswith(ptee.__version__)


# ---------------------------------------------------------------------------------------------------- errors

MISTYPED = {
    "an unknown command": (["agument"], "agument.*Did you mean 'augment'"),
    "training, which is no command": (["train"], "Unknown command 'train'. Did you mean 'trace'"),
    "an unknown option": (["plan", *RANDOM, "--hed", "pool"], r"--hed.*--head"),
    "a setting of all runs of a sweep": (
        ["sweep", "--set", "head=pool", "--over", "seed=0,1", "--out", "x"],
        r"^--set is no option of this command\. Give --over NAME=VALUE: one value for all runs, or several",
    ),
    "the recipe of a sweep": (
        ["sweep", "--recipe", "mine.yaml", "--over", "seed=0,1", "--out", "x"],
        r"^--recipe is no option of this command\. The recipe is the first word: ptee sweep RECIPE --over NAME=VALUE,VALUE\.$",
    ),
    "images for plan": (
        ["plan", "--data", "pics"],
        r"^--data is no option of this command\. ptee plan reads no images\. ptee augment does\.$",
    ),
    "a folder for plan": (
        ["plan", "--out", "x"],
        r"^--out is no option of this command\. ptee plan writes nothing\. ptee augment does\.$",
    ),
    "the model of advise": (["advise", "--model", "resnet18"], r"The model is the first word: ptee advise NAME\.$"),
    "a model without its option": (
        ["plan", "mobilenetv2_100"],
        r"^The word mobilenetv2_100 .*\. Did you mean --model mobilenetv2_100\?$",
    ),
    "an option without its value": (["plan", "--model"], "--model"),
    "a run that is not named": (["evaluate"], "RUN"),
    "a run without a name": (["evaluate", ""], "The value after evaluate is empty"),
    "no run to compare": (["compare"], "RUN"),
    "no folder for a sweep": (["sweep", "--over", "seed=0,1"], "--out"),
}


@pytest.mark.parametrize(("words", "said"), MISTYPED.values(), ids=MISTYPED)
def test_what_is_mistyped_is_refused_in_one_line(words, said, run, elsewhere):
    done = run(*words)
    assert_refused(done, said)
    assert (done.out, list(elsewhere.iterdir())) == ("", [])


@pytest.mark.parametrize("command", EXAMPLES)
def test_where_something_is_missing_there_is_an_example_that_can_be_typed(command, run):
    done = run(command)
    assert_refused(done, rf"^Missing (argument|option) .*\. Such as: ptee {command} ")
    _, *words = shlex.split(done.err.partition(": ")[2])
    cli.make_context("ptee", words)
    cli.commands[command].make_context(command, words[1:])


def test_every_command_that_needs_a_word_more_has_an_example(run):
    run("--version")  # which adds the commands
    assert {name for name, each in cli.commands.items() if any(p.required for p in each.params)} == EXAMPLES.keys()


def test_the_example_is_of_the_run_that_was_typed(run, finished):
    assert_refused(run("export", finished), "Missing option '--out'. Such as: ptee export out --out exported$")
    assert_refused(run("tune"), "Such as: ptee tune runs/r50 --max-drop 0.01$")


@pytest.mark.parametrize("words", [["{}", ""], ["{}="]], ids=["apart", "after an equals sign"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_refuses_an_empty_value(command, words, run):
    run("--version")  # which adds the commands
    options = [o for o in cli.commands[command].params if isinstance(o, click.Option) and not o.is_flag]
    for option in (name for o in options for name in o.opts):
        given = [word.format(option) for word in words]
        assert_refused(run(command, *given), rf"^The value after {option} is empty, .* Give one\.$")


def test_an_empty_file_of_a_smaller_networks_weights_is_refused(run, finished):
    assert_refused(run("compare", finished, "--static", "resnet18="), "^--static resnet18.* is no path")


def test_an_error_of_ptee_itself_is_one_line_with_status_one_and_says_how_to_see_more(run, plan_fails, monkeypatch):
    plan_fails(LookupError("deep\ninside"))
    done = run("plan")
    assert done == Done(1, "", "ptee failed: LookupError: deep inside. PTEE_DEBUG=1 shows where; please report it.\n")
    monkeypatch.setenv("PTEE_DEBUG", "1")
    assert "Traceback" in run("plan").err


def test_a_refusal_of_several_lines_is_printed_in_one(run, plan_fails):
    plan_fails(PteeError("one\n  two"))
    assert run("plan") == Done(2, "", "one two\n")


def test_arguments_in_a_refusal_are_printed_as_options(run, plan_fails):
    plan_fails(PteeError("Give ", Argument("num_classes", "10"), " or ", Argument("pretrained", "False"), "."))
    assert run("plan").err == "Give --num-classes 10 or --no-pretrained.\n"


NO_EPOCH = "Interrupted: no epoch of the exits was complete, so nothing was kept."
COMPLETE = "Interrupted: what is in exported is complete."
NOTHING_WRITTEN = "Interrupted: nothing was written. The same command begins again."
BEGINS_AGAIN = "Interrupted: what was measured is lost, and no file was changed. The same command begins again."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt, BEGINS_AGAIN),
        (click.Abort, BEGINS_AGAIN),
        (Interrupted("So it is."), "Interrupted: so it is."),
    ],
    ids=repr,
)
def test_ctrl_c_ends_with_status_130_and_what_to_type(error, said, run, plan_fails):
    plan_fails(error)
    done = run("plan")
    assert (done.status, done.out, done.err.strip()) == (130, "", said)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("compare", BEGINS_AGAIN),
        ("bench", BEGINS_AGAIN),
        ("bench --save", "Interrupted."),
        ("augment", NO_EPOCH),
        ("augment --overwrite --out", f"{NO_EPOCH} What was in the run's folder is as it was."),
        ("augment --resume --out", "Interrupted: what was trained before is kept. The same command goes on."),
        ("export", NOTHING_WRITTEN),
        ("export --out", NOTHING_WRITTEN),
        ("sweep", "Interrupted. The same command goes on."),
        ("trace --overwrite", "Interrupted."),
        ("compare --csv=x.csv", "Interrupted."),
        ("compare --html x.html", "Interrupted."),
    ],
)
def test_what_ctrl_c_leaves_is_said_for_each_command(command, said, capsys):
    assert _failed(KeyboardInterrupt(), [*command.split(), "run"]) == 130
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.cpu("files are made on the CPU")
@pytest.mark.parametrize(
    ("step", "before"),
    [
        slow("_require_same", True),
        slow("_require_same", False),
        slow("fill_place", True),
        slow("fill_place", False),
        slow("publish", True),
        ("publish", False),
    ],
)
def test_ctrl_c_in_an_export_says_what_was_written(step, before, run, finished, elsewhere, monkeypatch):
    usual = getattr(exporting, step)

    def interrupted(*given: Any, **more: Any) -> None:
        if not before:
            usual(*given, **more)
        raise KeyboardInterrupt

    if step != "_require_same":
        monkeypatch.setattr(exporting, "_require_same", lambda *_: None)  # which takes long
    monkeypatch.setattr(exporting, step, interrupted)
    done = run("export", finished, "--out", "exported")
    written = (elsewhere / "exported" / "manifest.json").exists()
    assert written == (not before and step != "_require_same")
    assert (done.status, done.err.splitlines()[-1]) == (130, COMPLETE if written else NOTHING_WRITTEN)


def test_of_an_error_in_a_process_that_loads_images_the_last_line_is_printed(run, plan_fails):
    plan_fails(PteeError("Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                         "  File ...\nptee._common.errors.DataError: a.png cannot be read."))  # fmt: skip
    assert run("plan") == Done(2, "", "a.png cannot be read.\n")


def test_a_killed_process_that_loads_images_is_no_error_of_ptee(run, plan_fails):
    plan_fails(RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. "))
    said = r"A process that loads images has ended \(killed by signal: Killed\).*none \(--workers 0\)"
    assert_refused(run("plan"), said)


@pytest.mark.parametrize(
    "error",
    [
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "mps", "Linux", "Windows", "Python"],
)
def test_out_of_memory_is_no_error_of_ptee(error, run, plan_fails):
    plan_fails(error)
    assert_refused(run("plan"), "out of memory.*--batch-size.*--device cpu")


NOBODY_READS = r"Nobody reads the output any more.*\n"


@pytest.mark.parametrize(
    ("words", "buffered"),
    [
        pytest.param(["recipe"], "", id="a command, buffered"),
        pytest.param(["recipe"], "1", id="a command, unbuffered"),
        pytest.param(["--help"], "", id="the help, buffered"),
        slow(["--help"], "1", id="the help, unbuffered"),
        slow(["plan", "--help"], "", id="a command's help, buffered"),
        pytest.param(["plan", "--help"], "1", id="a command's help, unbuffered"),
        *(slow(["plan", *map(str, RANDOM)], buffered, id=f"a plan, buffered={buffered!r}") for buffered in ("", "1")),
    ],
)
def test_a_reader_that_goes_away_is_told_in_one_line(words, buffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", buffered)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "ptee", *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert re.fullmatch(NOBODY_READS, done.stderr)
    assert done.returncode == 141  # as a shell says it of other programs


def test_a_reader_that_goes_away_from_both_streams_is_left_in_peace():
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m ptee recipe 2>&1 | true; exit ${{PIPESTATUS[0]}}"])
    assert done.returncode in (0, 141)  # it may have written all before the reader went


# ---------------------------------------------------------------------------------------------------- standard output

FULL = "The output cannot be written: No space left on device. Send it elsewhere, such as > FILE."
CHOICES = "branchynet, branchynet-joint, db-joint, eenet, eenet-joint, ptee, pteenet, ztw"
UNKNOWN = f"Unknown recipe 'ptea'. Did you mean 'ptee' or 'pteenet'? Choices: {CHOICES}."
CLOSED_OR_FULL = {
    "ptee >&-": (0, ""),
    "ptee >/dev/full": (2, FULL),
    "ptee >&- 2>&-": (0, ""),
    "ptee >/dev/full 2>/dev/full": (2, ""),
    "ptee <&- >&- 2>&-": (0, ""),
    "ptea >&-": (2, UNKNOWN),
    "ptea 2>&-": (2, ""),
    "ptea 2>/dev/full": (2, ""),
    "ptea >/dev/full": (2, UNKNOWN),
}
LIKE_OTHERS = ("ptee >&- 2>&-", "ptea >&-", "ptea 2>/dev/full")  # of which each half is in another one


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("buffered", ["", slow("1")], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", [slow(words) if words in LIKE_OTHERS else words for words in CLOSED_OR_FULL])
def test_output_that_cannot_be_written_is_no_error_of_ptee(words, buffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", buffered)
    command = ["bash", "-c", f'exec "$0" -m ptee recipe {words}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, (done.stdout + done.stderr).strip()) == CLOSED_OR_FULL[words]


@pytest.mark.parametrize(
    ("encoding", "said"), [("cp1252", "Füchse \\u732b"), ("utf-8", "Füchse 猫"), ("cp1252:replace", "Füchse ?")]
)
def test_letters_that_the_output_cannot_hold_are_escaped_if_the_user_says_nothing_else(
    encoding, said, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)  # as a pipe of Windows
    (tmp_path / "mine.yaml").write_text("about: Füchse 猫", encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "ptee", "recipe", tmp_path / "mine.yaml"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert said in done.stdout.decode(encoding.partition(":")[0])
