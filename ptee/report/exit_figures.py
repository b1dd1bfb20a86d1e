"""Figures of the exits themselves: where they stand, who leaves there, how sure they are, what they learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ptee.report.facts import Columns, Reliability, Step
from ptee.report.style import COLOURS, NEUTRAL, RIGHT, WRONG, figure, finish, mark, short, text

EACH = 190  # pixels of height for each exit
BLOCK, HEAD = "#9BB7D4", "#E69F00"


class Block(NamedTuple):
    """A part of the backbone: the module at which it ends, and its share of the cost up to there."""

    name: str
    until: float


class Place(NamedTuple):
    """Where an exit stands: its module and head, both in shares of the backbone's cost; and of its time, if that is known."""

    module: str
    head: str
    until: float
    head_cost: float
    time: float | None
    off: bool


def exit_names(exits: int) -> list[str]:
    """What the places are called at which images leave."""
    return [*(f"exit {n}" for n in range(exits)), "end"]


def shares(step: Step, labelled: bool) -> Any:
    """How many images leave at each exit, and how many of them are right."""
    names = exit_names(len(step.right) - 1)
    drawn = figure("", "share of the images", barmode="stack", height=340)
    words = ("right", "wrong") if labelled else ("the backbone's answer", "another answer")
    for values, name, look in zip((step.right, step.wrong), words, (RIGHT, WRONG), strict=True):
        drawn.add_bar(x=names, y=values, name=name, marker=look, hovertemplate="%{x}: %{y:.1%}")
    drawn.update_yaxes(range=[0, 1], tickformat=".0%")
    return drawn


def network(blocks: Sequence[Block], exits: Sequence[Place]) -> Any:
    """The backbone from left to right, as wide as what it costs; an exit below the place where it stands, its head as wide."""
    drawn = figure(
        "cost, share of the bare backbone's", "", barmode="overlay", showlegend=False, height=150 + 62 * len(exits)
    )
    starts = [0.0, *(block.until for block in blocks[:-1])]
    drawn.add_bar(
        orientation="h", y=["backbone"] * len(blocks), base=starts, name="block of the backbone",
        x=[block.until - start for block, start in zip(blocks, starts, strict=True)], width=0.55,
        marker={"color": BLOCK, "line": {"color": "#335", "width": 1}}, hoverinfo="text",
        hovertext=[
            f"{text(block.name)}<br>{block.until - start:.1%} of the cost, {block.until:.1%} up to its end"
            for block, start in zip(blocks, starts, strict=True)
        ],
    )  # fmt: skip
    rows = [f"exit {n}" for n in range(len(exits))]
    drawn.add_bar(
        orientation="h", y=rows, base=[place.until for place in exits], x=[place.head_cost for place in exits], width=0.55,
        name="head of an exit", marker={"color": HEAD, "line": {"color": "#533", "width": 1}, "pattern": {"shape": "/", "bgcolor": HEAD, "fgcolor": "#4d3000"}},
        hoverinfo="text", hovertext=[_of(place) for place in exits],
    )  # fmt: skip
    for row, place in zip(rows, exits, strict=True):
        drawn.add_scatter(
            x=[place.until, place.until], y=["backbone", row], mode="lines", line={"color": NEUTRAL, "dash": "dot"},
            showlegend=False, hoverinfo="skip",
        )  # fmt: skip
        at_the_right = place.until + place.head_cost < 0.5
        drawn.add_annotation(
            x=place.until + place.head_cost if at_the_right else place.until, y=row, text=_label(place), showarrow=False,
            align="left" if at_the_right else "right", xanchor="left" if at_the_right else "right", xshift=6 if at_the_right else -6, font={"size": 11},
        )  # fmt: skip
    drawn.update_xaxes(tickformat=".0%", range=[0, max(1.0, *(p.until + p.head_cost for p in exits)) * 1.01])
    drawn.update_yaxes(categoryorder="array", categoryarray=[*reversed(rows), "backbone"], showgrid=False)
    return drawn


def _label(place: Place) -> str:
    time = "" if place.time is None else f"<br>{place.time:.0%} of the time"
    return f"{short(place.module, 18)}{' (off)' * place.off}<br>{place.until:.0%}, head {place.head_cost:.1%}{time}"


def _of(place: Place) -> str:
    return f"behind {text(place.module)}, {place.until:.1%} of the cost<br>head {text(place.head)}, {place.head_cost:.1%} of the cost"


def confidence(columns: Sequence[Columns], thresholds: Sequence[float | None], labelled: bool) -> Any:
    """How sure each exit is of right and of wrong answers; a line where T stands (None: the exit is off)."""
    drawn = _one_below_the_other(
        len(columns), "confidence h", [f"exit {n}: share of the images" for n in range(len(columns))]
    )
    words = ("right", "wrong") if labelled else ("the backbone's answer", "another answer")
    for row, (found, t) in enumerate(zip(columns, thresholds, strict=True), 1):
        highest = max(a + b for a, b in zip(found.right, found.wrong, strict=True))
        drawn.update_yaxes(range=[0, 1.3 * highest], row=row, col=1)  # with room for the words beside T
        for values, name, look in zip((found.right, found.wrong), words, (RIGHT, WRONG), strict=True):
            drawn.add_bar(
                x=found.middles, y=values, name=name, marker=look, showlegend=row == 1, row=row, col=1,
                hovertemplate="h = %{x:.3f}: %{y:.1%}",
            )  # fmt: skip
        if t is not None and t <= 1:
            drawn.add_vline(
                t, line={"color": COLOURS[5], "dash": "dash", "width": 2}, row=row, col=1,
                annotation={"text": f"T = {t:.3g}", "xanchor": "right" if t > 0.2 else "left", "xshift": -4 if t > 0.2 else 4},
            )  # fmt: skip
    drawn.update_layout(barmode="stack", bargap=0.05)
    drawn.update_yaxes(tickformat=".0%")
    return drawn


