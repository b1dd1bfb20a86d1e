"""Errors: everything a user can mend is a PteeError of one line, and a misspelt name is answered with the nearest."""

from __future__ import annotations

import ast
import doctest
import pickle
import re
from pathlib import Path

import pytest

import ptee
from ptee._common import errors
from ptee._common import text as tables
from ptee._common.errors import (
    Argument,
    PteeError,
    UnknownName,
    ended_worker,
    first_line,
    possible,
    ran_out_of_memory,
    some,
    unknown,
)

KINDS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, PteeError)]
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_every_error_is_in_the_tree_of_the_docstring(kind):
    assert issubclass(kind, ptee.PteeError)
    assert issubclass(kind, ValueError)
    assert str(kind("No 'such' thing.")) == "No 'such' thing."
    assert f" {kind.__name__} " in f" {errors.__doc__} "


@pytest.mark.parametrize("module", [errors, tables], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_right(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_a_text_to_type_stands_in_quotes_in_python():
    assert str(Argument.text("out", "my report.html")) == "out='my report.html'"
    assert str(Argument.text("out", 'so "called"')) == """out='so "called"'"""


def _literal(call: ast.AST) -> str:
    """The value of an `Argument(name, value)` in the code, if it is written there; else empty."""
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Argument"):
        return ""
    value = call.args[1] if len(call.args) > 1 else None
    return value.value if isinstance(value, ast.Constant) else ""


def test_an_error_is_about_the_argument_that_it_begins_with_if_no_other_is_named():
    given, other = Argument("lr", "-1"), Argument("epochs", "2")
    assert PteeError(given, " is below 0. Give ", other, ".").argument == "lr"
    assert PteeError(given, " needs ", other, ".", argument="epochs").argument == "epochs"
    assert PteeError("Give ", other, ".").argument is None


def test_no_value_to_type_is_a_text_without_quotes():
    files = Path(ptee.__file__).parent.rglob("*.py")
    values = {_literal(node) for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))}
    assert {"FOLDER", "True"} <= values
    assert [value for value in values if re.match(r"[a-z./]", value)] == []


# ---------------------------------------------------------------------------------------------------- names


def test_a_misspelt_name_is_answered_with_the_nearest_first():
    error = unknown("placement", "gold", ["linear", "golden", "fine", "golden"])
    assert isinstance(error, UnknownName)
    assert isinstance(error, KeyError)
    assert str(error) == "Unknown placement 'gold'. Did you mean 'golden'? Choices: fine, golden, linear."


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("resnet", "'resnet18' or 'resnet50' or 'resnet101'"),
        ("Res_Net", "'resnet18' or 'resnet50' or 'resnet101'"),
        ("resnet5", "'resnet50' or"),
        ("reznet50", "'resnet50' or"),
        ("seresnet", "'legacy_seresnet' or"),
    ],
    ids=["the beginning of a name", "other capitals", "nearly whole", "misspelt", "without its family"],
)
def test_choices_that_end_or_begin_with_the_name_are_offered_first_and_the_shortest_before_longer_ones(name, suggested):
    choices = ["legacy_seresnet", "resnet101", "resnet18", "resnet50", "resnet50_clip_gap", "resnest50"]
    assert f"Did you mean {suggested}" in possible(name, choices, most=3)


def test_beside_a_slip_of_a_letter_nothing_is_suggested_that_is_far_from_it():
    assert possible("val_dat", ["val_data", "lambda"]) == " Did you mean 'val_data'? Choices: lambda, val_data."


MANY = [f"layer{n}" for n in range(100)]


@pytest.mark.parametrize(
    ("name", "choices", "said"),
    [
        ("zzz", ["pool", "plain"], "Unknown head 'zzz'. Choices: plain, pool."),
        ("zzz", [], "Unknown head 'zzz'."),
        ("", MANY[:2], "Unknown head ''. Choices: layer0, layer1."),
        ("layer7x", MANY, "Unknown head 'layer7x'. Did you mean 'layer7' or 'layer97' or 'layer87'?"),
    ],
    ids=["unlike all others", "no choice", "empty", "near one of many"],
)
def test_all_of_a_few_choices_are_named_and_the_nearest_of_many(name, choices, said):
    assert str(unknown("head", name, choices)) == said


def test_a_name_that_differs_in_case_and_strokes_only_is_answered_with_that_name_alone():
    assert "Did you mean 'max_drop'?" in str(unknown("setting", "MaxDrop", ["max_loss", "max_drop", "max_dropped"]))


