"""A model in recorded pieces, for a few sizes of batches: the buckets.

A piece is recorded once for each bucket. A batch fills the smallest bucket that takes it, and empty places hold nobody. Behind an
exit the host reads one number, how many rows stay. Where a smaller bucket takes them, what is alive at the cut is copied there;
otherwise nothing moves.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptee._common.devices import wait
from ptee._common.errors import PteeError, first_line, ran_out_of_memory
from ptee.deploy.segments import Rows
from ptee.exits.blend import confidence_of_blend
from ptee.exits.confidence import not_below
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import ExitOutput
from ptee.recording.budget import Budget, peak
from ptee.recording.decision import Answers, Staying, decide, end

SIZES = (1, 2, 4, 6, *range(8, 32, 4), *range(32, 64, 8), *range(64, 129, 16))  # then in steps of 1/8 or less
UNKNOWN = -1  # how many rows stay, before the device has said so
LOOKS = 4096  # between two checks that the device is still at work


def sizes_up_to(most: int) -> list[int]:
    """The sizes of buckets for batches of up to so many images."""
    sizes = list(SIZES)
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(16, sizes[-1] // 128 * 16))
    return [*(s for s in sizes if s < most), most]


@dataclass
class Bucket:
    """The pieces, recorded for one size of batches.

    Attributes:
        images: (size, c, h, w) what the first piece reads.
        rows: (size,) the row that each place holds at first, or nobody.
        filled: how many places hold a row at first.
        alive: for each exit the tensors that the next piece reads.
        where: for each exit where the rows lie in each of them.
        staying: for each exit who goes on.
        replay: for each piece what repeats it.
        kept: whose memory nothing else may take.
        made: what a piece makes of weights alone and a later piece reads, as bytes. An older recording may use their memory in between.
        constants: each of these, and what it holds.
    """

    images: Tensor
    rows: Tensor
    filled: int = 0
    alive: list[Sequence[Tensor]] = field(default_factory=list)
    where: list[Sequence[Rows]] = field(default_factory=list)
    staying: list[Staying] = field(default_factory=list)
    replay: list[Callable[[], None]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    constants: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what was recorded."""
        for recorded in (self.alive, self.where, self.staying, self.replay, self.kept, self.made, self.constants):
            recorded.clear()

    @property
    def size(self) -> int:
        """Places."""
        return self.rows.shape[0]


