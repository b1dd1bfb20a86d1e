from __future__ import annotations

import pytest

from ptee._common.errors import PteeError
from ptee.cli.commands import _names_of, _static, compare
from ptee.evaluation.comparison import LINES


def test_the_default_lines_of_the_command_are_those_of_python():
    option = next(p for p in compare.params if p.name == "lines")
    assert option.default.split(",") == list(LINES)


@pytest.mark.parametrize(
    ("runs", "names"),
    [(["runs/a", "runs/b/"], ["a", "b"]), (["x/a", "y/a", "b"], ["x/a", "y/a", "b"]), (["user/run"], ["run"])],
    ids=str,
)
def test_runs_are_called_by_the_end_of_their_path_where_that_is_enough(runs, names):
    assert list(_names_of(tuple(runs))) == names


def test_a_run_is_called_like_its_folder_from_within_as_well(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert list(_names_of((".", "../other/"))) == ["mine", "other"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["cifar_resnet21"], "Unknown model 'cifar_resnet21'. Did you mean"),
        (["cifar_resnet20=none.safetensors"], "none.safetensors"),
    ],
    ids=str,
)
def test_a_network_that_cannot_be_loaded_is_refused(texts, words):
    with pytest.raises(PteeError, match=words):
        _static(tuple(texts))
