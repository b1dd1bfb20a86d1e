"""The data of a training: views of it, its cache, and the batches of each epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from zlib import crc32

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset

from ptee._common.errors import Argument, DataError, warn
from ptee._common.shares import SharedLoader, ShareOfBatches
from ptee.data.batches import (
    TRAINED_ON,
    WATCHED,
    CpuLoader,
    all_over,
    batches,
    is_loader,
    known_by,
    shared_batches,
    split_batch,
    with_record,
)
from ptee.data.pictures import Pictures
from ptee.model.early_exit import EarlyExitModel
from ptee.training.augmentation import PRIME, Views
from ptee.training.config import JOINT, TrainingConfig
from ptee.training.feature_cache import (
    LIMIT,
    Cache,
    CacheFolder,
    CacheTooLargeError,
    Estimate,
    NotCached,
    changing_images,
    fill,
)
from ptee.training.history import History

SHARES = 1024  # of the files of a data set, for `content_hash`
SAMPLES = 8  # of the data, which are read twice to see whether they are always the same
# Where each image is read only once, so many are read twice more. A random transform that acts on a tenth of the images is then
# overlooked in two of a million cases, one that acts on a hundredth in a quarter of them.
REPEATED = 64
NO_SAMPLE = "----"  # stands for a picture that was removed, in the place of its hash
_SHARED: ContextVar[dict[Any, Cache] | None] = ContextVar("shared caches", default=None)


@contextmanager
def shared_caches() -> Iterator[None]:
    """Within this context the backbone runs once for all trainings that read the same images in the same way.

    These have the same backbone, the same images in the same views, and heads with the same layers before those that learn.
    A data set is known by the object, whose samples must not change meanwhile.
    """
    caches: dict[Any, Cache] = {}
    before = _SHARED.set(caches)
    try:
        yield
    finally:
        _SHARED.reset(before)
        for cache in caches.values():
            cache.close()


class TrainingData:
    """The batches of a training with a resolved config. `on_cache` is called with the size of the training images' cache."""

    def __init__(
        self, model: EarlyExitModel, accelerator: Any, config: TrainingConfig, num_workers: int, on_cache: Any
    ) -> None:
        self.model, self.accelerator, self.config = model, accelerator, config
        self.num_workers, self.on_cache = num_workers, on_cache
        self.dtype = next(model.heads.parameters()).dtype
        self.order = torch.Generator()  # of the training images
        self.viewed: Views | Cache | None = None

    @property
    def caches(self) -> bool:
        """Whether data sets are cached. With several processes, each sees other rows in each epoch.

        A backbone that learns gives other maps in each epoch.
        """
        return bool(self.config.cache) and self.config.backbone != JOINT and self.accelerator.num_processes == 1

    @contextmanager
    def opened(self, train_data: Any, val_data: Any, *, cached: bool) -> Iterator[tuple[Any, Any]]:
        """Loaders of the training and the validation images (or None). Caches are filled only if `cached`."""
        train_data = self._with_views(train_data)
        with ExitStack() as stack:
            if isinstance(train_data, CacheFolder):
                train_data = train_data.opened(self.model)
                stack.callback(train_data.close)
            elif cached and self.caches:
                if self.config.views == 1 and not is_loader(train_data):  # of several views all images are compared
                    require_repeating(train_data)
                train_data = self._cached(train_data, "training images", stack, self.on_cache)
            if cached and self.caches and val_data is not None:
                val_data = self._cached(val_data, "validation images", stack)
            self.viewed = train_data if isinstance(train_data, (Views, Cache)) else None
            yield self._loader(train_data, True), None if val_data is None else self._loader(val_data, False)

    def begin(self, epoch: int) -> None:
        """Draw the order and the views of the epoch of this number."""
        seed = self.config.seed * PRIME + epoch
        self.order.manual_seed(seed)
        torch.manual_seed(seed)
        if self.viewed is not None:
            self.viewed.begin(epoch)

    def _with_views(self, data: Any) -> Any:
        views = self.config.views
        assert isinstance(views, int)
        if views == 1:
            return data
        if isinstance(data, CacheFolder):
            text = " needs images, and a cache holds one view of each. Give "
        elif is_loader(data):
            text = f" needs a data set, and this is a {type(data).__name__}, which makes its own batches. Give its data set, or "
        else:
            return Views(data, views, seed=self.config.seed, mirror=self.config.mirror)
        given, one = Argument("views", str(views)), Argument("views", "1")
        raise DataError(given, text, one, ".", value=views)

    def _cached(
        self, data: Any, words: str, stack: ExitStack, callback: Callable[[Estimate], None] | None = None
    ) -> Any:
        """What the heads read of a data set, until the stack is left; a loader as it is."""
        if is_loader(data):
            return data
        self.model.eval()
        views = data if isinstance(data, Views) else None
        shared, key = _SHARED.get(), self._key(data)
        if shared is not None and key in shared:
            return shared[key].with_views(views)
        try:
            cache = fill(
                self.model,
                data,
                batch_size=self.config.batch_size,
                num_workers=self.num_workers,
                around=self.accelerator.autocast,
                description=f"backbone, once over the {words}" + (f", {views.views} views" if views else ""),
                callback=callback,
            )
        except CacheTooLargeError as why:
            if self.config.cache != "auto":
                raise
            self._say(NotCached(why.reason))
            return data
        if shared is None:
            stack.callback(cache.close)
            return cache
        shared[key] = cache
        while len(shared) > 2 and sum(each.estimate.size for each in shared.values()) > LIMIT:
            shared.pop(next(iter(shared))).close()  # the oldest
        return cache.with_views(views)

    def _say(self, what: NotCached) -> None:
        if self.on_cache is not None:
            self.on_cache(what)
        else:
            warn(str(what))

    def _key(self, data: Any) -> tuple[Any, ...]:
        """All that decides what the heads read of a data set, to the last bit."""
        accelerator, config, model = self.accelerator, self.config, self.model
        exits = tuple((e.name, e.shape, _of_head(head)) for e, head in zip(model.exits, model.heads, strict=True))
        how = (str(accelerator.device), accelerator.mixed_precision, self.dtype, config.batch_size)
        return (_Same(model.backbone), model.plan.input_size, exits, _of_data(data), *how)

    def _loader(self, data: Any, shuffle: bool) -> Any:
        size, generator = self.config.batch_size, self.order if shuffle else None
        if self.accelerator.num_processes > 1 and not is_loader(data):
            return self._shared(data, shuffle, generator)
        if isinstance(data, Cache):
            return data.loader(size, shuffle, generator)
        loader = batches(data, batch_size=size, shuffle=shuffle, generator=generator, num_workers=self.num_workers)
        if not isinstance(loader, DataLoader) or self.accelerator.num_processes == 1:  # or somebody's own batches
            return loader
        # The user's own loader: each process takes other batches of it.
        # In training all processes take equally many steps, so rows are repeated in the last batches; in validation each row
        # counts once.
        self.accelerator.even_batches = shuffle
        return self.accelerator.prepare_data_loader(loader, device_placement=False)

    def _shared(self, data: Any, shuffle: bool, generator: torch.Generator | None) -> SharedLoader:
        """The batches that one process would take, of which each process takes its share. In validation it may be empty."""
        order = RandomSampler(data, generator=generator) if shuffle else SequentialSampler(data)
        each = BatchSampler(order, self.config.batch_size, drop_last=False)
        where = self.accelerator.process_index, self.accelerator.num_processes
        sampler = ShareOfBatches(each, *where, fewest=1 if shuffle else 0)
        if isinstance(data, Cache):
            loader: Any = CpuLoader(data, batch_size=None, sampler=sampler, generator=generator)
        else:
            loader = shared_batches(data, sampler, generator=generator, num_workers=self.num_workers)
        return SharedLoader(loader, sampler)


