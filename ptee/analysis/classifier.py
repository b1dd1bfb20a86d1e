"""What can be a backbone: a module that gives logits (b, K) for images alone. Of any other: why not, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.errors import Advice, Argument, BackboneError, first_line, some
from ptee.analysis.fake_run import with_fake_tensors
from ptee.analysis.freezing import modes, set_modes

TWO_LOGITS = (
    "One logit z of a binary network is two: let a module around it return torch.stack([torch.zeros_like(z), z], 1) with z of "
    "shape (b,), whose softmax is the sigmoid of z."
)
GIVE_SIZE = ("Give the size that it takes, ", Argument("input_size", "(c, h, w)"), ", or build it for this one.")
MISSING = re.compile(r"(\S*forward\(\)) missing \d+ required [\w-]+(?: \w+)? arguments?: (.+)")  # Python's words
COMPILED = "_torchdynamo_orig_callable"  # torch.compile leaves the function that it was given here
QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")  # and what lies in them


def require_runnable(module: nn.Module) -> None:
    """Refuse what cannot be hooked, counted or run.

    Raises:
        BackboneError: it is compiled, runs copies, is quantised, or has parameters without numbers or of inference mode.
    """
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
        raise BackboneError(f"{kind} is compiled, so its modules cannot be hooked. Give the module itself.")
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise BackboneError(f"{kind} runs copies of a network, which have no hooks. Give its .module.")
    require_uncompiled(module)
    for name, part in module.named_modules():
        if type(part).__module__.startswith(QUANTISED):
            raise BackboneError(
                f"{kind} is quantised ({name or 'it'} is a {type(part).__name__} of {type(part).__module__}), and the operators "
                "of such modules cannot be counted. Give the network as it was before."
            )
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise BackboneError(
                f"{kind} has lazy parameters ({name}). Run it once on an image, so that they get their shapes."
            )
        if tensor.is_meta:
            raise BackboneError(
                f"{kind} is on the meta device ({name}), where tensors have no numbers. Build it on the CPU, or take "
                "net.to_empty(device='cpu') and load its weights."
            )
        if tensor.is_inference() and tensor.requires_grad:
            raise BackboneError(
                f"{kind} was built under torch.inference_mode ({name}), where torch lets nobody switch gradients off and on "
                "again. Build it outside, or give copy.deepcopy(net), made outside."
            )


def require_uncompiled(module: nn.Module) -> None:
    """Refuse a network of which torch.compile has some parts: what it made of them need not run hooks, nor see new ones.

    Raises:
        BackboneError: naming them, and how to have the network without.
    """
    kind, parts = type(module).__name__, dict(module.named_modules())
    if wrapped := [name for name, part in parts.items() if name and hasattr(part, "_orig_mod")]:
        first = wrapped[0]
        raise BackboneError(
            f"{kind} has compiled parts ({some(wrapped)}), whose modules cannot be hooked. Put each back as it was: "
            f"net.set_submodule({first!r}, net.get_submodule({first!r})._orig_mod)."
        )
    if in_place := [name or "all of it" for name, part in parts.items() if part._compiled_call_impl is not None]:
        raise BackboneError(
            f"{kind} is compiled in place ({some(in_place)}), so its modules cannot be hooked. Give copy.deepcopy(net), which is "
            "not compiled, or leave out .compile()."
        )
    if functions := [name or "its own" for name, part in parts.items() if hasattr(part.forward, COMPILED)]:
        raise BackboneError(
            f"{kind} has a compiled forward ({some(functions)}), so its modules cannot be hooked. Leave out torch.compile."
        )


def count_classes(
    module: nn.Module, input_size: tuple[int, int, int], name: str, other_size: Advice = GIVE_SIZE
) -> int:
    """K, from a pass in eval mode with two images of zeros; the modes are put back, even if the pass fails.

    Args:
        module: the network.
        input_size: (c, h, w).
        name: what to call it.
        other_size: what the caller can do if it takes images of another size, as parts of a message.

    Raises:
        BackboneError: if the pass fails, or what it gives is not (b, K) with a row for each image and K >= 2.
    """
    like = next((t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()), torch.empty(0))
    images = torch.zeros(2, *input_size, dtype=like.dtype, device=like.device)
    before = modes(module)
    try:
        module.eval()
        with torch.no_grad():
            logits = with_fake_tensors(
                lambda network, batch: logits_of(network, batch, name, other_size), module, images
            )
    finally:
        set_modes(module, before)
    if getattr(module, "num_classes", None) == 0:  # timm's way to say that these are features
        raise BackboneError(
            f"{name} has no classifier (its num_classes is 0). Give it one and train it; with timm: net.reset_classifier(10)."
        )
    return logits.shape[1]


def logits_of(module: nn.Module, images: Tensor, name: str = "", other_size: Advice = GIVE_SIZE) -> Tensor:
    """What a classifier answers: (b, K), K >= 2.

    Args:
        module: the network.
        images: (b, c, h, w).
        name: what to call it; by default its class.
        other_size: what the caller can do if it takes images of another size, as parts of a message.

    Raises:
        BackboneError: if the pass fails, or gives something else than one tensor (b, K).
    """
    name = name or type(module).__name__
    try:
        logits = module(images)
    except Exception as why:
        raise BackboneError(f"{name} ", *_failure(module, images, why, other_size)) from why
    if isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(images) and logits.shape[1] >= 2:
        return logits
    what = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    raise BackboneError(
        f"{name} gives {what} for {len(images)} images, not logits ({len(images)}, K) with K >= 2. "
        f"{_mend(logits, len(images))}"
    )


def _failure(module: nn.Module, images: Tensor, why: Exception, other_size: Advice) -> Advice:
    """What a pass failed of: of arguments that only its author can give, or, as a rule, of the size."""
    if wanting := MISSING.search(str(why)):
        more = [name.strip("'") for name in re.findall(r"'\w+'", wanting[2])]
        text = (
            f"is called with images alone, and {wanting[1]} wants {' and '.join(more)} too. Wrap it in a module that gives them: "
            f"forward(self, x): return self.net(x, {', '.join(f'{name}=...' for name in more)})."
        )
        return (text,)
    return (f"cannot take an image of size {tuple(images.shape[1:])}: {first_line(why)} ", *other_size)


def _mend(output: Any, rows: int) -> str:
    """How to make logits of what a network gives."""
    if isinstance(output, Tensor) and output.shape in ((rows,), (rows, 1)):
        return TWO_LOGITS
    parts = _parts(output)
    for how, part in parts.items():
        if isinstance(part, Tensor) and part.dim() == 2 and len(part) == rows and part.shape[1] >= 2:
            return f"Wrap it in a module that gives those: forward(self, x): return self.net(x){how}."
    for how, part in reversed(parts.items()):
        if isinstance(part, Tensor) and part.dim() == 4:
            return (
                "If these are feature maps, wrap it in a module that has a classifier behind the last, and train that: "
                f"forward(self, x): return self.fc(self.net(x){how}.mean((2, 3)))."
            )
    return "Wrap it in a module that gives its logits."


def _parts(output: Any) -> dict[str, Any]:
    """What an output holds, by the way there; what is called logits first."""
    if hasattr(output, "logits"):
        return {".logits": output.logits}
    if isinstance(output, Mapping):
        return {f'["{key}"]': output[key] for key in sorted(output, key=lambda key: key != "logits")}
    return {f"[{i}]": part for i, part in enumerate(output)} if isinstance(output, list | tuple) else {"": output}
