"""The commands: read options, call one function, print."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import cloup

from ptee._common.errors import Argument, DataError, PteeError, RunError
from ptee.cli.options import (
    DATA,
    DATA_AND_BATCH_SIZE,
    DEVICE,
    EXITS,
    EXPLAIN,
    JSON,
    MODEL,
    OUTPUT,
    SPEED,
    TARGET,
    THRESHOLD,
    THRESHOLDS,
    TRAINING,
    WEIGHTS,
    Numbers,
    as_option,
    given_settings,
    in_groups,
)

AGAIN = "The same command with --resume goes on."
RANDOM_WEIGHTS = (
    "The backbone's weights are random, so the commands cannot load this run again, nor go on with it. Give trained weights with "
    "--weights FILE."
)


def add_commands(group: click.Group) -> None:
    """Hang all commands on the entrance, in the order of use."""
    for command in (augment, plan, evaluate, tune, compare, bench, recipe, sweep):
        group.add_command(command)


@cloup.command()
@in_groups(MODEL, DATA, EXITS, TRAINING, THRESHOLDS, OUTPUT)
def augment(**o: Any) -> None:
    """Add early exits to a model: train their heads, choose thresholds, measure, and save a run.

    Without --model: a small network on handwritten digits; no data and no connection needed.
    """
    from ptee._common.devices import resolve_device
    from ptee.pipeline.demo import DEMO_RECIPE, demo
    from ptee.pipeline.fit import Job, fit_backbone
    from ptee.pipeline.run_folder import new_folder

    o["device"] = resolve_device(o["device"])
    recipe = _recipe(o, default=DEMO_RECIPE if o["model"] is None else None)
    out = o["out"] or Path("runs") / _file_name(o["model"] or recipe.name)
    if said := _remark(recipe.thresholds.threshold):
        click.echo(said, err=True)
    folder = new_folder(out, overwrite=o["overwrite"], resume=o["resume"])
    job = Job(
        folder,
        o["device"],
        o["workers"],
        o["resume"],
        o["speed"],
        click.echo,
        AGAIN,
        o["overwrite"],
        explain=o["explain"],
    )
    if o["model"] is None:
        _refuse_of_demo(o)
        with _one_thread():
            demo(recipe, job)
        return
    backbone = _backbone(o)
    data, recipe = _data_for(backbone, recipe, o, folder)
    found_again = backbone.source is not None
    if not found_again:
        click.echo(RANDOM_WEIGHTS)
    model = fit_backbone(backbone, data, recipe, job if found_again else replace(job, again=""))
    click.echo(f"\nSaved in {folder}.{_another_threshold(model, folder) if found_again else ''}")


@cloup.command()
@in_groups(MODEL, EXITS)
@JSON
def plan(as_json: bool, **o: Any) -> None:
    """Show where exits would stand and what they would cost, without training."""
    from ptee._common.files import to_json

    recipe = _recipe(o)
    found = _untrained(_backbone(o), recipe).plan
    click.echo(to_json(found.to_dict()) if as_json else str(found))


@cloup.command()
@click.argument("run")
@DATA_AND_BATCH_SIZE
@WEIGHTS
@THRESHOLD
@SPEED
@DEVICE
@EXPLAIN
@JSON
def evaluate(run: str, as_json: bool, explain: bool, **o: Any) -> None:
    """Measure a saved RUN (a folder, or user/repo on the hub) again, at any threshold."""
    from ptee._common.files import to_json
    from ptee.pipeline.saved_run import measure, open_run

    if said := _remark(o["threshold"]):
        click.echo(said, err=True)
    opened = open_run(run, **_where(o))
    images, words = opened.left_by_tuning(given=o["threshold"] is not None)
    click.echo(f"{words} {opened.accuracy}", err=as_json)
    with _threads(opened):
        results = measure(opened.model, images, words, threshold=o["threshold"], **_how(o))
    click.echo(to_json(results.to_dict()) if as_json else f"\n{results}{_legend(results, explain)}")


@cloup.command()
@click.argument("run")
@TARGET
@DATA_AND_BATCH_SIZE
@WEIGHTS
@SPEED
@DEVICE
@JSON
@EXPLAIN
def tune(run: str, as_json: bool, explain: bool, **o: Any) -> None:
    """Choose the thresholds of a saved RUN again, measure them on other images, and keep them in the run.

    Which exits are on is chosen again, too.
    """
    from ptee._common.files import to_json
    from ptee.pipeline.saved_run import open_run, tune_run, tuning_recipe

    if not Path(run).is_dir():
        raise RunError(f"There is no folder {run}. Thresholds are written into a run, so give one on this disk.")
    settings = given_settings(o) | {"thresholds.one_threshold": o["one_threshold"], "thresholds.margin": o["margin"]}
    recipe = tuning_recipe(settings, o["batch_size"])
    opened = open_run(run, max_drop=recipe.thresholds.max_drop, **_where(o))
    click.echo(f"{opened.words} {opened.accuracy}", err=as_json)
    with _threads(opened):
        results = tune_run(opened, recipe, log=partial(click.echo, err=as_json), explain=explain, **_how(o))
    click.echo(to_json(results) if as_json else f"\nThe thresholds are kept in {run}.")


@cloup.command()
@click.argument("run", nargs=-1, required=True)
@cloup.option(
    "--static",
    metavar="NAME[=FILE]",
    multiple=True,
    help="A smaller network to compare with, and a file of its weights. Default: the published ones. Repeatable.",
)
@cloup.option(
    "--drops",
    type=Numbers(example="0,0.01"),
    default="0,0.005,0.01,0.02",
    show_default=True,
    help="Allowed drops of accuracy (without labels: of fidelity); 0.01 is one percentage point.",
)
@cloup.option(
    "--lines",
    default="own,one_threshold,max_prob,entropy,patience,oracle,truncation",
    show_default=True,
    help="Which lines each run gets in the table; fewer make a short table of many runs.",
)
@cloup.option(
    "--html",
    "page",
    type=click.Path(path_type=Path),
    help="Draw accuracy against cost, too, on a page such as curve.html.",
)
@DATA_AND_BATCH_SIZE
@WEIGHTS
@DEVICE
@EXPLAIN
@JSON
def compare(run: tuple[str, ...], as_json: bool, explain: bool, page: Path | None, **o: Any) -> None:
    """Compare saved RUNs of one backbone with each other, with smaller networks and with a cut-off backbone.

    Thresholds are chosen on the calibration images; everything is reported on others.
    """
    from ptee._common.files import to_json
    from ptee.evaluation import report
    from ptee.pipeline.saved_run import compare_runs, open_run

    if page is not None:
        report.require_page(page)
    opened = {name: open_run(folder, **_where(o)) for name, folder in _names_of(run).items()}
    first = next(iter(opened.values()))
    with _threads(first):
        found = compare_runs(
            opened,
            static=_static(o["static"]),
            drops=o["drops"],
            lines=[name.strip() for name in o["lines"].split(",")],
            log=partial(click.echo, err=as_json),
            **_how(o, speed=False),
        )
    click.echo(to_json(found.to_dict()) if as_json else f"\n{found}{_legend(found, explain)}")
    if page is not None:
        report.write(found, page)
        click.echo(f"\nDrawn in {page}", err=as_json)


@cloup.command()
@in_groups(MODEL, EXITS)
@cloup.option(
    "--batch-sizes",
    type=Numbers(int, "1,32"),
    default="1,32",
    show_default=True,
    help="Images in a batch, for each measurement.",
)
@cloup.option(
    "--rounds", type=click.IntRange(min=3), default=7, show_default=True, help="How often each is timed, in turns."
)
@cloup.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's own choice.")
@DEVICE
@EXPLAIN
@JSON
def bench(as_json: bool, explain: bool, **o: Any) -> None:
    """Time a model with untrained exits beside its bare backbone: what leaving saves, what staying costs."""
    import torch

    from ptee._common.devices import resolve_device
    from ptee._common.files import to_json
    from ptee.evaluation.benchmark import bench as measure

    device, recipe = resolve_device(o["device"]), _recipe(o)
    if o["threads"]:
        torch.set_num_threads(o["threads"])
    model = _untrained(_backbone(o), recipe).to(device)
    found = measure(model, batch_sizes=o["batch_sizes"], rounds=o["rounds"])
    click.echo(to_json(found.to_dict()) if as_json else f"{found}{_legend(found, explain)}")


@cloup.command()
@click.argument("name", default="ptee")
def recipe(name: str) -> None:
    """Print a recipe as YAML: ptee, pteenet, eenet, branchynet, ztw, a file, or that of a run's folder."""
    from ptee.pipeline.recipe import make_recipe

    click.echo(make_recipe(name).to_yaml().rstrip())


