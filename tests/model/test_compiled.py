"""Compiled networks, and attempts to trace, script or export a model: refused in one line that says what to do."""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import slow
from small import SIZE, K, labelled, made
from torch import Tensor, nn
from torch._dynamo.exc import InternalTorchDynamoError
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import BackboneError, PteeError
from ptee.backbones.load import load_backbone

OPERATORS = dict(torch.jit._builtins._get_builtin_table())  # as it is before any test


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.a, self.fc, self.act = nn.Conv2d(3, 6, 3), nn.Linear(6, K), act
        self.b = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.b(self.a(x))).mean((2, 3)))


def whole(net: nn.Module) -> None:
    net.compile(backend="eager")


def block(net: nn.Module) -> None:
    net.b.compile(backend="eager")


def layer(net: nn.Module) -> None:
    net.b[0].compile(backend="eager")


def replaced(net: nn.Module) -> None:
    net.b = torch.compile(net.b, backend="eager")


def forward(net: nn.Module) -> None:
    net.b.forward = torch.compile(net.b.forward, backend="eager")


WAYS = {
    whole: r"Net is compiled in place \(all of it\).*Give copy.deepcopy\(net\)",
    block: r"Net is compiled in place \(b\).*Give copy.deepcopy\(net\)",
    layer: r"Net is compiled in place \(b.0\).*Give copy.deepcopy\(net\)",
    replaced: r"Net has compiled parts \(b\).*net.set_submodule\('b', net.get_submodule\('b'\)._orig_mod\)",
    forward: r"Net has a compiled forward \(b\).*Leave out torch.compile",
}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch.compile keeps is forgotten before and afterwards.

    So is what torch.jit learnt: it knows operators by the id() of an object that torch._ops._refresh_packet may have let go, and takes
    whatever lies there now for an operator.
    """
    monkeypatch.setattr(torch.jit._builtins, "_builtin_table", dict(OPERATORS))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


each_way = pytest.mark.parametrize("how", WAYS, ids=lambda how: how.__name__)


@each_way
def test_a_compiled_network_is_refused_by_name(how):
    net = Net()
    how(net)
    with pytest.raises(BackboneError, match=WAYS[how]):
        ptee.augment(net, input_size=SIZE)
    with pytest.raises(BackboneError, match=WAYS[how]):
        load_backbone(net, input_size=SIZE)


@each_way
def test_a_run_is_not_loaded_onto_a_compiled_network(how, tmp_path):
    net = Net()
    ptee.augment(copy.deepcopy(net), exits=["a"], input_size=SIZE).save_pretrained(tmp_path)
    how(net)
    with pytest.raises(BackboneError, match=WAYS[how]):
        ptee.load(tmp_path, net)


def test_a_compiled_function_in_a_networks_code_is_refused():
    with pytest.raises(BackboneError, match=r"^Net calls what torch\.compile made"):
        ptee.augment(Net(torch.compile(F.gelu, backend="eager")), exits=["a"], input_size=SIZE)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def mix(x: Tensor) -> Tensor:
    return F.conv2d(x, torch.ones(6, 6, 1, 1, dtype=x.dtype, device=x.device))


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def operator(x: Tensor) -> Tensor:
    return torch.ops.ptee_tests.mix(x)


SCRIPTS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]] = {
    "torch.jit.script": torch.jit.script,
    "torch.jit.trace": lambda act: torch.jit.trace(act, torch.zeros(1, 6, 4, 4)),
    "autograd.Function": lambda act: lambda x: Straight.apply(x, act),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", SCRIPTS)
def test_code_that_computes_products_unseen_is_refused_by_name(how):
    said = rf"^Net calls code whose multiply-accumulates cannot be counted \({'Straight' if how[0] == 'a' else 'mix'}\)\. Let it"
    with pytest.raises(BackboneError, match=said):
        ptee.plan(Net(SCRIPTS[how](mix)), exits=["a"], input_size=SIZE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", SCRIPTS)
def test_activations_that_are_not_seen_cost_as_much_as_others(how):
    seen, hidden = (ptee.plan(Net(act), exits=["b"], input_size=SIZE) for act in (swish, SCRIPTS[how](swish)))
    assert (hidden.macs, hidden.exits[0].cost) == (seen.macs, seen.exits[0].cost)


def test_custom_operators_are_refused_by_name():
    mixed = torch.library.custom_op("ptee_tests::mix", mix, mutates_args=(), schema="(Tensor x) -> Tensor")
    mixed.register_fake(torch.empty_like)
    with pytest.raises(BackboneError, match=r"cannot be counted \(ptee_tests::mix\)"):
        ptee.plan(Net(operator), exits=["a"], input_size=SIZE)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_module_that_is_no_part_of_the_network_is_refused():
    hidden = torch.jit.script(nn.Conv2d(6, 6, 1).eval().requires_grad_(False))
    net = Net(lambda x: hidden(x))
    with pytest.raises(BackboneError, match=r"^Net calls what torch\.jit made, .*without torch\.jit\.$"):
        ptee.plan(net, exits=["a"], input_size=SIZE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiler", [torch.compile, torch.jit.script], ids=["torch.compile", "torch.jit.script"])
def test_what_a_compiler_made_of_a_network_is_refused(compiler):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, K)).eval()
    with pytest.raises(PteeError, match="compiled"):
        ptee.augment(compiler(net), exits="linear", num_exits=1, input_size=SIZE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", [torch.jit.script, lambda part: torch.jit.trace(part, torch.zeros(1, 3, *SIZE[1:]))])
def test_a_scripted_part_of_a_network_is_refused_by_name(script):
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, K)
    )
    net[0] = script(net[0])
    said = r"^Sequential has parts of TorchScript \(0, 0\.0\), .*cannot be hooked\. Give the network as it was before torch\.jit"
    with pytest.raises(BackboneError, match=said):
        ptee.augment(net, exits=["1"], input_size=SIZE)


SCRIPTED_CLASS = """
import torch, ptee
from torch import nn

