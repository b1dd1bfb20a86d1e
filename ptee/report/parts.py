"""The parts of a page, in its order. A part is left out where the run has not what it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptee._common.text import quoted
from ptee.evaluation.comparison_table import COUNTED, Entry, Line
from ptee.evaluation.results import foretells_agreement, foretold
from ptee.report import curves, exit_figures, facts, words
from ptee.report.blocks import blocks_of
from ptee.report.gallery import Row, gallery
from ptee.report.reported import Reported
from ptee.report.style import COLOURS
from ptee.report.words import Number

STAR, OWN_STAR = "at the slider's thresholds", "at the run's own thresholds"
SLIDER = "The slider sets one T for all exits that are on: it moves the star and the columns. The run's own thresholds differ from exit to exit."
POINT = {"symbol": "star", "size": 17, "color": COLOURS[5], "line": {"width": 1, "color": "#000000"}}


@dataclass(frozen=True)
class Slider:
    """Texts and commands for each place of the slider, the run's own thresholds last, and what it moves in which figure."""

    words: list[str]
    commands: list[str]
    moves: list[dict[str, Any]]
    start: int


WAYS = (
    'The lines: a run by its own thresholds, one for each exit. "one T": the same for all exits. "max probability", "entropy": with that as '
    'the confidence instead of the run\'s own. "patience": an image leaves when enough exits in a row agree. "oracle": every image leaves at the first '
    'exit that agrees with the backbone, which nothing can know beforehand; exits that cost more than they save are off. "truncation": the backbone cut off at an exit, for every image.'
)
CHEAPEST = (
    "These stay within the drop on the images that thresholds were chosen on, and on those of this page. A mark above may do so by chance on these alone. "
    "As both take part in the choice, the drop of the line that is named is a little too good here. An evaluation on other images says what it is on new ones."
)
SWEEP = (
    "What all images get if every exit has the same T. Above T = 1 no image leaves: the answers are the backbone's, and the cost is above 1, "
    "because the heads run for nothing."
)


@dataclass(frozen=True)
class Part:
    """A part of a page: words first, then what there is to see."""

    key: str
    title: str
    words: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)  # by key
    numbers: Sequence[Number] = ()
    rows: Sequence[Sequence[str]] = ()
    gallery: Sequence[Row] = ()
    texts: Sequence[tuple[str, str]] = ()
    slider: Slider | None = None


def parts(of: Reported) -> list[Part]:
    """All parts that the run has something for."""
    return [part for make in ORDER for part in make(of)]


# ---------------------------------------------------------------------------------------------------- what it gives


def _summary(of: Reported) -> Iterator[Part]:
    said = [*words.what_it_is(of.model), *words.what_it_gives(of), *words.recorded_verdict(of)]
    yield Part("summary", "In short", said, numbers=words.numbers(of))


def _thresholds(of: Reported) -> Iterator[Part]:
    if of.traces is None or of.comparison is None or of.own is None:
        return
    every = facts.steps(of.traces, of.model.off)
    all_off = len(of.model.off) == of.traces.exits  # then no threshold changes anything
    star = OWN_STAR if all_off else STAR
    drawn = {curves.ACCURACY: curve(of, curves.ACCURACY, star)}
    if of.comparison.accuracy is not None:  # else the first shows fidelity
        drawn[curves.FIDELITY] = curve(of, curves.FIDELITY, star)
    drawn["shares"] = exit_figures.shares(of.own, of.traces.targets is not None)
    said = [
        "An image leaves at the first exit whose confidence h is at least T. A low T is cheap, a high T is faithful. "
        + ("Every exit of this run is off, so the backbone answers all images, whatever T is." if all_off else SLIDER),
        f"Up and to the left is better. Cost is a share of {of.comparison.unit}. Fidelity is the share of answers that are the backbone's. "
        "Bars are 95 % intervals of what is lost of accuracy. Point at a mark for its thresholds and what to type; tap a name to hide its line; "
        "double-click a figure to see all, also marks far below the others.",
        WAYS,
    ]
    slider = None if all_off else _slider(of, every, of.own)
    yield Part("thresholds", "What it saves and loses", said, drawn, slider=slider)
    yield Part("alternatives", "What is cheapest", [*words.cheapest(of), CHEAPEST])
    if not all_off:
        yield Part("sweep", "One threshold for all exits", [SWEEP], {"sweep": curves.threshold(every)})