@cloup.command()
@click.argument("recipe", default="ptee")
@cloup.option(
    "--over",
    multiple=True,
    required=True,
    metavar="NAME=VALUE,VALUE",
    help="A setting and the values to try, such as training.epochs=5,20 or seed=0,1,2. Repeatable: every combination is run.",
)
@in_groups(MODEL, DATA)
@cloup.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for all runs, the table, the CSV and the figure.",
)
@DEVICE
def sweep(recipe: str, over: tuple[str, ...], **o: Any) -> None:
    """Fit one model by a RECIPE many times, with other settings each time: one table, one CSV, one figure.

    The backbone runs over the images once where its inputs are the same. After Ctrl-C the same command goes on.
    """
    from ptee._common.devices import resolve_device
    from ptee.pipeline.recipe import make_recipe
    from ptee.pipeline.sweep import read_axes, run_sweep

    o["device"] = resolve_device(o["device"])
    axes, base = read_axes(over), make_recipe(recipe)
    backbone = _backbone(o)
    click.echo(
        str(
            run_sweep(
                lambda seed: _open(backbone, o, seed),
                backbone,
                base,
                axes,
                o["out"],
                device=o["device"],
                num_workers=o["workers"],
                log=click.echo,
            )
        )
    )


# ---------------------------------------------------------------------------------------------------- from options to values


