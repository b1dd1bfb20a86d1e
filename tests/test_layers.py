"""The package as a whole: who may import whom, what is public, who may speak, and that importing it is light."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptee

PACKAGE = Path(ptee.__file__).parent
TREES = {path.stem: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py"))}
LAYERS = {  # a module imports from lower layers only
    0: "errors tables options progress shadow freezing allocation",
    1: "costs layout losses policies solver reliability replay batches pictures cifar_resnet weights origins devices classifiers "
    "views mixing history gates knob building",
    2: "data labels heads cuts backbones optimizers hold",
    3: "recipes blocks proof runs learned front settings",
    4: "placement naming checkpoint rebuilding",
    5: "plans",
    6: "calls",
    7: "model",
    8: "traces cache steps benchmark zoo",
    9: "thresholds comparison",
    10: "asked evaluation comparing training decision tuning",
    11: "defaults training_speed choosing measuring report",
    12: "reopening augmenting",
    13: "cli",
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules.split()}
ENTRANCES = {"__init__", "__main__"}  # public names, imported late; and the command
PUBLIC = {
    *("augment", "choose_exits", "plan", "train", "fit_gates", "tune", "evaluate", "compare", "load", "register_head"),
    *("EarlyExitModel", "AllExits", "ExitOutput", "Exit", "Plan", "PteeError"),
}
each_module = pytest.mark.parametrize("module", sorted(set(TREES) - ENTRANCES))


def imported(module: str) -> Iterator[str]:
    """Modules of ptee that a module imports, at its top, inside a function or for types alone."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [node.module] if node.module != "ptee" else [f"ptee.{a.name}" for a in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("ptee.") and name != "ptee.__version__")


def test_the_table_of_layers_names_every_module_once():
    named = [module for modules in LAYERS.values() for module in modules.split()]
    assert sorted(named) == sorted(set(TREES) - ENTRANCES)


@each_module
def test_a_module_imports_from_lower_layers_only(module):
    above = {other for other in imported(module) if LAYER_OF[other] >= LAYER_OF[module]}
    assert not above, f"{module} (layer {LAYER_OF[module]}) imports {sorted(above)}"


def test_the_test_itself_sees_imports_of_every_form():
    assert {"cifar_resnet", "errors"} <= set(imported("backbones"))  # import ptee.x, from ptee.x import
    assert {"checkpoint", "errors"} <= set(imported("training"))  # from ptee import x
    assert "tuning" in set(imported("cli"))  # inside a function, or for types


# ---------------------------------------------------------------------------------------------------- who may speak


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield ast.unparse(node.exc).partition("(")[0]


@each_module
def test_only_the_command_prints_or_ends_the_program(module):
    forbidden = {"print", "exit", "quit", "sys.exit", "os._exit", "SystemExit", "sys.stdout.write", "sys.stderr.write"}
    said = forbidden & set(calls(TREES[module])) | {
        c for c in calls(TREES[module]) if c in ("click.echo", "click.Abort")
    }
    assert module == "cli" or not said


@pytest.mark.parametrize(
    "module",
    [
        "losses",
        "mixing",
        "policies",
        "solver",
        "reliability",
        "thresholds",
        "heads",
        "gates",
        "knob",
        "learned",
        "naming",
        "placement",
        "plans",
        "blocks",
        "layout",
        "replay",
        "costs",
        "cuts",
        "proof",
    ],
)
def test_the_method_knows_no_file_and_no_arguments(module):
    names = {node.id for node in ast.walk(TREES[module]) if isinstance(node, ast.Name)}
    assert not names & {"open", "Path", "os", "argparse", "click", "json"}


# ---------------------------------------------------------------------------------------------------- what is public


def test_the_public_names_are_those_documented():
    assert set(ptee.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_resolves_and_says_what_it_is(name):
    value = getattr(ptee, name)
    assert inspect.getdoc(value)
    assert value.__name__ == name
    assert value.__module__.startswith("ptee.")
    assert name in dir(ptee)


def test_a_module_for_who_wants_more_is_there_without_an_import_of_its_own():
    code = """
import sys, ptee
names = ["backbones", "data", "thresholds", "traces"]
assert not any(f"ptee.{name}" in sys.modules for name in names)
assert [getattr(ptee, name).__name__ for name in names] == [f"ptee.{name}" for name in names]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'agument'"):
        ptee.agument  # noqa: B018 - reading it is the test


def test_type_checkers_see_the_public_names():
    block = next(node for node in TREES["__init__"].body if isinstance(node, ast.If))
    declared = {f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    assert declared == {f"{getattr(ptee, name).__module__}.{name}" for name in PUBLIC}


def test_no_module_is_named_like_a_public_function():
    assert not PUBLIC & set(TREES), "the module would hide the function"


def test_the_version_is_that_of_the_build_file():
    build = PACKAGE.parent / "pyproject.toml"
    if not build.exists():
        pytest.skip("ptee is installed without its source tree")
    assert f'\nversion = "{ptee.__version__}"\n' in build.read_text()


# ---------------------------------------------------------------------------------------------------- light imports

HEAVY = ("torch", "timm", "torchvision", "fvcore", "accelerate", "sklearn", "numpy", "huggingface_hub", "safetensors")


@pytest.mark.parametrize("module", ["ptee", "ptee.errors", "ptee.tables", "ptee.options", "ptee.cli"])
def test_importing_it_imports_nothing_heavy(module):
    source = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "module",
    [
        "backbones",
        "building",
        "data",
        "pictures",
        "placement",
        "plans",
        "rebuilding",
        "model",
        "training",
        "evaluation",
    ],
)
def test_importing_the_library_leaves_the_libraries_of_models_for_later(module):
    late = ("timm", "torchvision", "fvcore", "accelerate", "sklearn")
    top = {
        alias.name.partition(".")[0]
        for node in TREES[module].body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    top |= {n.module.partition(".")[0] for n in TREES[module].body if isinstance(n, ast.ImportFrom)}
    assert not top & set(late)


def test_the_main_module_is_three_lines():
    assert len(TREES["__main__"].body) <= 3
