"""What a stranger may send: pictures and arrays of the right size and type, and nothing else."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from served import npy, png, saved
from small import SIZE

from ptee.data.pictures import image_transform
from ptee.serving.pieces import About
from ptee.serving.uploads import JSON, NPY, TYPES, Limits, UploadError, images_of, is_large, kind_of, read_thresholds

pytestmark = pytest.mark.cpu("arrays come in host memory")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
ABOUT = About("small", SIZE, MEAN, STD, "bicubic", "float32", 4, (), ("a", "b"))
LIMITS = Limits(bytes=10**6, pixels=10_000, rows=4)
PNG = "image/png"


def refusal(kind: str, body: bytes) -> tuple[int, str]:
    with pytest.raises(UploadError) as refused:
        images_of(kind, body, ABOUT, LIMITS)
    text = str(refused.value)
    assert "\n" not in text and len(text) < 400
    return refused.value.status, text


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
@pytest.mark.parametrize("size", [(8, 8), (20, 12), (7, 31)])
def test_a_picture_becomes_what_the_backbone_takes(mode, size):
    body = png(size, mode)
    with Image.open(io.BytesIO(body)) as picture:
        want = image_transform(SIZE, MEAN, STD, "bicubic")(picture)
    np.testing.assert_array_equal(images_of(PNG, body, ABOUT, LIMITS)[0], want.numpy())


def test_a_jpeg_is_read_too():
    body = saved(Image.new("RGB", (9, 9), (255, 0, 0)), "JPEG")
    assert images_of("image/jpeg", body, ABOUT, LIMITS).shape == (1, *SIZE)


def test_a_picture_that_is_large_when_it_is_resized_is_large():
    about = replace(ABOUT, input_size=(3, 64, 64))
    assert is_large(PNG, png((50, 1)), about) and not is_large(PNG, png((50, 50)), about)


def scans(n: int) -> bytes:
    """A progressive JPEG with its last scan repeated, n scans in all."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "JPEG", progressive=True)
    body = stream.getvalue()
    last = body[body.rindex(b"\xff\xda") : -2]
    return body[:-2] + last * (n - body.count(b"\xff\xda")) + body[-2:]


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded():
    assert images_of("image/jpeg", scans(100), ABOUT, LIMITS).shape == (1, *SIZE)
    assert re.search("101 scans. Send at most 100", refusal("image/jpeg", scans(101))[1])
    assert refusal("image/jpeg", scans(5000))[0] == 413


def test_a_very_thin_picture_is_refused_whatever_the_limit_of_pixels():
    with pytest.raises(
        UploadError, match="120 x 1 pixels, and its longer side may be at most 100 times the shorter one"
    ):
        images_of(PNG, png((120, 1)), ABOUT, Limits())


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "<f4", ">f4", "int8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_any_numbers_is_read(dtype, order):
    array = np.asarray(np.arange(2 * 192).reshape(2, *SIZE) % 50, dtype=dtype, order=order)
    np.testing.assert_array_equal(images_of(NPY, npy(array), ABOUT, LIMITS), array.astype(np.float32))


def test_one_image_is_a_batch_of_one():
    assert images_of(NPY, npy(np.zeros(SIZE)), ABOUT, LIMITS).shape == (1, *SIZE)
    assert images_of(JSON, json.dumps(np.zeros(SIZE).tolist()).encode(), ABOUT, LIMITS).shape == (1, *SIZE)