class Buckets(ABC):
    """Runs batches through recorded pieces. A subclass says where the pieces come from.

    Args:
        model: in eval mode; what it says of confidence, exits that are off and blended answers is recorded as it is now.
        exits: at the ends of the pieces, but of the last.
        max_batch: the largest batch.
        example: (1, c, h, w) images as they will be.

    Attributes:
        budget: the memory that recordings may take.
        check: called with these buckets and the size of a new one; raises PteeError if its answers are wrong. None: nothing is checked.
    """

    how = "in pieces of"  # in a message, before the name of the backbone

    def __init__(self, model: EarlyExitModel, exits: Sequence[int], max_batch: int, example: Tensor) -> None:
        self.model = model
        self.device = example.device
        self.exits = exits
        self.sizes = sizes_up_to(max_batch)
        self._size_for = [next(s for s in self.sizes if s >= n) for n in range(1, max_batch + 1)]
        self._example = example
        dtype = model.answer_type(self._example)
        self.answers = Answers(max_batch, model.num_classes, model.costs, dtype, self.device)
        self.rule = model.rule
        self.name = model.confidence if self.rule.blend is None else confidence_of_blend(model.confidence)
        self._counts = torch.zeros(len(exits) + 1, dtype=torch.int64, device="cpu")
        if self.device.type == "cuda":
            self._counts = self._counts.pin_memory()
        self._read = self._counts.numpy()  # the same memory
        self._unread: list[int] = []  # exits whose numbers nobody has waited for
        self._stream: torch.cuda.Stream | None = None  # of the call before
        self._buckets: dict[int, Bucket] = {}
        self._refused: dict[int, str] = {}  # sizes that cannot be recorded, and why
        self._no_room: set[int] = set()  # sizes that no batch moves to any more, because the GPU was full
        self._needs: dict[int, int] = {}  # bytes of each size
        self.budget = Budget(self.device, None)
        self.check: Callable[[Buckets, int], None] | None = None
        self._in_force: tuple[float, ...] = ()  # the thresholds on the device, if they are the same for all rows

    def has_recorded(self, rows: int) -> bool:
        """Whether the smallest bucket for so many rows is there."""
        return self._size_for[rows - 1] in self._buckets

    def bucket_for(self, rows: int) -> Bucket:
        """The smallest bucket for so many rows, recorded if it is asked for for the first time."""
        size = self._size_for[rows - 1]
        if size not in self._buckets:
            if not self.budget.allows(lambda: self.memory_for(size)):
                raise self.budget.refusal(size, self.memory_for(size))
            try:
                self._add(size)
            except PteeError as why:
                self._refused[size] = str(why)
                raise
        return self._buckets[size]

    def _add(self, size: int) -> None:
        if size in self._refused:
            raise PteeError(self._refused[size])
        self.budget.spend(lambda: self._buckets.update({size: self._recorded(size)}))
        if self.check is not None:
            self._checked(size, self.check)

    def _checked(self, size: int, check: Callable[[Buckets, int], None]) -> None:
        """Check a new bucket, in the middle of a call, too: then what is known of its rows is kept."""
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            kept += [(t, t.clone()) for t in self.answers.tensors]
            check(self, size)
        except BaseException:
            del self._buckets[size]
            raise
        finally:
            self._await_numbers()
            self._in_force = ()
            for tensor, value in kept:
                tensor.copy_(value)

    def _await_numbers(self) -> None:
        """Wait for those that nobody waited for: they must not come later than others of the same exits."""
        while self._unread:
            self._number(self._unread[0])

    def memory_for(self, rows: int) -> int:
        """About how many bytes of a GPU recording the bucket for so many rows takes: what one pass uses at once, as the model is."""
        size = self._size_for[rows - 1]
        if size not in self._needs:
            images = self._empty(size).images
            with torch.no_grad():
                self._needs[size] = peak(self.device, lambda: self.model.all_exits(images))
        return self._needs[size]

    def _smaller(self, rows: int, bucket: Bucket) -> Bucket:
        """The bucket for so many rows. Where there is no memory for it, or it cannot be recorded, the one in which they are."""
        size = self._size_for[rows - 1]
        if self.has_recorded(rows):
            return self._buckets[size]
        if size in self._refused or size in self._no_room:
            return bucket
        try:
            return self.bucket_for(rows) if self.budget.allows(lambda: self.memory_for(size)) else bucket
        except PteeError:  # it is refused from now on
            return bucket
        except (RuntimeError, MemoryError) as why:
            if not ran_out_of_memory(why):
                raise
            self._no_room.add(size)
            return bucket

    def __call__(
        self,
        x: Tensor,
        thresholds: Sequence[float | Tensor],
        mark: Callable[[], None] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> ExitOutput:
        """What `predict` answers to images (b, c, h, w), b up to the largest batch. T of each exit is a number or (b,).

        `mark` is called when the images lie in their places, and behind each piece, whose number is waited for in any case.
        `meanwhile` is called once, as soon as the first piece was started.
        """
        try:
            return self._answered(x, thresholds, mark, meanwhile)
        except BaseException:  # also Ctrl-C: the next call begins with nothing under way
            self._finish()
            raise

    def _finish(self) -> None:
        """Wait until this thread's work is done. Waiting for all of a GPU would break what other threads record."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        else:
            wait(self.device)
        self._unread.clear()

    def __del__(self) -> None:
        if getattr(self, "_unread", None):  # the GPU is about to write to the host's memory, which others get next
            with suppress(Exception):  # also at the end of the process
                (self._stream or torch.cuda.current_stream(self.device)).synchronize()

    @abstractmethod
    def replays_without_heads(self, rows: int) -> list[Callable[[], None]]:
        """What repeats each piece without its head, in the size of the bucket for so many rows."""

    @abstractmethod
    def _record(self, bucket: Bucket) -> None:
        """Record all pieces for a bucket, whose places hold nobody yet."""

    def _answered(
        self,
        x: Tensor,
        thresholds: Sequence[float | Tensor],
        mark: Callable[[], None] | None,
        meanwhile: Callable[[], None] | None,
    ) -> ExitOutput:
        self._follow()
        rows = x.shape[0]
        bucket = self.bucket_for(rows)
        self._fill(bucket, x, thresholds)
        self._await_numbers()  # of the call before
        if mark is not None:
            mark()
        for n, exit in enumerate(self.exits):
            self._read[n] = UNKNOWN
            self._unread.append(n)
            self._start(bucket, n, meanwhile)
            if mark is None and isinstance(thresholds[exit], float) and thresholds[exit] > 1:
                continue  # nobody leaves, so there is no number to wait for
            staying = self._number(n)
            if mark is not None:
                mark()
            if not staying:
                break
            smaller = self._smaller(staying, bucket)
            if smaller.size < bucket.size:
                self._move(n, bucket, smaller)
                bucket = smaller
        else:
            self._start(bucket, len(self.exits), meanwhile)
        if mark is not None:
            mark()
        return ExitOutput(*self.answers.of_rows(rows))

    def _start(self, bucket: Bucket, n: int, meanwhile: Callable[[], None] | None) -> None:
        """Start piece n, and do what is to be done while the first one runs."""
        bucket.replay[n]()
        if n == 0 and meanwhile is not None:
            meanwhile()

    def _follow(self) -> None:
        """Work of a call on another stream comes first: it uses the same memory."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
            self._stream = stream

    def _number(self, n: int) -> int:
        """How many rows stay at exit n, once that is known.

        The device writes it to the host's memory. Looking there is much faster than waiting for the device.
        """
        looks = 0
        while (number := self._read[n]) < 0:
            looks += 1
            if looks % LOOKS == 0 and torch.cuda.current_stream(self.device).query() and self._read[n] < 0:
                raise PteeError(f"Exit {n} was not reached on the GPU.")
            time.sleep(0)  # other threads may run
        self._unread.remove(n)
        return int(number)

    def _fill(self, bucket: Bucket, x: Tensor, thresholds: Sequence[float | Tensor]) -> None:
        rows = x.shape[0]
        (bucket.images if rows == bucket.size else bucket.images[:rows]).copy_(x)
        if bucket.filled != rows:
            bucket.filled = 0  # until all is written
            bucket.rows[:rows] = torch.arange(rows, device=self.device)
            bucket.rows[rows:] = self.answers.nobody
            bucket.filled = rows
        self._set_thresholds(thresholds, rows)

    def _set_thresholds(self, thresholds: Sequence[float | Tensor], rows: int) -> None:
        numbers = tuple(t for t in thresholds if isinstance(t, float))
        if len(numbers) < len(thresholds):
            self._in_force = ()
            for n, t in enumerate(thresholds):
                self.answers.thresholds[:rows, n] = t
        elif numbers != self._in_force:
            self._in_force = ()  # until all is written
            self.answers.thresholds.copy_(not_below(numbers, self.answers.thresholds.dtype, torch.device("cpu")))
            self._in_force = numbers

    def _move(self, n: int, bucket: Bucket, smaller: Bucket) -> None:
        """Copy what is alive behind exit n to where a smaller bucket goes on."""
        staying, to = bucket.staying[n], smaller.staying[n]
        order = staying.order[: smaller.size]
        for rows, source, target in zip(bucket.where[n], bucket.alive[n], smaller.alive[n], strict=True):
            rows.select(source, order, out=target)
        to.rows.copy_(staying.packed[: smaller.size])
        for constant, value in smaller.constants:
            constant.copy_(value)

    # -------------------------------------------------------------------------------------------- recording

    def _recorded(self, size: int) -> Bucket:
        try:
            return self._recorded_once(size)
        except PteeError as why:
            if not isinstance(why.__cause__, torch.AcceleratorError):
                raise
        return self._recorded_once(size)  # another thread, which waited for the whole GPU, may have broken it

    def _recorded_once(self, size: int) -> Bucket:
        bucket = self._empty(size)
        with torch.no_grad(), self._in_words(bucket):
            self._record(bucket)
        return bucket

    @contextmanager
    def _in_words(self, bucket: Bucket) -> Iterator[None]:
        """Whatever the model's code and CUDA raise in a recording is told in a line."""
        try:
            yield
        except PteeError:
            raise
        except Exception as why:
            if ran_out_of_memory(why):
                raise
            raise self._not_recorded(bucket, first_line(why)) from why

    def _not_recorded(self, bucket: Bucket, reason: str) -> PteeError:
        where = f"Batches of {bucket.size}" if bucket.size > 1 else "Single images"
        return PteeError(f"{where} cannot be recorded {self.how} {self.model.plan.backbone}: {reason.rstrip('.')}.")

    def _empty(self, size: int) -> Bucket:
        """A bucket that nothing is recorded for."""
        images = self._example.expand(size, *self._example.shape[1:]).clone(memory_format=torch.preserve_format)
        if self._example.is_contiguous(memory_format=torch.channels_last):
            images = images.contiguous(memory_format=torch.channels_last)
        return Bucket(images, torch.full((size,), self.answers.nobody, device=self.device))

    def _decided(self, n: int, rows: Tensor, logits: Tensor, sure: Tensor, earlier: Mapping[int, Tensor]) -> Staying:
        """Who goes on behind piece n; the arguments are those of `ExitRule.at_exit` and of `decide`."""
        exit = self.exits[n]
        if self.device.type != "cuda":
            staying = decide(self.answers, exit, rows, *self.rule.at_exit(exit, logits, sure, earlier))
            self._counts[n].copy_(staying.number)
            return staying
        from ptee.recording import kernels

        kind = kernels.KINDS.get(self.name, kernels.GIVEN)
        if torch.float64 in (logits.dtype, sure.dtype):  # the kernel computes in float32
            kind = kernels.GIVEN
        if kind == kernels.GIVEN:
            logits, sure = self.rule.at_exit(exit, logits, sure, earlier)
        else:
            logits = self.rule.answer(exit, logits, earlier)
        return kernels.decide(self.answers, exit, rows, logits, sure, kind, self._counts[n : n + 1])

    def _thresholds(self, rows: Tensor) -> dict[int, Tensor]:
        return dict(enumerate(self.answers.thresholds[rows].unbind(1)))

    def _ended(self, rows: Tensor, own: Tensor, earlier: Mapping[int, Tensor]) -> None:
        """Take the answers of the rows that are left behind the last piece; `own` are the backbone's."""
        end(self.answers, rows, self.rule.at_end(own, earlier, self._thresholds(rows)))
