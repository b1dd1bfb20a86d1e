"""Pictures become a backbone's input; those that cannot be read are all named at once."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from images import TRANSFORM, encoded, opened, picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

from ptee._common.errors import DataError
from ptee.data.pictures import (
    File,
    Pictures,
    UnreadablePicturesError,
    check_pictures,
    decode,
    decode_bytes,
    image_transform,
)
from ptee.data.pixels import eight_bits, scans_of
from ptee.data.splits import hold_out


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("c", [1, 3])
def test_any_kind_of_picture_gives_the_channels_asked_for(mode, c):
    x = image_transform((c, 6, 6), (0.5,), (0.5,))(picture(255, mode, (9, 9)))
    assert x.shape == (c, 6, 6) and torch.allclose(x, torch.ones_like(x))


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_picture_of_the_right_size_is_only_normalised():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    pixels = torch.from_numpy(np.array(noise(7, 5))).double().permute(2, 0, 1) / 255  # (h, w, c) -> (c, h, w)
    expected = (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)
    assert torch.allclose(image_transform((3, 7, 5), mean, std)(noise(7, 5)).double(), expected, atol=1e-6)


def test_pictures_are_read_on_the_cpu_whatever_the_default_device_is():
    want = image_transform((3, 7, 5), (0.1,), (0.4,))(noise(7, 5))
    with torch.device("meta"):
        transform = image_transform((3, 7, 5), (0.1,), (0.4,))
    assert torch.equal(transform(noise(7, 5)), want)  # in a process that reads, a GPU cannot be used


def test_a_square_picture_is_resized_whole():
    resized = noise(16, 16).resize((8, 8), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255  # (h, w, c) -> (c, h, w)
    assert torch.allclose(TRANSFORM(noise(16, 16)), expected)


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (3, 100), (9, 8), (1, 1)])
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_picture_covers_any_input_shape(size, shape):
    assert image_transform((3, *shape), (0,), (1,))(picture(255, "RGB", size)).min() == 1


def test_longer_side_is_cropped_around_the_centre():
    image = picture(0, "L", (24, 8))
    image.paste(255, (8, 0, 16, 8))
    assert TRANSFORM(image).min() == 1


@pytest.mark.parametrize(
    ("channels", "interpolation", "said"),
    [
        (4, "bicubic", "reads 4 channels, but pictures have 3 or 1"),
        (3, "bicubc", "Unknown interpolation 'bicubc'. Did you mean 'bicubic'"),
    ],
)
def test_impossible_input_is_refused(channels, interpolation, said):
    with pytest.raises(ValueError, match=said):
        image_transform((channels, 8, 8), (0,), (1,), interpolation)


def saved(path, values, **how) -> File:
    Image.fromarray(values).save(path, **how)
    return File(str(path), path.name)


RAMP = np.linspace(0, 65535, 1024).reshape(32, 32)


@pytest.mark.parametrize("c", [1, 3])
def test_a_picture_in_lab_colours_gives_the_channels_asked_for(c, tmp_path):
    Image.new("LAB", (8, 8), (255, 128, 128)).save(tmp_path / "x.tif")  # white
    x = image_transform((c, 8, 8), (0,), (1,))(decode(File(str(tmp_path / "x.tif"), "x.tif")))
    assert x.shape == (c, 8, 8) and x.min() > 0.99


def test_sixteen_bits_of_which_zero_is_white_are_turned_round(tmp_path):
    file = saved(tmp_path / "x.tif", RAMP.astype(np.uint16), tiffinfo={PHOTOMETRIC_INTERPRETATION: 0})
    assert np.abs(np.asarray(decode(file)) - (65535 - RAMP) / 257).max() <= 1


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bits_become_eight_without_clipping(tmp_path, name):
    image = decode(saved(tmp_path / name, RAMP.astype(np.uint16)))
    assert image.mode == "L"
    assert np.abs(np.asarray(image) - RAMP.astype(np.uint16) / 257).max() <= 0.5


def test_sixteen_bits_become_eight_without_numbers_of_64_bits_for_the_whole_picture():
    picture = Image.new("I;16", (1000, 1000))
    tracemalloc.start()
    try:
        eight_bits(picture)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 * 1000 * 1000


def test_floats_from_0_to_1_become_eight_bits(tmp_path):
    image = decode(saved(tmp_path / "x.tif", (RAMP / 65535).astype(np.float32)))
    assert np.abs(np.asarray(image) - RAMP / 257).max() <= 0.51


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((RAMP / 257).astype(np.float32), "floats from 0 to 255"),
        ((RAMP / 65535 - 0.5).astype(np.float32), "floats from -0.5 to 0.5"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan"),
        (RAMP.astype(np.int32), "32-bit integers from 0 to 65535"),
    ],
    ids=["bytes", "signed", "nan", "integers"],
)
def test_values_whose_white_is_not_known_are_refused(tmp_path, values, said):
    file = saved(tmp_path / "x.tif", values)
    with pytest.raises(DataError, match=rf"x\.tif' cannot be used: it holds {said}.*Save it with 8 bits"):
        decode(file)
    with pytest.raises(DataError, match=said):
        TRANSFORM(Image.fromarray(values))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(data: bytes, side: int = 8) -> bytes:
    """A PNG whose checksums are right, with any bytes for its compressed pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.fixture
