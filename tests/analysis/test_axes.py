"""Axes are followed from the images to every output, and an output whose axes cannot be followed has no layout."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ptee.analysis.axes import AxisTracker, image_axes, layout_of, memory_of
from ptee.analysis.cut_points import Survey, survey
from ptee.analysis.layout import Layout


def bnc(c: int, h: int, w: int, prefix: int = 0, after: int = 0) -> Layout:
    """Tokens of an h x w grid with other tokens before and after it."""
    return Layout("bnc", c, h, w, prefix, prefix + h * w + after)


# ---------------------------------------------------------------------------------------------------- real networks


def timm_net(name: str, size: tuple[int, int], **args: object) -> tuple[Callable[[], nn.Module], tuple[int, int]]:
    return functools.partial(timm.create_model, name, **args), size


NETS = {
    "resnet18": timm_net("resnet18", (64, 96)),
    "convnext_atto": timm_net("convnext_atto", (64, 96)),
    "vgg11": (lambda: torchvision.models.vgg11(num_classes=5, init_weights=False), (32, 64)),
    "swin_tiny": timm_net("swin_tiny_patch4_window7_224", (64, 96), img_size=(64, 96), window_size=4),
    "torchvision swin_t": (lambda: torchvision.models.swin_t(), (56, 84)),
    "vit_tiny": timm_net("vit_tiny_patch16_224", (32, 48), img_size=(32, 48), depth=2),
    "torchvision vit": (lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 64, 64), (32, 32)),
    "deit_tiny_distilled": timm_net("deit_tiny_distilled_patch16_224", (32, 48), img_size=(32, 48), depth=2),
    "vit_small_reg4": timm_net("vit_small_patch14_reg4_dinov2", (28, 42), img_size=(28, 42), depth=2, num_classes=5),
    "mixer_s32": timm_net("mixer_s32_224", (64, 96), img_size=(64, 96)),
    "levit_128s": timm_net("levit_128s", (224, 224)),
}
LAYOUTS = [
    ("resnet18", "layer2.0", Layout("bchw", 128, 8, 12)),
    ("resnet18", "global_pool", Layout("bc", 512, 1, 1)),
    ("convnext_atto", "stages.1.blocks.0", Layout("bchw", 80, 8, 12)),
    ("vgg11", "features", Layout("bchw", 512, 1, 2)),
    ("swin_tiny", "patch_embed", Layout("bhwc", 96, 16, 24)),
    ("swin_tiny", "layers.0.blocks.1", Layout("bhwc", 96, 16, 24)),  # after shifted windows
    ("swin_tiny", "layers.1.downsample", Layout("bhwc", 192, 8, 12)),
    ("torchvision swin_t", "features.1.1", Layout("bhwc", 96, 14, 21)),
    ("torchvision swin_t", "features.2", Layout("bhwc", 192, 7, 11)),  # 21 positions are padded to 22, then merged
    ("torchvision swin_t", "features.3.1", Layout("bhwc", 192, 7, 11)),
    ("vit_tiny", "patch_embed", bnc(192, 2, 3)),
    ("vit_tiny", "blocks.1", bnc(192, 2, 3, prefix=1)),
    ("torchvision vit", "encoder.layers.encoder_layer_0", bnc(64, 2, 2, prefix=1)),
    ("deit_tiny_distilled", "blocks.1", bnc(192, 2, 3, prefix=2)),
    ("vit_small_reg4", "blocks.1", bnc(384, 2, 3, prefix=5)),
    ("mixer_s32", "blocks.7", bnc(512, 2, 3)),
    ("levit_128s", "stem", Layout("bchw", 128, 14, 14)),
    ("levit_128s", "stages.0.blocks.0", bnc(128, 14, 14)),
    ("levit_128s", "stages.1.blocks.0", bnc(256, 7, 7)),
]


@functools.cache
def found(name: str) -> Survey:
    make, size = NETS[name]
    return survey(make().eval(), (3, *size))


@pytest.mark.parametrize(("name", "module", "layout"), LAYOUTS, ids=[f"{n}-{m}" for n, m, _ in LAYOUTS])
def test_the_layout_of_an_output_of_a_real_network_is_found(name, module, layout):
    assert found(name).cuts[module].layout == layout


@pytest.mark.parametrize("grid", [(2, 3), (3, 2)], ids=["wide", "high"])
def test_a_token_has_the_same_place_in_the_map_as_its_patch_in_the_image(grid):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=(16 * grid[0], 16 * grid[1]), depth=1).eval()
    layout = survey(vit, (3, 16 * grid[0], 16 * grid[1])).cuts["patch_embed"].layout
    image = torch.zeros(1, 3, 16 * grid[0], 16 * grid[1])
    image[:, :, 16:32, :16] = 1  # the patch at (1, 0)
    with torch.no_grad():
        changed = layout.to_map(vit.patch_embed(image) - vit.patch_embed(torch.zeros_like(image))).abs().sum(1)[0]
    assert changed.nonzero().tolist() == [[1, 0]]


# ---------------------------------------------------------------------------------------------------- following axes


class Following(TorchDispatchMode):
    """Lets a tracker follow every operator that runs. It keeps all tensors, so that no memory is used again."""

    def __init__(self, images: Tensor, rows: int | None) -> None:
        super().__init__()
        self.tracker, self.alive = AxisTracker(rows), [images]
        self.tracker.set(images, image_axes(images.shape))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        self.alive += tensors
        self.tracker.follow(func.overloadpacket.__name__, args, tensors)
        return out


def follow(
    images: Tensor, operate: Callable[[Tensor], Tensor], rows: int | None = None
) -> tuple[Tensor, Layout | None]:
    """The output of some operators, and the layout that was found for it."""
    with torch.no_grad(), Following(images, rows) as mode:
        z = operate(images)
    axes = mode.tracker.get(z)
    return z, None if axes is None else layout_of(axes, z.shape)


def windows(x: Tensor, height: int, width: int) -> Tensor:
    """(b, h, w, c) -> (b * windows, height * width, c)"""
    b, h, w, c = x.shape
    x = x.view(b, h // height, height, w // width, width, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, height * width, c)


def put_together(x: Tensor, height: int, width: int, h: int, w: int, order=(0, 1, 3, 2, 4, 5)) -> Tensor:
    """Undo `windows`. The right order is its own inverse."""
    c = x.shape[-1]
    x = x.view(-1, h // height, w // width, height, width, c).permute(*order)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], c)


few = st.integers(1, 3)
several = st.integers(2, 3)


@settings(deadline=None)
@given(rows=several, c=several, gh=few, gw=few, height=few, width=few)
def test_a_map_cut_into_windows_and_put_together_is_the_whole_map_again(rows, c, gh, gw, height, width):
    h, w = gh * height, gw * width
    images = torch.randn(rows, c, h, w)

    def there_and_back(x: Tensor) -> Tensor:
        return put_together(windows(x.permute(0, 2, 3, 1), height, width) * 2, height, width, h, w)

    z, layout = follow(images, there_and_back)
    assert layout == Layout("bhwc", c, h, w)
    assert torch.equal(layout.to_map(z), images * 2)


@settings(deadline=None)
@given(rows=several, c=several, g=several, height=several, width=several)
def test_windows_put_together_in_another_order_are_read_in_the_right_order(rows, c, g, height, width):
    images = torch.randn(rows, c, g * height, g * width)
    for order in ((0, 1, 2, 3, 4, 5), (0, 2, 3, 1, 4, 5), (0, 3, 1, 2, 4, 5), (0, 1, 3, 4, 2, 5)):
        z, layout = follow(
            images,
            lambda x, order=order: put_together(
                windows(x.permute(0, 2, 3, 1), height, width), height, width, g * height, g * width, order
            ),
        )
        assert layout is not None
        assert torch.equal(layout.to_map(z), images)


@settings(deadline=None, max_examples=200)
@example(shape=(3, 2, 4, 3), steps=[("join", 2, 2), ("split", 2, 2)])
@given(
    shape=st.tuples(st.just(3), *[st.sampled_from([1, 2, 3, 4, 6])] * 3),
    steps=st.lists(st.tuples(st.sampled_from(["swap", "split", "join"]), st.integers(0, 5), st.sampled_from([2, 3]))),
)
def test_a_layout_never_moves_a_value_to_another_place(shape, steps):
    images = torch.arange(shape[0] * shape[1] * shape[2] * shape[3]).reshape(shape).float()

    def rearrange(x: Tensor) -> Tensor:
        for step, dim, factor in steps:
            dim, sizes = dim % x.dim(), list(x.shape)
            if step == "split" and sizes[dim] % factor == 0:
                x = x.reshape(*sizes[:dim], sizes[dim] // factor, factor, *sizes[dim + 1 :])
            elif step == "swap" and dim:
                x = x.transpose(dim - 1, dim)
            elif step == "join" and dim:
                x = x.reshape(*sizes[: dim - 1], sizes[dim - 1] * sizes[dim], *sizes[dim + 1 :])
        return x

    z, layout = follow(images, rearrange)
    if layout is not None:
        read = layout.to_map(z)
        assert read.shape == images.shape
        # channels have no neighbours, so their order is free; everything else stands where it stood
        assert torch.equal(read[:, read[0, :, 0, 0].argsort()], images)


COLUMNS = torch.tensor([1, 0, 2, 3, 5, 4])
NO_LAYOUT = {
    "rows and positions in one axis": lambda x: x.permute(0, 2, 3, 1).flatten(0, 2),
    "channels and positions in one axis": lambda x: x.flatten(1),
    "rows in last place": lambda x: x.permute(1, 2, 3, 0),
    "the mean over channels": lambda x: x.mean(1),
    "the mean over the height alone": lambda x: x.mean(2),
    "the mean over the batch": lambda x: x.mean(0, keepdim=True),
    "half of the batch": lambda x: x[:2],
    "pieces of the height as channels": lambda x: x.view(4, 5, 2, 2, 6).permute(0, 2, 4, 1, 3).flatten(3),
    "unfolded patches": lambda x: torch.nn.functional.unfold(x, 2),
    "two axes more, channels between": lambda x: x.view(4, 5, 2, 2, 3, 2).permute(0, 2, 3, 1, 4, 5),
    "values that do not come from the image": lambda x: torch.randn(4, 5, 4, 6),
    "windows with the batch folded in": lambda x: windows(x.permute(0, 2, 3, 1), 2, 2),
    "a reshape across axes": lambda x: x.reshape(4, 5, 8, 3),
    "columns in another order": lambda x: x[:, :, :, COLUMNS],
    "flipped rows": lambda x: x.flip(2),
    "sorted values": lambda x: x.sort(3).values,
    "the largest values first": lambda x: x.topk(6, 3).values,
    "columns scattered": lambda x: torch.zeros(4, 5, 4, 6).scatter(3, COLUMNS.expand(4, 5, 4, 6), x),
    "columns scattered in place": lambda x: torch.zeros(4, 5, 4, 6).scatter_(3, COLUMNS.expand(4, 5, 4, 6), x),
    "columns written at other places": lambda x: torch.zeros(4, 5, 4, 6).index_copy(3, COLUMNS, x),
    "branches stacked before the batch": lambda x: torch.stack([x, x]),
    "branches stacked before the batch, as more rows": lambda x: torch.stack([x, x]).flatten(0, 1),
    "rows stacked again": lambda x: torch.stack(list(x)),
    "columns stacked in place of channels": lambda x: torch.stack(x.unbind(3), 1),
    "numbers stacked": lambda x: torch.stack([x.sum(), x.mean()]) * torch.ones(2),
    "one number": lambda x: x.mean(),
    "one number, reduced again": lambda x: x.sum().sum(0),
    "one number, of which the largest is taken": lambda x: x.sum().max(-1).values,
    "one number, turned": lambda x: x.sum().t().transpose(0, -1).permute(()),
    "one number as a map": lambda x: x.mean().view(1, 1, 1, 1),
    "one axis, turned": lambda x: x.flatten().t(),
    "every second token of a grid and of others behind it": lambda x: torch.cat(
        [x.flatten(2).mT, torch.zeros(4, 24, 5)], 1
    )[:, ::2],
}


@pytest.mark.parametrize("name", NO_LAYOUT)
def test_an_output_whose_axes_cannot_be_told_apart_has_no_layout(name):
    assert follow(torch.randn(4, 5, 4, 6), NO_LAYOUT[name])[1] is None


FOLLOWED = {
    "a convolution": (
        lambda x: torch.nn.functional.conv2d(x, torch.ones(7, 5, 3, 3), stride=2, padding=1),
        Layout("bchw", 7, 2, 3),
    ),
    "an addition": (lambda x: x + torch.ones(5, 1, 1), Layout("bchw", 5, 4, 6)),
    "positions column by column": (
        lambda x: x.permute(0, 3, 2, 1).flatten(1, 2),
        Layout("bnc", 5, 4, 6, 0, 24, (("w", 6, 1), ("h", 4, 1))),
    ),
    "width before height": (
        lambda x: x.permute(0, 3, 2, 1),
        Layout("bnnc", 5, 4, 6, 0, 24, (("w", 6, 1), ("h", 4, 1))),
    ),
    "windows of tokens in an axis of their own": (
        lambda x: x.view(4, 5, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2),
        Layout("bnnc", 5, 4, 6, 0, 24, (("h", 2, 2), ("w", 3, 2), ("h", 2, 1), ("w", 2, 1))),
    ),
    "a crop": (lambda x: x[:, :, 1:, 1:], Layout("bchw", 5, 3, 5)),
    "a cyclic shift": (lambda x: x.permute(0, 2, 3, 1).roll((1, 1), (1, 2)), Layout("bhwc", 5, 4, 6)),
    "padding": (lambda x: torch.nn.functional.pad(x, (0, 2, 0, 1)), Layout("bchw", 5, 5, 8)),
    "more channels": (lambda x: torch.cat([x, x], 1), Layout("bchw", 10, 4, 6)),
    "a list that began empty": (lambda x: torch.cat([x[:0].flatten(), x], 1), Layout("bchw", 5, 4, 6)),
    "a linear layer on the last axis": (lambda x: x.permute(0, 2, 3, 1) @ torch.ones(5, 7), Layout("bhwc", 7, 4, 6)),
    "a mean over all positions": (lambda x: x.mean((2, 3)), Layout("bc", 5, 1, 1)),
    "tokens, channels first": (lambda x: x.flatten(2), Layout("bcn", 5, 4, 6, tokens=24)),
    "tokens without those put before": (
        lambda x: torch.cat([torch.zeros(4, 2, 5), x.flatten(2).mT], 1)[:, 2:],
        bnc(5, 4, 6),
    ),
    "tokens without one of two put before": (
        lambda x: torch.cat([torch.zeros(4, 2, 5), x.flatten(2).mT], 1)[:, 1:],
        bnc(5, 4, 6, prefix=1),
    ),
    "tokens after some others, then after one more": (
        lambda x: torch.cat([torch.zeros(4, 1, 5), torch.cat([torch.zeros(4, 2, 5), x.flatten(2).mT], 1)], 1),
        bnc(5, 4, 6, prefix=3),
    ),
    "tokens before others": (lambda x: torch.cat([x.flatten(2).mT, torch.zeros(4, 2, 5)], 1), bnc(5, 4, 6, after=2)),
    "branches stacked and added up": (lambda x: torch.stack([x, x]).sum(0), Layout("bchw", 5, 4, 6)),
    "branches stacked, of which the largest is taken": (
        lambda x: torch.stack([x.permute(0, 2, 3, 1)] * 3, -1).max(-1).values,
        Layout("bhwc", 5, 4, 6),
    ),
    "branches stacked as more channels": (lambda x: torch.stack([x, x], 2).flatten(1, 2), Layout("bchw", 10, 4, 6)),
    "maps of one channel stacked before the batch": (
        lambda x: torch.stack([x.mean(1), x.amax(1)]).transpose(0, 1),
        Layout("bchw", 2, 4, 6),
    ),
    "maps of one channel stacked": (lambda x: torch.stack([x.mean(1), x.amax(1)], 1), Layout("bchw", 2, 4, 6)),
    "a position axis gone": (lambda x: x[:, :, :1], Layout("bchw", 5, 1, 6)),
    "every second row and column, as channels": (
        lambda x: torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
        Layout("bchw", 20, 2, 3),
    ),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_layout_is_known_after(name):
    operate, expected = FOLLOWED[name]
    assert follow(torch.randn(4, 5, 4, 6), operate)[1] == expected


def test_equal_sizes_are_told_apart():
    images = torch.randn(4, 4, 4, 4)
    assert follow(images, lambda x: x.permute(0, 2, 3, 1))[1] == Layout("bhwc", 4, 4, 4)
    turned = Layout("bnnc", 4, 4, 4, 0, 16, (("w", 4, 1), ("h", 4, 1)))
    assert follow(images, lambda x: x.permute(0, 3, 2, 1))[1] == turned
    assert torch.equal(turned.to_map(images.permute(0, 3, 2, 1)), images)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_after_a_convolution_all_axes_are_known_again_if_the_first_has_the_size_of_the_batch(dim):
    def lose_all_axes(x):
        return torch.nn.functional.conv2d(torch.stack(list(x), dim).movedim(dim, 0), torch.ones(7, 5, 1, 1))

    images = torch.randn(4, 5, 4, 6)
    assert follow(images, lose_all_axes, rows=4)[1] == Layout("bchw", 7, 4, 6)
    assert follow(images, lose_all_axes, rows=3)[1] is None


def test_hieras_tokens_in_windows_are_read_in_the_order_of_the_image():
    net = timm.create_model("hiera_tiny_224", img_size=(64, 96), embed_dim=8, stages=(1, 1, 1, 1)).eval()
    cuts = survey(net, (3, 64, 96)).cuts
    images = torch.randn(2, 3, 64, 96)
    kept: dict[int, Tensor] = {}
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda _m, _i, out, i=i: kept.setdefault(i, out))
    with torch.no_grad():
        _, maps = net.forward_intermediates(images)
    for i, expected in enumerate(maps):
        assert torch.equal(cuts[f"blocks.{i}"].layout.to_map(kept[i]), expected)


# ---------------------------------------------------------------------------------------------------- memory


def test_an_alias_has_the_axes_of_its_tensor_and_a_view_has_its_memory_key():
    tracker, x = AxisTracker(), torch.zeros(2, 3, 4, 4)
    tracker.set(x, image_axes(x.shape))
    assert tracker.get(x.detach()) == image_axes(x.shape)
    assert memory_of(x) == memory_of(x[1:].mT) != memory_of(x.clone())


def test_memory_that_is_used_again_has_another_key_and_no_axes():
    tracker, keys = AxisTracker(), set()
    for _ in range(200):
        x = torch.zeros(2, 3, 4, 4)
        assert tracker.get(x) is None
        tracker.set(x, image_axes(x.shape))
        keys.add(memory_of(x))
        del x
    assert len(keys) == 200
    assert all(key.expired() for key in keys), "a key does not keep the values in memory"
