"""Where the rows, channels and positions of a feature map are: found by following the axes, never guessed.

The input's axes are known: (b, c, h, w). `Axes` follows them through every operator of a forward pass: a convolution
makes new channels in second place, a matrix product in last place, a permutation permutes, a reshape splits and joins.
An axis is a sequence of atoms, each a piece of one letter with its size and stride, so that windows that were cut apart
and put together again are known to be whole, and windows that were not are known to be pieces. What cannot be followed
has no layout, and no head is built on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ptee._common.errors import PteeError
from ptee.analysis.memory_keys import memory_of


@dataclass(frozen=True)
class Layout:
    """How a feature map lies in its tensor, and how to read it as (b, c, h, w).

    Attributes:
        order: "bchw", "bhwc", "bnc" (tokens), "bnnc" (windows of tokens, in any number of axes), "bcn" or "bc" (a vector).
        channels: c.
        height: h, 1 for a vector.
        width: w, 1 for a vector.
        prefix: class and register tokens before the h * w positions; tokens behind those are dropped too.
        tokens: how many there are in all, of a token layout.
        pieces: (letter, size, stride) of the parts in which h and w lie in the tokens, major to minor, where they were
            put in another order (windows after windows); empty for one line of the grid after another.
    """

    order: str
    channels: int
    height: int
    width: int
    prefix: int = 0
    tokens: int = 0
    pieces: tuple[tuple[str, int, int], ...] = ()

    def to_map(self, z: Tensor) -> Tensor:
        """Read a tensor of this layout as a map.

        Args:
            z: the module's output: (b, c, h, w), (b, h, w, c), (b, n, c), (b, c, n) or (b, c).

        Returns:
            (b, c, h, w), a view where possible.

        Raises:
            PteeError: if the tensor has another rank, another number of channels, or another number of tokens.
        """
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
        flat = z.flatten(1, -2) if "nn" in self.order else z
        tokens = flat if self.order == "bcn" else flat.transpose(1, 2)
        positions = self.height * self.width
        if tokens.shape[2] != self.tokens:
            raise PteeError(
                f"Expected {self.tokens} tokens, a grid of {self.height} x {self.width} among them, got {tokens.shape[2]}: "
                "the images have another size than the one the exits were planned for. Plan anew with that input_size."
            )
        grid = tokens[:, :, self.prefix : self.prefix + positions]
        if self.pieces:
            in_order = sorted(range(len(self.pieces)), key=lambda i: (self.pieces[i][0], -self.pieces[i][2]))
            sizes = [size for _, size, _ in self.pieces]
            grid = grid.unflatten(2, sizes).permute(0, 1, *(2 + i for i in in_order)).flatten(2)
        return grid.unflatten(2, (self.height, self.width))


@dataclass(frozen=True)
class Atom:
    """A piece of an axis: `size` steps of `stride` along the letter (b, c, h, w, or n for tokens with extra ones)."""

    letter: str
    size: int
    stride: int = 1
    prefix: int = 0  # of n: tokens before the grid
    grid: tuple[int, int] | None = None  # of n: (h, w)


Axis = tuple[Atom, ...]  # major to minor; () has size 1
Axes = tuple[Axis, ...]  # one per dimension of the tensor
UNKNOWN = "?"


def image_axes(shape: Sequence[int]) -> Axes:
    """The axes of a batch of images (b, c, h, w)."""
    return tuple(_axis(letter, size) for letter, size in zip("bchw", shape, strict=True))


def _axis(letter: str, size: int) -> Axis:
    return (Atom(letter, size),) if size > 1 else ()


def layout_of(axes: Axes, shape: Sequence[int]) -> Layout | None:
    """The layout of a tensor with these axes, or None where rows, channels and positions cannot be told apart."""
    letters = "".join(_letter(axis) for axis in axes)
    size = dict(zip(letters, shape, strict=True))
    # A dimension of size 1 has no atoms: in a map it is a height or width that has shrunk to nothing.
    for order in ("bchw", "bhwc"):
        if len(letters) == 4 and all(got in (want, ".") for got, want in zip(letters, order, strict=True)):
            if "b" not in letters or "c" not in letters:
                return None
            return Layout(order, size["c"], size.get("h", 1), size.get("w", 1))
    if letters == "bc":
        return Layout("bc", size["c"], 1, 1)
    if letters[0] == "b" and letters[1:].endswith("c"):
        return _token_layout("b" + "n" * (len(axes) - 2) + "c", axes[1:-1], size["c"])
    if letters == "bcn":
        return _token_layout(letters, axes[2:], size["c"])
    return None


def _token_layout(order: str, positions: Axes, channels: int) -> Layout | None:
    """All positions, in whatever order, in one axis or in several side by side."""
    tokens = _join(tuple(atom for axis in positions for atom in axis))
    count = prod(a.size for a in tokens)
    if len(tokens) == 1 and tokens[0].grid is not None:
        return Layout(order, channels, *tokens[0].grid, tokens[0].prefix, count)
    if not _is_tiling(tokens):
        return None
    height, width = (prod(a.size for a in tokens if a.letter == letter) for letter in "hw")
    pieces = () if _is_grid(tokens) else tuple((a.letter, a.size, a.stride) for a in tokens)
    return Layout(order, channels, height, width, 0, count, pieces)


def _letter(axis: Axis) -> str:
    """b, c, h or w for a whole axis, n for tokens, . for size 1, ? for anything else."""
    whole = _join(axis)
    if not whole:
        return "."
    if all(a.letter == "c" for a in whole):
        return "c"  # in any order: channels have no neighbours
    if len(whole) == 1 and whole[0].stride == 1:
        return whole[0].letter
    return "n" if _is_tiling(whole) else UNKNOWN


def _is_grid(axis: Axis) -> bool:
    """Lines of positions, one after another."""
    return [(a.letter, a.stride) for a in axis] == [("h", 1), ("w", 1)]


def _is_tiling(axis: Axis) -> bool:
    """All positions, in whatever order their pieces lie: the steps of each letter fill one another."""
    for letter in "hw":
        reached = 1
        for atom in sorted((a for a in axis if a.letter == letter), key=lambda a: a.stride):
            if atom.stride != reached:
                return False
            reached *= atom.size
    return {a.letter for a in axis} == {"h", "w"}


def _join(axis: Axis) -> Axis:
    """Adjacent pieces of one letter become one where the strides fit."""
    joined: list[Atom] = []
    for atom in axis:
        last = joined[-1] if joined else None
        if last and last.letter == atom.letter and last.stride == atom.size * atom.stride:
            joined[-1] = replace(atom, size=last.size * atom.size)
        else:
            joined.append(atom)
    return tuple(joined)


# ------------------------------------------------------------------------------------------- axes through operators


class AxisTracker:
    """Remembers the axes of each tensor seen, and finds those of an operator's outputs from its inputs.

    Tensors are known by where they lie in memory (`memories`), so that a tensor and its alias have the same axes.

    Args:
        rows: of the batch. A convolution says what all its axes are but for the first; where that was lost on the way, as
            many entries as there are rows are taken to be the rows, and the proof of the cut tells whether they are.
    """

    def __init__(self, rows: int | None = None) -> None:
        self._axes: dict[StorageWeakRef, dict[tuple[object, ...], Axes]] = {}
        self._rows = rows

    def set(self, tensor: Tensor, axes: Axes) -> None:
        """Remember the axes of a tensor."""
        self._axes.setdefault(memory_of(tensor), {})[_place(tensor)] = axes

    def get(self, tensor: Any) -> Axes | None:
        """The axes of a tensor, or None where they are not known."""
        return self._axes.get(memory_of(tensor), {}).get(_place(tensor)) if isinstance(tensor, Tensor) else None

    def follow(self, op: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        """Set the axes of an operator's outputs.

        Args:
            op: the operator's name without namespace and overload: "convolution".
            args: its positional arguments.
            outputs: the tensors it gave.
        """
        for out in outputs:
            axes = self._result(op, args, tuple(out.shape))
            if axes is not None:
                self.set(out, _compact(axes))

    def _result(self, op: str, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
        if op == "cat":
            return self._cat(args, shape)
        first = self.get(args[0]) if args else None
        if op == "convolution":
            return self._convolution(first, args, shape)
        if op in ("mm", "bmm", "addmm", "baddbmm", "linear"):
            return self._product(op, args, shape)
        if first is None or op not in _RULES:
            return self._like(args, shape)
        return _RULES[op](first, args, shape)

    def _product(self, op: str, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
        left, right = args[1:3] if op in ("addmm", "baddbmm") else args[:2]
        rows, columns = self.get(left), self.get(right)
        if rows is None or len(rows) != len(shape):
            return None
        last = columns[-1] if columns is not None else (Atom("c", shape[-1]),)
        return (*rows[:-1], last)

    def _cat(self, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
        tensors = [t for t in args[0] if isinstance(t, Tensor)]
        dim = (args[1] if len(args) > 1 else 0) % len(shape)
        known = [(i, axes) for i, t in enumerate(tensors) if (axes := self.get(t)) is not None]
        if not known:
            return None
        grids = [(i, axes) for i, axes in known if _is_grid(axes[dim]) or any(a.grid for a in axes[dim])]
        place, axes = (grids or known)[0]
        if len(grids) == 1:
            before = sum(t.shape[dim] for t in tensors[:place])
            new: Axis = (_tokens(axes[dim], shape[dim], before),)
        else:
            new = _resized(axes[dim], shape[dim])
        return (*axes[:dim], new, *axes[dim + 1 :])

    def _convolution(self, axes: Axes | None, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
        """New channels in second place, new positions behind; the batch as it was."""
        batch = axes[0] if axes else ()
        if _letter(batch) in (".", UNKNOWN) and shape[0] == self._rows:
            batch = _axis("b", shape[0])
        channels = _axis("c", shape[1])
        if len(shape) == 4 and (axes is None or (_may_be(axes[2], "h") and _may_be(axes[3], "w"))):
            return (batch, channels, _axis("h", shape[2]), _axis("w", shape[3]))
        if axes is None:
            return None
        if all(k == 1 for k in args[1].shape[2:]) and all(s == 1 for s in args[3]):
            return (batch, channels, *axes[2:])
        return (batch, channels, *(_resized(axis, n) for axis, n in zip(axes[2:], shape[2:], strict=True)))

    def _like(self, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
        """Anything else: each dimension is the most telling one of that size among the operands."""
        flat = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
        operands = [(axes, t.shape) for t in flat if (axes := self.get(t)) is not None and t.dim() == len(shape)]
        if not operands:
            return None
        return tuple(_best([(axes[d], s[d]) for axes, s in operands], size) for d, size in enumerate(shape))


def _may_be(axis: Axis, letter: str) -> bool:
    """Whether these are all positions along h (or w), or have been lost so that a convolution's word must do."""
    return _letter(axis) in (letter, ".") or any(a.letter == UNKNOWN for a in axis)


