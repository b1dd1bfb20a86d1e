"""The rule of an exit: what it answers, and how sure it is of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ptee.exits.blend import Blend
from ptee.exits.confidence import Confidence


class ExitRule:
    """What the exits of a model answer, each alone or blended, and how sure they are.

    Args:
        confidence: computes h.
        blend: the weights of the exits' answers; None if each exit answers alone.
        off: exits that are off. Their heads may run for later heads, and the blend leaves their answers out.
        num_exits: E.
    """

    def __init__(self, confidence: Confidence, blend: Blend | None, off: Sequence[int], num_exits: int) -> None:
        self.confidence, self.blend, self.off, self.num_exits = confidence, blend, tuple(off), num_exits

    @property
    def reads_earlier(self) -> bool:
        """Whether the answers of earlier exits must be kept."""
        return self.blend is not None or self.confidence.needs_answers_of_earlier_exits

    def at_exit(self, n: int, own: Tensor, sure: Tensor, earlier: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
        """The answer of exit n.

        Args:
            n: the exit.
            own: (b, K) logits of its head.
            sure: (b,) confidence logit of its head.
            earlier: (b, K) logits of the heads before it that ran, by number, if they are kept.

        Returns:
            (b, K) logits and (b,) h.
        """
        logits = self.answer(n, own, earlier)
        return logits, self.confidence(n, logits, list(earlier.values()), sure, self.num_exits)

    def answer(self, n: int, own: Tensor, earlier: Mapping[int, Tensor]) -> Tensor:
        """(b, K) the logits that exit n answers with; the arguments are those of `at_exit`."""
        return own if self.blend is None else self.blend.logits(n, own, self._on(earlier))

    def at_end(self, own: Tensor, earlier: Mapping[int, Tensor], thresholds: Mapping[int, float | Tensor]) -> Tensor:
        """The answers of the rows that never left. Rows that no exit could take get the backbone's own, bit for bit.

        Args:
            own: (b, K) logits of the backbone.
            earlier: as of `at_exit`.
            thresholds: T of each exit, a number or (b,).
        """
        on = self._on(earlier)
        if self.blend is None or not self.blend.to_the_end or not on:
            return own
        possible = torch.stack([torch.as_tensor(thresholds[n] <= 1, device=own.device) for n in on]).any(0)
        blended = self.blend.logits(self.num_exits, own, on)
        usable = possible & ~blended.isnan().any(-1)
        return torch.where(usable[..., None], blended, own).to(own.dtype)

    def _on(self, earlier: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {m: logits for m, logits in earlier.items() if m not in self.off}
