"""The commands: read options, call one function, print."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from cloup import command, option

from ptee._common.errors import Argument, DataError, PteeError, RunError
from ptee.cli import options
from ptee.cli.options import Numbers, Place, RunName, as_option, given_settings, in_groups

AGAIN = "The same command with --resume goes on."
RANDOM_WEIGHTS = (
    "The backbone's weights are random, so the commands cannot load this run again, nor go on with it. Give trained weights with "
    "--weights FILE."
)
NEED_A_MODEL = ("classes", "weights", "num_classes", "model_args", "data", "data_root", "input_size", "mean", "std")
GIVE_MODEL = Argument("model", "NAME")


def add_commands(group: click.Group) -> None:
    """Add all commands to the entrance, in the order of use."""
    for each in (augment, plan, evaluate, tune, compare, bench, export, recipe, sweep):
        group.add_command(each)


@command()
@in_groups(options.MODEL, options.DATA, options.EXITS, options.TRAINING, options.THRESHOLDS, options.OUTPUT)
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
    _remark_on(recipe.thresholds.threshold)
    folder = o["out"] or Path("runs") / _file_name(o["model"] or recipe.name)
    new_folder(folder, overwrite=o["overwrite"], resume=o["resume"])
    how = {"overwrite": o["overwrite"], "explain": o["explain"], "again": AGAIN}
    job = Job(folder, o["device"], o["workers"], o["resume"], o["speed"], click.echo, **how)
    if o["model"] is None:
        _refuse_without_model(o)
        demo(recipe, job)
        return
    backbone = _backbone(o)
    data, recipe = _data_for(backbone, recipe, o, folder)
    is_random = backbone.source is None
    if is_random:
        click.echo(RANDOM_WEIGHTS)
    model = fit_backbone(backbone, data, recipe, replace(job, again="") if is_random else job)
    can_leave = not is_random and len(model.off) < len(model.exits)
    other = f" Another threshold: ptee evaluate {folder} --threshold 0.7"
    click.echo(f"\nSaved in {folder}.{other * can_leave}")


@command()
@in_groups(options.NETWORK, options.EXITS, *options.TIME_OPTIONS)
@options.DEVICE
@options.EXPLAIN
@options.JSON
def plan(**o: Any) -> None:
    """Show where exits would stand and what they would cost, without training.

    With --cost time the backbone is measured up to each exit, and fractions are of its time.
    """
    from ptee._common.devices import resolve_device
    from ptee.evaluation.config import AT_BATCH, TIME, ThresholdsConfig

    cost, at_batch = (o.pop(f"{options.PREFIX}thresholds__{name}") for name in ("cost", "at_batch"))
    how = ThresholdsConfig(cost=cost or "operations", at_batch=at_batch or AT_BATCH)
    recipe, backbone, times = _recipe_of_exits(o), _backbone(o), None
    if how.cost == TIME:
        from ptee.timing.backbone import time_of_modules

        times = time_of_modules(backbone, resolve_device(o["device"]), how.at_batch)
    _show(_untrained(backbone, recipe, times).plan, o)


@command()
@click.argument("run", type=RunName())
@option("--threshold", type=Numbers(), help="T: one number, or one for each exit, separated by commas.")
@options.SPEED
@options.OF_RUN
def evaluate(run: str, **o: Any) -> None:
    """Measure a saved RUN (a folder, or user/repo on the hub) again, at any threshold."""
    from ptee.evaluation import results
    from ptee.pipeline.saved_run import open_run

    _remark_on(o["threshold"])
    opened = open_run(run, **_where(o))
    images, words = opened.left_by_tuning(given=o["threshold"] is not None)
    click.echo(f"{words} {opened.accuracy}\n", err=o["as_json"])
    with opened.threads():
        found = results.evaluate(opened.model, images, threshold=o["threshold"], about=words, **_how(o))
    _show(found, o)


@command()
@click.argument("run", type=RunName())
@options.TARGET
@options.SPEED
@options.OF_RUN
def tune(run: str, **o: Any) -> None:
    """Choose the thresholds of a saved RUN again, measure them on other images, and keep them in the run.

    Which exits are on is chosen again, too.
    """
    from ptee._common.files import to_json
    from ptee.pipeline.saved_run import open_run, tune_run, tuning_recipe

    if not Path(run).is_dir():
        raise RunError(f"There is no folder {run}. Thresholds are written into a run, so give one on this disk.")
    recipe = tuning_recipe(given_settings(o), o["batch_size"])
    opened = open_run(run, max_drop=recipe.thresholds.max_drop, **_where(o))
    log = partial(click.echo, err=o["as_json"])
    log(f"{opened.words} {opened.accuracy}")
    with opened.threads():
        results = tune_run(opened, recipe, log=log, explain=o["explain"], **_how(o))
    click.echo(to_json(results) if o["as_json"] else f"\nThe thresholds are kept in {run}.")


@command()
@click.argument("run", type=RunName(), nargs=-1, required=True)
@option(
    "--static",
    metavar="NAME[=FILE]",
    multiple=True,
    help="A smaller network to compare with, and a file of its weights. Default: the published ones. Repeatable.",
)
@option(
    "--drops",
    type=Numbers(example="0,0.01"),
    default="0,0.005,0.01,0.02",
    show_default=True,
    help="Allowed drops of accuracy (without labels: of fidelity); 0.01 is one percentage point.",
)
@option(
    "--lines",
    default="own,blended,one_threshold,max_prob,entropy,patience,oracle,truncation",
    show_default=True,
    help="Which lines each run gets in the table; fewer make a short table of many runs.",
)
@option("--html", "page", type=Place(), help="Draw accuracy against cost on a page: curve.html.")
@in_groups(*options.TIME_OPTIONS)
@options.OF_RUN
def compare(run: tuple[str, ...], **o: Any) -> None:
    """Compare saved RUNs of one backbone with each other, with smaller networks and with a cut-off backbone.

    Thresholds are chosen on the calibration images; everything is reported on others.
    """
    from ptee.evaluation import report
    from ptee.pipeline.recipe import make_recipe
    from ptee.pipeline.saved_run import compare_runs, open_run

    if o["page"] is not None:
        report.require_page(o["page"])
    by = make_recipe(None, given_settings(o)).thresholds
    opened = {name: open_run(folder, **_where(o)) for name, folder in _names_of(run).items()}
    static, lines = _static(o["static"]), [name.strip() for name in o["lines"].split(",")]
    log = partial(click.echo, err=o["as_json"])
    with next(iter(opened.values())).threads():
        how = _how(o) | {"cost": by.cost, "at_batch": by.at_batch}
        found = compare_runs(opened, static=static, drops=o["drops"], lines=lines, log=log, **how)
    log("")
    _show(found, o)
    if o["page"] is not None:
        report.write(found, o["page"])
        log(f"\nDrawn in {o['page']}")


@command()
@click.argument("run", type=RunName(), required=False)
@in_groups(options.NETWORK, options.EXITS, options.DATA)
@option(
    "--batch-sizes",
    type=Numbers(int, "1,32"),
    default="1,32",
    show_default=True,
    help="Images in a batch, for each measurement.",
)
@option("--rounds", type=click.IntRange(min=3), default=7, show_default=True, help="How often each is timed, in turns.")
@option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's own choice.")
@option(
    "--executor",
    help="Of a RUN: hooks, eager, graphs, compile; several separated by commas. Default: hooks, and eager on a CPU or graphs on a GPU.",
)
@option("--save", is_flag=True, help="Keep the times of the pieces in RUN, for --cost time.")
@options.DEVICE
@options.EXPLAIN
@options.JSON
def bench(run: str | None, **o: Any) -> None:
    """Time a saved RUN, or a model with untrained exits (--model), beside its bare backbone: what leaving saves, what staying costs.

    Of a RUN, each piece is measured, too.
    """
    import torch

    from ptee._common.devices import resolve_device
    from ptee.timing.benchmark import bench as measure

    device = resolve_device(o["device"])
    if run is not None:
        _bench_run(run, o, device)
        return
    for name in ("executor", "save"):
        if o[name]:
            raise PteeError(Argument(name), " is about a saved run. Give its folder, too: ptee bench RUN.")
    recipe = _recipe_of_exits(o)
    if o["threads"]:
        torch.set_num_threads(o["threads"])
    model = _untrained(_backbone(o), recipe).to(device)
    _show(measure(model, batch_sizes=o["batch_sizes"], rounds=o["rounds"]), o)


def _bench_run(run: str, o: dict[str, Any], device: Any) -> None:
    from ptee.pipeline.timed_run import bench_saved

    if o["model"] is not None:
        raise PteeError("Both a RUN and ", Argument("model", o["model"]), " are given. Give one of them.")
    executors = o["executor"] or ("hooks,graphs" if device.type == "cuda" else "hooks,eager")
    names = [name.strip() for name in executors.split(",")]
    how = {key: o[key] for key in ("rounds", "save", "threads", "weights", "data", "data_root", "classes")}
    _show(bench_saved(run, o["batch_sizes"], device=device, executors=names, word=as_option, **how), o)


@command()
@click.argument("run", type=RunName())
@option("--out", type=Place(), required=True, help="A new folder.")
@option(
    "--format",
    type=click.Choice(["pt2", "onnx"]),
    default="pt2",
    show_default=True,
    help="pt2: programs for torch; onnx: for ONNX Runtime.",
)
@option("--weights", type=Place(), help="A file with the backbone's weights, if they are not where the run says.")
def export(run: str, **o: Any) -> None:
    """Write a saved RUN as files that need no Python code of the network: one for each piece of its forward pass."""
    from ptee.deploy.export import export as write
    from ptee.pipeline.saved_run import load_run

    folder = write(load_run(run, o["weights"]), o["out"], format=o["format"])
    click.echo(f"Written to {folder}. Try it: python -m ptee.deploy.runner {folder} IMAGE")


@command()
@click.argument("name", default="ptee")
def recipe(name: str) -> None:
    """Print a recipe as YAML: ptee, pteenet, eenet, branchynet, ztw, a file, or that of a run's folder."""
    from ptee.pipeline.recipe import make_recipe

    click.echo(make_recipe(name).to_yaml().rstrip())