def _one_below_the_other(rows: int, x: str, titles: Sequence[str]) -> Any:
    from plotly.subplots import make_subplots

    height = EACH * rows + 90
    drawn = make_subplots(rows, 1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=min(0.3, 46 / height))
    finish(drawn, height=height, legend={"orientation": "h", "x": 0, "y": -75 / (height - 150), "yanchor": "top"})
    drawn.update_annotations(x=0, xanchor="left", font={"size": 13})
    drawn.update_xaxes(range=[0, 1.005])
    drawn.update_xaxes(title=x, row=rows, col=1)
    return drawn


def reliability(found: Sequence[Reliability], agreement: bool) -> Any:
    """Whether h can be read as a probability: on the diagonal it can."""
    truth = "share that agrees with the backbone" if agreement else "share that is right"
    drawn = figure("confidence h, mean of a bin", truth, height=460)
    drawn.add_scatter(
        x=[0, 1],
        y=[0, 1],
        mode="lines",
        name="h as it should be",
        line={"color": NEUTRAL, "dash": "dot"},
        hoverinfo="skip",
    )
    for n, own in enumerate(found):
        drawn.add_scatter(
            x=own.said, y=own.true, name=f"exit {n}", mode="lines+markers", customdata=own.images,
            hovertemplate="h = %{x:.3f}: %{y:.1%} of %{customdata:,} images", **mark(n),
        )  # fmt: skip
    drawn.update_xaxes(range=[0, 1.02])
    drawn.update_yaxes(range=[0, 1.03])
    return drawn


def confusion(pairs: Sequence[tuple[int, int, int]], names: Sequence[str]) -> Any:
    """Which classes early exits mix up that the backbone tells apart; the most frequent pairs."""

    def name(k: int) -> str:
        return short(names[k], 18) if k < len(names) else f"class {k}"

    rows = [f"{name(truth)} → {name(answer)}" for truth, answer, _ in pairs]
    drawn = figure("images", "", height=120 + 26 * len(pairs))
    drawn.add_bar(
        orientation="h",
        y=rows,
        x=[count for *_, count in pairs],
        marker={"color": COLOURS[1]},
        hovertemplate="%{y}: %{x}",
    )
    drawn.update_yaxes(autorange="reversed", type="category")
    drawn.update_xaxes(rangemode="tozero", dtick=1 if pairs[0][2] < 6 else None)
    return drawn


def training(epochs: Sequence[Mapping[str, Any]]) -> Any:
    """The loss, and how often each exit agrees with the backbone on training images, epoch by epoch."""
    drawn = _one_below_the_other(2, "epoch", ["loss", "fidelity on training images"])
    number = [epoch["number"] for epoch in epochs]
    for name, key in (("loss", "loss"), ("validation loss", "val_loss")):
        if epochs[0][key] is not None:
            look = mark(0 if key == "loss" else 1)
            drawn.add_scatter(
                x=number, y=[e[key] for e in epochs], name=name, mode="lines+markers", row=1, col=1, **look
            )
    for n in range(len(epochs[0]["fidelity"]) - 1):
        values = [epoch["fidelity"][n] for epoch in epochs]
        drawn.add_scatter(x=number, y=values, name=f"exit {n}", mode="lines+markers", row=2, col=1, **mark(n + 2))
    drawn.update_xaxes(range=[0.5, number[-1] + 0.5])
    return drawn


def epochs(found: Sequence[Mapping[str, Any]], costs: Sequence[float]) -> Any:
    """Loss, cost, and how often each answer is right (without labels: the backbone's) on training images, epoch by epoch.

    `costs` (E+1,) are those of leaving at each exit; images leave at the thresholds that the training had.
    """
    measure = "fidelity" if found[0]["accuracy"] is None else "accuracy"
    drawn = _one_below_the_other(3, "epoch", ["loss", f"{measure} of each answer", "cost"])
    number = [epoch["number"] for epoch in found]
    spent = [sum(share * cost for share, cost in zip(epoch["leaving"], costs, strict=True)) for epoch in found]
    answers = zip(exit_names(len(costs) - 1), zip(*(epoch[measure] for epoch in found), strict=True), strict=True)
    lines = [
        ("loss", 1, [epoch["loss"] for epoch in found]),
        *((name, 2, own) for name, own in answers),
        ("cost", 3, spent),
    ]
    for n, (name, row, values) in enumerate(lines):
        drawn.add_scatter(x=number, y=values, name=name, mode="lines+markers", row=row, col=1, **mark(n))
    drawn.update_xaxes(range=[0.5, number[-1] + 0.5], dtick=1 if len(number) < 20 else None)
    return drawn
