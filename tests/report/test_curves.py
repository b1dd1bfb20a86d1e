from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from ptee.evaluation.comparison_table import Comparison, Entry, Line
from ptee.report import parts
from ptee.report.curves import ACCURACY, FIDELITY, curve, over_setting, runs

ENTRIES = tuple(Entry(drop, 0.5 - drop, drop, (drop - 0.01, drop + 0.02), drop, (0.9,)) for drop in (0.0, 0.01, 0.02))
ALONE = Entry(None, 0.3, 0.05, (0.04, 0.06), 0.05)
COMPARISON = Comparison(
    "net",
    (0.0, 0.01, 0.02),
    (
        Line("a<b>", "adaptive", ENTRIES, "a<b>"),
        Line("a<b>, one T", "adaptive", ENTRIES, "a<b>"),
        Line("a<b>, oracle", "oracle", (ALONE,), "a<b>"),
        Line("a<b>, truncation at exit 0", "truncation", (ALONE,), "a<b>"),
        Line("a<b>, truncation at exit 1", "truncation", (ALONE,), "a<b>"),
        Line("small", "static", (ALONE,), "small"),
        Line("small, then net", "cascade", ENTRIES, "small"),
    ),
    100,
    200,
    0.9,
)


@pytest.fixture(scope="module")
def drawn():
    return {trace.name: trace for trace in curve(COMPARISON).data}


def test_each_line_is_drawn_at_its_cost_and_accuracy_on_the_report_images(drawn):
    line = drawn["small, then net"]
    assert list(line.x) == pytest.approx([0.5, 0.49, 0.48])
    assert list(line.y) == pytest.approx([0.9, 0.89, 0.88])
    assert list(line.error_y.arrayminus) == pytest.approx([0.02] * 3)
    assert list(line.error_y.array) == pytest.approx([0.01] * 3)
    assert (drawn["net"].x, drawn["net"].y) == ((1.0,), (0.9,))


def test_of_a_single_run_each_line_has_its_colour_dash_and_mark(drawn):
    lines = [drawn[name] for name in ("a&lt;b&gt;", "a&lt;b&gt;, one T", "small, then net")]
    assert len({line.line.color for line in lines}) == 3
    assert len({line.marker.symbol for line in lines}) == 3
    assert lines[0].line.dash != lines[1].line.dash


def test_of_several_runs_the_lines_of_one_have_its_colour():
    twin = replace(COMPARISON, lines=(*COMPARISON.lines, Line("twin", "adaptive", ENTRIES, "twin")))
    drawn = {trace.name: trace for trace in curve(twin).data}
    first, second, other = (drawn[name].line.color for name in ("a&lt;b&gt;", "a&lt;b&gt;, one T", "twin"))
    assert first == second != other


def test_the_text_beside_the_mouse_says_what_to_type():
    _, line, *_ = curve(COMPARISON, command=lambda line, entry: f"ptee tune '{line.of}'").data
    assert line.hovertext[0].endswith("<br>ptee tune 'a&lt;b&gt;'")


def test_fidelity_is_drawn_where_it_is_asked_for():
    faithful = replace(ALONE, fidelity=0.97)
    bare, line = curve(replace(COMPARISON, lines=(Line("small", "static", (faithful,), "small"),)), FIDELITY).data
    assert (bare.y, line.y) == ((1.0,), (0.97,))


def test_runs_of_a_sweep_are_points_at_their_cost():
    found = [{"name": "a<b>", "cost": 0.5, "accuracy": 0.8, "fidelity": 0.9, "backbone": 0.85}]
    drawn = runs(found)
    (points,) = drawn.data
    assert (points.x, points.y, points.name) == ((0.5,), (0.8,), "a&lt;b&gt;")
    assert [line.y0 for line in drawn.layout.shapes] == [0.85]
    blind = runs([found[0] | {"accuracy": None, "backbone": None}])
    assert blind.data[0].y == (0.9,) and [line.y0 for line in blind.layout.shapes] == [1.0]


