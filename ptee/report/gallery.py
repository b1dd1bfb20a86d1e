"""Small pictures of images that left at an exit, made from what the network saw."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from ptee._common.text import number_of
from ptee.report.facts import spread_over
from ptee.report.style import figure, short, text
from ptee.tuning.traces import Traces, at_exits

SIDE, MOST = 96, 8  # pixels; pictures in a row


@dataclass(frozen=True)
class Picture:
    """A thumbnail, with what is said about it."""

    data: str  # a data: address
    words: tuple[str, ...]  # a line each


@dataclass(frozen=True)
class Row:
    """Some pictures under a heading."""

    title: str
    pictures: tuple[Picture, ...]


def gallery(traces: Traces, leaving: Tensor, images: Any, names: Sequence[str], pixels: Any) -> list[Row]:
    """Some images that left at each exit, and some of those whose early answer is wrong.

    Args:
        traces: of the images.
        leaving: (n,) the exit at which each leaves.
        images: the map-style data set that the traces were recorded from.
        names: of the classes.
        pixels: `mean` and `std` by which the images were prepared.
    """
    right, exits = at_exits(traces.right, leaving), traces.exits
    found: list[Row] = []
    for n in range(exits + 1):
        where = f"at exit {n}" if n < exits else "at the end of the backbone"
        well, wrong = (leaving == n) & right, (leaving == n) & ~right
        groups = [(f"Answered rightly {where}", well, spread_over(well.nonzero()[:, 0], MOST))]
        # Those first that the backbone would have answered rightly.
        groups.append((f"Answered wrongly {where}", wrong, _lost_first(traces, wrong)))
        for title, which, places in groups:
            shown = tuple(_picture(traces, leaving, images, i, names, pixels) for i in places)
            found += [Row(f"{title} ({number_of(int(which.sum()), 'image')})", shown)] if shown else []
    return found


def _lost_first(traces: Traces, which: Tensor) -> list[int]:
    """Some of the images, spread over all of them; those that the backbone alone has right come first."""
    right = traces.alone.right[-1] & ~traces.right.all(0)
    lost, others = ((which & chosen).nonzero()[:, 0] for chosen in (right, ~right))
    first = spread_over(lost, MOST)
    return first + spread_over(others, MOST - len(first))


def _picture(traces: Traces, leaving: Tensor, images: Any, i: int, names: Sequence[str], pixels: Any) -> Picture:
    def name(k: int) -> str:
        return names[k] if k < len(names) else f"class {k}"

    n = int(leaving[i])
    said, bare = int(traces.answers[n, i]), int(traces.bare[i])
    words = [f"{name(said)}, h = {traces.confidence[n, i]:.2f}" if n < traces.exits else name(said)]
    if bare != said:
        words.append(f"backbone: {name(bare)}")
    if traces.targets is not None and int(traces.targets[i]) != said:
        words.append(f"label: {name(int(traces.targets[i]))}")
    return Picture(thumbnail(images[i][0], pixels.mean, pixels.std), tuple(words))


def thumbnail(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> str:
    """An image (c, h, w) as the network takes it, as a small PNG or JPEG in a data: address."""
    from torchvision.transforms.functional import to_pil_image

    scale, shift = (torch.tensor(list(x), dtype=torch.float32, device="cpu")[:, None, None] for x in (std, mean))
    pixels = ((image.float().cpu() * scale + shift).nan_to_num(0).clamp(0, 1) * 255).round().byte()
    small = to_pil_image(pixels[:3] if len(pixels) >= 3 else pixels[:1])
    kind = "PNG" if max(small.size) <= SIDE // 2 else "JPEG"
    small.thumbnail((SIDE, SIDE))
    file = BytesIO()
    small.save(file, kind, **({"quality": 80} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(rows: Sequence[Row]) -> Any:
    """The gallery as a figure."""
    drawn = figure("", "", height=80 + 205 * len(rows), width=40 + 130 * MOST)
    for y, row in enumerate(rows):
        drawn.add_annotation(
            x=0, y=-y + 0.06, text=f"<b>{text(row.title)}</b>", showarrow=False, xanchor="left", yanchor="bottom"
        )
        for x, shown in enumerate(row.pictures):
            where = {"x": x, "y": -y, "xref": "x", "yref": "y", "sizex": 0.92, "sizey": 0.54}
            drawn.add_layout_image(source=shown.data, xanchor="left", yanchor="top", **where)
            words = "<br>".join(short(line, 20) for line in shown.words)
            drawn.add_annotation(
                x=x,
                y=-y - 0.56,
                text=words,
                showarrow=False,
                xanchor="left",
                yanchor="top",
                align="left",
                font={"size": 10},
            )
    drawn.update_xaxes(range=[0, MOST], visible=False)
    drawn.update_yaxes(range=[-len(rows) + 0.04, 0.3], visible=False)
    return drawn
