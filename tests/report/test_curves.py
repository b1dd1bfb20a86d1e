from __future__ import annotations

from dataclasses import replace

import pytest

from ptee._common.errors import RunError
from ptee.evaluation import report
from ptee.evaluation.comparison_table import Comparison, Entry, Line

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
    return {trace.name: trace for trace in report.picture(COMPARISON).data}


def test_each_line_is_drawn_at_its_cost_and_accuracy_on_the_report_images(drawn):
    line = drawn["small, then net"]
    assert list(line.x) == pytest.approx([0.5, 0.49, 0.48])
    assert list(line.y) == pytest.approx([0.9, 0.89, 0.88])
    assert list(line.error_y.arrayminus) == pytest.approx([0.02] * 3)
    assert list(line.error_y.array) == pytest.approx([0.01] * 3)
    assert (drawn["net"].x, drawn["net"].y) == ((1.0,), (0.9,))


def test_the_lines_of_one_run_have_its_colour_and_different_dashes(drawn):
    first, second, other = (drawn[name].line for name in ("a&lt;b&gt;", "a&lt;b&gt;, one T", "small, then net"))
    assert first.color == second.color != other.color
    assert first.dash != second.dash


def test_quotes_are_drawn_as_they_are():
    quoted = replace(COMPARISON, backbone="a<b>", lines=(Line('it\'s "r"', "adaptive", ENTRIES, "r"),))
    bare, line = report.picture(quoted).data
    assert (bare.name, line.name) == ("a&lt;b&gt;", 'it\'s "r"')
    assert line.hovertext[0].startswith('it\'s "r"<br>')


def test_all_exits_where_a_run_is_cut_off_are_one_curve(drawn):
    assert [name for name in drawn if "truncation" in name] == ["a&lt;b&gt;, truncation"]
    assert len(drawn["a&lt;b&gt;, truncation"].x) == 2


def test_a_cut_off_backbone_with_a_low_accuracy_does_not_flatten_the_picture():
    far = Line("a<b>, truncation at exit 0", "truncation", (Entry(None, 0.1, 0.8, (0.7, 0.9), 0.8),), "a<b>")
    low, high = report.picture(replace(COMPARISON, lines=(*COMPARISON.lines, far))).layout.yaxis.range
    assert 0.8 < low < 0.84
    assert 0.9 < high < 1


def test_without_labels_fidelity_is_drawn():
    blind = Comparison("net", (0.0,), COMPARISON.lines, 100, 200, None)
    figure = report.picture(blind)
    assert figure.layout.yaxis.title.text == "fidelity"
    assert figure.data[0].y == (1.0,)


def test_the_page_needs_no_network_and_holds_the_table_and_its_legend(tmp_path):
    page = tmp_path / "new" / "curve.html"
    report.write(COMPARISON, page)
    text = page.read_text()
    assert "a&lt;b&gt;, one T" in text
    assert "a<b>" not in text.replace("\\u003cb\\u003e", "")
    assert 'src="http' not in text
    assert "At most 0.01 lost" in text
    assert "Each cell: the cost" in text
    assert [path.name for path in page.parent.iterdir()] == ["curve.html"]


def test_the_text_beside_the_mouse_says_off_and_missed():
    entry = Entry(0.01, 0.5, 0.02, (0.01, 0.03), 0.0, (0.9, 2.0, 0.8), (1,))
    _, line = report.picture(replace(COMPARISON, lines=(Line("mine", "adaptive", (entry,), "mine"),))).data
    assert line.hovertext[0] == (
        "mine<br>allowed drop: 0.01, missed<br>cost 0.5000 and drop +0.0200 (95 % interval +0.0100 to +0.0300)"
        "<br>T = 0.9, off, 0.8"
    )


@pytest.mark.parametrize(("name", "words"), [("curve.png", "such as html=curve.html"), ("folder.html", "is a folder")])
def test_a_file_that_cannot_be_a_page_is_refused(tmp_path, name, words):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(RunError, match=words):
        report.require_page(tmp_path / name)