@pytest.mark.parametrize("name", ["learning_rate", "LearningRate", "training.learning_rate"])
def test_a_name_of_other_libraries_is_answered_with_that_of_ptee(name):
    section = "training." if "." in name else ""
    settings = [f"{section}{each}" for each in ("learner", "lr", "epochs")]
    assert f"Did you mean '{section}lr'? " in possible(name, settings)
    assert "Did you mean 'seed'? " in possible(f"{section}random_state", [*settings, "seed"])


def test_if_no_choice_is_near_some_of_many_are_named():
    assert "There are 100 choices, among them layer0, layer1, layer10" in str(unknown("module", "zzz", MANY))


@pytest.mark.parametrize("name", ["layer7x", "zzz"])
def test_first_choices_are_always_named_before_the_others(name):
    message = possible(name, MANY, first=["pareto", "fine"], most=3)
    assert message.endswith("There are 102 choices, among them pareto, fine, layer0.")
    assert ("Did you mean 'layer7'" in message) == (name == "layer7x")


# ---------------------------------------------------------------------------------------------------- lists and lines


@pytest.mark.parametrize(
    ("names", "said"),
    [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a", "b", "c", "d"], "a, b and 2 more")],
    ids=["none", "one", "as many as fit", "more"],
)
def test_a_long_list_is_cut_and_counted(names, said):
    assert some(names, most=2) == said


def test_a_name_with_a_line_break_is_shown_on_one_line():
    assert some(["a\nb", "caf\u00e9"]) == "a\\nb, caf\u00e9"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("size mismatch"), "RuntimeError: size mismatch."),
        (RuntimeError("size mismatch. More of it."), "RuntimeError: size mismatch."),
        (RuntimeError("\n  size mismatch:\n\tweight"), "RuntimeError: size mismatch."),
        (RuntimeError("x" * 10_000), f"RuntimeError: {'x' * 200}."),
        (ValueError(), "ValueError."),
        (KeyError("missing"), "KeyError: 'missing'."),
        (OSError(2, "No such file", "a.pt"), "FileNotFoundError: [Errno 2] No such file: 'a.pt'."),
    ],
    ids=["one sentence", "two sentences", "several lines", "very long", "nothing", "a key", "a file"],
)
def test_the_message_of_another_library_becomes_one_sentence(error, said):
    assert first_line(error) == said


# ---------------------------------------------------------------------------------------------------- tables


def test_columns_are_as_wide_as_their_widest_cell_and_no_line_ends_in_blanks():
    text = tables.table([("exit", "name"), ("1", ""), ("22", "a longer name")], left={1})
    assert text.splitlines() == ["exit  name", "-" * 19, "   1", "  22  a longer name"]


# ---------------------------------------------------------------------------------------------------- the terminal


@each_kind
@pytest.mark.parametrize("hostile", ["\x1b[2J\x1b]0;title\x07", "\x9b31m", "\u202e", "\ud800", "\x00\r"])
def test_a_name_in_a_message_steers_no_terminal(kind, hostile):
    said = kind(f"No run in '{hostile}'. ", Argument("run", f"a{hostile}"))
    assert tables.printable(str(said)) == str(said)
    assert str(said) == str(pickle.loads(pickle.dumps(said)))


def test_lines_of_a_message_stay_apart():
    assert str(PteeError("one\n\ttwo")) == "one\n\ttwo"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("is killed by signal: Killed. ", "(killed by signal: Killed): memory is short. Take fewer"),
        (
            "exited unexpectedly with exit code 1. Details are lost.",
            "(exited unexpectedly with exit code 1): memory is short, or it cannot import your script (put its work under "
            "if __name__ == '__main__':) or a class of a notebook (put it into a .py file of its own). Take fewer",
        ),
    ],
)
def test_a_process_that_loads_images_and_ended_by_itself_may_lack_a_class_of_a_notebook(how, why):
    found = ended_worker(RuntimeError(f"DataLoader worker (pid 17) {how}"))
    assert str(found) == f"A process that loads images has ended {why} of them, or none (num_workers=0)."


@pytest.mark.parametrize(
    "said",
    [
        "MPS backend out of memory (MPS allocated: 17 GB)",
        "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "unable to mmap 9 bytes from file </torch_1>: Cannot allocate memory (12)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_a_device_without_room_is_known_by_what_torch_says(said):
    assert ran_out_of_memory(RuntimeError(said))


@pytest.mark.parametrize(
    "error", [ValueError("out of memory"), PteeError("out of memory"), RuntimeError("too large")], ids=repr
)
def test_what_is_no_device_without_room_is_not_taken_for_one(error):
    assert not ran_out_of_memory(error)
