"""Data sets that have a name: those in `NAMED`, torchvision's, and those of the Hugging Face hub."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptee._common.errors import DataError, UnknownName, first_line, possible
from ptee._common.files import folders_like
from ptee._common.listing import HUB, STREAMS
from ptee.data.demo_images import DEMO, demo_listing
from ptee.data.folders import Listing
from ptee.data.pixels import FORMATS

if TYPE_CHECKING:
    from PIL.Image import Image

# Values of torchvision's `split` for training and validation; the first pair that exists is used. 'trainval' contains 'val'.
SPLIT_PAIRS = (("train", "val"), ("train", "valid"), ("train", "test"), ("trainval", "test"), ("train-standard", "val"))
HUB_VALIDATION = ("validation", "valid", "val", "test")  # splits; the first that exists is used
# Data sets whose mirror images are of another class or of none.
SIDED = (DEMO, "digits", "emnist", "gtsrb", "kmnist", "mnist", "omniglot", "qmnist", "renderedsst2", "svhn", "usps")


def list_named(name: str, root: Path | None, seed: int) -> Listing:
    """The pictures of "digits", "CIFAR10", "torch/cifar10", "hfds/user/name" and the like.

    `root` is the folder that holds torchvision's data set, by default the current one; or the cache of the hub.
    """
    require_name(name)
    if name.startswith(f"{HUB}/"):
        return _list_hub(name, root)
    return NAMED[name](seed) if name in NAMED else _list_torchvision(name, root or Path())


def is_sided(name: str) -> bool:
    """Whether mirror images of this data set are of another class or of none."""
    return name.lower().rpartition("/")[2].replace("_", "") in SIDED


def holds_sided(data_set: Any) -> bool:
    """Whether a data set from Python is one of these, such as `torchvision.datasets.MNIST`, or a subset of one, or made of some."""
    from torch.utils.data import ConcatDataset, Subset

    if isinstance(data_set, ConcatDataset):
        return any(map(holds_sided, data_set.datasets))
    return holds_sided(data_set.dataset) if isinstance(data_set, Subset) else is_sided(type(data_set).__name__)


def _list_digits(_: int) -> Listing:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")  # (n, 8, 8), was 0..16
    pictures = [(Image.fromarray(rows), int(label)) for rows, label in zip(pixels, digits.target, strict=True)]
    # '0'..'9' would be taken for numbers of a backbone's classes
    return Listing("digits", {"train": pictures}, {"train": "digits"}, tuple(f"digit {i}" for i in range(10)))


NAMED: dict[str, Callable[[int], Listing]] = {"digits": _list_digits, DEMO: demo_listing}


# ------------------------------------------------------------------------------------------------ the hub


class _HubPictures:
    """Pictures with labels of timm's reader."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        from PIL import Image

        stream, label = self.reader[index]
        with stream:
            image = Image.open(stream, formats=FORMATS)
            image.load()
        return image, label


def _list_hub(name: str, root: Path | None) -> Listing:
    try:
        parts, origin = _open_hub(name, root)
    except ImportError as why:
        raise DataError(f"'{name}' needs the package datasets: pip install datasets.") from why
    except Exception as why:  # from the data set's own script, the connection or the disk
        raise DataError(f"'{name}' cannot be read from the Hugging Face hub: {first_line(why)}") from why
    names: dict[str, int] = parts["train"].reader.class_to_idx
    if not names:
        raise DataError(f"'{name}' does not name its classes: pass it from Python, as a data set of (image, label).")
    return Listing(HUB, parts, origin, tuple(map(str, sorted(names, key=lambda key: names[key]))))


def _open_hub(name: str, root: Path | None) -> tuple[dict[str, Any], dict[str, str]]:
    from timm.data.readers import create_reader

    def opened(split: str) -> _HubPictures:
        return _HubPictures(create_reader(name, root=str(root) if root else None, split=split))

    parts, origin = {"train": opened("train")}, {"train": "train"}
    for split in HUB_VALIDATION:
        with suppress(ValueError):  # there is no such split
            parts["validation"], origin["validation"] = opened(split), split
            break
    return parts, origin


# ------------------------------------------------------------------------------------------------ torchvision


