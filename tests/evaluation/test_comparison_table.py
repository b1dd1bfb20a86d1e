from __future__ import annotations

from dataclasses import replace

import pytest

from ptee.evaluation.comparison_table import COUNTED, Comparison, Entry, Line


def entry(cost: float, drop: float, allowed: float | None = None, in_calibration: float = 0.0) -> Entry:
    return Entry(allowed, cost, drop, (drop - 0.01, drop + 0.01), in_calibration)


def comparison(*lines: Line, drops: tuple[float, ...] = (0.01,), accuracy: float | None = 0.9) -> Comparison:
    return Comparison("net", drops, lines, 600, 1200, accuracy)


def verdict(*lines: Line) -> str:
    return comparison(*lines).verdict[0]


OURS = Line("ours", "adaptive", (entry(0.5, 0.01, 0.01),))
ORACLE = Line("ours, oracle", "oracle", (entry(0.1, 0),))
NOTHING = "At most 0.01 lost: nothing that keeps this is cheaper than the bare backbone."


def test_the_table_shows_cost_and_drop_and_says_missed_where_the_drop_is_larger_than_allowed():
    ours = Line("ours", "adaptive", (entry(0.5, 0.004, 0.01), entry(0.4, 0.025, 0.02)))
    small = Line("small", "static", (entry(0.3, -0.00001),))
    found = comparison(ours, small, drops=(0.01, 0.02))
    assert str(found).splitlines() == [
        "net, 1,200 images, accuracy 0.9000; thresholds chosen on 600 calibration images",
        "cost: share of the bare backbone's multiply-accumulates; in parentheses: the drop of accuracy on these images",
        "",
        "       <= 0.01 lost      <= 0.02 lost             no threshold",
        "------------------------------------------------------------------",
        "ours   0.5000 (+0.0040)  0.4000 (+0.0250) missed",
        "small                                             0.3000 (+0.0000)",
        "",
        *found.verdict,
        "In short, for 0.02 lost at most: small loses no more and costs less: cost 0.3000 instead of 0.5000, that of ours with its thresholds for <= 0.01 lost.",
    ]


def test_few_calibration_images_are_said_below_the_sentences_for_the_largest_drop_that_they_may_not_show():
    few = "200 calibration images are too few to show a loss of 0.01 (that takes 299): expect to lose more on new ones."
    ours = Line("ours", "adaptive", tuple(entry(0.5, 0.0, drop) for drop in (0.005, 0.01, 0.02)))
    found = replace(comparison(ours, drops=(0.005, 0.01, 0.02)), calibration=200)
    assert few in str(found).splitlines()
    assert "too few" not in str(replace(found, calibration=598))


def test_a_note_stands_above_the_table():
    found = Comparison("net", (0.01,), (OURS,), 600, 1200, None, note="There is no accuracy.")
    first = "net, 1,200 images; thresholds chosen on 600 calibration images"
    second = (
        "cost: share of the bare backbone's multiply-accumulates; in parentheses: the drop of fidelity on these images"
    )
    assert str(found).splitlines()[:3] == [first, second, found.note]


def test_a_comparison_by_time_says_its_unit_above_the_table_and_in_the_legend():
    found = Comparison("net", (0.01,), (OURS,), 600, 1200, None, unit="a clock (batch 32)")
    assert str(found).splitlines()[1].startswith("cost: share of a clock (batch 32); in parentheses: ")
    assert "as a share of a clock (batch 32)" in found.legend


def test_the_legend_explains_the_lines_that_are_there_and_is_not_part_of_the_table():
    found = comparison(OURS, ORACLE)
    assert "Each column: the largest drop of accuracy" in found.legend
    assert "up to 0.0100 to each side" in found.legend
    assert "oracle:" in found.legend
    assert not set(found.legend.splitlines()) & set(str(found).splitlines())
    assert not {"oracle:", "truncation:", '"own":'} & {line.split()[0] for line in comparison(OURS).legend.splitlines()}
    assert "drop of fidelity" in comparison(OURS, accuracy=None).legend
    assert found.legend.endswith(
        "on the report images. As the latter take part in\nthe choice, the drop of the line that is named is a little too good there. An evaluation on other "
        "images\nsays what it is on new ones."
    )


def test_the_verdict_names_the_cheapest_line_within_a_drop_but_never_the_oracle():
    assert verdict(OURS, ORACLE) == (
        "At most 0.01 lost: ours is cheapest, with cost 0.5000 and drop +0.0100 (95 % interval +0.0000 to +0.0200) "
        "on the 1,200 report images, +0.0000 on the 600 calibration images."
    )


def test_of_blended_answers_it_says_which_of_the_two_drops_on_the_calibration_images_is_meant():
    blended = Line("ours", "adaptive", (replace(entry(0.5, 0.01, 0.01), blended=True),))
    assert verdict(blended).endswith("+0.0000 on the 600 calibration images with the final weights.")
    said = "ptee tune names\nanother drop there: each image is answered with weights that were fitted to the others."
    assert said in comparison(blended).legend
    assert said not in comparison(OURS).legend


def test_the_verdict_names_the_column_if_it_is_that_of_another_drop():
    other = Line("other", "adaptive", (entry(0.4, 0.005, allowed=0.02),))
    assert verdict(OURS, other).startswith(
        "At most 0.01 lost: other with its thresholds for <= 0.02 lost is cheapest, with cost 0.4000"
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [("static", "a smaller network alone"), ("cascade", "a cascade of two"), ("truncation", "a backbone that is cut off")],
)  # fmt: skip
def test_the_verdict_says_what_is_cheaper_than_every_run(kind, words):
    other, third, last = (Line(n, k, (entry(c, 0),)) for n, k, c in (("other", kind, 0.4), ("third", "static", 0.45), ("last", "static", 0.6)))  # fmt: skip
    found = verdict(OURS, other, third, last)
    assert "other is cheapest, with cost 0.4000" in found
    assert f"It is {words}" in found
    assert found.endswith("cheaper than the best run with early exits, ours (cost 0.5000). So is third (cost 0.4500).")


