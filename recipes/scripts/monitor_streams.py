"""How soon does model.monitor find that fidelity fell, and how often does it err? python recipes/scripts/monitor_streams.py

Streams of images are simulated: in each an image is audited with the chance given, and its answer differs from the backbone's with a chance of 1 %, which is
just what is promised, and of 5 % after the fall. Found: an alarm between the fall and 20,000 images later. False: an alarm before it.
"""

from __future__ import annotations

from statistics import median

import click
import numpy as np

from ptee._common.text import table
from ptee.production.promise_test import PromiseTest

PROMISED, FALLEN, WITHIN = 0.01, 0.05, 20_000


def alarm(random: np.random.Generator, audit: float, confidence: float, before: int, after: int) -> float | None:
    """Images from the fall to the alarm; below 0 for one before it, None for none."""
    audited = [random.binomial(images, audit) for images in (before, after)]
    rates = np.repeat([PROMISED, FALLEN], audited)
    test = PromiseTest(PROMISED, 1 - confidence)
    for n, differs in enumerate((random.random(len(rates)) < rates).tolist(), 1):
        if test.see(differs) is not None:
            return (n - audited[0]) / audit
    return None


def line(audit: float, confidence: float, before: int, after: int, streams: int) -> tuple[str, ...]:
    """A row of the table."""
    random = np.random.default_rng(0)
    found = [alarm(random, audit, confidence, before, after) for _ in range(streams)]
    right = [images for images in found if images is not None and images > 0]
    false = sum(images is not None and images <= 0 for images in found)
    delay = f"{median(right):,.0f}" if right else "-"
    return f"{audit:g}", f"{before:,}", f"{false} of {streams}", f"{len(right)} of {streams}" if after else "-", delay


@click.command(help=__doc__)
@click.option("--streams", default=100, show_default=True)
@click.option("--confidence", default=0.95, show_default=True)
@click.option("--audits", default="0.01,0.02,0.05", show_default=True)
@click.option("--most", default=1_000_000, show_default=True, help="Images of the longest streams.")
def main(streams: int, confidence: float, audits: str, most: int) -> None:
    """Print a table."""
    rows = []
    for audit in (float(share) for share in audits.split(",")):
        rows += [line(audit, confidence, before, WITHIN, streams) for before in (0, 100_000)]
        rows.append(line(audit, confidence, most, 0, streams))
    head = ("audit", "images before the fall", "false alarms", f"found within {WITHIN:,}", "images until then (median)")
    click.echo(table([head, *rows]))


if __name__ == "__main__":
    main()
