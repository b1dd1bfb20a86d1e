"""The values of a picture's pixels. Needs no torch: exported models read pictures, too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptee._common.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of Pillow's; it gives some others to other programs
SIXTEEN_BITS = 65535
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # the tag of a TIFF that says what its values mean, and one meaning
LONGEST_SIDE = (
    100  # times the shorter one: pictures are resized whole, so a thin one of few bytes could fill the memory
)

SCANS = 100  # of a JPEG: each goes over all of its pixels; encoders write about ten
START_OF_PICTURE, START_OF_SCAN, END_OF_PICTURE = 0xD8, 0xDA, 0xD9
MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # but for those inside of a scan


def scans_of(content: bytes) -> int:
    """How often a decoder goes over all pixels of a JPEG, up to the picture's own end; 0 for other formats."""
    if not content.startswith(bytes([0xFF, START_OF_PICTURE])):
        return 0
    scans, at = 0, 2
    while (found := MARKER.search(content, at)) and (marker := found[1][0]) != END_OF_PICTURE:
        scans += marker == START_OF_SCAN
        at = found.end() + max(2, int.from_bytes(content[found.end() : found.end() + 2], "big"))
    return scans


def require_sides(size: tuple[int, int]) -> None:
    """Refuse pictures (width, height) that are far longer than wide, or wider than long."""
    if max(size) > LONGEST_SIDE * min(size):
        raise DataError(
            f"it is of {size[0]} x {size[1]} pixels, and its longer side may be at most {LONGEST_SIDE} times the shorter "
            "one. Cut it."
        )


def eight_bits(image: Image) -> Image:
    """The same picture with 8 bits for each value. Pillow's `convert` would make every value above 255 white.

    Raises:
        DataError: if the picture holds 32-bit integers, or floats outside of 0 to 1: which value is white is unknown; or as
            of `require_sides`.
    """
    import numpy as np
    from PIL import Image

    require_sides(image.size)
    if image.mode == "LAB":  # Pillow makes colours of it, but no grey levels
        return image.convert("RGB")
    # Pillow opens some 16-bit files as 32-bit integers, scaled to 0..65535.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not sixteen and image.mode not in ("I", "F"):
        return image
    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    white = SIXTEEN_BITS if sixteen else 1
    if (image.mode == "I" and not sixteen) or not (least >= 0 and most <= white):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise DataError(
            f"it holds {kind} from {least:g} to {most:g}, and ptee reads 8-bit and 16-bit values and floats from "
            "0 to 1. Save it with 8 bits."
        )
    # Pillow turns 8 bits round, not 16.
    is_turned = sixteen and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
    made = np.empty(values.shape, dtype=np.uint8)
    for row, given in zip(made, values, strict=True):  # one after another: all of them as float64 are the eightfold
        row[:] = (given.astype(np.float64) * (255 / white)).round()
    return Image.fromarray(255 - made if is_turned else made)


def resized_sides(size: tuple[int, int], input_size: Sequence[int]) -> tuple[int, int]:
    """Width and height of a picture (width, height) of which the shorter side was resized to fit an input c, h, w."""
    _, height, width = input_size
    ratio = min(size[1] / height, size[0] / width)
    whole = int if height == width else round  # as torchvision rounds for squares, and timm for others
    return max(whole(size[0] / ratio), width), max(whole(size[1] / ratio), height)


def model_input(
    picture: Image, size: Sequence[int], mean: Sequence[float], std: Sequence[float], interpolation: str
) -> np.ndarray:
    """A picture as a backbone takes it, (c, h, w) float32: the shorter side is resized, and the centre is cut out.

    Args:
        picture: of any size and mode.
        size: c, h, w; c is 3 (colours) or 1 (grey levels).
        mean: for each channel, or one for all, of pixels in 0..1.
        std: the same.
        interpolation: of Pillow, such as "bicubic".
    """
    import numpy as np
    from PIL import Image

    channels, height, width = size
    picture = eight_bits(picture).convert("RGB" if channels == 3 else "L")
    sides = resized_sides(picture.size, size)
    picture = picture.resize(sides, Image.Resampling[interpolation.upper()])
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    values = np.asarray(picture.crop((left, top, left + width, top + height)), dtype=np.float32)
    scaled = values.reshape(height, width, channels) / np.float32(255)
    found = (scaled - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray(found.transpose(2, 0, 1))
