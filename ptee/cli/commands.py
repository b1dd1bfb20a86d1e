"""All commands by name, and those that begin with a network: read options, call one function, print."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from cloup import command, option

from ptee._common.errors import Interrupted, RunError
from ptee._common.text import printable, with_run
from ptee._common.writing import require_writable
from ptee.cli import options
from ptee.cli.checks import require_recipes
from ptee.cli.options import Numbers, Place, as_option, in_groups
from ptee.cli.pages import plot, report
from ptee.cli.runs import bench, compare, evaluate, export, tune
from ptee.cli.scale import cache, trace
from ptee.cli.serving import serve
from ptee.cli.values import (
    backbone_of,
    data_for,
    file_name,
    name_others,
    name_weights,
    no_images,
    open_for,
    prepared,
    recipe_of,
    recipe_of_exits,
    refuse_without_model,
    remark_on,
    require_model,
    require_names,
    require_places,
    show,
    untrained,
)
from ptee.model.run_files import is_run
from ptee.pipeline.recorded import new_folder, require_same_training
from ptee.training.tracking import require_tracker

AGAIN = "The same command with --resume goes on."
AGAIN_ANEW = "The same command with --resume in place of --overwrite goes on."
RANDOM_WEIGHTS = "The backbone's weights are random, so no command loads this run again or goes on with it. Give trained ones: --weights FILE."


def add_commands(group: click.Group) -> None:
    """Add all commands to the entrance, in the order of use."""
    first = (augment, plan, advise, evaluate, tune, compare, report, bench)
    for each in (*first, export, serve, trace, cache, recipe, sweep, plot):
        group.add_command(each)


@command(short_help="Add exits to a model: train, choose T, measure, save.")
@in_groups(options.MODEL, options.DATA, options.EXITS, options.TRAINING, options.THRESHOLDS, options.OUTPUT)
def augment(**o: Any) -> None:
    """Add early exits to a model: train their heads, choose thresholds, measure, and save a run.

    Without --model: a small network on handwritten digits; no data and no connection needed.
    """
    from ptee.pipeline.recipe import DEMO_RECIPE

    recipe = recipe_of(o, default=DEMO_RECIPE if o["model"] is None else None)
    if o["model"] is None:
        refuse_without_model(o)
    else:
        require_model(o)
    require_tracker(o["log"])
    folder = o["out"] or Path("runs") / file_name(o["model"] or recipe.name)
    try:
        new_folder(folder, overwrite=o["overwrite"], resume=o["resume"])
    except RunError:
        if is_run(folder):
            require_names(o)  # else whoever gives another folder is refused again
        raise
    if o["resume"]:
        require_same_training(folder, recipe)
    from ptee._common.devices import require_launch, resolve_device
    from ptee.pipeline.demo import another_threshold, demo
    from ptee.pipeline.fit import Job, fit_backbone

    o["device"] = resolve_device(o["device"])
    require_launch(o["device"])
    remark_on(recipe.thresholds.threshold)
    again = AGAIN_ANEW if o["overwrite"] else AGAIN
    how = {"overwrite": o["overwrite"], "explain": o["explain"], "again": again, "tracker": o["log"]}

    def log(text: str) -> None:
        click.echo(with_run(text, folder))

    job = Job(folder, o["device"], o["workers"], o["resume"], o["speed"], log, **how)
    if o["model"] is None:
        demo(recipe, job)
        return
    backbone = backbone_of(o)
    require_places(backbone, recipe)
    data, recipe = data_for(backbone, recipe, o, folder)
    is_random = backbone.is_random and recipe.backbone == "frozen"
    if is_random:
        click.echo(RANDOM_WEIGHTS)
    model = fit_backbone(backbone, data, recipe, replace(job, again="") if is_random else job)
    try:
        name_others(backbone)
        if not is_random and len(model.off) < len(model.exits):
            click.echo(another_threshold(model, folder))
    except KeyboardInterrupt as why:
        raise Interrupted(f"The run in {folder} is complete.") from why


@command(short_help="Show where exits would stand and what they cost.")
@in_groups(options.NETWORK, options.untrained_exits("; with --images also of the training"))
@in_groups(options.COST_OF_PLAN, options.TIME_OPTIONS[1])  # it measures the bare backbone as it is
@option(
    "--images",
    type=click.IntRange(min=1),
    help="Say what training on so many images takes: passes, hours (from about a second of measuring), bytes of a cache.",
)
@options.DEVICE
@options.EXPLAIN
@options.JSON
def plan(**o: Any) -> None:
    """Show where exits would stand and what they would cost, without training.

    With --cost time the backbone is measured up to each exit, and fractions are of its time.
    """
    from ptee.tuning.config import AT_BATCH, TIME, ThresholdsConfig

    cost, at_batch = (o.pop(f"{options.PREFIX}thresholds__{name}") for name in ("cost", "at_batch"))
    how = ThresholdsConfig(cost=cost or "operations", at_batch=at_batch or AT_BATCH)
    how.require_used(() if at_batch is None else ("at_batch",))
    recipe = recipe_of_exits(o) if o["images"] is None else recipe_of(o)
    require_model(o)
    from ptee._common.devices import resolve_device

    device = resolve_device(o["device"])
    backbone, times = backbone_of(o), None
    if how.cost == TIME:
        from ptee.timing.backbone import time_of_modules

        times = time_of_modules(backbone, device, how.at_batch)
    model = untrained(backbone, recipe, times)
    name_weights(backbone, model, err=o["as_json"])
    if o["images"] is not None:
        from ptee.scale.budget import budget

        show(budget(model, o["images"], recipe.own_training(), device), o)
        return
    show(model.plan, o)
    name_others(backbone, err=o["as_json"])


@command(short_help="Is another published network as good, for less?")
@click.argument("model")
@option(
    "--max-drop",
    "drops",
    type=Numbers(example="0,0.01"),
    default="0,0.005,0.01",
    show_default=True,
    help="Accuracy that may be lost; 0.01 is one percentage point. Several separated by commas.",
)
@option(
    "--by",
    type=options.Words(),
    default="operations,gpu,cpu",
    show_default=True,
    help="What the other network is to save: operations, or time on a gpu or a cpu. Several separated by commas.",
)
@options.EXPLAIN
@options.JSON
def advise(model: str, drops: list[float], by: list[str], **o: Any) -> None:
    """Name the published networks that are as good on ImageNet as MODEL, one of timm's, for less.

    Ask this before exits are trained: on ImageNet a smaller network is often the better choice.
    """
    from ptee.backbones import published

    show(published.advise(model, drops=drops, by=by), o)


@command(short_help="Print a recipe as YAML.")
@click.argument("name", default="ptee")
def recipe(name: str) -> None:
    """Print a recipe as YAML: a built-in one, a file, or that of a run's folder.

    Built in are ptee, pteenet, eenet, branchynet and ztw, and eenet-joint, branchynet-joint and db-joint, which train the backbone, too.
    """
    from ptee.pipeline.recipe import make_recipe

    click.echo(printable(make_recipe(name).to_yaml().rstrip()))


@command(short_help="Fit a model many times, with other settings each time.")
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
    from ptee.pipeline.recipe import make_recipe, read_axes

    axes, base = read_axes(over), make_recipe(recipe)
    require_model(o)
    if o["data"] is None:
        raise no_images(o["model"])
    require_recipes(base, axes)
    require_writable(o["out"])
    from ptee._common.devices import require_launch, resolve_device
    from ptee.data.labels import describe_labels
    from ptee.pipeline.fit import Job
    from ptee.pipeline.images import undoubted
    from ptee.pipeline.sweep import run_sweep

    o["device"] = resolve_device(o["device"])
    require_launch(o["device"])
    backbone = backbone_of(o)
    click.echo(prepared(backbone, o))

    def open_data(seed: int) -> Any:
        data, labels = open_for(backbone, o, seed)
        click.echo(describe_labels(undoubted(labels, base), as_option))
        return data, labels

    job = Job(o["out"], o["device"], o["workers"], log=click.echo)
    click.echo(str(run_sweep(open_data, backbone, base, axes, job)))