@command()
@click.argument("recipe", default="ptee")
@option(
    "--over",
    multiple=True,
    required=True,
    metavar="NAME=VALUE,VALUE",
    help="A setting and the values to try, such as training.epochs=5,20 or seed=0,1,2. Repeatable: every combination is run.",
)
@in_groups(options.MODEL, options.DATA)
@option("--out", type=Place(), required=True, help="Folder for runs, table, CSV and figure.")
@options.DEVICE
def sweep(recipe: str, over: tuple[str, ...], **o: Any) -> None:
    """Fit one model by a RECIPE many times, with other settings each time: one table, one CSV, one figure.

    \b
    ptee sweep ptee --over epochs=5,20 --over seed=0,1,2 --model resnet50 --data FOLDER --out runs/sweep

    The backbone runs over the images once where its inputs are the same. After Ctrl-C the same command goes on.
    """
    from ptee._common.devices import resolve_device
    from ptee.pipeline.fit import Job
    from ptee.pipeline.images import describe_labels
    from ptee.pipeline.recipe import make_recipe
    from ptee.pipeline.sweep import read_axes, run_sweep

    o["device"] = resolve_device(o["device"])
    axes, base = read_axes(over), make_recipe(recipe)
    _require_model(o)
    if o["data"] is None:
        raise _no_images(o["model"])
    backbone = _backbone(o)

    def open_data(seed: int) -> Any:
        data, labels = _open(backbone, o, seed)
        click.echo(describe_labels(labels, as_option))
        return data, labels

    job = Job(o["out"], o["device"], o["workers"], log=click.echo)
    click.echo(str(run_sweep(open_data, backbone, base, axes, job)))


