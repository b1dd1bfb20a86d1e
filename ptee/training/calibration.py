"""The decision: gates are fitted after the heads, on images that neither the heads nor the backbone should have seen.

The heads run once over the images with nobody leaving, and what each gate reads is kept: a few numbers for each image. Then
every gate is a small regression against one question, by cross-entropy, so that h is the probability of a yes. It starts from
the max probability, scaled (J. Platt, 1999), and goes as far from it as images that are held out in turn bear out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

from ptee._common.devices import resolve_device
from ptee._common.errors import DataError, PteeError, unknown
from ptee._common.process import own_random_numbers
from ptee._common.progress import with_bar
from ptee._common.text import table
from ptee.data.batches import UNKNOWN_LABEL, batches, split_batch
from ptee.data.labels import odd_labels
from ptee.exits.gates import LOG_ODDS, READS, Gate
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.training.config import Settings

QUESTIONS = {
    "agrees": "Is the answer the backbone's?",
    "right": "Is it the label?",
    "best": "Is it the label, or would no later answer be?",
}
FEWEST = 20  # images to fit a gate on
RARER = 20  # images with the rarer answer; fewer only scale the max probability
FOLDS = 5  # each a fifth of the images, held out in turn to say when to stop
PENALTY = 1e-3  # on the squares of the weights
ROUNDS, STEPS, PATIENCE = 40, 5, 5  # of L-BFGS; rounds without a better held-out loss
SCALING_STEPS = 100
LARGEST_SHARE = 0.5  # of the training images, for the gates


@dataclass(frozen=True)
class GateFit:
    """How well the gate of one exit answers its question. Each image is held out once, and judged by what the others taught.

    Attributes:
        exit: the module behind which it stands.
        yes: share of the images (with finite answers) for which it is yes.
        loss: cross-entropy of h, a little rosy: the lowest of those after each round of fitting.
        max_prob: cross-entropy of the max probability alone, scaled.
        blind: cross-entropy of that share, which is what h is worth if it says the same of every image.
    """

    exit: str
    yes: float
    loss: float
    max_prob: float
    blind: float


@dataclass(frozen=True)
class GateFits:
    """What came of fitting. Prints as a table.

    Attributes:
        target: a key of `QUESTIONS`.
        images: how many there were.
        exits: one for each early exit.
    """

    target: str
    images: int
    exits: tuple[GateFit, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            (str(n), e.exit, *(f"{value:.4f}" for value in (e.yes, e.loss, e.max_prob, e.blind)))
            for n, e in enumerate(self.exits)
        ]
        return (
            f"Gates on {self.images:,} images. {QUESTIONS[self.target]}\n"
            + table([("exit", "module", "yes", "loss", "max prob", "blind"), *rows], left={1})
            + "\nloss: cross-entropy of h, each image held out in turn; max prob: of the largest probability alone, scaled; "
            f"blind: of an\nh that is the same for all. With fewer than {RARER} images of either answer, h is the largest probability, scaled."
        )


def check_target(target: str | None, *others: str) -> None:
    """Refuse what is no question to a gate.

    Args:
        target: a question, or None.
        others: what else could have been said.

    Raises:
        UnknownName: naming those that are.
    """
    if target is not None and target not in QUESTIONS:
        raise unknown("gate target", target, [*QUESTIONS, *others])


def hold_out(data: Any, share: float, seed: int = 0) -> tuple[Any, Any]:
    """Split a map-style data set into images for the heads and images for the gates.

    Args:
        data: the training images.
        share: of them, for the gates.
        seed: which ones.

    Raises:
        DataError: if too few would be left to either.
    """
    if not 0 < share <= LARGEST_SHARE:
        raise PteeError(f"A share {share!r} of the images for gates must lie above 0, up to {LARGEST_SHARE}.")
    n = len(data)
    size = round(share * n)
    if size < FEWEST:
        raise DataError(
            f"{share:g} of {n:,} training images are {size}, and gates need {FEWEST} at least. Give a larger share "
            "(--gate-share), or train without gates."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = Subset(data, sorted(order[size:])), Subset(data, sorted(order[:size]))
    for part in parts:  # a training that is resumed asks which files they are of
        part.files_sha256 = getattr(data, "files_sha256", None)  # type: ignore[attr-defined]
    return parts


def fit_gates(
    model: EarlyExitModel,
    data: Any,
    *,
    target: str | None = None,
    reads: str = "answers",
    seed: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> GateFits:
    """Give every exit a gate that decides who leaves there, fitted after the heads. No answer changes, only h does.

    h is the largest probability, scaled to be the probability of a yes, and a small network adds to it as far as images that
    are held out bear out; with fewer than 20 images of either answer it adds nothing. Gates ask what earlier exits said only
    where heads build on one another, so that exits that are off cost nothing where they do not.

    Take images that the heads were not trained on. On images that the backbone itself was trained on it is nearly always
    right, so gates that learn from them are too sure. Heads that are trained further want new gates.

    Args:
        model: with trained heads. In eval mode, on the device it was on, afterwards.
        data: a map-style data set of (image (c, h, w), label) or (image,), or a loader.
        target: the question: "agrees" (is this answer the backbone's?), "right" (is it the label?) or "best" (is it the
            label, or would no later answer be? then leaving loses nothing). None: "best" with labels, "agrees" without.
        reads: "answers" (a few numbers on the answers so far) or "features" (the head's feature vector, too, which wants
            many images, and minutes where there are many).
        seed: of the gates and of the fifths that are held out.
        batch_size: for a data set.
        num_workers: processes that load a data set.
        device: for the heads; None: where the model is.
        progress: show a bar, where standard error is a terminal.

    Raises:
        UnknownName: if there is no such target or no such thing to read.
        DataError: if there are too few images, or no labels where they are asked for.
        PteeError: if exits are off.
    """
    require_early_exit(model)
    check_target(target)
    Settings(seed=seed).checked()
    model.require_all_on()
    if reads not in READS:
        raise unknown("thing for a gate to read", reads, READS)
    home = next(model.heads.parameters()).device
    with own_random_numbers(seed), torch.inference_mode(False), torch.enable_grad():
        gates = [model.new_gate(n, reads) for n in range(len(model.exits))]
        model.to(home if device is None else resolve_device(device)).eval()
        try:
            heard = _hear(
                model, gates, batches(data, batch_size=batch_size, shuffle=False, num_workers=num_workers), progress
            )
        finally:
            model.to(home)
        target = target or ("best" if heard.labels is not None else "agrees")
        yes = heard.yes(target)
        exits = list(zip(model.exits, gates, heard.read, yes, strict=True))
        rows = [
            GateFit(e.name, **_fit(gate, x, y, seed)) for e, gate, x, y in with_bar(exits, "fitting gates", progress)
        ]
        model.put_gates(gates)
    return GateFits(target, len(heard.answers[0]), tuple(rows))


def hang_unfitted_gates(model: EarlyExitModel, target: str) -> GateFits:
    """Give every exit a gate whose h is the largest probability as it is, where there are no images to fit one on.

    Args:
        model: with trained heads.
        target: a key of `QUESTIONS`, which is not asked.
    """
    model.put_gates([model.new_gate(n, "answers") for n in range(len(model.exits))])
    return GateFits(target, 0, ())


@dataclass(frozen=True)
class _Heard:
    """What the heads said of all images, as far as gates need it."""

    read: tuple[Tensor, ...]  # for each early exit (n, ...), what its gate reads
    answers: Tensor  # (E+1, n)
    labels: Tensor | None  # (n,)
    fault: str  # why there are none

    def yes(self, target: str) -> Tensor:
        """(E, n) whether the answer to the question is yes."""
        if target == "agrees":
            return self.answers[:-1] == self.answers[-1]
        if self.labels is None:
            raise DataError(f"The question {target!r} needs labels: {self.fault}. Ask a gate for target 'agrees'.")
        right = self.answers == self.labels
        if target == "right":
            return right[:-1]
        later = torch.stack([right[n + 1 :].any(0) for n in range(len(right) - 1)])
        return right[:-1] | ~later


@torch.no_grad()
def _hear(model: EarlyExitModel, gates: Sequence[Gate], loader: Iterable[Any], progress: bool) -> _Heard:
    read, answers, labels = [], [], []
    for batch in with_bar(loader, "asking the heads", progress):
        images, known = split_batch(batch)
        reading = model.read(model.prepared(images))
        said = model.said(reading)
        read.append([
            gate.read(s.logits, [earlier.logits for earlier in said[:n]], s.features).cpu().double()
            for n, (gate, s) in enumerate(zip(gates, said, strict=True))
        ])  # fmt: skip
        answers.append(torch.stack([y.argmax(-1) for y in (*(s.logits for s in said), reading.logits)]).cpu())
        labels.append(torch.full((len(images),), UNKNOWN_LABEL) if known is None else known)
    if not answers:
        raise DataError("The data gave no batch: it is empty.")
    every = torch.cat(labels)
    none = bool((every == UNKNOWN_LABEL).all())
    fault = "the data has none" if none else odd_labels(every, model.num_classes)
    kept = tuple(torch.cat(parts) for parts in zip(*read, strict=True))
    return _Heard(kept, torch.cat(answers, 1), None if fault else every, fault)


def _fit(gate: Gate, x: Tensor, yes: Tensor, seed: int) -> dict[str, float]:
    """Fit one gate in float64; the figures of a `GateFit`."""
    known = x.isfinite().all(-1)
    x, y = x[known], yes[known].to(x.dtype)
    if len(x) < FEWEST:
        raise DataError(f"A gate needs {FEWEST} images with finite answers at least; there are {len(x)}. Give more.")
    gate.double()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    order = order[y[order].argsort(stable=True)]  # as many of either answer in each fold
    folds = [_Fold(gate, x, y, order[n::FOLDS]) for n in range(FOLDS)]
    blind = sum(fold.blind() for fold in folds) / len(x)
    losses = [sum(fold.loss() for fold in folds) / len(x)]
    if min(y.sum(), (1 - y).sum()) >= RARER:
        while len(losses) <= ROUNDS and len(losses) - 1 - _lowest(losses) < PATIENCE:
            for fold in folds:
                fold.descent.step()
            losses.append(sum(fold.loss() for fold in folds) / len(x))
    descent = _Descent(gate, x, y)
    for _ in range(_lowest(losses)):
        descent.step()
    return {"yes": y.mean().item(), "loss": min(losses), "max_prob": losses[0], "blind": blind}


def _lowest(losses: Sequence[float]) -> int:
    return min(range(len(losses)), key=losses.__getitem__)


class _Descent:
    """A gate on its way: first scale and shift of the max probability, then round by round the network that adds to it."""

    def __init__(self, gate: Gate, x: Tensor, y: Tensor) -> None:
        gate.standardise(x)
        _scale(gate, x, y)
        self.gate, self.y = gate, y
        self.scaled, self.standard = gate.scaled(x).detach(), gate.standard(x)  # neither changes from here on
        network = [p for name, p in gate.named_parameters() if name not in ("scale", "shift")]
        self.weights = [p for p in network if p.dim() > 1]
        self.optimiser = torch.optim.LBFGS(network, max_iter=STEPS, line_search_fn="strong_wolfe")

    def step(self) -> None:
        """A few steps of L-BFGS on all images at once."""
        self.optimiser.step(self._closure)

    def _closure(self) -> Tensor:
        self.optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(self.scaled + self.gate.network(self.standard), self.y)
        loss = loss + PENALTY * sum(w.square().sum() for w in self.weights)
        loss.backward()
        return loss


class _Fold:
    """A copy of a gate that learns from all images but some, and is asked about these."""

    def __init__(self, gate: Gate, x: Tensor, y: Tensor, held: Tensor) -> None:
        learnt = torch.ones(len(x), dtype=torch.bool)
        learnt[held] = False
        self.descent = _Descent(copy.deepcopy(gate), x[learnt], y[learnt])
        self.x, self.y = x[held], y[held]

    @torch.no_grad()
    def loss(self) -> float:
        """Cross-entropy, summed over the images held out."""
        return F.binary_cross_entropy_with_logits(self.descent.gate.judge(self.x), self.y, reduction="sum").item()

    def blind(self) -> float:
        """The same of the share of yes among those that were not."""
        y = self.descent.y
        share = (y.sum() + 1) / (len(y) + 2)  # not 0, not 1
        return F.binary_cross_entropy(share.expand(len(self.y)), self.y, reduction="sum").item()


def _scale(gate: Gate, x: Tensor, y: Tensor) -> None:
    """Scale and shift of the log-odds, by maximum likelihood and Platt's targets, the scale positive and near 1 a priori."""
    yes = y.sum()
    target = torch.where(
        y > 0, (yes + 1) / (yes + 2), 1 / (len(y) - yes + 2)
    )  # not 0, not 1: few images would be too sure
    log_odds, found = x[:, LOG_ODDS], torch.zeros(2, dtype=x.dtype, requires_grad=True)  # log scale, shift
    optimiser = torch.optim.LBFGS([found], max_iter=SCALING_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        sure = log_odds * found[0].exp() + found[1]
        loss = F.binary_cross_entropy_with_logits(sure, target) + found[0].square() / (2 * len(y))
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        gate.scale.copy_(found[0].exp())
        gate.shift.copy_(found[1])