def require_name(name: str) -> None:
    """Refuse what is no name of a data set, without reading any."""
    prefix, _, rest = name.partition("/")
    if prefix in STREAMS and rest:
        raise DataError(
            f"'{name}' is a stream, and ptee needs images that it can pick by their number. Give a folder, or '{HUB}/{rest}' "
            "from the Hugging Face hub."
        )
    if name not in NAMED and not (prefix == HUB and rest):
        _find_in_torchvision(name)


def _find_in_torchvision(name: str) -> Any:
    from torchvision import datasets

    prefix, _, rest = name.partition("/")
    name = rest if prefix == "torch" and rest else name
    makers = {key: make for key, make in vars(datasets).items() if inspect.isclass(make) and _has_training_part(make)}
    lower = {key.lower(): key for key in makers}
    asked = name.lower() if name.lower() in lower else name.lower().replace("_", "")  # timm says fashion_mnist
    if asked not in lower:
        if like := folders_like(Path(name)):
            raise UnknownName(f"There is no folder {name!r}, and no data set of that name. Did you mean '{like[0]}'?")
        names = possible(name, lower if name.islower() else makers, first=[*NAMED], most=len(lower) + len(NAMED))
        raise UnknownName(f"There is no folder {name!r}, and no data set of that name.{names}")
    return makers[lower[asked]]


def _list_torchvision(name: str, root: Path) -> Listing:
    make = _find_in_torchvision(name)
    try:
        parts, origin = _open_parts(make, root)
        labels = [part[0][1] for part in parts.values()]
    except Exception as error:  # each data set raises its own kinds
        raise DataError(_not_read(make, root, error)) from error
    for label in labels:
        if not isinstance(label, Integral):
            kind = type(label).__name__
            raise DataError(f"torchvision's {make.__name__} has {kind} for a label, not a class number.")
    return Listing("torchvision", parts, origin, _class_names(parts))


def _has_training_part(make: type) -> bool:
    """Whether a data set has a training part, takes a transform, and needs no other argument than `root`."""
    parameters = inspect.signature(make).parameters
    more = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]  # for a base class that takes `transform`
    needed = [p.name for p in parameters.values() if p.default is p.empty and p not in more]
    split = parameters.get("split")
    has_part = "train" in parameters or (split is not None and str(split.default).startswith("train"))
    return needed == ["root"] and has_part and ("transform" in parameters or bool(more))


def _open_parts(make: Callable[..., Any], root: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if "train" in inspect.signature(make).parameters:
        parts = {"train": make(str(root), train=True), "validation": make(str(root), train=False)}
        return parts, {"train": "train=True", "validation": "train=False"}
    for train, validation in SPLIT_PAIRS:
        try:
            rest = make(str(root), split=validation)
            parts = {"train": make(str(root), split=train), "validation": rest}
            return parts, {"train": train, "validation": validation}
        except ValueError as error:
            if "Unknown value" not in str(error):  # torchvision's words for a split that a data set does not have
                raise
    raise DataError(f"it has none of these pairs of splits: {', '.join(map('/'.join, SPLIT_PAIRS))}")


def _not_read(make: type, root: Path, error: Exception) -> str:
    """torchvision's first sentence, and where it looked. Its second advises a download that the reader should not start."""
    why = (str(error) or type(error).__name__).split("\n")[0].split(". ")[0].rstrip(".")
    fetch = f", or fetch it once with torchvision.datasets.{make.__name__}('{root}', download=True)"
    hint = fetch if "download" in inspect.signature(make).parameters else ""
    looked = f"torchvision's {make.__name__} was looked for in '{root.absolute()}'"
    return f"{looked}: {why}. Give the folder that holds it (--data-root FOLDER; in Python root=){hint}."


def _class_names(parts: dict[str, Any]) -> tuple[str, ...]:
    """WordNet ids or names, where the data set has them."""
    for attribute in ("wnids", "classes"):
        if names := getattr(parts["train"], attribute, None):
            return tuple(map(str, names))
    return tuple(f"class {i}" for i in range(1 + max(max(_labels(part)) for part in parts.values())))


def _labels(dataset: Any) -> list[int]:
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(dataset, attribute):
            return [int(label) for label in getattr(dataset, attribute)]
    return [int(dataset[i][1]) for i in range(len(dataset))]  # decodes every picture; only GTSRB, FER2013 and PCAM
