from __future__ import annotations

import re
from copy import copy
from dataclasses import replace

import pytest
import torch

from ptee._common.errors import Argument, PteeError, RunError
from ptee._common.writing import require_page
from ptee.exits.times import BatchTimes
from ptee.report.page import write, write_page
from ptee.report.parts import Part, command, parts
from ptee.report.pictures import require_picture

EVIL = '<script>alert("x")</script>'
ALL = [
    "summary",
    "thresholds",
    "alternatives",
    "sweep",
    "network",
    "confidence",
    "calibration",
    "confusion",
    "gallery",
    "training",
    "made",
]


def keys(of) -> list[str]:
    return [part.key for part in parts(of)]


def test_a_run_with_everything_has_every_part(evil):
    assert keys(evil) == ALL


def test_a_part_is_left_out_where_the_run_has_not_what_it_needs(evil):
    assert "gallery" not in keys(replace(evil, images=None))
    assert "training" not in keys(replace(evil, metrics={}))
    bare = replace(evil, traces=None, comparison=None, images=None)
    assert keys(bare) == ["summary", "network", "training", "made"]


def test_where_every_exit_is_off_there_is_no_slider_that_moves_nothing(evil, tmp_path):
    model = copy(evil.model)
    model.off = (0, 1)
    off = replace(evil, model=model)
    assert {*ALL} - {*keys(off)} == {"sweep", "confusion"}
    thresholds = next(part for part in parts(off) if part.key == "thresholds")
    assert thresholds.slider is None
    assert "Every exit of this run is off" in thresholds.words[0]
    write_page(off, tmp_path / "off.html")
    assert 'type="range"' not in (tmp_path / "off.html").read_text(encoding="utf-8")


def test_without_labels_all_is_said_of_the_backbones_answers(unlabelled):
    by_key = {part.key: part for part in parts(unlabelled)}
    assert set(by_key["thresholds"].figures) == {"accuracy", "shares"}
    assert by_key["thresholds"].figures["accuracy"].layout.yaxis.title.text == "fidelity"
    assert "accuracy" not in by_key["thresholds"].slider.words[0]
    assert "accuracy" not in [number.name for number in by_key["summary"].numbers]


def test_names_are_escaped_wherever_they_stand(page):
    text = page.read_text(encoding="utf-8")
    assert EVIL not in text
    assert "&lt;script&gt;alert(" in text
    assert text.count("<script") == 4  # figures, slider, plotly.js and the page's own


