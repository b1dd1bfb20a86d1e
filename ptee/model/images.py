"""Checks of a model that is to run, and of the images that it is given. `predict`, training and evaluation refuse the same ones, in the same words."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_batchedtensor, is_gradtrackingtensor, peek_interpreter_stack
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.data import Subset

from ptee._common.errors import DataError, PteeError
from ptee._common.text import number_of, type_name
from ptee.data.batches import is_loader, odd_tensor, require_plain


def detached() -> PteeError:
    """The error where a model that gave its backbone back is to run."""
    text = "This model was detached from its backbone. Load it again from where it was saved (ptee.load), or make new exits: "
    return PteeError(f"{text}ptee.augment(backbone, ...).")


def require_images(x: Any, channels: int) -> None:
    """Refuse what is no batch (b, c, h, w) of floating-point images with this many channels."""
    if not isinstance(x, Tensor):
        raise PteeError(f"Images come as a tensor (b, c, h, w), not as {type(x).__name__}.")
    require_plain(x)
    if x.dim() != 4:  # some backbones would take one image for a batch
        one = " For one image give x[None]." if x.dim() == 3 else ""
        raise PteeError(f"Images come as (b, c, h, w), and these are {tuple(x.shape)}.{one}")
    if x.shape[1] != channels and x.shape[3] == channels:
        raise PteeError(
            f"Images come as (b, c, h, w), and these are {tuple(x.shape)}, with the channels last. Give x.permute(0, 3, 1, 2)."
        )
    if x.shape[1] != channels:
        have = number_of(x.shape[1], "channel")
        raise PteeError(
            f"These images have {have}, and the model takes {channels}. {_with_channels(x.shape[1], channels)}"
        )
    if not x.is_floating_point():
        scaled = "x.float() / 255" if x.dtype == torch.uint8 else "x.float()"
        raise PteeError(
            f"These images are {type_name(x.dtype)}, and the model takes floating-point numbers. "
            f"Give ({scaled} - mean) / std, with the mean and std that the backbone was trained with."
        )
    _refuse_grad(x)


def require_values(x: Tensor) -> None:
    """Refuse images that stand for others, or have no values: who leaves depends on these."""
    if is_batchedtensor(x):
        raise PteeError(
            "torch.func.vmap cannot run around predict(), because the values say which rows leave. Give the whole batch at once, or "
            "use all_exits(x)."
        )
    if isinstance(x, FakeTensor) or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise PteeError(
            "In a FakeTensorMode images have no values, and these say which rows leave. Call predict() outside."
        )


def _refuse_grad(x: Tensor) -> None:
    """Refuse images of torch.func.grad, which knows no hooks on what is saved for a backward pass."""
    if is_gradtrackingtensor(x) and peek_interpreter_stack().key() == TransformType.Grad:
        raise PteeError(
            "torch.func.grad and torch.func.vjp cannot run around this model. Use torch.autograd.grad with x.requires_grad_() and "
            "all_exits(x)."
        )


def is_plain(x: Any) -> bool:
    """Whether this is a tensor that holds its numbers one by one, as all code of networks expects."""
    return isinstance(x, Tensor) and not odd_tensor(x)


def require_answers(unanswered: Tensor, data: object, whose: str = "The backbone's") -> None:
    """Refuse data with images (n,) that a network does not answer: whatever an exit says of them would count as the same."""
    if count := int(unanswered.sum()):
        first, n = int(unanswered.int().argmax()), len(unanswered)
        raise DataError(
            f"{whose} logits are NaN for {count:,} of {number_of(n, 'image')} (the first has the index {_place(data, first)}), so there "
            "is no answer to compare with. Leave such images out."
        )


def _place(data: Any, row: int) -> str:
    """The index of a row, in the user's own data set where the rows are some of it that were drawn."""
    if is_loader(data):  # which may have any order
        return f"{row} in the order of the loader"
    if type(data) is not Subset:
        return str(row)
    while type(data) is Subset:
        data, row = data.dataset, int(data.indices[row])
    return f"{row} in the {type(data).__name__} of {len(data):,}"


def require_device(x: Tensor, device: torch.device) -> None:
    """Refuse images on another device than the model's."""
    if x.device != device:
        raise PteeError(f"These images are on {x.device}, and the model is on {device}. Give x.to({str(device)!r}).")


def wrong_type(x: Tensor, wanted: torch.dtype, why: str) -> PteeError:
    """The error for images of a number type that the backbone cannot take; `why` is what the backbone raised."""
    return PteeError(
        f"These images are {type_name(x.dtype)}, and the model is {type_name(wanted)} ({why.rstrip('.')}). "
        f"Give x.to({wanted}), or convert the model with model.to({x.dtype})."
    )


def wrong_size(x: Tensor, planned: tuple[int, int, int], why: str) -> PteeError:
    """The error for images of a size that the backbone cannot take; the exits were planned for (c, h, w)."""
    return PteeError(
        f"The backbone cannot take images of size {tuple(x.shape[1:])} ({why.rstrip('.')}): the exits were planned for "
        f"{tuple(planned)}. Resize the images, or plan the exits again with their input_size."
    )


def _with_channels(have: int, want: int) -> str:
    """What to type to get images with the right number of channels."""
    if have == 1:
        return f"Give x.expand(-1, {want}, -1, -1), which repeats the grey channel."
    if (have, want) == (4, 3):
        return "Give x[:, :3], if the fourth channel is the opacity."
    if want == 1:
        return "Give x.mean(1, keepdim=True), the grey images."
    return f"Give images with {want} channels, or plan the exits again with their input_size."


def require_eval(model: Any) -> None:
    """Refuse a model in training mode."""
    if model.training or any(part.training for part in model.heads.modules()):
        raise PteeError(
            "predict() and model(x) need eval mode: in training mode a row's answer depends on its neighbours through the heads' "
            "batch norm. Call model.eval(), or use all_exits(x) to train."
        )


@torch.compiler.assume_constant_result  # a compiler runs it: the error is ours, and torch 2.11 calls all compiling an export
def refuse_export() -> bool:
    """Refuse an export of this model; False otherwise.

    torch's own flag is that of all threads. Only the thread that exports has a tracing context or fake tensors.
    """
    here = TracingContext.try_get() is not None or detect_fake_mode() is not None
    return here and torch.compiler.is_exporting() and refuse_capture()


def refuse_capture() -> NoReturn:
    """Refuse tracing, scripting and exporting."""
    raise PteeError(
        "An early-exit model cannot be traced, scripted or exported, nor get exits of its own: which rows leave where depends "
        "on the images. Take model.detach(), the backbone alone."
    )