def test_what_is_cheaper_than_a_run_is_said_of_the_column_that_its_cost_is_in():
    ours = Line("ours", "adaptive", (entry(0.5, 0.005, allowed=0.02),))
    third = Line("third", "cascade", (entry(0.45, 0, allowed=0.02),))
    assert verdict(ours, third, Line("other", "static", (entry(0.4, 0),))).endswith(
        "cheaper than the best run with early exits, ours with its thresholds for <= 0.02 lost (cost 0.5000). "
        "So is third with its thresholds for <= 0.02 lost (cost 0.4500)."
    )


@pytest.mark.parametrize("other", [entry(0.4, 0.011), entry(0.4, 0, in_calibration=0.011), entry(0.6, 0)], ids=str)
def test_a_line_that_loses_more_on_either_set_of_images_or_costs_more_is_not_named(other):
    assert verdict(OURS, Line("other", "static", (other,))).startswith("At most 0.01 lost: ours is cheapest")


@pytest.mark.parametrize("cost", [1.0, 1 - 2**-52])
def test_where_no_run_saves_anything_the_verdict_says_so(cost):
    ours = Line("ours", "adaptive", (entry(cost, 0, 0.01),))
    assert verdict(ours) == NOTHING
    cascade = Line("other", "cascade", (entry(0.4, 0),))
    assert verdict(ours, cascade).endswith("cheaper than every run with early exits, as none saves anything.")


def test_a_cell_of_own_answers_on_a_line_of_blended_ones_says_so():
    measured = {"allowed": 0.01, "cost": 0.5, "drop": 0.02, "interval": (0.01, 0.03), "drop_in_calibration": 0.0}
    assert str(Entry(**measured)) == "0.5000 (+0.0200) missed"
    assert str(Entry(**measured, own=True)) == "0.5000 (+0.0200) own missed"


@pytest.mark.parametrize("kind", ["static", "cascade", "truncation"])
def test_the_last_line_says_in_one_sentence_that_something_else_is_better(kind):
    found = comparison(OURS, Line("other", kind, (entry(0.4, 0.005, 0.01),)))
    last = "In short, for 0.01 lost at most: other loses no more and costs less: cost 0.4000 instead of 0.5000, that of ours."
    assert str(found).splitlines()[-1] == found.bottom_line == found.to_dict()["bottom_line"] == last


@pytest.mark.parametrize(
    ("unit", "instead"),
    [
        (COUNTED, "Train longer"),
        ("the bare backbone's time", "Take fewer or cheaper heads, or batches of another size"),
    ],
)
def test_where_exits_save_nothing_the_advice_is_about_what_costs(unit, instead):
    found = replace(comparison(Line("ours", "adaptive", (entry(1.2, 0, 0.01),))), unit=unit)
    assert found.bottom_line.endswith(
        f"no early exits that save anything keep this. {instead}, or allow a larger loss."
    )


def test_what_costs_the_same_is_not_said_to_cost_so_much_instead():
    found = comparison(OURS, Line("other", "cascade", (entry(0.49999, 0.005, 0.01),)))
    last = "In short, for 0.01 lost at most: other loses no more and costs the same: cost 0.5000, as much as ours."
    assert found.bottom_line == last


def test_the_last_line_names_the_column_of_each_cell_that_is_not_in_that_of_the_drop():
    ours = Line("ours", "adaptive", (entry(0.5, 0, 0.01), entry(0.4, 0.03, 0.02)))
    cascade = Line("both", "cascade", (entry(0.45, 0.01, 0.01), entry(0.3, 0.03, 0.02)))
    last = comparison(ours, cascade, drops=(0.01, 0.02)).bottom_line
    assert last == (
        "In short, for 0.02 lost at most: both with its thresholds for <= 0.01 lost loses no more and costs less: "
        "cost 0.4500 instead of 0.5000, that of ours with its thresholds for <= 0.01 lost."
    )


@pytest.mark.parametrize(
    ("cost", "words"),
    [(0.5, ""), (0.96, "hardly pays: it saves 4.0% of the cost"), (1.1, "no early exits that save anything keep this")],
)
def test_the_last_line_says_that_little_is_saved(cost, words):
    found = comparison(Line("ours", "adaptive", (entry(cost, 0.01, 0.01),)))
    assert words in found.bottom_line
    assert bool(found.bottom_line) == bool(words)


def test_beside_a_run_that_was_tuned_for_fidelity_only_what_keeps_as_much_of_it_answers_as_well():
    small, other = (
        Line(name, "static", (replace(entry(cost, 0.0), fidelity=fidelity),))
        for name, cost, fidelity in (("small", 0.3, 0.9), ("other", 0.4, 0.99))
    )
    ours = Line("ours", "adaptive", (replace(entry(0.5, 0.01, 0.01), fidelity=0.98),), "ours")
    wished = replace(comparison(ours, small), for_fidelity=("ours",))
    assert "small loses no more" in comparison(ours, small).bottom_line
    assert wished.bottom_line == ""
    assert replace(wished, lines=(ours, small, other)).bottom_line == (
        "In short, for 0.01 lost at most: other gives as many of the backbone's answers and costs less: "
        "fidelity 0.9900 instead of 0.9800, cost 0.4000 instead of 0.5000, that of ours."
    )
