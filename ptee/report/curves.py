"""What is lost against what it costs: of a comparison, of one threshold for all exits, and of the runs of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from ptee._common.text import describe_thresholds
from ptee.evaluation.comparison_table import COUNTED, Comparison, Entry, Line
from ptee.report.facts import Step
from ptee.report.style import COLOURS, DASHES, NEUTRAL, figure, mark, text

SYMBOLS = {"cascade": "square", "static": "diamond", "truncation": "x", "oracle": "hexagram-open"}
OF_ADAPTIVE = ("circle", "circle-open", "triangle-up", "triangle-down", "pentagon", "hexagon", "bowtie", "hourglass")
ACCURACY, FIDELITY = "accuracy", "fidelity"
Command = Callable[[Line, Entry], str]  # what to type for an entry of a line; empty if there is nothing


def curve(comparison: Comparison, measure: str = ACCURACY, command: Command = lambda line, entry: "") -> Any:
    """Accuracy (without labels: fidelity) or fidelity against cost on the report images, a curve for each line."""
    measure = FIDELITY if comparison.accuracy is None else measure
    bare = 1.0 if measure == FIDELITY or comparison.accuracy is None else comparison.accuracy
    what = "cost" if comparison.unit == COUNTED else "time"
    drawn = figure(f"{what}, share of the bare backbone's", measure, height=600)
    drawn.add_hline(bare, line={"dash": "dot", "color": NEUTRAL, "width": 1})
    drawn.add_scatter(
        x=[1.0], y=[bare], name=text(comparison.backbone), mode="markers",
        marker={"symbol": "cross", "size": 12, "color": NEUTRAL},
    )  # fmt: skip
    for lines, look in _curves(comparison.lines):
        _add(drawn, lines, (bare, measure), look, command)
    drawn.update_xaxes(rangemode="tozero")
    drawn.update_yaxes(range=_range(comparison, bare, measure))
    return drawn


def _height(entry: Entry, bare: float, measure: str) -> float:
    return entry.fidelity if measure == FIDELITY else bare - entry.drop


def _range(comparison: Comparison, bare: float, measure: str) -> list[float]:
    """Of all lines but the cut-off backbones, which may lie so far below that everything else would be flat."""
    shown = [entry for line in comparison.lines if line.kind != "truncation" for entry in line.entries]
    ends = [_height(entry, bare, measure) for entry in shown] + [bare]
    if measure == ACCURACY:
        ends += [bare - drop for entry in shown for drop in entry.interval]
    room = 0.1 * (max(ends) - min(ends)) + 0.002
    return [min(ends) - room, max(ends) + room]


class Look(NamedTuple):
    """Of a line. In grey, dash and symbol tell it apart."""

    colour: str
    dash: str
    symbol: str


def _curves(lines: tuple[Line, ...]) -> Iterator[tuple[list[Line], Look]]:
    """Lines that are drawn as one curve, and its look. The exits at which one run is cut off are one curve.

    Each run has its colour; of a single run, each line has one.
    """
    runs = list(dict.fromkeys(line.of for line in lines))
    single = len({line.of for line in lines if line.kind == "adaptive"}) < 2
    colours = cycle(COLOURS)
    for of, of_run in zip(runs, cycle(COLOURS), strict=False):
        own = [line for line in lines if line.of == of]
        groups = [[line] for line in own if line.kind != "truncation"]
        cut_off = [line for line in own if line.kind == "truncation"]
        looks = zip(cycle(DASHES), cycle(OF_ADAPTIVE), strict=False)
        for group, (dash, symbol) in zip([*groups, *([cut_off] if cut_off else [])], looks, strict=False):
            kind = group[0].kind
            yield group, Look(next(colours) if single else of_run, dash, SYMBOLS.get(kind, symbol))


def _add(drawn: Any, lines: list[Line], of: tuple[float, str], look: Look, command: Command) -> None:
    points = [(line, entry) for line in lines for entry in line.entries]
    kind, measure = lines[0].kind, of[1]
    name = f"{lines[0].of}, truncation" if kind == "truncation" else lines[0].name
    bars = {
        "array": [entry.drop - entry.interval[0] for _, entry in points],
        "arrayminus": [entry.interval[1] - entry.drop for _, entry in points],
        "symmetric": False, "thickness": 0.6, "width": 2,
    }  # fmt: skip
    drawn.add_scatter(
        x=[entry.cost for _, entry in points], y=[_height(entry, *of) for _, entry in points],
        error_y=bars if measure == ACCURACY else None,
        mode="lines+markers" if len(points) > 1 else "markers", line={"color": look.colour, "dash": look.dash},
        marker={"symbol": look.symbol, "size": 9, "color": look.colour}, name=text(name), hoverinfo="text",
        hovertext=[_words(line, entry, command) for line, entry in points],
    )  # fmt: skip


def _words(line: Line, entry: Entry, command: Command) -> str:
    allowed = [] if entry.allowed is None else [f"allowed drop: {entry.allowed:g}" + ", missed" * entry.missed]
    thresholds = [] if entry.threshold is None else [f"T = {describe_thresholds(entry.threshold, entry.off)}"]
    to_type = [text(words)] if (words := command(line, entry)) else []
    return "<br>".join([text(line.name), *allowed, entry.words, *thresholds, *to_type])


def threshold(steps: Sequence[Step]) -> Any:
    """Accuracy, fidelity and cost against one threshold T for all exits that are on."""
    drawn = figure("T, one for all exits", "share")
    for n, name in enumerate((ACCURACY, FIDELITY, "cost", "time")):
        values = [getattr(step, name) for step in steps]
        if None not in values:
            drawn.add_scatter(x=[s.t for s in steps], y=values, name=name, mode="lines", line=mark(n)["line"])
    drawn.update_yaxes(rangemode="tozero")
    return drawn


def runs(found: Sequence[dict[str, Any]]) -> Any:
    """Accuracy (without labels: fidelity) against cost of several runs: `name`, `cost`, `accuracy`, `fidelity` and `backbone` of each.

    One backbone is a line. Where each run has another, an open mark at cost 1 is that of the run with the same mark, or at
    the end of its line.
    """
    measure = FIDELITY if any(run[ACCURACY] is None for run in found) else ACCURACY
    bare = [1.0 if measure == FIDELITY or run["backbone"] is None else run["backbone"] for run in found]
    drawn = figure("cost, share of the bare backbone's", measure)
    one, few = len(set(bare)) == 1, len(found) <= 20  # each run has a mark of its own
    if one:
        label = {"text": "backbone", "xanchor": "right"}
        drawn.add_hline(y=bare[0], line={"dash": "dot", "color": NEUTRAL}, annotation=label)
    for n, run in enumerate(found):
        of_run = mark(n if few else 0)["marker"] | {"size": 11}
        drawn.add_scatter(
            x=[run["cost"]], y=[run[measure]], name=text(run["name"]), mode="markers", showlegend=few, hoverinfo="name+x+y",
            marker=of_run,
        )  # fmt: skip
        if not one:
            open_mark = of_run | {"symbol": f"{of_run['symbol']}-open"}
            x, y, mode = (
                ([1.0], [bare[n]], "markers") if few else ([run["cost"], 1.0], [run[measure], bare[n]], "lines+markers")
            )
            drawn.add_scatter(
                x=x, y=y, name=f"{text(run['name'])}, backbone", mode=mode, showlegend=False, hoverinfo="name+x+y", marker=open_mark,
                line={"color": NEUTRAL, "width": 0.5},
            )  # fmt: skip
    if not one:
        drawn.add_scatter(
            x=[None],
            y=[None],
            name="open: its backbone",
            mode="markers",
            marker={"symbol": "circle-open", "color": NEUTRAL},
        )
    return drawn


def over_setting(found: Sequence[dict[str, Any]], setting: str) -> Any:
    """Accuracy, fidelity and cost of several runs against one setting, such as lambda; means over the runs of one value."""
    numbers = all(isinstance(run[setting], int | float) for run in found)
    found = [run if numbers else run | {setting: text(str(run[setting]))} for run in found]
    values = list(dict.fromkeys(run[setting] for run in found))
    if numbers:
        values.sort()
    mode = "lines+markers" if numbers else "markers"  # nothing lies between two names
    drawn = figure(text(setting), "share")
    for n, name in enumerate((ACCURACY, FIDELITY, "cost")):
        groups = [[run[name] for run in found if run[setting] == value and run[name] is not None] for value in values]
        if not all(groups):
            continue
        means = [sum(group) / len(group) for group in groups]
        spread = {
            "array": [max(g) - m for g, m in zip(groups, means, strict=True)],
            "arrayminus": [m - min(g) for g, m in zip(groups, means, strict=True)], "symmetric": False,
        }  # fmt: skip
        drawn.add_scatter(x=values, y=means, error_y=spread, name=name, mode=mode, **mark(n))
    if not numbers:
        drawn.update_xaxes(type="category")
    return drawn