def test_json_with_images():
    array = np.random.default_rng(0).normal(size=(3, *SIZE))
    body = json.dumps({"images": array.tolist()}).encode()
    np.testing.assert_array_equal(images_of(JSON, body, ABOUT, LIMITS), array.astype(np.float32))


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a few kilobytes that says that it is of so many pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 10**6)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "body", "status", "said"),
    [
        (PNG, b"", 400, "empty"),
        (PNG, b"garbage", 400, "no PNG picture"),
        (PNG, png()[:100], 400, "no PNG picture"),
        (PNG, saved(Image.new("RGB", (9, 9)), "JPEG"), 400, "no PNG picture"),
        (PNG, saved(Image.new("RGB", (9, 9)), "GIF"), 400, "no PNG picture"),
        (PNG, png((101, 100)), 413, "101 x 100 pixels. Send at most 10,000"),
        (PNG, png((160, 1)), 413, "160 x 1 pixels, and of 1280 x 8 when it is resized. Send at most 10,000"),
        (PNG, png((900, 1)), 413, "900 x 1 pixels"),
        (PNG, bomb(), 413, "pixels"),
        (PNG, bomb(3_000), 413, "3000 x 3000 pixels"),
        (NPY, b"garbage", 400, "no .npy"),
        (NPY, npy(np.zeros(SIZE))[:-1], 400, "Send the whole file"),
        (NPY, npy(np.zeros(SIZE)) + b"x", 400, "Send the whole file"),
        (NPY, npy(np.zeros((3, 8, 9))), 400, r"Send \(3, 8, 8\)"),
        (NPY, npy(np.zeros(SIZE[1:])), 400, r"Send \(3, 8, 8\)"),
        (NPY, npy(np.zeros((5, *SIZE))), 413, "5 images. Send 1 to 4"),
        (NPY, npy(np.zeros((0, *SIZE))), 400, "0 images"),
        (NPY, npy(np.zeros((1, 1, *SIZE))), 400, "shape"),
        (NPY, npy(np.full(SIZE, np.nan)), 400, "not finite"),
        (NPY, npy(np.full(SIZE, 1e300)), 400, "not finite"),
        (NPY, npy(np.full(SIZE, 255, dtype=np.uint8)), 400, r"Send \(x / 255 - mean\) / std"),
        (NPY, npy(np.full(SIZE, 200.0, np.float32)), 400, r"pixels of 0 to 255\. Send \(x / 255 - mean\) / std"),
        (JSON, b'{"images": %s}' % str(np.full(SIZE, 200.0).tolist()).encode(), 400, r"Send \(x / 255 - mean\) / std"),
        (NPY, npy(np.zeros(SIZE, dtype=complex)), 400, "complex"),
        (NPY, npy(np.zeros(SIZE, dtype="U3")), 400, "Send numbers"),
        (NPY, npy(np.full(SIZE, None), allow_pickle=True), 400, "Send numbers"),
        (NPY, npy(np.zeros(SIZE, dtype=[("a", "f4")])), 400, "Send numbers"),
        (JSON, b"{", 400, "no JSON"),
        (JSON, b"\xff", 400, "no JSON"),
        (JSON, b"[" * 10_000, 400, "no JSON"),
        (JSON, b"3", 400, "nested list"),
        (JSON, b'{"path": "/etc/passwd"}', 400, "nested list"),
        (JSON, b'{"images": [], "images": []}', 400, "no JSON"),
        (JSON, b"[[1, 2], [3]]", 400, "different lengths"),
        (JSON, b'[["a"]]', 400, "Send numbers"),
        (JSON, b"[[true]]", 400, "Send numbers"),
        (JSON, b"[[1e999]]", 400, "shape"),
        (JSON, b"[" + b"9" * 5000 + b"]", 400, "no JSON"),
        (JSON, json.dumps(np.full(SIZE, 10**30).tolist()).encode(), 400, "Send numbers|not finite|255"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(kind, body, status, said):
    assert refusal(kind, body)[0] == status
    assert re.search(said, refusal(kind, body)[1]), refusal(kind, body)


@pytest.mark.parametrize("sent", ["", "text/html", "image/gif", "application/octet-stream", "image", "\x00"])
def test_other_types_are_refused(sent):
    with pytest.raises(UploadError, match="image/png") as refused:
        kind_of(sent)
    assert refused.value.status == 415


def test_the_type_may_have_parameters_and_capitals():
    assert kind_of("Application/JSON; charset=utf-8") == JSON
    assert [kind_of(kind) for kind in TYPES] == list(TYPES)


def test_a_threshold_is_one_number_or_one_for_each_exit():
    assert read_thresholds("0.7", 2, (0, 2)).tolist() == [0.7, 0.7]
    assert read_thresholds("0.9, 2", 2, (0, 2)).tolist() == [0.9, 2]


@pytest.mark.parametrize(
    "text", ["", "x", "nan", "inf", "-1", "2.1", "1,2,1", ",", "0.5,", "[0.5]", "1e999", "0.5;0.5", "9" * 10**5]
)
def test_a_threshold_that_cannot_be_is_refused(text):
    with pytest.raises(UploadError, match="from 0 to 2") as refused:
        read_thresholds(text, 2, (0, 2))
    assert len(str(refused.value)) < 300


def test_bounds_of_thresholds_are_kept():
    with pytest.raises(UploadError, match=r"from 0.5 to 1"):
        read_thresholds("0.4", 2, (0.5, 1))


def test_arrays_may_be_written_into():
    assert torch.from_numpy(images_of(NPY, npy(np.zeros(SIZE, np.float32)), ABOUT, LIMITS)).shape == (1, *SIZE)


def test_numbers_that_other_ways_to_normalise_give_are_taken():
    for largest in (1.0, 3.0, 10.0):
        images_of(NPY, npy(np.full(SIZE, largest, np.float32)), ABOUT, LIMITS)
    raw = replace(ABOUT, mean=(0.0,), std=(1 / 255,))  # a backbone of pixels of 0 to 255
    assert images_of(NPY, npy(np.full(SIZE, 255, np.float32)), raw, LIMITS).max() == 255


@pytest.mark.parametrize(
    ("mean", "lowest"),
    [((0.0,), 0), ((0.485, 0.456, 0.406), -123)],
    ids=["0 to 255", "less a mean"],
)
def test_whole_numbers_are_taken_that_a_preprocessing_of_such_a_range_gives(mean, lowest):
    raw = replace(ABOUT, mean=mean, std=(1 / 255,))
    for largest in (-lowest, 255 + lowest):
        assert images_of(NPY, npy(np.full(SIZE, largest, np.int64)), raw, LIMITS).max() == largest


@pytest.mark.parametrize("kind", [np.float32, np.int64])
@pytest.mark.parametrize("value", [-5000, 4096, 10**15])
def test_numbers_that_are_no_pixels_are_not_called_pixels(value, kind):
    status, text = refusal(NPY, npy(np.full(SIZE, value, kind)))
    assert status == 400 and "pixels of 0 to 255" not in text
    assert (
        f"reach {value:g}, and normalised pixels are of -2.5 to 2.5. " in text and "Send (x / 255 - mean) / std" in text
    )


def test_floats_beyond_what_any_preprocessing_gives_are_named_beside_its_range():
    assert "reach 1e+30" in refusal(NPY, npy(np.full(SIZE, 1e30, np.float32)))[1]


def test_pictures_for_a_model_of_unknown_mean_and_std_are_refused():
    about = replace(ABOUT, pixels_known=False)
    with pytest.raises(UploadError, match=r"by which mean and std .* Send an array") as refused:
        images_of(PNG, png(), about, LIMITS)
    assert refused.value.status == 415
    loud = np.full(SIZE, 300.0, np.float32)  # of such a model nobody knows what its images are like
    assert images_of(NPY, npy(loud), about, LIMITS).max() == 300
    shown = about.described()
    assert (shown["mean"], shown["std"], shown["interpolation"]) == (None, None, None)
    assert ABOUT.described()["mean"] == ABOUT.mean
