"""The blocks of a run's backbone and what they cost, for the drawing."""

from __future__ import annotations

from ptee.analysis.blocks import blocks
from ptee.analysis.cut_points import survey
from ptee.analysis.freezing import one_parameter
from ptee.analysis.macs import count
from ptee.model.early_exit import EarlyExitModel
from ptee.report.exit_figures import Block

REST = "the classifier"  # what comes after the last block
NEGLIGIBLE = 1e-4  # share of the cost


def blocks_of(model: EarlyExitModel) -> list[Block]:
    """The blocks in order of execution, from the stem, which is in the first, to the classifier."""
    plan, module = model.plan, model.backbone
    counts = count(module, one_parameter(module).new_zeros(1, *plan.input_size))
    ends = [
        Block(name, counts.until[name] / counts.total)
        for name in blocks(module, survey(module, plan.input_size), counts)
    ]
    exits = [Block(e.name, e.backbone_cost) for e in plan.exits if e.name not in {b.name for b in ends}]
    found = sorted([*ends, *exits], key=lambda block: block.until)
    whole = not found or found[-1].until < 1 - NEGLIGIBLE
    return [block for block in found if block.until > NEGLIGIBLE] + [Block(REST, 1.0)] * whole
