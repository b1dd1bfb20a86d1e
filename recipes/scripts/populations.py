"""Populations of images whose true losses are known, to draw calibration images from: what a guarantee is tried on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ptee.tuning.config import Target
from ptee.tuning.solution import Solution
from ptee.tuning.traces import Score, Traces

SIZE, K = 100_000, 10
SKILL = (0.9, 1.15, 1.35, 1.5)  # of three exits and of the backbone
HEADS, CUTS = (0.02, 0.02, 0.02), (0.15, 0.4, 0.7, 1.0)
RARE = 0.012  # share of the images of a group on which the exits are sure and wrong
NEVER = Solution(Target("max_drop", 0.01), (2.0,) * 3, (0, 1, 2), Score(1, 1, 1), Score(1, 1, 1), 1)


def population(name: str, size: int = SIZE) -> Traces:
    """calibrated: a confidence says much. overconfident: it is high and rounded, so many are equal. rare_group: see `RARE`."""
    g = torch.Generator(device="cpu").manual_seed(0)
    if name == "overconfident":
        traces = _drawn(g, size, noise=1.2, scale=1.2, shift=1.5, blur=1.0, common=0.6)
        h = (traces.confidence * 200).round() / 200
        return replace(traces, confidence=h)
    traces = _drawn(g, size, noise=2.0, scale=0.8, shift=0.0, blur=0.5, common=0.6 if name == "calibrated" else 0.8)
    return _with_rare_group(traces, g) if name == "rare_group" else traces


POPULATIONS = ("calibrated", "overconfident", "rare_group")


def _drawn(
    g: torch.Generator, size: int, *, noise: float, scale: float, shift: float, blur: float, common: float
) -> Traces:
    """Hard images are answered wrong by all; how hard an image is decides h, too, up to noise."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cpu")

    exits = len(HEADS)
    ease = 4 * (torch.tensor(SKILL, device="cpu")[:, None] - 0.75 * normal(size))
    luck = common * normal(size) + (1 - common**2) ** 0.5 * normal(exits + 1, size)
    right = luck < 1 + ease / noise
    wrong = torch.randint(1, K, (exits + 1, size), generator=g, device="cpu")
    h = torch.sigmoid(scale * ease + shift + blur * normal(exits + 1, size))
    h[-1] = 1
    heads = torch.tensor(HEADS, dtype=torch.float64, device="cpu")
    costs = torch.tensor(CUTS, dtype=torch.float64, device="cpu") + torch.cat([heads.cumsum(0), heads.sum()[None]])
    labels = torch.zeros(size, dtype=torch.long, device="cpu")
    return Traces(torch.where(right, 0, wrong), h, labels, costs, luck[:0], head_costs=heads)


def _with_rare_group(traces: Traces, g: torch.Generator) -> Traces:
    rare = torch.rand(len(traces.bare), generator=g, device="cpu") < RARE
    answers, h = traces.answers.clone(), traces.confidence.clone()
    answers[:2, rare], answers[-1, rare] = 3, 0
    h[:2, rare] = 0.9 + 0.1 * torch.rand(2, int(rare.sum()), generator=g, device="cpu")
    return replace(traces, answers=answers, confidence=h)


def draw(traces: Traces, images: int, seed: int) -> Traces:
    """So many images of a population."""
    g = torch.Generator(device="cpu").manual_seed(seed)
    return traces.rows(torch.randint(traces.answers.shape[1], (images,), generator=g, device="cpu"))


def truth(traces: Traces, found: Solution) -> tuple[float, float]:
    """What thresholds lose of a population, by their target, and what they cost there."""
    if len(found.off) == traces.exits:
        return 0.0, 1.0
    score = traces.score(traces.leaving(found.threshold), found.off)
    bare = traces.score_at(traces.exits)
    fidelity = found.target.kind == "max_fidelity_drop"
    return (1 - score.fidelity if fidelity else (bare.accuracy or 0) - (score.accuracy or 0)), score.cost
