"""Segments: the forward pass of an early-exit model as pieces, one behind the other.

A cut cuts the forward pass in time as well. Piece n takes the tensors that are alive at cut n-1 and gives those that are alive
at cut n, with the answer of exit n. The last piece gives the backbone's answer. Between two pieces rows may leave: all that
must follow them are the tensors that are alive.

The pass is captured once by `torch.export`, with a number of rows that stays open. A hook at each cut passes the feature map
through an operator that does nothing and marks the place. The captured graph is then taken apart at the marks. A graph knows
exactly what is alive at a place, so a piece may hand on several tensors, and a model whose code remembers the number of rows is
no exception: in each piece that number is read from the tensors that the piece takes.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from ptee._common.errors import PteeError
from ptee.deploy.capture import captured
from ptee.deploy.refusal import at
from ptee.model.early_exit import EarlyExitModel

PRODUCTS = ("conv", "linear", "matmul", "bmm", "attention")
ROOM = 4  # so many times the products ahead must come before the next exit


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch lie in a tensor.

    Attributes:
        axis: that holds them.
        each: how many entries of the axis belong to a row, such as its tokens or windows.
    """

    axis: int = 0
    each: int = 1

    def select(self, tensor: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The part of a tensor that belongs to these rows (n,), written to `out` if that is given."""
        if self.each == 1:
            return torch.index_select(tensor, self.axis, rows, **({} if out is None else {"out": out}))
        folded = tensor.unflatten(self.axis, (-1, self.each)).index_select(self.axis, rows)
        whole = folded.flatten(self.axis, self.axis + 1)
        return whole if out is None else out.copy_(whole)


@dataclass(frozen=True)
class Segment:
    """A piece of the forward pass.

    Attributes:
        module: takes the tensors that are alive before; gives (those alive behind, logits (b, K), confidence logit (b,)), or
            for the last piece the backbone's answer (b, K).
        ahead: takes the tensors that are alive at the cut and goes a few steps on with all rows, while it is decided who leaves;
            gives what is alive then. None: no steps.
        rows: where the rows lie in each tensor that is alive at the end of all this; empty for the last.
        exit: the number of the exit, -1 for the last piece.
        earlier: for each earlier exit that is kept, the number of its logits among the tensors that are alive behind it.
    """

    module: Callable[..., Any]
    ahead: Callable[..., Any] | None
    rows: tuple[Rows, ...]
    exit: int
    earlier: Mapping[int, int]


def segments(model: EarlyExitModel, *, keep_logits: bool = False, ahead: int = 0) -> list[Segment]:
    """The pieces of a model, one for each exit whose head runs, and the last.

    Args:
        model: in eval mode. The pieces share its weights.
        keep_logits: hand on the logits of each exit to all later pieces, for a confidence or a blend that reads them.
        ahead: how many products (convolutions, linear layers) of the next piece all rows go through while it is decided who
            leaves.
    """
    return _Splitter(captured(model), keep_logits, ahead).pieces()


def without_head(segment: Segment) -> Callable[..., Any]:
    """The piece without its head: what is alive at the cut, with the steps ahead. To be timed beside the whole piece.

    A head that a later one builds on is still there. The module of the segment must be as `segments` made it.
    """
    if segment.exit < 0:
        return segment.module
    assert isinstance(segment.module, fx.GraphModule)
    graph = fx.Graph()
    said = graph.graph_copy(segment.module.graph, {})
    assert isinstance(said, tuple)
    graph.output(said[0])
    graph.eliminate_dead_code()
    module = fx.GraphModule(segment.module, graph)
    ahead = segment.ahead
    return module if ahead is None else lambda *tensors: ahead(*module(*tensors))


# ---------------------------------------------------------------------------------------------------- taking apart


class _Splitter:
    """Takes a captured graph apart at its marks."""

    def __init__(self, whole: fx.GraphModule, keep_logits: bool, ahead: int) -> None:
        self.whole = whole
        _spare_images(whole.graph)
        self.nodes = [n for n in whole.graph.nodes if n.op not in ("get_attr", "output") and not _only_checks(n)]
        self.images = next(n for n in self.nodes if n.op == "placeholder")
        self.batch = self.images.meta["val"].shape[0]
        answer, *said = next(n for n in whole.graph.nodes if n.op == "output").args[0]
        self.answer = answer
        self.said = list(zip(said[0::2], said[1::2], strict=True))
        self.exits, self.piece = self._numbered(ahead)
        if len(self.exits) != len(self.said):
            raise PteeError(
                "A cut lies inside of code that switches autocast or gradients, and torch.export hides that. Plan the exits elsewhere."
            )
        self.of_images = self._depend_on_images()
        self.changed = self._changed_in_place()
        self.constants = self._of_weights_alone()
        self.kept_logits = [logits for logits, _ in self.said] if keep_logits else []

    def _numbered(self, ahead: int) -> tuple[list[int], dict[fx.Node, int]]:
        """The exits in order, and the number of the piece in which each node is computed.

        Pieces 2i lead to exit i, and pieces 2i + 1 are the steps ahead behind it.
        """
        exits: list[int] = []
        piece: dict[fx.Node, int] = {}
        number = 0
        for node, left in zip(self.nodes, self._products_to_next_mark(), strict=True):
            if _is_mark(node) and node.args[1] not in exits:
                exits.append(node.args[1])
                number = 2 * len(exits) - 1
                todo = ahead if left >= ROOM * ahead else 0
            piece[node] = number - 1 if _is_mark(node) else number
            if number % 2 and not _is_mark(node):
                if not todo:
                    number += 1
                    piece[node] = number
                elif _is_product(node):
                    todo -= 1
        return exits, piece

    def _products_to_next_mark(self) -> list[int]:
        """For each node, how many products come behind it and before the next exit or the end."""
        counts, behind, exit = [], 0, None
        for node in reversed(self.nodes):
            if _is_mark(node) and node.args[1] != exit:
                exit, counts_here = node.args[1], behind
                behind = 0
            counts.append(counts_here if _is_mark(node) else behind)
            behind += _is_product(node)
        return counts[::-1]

    def _depend_on_images(self) -> set[fx.Node]:
        """The nodes whose values, not only whose shapes, depend on the images.

        What something of the images is written into depends on them, and so do all views of it, also those that were taken before.
        """
        found, written, known = {self.images}, set[fx.Node](), 0
        while len(found) > known:
            known = len(found)
            for node in self.nodes:
                if _is_number(node):
                    continue
                if any(a in found and not _is_number(a) for a in node.all_input_nodes) or _memory_of(node) in written:
                    found.add(node)
                    if _writes(node):
                        written.add(_memory_of(node))
        return found

    def _of_weights_alone(self) -> set[fx.Node]:
        """The tensors that follow from the weights: neither from the images nor from the number of rows."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            fixed = node not in self.changed and all(a.op == "get_attr" or a in found for a in node.all_input_nodes)
            if fixed and node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
                found.add(node)
        return found

    def _changed_in_place(self) -> set[fx.Node]:
        """The nodes that write, and what they may write into: it must be made anew in each call."""
        found = {node for node in self.nodes if _writes(node)}
        todo = [a for node in found if node not in self.of_images for a in node.all_input_nodes]
        while todo:
            if (node := todo.pop()) not in found:
                found.add(node)
                todo += node.all_input_nodes
        return found

    def constant(self, node: fx.Node) -> str:
        """The name under which the value of such a node is kept. It is computed once."""
        name = f"constant_{node.name}"
        if not hasattr(self.whole, name):
            self.whole.register_buffer(name, self._value(node), persistent=False)
        return name

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return reduce(getattr, str(node.target).split("."), self.whole)
        assert callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        with torch.no_grad():
            return node.target(*args, **kwargs)

    def pieces(self) -> list[Segment]:
        """All of them, in order."""
        alive, rows = [self.images], [Rows()]
        made = []
        for i, exit in enumerate(self.exits):
            at_cut, behind = self._alive_behind(2 * i), self._alive_behind(2 * i + 1)
            module = self._graph(2 * i, alive, rows, (tuple(at_cut), *self.said[i]))
            ahead = None
            if at_cut != behind:
                ahead = self._graph(2 * i + 1, at_cut, list(map(self._rows_of, at_cut)), tuple(behind))
            alive, rows = behind, list(map(self._rows_of, behind))
            made.append(Segment(module, ahead, tuple(rows), exit, self._earlier(alive)))
        last = self._graph(2 * len(self.exits), alive, rows, self.answer)
        return [*made, Segment(last, None, (), -1, self._earlier(alive))]

    def _earlier(self, alive: list[fx.Node]) -> dict[int, int]:
        return {m: alive.index(y) for m, (y, _) in zip(self.exits, self.said, strict=True) if y in alive}

    def _alive_behind(self, i: int) -> list[fx.Node]:
        """What is computed in the pieces up to number i, and read in those behind. Marks stand for what they mark."""
        alive = self._read_behind(i)
        shared = [root for root, many in Counter(map(_memory_of, alive)).items() if many > 1]
        for node in self.nodes:
            if self.piece[node] > i and _writes(node) and any(_memory_of(a) in shared for a in node.all_input_nodes):
                raise PteeError(
                    f"Behind a cut, {at(node)} writes into memory that two values at the cut share. Write the step without "
                    "changing a value in place."
                )
        return alive

    def _read_behind(self, i: int) -> list[fx.Node]:
        wanted: dict[fx.Node, None] = {}
        readers = [(node, node.all_input_nodes) for node in self.nodes if self.piece[node] > i]
        for _, inputs in [*readers, (None, [self.answer, *self.kept_logits])]:
            for node in map(_behind_mark, inputs):
                if node in self.of_images and self.piece[node] <= i:
                    wanted[node] = None
        return [n for n in self.nodes if n in wanted]

    def _rows_of(self, node: fx.Node) -> Rows:
        shape = node.meta["val"].shape
        for axis, size in enumerate(shape):
            if isinstance(size, torch.SymInt):
                each = _multiple(size, self.batch)
                if each is not None:
                    return Rows(axis, each)
        raise PteeError(
            f"At a cut, what {at(node)} gives, of shape {tuple(shape)}, is alive, and no axis of it holds the rows of the batch."
        )

    def _graph(self, i: int, takes: Sequence[fx.Node], rows: Sequence[Rows], gives: Any) -> fx.GraphModule:
        return fx.GraphModule(self.whole, _Piece(self, i, takes, rows).graph_of(gives))


class _Piece:
    """Builds the graph of one piece."""

    def __init__(self, splitter: _Splitter, number: int, takes: Sequence[fx.Node], rows: Sequence[Rows]) -> None:
        self.splitter, self.number = splitter, number
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, Any] = {}
        for node in takes:
            self.copies[node] = self.graph.placeholder(node.name)
            self.copies[node].meta = dict(node.meta)
        self._first, self._rows = self.copies[takes[0]], rows[0]
        self._count: fx.Node | None = None

    def graph_of(self, gives: Any) -> fx.Graph:
        """The graph that gives these nodes. Steps keep their order: some write into what others read."""
        for node in self.splitter.nodes:
            if self._is_step(node):
                self.copy(node)
        self.graph.output(fx.map_arg(gives, self.copy))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return self.graph

    def _is_step(self, node: fx.Node) -> bool:
        """Whether it belongs to this piece, or to an earlier one and is made anew: a value that is written into."""
        if node.op == "placeholder" or _is_mark(node) or _is_number(node):
            return False
        number = self.splitter.piece[node]
        again = node in self.splitter.changed and node not in self.splitter.of_images
        return number == self.number or (number < self.number and again)

    def copy(self, node: fx.Node) -> Any:
        """The node's copy in this graph, made with all it needs where there is none yet."""
        node = _behind_mark(node)
        if node not in self.copies:
            self.copies[node] = self._size(node) if self._is_size(node) else self._copied(node)
        return self.copies[node]

    def _copied(self, node: fx.Node) -> fx.Node:
        if node in self.splitter.of_images and self.splitter.piece[node] != self.number:
            raise PteeError(f"What {at(node)} gives is needed behind a cut and was not handed on.")
        if node.op == "call_function" and node in self.splitter.constants:
            return self.graph.get_attr(self.splitter.constant(node))
        return self.graph.node_copy(node, self.copy)

    def _is_size(self, node: fx.Node) -> bool:
        return _is_number(node) and any(a in self.splitter.of_images for a in node.all_input_nodes)

    def _size(self, node: fx.Node) -> Any:
        """A size that was read from a tensor: a multiple of the number of rows."""
        each = _multiple(node.meta["val"], self.splitter.batch)
        if each is None:
            raise PteeError(f"{at(node)} gives a size that is no multiple of the number of rows.")
        if self._count is None:
            self._count = self.graph.call_function(torch.ops.aten.sym_size.int, (self._first, self._rows.axis))
            if self._rows.each > 1:
                self._count = self.graph.call_function(operator.floordiv, (self._count, self._rows.each))
        return self._count if each == 1 else self.graph.call_function(operator.mul, (self._count, each))