def curve(of: Reported, measure: str, star: str = OWN_STAR) -> Any:
    """The curve with the run's own point on it, called `star`, which the slider moves: it is the last of the figure."""
    assert of.comparison is not None and of.own is not None
    drawn = curves.curve(of.comparison, measure, lambda line, entry: command(of, line, entry))
    y = of.own.fidelity if measure == curves.FIDELITY else of.own.merit
    low, high = drawn.layout.yaxis.range
    drawn.update_yaxes(range=[min(low, y - 0.05 * (high - low)), max(high, y + 0.05 * (high - low))])
    return drawn.add_scatter(x=[_price(of, of.own)], y=[y], mode="markers", name=star, marker=POINT, hoverinfo="x+y")


def _price(of: Reported, step: facts.Step) -> float:
    """What the curve counts: cost, or the time if it was asked for."""
    by_time = of.comparison is not None and of.comparison.unit != COUNTED
    return step.time if by_time and step.time is not None else step.cost


def command(of: Reported, line: Line, entry: Entry) -> str:
    """What to type to give a run the thresholds of an entry; empty for lines that no command gives."""
    how: dict[str, dict[str, Any]] = {
        "": {"answers": of.model.answers}, ", blended": {"answers": "blended"}, ", one T": {"one_threshold": True},
    }  # fmt: skip
    more = how.get(line.name.removeprefix(line.of)) if line.kind == "adaptive" else None
    if more is None or entry.allowed is None or line.of not in of.folders or of.comparison is None:
        return ""
    wish = {"max_fidelity_drop" if of.comparison.accuracy is None else "max_drop": entry.allowed} | more
    if of.in_python:
        return f"ptee.tune(model, calibration_data, {', '.join(f'{name}={value!r}' for name, value in wish.items())})"
    if of.comparison.unit != COUNTED and of.times is not None:
        wish |= {"cost": "time", "at_batch": of.times.batch}
    texts = {name: f" {value:g}" if isinstance(value, float) else f" {value}" for name, value in wish.items()}
    typed = [f" --{name.replace('_', '-')}{'' if wish[name] is True else text}" for name, text in texts.items()]
    return f"ptee tune {quoted(of.folders[line.of])}{''.join(typed)}"


def _slider(of: Reported, every: list[facts.Step], own: facts.Step) -> Slider:
    states = [*every, own]
    moves: list[dict[str, Any]] = []
    assert of.comparison is not None
    merits = {curves.ACCURACY: [s.merit for s in states]}
    if of.comparison.accuracy is not None:
        merits[curves.FIDELITY] = [s.fidelity for s in states]
    x = [[_price(of, s)] for s in states]
    moves += [{"figure": key, "trace": -1, "x": x, "y": [[v] for v in y]} for key, y in merits.items()]
    moves += [
        {"figure": "shares", "trace": n, "y": y}
        for n, y in enumerate(([s.right for s in states], [s.wrong for s in states]))
    ]
    start = min(range(len(every)), key=lambda n: abs(every[n].cost - own.cost))
    typed = [words.command(of, s) for s in states]
    return Slider([words.of_step(of, s) for s in states], typed, moves, start)


# ---------------------------------------------------------------------------------------------------- the exits


def _network(of: Reported) -> Iterator[Part]:
    said = (
        "The backbone from left to right, each block as wide as what it costs. An exit stands where its dotted line meets the backbone; "
        "its head is as wide as what it adds. An image that goes on has paid for all heads on its way."
    )
    rows = words.exits_table(of)
    yield Part("network", "Where the exits stand", [said], {"network": network(of)}, rows=rows)