class Block(torch.jit.ScriptModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    @torch.jit.script_method
    def forward(self, x):
        return x + self.conv(x).relu()

net = nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def exits():
    return [exit.name for exit in ptee.plan(net, exits=["1"], input_size=(3, 8, 8)).exits]

if __name__ == "__main__":
    print(exits())
"""


@pytest.fixture
def scripted(tmp_path) -> Path:
    (tmp_path / "scripted.py").write_text(SCRIPTED_CLASS)  # torch.jit reads the source again
    return tmp_path / "scripted.py"


def test_a_class_of_scripted_modules_is_refused_with_what_switches_torch_jit_off(scripted, monkeypatch):
    monkeypatch.syspath_prepend(scripted.parent)
    with pytest.raises(BackboneError, match="or start Python with PYTORCH_JIT=0, which leaves"):
        importlib.import_module("scripted").exits()


def test_a_class_of_scripted_modules_gets_exits_where_torch_jit_is_switched_off(scripted):
    python = [sys.executable, "-W", "ignore", str(scripted)]
    done = subprocess.run(python, capture_output=True, text=True, env=os.environ | {"PYTORCH_JIT": "0"})
    assert done.stdout == "['1']\n", done.stderr


@pytest.mark.parametrize("place", ["all of it", "0"])
def test_what_torch_export_made_is_refused_by_name(place):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, K)).eval()
    graph = torch.export.export(net, (torch.zeros(1, 3, *SIZE[1:]),)).module()
    said = (
        rf"is of torch\.export \({place}\), so it has no modules that can be hooked\. Give the network as it was before"
    )
    with pytest.raises(BackboneError, match=said):
        ptee.augment(graph if place != "0" else nn.Sequential(graph), input_size=SIZE)


@pytest.mark.parametrize("how", [whole, block, layer, replaced])
def test_the_network_that_is_advised_is_not_compiled(how):
    net = Net()
    how(net)
    if how is replaced:
        net.set_submodule("b", net.get_submodule("b")._orig_mod)
    else:
        net = copy.deepcopy(net)
    assert ptee.augment(net, exits=["a"], input_size=SIZE).predict(labelled(2)[0]).logits.shape == (2, K)


@pytest.mark.parametrize(
    "how", [slow(how) if how in (whole, replaced) else how for how in WAYS], ids=lambda how: how.__name__
)
def test_what_is_compiled_afterwards_changes_no_answer(how):
    model, (x, _) = ptee.augment(Net(), exits=["a", "b"], input_size=SIZE), labelled(3)
    walls = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    expected = model.predict(x, walls)
    how(model.backbone)
    for _ in range(2):
        out = model.predict(x, walls)
        assert torch.equal(out.exit_index, expected.exit_index)
        assert torch.allclose(out.logits, expected.logits, atol=1e-6)
        model.backbone(x)  # alone, which is compiled without exits


# ---------------------------------------------------------------------------------------------------- the model itself


class Around(nn.Module):
    """Somebody's program around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


CAPTURES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "torch.jit.trace": torch.jit.trace,
    "torch.jit.script": lambda model, _: torch.jit.script(model),
    "torch.export": lambda model, x: torch.export.export(model, (x,)),
    "torch.export, strict": lambda model, x: torch.export.export(model, (x,), strict=True),
    "torch.onnx": lambda model, x: torch.onnx.export(model, (x,), "/dev/null", dynamo=False),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a program"])
@pytest.mark.parametrize("how", CAPTURES)
def test_a_model_is_not_captured(how, inside):
    model = Around(made()) if inside else made()
    refusals = (PteeError, InternalTorchDynamoError)  # strict export of torch 2.9 puts the first into the second
    with pytest.raises(refusals, match=r"cannot be traced, scripted or exported.*Take model.detach\(\)") as refusal:
        CAPTURES[how](model.eval(), labelled(2)[0])
    assert not isinstance(refusal.value, PteeError) or "\n" not in str(refusal.value)


class Slow(nn.Module):
    """A network whose capture waits until others have done something."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_end = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.begun.set()
        self.may_end.wait(60)
        return 2 * x


def test_an_export_in_another_thread_keeps_nobody_from_predicting():
    model, x, slow = made().eval(), labelled(4)[0], Slow()
    want = model(x)
    with ThreadPoolExecutor() as pool:
        export = pool.submit(torch.export.export, slow, (torch.ones(2),))
        assert slow.begun.wait(60)
        try:
            assert torch.compiler.is_exporting()
            torch.testing.assert_close(model(x), want)  # an export takes other kernels from all threads
        finally:
            slow.may_end.set()
        export.result(60)


def test_what_is_advised_can_be_captured():
    x, net = labelled(2)[0], made().detach()
    with torch.no_grad():
        assert torch.allclose(torch.export.export(net, (x,)).module()(x), net(x))


def test_a_model_gives_the_same_answers_under_torch_compile():
    model, (x, y) = made(), labelled(4)
    compiled = torch.compile(model, backend="eager")
    for threshold in (0.0, [0.4, 0.5], 2.0):
        model.threshold = threshold
        assert torch.equal(compiled(x), model(x))
    data = TensorDataset(x, y)
    assert ptee.evaluate(compiled, data, speed=False) == ptee.evaluate(model, data, speed=False)
    model.compile(backend="eager")
    assert torch.equal(model(x), compiled(x))


def test_a_model_compiled_into_one_graph_fails_loudly():
    with pytest.raises(RuntimeError, match="disable"):
        torch.compile(made(), backend="eager", fullgraph=True)(labelled(2)[0])