@contextmanager
def noting_images(
    loaders: TrainingData, data: Any, val_data: Any, history: History, *, changes: bool
) -> Iterator[None]:
    """Around a training. If the heads learn, the model's results are dropped, because they are of other heads.

    What stays is a record of the images of all trainings, by which `evaluate` and others know them again; with patience, one of
    `val_data` too. `changes`: the training data may give other images each time.
    """
    model = loaders.model
    seen = {TRAINED_ON: data.known_by() if isinstance(data, CacheFolder) else known_by(data, changes)}
    if loaders.config.patience is not None and val_data is not None:
        seen[WATCHED] = known_by(val_data)
    try:
        yield
    finally:
        if history.epochs:
            before = model.results or {}
            kept = {name: before[name] for name in (TRAINED_ON, WATCHED) if name in before}
            model.results = kept | {name: with_record(kept.get(name), record) for name, record in seen.items()}


class _Same:
    """An object, equal only to itself. It is kept alive, so that no other gets its id."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _of_data(data: Any) -> Any:
    """Which images a data set gives, in which views."""
    if isinstance(data, Views):
        drawn = data.seed if data.views > 2 or not data.mirror else None  # an image and its mirror image need no seed
        return ("views", _of_data(data.data), data.views, data.mirror, drawn if data.views > 1 else None)
    if type(data) is Subset:
        return ("subset", _of_data(data.dataset), tuple(int(i) for i in data.indices))
    return _Same(data)


def _of_head(head: Any) -> Any:
    """The layers of a head before those that learn; of a front head, its network."""
    if (network := getattr(head, "network", None)) is not None:
        return _Same(network)
    return (head.layout, *(repr(part) for part in head.parts()[0]))


def sample_hash(data: Any, *, must_repeat: bool) -> str | None:
    """A hash of each of a few samples of a data set, one after another; dashes for a picture that was removed.

    None if the data set gives other images each time, which `must_repeat` refuses.
    """
    if isinstance(data, CacheFolder):
        return data.identity
    gaps = getattr(data, "gaps", ())
    n = len(data) + len(gaps)
    drawn = all_over(n, SAMPLES)
    there = [place for place in drawn if place not in gaps]
    some = Subset(data, [place - sum(gap < place for gap in gaps) for place in there])
    first, second = (_hashes(some) for _ in range(2))
    if first == second:
        found = dict(zip(there, first, strict=True))
        return "".join(found.get(place, NO_SAMPLE) for place in drawn)
    if must_repeat:
        raise changing_images()
    return None


def require_repeating(data: Any) -> None:
    """Refuse a data set of which some images, among those all over it, are others when they are read again."""
    some = Subset(data, all_over(len(data), REPEATED))
    if _hashes(some) != _hashes(some):
        raise changing_images()


def content_hash(data: Any) -> str | None:
    """A hash of each of some shares of the files of a data set; dashes for a share with a picture that was removed.

    None if the data set does not read files.
    """
    checksums, gaps = _checksums(data), set(getattr(data, "gaps", ()))
    if not checksums:
        return None
    n = len(checksums) + len(gaps)
    shares = [0] * min(SHARES, n)
    for place, checksum in zip((i for i in range(n) if i not in gaps), checksums, strict=True):
        shares[place % SHARES] = crc32(checksum.to_bytes(4, "big"), shares[place % SHARES])
    hashes = [f"{share:08x}"[: len(NO_SAMPLE)] for share in shares]
    for gap in gaps:
        hashes[gap % SHARES] = NO_SAMPLE
    return "".join(hashes)


def _checksums(data: Any) -> list[int]:
    if isinstance(data, Subset):
        every = _checksums(data.dataset)
        return [every[i] for i in data.indices] if every else []
    return data.checksums if isinstance(data, Pictures) else []


def same_samples(one: Any, other: Any) -> bool:
    """Whether two of these may be of the same data set: they are equal but for pictures that were removed."""
    if not isinstance(one, str) or not isinstance(other, str) or len(one) != len(other):
        return one == other
    parts = ([text[i : i + len(NO_SAMPLE)] for i in range(0, len(text), len(NO_SAMPLE))] for text in (one, other))
    return all(a == b or NO_SAMPLE in (a, b) for a, b in zip(*parts, strict=True))


def _hashes(data: Subset[Any]) -> list[str]:
    """Of each image with its label. Hashes are compared, not numbers, because NaN is not equal to itself."""
    if not len(data):
        return []
    images, labels = split_batch(next(iter(batches(data, batch_size=len(data), shuffle=False))))
    tensors = [images] if labels is None else [images, labels]
    rows = ([tensor[i : i + 1].cpu().contiguous() for tensor in tensors] for i in range(len(images)))
    return [
        hashlib.sha256(b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in row)).hexdigest()[
            : len(NO_SAMPLE)
        ]
        for row in rows
    ]