# ---------------------------------------------------------------------------------------------------- from options to values


def _show(found: Any, o: dict[str, Any]) -> None:
    """Print a result: as JSON, or as a table, with its legend if --explain asks for it."""
    from ptee._common.files import to_json

    legend = f"\n\n{found.legend}" if o.get("explain") else ""
    click.echo(to_json(found.to_dict()) if o["as_json"] else f"{found}{legend}")


def _recipe(o: dict[str, Any], default: Any = None) -> Any:
    from ptee.pipeline.recipe import make_recipe

    recipe = o.pop("recipe", None)
    return make_recipe(default if recipe is None else recipe, given_settings(o))


def _recipe_of_exits(o: dict[str, Any]) -> Any:
    """The recipe of a command that trains nothing. A setting that it could not use is refused."""
    for path, value in o["set"]:
        if not path.startswith("exits."):
            raise PteeError(f"--set {path}={value} changes nothing here: no head is trained. Settings of exits do.")
    return _recipe(o)


def _require_model(o: dict[str, Any]) -> None:
    if o["model"] is None:
        example = Argument("model", "resnet50")
        raise PteeError("Which model? Give ", GIVE_MODEL, ", such as ", example, ".", argument="model")


def _backbone(o: dict[str, Any]) -> Any:
    """The model of --model. Data that are not there are refused first, because its weights may have to be downloaded."""
    from ptee.backbones.load import load_backbone
    from ptee.data.sources import require_source

    _require_model(o)
    if o.get("data") is not None:
        require_source(o["data"])
    keys = ("weights", "pretrained", "num_classes", "input_size", "mean", "std")
    return load_backbone(o["model"], model_args=dict(o["model_args"]), **{key: o[key] for key in keys if key in o})


