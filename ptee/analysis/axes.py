"""How the axes of the images are followed through a network, which gives the layout of every output.

A layout is never guessed from a shape: a tensor (16, 16, 16, 16) could be anything. But the axes of the images are known,
(b, c, h, w), and `AxisTracker` follows them through every operator of one forward pass. A permutation permutes them, a
reshape splits and joins them, a convolution puts new channels in second place, a matrix product in last place.

An axis is a sequence of atoms, from major to minor. An atom is a part of a letter, with its size and its stride. If a map
of height 8 is cut into windows of height 4, its axis h becomes the atoms (h, size 2, stride 4) and (h, size 4, stride 1).
If the windows are put together again, the strides fit and the atoms join to the whole axis. If they are put together in
another order, the strides still say where each position belongs.

Where an axis cannot be followed, it is unknown. A tensor with an unknown axis has no layout, and no head is built on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ptee.analysis.layout import Layout


@dataclass(frozen=True)
class Atom:
    """A part of an axis: `size` steps of `stride` along a letter (b, c, h, w, or n for a grid between other tokens)."""

    letter: str
    size: int
    stride: int = 1
    prefix: int = 0  # of n: tokens before the grid
    grid: tuple[int, int] | None = None  # of n: (h, w)


Axis = tuple[Atom, ...]  # from major to minor; () has size 1
Axes = tuple[Axis, ...]  # one per dimension of the tensor
UNKNOWN = "?"


def image_axes(shape: Sequence[int]) -> Axes:
    """The axes of a batch of images (b, c, h, w)."""
    return tuple(_axis(letter, size) for letter, size in zip("bchw", shape, strict=True))


def _axis(letter: str, size: int) -> Axis:
    return (Atom(letter, size),) if size > 1 else ()


def memory_of(tensor: Tensor) -> StorageWeakRef:
    """A key for the memory of a tensor and its views.

    An address would not do: when memory is freed, its address is used again for other values. As long as this weak
    reference exists, torch does not use the address again, but the values themselves are freed.
    """
    return StorageWeakRef(tensor.untyped_storage())


# ---------------------------------------------------------------------------------------------------- axes -> layout


def layout_of(axes: Axes, shape: Sequence[int]) -> Layout | None:
    """The layout of a tensor with these axes, or None if rows, channels and positions cannot be told apart."""
    letters = "".join(_letter(axis) for axis in axes)
    size = dict(zip(letters, shape, strict=True))
    # A dimension of size 1 has no atoms. In a map it is a height or width that has shrunk to 1.
    for order in ("bchw", "bhwc"):
        if len(letters) == 4 and all(got in (want, ".") for got, want in zip(letters, order, strict=True)):
            if "b" not in letters or "c" not in letters:
                return None
            return Layout(order, size["c"], size.get("h", 1), size.get("w", 1))
    if letters == "bc":
        return Layout("bc", size["c"], 1, 1)
    if letters[:1] == "b" and letters[1:].endswith("c"):
        return _token_layout("b" + "n" * (len(axes) - 2) + "c", axes[1:-1], size["c"])
    if letters == "bcn":
        return _token_layout(letters, axes[2:], size["c"])
    return None


def _token_layout(order: str, positions: Axes, channels: int) -> Layout | None:
    """The layout if these axes together hold every position once, in any order."""
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
        return "c"  # the order of channels does not matter
    if len(whole) == 1 and whole[0].stride == 1:
        return whole[0].letter
    return "n" if _is_tiling(whole) else UNKNOWN


def _is_grid(axis: Axis) -> bool:
    """Whether the axis holds all positions, line after line."""
    return [(a.letter, a.stride) for a in axis] == [("h", 1), ("w", 1)]


def _is_tiling(axis: Axis) -> bool:
    """Whether the axis holds all positions, in any order: the atoms of h together make h, and so do those of w."""
    for letter in "hw":
        reached = 1
        for atom in sorted((a for a in axis if a.letter == letter), key=lambda a: a.stride):
            if atom.stride != reached:
                return False
            reached *= atom.size
    return {a.letter for a in axis} == {"h", "w"}


def _join(axis: Axis) -> Axis:
    """Join adjacent atoms of one letter where their strides fit."""
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
    """Remembers the axes of each tensor, and finds the axes of an operator's outputs from those of its inputs.

    A tensor is known by its place in memory (`memory_of`), so a tensor and its alias have the same axes. A convolution tells
    what all its axes are, except the first. If the first was lost before, it is taken for the batch if it has as many
    `rows`. Verification finds out whether that was right.
    """

    def __init__(self, rows: int | None = None) -> None:
        self._axes: dict[tuple[object, ...], Axes] = {}
        self._rows = rows

    def set(self, tensor: Tensor, axes: Axes) -> None:
        """Remember the axes of a tensor."""
        self._axes[_place(tensor)] = axes

    def get(self, tensor: Any) -> Axes | None:
        """The axes of a tensor, or None if they are not known."""
        return self._axes.get(_place(tensor)) if isinstance(tensor, Tensor) else None

    def follow(self, op: str, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        """Find and remember the axes of an operator's outputs. Its name has no namespace and overload: "convolution"."""
        for out in outputs:
            axes = self._result(op, args, tuple(out.shape))
            if axes is not None:
                self.set(out, _renumber(axes))

    def _result(self, op: str, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
        if op.removesuffix("_") in _REORDERING:
            return None
        if op == "cat":
            return self._cat(args, shape)
        if op == "stack":
            return self._stack(args, shape)
        first = self.get(args[0]) if args else None
        if op == "convolution":
            return self._convolution(first, args, shape)
        if op in ("mm", "bmm", "linear"):
            return self._product(args[0], args[1], shape)
        if op in ("addmm", "baddbmm"):
            return self._product(args[1], args[2], shape)
        if first is None or op not in _RULES:
            return self._elementwise(args, shape)
        if not first:  # one number, of which no dimension can go, move or be split
            return ((),) * len(shape)
        return _RULES[op](first, args, shape)

    def _product(self, left: Tensor, right: Tensor, shape: tuple[int, ...]) -> Axes | None:
        """The last axis comes from the right factor, or is new channels. All others come from the left factor."""
        rows, columns = self.get(left), self.get(right)
        if rows is None or len(rows) != len(shape):
            return None
        last = columns[-1] if columns is not None else (Atom("c", shape[-1]),)
        return (*rows[:-1], last)

    def _cat(self, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
        """One grid between other tensors is a grid between other tokens. In any other case the axis gets longer."""
        # torch takes an empty tensor (0,) beside others of any shape
        tensors = [t for t in args[0] if isinstance(t, Tensor) and t.dim() == len(shape)]
        dim = (args[1] if len(args) > 1 else 0) % len(shape)
        known = [(i, axes) for i, t in enumerate(tensors) if (axes := self.get(t)) is not None]
        if not known:
            return None
        grids = [(i, axes) for i, axes in known if _is_grid(axes[dim]) or any(a.grid for a in axes[dim])]
        place, axes = (grids or known)[0]
        if len(grids) == 1:
            before = sum(t.shape[dim] for t in tensors[:place])
            new: Axis = (_with_other_tokens(axes[dim], shape[dim], before),)
        else:
            new = _resized(axes[dim], shape[dim])
        return (*axes[:dim], new, *axes[dim + 1 :])

    def _stack(self, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
        """A new axis: of several values for each position, as channels are, if the rows are elsewhere. Else it may be the rows."""
        dim = (args[1] if len(args) > 1 else 0) % len(shape)
        axes = self._elementwise(args[:1], (*shape[:dim], *shape[dim + 1 :]))
        if axes is None:
            return None
        has_rows = any(atom.letter == "b" for axis in axes for atom in axis)
        return (*axes[:dim], _axis("c" if has_rows else UNKNOWN, shape[dim]), *axes[dim:])

    def _convolution(self, axes: Axes | None, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
        """The batch stays as it was. New channels come in second place, new positions after them."""
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

    def _elementwise(self, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
        """For all other operators: each axis comes from the operand that tells most about it."""
        flat = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
        operands = [(axes, t.shape) for t in flat if (axes := self.get(t)) is not None and t.dim() == len(shape)]
        if not operands:
            return None
        return tuple(_most_telling([(axes[d], s[d]) for axes, s in operands], size) for d, size in enumerate(shape))


def _place(tensor: Tensor) -> tuple[object, ...]:
    return memory_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _may_be(axis: Axis, letter: str) -> bool:
    """Whether the axis is h (or w), or is unknown, so that what the convolution says about it holds."""
    return _letter(axis) in (letter, ".") or any(a.letter == UNKNOWN for a in axis)


def _renumber(axes: Axes) -> Axes:
    """Give the atoms of a letter new strides if one of them is gone: those that are left make up a coarser axis."""
    stride: dict[tuple[str, int], int] = {}
    size: dict[str, int] = {}
    for atom in sorted((a for axis in axes for a in axis), key=lambda a: a.stride):
        stride[atom.letter, atom.stride] = size.get(atom.letter, 1)
        size[atom.letter] = size.get(atom.letter, 1) * atom.size
    return tuple(tuple(replace(a, stride=stride[a.letter, a.stride]) for a in axis) for axis in axes)


def _most_telling(choices: list[tuple[Axis, int]], size: int) -> Axis:
    """Rows and positions win over channels: token mixing writes channels in place of positions, then adds them to the input."""
    same = [axis for axis, s in choices if s == size]
    if not same:
        return _resized(choices[0][0], size)
    rank = {"b": 0, "h": 0, "w": 0, "n": 0, "c": 1}
    return min(same, key=lambda axis: rank.get(_letter(axis), 2))


def _resized(axis: Axis, size: int) -> Axis:
    """The same axis, longer or shorter: pooling, padding, more channels. A part of the batch is not the batch: unknown."""
    if size == 1:
        return ()
    letter = _letter(axis)
    return (Atom(letter if letter in "chw" else UNKNOWN, size),)


def _with_other_tokens(axis: Axis, size: int, before: int) -> Atom:
    """A grid of tokens with other tokens around it."""
    if _is_grid(axis):
        return Atom("n", size, 1, before, (axis[0].size, axis[1].size))
    return replace(axis[0], size=size, prefix=before + axis[0].prefix)


# ------------------------------------------------------------------------------------------- a rule for each operator
# Each takes the axes of the first input, the arguments and the shape of the output. It returns the axes of the output.


def _reshape(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
    """Take the atoms in order and fill each new axis with them. An atom that is too large is split."""
    atoms = [atom for axis in axes for atom in axis][::-1]
    out: list[Axis] = []
    for size in shape:
        axis = _take_atoms(atoms, size)
        if axis is None:
            return None
        out.append(_join(axis))
    return tuple(out)


def _take_atoms(atoms: list[Atom], size: int) -> Axis | None:
    """Take atoms from the end of a list until they fill an axis of this size; None if they do not fit."""
    axis: list[Atom] = []
    filled = 1
    while filled < size:
        if not atoms:
            return None
        atom = atoms.pop()
        if filled * atom.size > size:
            need = size // filled
            if size % filled or atom.size % need or atom.grid:
                return None
            rest = atom.size // need
            atoms.append(replace(atom, size=rest))
            atom = replace(atom, size=need, stride=atom.stride * rest)
        axis.append(atom)
        filled *= atom.size
    return tuple(axis)


def _permute(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes:
    return tuple(axes[d] for d in args[1])


def _transpose(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes:
    one, two = (int(d) for d in args[1:3]) if len(args) > 2 else (0, len(axes) - 1)  # t() leaves one axis where it is
    out = list(axes)
    out[one], out[two] = out[two], out[one]
    return tuple(out)


def _unsqueeze(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes:
    dim = int(args[1]) % len(shape)
    return (*axes[:dim], (), *axes[dim:])


def _remove(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
    """select and the reductions: dimensions go, or stay with size 1."""
    named = args[1] if len(args) > 1 else None
    given = range(len(axes)) if named is None else named if isinstance(named, list | tuple) else [named]
    dims = {int(d) % len(axes) for d in given}
    if len(shape) == len(axes):
        return tuple(() if d in dims else axis for d, axis in enumerate(axes))
    left = tuple(axis for d, axis in enumerate(axes) if d not in dims)
    return left if len(left) == len(shape) else None


def _unbind(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
    return _remove(axes, (args[0], args[1] if len(args) > 1 else 0), shape)


def _slice(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes:
    """A slice of neighbouring tokens that holds the whole grid keeps it. Any other slice makes the axis shorter."""
    dim = int(args[1] if len(args) > 1 else 0) % len(shape)
    start = int(args[2] or 0) if len(args) > 2 else 0
    step = int(args[4]) if len(args) > 4 else 1
    axis, size = axes[dim], shape[dim]
    if not axis or size == prod(a.size for a in axis):
        return axes
    out = list(axes)
    tokens, grid = axis[0], axis[0].grid if len(axis) == 1 else None
    if grid is None or step > 1 or not start <= tokens.prefix <= start + size - prod(grid):
        out[dim] = _resized(axis, size)
    elif size == prod(grid):
        out[dim] = (Atom("h", grid[0]), Atom("w", grid[1]))
    else:
        out[dim] = (replace(tokens, size=size, prefix=tokens.prefix - start),)
    return tuple(out)


def _unfold(axes: Axes, args: Sequence[Any], shape: tuple[int, ...]) -> Axes | None:
    """Patches: (b, channels and places in a patch, patches line after line)."""
    _, kernel, dilation, padding, stride = args
    if len(axes) != 4 or any(_letter(axis) not in (letter, ".") for axis, letter in zip(axes[2:], "hw", strict=True)):
        return None
    sizes = [prod(a.size for a in axis) for axis in axes[2:]]
    steps = zip(sizes, kernel, dilation, padding, stride, strict=True)
    h, w = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, d, p, s in steps)
    return (axes[0], (Atom(UNKNOWN, shape[1]),), (*_axis("h", h), *_axis("w", w)))


# Entries change their places. Of the output nothing is known.
_REORDERING = {
    "index", "index_select", "gather", "take_along_dim", "flip", "sort", "topk",
    "index_copy", "index_add", "index_put", "scatter", "scatter_add", "scatter_reduce", "masked_scatter",
}  # fmt: skip
_RULES = {
    "view": _reshape, "_unsafe_view": _reshape, "reshape": _reshape, "_reshape_alias": _reshape,
    "squeeze": _reshape,  # the dimensions that go have no atoms
    "permute": _permute, "transpose": _transpose, "t": _transpose,
    "unsqueeze": _unsqueeze, "select": _remove, "unbind": _unbind, "slice": _slice,
    "im2col": _unfold,
    "mean": _remove, "sum": _remove, "amax": _remove, "amin": _remove, "max": _remove,
}  # fmt: skip