def test_each_run_of_a_sweep_over_backbones_stands_beside_its_own():
    found = [
        {"name": f"run {n}", "cost": 0.5, "accuracy": 0.8, "fidelity": 0.9, "backbone": 0.85 + n / 100}
        for n in range(2)
    ]
    drawn = runs(found)
    assert not drawn.layout.shapes
    for n, (run, own) in enumerate((drawn.data[:2], drawn.data[2:4])):
        assert (own.x, own.y, own.name) == ((1.0,), (0.85 + n / 100,), f"run {n}, backbone")
        assert own.marker.symbol == f"{run.marker.symbol}-open" and own.marker.color == run.marker.color
    assert drawn.data[-1].name == "open: its backbone" and drawn.data[-1].showlegend is not False


def test_of_many_runs_whose_marks_are_alike_a_line_leads_to_the_backbone_of_each():
    found = [
        {"name": f"run {n}", "cost": 0.5, "accuracy": 0.8, "fidelity": 0.9, "backbone": 0.7 + n / 100}
        for n in range(21)
    ]
    drawn = runs(found)
    for n in range(21):
        own = drawn.data[2 * n + 1]
        assert (own.mode, own.x, own.y) == ("lines+markers", (0.5, 1.0), (0.8, 0.7 + n / 100))


def test_over_a_setting_runs_of_one_value_are_a_mean_with_its_range():
    each = [(0.1, 0.8), (0.1, 0.6), (0.2, 0.5)]
    drawn = over_setting([{"w": w, "accuracy": None, "fidelity": 1.0, "cost": cost} for w, cost in each], "w")
    cost = next(line for line in drawn.data if line.name == "cost")
    assert [line.name for line in drawn.data] == ["fidelity", "cost"]
    assert list(cost.y) == pytest.approx([0.7, 0.5])
    assert list(cost.error_y.arrayminus) == pytest.approx([0.1, 0.0])


def test_quotes_are_drawn_as_they_are():
    quoted = replace(COMPARISON, backbone="a<b>", lines=(Line('it\'s "r"', "adaptive", ENTRIES, "r"),))
    bare, line = curve(quoted).data
    assert (bare.name, line.name) == ("a&lt;b&gt;", 'it\'s "r"')
    assert line.hovertext[0].startswith('it\'s "r"<br>')


@pytest.mark.parametrize("merit", [0.2, 0.84])
def test_the_runs_own_point_is_inside_of_the_figure(merit):
    own = SimpleNamespace(merit=merit, fidelity=merit, cost=0.4, time=None)
    drawn = parts.curve(
        SimpleNamespace(comparison=COMPARISON, own=own, folders={}, model=SimpleNamespace(answers="own"), times=None),
        ACCURACY,
    )
    low, high = drawn.layout.yaxis.range
    assert low < merit < high and drawn.data[-1].y == (merit,)


def test_all_exits_where_a_run_is_cut_off_are_one_curve(drawn):
    assert [name for name in drawn if "truncation" in name] == ["a&lt;b&gt;, truncation"]
    assert len(drawn["a&lt;b&gt;, truncation"].x) == 2


def test_a_cut_off_backbone_with_a_low_accuracy_does_not_flatten_the_picture():
    far = Line("a<b>, truncation at exit 0", "truncation", (Entry(None, 0.1, 0.8, (0.7, 0.9), 0.8),), "a<b>")
    low, high = curve(replace(COMPARISON, lines=(*COMPARISON.lines, far))).layout.yaxis.range
    assert 0.8 < low < 0.84
    assert 0.9 < high < 1


def test_without_labels_fidelity_is_drawn():
    blind = Comparison("net", (0.0,), COMPARISON.lines, 100, 200, None)
    figure = curve(blind)
    assert figure.layout.yaxis.title.text == "fidelity"
    assert figure.data[0].y == (1.0,)


def test_the_text_beside_the_mouse_says_off_and_missed():
    entry = Entry(0.01, 0.5, 0.02, (0.01, 0.03), 0.0, (0.9, 2.0, 0.8), (1,))
    _, line = curve(replace(COMPARISON, lines=(Line("mine", "adaptive", (entry,), "mine"),))).data
    assert line.hovertext[0] == (
        "mine<br>allowed drop: 0.01, missed<br>cost 0.5000 and drop +0.0200 (95 % interval +0.0100 to +0.0300)"
        "<br>T = 0.9, off, 0.8"
    )
