from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from ptee.evaluation.results_table import Results, Row
from ptee.tuning.traces import Score

GOOD = {"fidelity": 0.99, "cost": 0.7, "leaving": [0.5, 0.3, 0.2], "accuracy": (0.8, 0.79)}


def results_with(
    fidelity: float,
    cost: float,
    leaving: list[float],
    accuracy: tuple[float | None, float | None],
    threshold: tuple[float, ...] = (0.5, 0.5),
    speedup: float | None = None,
    off: tuple[int, ...] = (),
    loses_too_much: bool | None = None,
) -> Results:
    backbone, own = accuracy
    exits = [Row(f"exit {n}", module, own, 0.5, 0.5, 0.9, 0.1, 0.75) for n, module in enumerate(["one", "two"])]
    first = Row("backbone", "", backbone, 1, 1, 0.6)
    last = Row("early exit", "", own, fidelity, cost, speedup=speedup, images_per_s=speedup and 1000 * speedup)
    how: dict[str, Any] = {"off": off, "loses_too_much": loses_too_much}
    return Results("net", 1200, list(threshold), (first, *exits, last), leaving, "cpu", 10, **how)


def lines_of(results: Results) -> dict[str, list[str]]:
    """The cells of each line of the tables, by the first of them."""
    cells = [re.split(r"\s{2,}", line) for line in str(results).splitlines()]
    return {first: others for first, *others in cells}


def test_the_first_table_has_one_scenario_a_row():
    shown = lines_of(results_with(**GOOD, threshold=(0.25, 0.5)))
    assert shown["backbone"] == ["0.8000", "1.0000", "1.0000"]
    assert shown["all leave at exit 0 (one)"] == ["0.7900", "0.5000", "0.5000"]
    assert shown["all leave at exit 1 (two)"] == ["0.7900", "0.5000", "0.5000"]
    assert shown["early exit, T = 0.25, 0.5"] == ["0.7900", "0.9900", "0.7000"]
    assert "early exit, T = 0.5" in lines_of(results_with(**GOOD))


def test_the_second_table_shows_what_happens_at_each_exit_when_the_model_runs():
    shown = lines_of(results_with(**GOOD, threshold=(0.25, 0.5)))
    assert shown["when it runs"] == ["T", "leave here", "of these right", "AUROC", "ECE"]
    assert shown["exit 0 (one)"] == ["0.25", "50.0%", "0.9000", "0.750", "0.100"]
    assert shown["exit 1 (two)"] == ["0.5", "30.0%", "0.9000", "0.750", "0.100"]
    assert shown["end of the backbone"] == ["20.0%", "0.6000"]


def test_without_labels_a_dash_stands_for_the_accuracy():
    results = results_with(**GOOD | {"accuracy": (None, None)})
    assert lines_of(results)["backbone"] == ["-", "1.0000", "1.0000"]
    assert "whose answer is the backbone's answer" in results.legend
    assert "whose answer is the label" in results_with(**GOOD).legend


def test_speed_has_columns_only_where_it_was_measured():
    without, timed = results_with(**GOOD), results_with(**GOOD, speedup=1.25)
    for text in (str(without), without.legend):
        assert "images/s" not in text
        assert "speed" not in text
    assert lines_of(timed)["early exit, T = 0.5"][-2:] == ["1,250", "1.25x"]
    assert str(timed).startswith("net, 1,200 images; cost in multiply-accumulates; speed on cpu in batches of 10\n")
    assert "images/s, speed: measured on cpu in batches of 10." in timed.legend


def test_the_legend_explains_every_column_and_is_not_part_of_the_table():
    results = results_with(**GOOD, speedup=1.25)
    for column in ("accuracy", "fidelity", "cost", "T", "leave here", "of these right", "AUROC", "ECE", "images/s"):
        assert re.search(rf"^{column}[:,]", results.legend, re.M)
    assert not set(results.legend.splitlines()) & set(str(results).splitlines())


