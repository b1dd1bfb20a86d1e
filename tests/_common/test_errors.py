"""Errors: everything a user can mend is a PteeError of one line, and a misspelt name is answered with the nearest."""

from __future__ import annotations

import doctest
import pickle

import pytest

import ptee
from ptee._common import errors
from ptee._common import text as tables
from ptee._common.errors import Argument, PteeError, UnknownName, first_line, some, unknown

KINDS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, PteeError)]
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_every_error_is_a_ptee_error_and_a_value_error(kind):
    with pytest.raises(ValueError, match="what was given"):
        raise kind("what was given")
    assert issubclass(kind, ptee.PteeError)


@each_kind
def test_every_error_shows_its_message_as_it_is(kind):
    assert str(kind("No 'such' thing.")) == "No 'such' thing."


@each_kind
def test_every_error_stands_in_the_tree_of_the_docstring(kind):
    assert f" {kind.__name__} " in f" {errors.__doc__} "


def test_an_unknown_name_is_a_key_error_too():
    with pytest.raises(KeyError):
        raise unknown("head", "x", ["pool"])


@pytest.mark.parametrize("module", [errors, tables], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_right(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# ---------------------------------------------------------------------------------------------------- names


def test_a_misspelt_name_is_answered_with_the_nearest_first():
    error = unknown("placement", "gold", ["linear", "golden", "fine"])
    assert isinstance(error, UnknownName)
    assert str(error) == "Unknown placement 'gold'. Did you mean 'golden'? Choices: fine, golden, linear."


def test_two_near_names_are_both_offered():
    assert "Did you mean 'pool' or 'bnpool'?" in str(unknown("head", "pol", ["conv1", "bnpool", "pool"]))


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("resnet", "'resnet18' or 'resnet50' or 'resnet101'"),
        ("Res_Net", "'resnet18' or 'resnet50' or 'resnet101'"),
        ("resnet5", "'resnet50' or"),
        ("reznet50", "'resnet50' or"),
    ],
    ids=["the beginning of a name", "in other letters", "nearly whole", "misspelt"],
)
def test_names_that_begin_so_are_offered_first_the_shortest_of_them_before_the_others(name, suggested):
    choices = ["legacy_resnet", "resnet101", "resnet18", "resnet50", "resnet50_clip_gap", "resnest50"]
    assert f"Did you mean {suggested}" in str(unknown("model", name, choices, most=3))


def test_no_name_is_the_beginning_of_none():
    assert "Did you mean" not in str(unknown("model", "", MANY))


def test_a_name_unlike_all_others_gets_the_choices_alone():
    assert str(unknown("head", "zzz", ["pool", "plain"])) == "Unknown head 'zzz'. Choices: plain, pool."


MANY = [f"layer{n}" for n in range(100)]


def test_of_many_choices_only_near_ones_are_named():
    message = str(unknown("module", "layer7x", MANY))
    assert "Did you mean 'layer7'" in message
    assert "Choices" not in message


def test_of_many_choices_none_of_which_is_near_some_are_named():
    assert "There are 100 choices, among them layer0, layer1, layer10" in str(unknown("module", "zzz", MANY))


def test_first_choices_are_named_before_the_others_in_any_case():
    near, far = (str(unknown("module", name, MANY, first=["pareto", "fine"], most=3)) for name in ("layer7x", "zzz"))
    for message in (near, far):
        assert message.endswith("There are 102 choices, among them pareto, fine, layer0.")
    assert "Did you mean 'layer7'" in near


def test_without_any_choice_the_message_still_reads():
    assert str(unknown("split", "test", [])).startswith("Unknown split 'test'.")


def test_choices_are_named_once():
    assert str(unknown("head", "zzz", ["b", "a", "b"])).endswith("Choices: a, b.")


# ---------------------------------------------------------------------------------------------------- lists and lines


@pytest.mark.parametrize(
    ("names", "said"),
    [([], ""), (["a"], "a"), (["a", "b"], "a, b"), (["a", "b", "c", "d"], "a, b and 2 more")],
    ids=["none", "one", "as many as fit", "more"],
)
def test_a_long_list_is_cut_and_counted(names, said):
    assert some(names, most=2) == said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("size mismatch"), "RuntimeError: size mismatch."),
        (RuntimeError("size mismatch. More of it."), "RuntimeError: size mismatch."),
        (RuntimeError("\n  size mismatch:\n\tweight"), "RuntimeError: size mismatch."),
        (ValueError(), "ValueError."),
        (KeyError("missing"), "KeyError: 'missing'."),
        (OSError(2, "No such file", "a.pt"), "FileNotFoundError: [Errno 2] No such file: 'a.pt'."),
    ],
    ids=["one sentence", "two sentences", "several lines", "nothing", "a key", "a file"],
)
def test_what_another_library_says_becomes_one_sentence(error, said):
    assert first_line(error) == said


def test_a_very_long_message_is_cut():
    assert len(first_line(RuntimeError("x" * 10_000))) < 250


# ---------------------------------------------------------------------------------------------------- tables


def test_columns_are_as_wide_as_their_widest_cell():
    text = tables.table([("exit", "cost"), ("a", "0.25"), ("a longer name", "1")], left={0})
    lines = text.splitlines()
    assert lines[2:] == ["a              0.25", "a longer name     1"]
    assert set(lines[1]) == {"-"}
    assert len(lines[1]) == len(lines[2])


def test_no_line_ends_in_blanks():
    text = tables.table([("a", "name"), ("1", ""), ("22", "x")], left={1})
    assert all(line == line.rstrip() for line in text.splitlines())


# ---------------------------------------------------------------------------------------------------- the terminal


@each_kind
@pytest.mark.parametrize("hostile", ["\x1b[2J\x1b]0;title\x07", "\x9b31m", "\u202e", "\ud800", "\x00\r"])
def test_a_name_in_a_message_steers_no_terminal(kind, hostile):
    said = kind(f"No run in '{hostile}'. ", Argument("run", f"a{hostile}"))
    assert tables.printable(str(said)) == str(said)
    assert str(said) == str(pickle.loads(pickle.dumps(said)))


def test_lines_of_a_message_stay_apart():
    assert str(PteeError("one\n\ttwo")) == "one\n\ttwo"