def _compact(axes: Axes) -> Axes:
    """Where a piece of a letter is gone (summed over, mixed into channels), the pieces left make a coarser whole."""
    stride: dict[tuple[str, int], int] = {}
    size: dict[str, int] = {}
    for atom in sorted((a for axis in axes for a in axis), key=lambda a: a.stride):
        stride[atom.letter, atom.stride] = size.get(atom.letter, 1)
        size[atom.letter] = size.get(atom.letter, 1) * atom.size
    return tuple(tuple(replace(a, stride=stride[a.letter, a.stride]) for a in axis) for axis in axes)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _best(choices: list[tuple[Axis, int]], size: int) -> Axis:
    """A row or position says more than a channel: token mixing writes channels over positions and adds them back."""
    same = [axis for axis, s in choices if s == size]
    if not same:
        return _resized(choices[0][0], size)
    rank = {"b": 0, "h": 0, "w": 0, "n": 0, "c": 1}
    return min(same, key=lambda axis: rank.get(_letter(axis), 2))


def _resized(axis: Axis, size: int) -> Axis:
    """The same letter, longer or shorter: pooling, padding, more channels. Half a batch is no batch."""
    if size == 1:
        return ()
    letter = _letter(axis)
    return (Atom(letter if letter in "chw" else UNKNOWN, size),)