def damaged(folder):
    """Images of which seven cannot be read, each for another reason."""
    val = folder / "val"
    whole = encoded(3, "JPEG")
    (val / "a" / "cut.png").write_bytes(encoded(1)[:50])
    (val / "a" / "flipped.png").write_bytes(encoded(1).replace(b"IDAT", b"IDAT\x01", 1))
    (val / "a" / "no_pixels.png").write_bytes(png_of(b"garbage"))
    (val / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (val / "b" / "text.jpg").write_text("no picture")
    os.mkfifo(val / "b" / "pipe.jpg")
    (val / "b" / "gone.jpg").symlink_to("nowhere.jpg")
    return folder


def test_a_huge_file_is_refused_before_it_is_read(folder):
    with (folder / "val" / "a" / "huge.jpg").open("wb") as file:
        file.truncate(2**40)  # with a hole in it: it takes no room
    with pytest.raises(UnreadablePicturesError, match=r"huge\.jpg' \(it has more than 1,073,741,824 bytes\)"):
        check_pictures([opened(folder).validation])


def test_all_pictures_that_cannot_be_read_are_named_in_one_line(damaged):
    data = opened(damaged)
    with pytest.raises(UnreadablePicturesError) as caught:
        check_pictures([data.train, data.validation.relabelled(int)])
    said = str(caught.value)
    assert said.startswith("7 of 31 pictures cannot be read. Replace or remove them")
    pipe = "b/pipe.jpg' (not a regular file)"
    for name in (
        "a/cut.png",
        "a/flipped.png",
        "a/no_pixels.png",
        "a/cut.jpg",
        "b/text.jpg",
        pipe,
        "b/gone.jpg' (No such file",
    ):
        assert name in said
    assert "\n" not in said
    assert sorted(caught.value.keys)[0] == ("validation", "a/cut.jpg", "a")


def test_a_picture_on_which_a_decoder_stumbles_is_damaged(tmp_path):
    content = io.BytesIO()
    noise(4, 4).save(content, "tiff")
    odd = bytearray(content.getvalue())
    odd[72] = 2  # a number of an entry becomes a text, and Pillow raises a TypeError
    (tmp_path / "odd.tif").write_bytes(odd)
    file = File(str(tmp_path / "odd.tif"), "odd.tif")
    with pytest.raises(DataError, match="damaged"):
        decode_bytes(bytes(odd))
    with pytest.raises(DataError, match=r"odd\.tif' cannot be decoded \(damaged\)"):
        decode(file)
    with pytest.raises(UnreadablePicturesError, match=r"odd\.tif' \(damaged"):
        check_pictures([Pictures([(file, 0)], TRANSFORM)])


@pytest.fixture
def progressive() -> bytes:
    stream = io.BytesIO()
    noise(64, 64).save(stream, "JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xda" * 200)
    return stream.getvalue()


def test_a_jpeg_of_very_many_scans_is_not_decoded(progressive):
    before, last = scans_of(progressive), progressive[progressive.rindex(b"\xff\xda") : -2]
    assert 5 < before < 20
    with pytest.raises(DataError, match="101 scans, and 100 are read at most"):
        decode_bytes(progressive[:-2] + last * (101 - before) + progressive[-2:])


def test_what_stands_behind_a_jpeg_or_in_its_headers_is_no_scan(progressive):
    assert decode_bytes(progressive + b"\xff\xda\0\2" * 200).size == (64, 64)
    assert scans_of(b"BM" + b"\xff\xda" * 200) == 0


def test_what_pillow_refuses_to_decode_is_not_called_damaged(tmp_path):
    text = PngInfo()
    text.add_text("a", "x" * 2**21, zip=True)
    picture().save(tmp_path / "text.png", pnginfo=text)
    (tmp_path / "huge.png").write_bytes(png_of(b"", side=14_000))
    for name, said in (
        ("text", "text stored beside its pixels is too large"),
        ("huge", "more than 178,956,970 pixels"),
    ):
        file = File(str(tmp_path / f"{name}.png"), f"{name}.png")
        with pytest.raises(DataError, match=rf"{name}\.png' cannot be decoded \(.*{said}.*\): replace or remove it"):
            decode(file)
        with pytest.raises(UnreadablePicturesError, match=rf"{name}\.png' \(.*{said}"):
            check_pictures([Pictures([(file, 0)], TRANSFORM)])


def test_only_usual_formats_are_decoded_whatever_a_file_is_called(tmp_path):
    picture(9, "RGB").save(tmp_path / "a.png", "EPS")  # which Pillow would give to another program
    file = File(str(tmp_path / "a.png"), "a.png")
    with pytest.raises(UnreadablePicturesError, match=r"a\.png' \(it is no"):
        check_pictures([Pictures([(file, 0)], TRANSFORM)])
    for read in (lambda: decode(file), lambda: decode_bytes((tmp_path / "a.png").read_bytes())):
        with pytest.raises(DataError, match="it is no BMP, GIF, JPEG, PNG, PPM, TIFF or WEBP picture, or damaged"):
            read()
    picture(9, "RGB").save(tmp_path / "b.jpg", "GIF")
    assert decode(File(str(tmp_path / "b.jpg"), "b.jpg")).size == (8, 8)


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("size", [(1010, 10), (10, 1010)])
def test_a_very_thin_picture_cannot_be_read(tmp_path, size, kind):
    path = tmp_path / f"thin.{kind}"
    picture(9, "RGB", size).save(path)
    file, said = (
        File(str(path), path.name),
        f"{size[0]} x {size[1]} pixels, and its longer side may be at most 100 times",
    )
    with pytest.raises(UnreadablePicturesError, match=said):
        check_pictures([Pictures([(file, 0)], TRANSFORM)])
    for read in (lambda: decode(file), lambda: decode_bytes(path.read_bytes()), lambda: TRANSFORM(Image.open(path))):
        with pytest.raises(DataError, match=said):
            read()


def test_pictures_of_a_part_that_was_held_out_are_checked_too(damaged):
    with pytest.raises(UnreadablePicturesError, match="7 of 13"):
        check_pictures(hold_out(opened(damaged).validation, 3, 0))


def test_good_pictures_of_any_kind_pass(tmp_path):
    for kind in ("bmp", "jpg", "png", "tif", "webp", "ppm"):
        (tmp_path / "a").mkdir(exist_ok=True)
        picture(90, "RGB").save(tmp_path / "a" / f"x.{kind}")
    saved(tmp_path / "a" / "deep.png", RAMP.astype(np.uint16))
    check_pictures([opened(tmp_path).train, opened("digits").train])


@pytest.mark.parametrize(
    ("kind", "place"), [("folder", r"'.*val/a/000\.png'"), ("tars", r"'a/000\.png' in '.*validation\.tar'")]
)
def test_opening_decodes_nothing_and_a_bad_picture_is_named(kind, place, request):
    source = request.getfixturevalue(kind)
    if kind == "folder":
        (source / "val" / "a" / "000.png").write_bytes(b"no picture")
    else:
        with tarfile.open(source / "validation.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("a/000.png"))
    data = opened(source)
    with pytest.raises(DataError, match=f"Picture {place} cannot be decoded"):
        data.validation[0]
