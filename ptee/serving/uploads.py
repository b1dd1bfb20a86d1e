"""From the body of a request, or an array of a caller in Python, to images.

A body comes from a stranger: sizes, types and values are looked at before anything is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from ptee._common.errors import PteeError, first_line
from ptee._common.files import from_json
from ptee._common.text import type_name
from ptee.data.pixels import SCANS, model_input, resized_sides, scans_of
from ptee.exits.config import threshold_numbers, wrong_number
from ptee.serving.pieces import About

PICTURES = {"image/png": "PNG", "image/jpeg": "JPEG"}
NPY, JSON = "application/x-npy", "application/json"
TYPES = (*PICTURES, NPY, JSON)
PIXELS = 100  # numbers this large are not normalised, unless the model's own normalised pixels are
BEYOND = 10  # times its largest normalised pixel: other ways to normalise give floats up to there
NUMBERS = "fiu"  # kinds of numpy's numbers


class UploadError(PteeError):
    """A body that is refused.

    Attributes:
        status: of HTTP.
    """

    status = 400


@dataclass(frozen=True)
class Limits:
    """What a caller may send.

    Attributes:
        bytes: of a body.
        pixels: of a picture, before and after it is resized.
        rows: images of an array.
        seconds: until the body is here.
    """

    bytes: int = 8 * 2**20
    pixels: int = 16 * 10**6
    rows: int = 64
    seconds: float = 10.0


def refused(status: int, text: str) -> UploadError:
    """The error for a body that is refused with this status."""
    error = UploadError(text)
    error.status = status
    return error


def kind_of(content_type: str) -> str:
    """The media type of a request, which must be one of `TYPES`."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in TYPES:
        raise refused(415, f"Content-Type {kind!r:.60} is not read here. Send {', '.join(TYPES)}.")
    return kind


def images_of(kind: str, body: bytes, about: About, limits: Limits) -> np.ndarray:
    """Images (b, c, h, w) float32, as the backbone takes them.

    Args:
        kind: as of `kind_of`.
        body: an encoded picture; or an array (c, h, w) or (b, c, h, w) of numbers that are normalised already.
        about: the model.
        limits: of what may be sent.

    Raises:
        UploadError: saying in one line why not.
    """
    if not body:
        raise refused(400, "The body is empty. Send a picture or an array.")
    if kind in PICTURES:
        return _picture(body, PICTURES[kind], about, limits)[None]
    return _checked(_npy(body, about, limits) if kind == NPY else _json(body), about, limits)


# ---------------------------------------------------------------------------------------------------- pictures


def is_large(kind: str, body: bytes, about: About) -> bool:
    """Whether it takes long enough to read this that others would notice."""
    if kind == JSON and len(body) > 2**16:
        return True
    return len(body) > 2**15 or (kind in PICTURES and _pixels_of(body, about) > 2**16)


def _pixels_of(body: bytes, about: About) -> int:
    """Of a picture, before or after it is resized: the larger number."""
    try:
        with _opened(body, None) as picture:
            return max(math.prod(picture.size), math.prod(resized_sides(picture.size, about.input_size)))
    except Exception:  # told when it is read
        return 0


def _opened(body: bytes, format: str | None) -> Any:
    from PIL import Image

    return Image.open(BytesIO(body), formats=[format] if format else ["PNG", "JPEG"])


def _picture(body: bytes, format: str, about: About, limits: Limits) -> np.ndarray:
    if not about.pixels_known:
        raise refused(
            415,
            "Nobody said by which mean and std this model's images are normalised. Send an array, prepared as for the backbone.",
        )
    if about.input_size[0] not in (1, 3):
        raise refused(
            415, f"The backbone reads {about.input_size[0]} channels, and pictures have 3 or 1. Send an array."
        )
    if format == "JPEG" and (scans := scans_of(body)) > SCANS:
        raise refused(413, f"This picture has {scans:,} scans. Send at most {SCANS}.")
    try:
        with _opened(body, format) as picture:
            size = picture.size
            resized = resized_sides(size, about.input_size)
            if max(math.prod(size), math.prod(resized)) <= limits.pixels:
                return model_input(picture, about.input_size, about.mean, about.std, about.interpolation)
    except Exception as why:  # whatever Pillow raises
        if type(why).__name__ in ("DecompressionBombError", "DecompressionBombWarning"):
            raise refused(413, f"This picture has too many pixels. Send at most {limits.pixels:,}.") from why
        if isinstance(why, MemoryError):
            raise refused(413, "There is no memory for this picture. Send a smaller one.") from why
        raise refused(400, f"This is no {format} picture that can be read{_said(why)}") from why
    raise refused(413, _too_many(size, resized, limits))