def test_the_page_asks_for_nothing_and_is_small(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "default-src 'none'" in text
    assert len(text) < 1_000_000
    assert [file.name for file in page.parent.iterdir()] == ["report.html"]


def test_the_slider_ends_at_the_runs_own_thresholds(evil):
    slider = next(part.slider for part in parts(evil) if part.slider)
    assert slider.words[-1].startswith("T = 0.9, 0.6: cost ")
    assert slider.commands[50].endswith("--threshold 0.5")
    assert {len(slider.words)} == {len(move["y"]) for move in slider.moves}


def test_a_run_that_missed_its_target_says_so(evil):
    tuning = {
        "target": {"kind": "max_drop", "limit": 0.0001},
        "threshold": evil.model.threshold,
        "off": list(evil.model.off),
    }

    def says(**changes: object) -> bool:
        metrics = {"results": {"tuning": tuning | changes}}
        words = " ".join(parts(replace(evil, metrics=metrics))[0].words)
        n = evil.traces.answers.shape[1]
        p = (n * (1 - evil.own.fidelity) + 2) / (n + 4)
        return f"was lost (95 % interval ± {1.96 * (p / (n + 4)) ** 0.5:.4f}): missed." in words

    assert says()
    assert not says(threshold=[0.1, 0.2])  # others were set since


def test_where_times_are_kept_they_stand_beside_the_cost(evil):
    flat = torch.tensor([[0.0] + [part] * 4 for part in (0.25, 0.25, 0.5)], dtype=torch.float64)
    times = BatchTimes(
        flat, torch.zeros(2, 5, dtype=torch.float64), 0.0, "the bare backbone's time (hooks, batch 4, cpu)"
    )
    timed = replace(evil, times=times, traces=replace(evil.traces, times=times))
    assert next(part for part in parts(timed) if part.key == "network").rows[2][4] == "50.0%"
    assert "time" in [number.name for number in parts(timed)[0].numbers]
    line = evil.comparison.lines[0]
    by_time = replace(timed, comparison=replace(evil.comparison, unit=times.unit))
    assert command(by_time, line, line.entries[0]).endswith("--max-drop 0.01 --answers own --cost time --at-batch 4")
    drawn = next(part for part in parts(by_time) if part.key == "thresholds").figures["accuracy"]
    assert drawn.data[-1].x == (by_time.own.time,)
    assert drawn.layout.xaxis.title.text.startswith("time")


def test_a_page_of_one_figure_has_no_table_of_contents(evil, tmp_path):
    (part,) = [part for part in parts(evil) if part.key == "network"]
    write(EVIL, [Part("figure", EVIL, figures=part.figures)], tmp_path / "one.html")
    assert "<nav>" not in (tmp_path / "one.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_leaves_the_old_one(evil, tmp_path, monkeypatch):
    (tmp_path / "old.html").write_text("old")
    monkeypatch.setattr("ptee.report.parts.words.made", lambda of: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(evil, tmp_path / "old.html")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my curve.png", "such as out='my curve.html'"),
        ("curve.png", "such as out='curve.html'"),
        ("folder.html", "is a folder"),
    ],
)
def test_a_file_that_cannot_be_a_page_is_refused(tmp_path, name, words):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(RunError, match=words):
        require_page(tmp_path / name)


def test_a_still_picture_without_kaleido_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kaleido", None)
    require_picture(tmp_path / "x.html")
    with pytest.raises(PteeError, match=r"pip install 'kaleido>=1'.*Or draw a page: ") as why:
        require_picture(tmp_path / "x.png")
    assert Argument.text("out", "x.html") in why.value.parts
    with pytest.raises(RunError, match=r"ends in \.png or \.svg or \.html"):
        require_picture(tmp_path / "x.jpg")


def chosen_for(of, kind: str, limit: float):
    """The same run, whose thresholds were chosen for this."""
    tuning = {"target": {"kind": kind, "limit": limit}, "threshold": list(of.model.threshold), "off": []}
    return replace(of, metrics={"results": {"tuning": tuning}})


def what_is_cheapest(of) -> list[str]:
    return list(next(part.words for part in parts(of) if part.key == "alternatives"))


def test_what_is_cheapest_within_the_run_s_own_target_is_said_first_and_as_its_own(evil):
    (line,) = evil.comparison.lines
    line = replace(line, entries=(replace(line.entries[0], allowed=0.005), *line.entries))
    compared = replace(evil, comparison=replace(evil.comparison, drops=(0.005, 0.01), lines=(line,)))
    first, second, how = what_is_cheapest(chosen_for(compared, "max_drop", 0.01))
    assert how.endswith("is a little too good here. An evaluation on other images says what it is on new ones.")
    assert first.startswith("At most 0.01 lost: ")
    assert first.endswith(" This drop is the run's own target.")
    assert second.startswith("At most 0.005 lost: ")
    assert "own target" not in second


@pytest.mark.parametrize(
    ("kind", "limit", "asked"),
    [
        ("max_drop", 0.03, "to lose at most 0.03 of accuracy"),
        ("max_drop", -0.008, "to gain at least 0.008 of accuracy"),
        ("max_fidelity_drop", 0.01, "to change at most 0.01 of the answers"),
        ("max_cost", 0.5, "to cost at most 0.5"),
    ],
)
def test_that_nothing_is_said_of_the_run_s_own_target_is_said(evil, kind, limit, asked):
    said = what_is_cheapest(chosen_for(evil, kind, limit))
    assert said[0] == f"The thresholds were chosen {asked}, and no sentence here is about that."
