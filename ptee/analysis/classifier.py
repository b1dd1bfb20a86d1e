"""Checks whether a module can be a backbone: it takes images, nothing else, and returns logits (b, K).

Any other module is refused with the reason and with what to do about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ptee._common.errors import Advice, Argument, BackboneError, first_line, ran_out_of_memory, some
from ptee._common.text import type_name
from ptee.analysis.fake_run import with_fake_tensors
from ptee.analysis.freezing import KeptBuffers, modes, set_modes

TWO_LOGITS = (
    "One logit z of a binary network is two: wrap it in a module that returns torch.stack([torch.zeros_like(z), z], 1), with z "
    "of shape (b,). The softmax of these two is the sigmoid of z."
)
GIVE_SIZE = ("Give the size that it takes, ", Argument("input_size", "(c, h, w)"), ", or build it for this one.")
MISSING = re.compile(r"(\S*forward\(\)) missing \d+ required [\w-]+(?: \w+)? arguments?: (.+)")  # as Python says it
NOT_THERE = re.compile(r"operator '(\S+)' is not currently implemented for the (\w+) device")  # as torch says it
FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK=1"  # in the environment, before torch is imported
COMPILED = "_torchdynamo_orig_callable"  # where torch.compile keeps the function that it was given
# How a part shows that it is compiled, and what to say of such parts.
COMPILED_PARTS: tuple[tuple[Callable[[nn.Module], bool], str], ...] = (
    (lambda part: hasattr(part, "_orig_mod"),
     "has compiled parts ({0}), whose modules cannot be hooked. Put each back as it was: "
     "net.set_submodule({1!r}, net.get_submodule({1!r})._orig_mod)."),
    (lambda part: _is_scripted(part),
     "has parts of TorchScript ({0}), whose modules cannot be hooked. Give the network as it was before torch.jit.script or "
     "torch.jit.trace, or start Python with PYTORCH_JIT=0, which leaves both out."),
    (lambda part: isinstance(part, torch.fx.GraphModule) and "eval" in vars(part),  # it refuses eval() by its own method
     "is of torch.export ({0}), so it has no modules that can be hooked. Give the network as it was before torch.export."),
    (lambda part: part._compiled_call_impl is not None,
     "is compiled in place ({0}), so its modules cannot be hooked. Give copy.deepcopy(net), which is not compiled, or leave out "
     ".compile()."),
    (lambda part: hasattr(part.forward, COMPILED),
     "has a compiled forward ({0}), so its modules cannot be hooked. Leave out torch.compile."),
)  # fmt: skip
SIGMOIDS = {"aten::sigmoid", "aten::sigmoid_"}
SAME_VALUES = {
    *("aten::view", "aten::_unsafe_view", "aten::squeeze", "aten::unsqueeze", "aten::transpose", "aten::permute"),
    *("aten::select", "aten::slice", "aten::clone", "aten::_to_copy", "aten::detach", "aten::alias"),
}
SUM_IS_ONE = 1e-2  # also in half precision
QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")  # and their submodules


def _is_scripted(module: nn.Module) -> bool:
    """Whether it runs as TorchScript. With PYTORCH_JIT=0 a class that derives from ScriptModule is like any other."""
    return isinstance(module, torch.jit.ScriptModule) and hasattr(module, "_c")


def require_runnable(module: nn.Module) -> None:
    """Refuse a module that cannot be hooked, counted or run."""
    kind = type(module).__name__
    if _is_scripted(module) or hasattr(module, "_orig_mod"):
        raise BackboneError(f"{kind} is compiled, so its modules cannot be hooked. Give the module that was compiled.")
    _require_unwrapped(module, kind)
    _require_uncompiled(module, kind)
    for name, part in module.named_modules():
        if type(part).__module__.startswith(QUANTISED):
            raise BackboneError(
                f"{kind} is quantised ({name or 'it'} is a {type(part).__name__} of {type(part).__module__}), and the "
                "operators of such modules cannot be counted. Give the network as it was before it was quantised."
            )
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        _require_values(tensor, name, kind)
        if getattr(tensor, "act_quant_kwargs", None) is not None:  # torchao's
            raise BackboneError(
                f"{kind} quantises activations when it runs ({name} is a {type(tensor).__name__}), and its operators cannot be counted. "
                "Quantise its weights alone (torchao's Int8WeightOnlyConfig), or export with --int8 afterwards."
            )


def _require_unwrapped(module: nn.Module, kind: str) -> None:
    """Refuse what runs copies of a network, or keeps its weights in several processes."""
    for name, part in module.named_modules():
        if isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
            if not name:
                raise BackboneError(f"{kind} runs copies of a network, and the copies have no hooks. Give its .module.")
            raise BackboneError(
                f"{kind} runs copies of {name}, a {type(part).__name__}, and the copies have no hooks. Put it back as it was: "
                f"net.set_submodule({name!r}, net.get_submodule({name!r}).module)."
            )
        if any(base.__module__.startswith("torch.distributed.fsdp") for base in type(part).__mro__):
            raise BackboneError(
                f"{kind} keeps weights in several processes ({name or 'it'} is a {type(part).__name__}), so it cannot be counted. Give "
                "the network as it was before FSDP."
            )


def _require_uncompiled(module: nn.Module, kind: str) -> None:
    """Refuse compiled parts: compiled code may run no hooks, or none that were added later."""
    for is_so, words in COMPILED_PARTS:
        if names := [name or "all of it" for name, part in module.named_modules() if is_so(part)]:
            raise BackboneError(f"{kind} {words.format(some(names), names[0])}")


def _require_values(tensor: Tensor, name: str, kind: str) -> None:
    """Refuse a parameter or buffer that has no values, or whose gradients cannot be switched off."""
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        raise BackboneError(
            f"{kind} has lazy parameters ({name}). Run it once on an image, so that they get their shapes."
        )
    if tensor.is_meta:
        raise BackboneError(
            f"{kind} is on the meta device ({name}), where tensors have no values. Build it on the CPU, or call "
            "net.to_empty(device='cpu') and load its weights."
        )
    if tensor.is_inference() and tensor.requires_grad:
        raise BackboneError(
            f"{kind} was built under torch.inference_mode ({name}), so its gradients cannot be switched off and on. "
            "Build it outside of inference_mode, or give copy.deepcopy(net), made outside of it."
        )


def count_classes(module: nn.Module, input_size: tuple[int, int, int], name: str) -> int:
    """K, from a forward pass in eval mode with two images of zeros. Modes and buffers are restored, even if the pass fails.

    Errors call the network by `name`.
    """
    kept = [*module.parameters(), *module.buffers()]
    like = next((t for t in kept if t.is_floating_point()), torch.empty(0, device="cpu"))
    images = torch.zeros(2, *input_size, dtype=like.dtype, device=like.device)
    before, buffers = modes(module), KeptBuffers(module)
    try:
        module.eval()
        with torch.no_grad():
            logits = with_fake_tensors(lambda net, batch: logits_of(net, batch, name), module, images)
    finally:
        buffers.put_back(buffers.changing(lambda: module(images + 1)))
        set_modes(module, before)
    if getattr(module, "num_classes", None) == 0:  # timm's networks return features then
        raise BackboneError(
            f"{name} has no classifier (its num_classes is 0). Give it one and train it; with timm: net.reset_classifier(10)."
        )
    return logits.shape[1]


def logits_of(module: nn.Module, images: Tensor, name: str = "") -> Tensor:
    """The logits (b, K), K >= 2, of a classifier. Anything else is a BackboneError that says what to do (`count_classes`)."""
    name = name or type(module).__name__
    try:
        logits = module(images)
    except Exception as why:
        if ran_out_of_memory(why):
            raise
        raise BackboneError(f"{name} ", *_why_it_failed(module, images, why)) from why
    if isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(images) and logits.shape[1] >= 2:
        _require_plain(logits, name)
        return logits
    what = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    raise BackboneError(
        f"{name} gives {what} for {len(images)} images, not logits ({len(images)}, K) with K >= 2. "
        f"{_how_to_get_logits(logits, len(images))}"
    )


def require_no_probabilities(logits: Tensor, name: str, operators: Sequence[Any]) -> None:
    """Refuse answers (b, K) behind a softmax or a sigmoid: exits give logits, so some rows of a batch would be of one kind and some of the
    other. `operators`: those that made them, each with its switches.
    """
    if isinstance(logits, FakeTensor):  # it has no values
        return
    rows = logits.float()
    if (rows < 0).any() or (rows > 1 + SUM_IS_ONE).any():
        return
    if ((rows.sum(1) - 1).abs() < SUM_IS_ONE).all():
        raise BackboneError(
            f"{name} gives probabilities: each row is 0 or more and adds up to 1. Exits give logits. Leave out its softmax, or wrap it in "
            "a module that gives logarithms: forward(self, x): return self.net(x).clamp(min=1e-9).log()."
        )
    ran = (operator.name().split(".")[0] for operator, *_ in reversed(operators))
    if next((each for each in ran if each not in SAME_VALUES), "") in SIGMOIDS:
        raise BackboneError(
            f"{name} ends in a sigmoid, and exits give logits. Leave it out, or wrap the network in a module that gives what was before: "
            "forward(self, x): return self.net(x).float().logit(eps=1e-6)."
        )


def _require_plain(logits: Tensor, name: str) -> None:
    """Refuse logits that cannot be compared and joined as others can."""
    if not isinstance(logits, FakeTensor | nn.Parameter) and type(logits) is not Tensor:
        raise BackboneError(
            f"{name} gives a {type(logits).__name__}, and logits come as a plain tensor. Wrap it in a module that gives one: "
            "forward(self, x): return self.net(x).as_subclass(torch.Tensor)."
        )
    if logits.layout is not torch.strided:
        raise BackboneError(
            f"{name} gives a {type_name(logits.layout)} tensor, and logits come as a plain one. Wrap it in a module that gives one: "
            "forward(self, x): return self.net(x).to_dense()."
        )
    if not logits.is_floating_point():
        raise BackboneError(
            f"{name} gives {type_name(logits.dtype)}, not floating-point logits. Wrap it in a module that gives its logits, before any "
            "decision is made of them."
        )


def _why_it_failed(module: nn.Module, images: Tensor, why: Exception) -> Advice:
    """The rest of a sentence: the forward pass needs more arguments than images, other weights, or images of another size."""
    if missing := MISSING.search(str(why)):
        more = [name.strip("'") for name in re.findall(r"'\w+'", missing[2])]
        return (
            f"is called with images alone, and {missing[1]} wants {' and '.join(more)} too. Wrap it in a module that gives "
            f"them: forward(self, x): return self.net(x, {', '.join(f'{name}=...' for name in more)}).",
        )
    if "BatchedTensor" in str(why):  # as torch says it
        return ("calls torch.func.vmap, and what runs inside of that cannot be seen. Let it run the batch as a whole.",)
    if operator := NOT_THERE.search(str(why)):
        text = f"calls {operator[1]}, which torch does not have on {operator[2]}. Set {FALLBACK}, and the CPU computes it, or move "
        return (text, "the network to the CPU.")
    stored = [*module.named_parameters(), *module.named_buffers()]
    if sparse := [name for name, tensor in stored if tensor.layout is not torch.strided]:
        return (
            f"fails with its weights stored in a sparse or packed way ({some(sparse, 3)}): {first_line(why)} Store them as plain "
            "tensors: weight.to_dense().",
        )
    others = [f"{name}: {type_name(tensor.dtype)}" for name, tensor in stored if _is_of_another_type(tensor, images)]
    if others and "type" in str(why):
        return (
            f"takes {type_name(images.dtype)} images and has weights of other types ({some(others, 3)}): {first_line(why)} Make them one "
            "type: net.float().",
        )
    return (f"cannot take an image of size {tuple(images.shape[1:])}: {first_line(why)} ", *GIVE_SIZE)


def _is_of_another_type(tensor: Tensor, images: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != images.dtype


def _how_to_get_logits(output: Any, rows: int) -> str:
    """What to do with a network that has this output for so many images."""
    if isinstance(output, Tensor) and output.shape in ((rows,), (rows, 1)):
        return TWO_LOGITS
    if isinstance(output, Tensor) and output.dim() == rows == 1:
        return (
            "It leaves out the axis of the images if there is one image, as .squeeze() does. Wrap it in a module that keeps it: "
            "forward(self, x): return self.net(x).reshape(len(x), -1)."
        )
    parts = _parts(output)
    for how, part in parts.items():
        if isinstance(part, Tensor) and part.dim() == 2 and len(part) == rows and part.shape[1] >= 2:
            return f"Wrap it in a module that gives those: forward(self, x): return self.net(x){how}."
    for how, part in reversed(parts.items()):
        if isinstance(part, Tensor) and part.dim() == 4:
            return (
                "If these are feature maps, wrap it in a module with a classifier after the last of them, and train that: "
                f"forward(self, x): return self.fc(self.net(x){how}.mean((2, 3)))."
            )
    return "Wrap it in a module that gives its logits."


def _parts(output: Any) -> dict[str, Any]:
    """The parts of an output, by the code that gets them. A part that is called logits comes first."""
    if hasattr(output, "logits"):
        return {".logits": output.logits}
    if isinstance(output, Mapping):
        return {f'["{key}"]': output[key] for key in sorted(output, key=lambda key: key != "logits")}
    return {f"[{i}]": part for i, part in enumerate(output)} if isinstance(output, list | tuple) else {"": output}
