"""How a feature map lies in its tensor, and how to read it as (b, c, h, w).

Networks keep their feature maps in different layouts: (b, c, h, w), (b, h, w, c), tokens (b, n, c), windows of tokens, or
vectors (b, c). A `Layout` describes one of them, so that a head can read each as (b, c, h, w). `analysis.axes` finds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ptee._common.errors import PteeError


@dataclass(frozen=True)
class Layout:
    """How a feature map lies in its tensor.

    Attributes:
        order: "bchw", "bhwc", "bnc" (tokens), "bnnc" (windows of tokens, in any number of axes), "bcn" or "bc" (a vector).
        height: 1 for a vector, as is the width.
        prefix: number of class and register tokens before the h * w positions. Tokens after the positions are dropped too.
        tokens: number of all tokens, for a token layout.
        pieces: (letter, size, stride) of the parts of h and w in the token axis, from major to minor, if the tokens are not
            in the order of the image, for example window after window. Empty if they are: line after line.
    """

    order: str
    channels: int
    height: int
    width: int
    prefix: int = 0
    tokens: int = 0
    pieces: tuple[tuple[str, int, int], ...] = ()

    def to_map(self, z: Tensor) -> Tensor:
        """A tensor of this layout as (b, c, h, w), a view where possible. Raises PteeError if it has another layout."""
        axis = self.order.index("c")
        if z.dim() != len(self.order) or z.shape[axis] != self.channels:
            raise PteeError(
                f"Expected a feature map {tuple(self.order)} with {self.channels} channels, got {tuple(z.shape)}"
            )
        if self.order == "bchw":
            return z
        if self.order == "bhwc":
            return z.permute(0, 3, 1, 2)
        if self.order == "bc":
            return z[:, :, None, None]
        if self.order == "bcn":
            return self._grid(z)
        return self._grid(z.flatten(1, -2).transpose(1, 2))

    def _grid(self, tokens: Tensor) -> Tensor:
        """(b, c, n) -> (b, c, h, w)"""
        if tokens.shape[2] != self.tokens:
            raise PteeError(
                f"Expected {self.tokens} tokens, a grid of {self.height} x {self.width} among them, got {tokens.shape[2]}: "
                "the images have another size than the one the exits were planned for. Plan the exits again with the "
                "input_size of these images."
            )
        grid = tokens[:, :, self.prefix : self.prefix + self.height * self.width]
        if self.pieces:
            grid = self._in_image_order(grid)
        return grid.unflatten(2, (self.height, self.width))

    def _in_image_order(self, grid: Tensor) -> Tensor:
        """(b, c, h * w) in the order of `pieces` -> (b, c, h * w), line after line."""
        in_order = sorted(range(len(self.pieces)), key=lambda i: (self.pieces[i][0], -self.pieces[i][2]))
        sizes = [size for _, size, _ in self.pieces]
        return grid.unflatten(2, sizes).permute(0, 1, *(2 + i for i in in_order)).flatten(2)