def _legend(tables: Any, explain: bool) -> str:
    """What the columns mean, where that is asked for."""
    return f"\n\n{tables.legend}" if explain else ""


def _recipe(o: dict[str, Any], default: Any = None) -> Any:
    from ptee.pipeline.recipe import make_recipe

    return make_recipe(o.pop("recipe", None) or default, given_settings(o))


def _backbone(o: dict[str, Any]) -> Any:
    """The one that is named."""
    from ptee.backbones.load import load_backbone

    if o["model"] is None:
        raise PteeError(
            "Which model? Give ",
            Argument("model", "NAME"),
            ", such as ",
            Argument("model", "resnet50"),
            ".",
            argument="model",
        )
    keys = ("weights", "pretrained", "num_classes", "input_size", "mean", "std")
    return load_backbone(o["model"], model_args=dict(o["model_args"]), **{key: o[key] for key in keys})


def _untrained(backbone: Any, recipe: Any) -> Any:
    from ptee.pipeline.fit import build_model

    return build_model(backbone, recipe)


def _open(backbone: Any, o: dict[str, Any], seed: int, **more: Any) -> tuple[Any, Any]:
    from ptee.pipeline.images import open_images

    if o["data"] is None:
        raise DataError(f"No images for {backbone.name}. Give some: ", Argument("data", "FOLDER"), ".", argument="data")
    return open_images(
        o["data"],
        backbone,
        seed=seed,
        root=o["data_root"],
        classes=o["classes"],
        check=True,
        device=o["device"],
        **more,
    )


