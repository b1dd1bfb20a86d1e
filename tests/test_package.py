"""The package as a whole: who may import whom, what is public, who may speak, and that importing it is light."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ptee

PACKAGE = Path(ptee.__file__).parent
IMPORT_RULE = "_common < analysis, data < backbones < exits < production < model < training, tuning, deploy < recording < evaluation, timing, serving < scale, report < pipeline < cli"
FLOOR_OF = {folder: n for n, floor in enumerate(IMPORT_RULE.split(" < ")) for folder in floor.split(", ")}
ENTRANCES = {"__init__", "__main__"}  # public names, imported late; and the command
MOST_FILES, MOST_LINES = 12, 450
TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent == PACKAGE
}
PUBLIC = {
    *("augment", "fit", "plan", "train", "calibrate", "tune", "evaluate", "compare", "load", "optimize"),
    *(
        "export",
        "load_exported",
        "record",
        "open_traces",
        "cache",
        "open_cache",
        "register_head",
        "register_confidence",
        "write_report",
    ),
    *("EarlyExitModel", "AllExits", "ExitOutput", "Exit", "Plan", "PteeError", "Recipe"),
}
MODULES = sorted(set(TREES) - ENTRANCES)


def folder_of(module: str) -> str:
    return module.partition(".")[0]


def imported(module: str) -> Iterator[str]:
    """Modules of ptee that a module imports, at its top, inside a function or for types alone."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in (full.removeprefix("ptee.") for full in names) if name in TREES)


def test_every_folder_has_a_place_in_the_import_rule_and_a_dozen_files_at_most():
    files = Counter(map(folder_of, MODULES))
    assert files.keys() == FLOOR_OF.keys()
    assert max(files.values()) <= MOST_FILES, files


def test_a_module_imports_from_its_own_folder_and_from_folders_to_the_left_only():
    pairs = [(module, other) for module in MODULES for other in imported(module)]
    folders = [(folder_of(module), folder_of(other)) for module, other in pairs]
    wrong = [
        pair for pair, (own, of) in zip(pairs, folders, strict=True) if own != of and FLOOR_OF[of] >= FLOOR_OF[own]
    ]
    assert not wrong, f"the rule is {IMPORT_RULE}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: set(imported(module)) for module in TREES}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_a_module_is_short_enough_to_be_read_in_one_sitting():
    lines = {str(path.relative_to(PACKAGE)): path.read_text().count("\n") for path in PACKAGE.rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_the_test_itself_sees_imports_of_every_form():
    assert {"backbones.cifar_resnet", "_common.errors"} <= set(
        imported("backbones.timm")
    )  # import ptee.x.y, from ptee.x.y import
    assert "pipeline.recipe" in set(imported("cli.commands"))  # from ptee.x import y, inside a function


# ---------------------------------------------------------------------------------------------------- who may speak


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield ast.unparse(node.exc).partition("(")[0]


SPEECH = {
    *("print", "exit", "quit", "sys.exit", "os._exit", "SystemExit", "sys.stdout.write", "sys.stderr.write"),
    *("click.echo", "click.Abort"),
}


def test_only_the_command_prints_or_ends_the_program():
    said = {module: SPEECH & set(calls(TREES[module])) for module in MODULES if folder_of(module) != "cli"}
    assert said.pop("deploy.runner")  # which is an entrance of its own
    assert {module: words for module, words in said.items() if words} == {}


def packages(tree: ast.Module) -> set[str]:
    """The packages that a module imports, wherever it does so."""
    plain = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    parts = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in (*plain, *parts)}


def test_whoever_imports_a_library_that_reports_over_the_network_says_no_to_it():
    reporting = {module for module in MODULES if packages(TREES[module]) & {"onnxruntime", "ray"}}
    assert {module for module in reporting if "report_nothing" not in calls(TREES[module])} == set()


THE_METHOD = (
    "analysis",
    "exits",
    "training.losses",
    "tuning.threshold_search",
    "tuning.p_values",
    "evaluation.metrics",
)  # the mathematics


def test_the_method_knows_no_file_and_no_arguments():
    for module in (module for module in MODULES if module.startswith(THE_METHOD) and module != "exits.front"):
        names = {node.id for node in ast.walk(TREES[module]) if isinstance(node, ast.Name)}
        assert not names & {"open", "Path", "os", "argparse", "click", "json"}, module


# ---------------------------------------------------------------------------------------------------- where tensors lie

MAKERS = {
    f"torch.{name}"
    for name in (
        *("tensor", "as_tensor", "zeros", "ones", "full", "empty", "eye", "arange", "linspace"),
        *("rand", "randn", "randint", "randperm", "normal"),
    )
}


def test_a_tensor_is_made_where_the_module_says_and_not_on_the_default_device():
    calls = [(module, node) for module in MODULES for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    made = [(module, node) for module, node in calls if ast.unparse(node.func) in MAKERS]
    left = [(module, ast.unparse(n)) for module, n in made if "device" not in {given.arg for given in n.keywords}]
    assert made
    assert not left, 'say where: device=x.device, x.new_zeros(...), or device="cpu"'


# ---------------------------------------------------------------------------------------------------- what is public


def test_the_public_names_are_those_documented():
    assert set(ptee.__all__) == PUBLIC


def test_a_public_name_resolves_and_says_what_it_is():
    for name in PUBLIC:
        value = getattr(ptee, name)
        assert inspect.getdoc(value), name
        assert value.__name__ == name
        assert value.__module__.startswith("ptee."), name
        assert name in dir(ptee)


@pytest.mark.slow
def test_a_module_for_who_wants_more_is_there_without_an_import_of_its_own():
    code = """
import sys, ptee
homes = {"losses": "training.losses", "thresholds": "tuning.targets", "traces": "tuning.traces"}
assert not any(f"ptee.{home}" in sys.modules for home in homes.values())
assert {name: getattr(ptee, name).__name__ for name in homes} == {name: f"ptee.{home}" for name, home in homes.items()}
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

HEAVY = (
    "torch",
    "timm",
    "torchvision",
    "fvcore",
    "accelerate",
    "sklearn",
    "numpy",
    "huggingface_hub",
    "safetensors",
    "mapie",
)


LIGHT = (
    "ptee",
    "ptee._common.errors",
    "ptee._common.text",
    "ptee.model.run_files",
    "ptee.cli.options",
    "ptee.cli.main",
)
LATE = {"timm", "torchvision", "fvcore", "accelerate", "sklearn", "mapie"}


def test_importing_a_light_module_imports_nothing_heavy():
    source = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module(name)
    print(name, [heavy for heavy in {HEAVY} if heavy in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == [f"{name} []" for name in LIGHT], done.stderr


def at_the_top(module: str) -> set[str]:
    """The libraries that a module imports when it is imported."""
    imports = [node for node in TREES[module].body if isinstance(node, ast.Import)]
    names = [alias.name for node in imports for alias in node.names]
    names += [node.module for node in TREES[module].body if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def test_importing_the_library_leaves_the_libraries_of_models_for_later():
    heavy = {module: at_the_top(module) & LATE for module in TREES}
    for itself_late in ("backbones.cifar_resnet", "backbones.small_networks"):
        assert heavy.pop(itself_late)
    assert {module: names for module, names in heavy.items() if names} == {}


def test_the_main_module_is_three_lines():
    assert len(TREES["__main__"].body) <= 3
