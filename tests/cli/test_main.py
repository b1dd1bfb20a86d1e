from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from torch.utils.data import Dataset

import ptee
from ptee._common.errors import PteeError
from ptee.analysis.cut_points import random_images
from ptee.backbones.load import load_backbone
from ptee.cli.main import cli, main
from ptee.cli.options import in_options
from ptee.data.sources import open_named
from ptee.data.splits import Data
from ptee.evaluation import results as evaluation
from ptee.pipeline import demo as defaults
from ptee.pipeline import fit as augmenting
from ptee.training import trainer as training

MODEL = ("--model", "cifar_resnet20", "--exits", "layer1,layer2", "--input-size", "3,16,16")
RANDOM = (*MODEL, "--no-pretrained")
BRIEF = ("--epochs", 2, "--batch-size", 8, "--precision", "no")
SHORT = (*BRIEF, "--head", "pool", "--no-speed")  # where neither the recipe's heads nor their speed matter


class Done(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, empty caches, and no way to the network."""
    from huggingface_hub import constants

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "work"


@pytest.fixture
def run(capsys) -> Run:
    """The command, in this process."""

    def run(*words: object) -> Done:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        return Done(end.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> Path:
    """Weights of a network, images of ten classes in one folder, of two in train/ and val/, and an empty folder."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("things")
    save_file(load_backbone("cifar_resnet20", pretrained=False).module.state_dict(), place / "weights.safetensors")
    pictures(place / "ten", [f"class{k}" for k in range(10)], 3)
    for part in ("train", "val"):
        pictures(place / "two" / part, ["cat", "dog"], 6)
    (place / "empty").mkdir()
    return place


def pictures(folder: Path, classes: list[str], count: int) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for n in range(count):
            pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{n}.png")


@pytest.fixture
def known(things) -> tuple[object, ...]:
    """Options for a network with weights, and data whose labels are the network's."""
    return (*MODEL, "--weights", things / "weights.safetensors", "--data", things / "ten")


def assert_refused(done: Done, said: str) -> None:
    assert done.status == 2, done
    assert done.err.endswith("\n")
    assert len(done.err.splitlines()) == 1, done.err
    assert re.search(said, done.err), done.err


# help


@pytest.mark.parametrize("words", [["--help"], ["augment", "--help"], ["--version"]], ids=" ".join)
def test_help_comes_without_the_heavy_libraries(words):
    source = f"""
import sys
from ptee.cli.main import main
try:
    main({words})
finally:
    print([name for name in ("torch", "timm", "numpy", "accelerate", "safetensors") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done


def test_help_names_every_command_in_the_order_of_use(run):
    done = run("--help")
    assert done.status == 0
    assert re.search(r"augment.*plan.*evaluate.*tune.*bench", done.out[done.out.index("Commands") :], re.DOTALL)


OPTIONS = [(name, option) for name, command in cli.commands.items() for option in command.params]


@pytest.mark.parametrize(
    "option",
    [pytest.param(o, id=f"{name} {o.name}") for name, o in OPTIONS if isinstance(o, click.Option)],
)
def test_every_option_has_a_help_text(option):
    assert option.help
    assert option.help.strip().endswith(".")


@pytest.mark.parametrize("command", cli.commands)
def test_every_command_has_a_help_text(command, run):
    done = run(command, "--help")
    assert done.status == 0
    assert done.out.startswith(f"Usage: ptee {command}")


def test_the_version_is_the_packages(run):
    assert run("--version").out.strip().endswith(ptee.__version__)


def test_without_a_command_the_help_is_shown_in_lines(run):
    done = run()
    assert len((done.out + done.err).splitlines()) > 10


# plan


def test_plan_prints_a_line_for_each_exit_and_writes_nothing(run, elsewhere):
    done = run("plan", *RANDOM)
    assert (done.status, done.err) == (0, "")
    assert [line.split()[1] for line in done.out.splitlines()[3:6]] == ["layer1", "layer2", "(backbone)"]
    assert list(elsewhere.iterdir()) == []


def test_plan_as_json_is_all_there_is_on_standard_output(run):
    done = run("plan", *RANDOM, "--head", "conv1", "--json")
    network = load_backbone("cifar_resnet20", pretrained=False, input_size=(3, 16, 16)).module
    want = ptee.plan(network, exits=["layer1", "layer2"], head="conv1", input_size=(3, 16, 16))
    assert json.loads(done.out)["exits"] == json.loads(json.dumps(want.to_dict()))["exits"]


PLACES = {
    "a rule": ("linear", ["--num-exits", 2], 2),
    "fractions": ("0.3,0.6", [], 2),
    "one fraction": ("0.5", [], 1),
    "modules": ("layer1.0,layer2, layer3.0", [], 3),
    "one module": ("layer2", [], 1),
}


@pytest.mark.parametrize(("exits", "more", "count"), PLACES.values(), ids=PLACES)
def test_exits_may_be_a_rule_fractions_or_modules(exits, more, count, run):
    rows = json.loads(run("plan", *RANDOM, "--exits", exits, *more, "--json").out)["exits"]
    assert len(rows) == count
    if exits.startswith("layer"):
        assert [row["name"] for row in rows] == exits.replace(" ", "").split(",")


@pytest.mark.parametrize(("size", "want"), [("32", [3, 32, 32]), ("3,16,24", [3, 16, 24])])
def test_an_input_size_is_one_number_or_three(size, want, run):
    assert json.loads(run("plan", *RANDOM, "--input-size", size, "--json").out)["input_size"] == want


@pytest.mark.parametrize(("value", "channels"), [("in_chans=1", 1), ("in_chans=4", 4)])
def test_arguments_of_the_model_are_read_as_numbers(value, channels, run):
    size = f"{channels},16,16"
    done = run(
        "plan", "--model", "cifar_resnet20", "--no-pretrained", "--model-arg", value, "--input-size", size, "--json"
    )
    assert json.loads(done.out)["input_size"][0] == channels


# what is refused

WORDS = {
    "an unknown command": (["agument"], "agument.*Did you mean 'augment'"),
    "training, which is no command": (["train"], "Choices: .*augment.*evaluate"),
    "an unknown option": (["plan", *RANDOM, "--hed", "pool"], r"--hed.*--head"),
    "an option without its value": (["plan", "--model"], "--model"),
    "a number that is none": (["plan", *RANDOM, "--num-exits", "two"], "--num-exits.*two"),
    "no model": (["plan"], "--model"),
    "an unknown model": (["plan", "--model", "resnet5000", "--no-pretrained"], "resnet5000.*Did you mean"),
    "an unknown placement": (["plan", *RANDOM, "--exits", "paretto"], "paretto.*Did you mean 'pareto'"),
    "neither placement nor module": (
        ["plan", *RANDOM, "--exits", "nonsense"],
        r"among them pareto, fine, golden, linear, quadratic, layer1\.0, layer1\.1, layer1\.2, layer1, ",
    ),
    "an unknown module": (["plan", *RANDOM, "--exits", "layer1,layer9"], "layer9"),
    "no exits": (["plan", *RANDOM, "--exits", ","], "No exit"),
    "a fraction beyond the end": (["plan", *RANDOM, "--exits", "0.5,1.5"], "1.5"),
    "too many exits": (["plan", *RANDOM, "--exits", "linear", "--num-exits", 99], "99"),
    "an unknown head": (["plan", *RANDOM, "--head", "poool"], "poool.*Did you mean 'pool'"),
    "heads for another number of exits": (["plan", *RANDOM, "--head", "pool,pool,pool"], "3 values of head"),
    "a budget for heads that have none": (
        ["plan", *RANDOM, "--head", "pool", "--head-budget", "0.1"],
        "heads are pool",
    ),
    "a budget of nothing": (["plan", *RANDOM, "--head", "auto", "--head-budget", "0"], "budget 0"),
    "an unknown front network": (["plan", *RANDOM, "--front", "cifar_resnet200"], "cifar_resnet20"),
    "weights of no front network": (["plan", *RANDOM, "--front-weights", "x.safetensors"], "--front-weights"),
    "the input behind another exit": (["plan", *RANDOM, "--exits", "layer1,input"], "first of all"),
    "a size of two numbers": (["plan", *RANDOM, "--input-size", "16,16"], "16,16.*3,224,224"),
    "a size of words": (["plan", *RANDOM, "--input-size", "big"], "big"),
    "an argument without a value": (["plan", *RANDOM, "--model-arg", "pad_type"], "KEY=VALUE"),
    "an argument that the model has not": (
        ["plan", *RANDOM, "--model-arg", "nonsense=1"],
        r"nonsense=1.*Change --model-arg or --input-size\.",
    ),
    "a model without classifier": (
        ["plan", "--model", "vit_small_patch16_dinov3", "--no-pretrained"],
        "Give it one: --num-classes K and --weights FILE",
    ),
    "a size that the model does not take": (
        ["plan", "--model", "test_vit", "--no-pretrained", "--model-arg", "img_size=100"],
        "100.*--input-size",
    ),
    "an unknown device": (["bench", *RANDOM, "--device", "tpu"], "tpu.*cpu"),
    "batches of nothing": (["bench", *RANDOM, "--batch-sizes", "0"], "positive"),
    "batches of words": (["bench", *RANDOM, "--batch-sizes", "1,many"], "1,many.* such as 1,32"),
    "an evaluation of nothing": (["evaluate"], "RUN"),
    "an evaluation of no run": (["evaluate", "EMPTY"], "config.json"),
    "an evaluation of a folder that is not there": (["evaluate", "nowhere"], "nowhere"),
    "an evaluation of a repository, offline": (["evaluate", "runs/nowhere"], "runs/nowhere"),
    "tuning without a wish": (
        ["tune", "nowhere"],
        "No wish is given: give one of --max-drop, --max-fidelity-drop, --max-cost",
    ),
    "two wishes": (["tune", "nowhere", "--max-drop", "0.1", "--max-cost", "0.5"], "max_drop and max_cost are both"),
    "a drop above 1": (["augment", "--max-drop", "2"], "max_drop is 2: give a fraction"),
    "T and a wish for T": (["augment", "--threshold", "0.5", "--max-drop", "0.1"], "one or the other"),
    "one threshold without a wish": (
        ["augment", "--recipe", "eenet", "--one-threshold"],
        "--one-threshold needs one of --max-drop",
    ),
    "a margin without a wish": (
        ["augment", "--recipe", "eenet", "--margin", "0.1"],
        "--margin needs one of --max-drop",
    ),
    "a margin that is none": (["augment", "--margin", "much"], "'much' is neither a number nor 'auto'"),
    "a margin above the drop": (
        ["augment", "--max-drop", "0.1", "--margin", "0.2"],
        "A drop of accuracy of at most 0.1 leaves nothing after a margin of 0.2",
    ),
    "tuning no folder": (["tune", "user/run", "--max-drop", "0.1"], "no folder user/run"),
    "a comparison of nothing": (["compare"], "RUN"),
    "a line that is none": (
        ["compare", "EMPTY", "--lines", "learned,max"],
        "Unknown line 'max'. Did you mean 'max_prob'",
    ),
    "a run beside itself": (["compare", "EMPTY", "EMPTY"], "empty is given twice"),
    "a comparison of no run": (["compare", "EMPTY"], "config.json"),
    "drops of one word": (["compare", "EMPTY", "--drops", "x"], "'x' is no list.* such as 0,0.01"),
    "a drop that is no fraction": (["compare", "EMPTY", "--drops", "0.01,2"], "A drop of 2 cannot be: give fractions"),
    "drops of words": (["compare", "EMPTY", "--drops", "low"], "low"),
    "a comparison with an unknown network": (
        ["compare", "EMPTY", "--static", "resnet81=x"],
        "'resnet81'.*Did you mean",
    ),
    "a comparison with no weights": (
        ["compare", "EMPTY", "--static", "cifar_resnet20"],
        "--static cifar_resnet20=FILE",
    ),
    "a resumption of nothing": (["augment", "--resume"], "runs/digits.*--resume"),
    "data without a model": (["augment", "--data", "TEN"], "--data needs --model"),
    "weights without a model": (["augment", "--weights", "WEIGHTS"], "--weights needs --model"),
}


@pytest.mark.parametrize(("words", "said"), WORDS.values(), ids=WORDS)
def test_refused_in_one_line_with_status_two(words, said, run, things, elsewhere):
    places = {"EMPTY": things / "empty", "TEN": things / "ten", "WEIGHTS": things / "weights.safetensors"}
    done = run(*(places.get(word, word) for word in words))
    assert_refused(done, said)
    assert done.out == ""
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("in_python", "typed"),
    [
        ("Give weights=FILE, or pretrained=False.", "Give --weights FILE, or --no-pretrained."),
        ("Try num_classes=10, or input_size=(c, h, w).", "Try --num-classes 10, or --input-size c,h,w."),
        ("Check model= and model_args=.", "Check --model and --model-arg."),
        ("Lower it (lr=0.0001), cache=False.", "Lower it (--lr 0.0001), --no-cache."),
        ("There is no runs/weights=3.pth, give backbone=.", "There is no runs/weights=3.pth, give backbone=."),
        ("cannot be built with img_size=100.", "cannot be built with img_size=100."),
        ("From Python: ptee.load(folder, front=...).", "From Python: ptee.load(folder, front=...)."),
        ("Give front_weights=FILE.", "Give --front-weights FILE."),
    ],
)
def test_a_message_about_pythons_arguments_speaks_of_options_on_the_command_line(in_python, typed):
    assert in_options(in_python, cli.commands.values()) == typed


AUGMENT = {
    "no data for a network of other classes": (RANDOM, "--data FOLDER"),
    "no network at all, and Imagenette out of reach": (["--model", "resnet18", "--no-pretrained"], "Imagenette.*--data"),
    "weights that cannot be had": (["--model", "resnet18", "--data", "TEN"], "resnet18.*(--weights|--no-pretrained)"),
    "weights that are not there": ([*MODEL, "--data", "TEN", "--weights", "none.pth"], "none.pth"),
    "a folder without images": ([*RANDOM, "--data", "EMPTY"], "empty"),
    "a folder that is not there": ([*RANDOM, "--data", "nowhere"], "no folder 'nowhere', and no data set.*digits, "),
    "a data set that lies elsewhere": ([*RANDOM, "--data", "CIFAR10"], "CIFAR10.*--data-root"),
    "labels that cannot be mapped": ([*RANDOM, "--data", "TWO", "--targets", "labels"], "cat, dog.*--targets pseudo"),
    "a recipe for labels that cannot be mapped": ([*RANDOM, "--data", "TWO", "--recipe", "ztw"], "cat, dog.*--targets pseudo"),
    "unknown targets": ([*RANDOM, "--data", "TEN", "--targets", "pseudos"], "pseudos.*Did you mean 'pseudo'"),
    "an unknown loss": ([*RANDOM, "--data", "TEN", "--loss", "v3"], "v3.*Did you mean"),
    "an unknown precision": ([*RANDOM, "--data", "TEN", "--precision", "bf61"], "bf61.*Did you mean"),
    "an unknown device": ([*RANDOM, "--data", "TEN", "--device", "cuda:99"], "cuda:99.*cpu"),
    "an unknown gate": ([*RANDOM, "--data", "TEN", "--gate", "agree"], "agree.*Did you mean 'agrees'.*none"),
    "a gate that needs labels": ([*RANDOM, "--data", "TWO", "--gate", "best"], "cat, dog.*--gate agrees"),
    "images for gates that there are not": ([*RANDOM, "--recipe", "eenet", "--data", "TEN", "--gate-share", 0.1], "--gate-share needs --gate"),
    "too few images for gates": ([*RANDOM, "--data", "TEN", "--gate", "agrees"], "0.1 of 24 .* are 2.*--gate-share"),
    "a share of all images": ([*RANDOM, "--data", "TEN", "--gate", "agrees", "--gate-share", 1], "--gate-share"),
    "no epochs": ([*RANDOM, "--data", "TEN", "--epochs", 0], "--epochs"),
    "a learning rate of nothing": ([*RANDOM, "--data", "TEN", "--lr", 0], "lr 0.0 must be positive, such as 0.001"),
    "thresholds for other exits": ([*RANDOM, "--data", "TEN", "--threshold", "0.5,0.5,0.5"], "3 thresholds for 2"),
    "a threshold of NaN": ([*RANDOM, "--data", "TEN", "--threshold", "0.5,nan"], "NaN"),
    "a threshold of words": ([*RANDOM, "--data", "TEN", "--threshold", "high"], "high"),
    "a negative weight decay": ([*RANDOM, "--data", "TEN", "--weight-decay", -1], "weight"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), AUGMENT.values(), ids=AUGMENT)
def test_augment_refuses_in_one_line_and_writes_nothing(words, said, run, things, elsewhere):
    places = {"EMPTY": things / "empty", "TEN": things / "ten", "TWO": things / "two"}
    assert_refused(run("augment", *(places.get(word, word) for word in words), "--out", "out"), said)
    assert list(elsewhere.iterdir()) == []


def test_an_error_of_ours_is_one_line_with_status_one_and_a_way_to_see_more(run, monkeypatch):
    def fail(**_: object) -> None:
        raise LookupError("deep\ninside")

    monkeypatch.setattr(cli.commands["plan"], "callback", fail)
    done = run("plan")
    assert done.status == 1
    assert done.err == "ptee failed: LookupError: deep inside. PTEE_DEBUG=1 shows where; please report it.\n"
    monkeypatch.setenv("PTEE_DEBUG", "1")
    assert "Traceback" in run("plan").err


def test_a_refusal_of_several_lines_is_printed_in_one(run, monkeypatch):
    def fail(**_: object) -> None:
        raise PteeError("one\n  two")

    monkeypatch.setattr(cli.commands["plan"], "callback", fail)
    assert run("plan") == Done(2, "", "one two\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt, click.Abort], ids=lambda e: e.__name__)
def test_ctrl_c_ends_with_status_130(error, run, monkeypatch):
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli.commands["plan"], "callback", fail)
    done = run("plan")
    assert (done.status, done.out, done.err.strip()) == (130, "", "Interrupted.")


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "ptee", "plan", *map(str, RANDOM)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) in (0, 1)  # click's own, and no traceback


# augment, then evaluate


def test_augment_leaves_a_run_that_says_what_was_measured(run, known, things):
    done = run("augment", *known, *BRIEF, "--threshold", "0.9,0.8", "--out", "out")
    assert done.status == 0, done
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "README.md",
        "config.json",
        "heads.safetensors",
        "metrics.json",
    ]
    config, metrics = (json.loads(Path("out", name).read_text()) for name in ("config.json", "metrics.json"))
    assert config["threshold"] == [0.9, 0.8]
    assert config["results"] == metrics["results"]
    assert [row["name"] for row in metrics["results"]["rows"]] == ["backbone", "exit 0", "exit 1", "early exit"]
    assert all(row["speedup"] > 0 for row in metrics["results"]["rows"])
    assert all(exit_["head"].startswith("res-") for exit_ in config["exits"])
    assert len(metrics["training"]["epochs"]) == 2
    for line in ("epoch 1/2", "epoch 2/2", "early exit, T = 0.9, 0.8", "Saved in out", "10 classes"):
        assert line in done.out


@pytest.mark.parametrize("off", [[], [0], [0, 1]], ids=str)
def test_another_threshold_is_suggested_where_an_exit_is_on(off, run, known, monkeypatch):
    measured = augmenting.measured

    def switched_off(model: ptee.EarlyExitModel, *more: Any) -> Any:
        model.off = off
        return measured(model, *more)

    monkeypatch.setattr(augmenting, "measured", switched_off)
    done = run("augment", *known, *SHORT, "--out", "out")
    assert done.status == 0, done
    assert ("Another threshold" in done.out) == (len(off) < 2)


def test_a_front_network_of_random_weights_is_told_of(run, known):
    done = run("augment", *known, *SHORT, "--no-pretrained", "--front", "cifar_resnet20", "--out", "out")
    assert done.status == 0
    assert "The front network's weights are random" in done.out
    assert "--front-weights FILE" in done.out
    assert "ptee evaluate" not in done.out


def test_the_saved_model_is_the_one_that_was_trained(finished, things):
    model = ptee.load(finished)
    backbone = load_backbone("cifar_resnet20", weights=things / "weights.safetensors").module
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.predict(x, 2).logits, backbone(x))
    assert model.results["samples"] == 3


def test_one_seed_gives_one_run_and_another_seed_another(run, known):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        run("augment", *known, *SHORT, "--seed", seed, "--out", name)
    one, same, other = (load_file(Path(name, "heads.safetensors")) for name in ("one", "same", "other"))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


def test_labels_that_cannot_be_mapped_make_way_for_the_backbones_answers(run, things):
    weights = ("--weights", things / "weights.safetensors")
    done = run("augment", *MODEL, *weights, "--data", things / "two", *SHORT, "--loss", "v1", "--out", "out")
    assert done.status == 0
    assert re.search("cat, dog.*cannot be mapped.*pseudo", done.out)
    rows = json.loads(Path("out", "metrics.json").read_text())["results"]["rows"]
    assert {row["accuracy"] for row in rows} == {None}


def test_a_collapse_is_told_on_standard_error(run, known):
    done = run("augment", *known, *SHORT, "--loss", "cost", "--lr", 0.5, "--out", "out")
    assert done.status == 0
    assert "Warning: Training collapsed" in done.err


@pytest.fixture(scope="module")
def original(things, tmp_path_factory) -> Path:
    """A run whose validation images were drawn with a seed of its own, to be left as it is."""
    out = tmp_path_factory.mktemp("runs") / "out"
    source = ("--weights", things / "weights.safetensors", "--data", things / "ten")
    augmented(*MODEL, *source, *SHORT, "--max-fidelity-drop", 0.99, "--margin", 0, "--seed", 3, "--out", out)
    return out


def augmented(*words: object) -> None:
    """A run that several tests use."""
    with pytest.raises(SystemExit) as end, redirect_stdout(StringIO()):
        main([str(word) for word in ("augment", *words)])
    assert end.value.code == 0


@pytest.fixture
def finished(original) -> Path:
    """That run, to be changed at will."""
    return Path(shutil.copytree(original, "out"))


def evaluated(run: Run, *words: object) -> dict:
    """What it finds, but for the speed."""
    return json.loads(run("evaluate", *words, "--json", "--no-speed").out)


def figures(results: dict) -> list[tuple]:
    return [(row["name"], row["accuracy"], row["fidelity"], row["cost"]) for row in results["rows"]]


def test_evaluate_repeats_what_augment_measured_on_the_same_images(run, finished):
    done = run("evaluate", finished, "--json", "--no-speed")
    assert done.status == 0
    assert "drawn with seed 3" in done.err
    recorded = json.loads((finished / "metrics.json").read_text())["results"]
    again = json.loads(done.out)
    assert figures(again) == figures(recorded)
    assert again["about"] == recorded["about"]


@pytest.mark.parametrize(("threshold", "used"), [("0.7", [0.7, 0.7]), ("0,2", [0, 2]), ("2", [2, 2])])
def test_evaluate_takes_any_threshold_and_leaves_the_run_alone(threshold, used, run, finished):
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    results = evaluated(run, finished, "--threshold", threshold)
    assert results["threshold"] == used
    if used[0] != 0.7:
        assert results["leaving"] == ([1, 0, 0] if used[0] == 0 else [0, 0, 1])
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


NOTES = [
    ("2", "T above 1: nobody leaves."),
    ("70", "T above 1: nobody leaves. A confidence lies between 0 and 1: did you mean 0.7?"),
    ("70,85", "T above 1: nobody leaves. A confidence lies between 0 and 1: did you mean 0.7,0.85?"),
    ("-1", "T at or below 0: everybody leaves at exit 0."),
    ("0.5", ""),
]


@pytest.mark.parametrize(("threshold", "said"), NOTES)
def test_a_threshold_that_no_confidence_decides_is_remarked_on(threshold, said, run, finished):
    done = run("evaluate", finished, f"--threshold={threshold}", "--no-speed")
    assert (done.status, done.err.strip()) == (0, said)


def test_a_run_whose_images_all_leave_at_once_is_called_a_shorter_network(run, finished):
    done = run("evaluate", finished, "--threshold", 0, "--no-speed")
    assert "100% of the images leave at exit 0 (layer1): this is a shorter network" in done.out


def test_augment_remarks_on_such_a_threshold_before_it_trains(run, monkeypatch):
    monkeypatch.setattr("ptee.pipeline.fit._digits", None)
    assert run("augment", "--threshold", 70).err.startswith("T above 1: nobody leaves. A")


def test_speed_need_not_be_measured(run, known, monkeypatch):
    monkeypatch.setattr(evaluation, "in_turns", None)
    assert run("augment", *known, *BRIEF, "--no-speed", "--out", "out").status == 0
    assert [row["speedup"] for row in evaluated(run, "out")["rows"]] == [None] * 4


def test_a_run_of_random_weights_is_said_to_be_lost_to_the_command_before_training(run, things, monkeypatch):
    done = run("augment", *RANDOM, "--data", things / "ten", *SHORT, "--out", "out")
    assert done.status == 0
    assert re.search(r"weights are random.*cannot load.*--weights FILE.*epoch 1/2", done.out, re.DOTALL)
    assert "ptee evaluate" not in done.out
    assert_refused(run("evaluate", "out"), "random")


def test_evaluate_prints_a_table_for_people(run, finished):
    done = run("evaluate", finished, "--threshold", "0.25")
    assert done.status == 0
    assert re.search("backbone.*exit 0.*exit 1.*early exit, T = 0.25", done.out, re.DOTALL)


def test_evaluate_takes_other_data(run, finished, things):
    results = evaluated(run, finished, "--data", things / "ten")
    assert results["samples"] == 3


def test_evaluate_as_json_is_json_even_where_labels_cannot_be_mapped(run, finished, things):
    results = evaluated(run, finished, "--data", things / "two")
    assert results["samples"] == 12


def test_evaluate_finds_the_data_from_another_folder(run, known, things, monkeypatch, elsewhere):
    monkeypatch.chdir(things)
    assert run("augment", *known[:-1], "ten", *SHORT, "--out", elsewhere / "out").status == 0
    monkeypatch.chdir(elsewhere)
    assert run("evaluate", "out", "--no-speed").status == 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([1], []),
        ({"source": 1}, []),
        ({"source": "ten", "split": [1]}, ["--data", "TEN"]),
        ({"root": 1}, ["--data", "TEN"]),
    ],
    ids=str,
)
def test_what_a_run_says_of_its_data_is_not_trusted(data, words, run, finished, things):
    config = json.loads((finished / "config.json").read_text())
    config["results"] |= {"data": data, "tuning": data}
    (finished / "config.json").write_text(json.dumps(config))
    done = run("evaluate", finished, *(things / "ten" if word == "TEN" else word for word in words), "--no-speed")
    assert done.status in (0, 2), done.err


def test_weights_that_were_moved_are_asked_for_in_the_commands_words_and_named_to_it(run, things, tmp_path):
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    shutil.copy(things / "weights.safetensors", old)
    data = ("--data", things / "ten")
    assert run("augment", *MODEL, "--weights", old, *data, *SHORT, "--out", "out").status == 0
    old.rename(new)
    assert_refused(run("evaluate", "out"), r"old\.safetensors.*--weights FILE")
    assert run("evaluate", "out", "--weights", new, "--no-speed").status == 0


@pytest.fixture(scope="module")
def drawn(things, tmp_path_factory) -> tuple[Path, Path]:
    """Images of which some were drawn for a run's validation, and that run."""
    place = tmp_path_factory.mktemp("drawn")
    images = Path(shutil.copytree(things / "ten", place / "images"))
    augmented(*MODEL, "--weights", things / "weights.safetensors", "--data", images, *SHORT, "--out", place / "out")
    return images, place / "out"


@pytest.fixture
def changed(drawn, things) -> Path:
    """Those images, to which one was added afterwards; the run is in out."""
    images, original = drawn
    shutil.rmtree(images, ignore_errors=True)
    shutil.copytree(things / "ten", images)
    shutil.copytree(original, "out")
    shutil.copy(images / "class0" / "0.png", images / "class0" / "new.png")
    return images


def test_with_an_image_more_the_unseen_ones_cannot_be_drawn_again_and_others_are_asked_for(run, changed):
    for words in ((), ("--data", changed)):
        assert_refused(run("evaluate", "out", *words), r"images.*Put .* back.*--data FOLDER")


def test_with_the_image_gone_again_the_same_ones_are_measured(run, changed):
    (changed / "class0" / "new.png").unlink()
    recorded = json.loads(Path("out", "metrics.json").read_text())["results"]
    again = evaluated(run, "out")
    assert figures(again) == figures(recorded)


def test_other_images_are_measured_all(run, changed, things):
    pictures(Path("others"), [f"class{k}" for k in range(10)], 2)
    assert evaluated(run, "out", "--data", "others")["samples"] == 20


def test_the_same_images_in_another_place_are_measured_on_the_unseen_ones_alone(run, changed):
    (changed / "class0" / "new.png").unlink()
    changed.rename("moved")
    recorded = json.loads(Path("out", "metrics.json").read_text())["results"]
    assert figures(evaluated(run, "out", "--data", "moved")) == figures(recorded)


# thresholds that are chosen


def test_tune_keeps_thresholds_in_the_run_and_measures_on_other_images(run, finished):
    before = load_file(finished / "heads.safetensors")
    done = run("tune", finished, "--max-fidelity-drop", 0.5, "--no-speed")
    assert done.status == 0
    assert "Thresholds are chosen on the 3 calibration images and reported on the 3 validation images." in done.out
    assert "Asked for a drop of fidelity of at most 0.5; on images" in done.out
    config, metrics = (json.loads((finished / name).read_text()) for name in ("config.json", "metrics.json"))
    assert config["results"] == metrics["results"]
    assert config["threshold"] == config["results"]["threshold"] == config["results"]["tuning"]["threshold"]
    assert config["results"]["data"]["split"]["seed"] == 3
    assert metrics["training"]
    after = load_file(finished / "heads.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    again = evaluated(run, finished)
    assert figures(again) == figures(config["results"])


def test_tune_can_speak_json(run, finished):
    done = run("tune", finished, "--max-cost", 0.9, "--one-threshold", "--json", "--no-speed")
    assert done.status == 0
    assert json.loads(done.out)["tuning"]["wish"] == {"kind": "max_cost", "limit": 0.9}


def test_a_cost_that_cannot_be_reached_leaves_the_run_as_it_was(run, finished):
    before = (finished / "config.json").read_bytes()
    assert_refused_after(
        run("tune", finished, "--max-cost", 0.01), r"A mean cost of at most 0.01 cannot be reached.*or more"
    )
    assert (finished / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (["--max-cost", 0.01], "A mean cost of at most 0.01 cannot be reached.*or more"),
        (
            ["--max-cost", 0.9, "--margin", 0.89],
            "A mean cost of at most 0.9 less a margin of 0.89 cannot be reached.*or more",
        ),
    ],
)
def test_augment_refuses_such_a_cost_before_it_trains(run, known, wish, said):
    done = run("augment", *known, *SHORT, *wish)
    assert_refused_after(done, said)
    assert "epoch" not in done.out


def test_augment_refuses_a_drop_of_accuracy_without_labels_before_it_trains(run, things):
    known = (*MODEL, "--weights", things / "weights.safetensors", "--data", things / "two", "--targets", "pseudo")
    done = run("augment", *known, *SHORT, "--max-drop", 0.1)
    assert_refused_after(done, "no labels.*give --max-fidelity-drop or --max-cost")
    assert "epoch" not in done.out


def assert_refused_after(done: Done, said: str) -> None:
    assert (done.status, len(done.err.splitlines())) == (2, 1), done
    assert re.search(said, done.err)


def test_validation_images_that_were_delivered_are_halved_and_only_the_rest_is_reported_on(run, things):
    known = (*MODEL, "--weights", things / "weights.safetensors", "--data", things / "two", "--targets", "pseudo")
    done = run("augment", *known, *SHORT, "--max-fidelity-drop", 0.1, "--seed", 5, "--out", "out")
    assert done.status == 0, done
    words = "Thresholds are chosen on 6 of the 12 validation images, drawn with seed 5, and reported on the other 6."
    assert words in done.out
    recorded = json.loads(Path("out", "config.json").read_text())["results"]
    assert recorded["tuning"]["images"] == words
    assert recorded["samples"] == 6
    again = evaluated(run, "out")
    assert figures(again) == figures(recorded)
    assert words in again["about"]
    other = evaluated(run, "out", "--threshold", 0.7)
    assert (other["samples"], words in other["about"]) == (6, False)
    drawn = "6 of the 12 validation images, drawn with seed 5, and those given are measured on the other 6."
    assert f"The run's own thresholds were chosen on {drawn}" in other["about"]


def test_other_data_are_halved_too(run, finished, things):
    done = run("tune", finished, "--max-cost", 0.9, "--data", things / "two", "--no-speed")
    assert "chosen on 6 of the 12 validation images, drawn with seed 3" in done.out
    assert evaluated(run, finished, "--data", things / "two")["samples"] == 6
    own = evaluated(run, finished)
    assert own["samples"] == 3
    said = f"The run's thresholds were chosen on images of '{things / 'two'}'; whether some of them are among these is not known."
    assert said in own["about"]
    assert said not in evaluated(run, finished, "--threshold", 0.7)["about"]


@pytest.fixture
def tuned_on_two(run, finished, things) -> Path:
    """A run whose thresholds were chosen on half of the images of the folder `two`, which is a copy."""
    shutil.copytree(things / "two", "two")
    assert run("tune", finished, "--max-cost", 0.9, "--data", "two", "--no-speed").status == 0
    return finished


def test_images_that_thresholds_were_chosen_on_are_known_again_in_another_folder(run, tuned_on_two):
    shutil.copytree("two", "moved")
    here, there = (evaluated(run, tuned_on_two, "--data", place) for place in ("two", "moved"))
    assert there["samples"] == 6
    assert figures(there) == figures(here)
    said = f"The files are called as those of '{Path('two').resolve()}', on which the thresholds were chosen"
    assert [said in each["about"] for each in (here, there)] == [False, True]


def test_where_files_were_added_those_that_thresholds_were_chosen_on_cannot_be_told(run, tuned_on_two):
    some = next(Path("two", "val").rglob("*.png"))
    shutil.copy(some, some.with_name("another.png"))
    said = "two has other files than when the thresholds were chosen.*ptee tune"
    assert_refused_after(run("evaluate", tuned_on_two, "--data", "two", "--no-speed"), said)
    assert evaluated(run, tuned_on_two, "--data", "two", "--threshold", 0.7)["samples"] == 13


def test_a_run_of_before_the_files_were_recorded_knows_its_own_images_again(run, things):
    shutil.copytree(things / "two", "two")
    known = (*MODEL, "--weights", things / "weights.safetensors", "--data", "two", "--targets", "pseudo")
    assert run("augment", *known, *SHORT, "--max-fidelity-drop", 0.1, "--out", "out").status == 0
    config = json.loads(Path("out", "config.json").read_text())
    del config["results"]["tuning"]["files_sha256"]
    Path("out", "config.json").write_text(json.dumps(config))
    Path("two").rename("moved")
    assert evaluated(run, "out", "--data", "moved")["samples"] == 6


@pytest.mark.parametrize("text", ["garbage", "[]", "null"])
def test_a_run_that_is_damaged_is_not_tuned_by_half(text, run, finished):
    (finished / "metrics.json").write_text(text)
    before = (finished / "config.json").read_bytes()
    assert_refused_after(
        run("tune", finished, "--max-cost", 0.9, "--no-speed"), "metrics.json is no .*Copy the run anew"
    )
    assert (finished / "config.json").read_bytes() == before


def test_of_calibration_images_that_were_delivered_it_is_said_that_the_runs_own_thresholds_were_chosen_on_them(
    run, finished
):
    assert run("tune", finished, "--max-cost", 0.9, "--no-speed").status == 0
    said = "The run's own thresholds were chosen on the 3 calibration images and those given are measured on the 3 validation images."
    assert said in evaluated(run, finished, "--threshold", 0.7)["about"]


# runs side by side


def test_compare_puts_runs_and_a_smaller_network_side_by_side(run, finished, things):
    shutil.copytree(finished, "twin")
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    static = ("--static", f"cifar_resnet20={things / 'weights.safetensors'}")
    done = run("compare", finished, "twin", *static, "--drops", "0,0.5", "--json")
    assert done.status == 0, done
    assert "Thresholds are chosen on the 3 calibration images and reported on the 3 validation images." in done.err
    found = json.loads(done.out)
    lines = {each["name"]: each["entries"] for each in found["lines"]}
    assert lines["out"] == lines["twin"]
    assert [each["allowed"] for each in lines["out"]] == [0, 0.5]
    assert len(lines["cifar_resnet20"]) == 1
    assert len(found["verdict"]) == 2
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_compare_prints_a_table_for_people(run, finished, things):
    done = run("compare", finished, "--drops", "0.1", "--data", things / "two")
    assert (done.status, done.err) == (0, "")
    assert "chosen on 6 of the 12 validation images, drawn with seed 3" in done.out
    for words in ("cannot be mapped", "<= 0.1 lost", "out, oracle", "drop of fidelity", "At most 0.1 lost: "):
        assert words in done.out


def test_a_comparison_is_drawn_on_a_page_where_one_is_asked_for(run, finished):
    done = run("compare", finished, "--drops", "0.1", "--html", "curve.html")
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("Drawn in curve.html\n")
    assert "At most 0.1 lost: " in Path("curve.html").read_text()
    assert run("compare", finished, "--html", "curve.png").status == 2


def test_a_run_of_heads_that_build_on_one_another_is_compared_by_the_lines_that_are_asked_for(run, known):
    assert (
        run(
            "augment", *known, *BRIEF, "--recipe", "ztw", "--targets", "pseudo", "--no-speed", "--out", "runs/ztw"
        ).status
        == 0
    )
    heads = [each["head"] for each in json.loads(Path("runs/ztw/config.json").read_text())["exits"]]
    assert heads == ["conv2", "conv2+"]
    done = run("compare", "runs/ztw", "--lines", "entropy, learned", "--json")
    assert [each["name"] for each in json.loads(done.out)["lines"]] == ["ztw", "ztw, entropy (BranchyNet)"]


def test_runs_of_another_backbone_are_not_compared(run, finished, things):
    torch.manual_seed(1)
    save_file(load_backbone("cifar_resnet20", pretrained=False).module.state_dict(), "other.safetensors")
    other = (*MODEL, "--weights", "other.safetensors", "--data", things / "ten", *SHORT)
    assert run("augment", *other, "--seed", 3, "--out", "other").status == 0
    assert_refused(run("compare", finished, "other"), "other stands on another backbone")


def test_runs_that_drew_their_images_with_other_seeds_are_not_compared(run, finished, known, things):
    assert run("augment", *known, *SHORT, "--seed", 4, "--out", "other").status == 0
    assert_refused(run("compare", finished, "other"), r"different seeds \(3, 4\).*--data FOLDER")
    assert run("compare", finished, "other", "--data", things / "two").status == 0


def test_evaluate_as_json_is_json_by_the_letter(run, finished):
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    results = json.loads(
        run("evaluate", finished, "--threshold", "inf", "--json", "--no-speed").out, parse_constant=refuse
    )
    assert results["leaving"] == [0, 0, 1]


def test_evaluate_asks_for_data_where_none_were_recorded(run, finished):
    config = json.loads((finished / "config.json").read_text())
    config["results"] = None
    (finished / "config.json").write_text(json.dumps(config))
    assert_refused(run("evaluate", finished), "--data FOLDER")


# --out


def test_a_file_is_no_folder_for_a_run(run, known):
    Path("out").write_text("mine")
    assert_refused(run("augment", *known, *SHORT, "--out", "out"), "out is a file")
    assert Path("out").read_text() == "mine"


def test_a_folder_below_a_file_cannot_be(run, known):
    Path("file").write_text("mine")
    assert_refused(run("augment", *known, *SHORT, "--out", "file/run"), "file/run.*file is a file")


def test_a_place_that_cannot_be_written_is_refused_before_training(run, known, monkeypatch):
    def fail(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr("ptee._common.files.tempfile.TemporaryDirectory", fail)
    assert_refused(run("augment", *known, *SHORT, "--out", "out"), "Cannot write out: Permission denied")


@pytest.mark.parametrize("name", ["notes.txt", "metrics.json", "config.json"])
def test_a_folder_with_something_else_in_it_is_left_alone(name, run, known):
    Path("out").mkdir()
    Path("out", name).write_text('{"model_type": "bert"}')
    done = run("augment", *known, *SHORT, "--out", "out")
    assert [p.name for p in Path("out").iterdir()] == [name]
    assert Path("out", name).read_text() == '{"model_type": "bert"}'
    assert_refused(done, "out.*--out")


@pytest.mark.parametrize("folder", ["out", "deep/er/out"])
def test_an_empty_or_new_folder_is_used(folder, run, known):
    Path("out").mkdir()
    assert run("augment", *known, *SHORT, "--out", folder).status == 0
    assert Path(folder, "config.json").is_file()


def test_an_earlier_run_is_left_alone(run, known, finished):
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    assert_refused(run("augment", *known, *SHORT, "--out", finished), "out holds a run.*--overwrite")
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


MISTAKES = {
    "an unknown loss": ["--loss", "v3"],
    "a negative learning rate": ["--lr", "-1"],
    "an unknown precision": ["--precision", "fp17"],
    "unknown targets": ["--targets", "foo"],
    "a weight decay of NaN": ["--weight-decay", "nan"],
    "a price of NaN": ["--loss", "v1", "--cost-weight", "nan"],
    "an unknown head": ["--head", "poool"],
    "an unknown recipe": ["--recipe", "ptee-net"],
}


@pytest.mark.parametrize("words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_costs_no_earlier_run(words, run, known, finished):
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    assert_refused(run("augment", *known, *SHORT, *words, "--out", finished, "--overwrite"), words[-1])
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_a_damaged_image_costs_no_earlier_run(run, known, things, finished):
    images = Path(shutil.copytree(things / "ten", "images"))
    for image in images.glob("*/0.png"):
        image.write_text("damaged")
    before = {file.name: file.read_bytes() for file in finished.iterdir()}
    assert_refused(
        run("augment", *known, "--data", images, *SHORT, "--out", finished, "--overwrite"),
        "10 of 30 pictures cannot be read",
    )
    assert {file.name: file.read_bytes() for file in finished.iterdir()} == before


def test_settings_are_checked_before_any_model_is_built(run, known, monkeypatch):
    monkeypatch.setattr("ptee.backbones.load.load_backbone", None)
    assert_refused(run("augment", *known, "--loss", "v3"), "v3")


def test_once_an_epoch_is_complete_nothing_of_an_earlier_run_is_left(run, known, finished, interrupt):
    interrupt(2)
    assert run("augment", *known, *SHORT, "--out", finished, "--overwrite").status == 130
    assert {p.name for p in finished.iterdir()} == {"README.md", "checkpoint.safetensors"}


@pytest.mark.parametrize(
    ("name", "option"),
    [("config.json", "--overwrite"), ("checkpoint.safetensors", "--resume")],
    ids=["run", "training"],
)
def test_where_nothing_is_given_the_second_run_is_told_what_to_type(name, option, run):
    Path("runs/digits").mkdir(parents=True)
    Path("runs/digits", name).write_text('{"schema_version": 1}')
    assert_refused(run("augment"), f"runs/digits holds.*ptee augment {option}")


def test_an_earlier_run_is_written_over_where_that_is_said(run, known, finished):
    assert run("augment", *known, *SHORT, "--exits", "layer3.0", "--out", finished, "--overwrite").status == 0
    assert [e.name for e in ptee.load(finished).exits] == ["layer3.0"]


def test_without_out_the_run_is_called_after_its_model(run, known):
    assert run("augment", *known, *SHORT).status == 0
    assert Path("runs", "cifar_resnet20", "config.json").is_file()


# gates


@pytest.fixture(scope="module")
def many(things) -> Path:
    with torch.random.fork_rng():  # the same pictures, whichever tests ran before
        torch.manual_seed(0)
        pictures(things / "many", [f"class{k}" for k in range(10)], 10)
    return things / "many"


GATED = ("--gate", "agrees", "--gate-share", 0.3)


def test_gates_learn_on_images_of_their_own_and_are_saved(run, known, many):
    done = run("augment", *known, "--data", many, *BRIEF, *GATED, "--out", "out")
    assert done.status == 0, done
    assert "Of 80 training images the heads learn on 56, and the gates on the other 24" in done.out
    assert "Gates on 24 images. Is the answer the backbone's?" in done.out
    config = json.loads(Path("out", "config.json").read_text())
    fits = config["results"]["gates"]
    assert {row["gate"] for row in config["exits"]} == {e.gate for e in ptee.load("out").exits} == {"answers"}
    assert fits["images"] == 24
    assert run("evaluate", "out").status == 0


def test_too_few_images_to_fit_gates_leave_h_at_the_largest_probability(run, known):
    done = run("augment", *known, *BRIEF, "--no-speed", "--out", "out")
    assert "24 training images are too few to fit gates as well: the heads learn on all" in done.out
    assert "Gates on" not in done.out
    model = ptee.load("out")
    assert model.results["gates"]["images"] == 0
    every = model.all_exits(random_images(model.backbone, 5, model.origin.input.input_size))
    torch.testing.assert_close(every.confidence[:-1], every.logits[:-1].softmax(-1).amax(-1))


def test_without_gates_nothing_is_said_of_them(run, known):
    done = run("augment", *known, *SHORT, "--gate", "none", "--out", "out")
    assert "Gates" not in done.out
    assert "gates" not in json.loads(Path("out", "config.json").read_text())["results"]


def test_a_training_is_resumed_on_the_same_images_and_its_gates_are_fitted_after_it(run, known, many, interrupt):
    words = ("augment", *known, "--data", many, *BRIEF, *GATED, "--no-speed")
    assert run(*words, "--out", "whole").status == 0
    interrupt(2)
    assert run(*words, "--out", "broken").status == 130
    without = ("augment", *known, "--data", many, *BRIEF)
    assert_refused(run(*without, "--out", "broken", "--resume"), "belongs to a training with data")
    assert run(*words, "--out", "broken", "--resume").status == 0
    whole, broken = (load_file(Path(name, "heads.safetensors")) for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    whole, broken = (json.loads(Path(name, "config.json").read_text())["results"] for name in ("whole", "broken"))
    assert whole["gates"] == broken["gates"]
    assert whole["gates"]["images"] == 24


# Ctrl-C, and --resume


@pytest.fixture
def interrupt(monkeypatch) -> Callable[[int], None]:
    """Presses Ctrl-C in that epoch of the next training."""

    def interrupt(number: int) -> None:
        undisturbed = training._Training._epoch

        def epoch(self, n: int, *more: object) -> training.Epoch:
            if n == number:
                monkeypatch.setattr(training._Training, "_epoch", undisturbed)
                raise KeyboardInterrupt
            return undisturbed(self, n, *more)

        monkeypatch.setattr(training._Training, "_epoch", epoch)

    return interrupt


def test_an_interrupted_training_ends_with_status_130_and_resume_goes_on_to_the_same_end(run, known, interrupt):
    words = ("augment", *known, *SHORT, "--epochs", 3)
    assert run(*words, "--out", "whole").status == 0
    interrupt(2)
    done = run(*words, "--out", "broken")
    assert done.status == 130
    assert re.search(r"1 complete epoch.* broken.*--resume", done.err)
    assert [p.name for p in Path("broken").iterdir()] == ["checkpoint.safetensors"]
    done = run(*words, "--out", "broken", "--resume")
    assert done.status == 0
    assert "epoch 1/3" not in done.out
    whole, broken = (load_file(Path(name, "heads.safetensors")) for name in ("whole", "broken"))
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    assert not Path("broken", "checkpoint.safetensors").exists()


def test_interrupted_in_the_first_epoch_nothing_is_written(run, known, interrupt, elsewhere):
    interrupt(1)
    assert run("augment", *known, *SHORT, "--out", "out")[::2] == (130, "Interrupted.\n")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("where", ["ptee.pipeline.fit._clear", "ptee.pipeline.fit.fit_gates"])
def test_interrupted_beside_the_training_it_says_too_how_to_go_on(where, run, known, many, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = ("augment", *known, "--data", many, *BRIEF, *GATED, "--no-speed", "--out", "out")
    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        broken = run(*words)
    assert broken.status == 130
    assert re.search("Interrupted: .*kept in out.*--resume goes on", broken.err)
    assert run(*words, "--resume").status == 0


def test_interrupted_while_it_measures_resume_has_only_to_measure(run, known, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ptee.evaluation.results.evaluate", fail)
        broken = run("augment", *known, *SHORT, "--out", "out")
    assert broken.status == 130
    assert "ptee evaluate out" in broken.err
    early = evaluated(run, "out")
    done = run("augment", *known, *SHORT, "--out", "out", "--resume")
    assert done.status == 0
    assert "epoch " not in done.out
    assert not Path("out", "checkpoint.safetensors").exists()
    for name in ("config.json", "metrics.json"):
        assert figures(json.loads(Path("out", name).read_text())["results"]) == figures(early)


def test_interrupted_with_random_weights_no_resumption_is_promised(run, things, interrupt):
    words = ("augment", *RANDOM, "--data", things / "ten", *SHORT, "--out", "out")
    interrupt(2)
    assert "--resume" not in run(*words).err
    assert_refused(run(*words, "--resume"), "backbone")


def test_resume_without_a_training_to_go_on_with_is_refused(run, known, finished):
    assert_refused(run("augment", *known, *SHORT, "--out", finished, "--resume"), "no interrupted training in out")


def test_resume_with_an_image_in_place_of_another_is_refused(run, known, things, interrupt):
    images = Path(shutil.copytree(things / "ten", "images"))
    interrupt(2)
    run("augment", *known, *SHORT, "--data", images, "--out", "out")
    (images / "class0" / "0.png").rename(images / "class0" / "new.png")
    assert_refused(run("augment", *known, *SHORT, "--data", images, "--out", "out", "--resume"), "data.*files.*now")


def test_resume_with_other_settings_is_refused_and_the_checkpoint_kept(run, known, interrupt):
    interrupt(2)
    run("augment", *known, *SHORT, "--out", "out")
    before = Path("out", "checkpoint.safetensors").read_bytes()
    assert_refused(run("augment", *known, *SHORT, "--lr", 0.5, "--out", "out", "--resume"), "lr 0.01.*now 0.5")
    assert_refused(run("augment", *known, *SHORT, "--out", "out"), "interrupted training.*--resume.*--overwrite")
    assert Path("out", "checkpoint.safetensors").read_bytes() == before
    assert run("augment", *known, *SHORT, "--lr", 0.5, "--out", "out", "--overwrite").status == 0


# where nothing is given


@pytest.fixture
def hasty(monkeypatch) -> None:
    """There are 600 digits, and the network learns them for two epochs."""
    digits = load_digits()
    few = Bunch(images=digits.images[:600], target=digits.target[:600])
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: few)
    monkeypatch.setattr(defaults, "EPOCHS", 2)


TINY = ("--epochs", 1, "--exits", "layer1", "--head", "pool", "--no-speed")


def test_with_nothing_given_a_network_learns_the_digits_once_and_gets_exits(run, hasty, monkeypatch):
    done = run("augment", "--epochs", 1, "--exits", "layer1,layer2")
    assert done.status == 0, done
    assert "handwritten digits, once" in done.out
    metrics = json.loads(Path("runs", "digits", "metrics.json").read_text())
    assert metrics["results"]["rows"][0]["accuracy"] > 0.5
    monkeypatch.setattr(defaults, "train_digits_network", None)  # not called again
    assert run("evaluate", "runs/digits", "--no-speed").status == 0
    assert run("augment", *TINY, "--out", "again").status == 0
    assert ptee.load("again").plan.head == "pool"


def test_with_nothing_given_folders_called_digits_are_no_data(run, hasty, things):
    shutil.copytree(things / "ten", "digits")
    for out in ("runs/digits", "digits"):
        assert run("augment", *TINY, "--out", out).status == 0
        recorded = json.loads(Path(out, "metrics.json").read_text())["results"]
        assert (recorded["data"]["source"], recorded["data"]["split"]["kind"]) == ("digits", "digits")
        assert figures(evaluated(run, out)) == figures(recorded)
        shutil.rmtree("digits")


class Toys(Dataset):
    """As torchvision makes them: ten pictures in train, five in test."""

    def __init__(self, root: str, train: bool = True, transform: Any = None) -> None:
        assert (Path(root) / "toys.bin").is_file()
        self.labels = list(range(10 if train else 5))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (16, 16), (20 * index, 0, 0)), self.labels[index]


def test_the_name_of_a_data_set_stays_its_name_when_a_folder_is_called_so_later(run, known, monkeypatch, tmp_path):
    monkeypatch.setattr("torchvision.datasets.Toys", Toys, raising=False)
    Path("toys.bin").touch()
    assert run("augment", *known[:-1], "toys", *SHORT, "--out", "out").status == 0
    recorded = json.loads(Path("out", "metrics.json").read_text())["results"]
    (tmp_path / "later").mkdir()
    shutil.move("out", tmp_path / "later")
    monkeypatch.chdir(tmp_path / "later")
    pictures(Path("toys"), [f"class{k}" for k in range(10)], 3)
    assert figures(evaluated(run, "out")) == figures(recorded)


def test_another_recipe_or_split_of_the_digits_is_another_file(monkeypatch):
    digits = [open_named("digits", transform=torch.as_tensor, seed=seed) for seed in (0, 0, 1)]
    files = [defaults.digits_weights(data) for data in digits]
    monkeypatch.setattr(defaults, "EPOCHS", 1)
    assert files[0] == files[1]
    assert len({*files, defaults.digits_weights(digits[0])}) == 3


def test_the_digits_take_one_thread_and_others_all(run, known, hasty, finished, monkeypatch):
    threads, seen = [2], []  # what torch was told last; it keeps to one, as two on busy cores take long
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def noting(what: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*words: object, **more: object) -> Any:
            seen.append(torch.get_num_threads())
            return what(*words, **more)

        return noted

    for place, name in ((defaults, "train_digits_network"), (training, "train"), (evaluation, "evaluate")):
        monkeypatch.setattr(place, name, noting(getattr(place, name)))
    assert run("augment", *TINY, "--out", "tiny").status == 0
    assert run("evaluate", "tiny", "--no-speed").status == 0
    assert run("augment", *known, *SHORT, "--out", "other").status == 0
    assert run("evaluate", finished, "--no-speed").status == 0
    assert (seen, torch.get_num_threads()) == ([1, 1, 1, 1, 2, 2, 2], 2)


def test_the_digits_network_never_saw_the_images_it_is_measured_on(run, hasty, monkeypatch):
    parts: list[set[bytes]] = []
    train = defaults.train_digits_network

    def note(data: Data, file: Path) -> None:
        parts.append(indices(data.train))
        train(data, file)

    def stop(model: ptee.EarlyExitModel, data: Data, *_: object) -> None:
        parts.append(indices(data.validation))
        raise KeyboardInterrupt

    monkeypatch.setattr(defaults, "train_digits_network", note)
    monkeypatch.setattr("ptee.pipeline.fit._train", stop)
    for seed in (0, 1):
        run("augment", "--seed", seed)
    learnt, *measured = parts
    assert [len(learnt & images) for images in measured] == [0, 0]


def indices(part: Any) -> set[bytes]:
    """Which of the source's images are in this part."""
    return {picture.tobytes() for picture, _ in part.dataset.rows}


def test_imagenette_is_downloaded_once_and_whole(monkeypatch, tmp_path):
    class Fake:
        def __init__(self, root: str, **_: object) -> None:
            print("Downloading")
            Path(root, "imagenette2-320", "train").mkdir(parents=True)

    monkeypatch.setattr("torchvision.datasets.Imagenette", Fake)
    assert (defaults.imagenette() / "train").is_dir()
    monkeypatch.setattr("torchvision.datasets.Imagenette", None)
    assert (defaults.imagenette() / "train").is_dir()
    assert [p.name for p in defaults.cache_folder().iterdir()] == ["imagenette2-320"]


def test_a_broken_download_of_imagenette_leaves_nothing(monkeypatch, capsys):
    class Fake:
        def __init__(self, root: str, **_: object) -> None:
            Path(root, "imagenette2-320").mkdir(parents=True)
            raise ConnectionError("cut off\nin the middle")

    monkeypatch.setattr("torchvision.datasets.Imagenette", Fake)
    with pytest.raises(PteeError, match=r"cut off.*--data FOLDER") as refusal:
        defaults.imagenette()
    assert "\n" not in str(refusal.value)
    assert list(defaults.cache_folder().iterdir()) == []
    assert capsys.readouterr().out == ""


# bench


def test_bench_times_every_batch_size_and_prints_a_table_or_json(run):
    words = ("bench", *RANDOM, "--batch-sizes", "1,2", "--rounds", 3)
    assert "nobody" in run(*words).out
    cases = json.loads(run(*words, "--json").out)["cases"]
    assert [case["batch"] for case in cases] == [1, 1, 2, 2, 2]


def test_bench_takes_a_number_of_threads(run):
    before = torch.get_num_threads()
    try:
        found = json.loads(run("bench", *RANDOM, "--batch-sizes", "1", "--rounds", 3, "--threads", 1, "--json").out)
    finally:
        torch.set_num_threads(before)
    assert found["threads"] == 1


def test_augment_takes_every_way_of_learning(run, known):
    how = ("--loss", "each", "--targets", "soft", "--temperature", 2, "--reach", "--schedule", "cosine")
    more = ("--augment", 2, "--no-mirror", "--mixup", 0.2, "--shift", 2, "--head", "conv1")
    done = run("augment", *known, *SHORT, *how, *more, "--out", "out")
    assert done.status == 0, done.err
    assert "epoch 2/2" in done.out


def test_no_digit_is_mirrored(run, hasty, monkeypatch):
    asked = {}

    def train(*_: object, **given: object) -> None:
        asked.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", train)
    run("augment", "--augment", 2)
    assert (asked["augment"], asked["mirror"]) == (2, False)


@pytest.mark.parametrize(
    ("given", "example"), [(("--threshold", "70%"), "0.7 or 0.9,0.8"), (("--input-size", "8x8"), "3,224,224")]
)
def test_what_is_no_list_of_numbers_is_refused_with_an_example(given, example, run):
    done = run("augment", *given, "--out", "out")
    assert done.status == 2
    assert done.err.strip().endswith(f"{given[1]!r} is no list of numbers between commas, such as {example}.")