def _data_for(backbone: Any, recipe: Any, o: dict[str, Any], out: Path) -> tuple[Any, Any]:
    """The images, all of which can be read, and the recipe with targets that their labels allow."""
    from ptee.pipeline import unreadable
    from ptee.pipeline.demo import imagenette
    from ptee.pipeline.images import recipe_for

    if o["data"] is None and backbone.label_space == "imagenet-1k":
        click.echo(
            "No --data: these exits see ten classes only (Imagenette). Give images like yours with --data FOLDER."
        )
        o = o | {"data": str(imagenette())}
    removed = unreadable.recorded(out) if o["resume"] else ()
    data, labels = _open(
        backbone, o, recipe.seed, removed=removed, require=partial(unreadable.require_readable, out=out)
    )
    adapted = recipe_for(labels, recipe)
    words = PteeError(f"{labels.reason} {labels.doubt}".rstrip(), " ", *labels.remedy).worded(as_option).rstrip()
    if adapted.training.targets == "pseudo" != recipe.training.targets:
        words += " The heads learn the backbone's own answers."
    click.echo(words)
    return data, adapted


def _file_name(model: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in model)


def _refuse_of_demo(o: dict[str, Any]) -> None:
    if not o["pretrained"]:
        raise PteeError(Argument("pretrained", "False"), " needs a model. Give ", Argument("model", "NAME"), ".", argument="model")  # fmt: skip
    for key in ("classes", "weights", "num_classes", "model_args", "data", "data_root", "input_size", "mean", "std"):
        if o[key]:
            raise PteeError(Argument(key), " needs a model. Give ", Argument("model", "NAME"), ".", argument="model")  # fmt: skip


def _remark(threshold: Any) -> str | None:
    from ptee.evaluation.targets import remark

    return remark([threshold] if isinstance(threshold, int | float) else threshold)


def _another_threshold(model: Any, folder: Path) -> str:
    return "" if len(model.off) == len(model.exits) else f" Another threshold: ptee evaluate {folder} --threshold 0.7"


def _where(o: dict[str, Any]) -> dict[str, Any]:
    """Where a saved run's weights and images are."""
    return {key: o[key] for key in ("weights", "data", "data_root", "classes")}


def _how(o: dict[str, Any], speed: bool = True) -> dict[str, Any]:
    """How images are run through a model."""
    from ptee._common.devices import resolve_device

    how = {"batch_size": o["batch_size"], "num_workers": o["workers"], "device": resolve_device(o["device"])}
    return how | ({"speed": o["speed"]} if speed else {})


def _names_of(runs: tuple[str, ...]) -> dict[str, str]:
    """Runs by what to call them: the name of the folder, or the whole path where two have one name."""
    for run in runs:
        if runs.count(run) > 1:
            raise PteeError(f"The run {run} is given twice. Give each run once.")
    ends = [Path(run).absolute().name for run in runs]
    return {end if ends.count(end) == 1 else run: run for run, end in zip(runs, ends, strict=True)}


def _static(texts: tuple[str, ...]) -> dict[str, Any]:
    """Smaller networks by name."""
    from ptee.backbones.library import other_words
    from ptee.backbones.load import load_backbone

    found: dict[str, Any] = {}
    for name, file in (text.partition("=")[::2] for text in texts):
        if name in found:
            raise PteeError(f"--static {name} is given twice. Give each network once.")
        with other_words({"weights": f"static={name}"}):
            found[name] = load_backbone(name, weights=file or None)
    return found


def _one_thread() -> AbstractContextManager[None]:
    from ptee._common.devices import one_thread

    return one_thread()


def _threads(opened: Any) -> AbstractContextManager[None]:
    """One CPU thread for a network as tiny as that on the digits, else as many as torch takes."""
    return _one_thread() if opened.tiny else nullcontext()