def _is_mark(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.ptee.cut.default


def _is_product(node: fx.Node) -> bool:
    """Whether it is one of the steps that take most of the time."""
    return node.op == "call_function" and any(word in str(node.target) for word in PRODUCTS)


def _behind_mark(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0] if _is_mark(node) else node


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _only_checks(node: fx.Node) -> bool:
    """Nodes that check what export assumed, and give nothing."""
    return node.op == "call_module" or "assert" in str(node.target) or "sym_constrain" in str(node.target)


def _writes(node: fx.Node) -> bool:
    """Whether an operator changes one of its inputs, so that it must run even if nobody reads what it gives."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _spare_images(graph: fx.Graph) -> None:
    """Where a network writes into its images, let it write into a copy: who has the files may give the same images twice."""
    images = next(n for n in graph.nodes if n.op == "placeholder")
    if any(_writes(n) and _memory_of(n) is images for n in graph.nodes):
        with graph.inserting_after(images):
            copy = graph.call_function(torch.ops.aten.clone.default, (images,))
        copy.meta = dict(images.meta)
        images.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


def _memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory this one's value lies in, as far as operators say: of a view the tensor that is viewed."""
    node = _behind_mark(node)
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or not node.all_input_nodes:
        return node
    if schema is None:  # an entry of what an operator gave
        return _memory_of(node.all_input_nodes[0])
    return _memory_of(node.all_input_nodes[0]) if any(r.alias_info is not None for r in schema.returns) else node


def _multiple(size: Any, batch: torch.SymInt) -> int | None:
    """k if size is k * batch, for every batch."""
    if not isinstance(size, torch.SymInt):
        return None
    quotient = size.node.expr / batch.node.expr
    return int(quotient) if quotient.is_Integer and quotient > 0 else None