def test_many_thresholds_do_not_make_the_first_table_wide():
    rows = tuple(Row(name, "", None, 1.0, 1.0) for name in ("backbone", *(f"exit {n}" for n in range(9)), "early exit"))
    text = str(Results("net", 10, [0.1 * n + 0.123456 for n in range(9)], rows, [0.1] * 10, "cpu", 10))
    assert "\nearly exit, T as below  " in text
    assert "0.1235" in text


def test_an_exit_that_is_off_is_called_off_and_not_shown_with_its_threshold():
    results = results_with(**GOOD | {"leaving": [0.5, 0.0, 0.5]}, threshold=(0.5, 2.0), off=(1,))
    shown = lines_of(results)
    assert "early exit, T = 0.5, off" in shown
    assert shown["exit 1 (two)"][:2] == ["off", "-"]
    assert not re.search(r"\b2(\.0+)?\b", str(results).replace("1,200", ""))
    said = "Off: exit 1. No image leaves there, whatever T is. ptee tune for another target may switch it on"
    assert said in str(results)
    assert results.verdict == []
    assert "Off:" not in str(results_with(**GOOD))


def test_where_every_exit_is_off_the_verdict_says_how_they_come_back():
    results = results_with(**GOOD | {"leaving": [0.0, 0.0, 1.0]}, threshold=(2.0, 2.0), off=(0, 1))
    assert results.verdict == [
        "Every exit is off, so the backbone answers all images, whatever T is. ptee tune for another target may switch exits on "
        "(in Python, by hand: set model.off = [] and model.threshold). Train longer, or give more images to choose T on."
    ]
    assert "early exit, every exit off" in lines_of(results)
    assert "Off:" not in str(results)


def test_nobody_is_told_to_lower_t_where_more_is_lost_than_was_allowed_or_all_leave_at_the_first_exit():
    dear = results_with(**GOOD | {"cost": 1.1})
    assert dear.bottom_line.endswith("Lower T, train longer, or use cheaper or fewer heads.")
    for lowest in (replace(dear, loses_too_much=True), replace(dear, leaving=[1.0, 0.0, 0.0])):
        assert lowest.bottom_line.endswith("saves. Train longer, or use cheaper or fewer heads.")


def test_where_all_leave_at_the_only_exit_that_is_on_one_sentence_says_so():
    all_leave = results_with(**GOOD | {"leaving": [1.0, 0.0, 0.0]}, threshold=(0.0, 2.0), off=(1,))
    results = replace(all_leave, truncation=(Score(0.79, 0.99, 0.7), Score(0.7, 0.9, 0.9)))
    assert results.verdict == [
        "100% of the images leave at exit 0 (one): this is a shorter network, not an adaptive one. Choose T for a smaller loss."
    ]


# the verdict

WRONG = {
    "a good one": ({}, []),
    "all at one exit": ({"leaving": [0.01, 0.98, 0.01]}, [r"98% of the images leave at exit 1 \(two\).*Raise T"]),
    "all at the end": ({"leaving": [0.0, 0.0, 1.0]}, []),
    "other answers": (
        {"fidelity": 0.9, "accuracy": (0.8, 0.75)},
        [r"10\.0% of the answers .*\(accuracy 0\.7500 instead of 0\.8000\)"],
    ),
    "other answers, and no labels": ({"fidelity": 0.9, "accuracy": (None, None)}, [r"10\.0% of the answers .*'s\. "]),
    "other answers, as many as were allowed": ({"fidelity": 0.9, "loses_too_much": False}, []),
    "other answers, more than were allowed": ({"fidelity": 0.9, "loses_too_much": True}, [r"10\.0% of the answers "]),
    "other answers, which are better": ({"fidelity": 0.9, "accuracy": (0.7, 0.75)}, []),
    "hardly cheaper": ({"cost": 0.96}, ["hardly pays: it saves 4.0% of the cost"]),
    "as dear as the backbone": (
        {"cost": 1.0},
        ["does not pay: it costs as much as the bare backbone, because leaving"],
    ),
    "as dear within rounding": (
        {"cost": 1.0004},
        ["does not pay: it costs as much as the bare backbone, because leaving"],
    ),
    "cheaper within rounding": ({"cost": 0.9996}, ["hardly pays: it saves <0.1% of the cost"]),
    "slower than the backbone": (
        {"speedup": 0.8},
        [r"30\.0% lower, but the measured time is 1\.25 times.*on cpu in batches of 10"],
    ),
    "as fast as the backbone, but for noise": ({"speedup": 0.97}, []),
    "dearer and slower": ({"cost": 1.1, "speedup": 0.8}, ["does not pay: it costs 1.100"]),
    "everything": (
        {"fidelity": 0.1, "cost": 1.2, "leaving": [1.0, 0.0, 0.0]},
        ["exit 0 .one", "90.0% of the answers", "not pay"],
    ),
    "T above 1": ({"cost": 1.2, "leaving": [0.0, 0.0, 1.0], "threshold": [1.5, 2.0]}, []),
}