def _tokens(axis: Axis, size: int, before: int) -> Atom:
    """A grid of tokens with others around it."""
    if _is_grid(axis):
        return Atom("n", size, 1, before, (axis[0].size, axis[1].size))
    return replace(axis[0], size=size, prefix=before + axis[0].prefix)


def _reshape(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
    """Split and join atoms, in order, to fill the new sizes."""
    atoms = [atom for axis in axes for atom in axis][::-1]
    out: list[Axis] = []
    for size in shape:
        axis: list[Atom] = []
        while (have := prod(a.size for a in axis)) < size:
            if not atoms:
                return None
            axis.append(atoms.pop())
            have = prod(a.size for a in axis)
            if have > size:
                whole = axis.pop()
                before = have // whole.size
                need = size // before
                if size % before or whole.size % need or whole.grid:
                    return None
                rest = whole.size // need
                axis.append(replace(whole, size=need, stride=whole.stride * rest))
                atoms.append(replace(whole, size=rest))
        out.append(_join(tuple(axis)))
    return tuple(out)


def _permute(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes:
    return tuple(axes[d] for d in args[1])


def _transpose(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes:
    one, two = (int(d) for d in args[1:3]) if len(args) > 2 else (0, 1)
    out = list(axes)
    out[one], out[two] = out[two], out[one]
    return tuple(out)


def _unsqueeze(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes:
    dim = int(args[1]) % len(shape)
    return (*axes[:dim], (), *axes[dim:])


def _drop(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
    """select, squeeze, and the reductions: dimensions go, or stay with size 1."""
    named = args[1] if len(args) > 1 else None
    given = range(len(axes)) if named is None else named if isinstance(named, list | tuple) else [named]
    dims = {int(d) % len(axes) for d in given}
    if len(shape) == len(axes):
        return tuple(() if d in dims else axis for d, axis in enumerate(axes))
    left = tuple(axis for d, axis in enumerate(axes) if d not in dims)
    return left if len(left) == len(shape) else None


def _squeeze(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
    return _reshape(axes, args, shape)  # what goes has no atoms


def _unbind(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
    return _drop(axes, (args[0], args[1] if len(args) > 1 else 0), shape)


def _slice(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes:
    dim = int(args[1] if len(args) > 1 else 0) % len(shape)
    start = int(args[2] or 0) if len(args) > 2 else 0
    axis, size = axes[dim], shape[dim]
    if not axis or size == prod(a.size for a in axis):
        return axes
    out = list(axes)
    tokens, grid = axis[0], axis[0].grid if len(axis) == 1 else None
    if grid is None or not start <= tokens.prefix <= start + size - prod(grid):
        out[dim] = _resized(axis, size)
    elif size == prod(grid):
        out[dim] = (Atom("h", grid[0]), Atom("w", grid[1]))
    else:
        out[dim] = (replace(tokens, size=size, prefix=tokens.prefix - start),)
    return tuple(out)


def _lost(axes: Axes, shape: tuple[int, ...], dims: Sequence[int]) -> Axes | None:
    """Entries along these dimensions are in another order, or are others."""
    if len(shape) != len(axes):
        return None
    moved = {d % len(axes) for d in dims}
    return tuple(
        (Atom(UNKNOWN, n),) if d in moved and n > 1 else a for d, (a, n) in enumerate(zip(axes, shape, strict=True))
    )


def _along(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
    """gather, index_select, sort, flip: along the dimensions named."""
    named = args[1] if len(args) > 1 else -1
    return _lost(axes, shape, named if isinstance(named, list | tuple) else [int(named)])


def _index(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
    """x[:, numbers]: along the dimensions that have numbers."""
    return _lost(axes, shape, [d for d, numbers in enumerate(args[1]) if numbers is not None])


def _unfold(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
    """Patches: (b, channels and places in a patch, lines of patches)."""
    _, kernel, dilation, padding, stride = args
    if len(axes) != 4 or any(_letter(axis) not in (letter, ".") for axis, letter in zip(axes[2:], "hw", strict=True)):
        return None
    sizes = [prod(a.size for a in axis) for axis in axes[2:]]
    steps = zip(sizes, kernel, dilation, padding, stride, strict=True)
    h, w = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, d, p, s in steps)
    return (axes[0], (Atom(UNKNOWN, shape[1]),), (*_axis("h", h), *_axis("w", w)))


_RULES = {
    "view": _reshape, "_unsafe_view": _reshape, "reshape": _reshape, "_reshape_alias": _reshape,
    "permute": _permute, "transpose": _transpose, "t": _transpose,
    "unsqueeze": _unsqueeze, "squeeze": _squeeze, "select": _drop, "unbind": _unbind, "slice": _slice,
    "index": _index, "index_select": _along, "gather": _along, "take_along_dim": _along, "flip": _along, "sort": _along,
    "im2col": _unfold, "mean": _drop, "sum": _drop, "amax": _drop, "amin": _drop, "max": _drop,
}  # fmt: skip