def network(of: Reported) -> Any:
    """The drawing of the blocks."""
    plan, times = of.model.plan, words.times_until(of.times)
    places = [
        exit_figures.Place(e.name, e.head, e.backbone_cost, e.head_cost, times[n] if times else None, n in plan.off)
        for n, e in enumerate(plan.exits)
    ]
    return exit_figures.network(blocks_of(of.model), places)


def _confidence(of: Reported) -> Iterator[Part]:
    if of.traces is None:
        return
    said = "Of all images, whether they came so far or not. Images to the right of T leave, if they come to this exit."
    yield Part("confidence", "How sure each exit is", [said], {"confidence": confidence(of)})
    true = "the backbone's" if foretells_agreement(of.model) else "right"
    said = (
        f"On the dotted line, h is a probability: of the images with h = .9, nine of ten answers are {true}. Below it, the exit is too "
        "sure. Bins of fewer than ten images are left out. Calibration error: the mean distance from that line. AUROC: the chance "
        "that a right answer has a higher h than a wrong one; .5 is a coin, 1 is best."
    )
    traces = of.traces
    found = [facts.reliability(traces.confidence[n], foretold(of.model, traces, n)) for n in range(traces.exits)]
    rows = words.calibration_table(of)
    yield Part(
        "calibration",
        "Is h a probability?",
        [said],
        {"reliability": exit_figures.reliability(found, foretells_agreement(of.model))},
        rows=rows,
    )


def confidence(of: Reported) -> Any:
    """The columns of h."""
    assert of.traces is not None
    found = [facts.histogram(of.traces.confidence[n], of.traces.right[n]) for n in range(of.traces.exits)]
    at = [None if n in of.model.off else t for n, t in enumerate(of.model.threshold)]
    return exit_figures.confidence(found, at, of.traces.targets is not None)


def _confusion(of: Reported) -> Iterator[Part]:
    if of.traces is None or not (pairs := facts.mixed_up(of.traces, of.leaving)):
        return
    said = words.confusion(of, sum(count for *_, count in pairs))
    yield Part(
        "confusion", "What early exits mix up", list(said), {"confusion": exit_figures.confusion(pairs, of.names)}
    )


def _gallery(of: Reported) -> Iterator[Part]:
    if of.images is None or not (rows := pictures(of)):
        return
    said = (
        "As the network sees them. Under each what the exit said and how sure it was. Of the wrong answers, those that the backbone "
        "gets right come first."
    )
    yield Part("gallery", "Which images leave where", [said], gallery=rows)


def pictures(of: Reported) -> list[Row]:
    """Some images that left at each exit."""
    assert of.traces is not None
    return gallery(of.traces, of.leaving, of.images, of.names, of.model.origin.input)


# ---------------------------------------------------------------------------------------------------- how it was made


def _training(of: Reported) -> Iterator[Part]:
    training = of.metrics.get("training") or {}
    if epochs := training.get("epochs"):
        end = "Interrupted." * bool(training.get("interrupted")) or "Stopped early." * bool(
            training.get("stopped_early")
        )
        said = [text for text in (end, training.get("warning") or "") if text]
        yield Part("training", "How the heads learned", said, {"training": exit_figures.training(epochs)})


def _made(of: Reported) -> Iterator[Part]:
    texts = [("Plan", str(of.model.plan))]
    texts += [("Recipe", of.recipe)] * bool(of.recipe)
    if of.comparison is not None:
        texts.insert(0, ("The whole table", f"{of.comparison}\n\n{of.comparison.legend}"))
    yield Part("made", "How it was made", [text for text in (of.about,) if text], rows=words.made(of), texts=texts)


ORDER = (_summary, _thresholds, _network, _confidence, _confusion, _gallery, _training, _made)
