"""The values of a picture's pixels. Needs no torch: exported models read pictures, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptee._common.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SIXTEEN_BITS = 65535


def eight_bits(image: Image) -> Image:
    """The same picture with 8 bits for each value. Pillow's `convert` would make every value above 255 white.

    Raises:
        DataError: if the picture holds 32-bit integers, or floats outside of 0 to 1: which value is white is unknown.
    """
    import numpy as np
    from PIL import Image

    # Pillow opens some 16-bit files as 32-bit integers, scaled to 0..65535.
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not sixteen and image.mode not in ("I", "F"):
        return image
    values = np.asarray(image, dtype=np.float64)
    white = SIXTEEN_BITS if sixteen else 1
    if (image.mode == "I" and not sixteen) or not (values.min() >= 0 and values.max() <= white):
        kind = "32-bit integers" if image.mode == "I" else "floats"
        raise DataError(
            f"it holds {kind} from {values.min():g} to {values.max():g}, and ptee reads 8-bit and 16-bit values and floats from "
            "0 to 1. Save it with 8 bits."
        )
    return Image.fromarray((values * (255 / white)).round().astype("uint8"))
