"""One process, two processes and Ray answer the same images: differences of answers and confidences, and what is measured by each.

python recipes/scripts/same_traces.py RUN SOURCE WORK
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ptee
from ptee.data import shards
from ptee.tuning.traces import Traces

WAYS = {"one process": ("local", 1), "two processes": ("local", 2), "Ray, two actors": ("ray", 2)}


def figures(run: str, folder: object) -> str:
    """Accuracy and cost at the thresholds that half of the images chooses, on all of them."""
    model = ptee.load(run)
    found = ptee.tune(model, folder, max_drop=0.01, answers="own")
    row = ptee.evaluate(model, folder, speed=False).rows[-1]
    return f"{row.accuracy:.4f}  {row.fidelity:.4f}  {row.cost:.4f}  {', '.join(f'{t:.4f}' for t in found.threshold)}"


def main() -> None:
    """Record by each way that is not there yet, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "source"):
        parser.add_argument(name)
    parser.add_argument("work", type=Path)
    o = parser.parse_args()
    shards.PART_BYTES = 1  # each shard is a part, so that there are parts to share
    print("                   images  answers that differ  confidence  accuracy  fidelity  cost    T")
    first: Traces | None = None
    for name, (engine, workers) in WAYS.items():
        folder = ptee.record(o.run, o.source, o.work / f"{engine}-{workers}", engine=engine, workers=workers)
        traces = folder.traces(ptee.load(o.run), rows=None, logits=False, own=True)
        first = first or traces
        differ = int((traces.answers != first.answers).sum())
        apart = (traces.confidence - first.confidence).abs().max().item()
        print(f"{name:16}  {len(folder):7,}  {differ:19}  {apart:10.1e}  {figures(o.run, folder)}", flush=True)


if __name__ == "__main__":
    main()
