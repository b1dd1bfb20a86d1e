"""What a value means as a path, and JSON that is read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptee._common.errors import PteeError
from ptee._common.files import DEEPEST, as_path, from_json

# ---------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' is there twice"),
        ('[{"a": {"b": 1, "b": 1}}]', "'b' is there twice"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("[" * 5000, "nested too deeply"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested too deeply"),
        ('["' + "\\" * 5000, "Unterminated string"),
    ],
    ids=["twice", "twice inside", "deep objects", "deep lists", "one too deep", "no end"],
)
def test_json_that_could_be_read_in_two_ways_or_not_at_all_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        from_json(text)


@pytest.mark.parametrize(
    "inside", ["0", '"' + "[{" * 200 + '"', r'"\"' + "[" * 200 + r'\\"'], ids=["deep", "text", "quotes"]
)
def test_other_json_is_read(inside):
    value = from_json("[" * DEEPEST + inside + "]" * DEEPEST + " ")
    for _ in range(DEEPEST):
        (value,) = value
    assert value == json.loads(inside)


def test_lists_beside_one_another_are_not_deep():
    assert from_json("[" + ",".join(["[[]]"] * 1000) + "]") == [[[]]] * 1000


# ---------------------------------------------------------------------------------------------------- paths that a user gives


@pytest.mark.parametrize("given", ["~/run", Path("~/run")], ids=repr)
def test_a_path_may_begin_with_the_home_folder(given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path(given, "out") == tmp_path / "run"


@pytest.mark.parametrize("given", ["run", "~nobody-of-this-name/run", "a~b", " "], ids=repr)
def test_any_other_path_stays_as_it_is(given):
    assert as_path(given, "out") == Path(given)


@pytest.mark.parametrize("given", ["", b"", b"run", 3, True, ["run"], {}, "a\0b", object], ids=repr)
def test_what_is_no_path_is_refused_by_the_name_of_its_argument(given):
    with pytest.raises(PteeError, match=r"^out=.* is no path\. Give the name of a file or folder"):
        as_path(given, "out")


def test_a_path_that_is_not_utf8_is_refused_by_its_argument_and_shown():
    with pytest.raises(PteeError, match=r"^out=o\\xffut has a name that is not UTF-8\. Rename it\.$"):
        as_path("o\udcffut", "out")