def _untrained(backbone: Any, recipe: Any, times: Any = None) -> Any:
    from ptee.pipeline.fit import build_model

    return build_model(backbone, recipe, times)


def _no_images(model: str) -> DataError:
    return DataError(f"No images for {model}. Give some: ", Argument("data", "FOLDER"), ".", argument="data")


def _open(backbone: Any, o: dict[str, Any], seed: int, **more: Any) -> tuple[Any, Any]:
    from ptee.pipeline.images import open_images

    places = {"root": o["data_root"], "classes": o["classes"], "device": o["device"]}
    return open_images(o["data"], backbone, seed=seed, check=True, **places, **more)


def _data_for(backbone: Any, recipe: Any, o: dict[str, Any], out: Path) -> tuple[Any, Any]:
    """The images, all of which can be read, and the recipe that their labels allow."""
    from ptee.pipeline.demo import imagenette
    from ptee.pipeline.images import describe_labels, recipe_for
    from ptee.pipeline.run_folder import removed_pictures, require_readable

    if o["data"] is None:
        if backbone.label_space != "imagenet-1k":
            raise _no_images(backbone.name)
        click.echo(
            "No --data: these exits see ten classes only (Imagenette). Give images like yours with --data FOLDER."
        )
        o = o | {"data": str(imagenette())}
    removed = removed_pictures(out) if o["resume"] else ()
    data, labels = _open(backbone, o, recipe.seed, removed=removed, require=partial(require_readable, out=out))
    adapted = recipe_for(labels, recipe)
    words = describe_labels(labels, as_option)
    if adapted.training.targets == "pseudo" != recipe.training.targets:
        words += " The heads learn the backbone's own answers."
    click.echo(words)
    return data, adapted


def _file_name(model: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in model)


def _refuse_without_model(o: dict[str, Any]) -> None:
    given = [Argument(key) for key in NEED_A_MODEL if o[key]]
    if not o["pretrained"]:
        given.insert(0, Argument("pretrained", "False"))
    if given:
        raise PteeError(given[0], " needs a model. Give ", GIVE_MODEL, ".", argument="model")


def _remark_on(threshold: Any) -> None:
    """Print what is odd about thresholds, if anything is."""
    from ptee.evaluation.targets import remark

    if words := remark([threshold] if isinstance(threshold, int | float) else threshold):
        click.echo(words, err=True)


def _where(o: dict[str, Any]) -> dict[str, Any]:
    """Where a saved run's weights and images are, and where the backbone is tried on these."""
    from ptee._common.devices import resolve_device

    places = {key: o[key] for key in ("weights", "data", "data_root", "classes")}
    return {**places, "device": resolve_device(o["device"]), "word": as_option}


def _how(o: dict[str, Any]) -> dict[str, Any]:
    """How images are run through a model."""
    from ptee._common.devices import resolve_device

    how = {"batch_size": o["batch_size"], "num_workers": o["workers"], "device": resolve_device(o["device"])}
    return how | {key: o[key] for key in ("speed",) if key in o}


def _names_of(runs: tuple[str, ...]) -> dict[str, str]:
    """Runs by the name of their folder, or by the whole path where two folders have one name."""
    places = [Path(run).resolve() for run in runs]
    for run, place in zip(reversed(runs), reversed(places), strict=True):
        if places.count(place) > 1:
            raise PteeError(f"The run {run} is given twice. Give each run once.")
    ends = [Path(run).absolute().name for run in runs]
    return {end if ends.count(end) == 1 else run: run for run, end in zip(runs, ends, strict=True)}


def _static(texts: tuple[str, ...]) -> dict[str, Any]:
    """Smaller networks by name."""
    from ptee.backbones.library import other_words
    from ptee.backbones.load import load_backbone

    found: dict[str, Any] = {}
    for name, equals, file in (text.partition("=") for text in texts):
        if name in found:
            raise PteeError(f"--static {name} is given twice. Give each network once.")
        with other_words({"weights": f"static={name}"}):
            found[name] = load_backbone(name, weights=file if equals else None)
    return found
