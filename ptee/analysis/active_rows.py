"""Which rows of a batch are still in a forward pass."""

from __future__ import annotations

from torch import Tensor


class ActiveRows:
    """The rows of one call that have not left yet. Everything that follows the rows of a call asks here.

    A moment is the number of times that rows had left by then, so that what was computed earlier can be matched to the rows
    that are here now.

    Attributes:
        count: how many are here.

    Args:
        batch: number of rows at the beginning.
    """

    def __init__(self, batch: int) -> None:
        self.count = batch
        self._stayed: list[Tensor] = []  # each time rows left: the others, as positions among the rows before

    @property
    def moment(self) -> int:
        """Now, for `since` and `select` later."""
        return len(self._stayed)

    def keep(self, staying: Tensor) -> None:
        """All other rows leave.

        Args:
            staying: (kept,) positions among the rows that are here.
        """
        self._stayed.append(staying)
        self.count = len(staying)

    def since(self, moment: int = 0) -> Tensor | None:
        """(count,) the rows that are here, as positions among those of an earlier moment; None if nobody has left since.

        Args:
            moment: 0 for the beginning.
        """
        rows = None
        for staying in self._stayed[moment:]:
            rows = staying if rows is None else rows.index_select(0, staying)
        return rows

    def select(self, tensor: Tensor, moment: int = 0) -> Tensor:
        """What a tensor of an earlier moment says of the rows that are here.

        Args:
            tensor: (rows of that moment, ...).
            moment: 0 for the beginning.
        """
        rows = self.since(moment)
        return tensor if rows is None else tensor.index_select(0, rows)
