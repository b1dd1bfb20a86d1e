"""The model card: README.md of a run, with what was measured, for people and for the hub."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptee._common.text import number_of, printable, threshold_words
from ptee.model.run_files import CARD

OWN = "<!-- Written by ptee, and again whenever the run changes. Delete this line to keep a text of your own. -->"
LARGEST_CARD = 2**20  # bytes
TEMPLATE = f"---\n{{{{ card_data }}}}\n---\n{OWN}\n\n{{{{ about }}}}\n"
AGAIN = "Measure again and save it: `ptee.evaluate(model, data, keep=True)`."
LIMITS = """\
- All numbers are means over the images named above. Other images (another camera, another season) cost and lose something else:
  measure on yours, and watch the model in use (`model.monitor()`).
- Cost is counted in multiply-accumulates, heads included. Time depends on the device and the batch.
- Where exits answer, a wrong answer can be one that the backbone alone would have given right, also if the means are equal."""


def text_for(model: Any, folder: Path, more: Mapping[str, Any] | None = None) -> str | None:
    """The text of README.md; None if the folder has one that somebody wrote. `more`: for the template."""
    there = folder / CARD
    if there.is_file() and not is_own(there):
        return None
    return str(model.generate_model_card(**{"about": about(model), **(more or {})}))


def is_own(card: Path) -> bool:
    """Whether ptee wrote it. One that cannot be read, or is longer, somebody else wrote."""
    try:
        with card.open("rb") as file:
            return OWN.encode() in file.read(LARGEST_CARD)
    except OSError:
        return False


def about(model: Any) -> str:
    """What is known of a model, in Markdown."""
    results = model.results if isinstance(model.results, dict) else {}
    measured = _measured(results)
    if others := other_settings(model, results):
        measured = f"{measured}\n\n{_plain(others)} {AGAIN}"
    parts = [
        f"# Early exits for {_plain(model.plan.backbone)}",
        f"Early-exit heads made with ptee for the frozen classifier {_plain(model.plan.backbone)}, {model.num_classes:,} classes."
        if not model.origin.learnt
        else f"{_plain(model.plan.backbone)}, {model.num_classes:,} classes, trained together with early exits by ptee.",
        f"## Use\n\n{_use(model)}",
        f"## Measured\n\n{measured}",
        f"## Settings\n\n{_settings(model, results)}",
        f"## Limits\n\n{LIMITS}",
    ]
    return "\n\n".join(parts)


def _use(model: Any) -> str:
    images = model.origin.input
    given = "" if model.origin.source is not None else ", backbone=backbone"
    weights = "are in this folder" if model.origin.learnt else "are not in this folder; config.json has their hash"
    return (
        f'```python\nimport ptee\nmodel = ptee.load("user/repo"{given})          # or a folder\nout = model.predict(images)'
        "                 # .logits .exit_index .confidence .cost\n"
        "model.threshold = 0.9                        # leave later, or earlier: accuracy for cost, at any time\n```\n\n"
        f"`images` is (b, {', '.join(map(str, images.input_size))}), {_normalised(model)}. The backbone's weights {weights}."
    )


def _normalised(model: Any) -> str:
    """How images are normalised, as far as that is known."""
    images = model.origin.input
    if not model.origin.pixels_known:
        return "prepared as for the backbone itself (their mean and std are not recorded: nobody gave them)"
    resized = f"; pictures are resized by {images.interpolation}" if model.origin.source is not None else ""
    return f"{images.normalised}{resized}"


def _measured(results: Mapping[str, Any]) -> str:
    try:
        bare, own = results["rows"][0], results["rows"][-1]
        names = ["accuracy", "fidelity", "cost"] + ["images_per_s", "speedup"] * (own["speedup"] is not None)
        head = ["", *(_plain(name) for name in names)]
        rows = [
            [name, *(_number(row[key]) for key in names)] for name, row in (("backbone", bare), ("early exits", own))
        ]
        lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
        about = _plain(results["about"])
        words = [f"On {number_of(int(results['samples']), 'image')}.{f' Data: {about}' * bool(about)}"]
        if own["speedup"] is not None:
            ms = 1e3 / own["images_per_s"]
            words.append(
                f"{ms:.3g} ms for an image on {_plain(results['device'])} in batches of {int(results['batch_size'])}; the bare backbone "
                f"takes {own['speedup']:.2f} times that. Measured in turns."
            )
        words += [_plain(results[key]) for key in ("seen", "outcome", "bottom_line") if results.get(key)]
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        return "Nothing yet."
    return "\n".join(lines) + "\n\n" + " ".join(words)


def other_settings(model: Any, results: Mapping[str, Any]) -> str:
    """A sentence, if results were measured with other settings than the model has now, else none."""
    try:
        thresholds = _thresholds([float(t) for t in results["threshold"]], results.get("off") or ())
    except (KeyError, TypeError, ValueError):
        return ""
    then_and_now = {
        "other thresholds": (thresholds, _thresholds(model.threshold, model.off)),
        "another confidence": (results.get("confidence"), model.confidence),
        "other answers": (results.get("answers"), model.answers),
    }
    others = [
        f"{what} ({then}) than the model has now ({now})"
        for what, (then, now) in then_and_now.items()
        if then and then != now  # a run of an older ptee says less
    ]
    if not others:
        return ""
    return f"These numbers were measured with {' and '.join(others)}, so they are not its own."


def _thresholds(values: Sequence[float], off: Collection[int]) -> str:
    return ", ".join(threshold_words(values, tuple(off)))


def _settings(model: Any, results: Mapping[str, Any]) -> str:
    images, tuning = results.get("data"), results.get("tuning")
    source = images.get("source") if isinstance(images, dict) else None
    chosen = tuning.get("images") if isinstance(tuning, dict) else None
    cfg = getattr(model.origin.module, "pretrained_cfg", None)
    licence = cfg.get("license") if isinstance(cfg, dict) else None
    exits = ", ".join(f"{_plain(e.name)} ({_plain(e.head)})" for e in model.exits)
    lines = {
        "exits (heads)": exits,
        "thresholds": _thresholds(model.threshold, model.off),
        "confidence": _plain(model.confidence),
        "answers": _plain(model.answers),
        "data": _plain(str(source or "not recorded")) + (f". {_plain(str(chosen))}" if chosen else ""),
        "licence of the backbone": _plain(str(licence or "not known to ptee; ask whoever published its weights")),
    }
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.4g}"


def _plain(text: Any) -> str:
    """A text of anybody in one line of Markdown, in which nothing is a tag or a cell."""
    words = html.escape(" ".join(printable(str(text)).split()), quote=False).replace("`", "'")
    return re.sub(r"([|\[\]!])", r"\\\1", words)  # no cell, link or picture
