"""The page of a comparison."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptee._common.errors import RunError
from ptee.evaluation import report
from ptee.evaluation.comparison_table import Comparison, Entry, Line

ENTRIES = tuple(Entry(drop, 0.5 - drop, drop, (drop - 0.01, drop + 0.02), drop, (0.9,)) for drop in (0.0, 0.01, 0.02))
ALONE = Entry(None, 0.3, 0.05, (0.04, 0.06), 0.05)
FOUND = Comparison(
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
    return {trace.name: trace for trace in report.picture(FOUND).data}


def test_each_way_to_answer_is_drawn_where_it_costs_and_is_right_as_reported(drawn):
    line = drawn["small, then net"]
    assert list(line.x) == pytest.approx([0.5, 0.49, 0.48])
    assert list(line.y) == pytest.approx([0.9, 0.89, 0.88])
    assert list(line.error_y.arrayminus) == pytest.approx([0.02] * 3)
    assert list(line.error_y.array) == pytest.approx([0.01] * 3)
    assert (drawn["net"].x, drawn["net"].y) == ((1.0,), (0.9,))


def test_ways_to_use_one_run_share_its_colour_and_differ_in_their_dashes(drawn):
    first, second, other = (drawn[name].line for name in ("a&lt;b&gt;", "a&lt;b&gt;, one T", "small, then net"))
    assert first.color == second.color != other.color
    assert first.dash != second.dash


def test_quotes_are_drawn_as_they_are():
    quoted = replace(FOUND, backbone="a<b>", lines=(Line('it\'s "r"', "adaptive", ENTRIES, "r"),))
    bare, line = report.picture(quoted).data
    assert (bare.name, line.name) == ("a&lt;b&gt;", 'it\'s "r"')
    assert line.hovertext[0].startswith('it\'s "r"<br>')


def test_all_places_to_cut_a_run_off_are_one_trace(drawn):
    assert [name for name in drawn if "truncation" in name] == ["a&lt;b&gt;, truncation"]
    assert len(drawn["a&lt;b&gt;, truncation"].x) == 2


def test_a_place_to_cut_off_that_is_far_below_does_not_flatten_the_others():
    far = Line("a<b>, truncation at exit 0", "truncation", (Entry(None, 0.1, 0.8, (0.7, 0.9), 0.8),), "a<b>")
    low, high = report.picture(replace(FOUND, lines=(*FOUND.lines, far))).layout.yaxis.range
    assert 0.8 < low < 0.84
    assert 0.9 < high < 1


def test_without_labels_fidelity_is_drawn():
    blind = Comparison("net", (0.0,), FOUND.lines, 100, 200, None)
    figure = report.picture(blind)
    assert figure.layout.yaxis.title.text == "fidelity"
    assert figure.data[0].y == (1.0,)


def test_the_page_needs_no_network_and_says_the_table_too(tmp_path):
    page = tmp_path / "new" / "curve.html"
    report.write(FOUND, page)
    text = page.read_text()
    assert "a&lt;b&gt;, one T" in text
    assert "a<b>" not in text.replace("\\u003cb\\u003e", "")
    assert 'src="http' not in text
    assert "At most 0.01 lost" in text
    assert [path.name for path in page.parent.iterdir()] == ["curve.html"]


@pytest.mark.parametrize(("name", "words"), [("curve.png", "such as curve.html"), ("folder.html", "is a folder")])
def test_what_is_no_page_is_refused(tmp_path, name, words):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(RunError, match=words):
        report.require_page(tmp_path / name)