def _said(why: Exception) -> str:
    """The end of a sentence. Pillow's text of what it does not know names an object of Python and no reason."""
    from PIL import UnidentifiedImageError

    if isinstance(why, UnidentifiedImageError):
        return "."
    return f": {why if isinstance(why, PteeError) else first_line(why)}"


def _too_many(size: tuple[int, int], resized: tuple[int, int], limits: Limits) -> str:
    then = f", and of {resized[0]} x {resized[1]} when it is resized" if math.prod(size) <= limits.pixels else ""
    return f"This picture is of {size[0]} x {size[1]} pixels{then}. Send at most {limits.pixels:,}."


# ---------------------------------------------------------------------------------------------------- arrays


def _npy(body: bytes, about: About, limits: Limits) -> np.ndarray:
    """An array in numpy's format. Nothing is unpickled, and its size is known before it is read."""
    from numpy.lib import format

    stream = BytesIO(body)
    try:
        version = format.read_magic(stream)
        read = {(1, 0): format.read_array_header_1_0, (2, 0): format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
    except Exception as why:  # whatever numpy raises
        raise refused(400, f"This is no .npy array of version 1 or 2: {first_line(why)}") from why
    if dtype.kind not in NUMBERS or dtype.hasobject or dtype.subdtype is not None:
        raise refused(400, f"This array holds {dtype!s:.60}. Send numbers, such as float32.")
    if any(type(n) is not int or n < 0 for n in shape):  # numpy reads True as a size, too
        raise refused(400, f"This array is of shape {shape!s:.60}. Send sizes of 0 or more.")
    _require_shape(shape, about, limits)
    rest = len(body) - stream.tell()
    if math.prod(shape) * dtype.itemsize != rest:
        raise refused(400, f"This array of shape {shape} has {rest:,} bytes of numbers. Send the whole file.")
    array = np.frombuffer(body, dtype, offset=stream.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def _json(body: bytes) -> np.ndarray:
    """A nested list of numbers, or an object with one as "images"."""
    try:
        value = from_json(body.decode())
    except (ValueError, RecursionError) as why:
        raise refused(400, f"This is no JSON: {first_line(why)}") from why
    if isinstance(value, Mapping):
        value = value["images"] if set(value) == {"images"} else None
    if not isinstance(value, list):
        raise refused(400, 'Send {"images": ...}: a nested list of numbers (c, h, w) or (b, c, h, w).')
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as why:
        raise refused(400, "The lists of this array have different lengths, or are nested too deeply.") from why
    if array.dtype.kind not in NUMBERS:
        raise refused(400, f"This array holds {array.dtype!s:.60}. Send numbers.")
    return array


def _require_shape(shape: tuple[int, ...], about: About, limits: Limits) -> None:
    size = about.input_size
    if shape[-3:] != size or len(shape) not in (3, 4):
        wanted = ", ".join(map(str, size))
        raise refused(400, f"This array is of shape {tuple(shape)!s:.60}. Send ({wanted}) or (b, {wanted}).")
    if len(shape) == 4 and not 1 <= shape[0] <= limits.rows:
        raise refused(413 if shape[0] else 400, f"This array holds {shape[0]:,} images. Send 1 to {limits.rows}.")


def _checked(array: np.ndarray, about: About, limits: Limits) -> np.ndarray:
    _require_shape(array.shape, about, limits)
    with np.errstate(over="ignore"):
        images = np.ascontiguousarray(array, dtype=np.float32).reshape(-1, *about.input_size)
    if not _all_finite(images):
        raise refused(400, "This array holds numbers that are not finite in 32 bits. Send finite ones.")
    _require_normalised(images, about, whole=array.dtype.kind != "f")
    return _writeable(images)


def images_from_python(images: Any, about: About) -> np.ndarray:
    """Images (b, c, h, w) float32 of a caller in Python, which are normalised already. b may be 0.

    Raises:
        PteeError: saying in one line why not.
    """
    size = about.input_size
    wanted, odd = f"images ({', '.join(map(str, ('b', *size)))})", ""
    if not isinstance(images, np.ndarray):
        advice = " Give x.cpu().numpy()." if hasattr(images, "cpu") else ""
        odd = f"{wanted} in an array of numpy, not {type(images).__name__}.{advice}"
    elif images.shape[-3:] != size or images.ndim != 4:
        odd = f"{wanted}, not {images.shape!s:.60}.{' For one image give x[None].' if images.shape == size else ''}"
    elif images.dtype != np.float32:
        odd = f"images of type float32, not {type_name(images.dtype)}. Give them normalised, as x.astype('float32')."
    elif not _all_finite(images):
        n = int(np.isfinite(images).all((1, 2, 3)).argmin())
        odd = f"finite numbers, and the image of index {n} has others (inf or NaN). Leave it out."
    if odd:
        raise PteeError(f"This model takes {odd}", argument="images", value=images)
    return _writeable(np.ascontiguousarray(images))


def thresholds_from_python(threshold: Any, rows: int, exits: int) -> np.ndarray:
    """T (b, E) of a caller in Python. Raises a PteeError for what is no threshold, or of another shape."""
    given = threshold_numbers(threshold)
    try:
        return np.broadcast_to(given, (rows, exits))
    except ValueError as why:
        raise wrong_number(" x ".join(map(str, given.shape)), exits, threshold) from why


def _all_finite(images: np.ndarray) -> bool:
    """The sum alone tells it mostly, in half of the time."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(images.sum()) or np.isfinite(images).all())


def _writeable(images: np.ndarray) -> np.ndarray:
    return images if images.flags.writeable else images.copy()  # torch warns of memory that it may not write


def _require_normalised(images: np.ndarray, about: About, whole: bool) -> None:
    """Refuse what looks like pixels that nobody normalised. Whole numbers (`whole`) mostly are such."""
    if not about.pixels_known:
        return
    low, high = _range(about)
    largest = max(-low, high)
    if np.abs(images).max(initial=0) <= max(PIXELS, math.ceil(largest) if whole else BEYOND * largest):
        return
    these, mean, std = "These are pixels of 0 to 255", list(about.mean), list(about.std)
    if (least := images.min()) < 0 or images.max() > 255:
        most = max(least, images.max(), key=abs)
        these = f"These numbers reach {most:g}, and normalised pixels are of {low:.3g} to {high:.3g}"
    raise refused(400, f"{these}. Send (x / 255 - mean) / std, mean {mean} and std {std}.")


def _range(about: About) -> tuple[float, float]:
    """The least and the largest number that a normalised pixel can have."""
    mean, std = np.broadcast_arrays(about.mean, about.std)
    return float((-mean / std).min()), float(((1 - mean) / std).max())


def read_thresholds(text: str, exits: int, bounds: tuple[float, float]) -> np.ndarray:
    """T (E,) of a request: one number, or one for each exit, separated by commas.

    Raises:
        UploadError: for anything else, and what is out of bounds.
    """
    advice = f"Give one number, or one for each of the {exits} exits separated by commas, from {bounds[0]:g} to {bounds[1]:g}."
    try:
        given = [float(part) for part in text.split(",", exits)]
    except ValueError:
        raise refused(400, f"The threshold {text!r:.60} is no number. {advice}") from None
    if len(given) not in (1, exits) or not all(bounds[0] <= t <= bounds[1] for t in given):  # NaN is out of bounds
        raise refused(400, f"The threshold {text!r:.60} is not possible. {advice}")
    return np.broadcast_to(np.asarray(given, dtype=np.float64), (exits,))
