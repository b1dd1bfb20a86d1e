"""The documentation tells the truth: its commands parse, its examples run, its links and names exist, its numbers are kept."""

from __future__ import annotations

import copy
import html
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from cases import slow
from device import seeded
from torch import nn
from torch.utils.data import TensorDataset

import ptee
from ptee.cli.commands import add_commands
from ptee.cli.main import cli, main
from ptee.exits.confidence import CONFIDENCES
from ptee.exits.heads import HEADS
from ptee.pipeline.recipe import DEMO_RECIPE, make_recipe

ROOT = Path(__file__).parents[1]
GUIDE = sorted((ROOT / "recipes" / "guide").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]
FOLDERS = [ROOT / "recipes" / name for name in ("cifar10", "digits", "imagenette", "papers")]
FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```", re.M | re.S)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
add_commands(cli)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    kind: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0]}"


def blocks(page: Path, kind: str) -> list[Block]:
    found = [Block(page, m["kind"].strip(), m["text"]) for m in FENCE.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if block.kind.split(" ")[0] == kind]


def commands(page: Path) -> Iterator[str]:
    """Whole ptee commands of a page: in sh blocks, and indented by four spaces."""
    lines = [line for block in blocks(page, "sh") for line in block.text.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^ {4}(ptee .*)$", page.read_text(encoding="utf-8"), re.M)
    for line in lines:
        yield from (part.strip() for part in re.split(r"&&|>", line) if part.strip().startswith("ptee "))


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)[1:]


EVERY_COMMAND = {command: page for page in PAGES for command in commands(page)}


# ---------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("command", sorted(EVERY_COMMAND))
def test_a_command_has_options_that_exist_and_values_that_can_be(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *arguments = words(command)
    (tmp_path / "exported").mkdir()  # by the command before
    (tmp_path / "exported" / "manifest.json").touch()
    for option, file in pairwise(arguments):
        if option in ("--weights", "--classes"):  # files that must be there
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
    cli.commands[name].make_context(name, arguments)


@each_page
def test_a_command_in_a_sentence_has_options_that_exist(page):
    text = FENCE.sub("", public_text(page))
    for command in re.findall(r"`ptee ([a-z][^`]*)`", text.replace("\n", " ")):
        name, *arguments = command.split()
        known = {option for each in cli.commands[name].params for option in (*each.opts, *each.secondary_opts)}
        assert {word for word in arguments if word.startswith("--")} <= known | {"--help"}, command


@pytest.mark.parametrize("script", sorted((ROOT / "recipes").rglob("*.sh")), ids=lambda script: script.name)
def test_a_script_gives_options_that_exist(script):
    code = re.sub(r"#.*", "", script.read_text(encoding="utf-8"))
    used = [
        each for name in ("augment", "compare", "sweep", "plot", "bench", "tune") for each in cli.commands[name].params
    ]
    known = {option for each in used for option in (*each.opts, *each.secondary_opts)}
    of_ptee = re.sub(r"python recipes/.*", "", code.replace("\\\n", " "))
    assert set(re.findall(r"(?<!\S)--[a-z-]+", of_ptee)) <= known
    for file in re.findall(r"recipes/\S+\.(?:py|yaml)", code):
        assert (ROOT / file).is_file(), file


def is_cheap(command: str) -> bool:
    name, *arguments = words(command)
    return (name == "plan" and "--no-pretrained" in arguments) or (name == "recipe" and "runs/" not in command)


@pytest.mark.parametrize("command", sorted(filter(is_cheap, EVERY_COMMAND)))
def test_a_cheap_command_runs(command, capsys):
    with pytest.raises(SystemExit) as end:
        main(words(command))
    assert end.value.code == 0, capsys.readouterr().err


def shown_answers() -> Iterator[tuple[str, str]]:
    """Commands that a page shows with what they print."""
    for page in PAGES:
        for block in blocks(page, ""):
            for shown in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
                command, _, answer = shown.partition("\n")
                yield command, answer


@pytest.mark.parametrize(("command", "answer"), list(shown_answers()))
def test_a_command_says_what_a_page_shows(command, answer, capsys):
    with pytest.raises(SystemExit):
        main(words(command))
    printed = capsys.readouterr()
    assert " ".join(answer.split()) in " ".join((printed.out + printed.err).split())


def test_the_set_up_of_the_readme_is_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    between = text.partition("<!-- set-up -->")[2].partition("<!-- end -->")[0]
    assert between.split("\n")[1:-1] == [
        "```sh", "pip install . && ptee augment", "pip install -e '.[dev]' && pytest -n auto", "```",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- Python


class Small(nn.Module):
    """A classifier with four blocks, of 32 x 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        sides = [(3, 8), (8, 8), (8, 16), (16, 16)]
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in sides))
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(x).mean((2, 3)))


def data(backbone: nn.Module, n: int, seed: int) -> TensorDataset:
    """Images with the labels that the backbone gives them."""
    generator = seeded(seed)
    pictures = torch.randn(n, 3, 32, 32, generator=generator)
    return TensorDataset(pictures, backbone(pictures).argmax(-1))


def names_of_examples() -> dict[str, object]:
    """What the examples take as given: a backbone, images, and a model with exits on a copy of that backbone."""
    torch.manual_seed(0)
    backbone, images = Small(), torch.randn(8, 3, 32, 32)
    model = ptee.augment(copy.deepcopy(backbone), num_exits=3, head="pool", input_size=(3, 32, 32))
    return {
        "ptee": ptee, "backbone": backbone, "images": images, "model": model, "out": model.predict(images),
        "train_data": data(backbone, 96, 1), "val_data": data(backbone, 60, 2), "calibration_data": data(backbone, 60, 3),
    }  # fmt: skip


@pytest.fixture
def registries():
    """What an example registers is gone afterwards."""
    before = [(registry, dict(registry)) for registry in (HEADS, CONFIDENCES)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    "page",
    [slow(page) if page.stem == "report" else page for page in (ROOT / "README.md", *GUIDE)],
    ids=lambda page: page.stem,
)
def test_the_python_examples_of_a_page_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = names_of_examples()
    for block in blocks(page, "python"):
        code = compile(block.text, block.where, "exec")
        if "not run" not in block.kind:
            exec(code, names)


# ---------------------------------------------------------------------------------------------------- links and names


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_a_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        there = (page.parent / path) if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def public_text(page: Path) -> str:
    """A page without what an earlier version had."""
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        text = text.partition("\n## 0.1.0")[0]
        text = re.sub(r"### Removed\n.*?(?=\n###|\Z)", "", text, flags=re.S)
    return text


@each_page
def test_a_name_of_ptee_exists(page):
    for name in sorted(set(re.findall(r"(?<![\w/.-])ptee\.((?:\w+\.)*[A-Za-z_]\w*)", public_text(page)))):
        assert resolves(name), f"ptee.{name}"


def resolves(name: str) -> bool:
    """Whether ptee.NAME is an attribute or a module."""
    found: object = ptee
    so_far = "ptee"
    for part in name.split("."):
        so_far += f".{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(so_far)
            except ImportError:
                return False
    return True


@each_page
def test_a_script_that_is_named_exists(page):
    for file in re.findall(r"(?:python|sh) ((?:recipes|tests)/\S+?\.(?:py|sh))", page.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), file


# ---------------------------------------------------------------------------------------------------- recipes


@each_folder
def test_a_folder_of_recipes_has_what_its_index_says(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert re.search(r"!\[[^\]]+\]\(\S+\.(png|svg)\)", text)
    assert "results.json" in text
    assert make_recipe(folder / "recipe.yaml").resolved()


def test_the_recipe_of_the_digits_is_that_of_the_demo():
    assert make_recipe(ROOT / "recipes" / "digits" / "recipe.yaml") == make_recipe(DEMO_RECIPE)


def test_the_recipe_of_the_papers_is_the_one_that_is_built_in():
    assert make_recipe(ROOT / "recipes" / "papers" / "recipe.yaml").to_yaml() == make_recipe("pteenet").to_yaml()


@each_folder
def test_results_say_how_they_were_made(folder):
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["commands"] and results["version"] and results["seeds"] >= 1 and results["samples"] > 0
    for line in results["lines"]:
        assert line["name"] and all(0 < entry["cost"] < 1.5 and -1 < entry["lost"] < 1 for entry in line["entries"])


WORDS = re.compile(r"<text[^>]*>([^<]+)</text>")  # in a picture


@pytest.mark.parametrize("folder", [f for f in FOLDERS if (f / "curve.svg").is_file()], ids=lambda folder: folder.name)
def test_a_picture_is_drawn_from_the_results_beside_it(folder, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "scripts"))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    importlib.import_module("draw").draw(results, tmp_path / "curve.svg")
    there, drawn = (set(WORDS.findall((f / "curve.svg").read_text(encoding="utf-8"))) for f in (folder, tmp_path))
    assert there == drawn >= {html.escape(line["name"], quote=False) for line in results["lines"]}


def test_the_table_of_the_papers_has_the_numbers_of_its_results():
    text = (ROOT / "recipes" / "papers" / "README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "recipes" / "papers" / "results.json").read_text(encoding="utf-8"))
    for line in results["lines"]:
        row = next(row for row in text.splitlines() if row.startswith(f"| {line['name']} |"))
        costs = [float(cell.split()[0]) for cell in row.split("|")[2:-1]]
        assert costs == pytest.approx([entry["cost"] for entry in line["entries"]], abs=6e-4)


def test_the_tables_of_eenet8_have_the_numbers_of_its_results():
    text = (ROOT / "recipes" / "papers" / "README.md").read_text(encoding="utf-8")
    for run in json.loads((ROOT / "recipes" / "papers" / "eenet8_mnist.json").read_text(encoding="utf-8"))["runs"]:
        names = (f"| {run['name']} |", f"| `{run['name']}` |", f"| `{run['name']}` (")
        row = next(row for row in text.splitlines() if row.startswith(names) and "%" in row)
        _, left, accuracy, cost, parameters, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        assert left == " ".join(map(str, run["leaving"]))
        assert float(accuracy.rstrip(" %")) == pytest.approx(100 * run["accuracy"], abs=6e-3)
        assert [float(cost), float(parameters)] == pytest.approx([run["operations"], run["parameters"]], abs=6e-4)


def test_yaml_in_the_recipes_is_nothing_but_yaml():
    for file in (ROOT / "recipes").rglob("*.yaml"):
        assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


def test_a_text_that_counts_the_pages_of_the_guide_counts_right():
    texts = " ".join(
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md", "recipes/README.md")
    )
    counted = re.findall(r"(\w+) guide pages|guide of (\w+) pages|\| (\w+) pages on", texts)
    numbers = {"nineteen": 19, "twenty": 20, "twenty-one": 21}
    assert [numbers["".join(found)] for found in counted] == 3 * [len(GUIDE)]