@pytest.mark.parametrize(("change", "sentences"), WRONG.values(), ids=WRONG)
def test_the_verdict_says_what_is_wrong_with_the_model(change, sentences):
    results = results_with(**(GOOD | change))
    assert len(results.verdict) == len(sentences)
    for sentence, want in zip(results.verdict, sentences, strict=True):
        assert re.search(want, sentence)
        assert sentence in str(results).splitlines()
    assert results.to_dict()["verdict"] == results.verdict


@pytest.mark.parametrize(
    ("cut_off", "words"),
    [
        (Score(0.79, 0.96, 0.6), "is as accurate and costs less: accuracy 0.7900, fidelity 0.9600, cost 0.6000."),
        (Score(0.80, 0.96, 0.6), "is as accurate and costs less: accuracy 0.8000"),
        (Score(0.79, 0.99, 0.7), "is as accurate and costs the same"),
        (Score(0.78, 1, 0.6), ""),
        (Score(1, 1, 0.71), ""),
    ],
    ids=["as good for less", "better for less", "as good for the same", "worse", "dearer"],
)
def test_the_verdict_names_a_cut_off_backbone_that_is_as_accurate(cut_off, words):
    results = replace(results_with(**GOOD), truncation=(Score(0, 0, 0.1), cut_off))
    verdict = " ".join(results.verdict)
    assert ("The backbone cut off at exit 1 (two), with no other heads, " in verdict) == bool(words)
    assert words in verdict


def test_where_thresholds_were_chosen_for_fidelity_only_a_cut_off_backbone_of_as_much_fidelity_is_named():
    as_accurate, as_faithful = Score(0.8, 0.9, 0.6), Score(0.7, 0.99, 0.6)
    results = replace(results_with(**GOOD), truncation=(as_accurate,))
    wished = replace(results, for_fidelity=True)
    assert "is as accurate and costs less" in results.bottom_line
    assert wished.bottom_line == ""
    assert (
        "gives as many of the backbone's answers and costs less"
        in replace(wished, truncation=(as_faithful,)).bottom_line
    )


def test_where_rounds_of_the_speed_differ_much_a_sentence_says_so():
    noisy = replace(results_with(**GOOD, speedup=1.25), spread=0.83)
    assert "The rounds of one line differ by 83%, as where other programs run" in str(noisy)
    assert "rounds" not in str(replace(noisy, spread=0.1))


def test_where_rounds_differ_much_nothing_is_concluded_from_the_speed():
    slower = replace(results_with(**GOOD, speedup=0.8), spread=0.1)
    assert "the measured time is 1.25 times" in slower.bottom_line
    assert replace(slower, spread=0.83).bottom_line == ""


def test_the_last_line_is_that_early_exits_do_not_pay():
    text = str(replace(results_with(**GOOD | {"cost": 0.96}), outcome="Target: kept.")).splitlines()
    assert text[-2] == "Target: kept."
    assert text[-1].startswith("Early exit hardly pays")
    assert str(replace(results_with(**GOOD), outcome="Target: kept.")).splitlines()[-1] == "Target: kept."
