"""The commands that take a saved run: read options, call one function, print."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
from cloup import command, option

from ptee._common.errors import Argument, Interrupted, PteeError
from ptee._common.text import quoted, threshold_words, with_run
from ptee._common.writing import is_free, require_name, require_page, write_text
from ptee.cli import options
from ptee.cli.checks import require_export, require_times, require_timing
from ptee.cli.options import Numbers, Place, RunName, as_option, given_settings, in_groups
from ptee.cli.pages import COMPARED, comparison_of, require_comparing
from ptee.cli.values import (
    backbone_of,
    how_of,
    name_others,
    name_weights,
    names_of,
    opened_runs,
    recipe_of_exits,
    refuse_about_model,
    refuse_of_run,
    remark_on,
    require_model,
    require_runs,
    show,
    untrained,
)
from ptee.pipeline.recorded import require_tunable, tuning_recipe
from ptee.timing.settings import FILE
from ptee.tuning.config import AT_BATCH


@command(short_help="Measure a saved run again, at any threshold.")
@click.argument("run", type=RunName())
@option("--threshold", type=Numbers(), help="T: one number, or one for each exit, separated by commas.")
@options.TRACES
@options.SPEED
@options.OF_RUN
def evaluate(run: str, **o: Any) -> None:
    """Measure a saved RUN (a folder, or user/repo on the hub), or an exported model, again, at any threshold."""
    require_runs(run, images=not o["traces"], exported=not o["traces"], **o)
    from ptee.deploy.manifest import is_exported
    from ptee.evaluation import results
    from ptee.pipeline.exported import evaluate_exported

    remark_on(o["threshold"])
    if is_exported(run):
        refuse_of_run(run, o, ["weights"])
        how = {key: value for key, value in how_of(o).items() if key != "speed"}
        places = {key: o[key] for key in ("threshold", "data", "data_root", "classes")}
        answered = evaluate_exported(run, **places, **how, word=as_option)
        click.echo(f"{answered.about}\n", err=o["as_json"])
        show(answered, o)
        return
    opened = opened_runs({run: run}, o)[run]
    images, words = opened.left_by_tuning(given=o["threshold"] is not None)
    click.echo(f"{words} {opened.accuracy}\n", err=o["as_json"])
    if o["threshold"] is not None and (off := opened.model.off):
        names = f"Exit{'s' * (len(off) > 1)} {' and '.join(map(str, off))} {'are' if len(off) > 1 else 'is'}"
        which = "All exits are" if len(off) == len(opened.model.exits) else names
        anew = f"To choose anew, also which exits are on: ptee tune {quoted(run)} --max-fidelity-drop 0.01"
        text = f"{which} off in {run}: --threshold changes nothing there. {anew}"
        click.echo(text, err=True)
    if how_of(o).get("speed"):
        click.echo(f"{results.about_speed(opened.model)}\n", err=o["as_json"])
    with opened.at_work():
        found = results.evaluate(opened.model, images, threshold=o["threshold"], about=words, **how_of(o))
    show(found, o)


@command(short_help="Choose the thresholds of a saved run again.")
@click.argument("run", type=RunName())
@options.TARGET
@options.TRACES
@options.SPEED
@option("--dry-run", is_flag=True, help="Show what would be chosen, and change nothing.")
@options.OF_RUN
def tune(run: str, dry_run: bool, **o: Any) -> None:
    """Choose the thresholds of a saved RUN again, measure them on other images, and keep them in the run.

    Which exits are on is chosen again, too.
    """
    require_tunable(run, keep=not dry_run)
    recipe = tuning_recipe(given_settings(o), o["batch_size"])
    require_runs(run, images=not o["traces"], **o)
    if recipe.thresholds.cost == "time":
        require_times([run])
    from ptee._common.files import to_json
    from ptee.pipeline.saved_run import tune_run

    opened = opened_runs({run: run}, o, recipe.thresholds.max_drop)[run]

    def log(text: str) -> None:
        click.echo(with_run(text, run), err=o["as_json"])

    log(f"{opened.words} {opened.accuracy}")
    before = opened.decided
    log(f"Thresholds until now: {', '.join(threshold_words(opened.model.threshold, opened.model.off))}.")
    with opened.at_work():
        results = tune_run(opened, recipe, log=log, explain=o["explain"], keep=not dry_run, **how_of(o))
    kept = f"{run} is as it was: --dry-run keeps nothing." if dry_run else f"The thresholds are kept in {run}."
    if opened.decided == before:
        kept = f"Nothing {'would change' if dry_run else 'changed'}: {run} had these thresholds already."
    click.echo(to_json(results) if o["as_json"] else f"\n{kept}")


@command(short_help="Compare runs, smaller networks and cascades.")
@click.argument("run", type=RunName(), nargs=-1, required=True)
@option("--html", "page", type=Place(), help="Draw the page of ptee report, too, into this file, such as curve.html.")
@option(
    "--csv",
    "sheet",
    type=Place(),
    help="Write a table, too, with a row for each run as it was measured when its thresholds were set, such as results.csv.",
)
@in_groups(*COMPARED, *options.TIME_OF_RUN)
@options.TRACES
@options.OF_RUN
def compare(run: tuple[str, ...], **o: Any) -> None:
    """Compare saved RUNs of one backbone with each other, with smaller networks and with a cut-off backbone.

    Thresholds are chosen on the calibration images; everything is reported on others.
    """
    require_runs(*run, images=not o["traces"], **o)
    folders, by = names_of(run), require_comparing(run, o)
    if o["traces"] and o["page"] is not None:
        raise PteeError(Argument("html"), " shows images, and traces have none. Leave it out, or give images.")
    in_place = "" if o["page"] is None else require_page(o["page"], "html")
    if o["sheet"] is not None:
        require_name(o["sheet"], (".csv",), "csv", "a table")
    from ptee.evaluation.results_csv import results_csv
    from ptee.pipeline.reported import reported
    from ptee.pipeline.saved_run import compare_runs
    from ptee.report.page import write_page

    how = comparison_of(run, o, by)
    opened = opened_runs(folders, o)
    log = partial(click.echo, err=o["as_json"])
    with next(iter(opened.values())).at_work():
        if o["page"] is None:
            found = compare_runs(opened, log=log, **how)
        else:
            said, found = reported(opened, folders, log=log, with_target=False, **how)
    name_others(next(iter(opened.values())).model.origin, err=o["as_json"])
    log("")
    show(found, o)
    if o["sheet"] is not None:
        write_text(o["sheet"], results_csv({name: each.model for name, each in opened.items()}))
        log(f"\nA row for each run is in {o['sheet']}")
    if o["page"] is not None:
        write_page(said, o["page"])
        log(f"\nDrawn in {o['page']}{in_place}")


@command(short_help="Time a model with exits beside its backbone.")
@click.argument("run", type=RunName(), required=False)
@in_groups(options.NETWORK, options.untrained_exits(), options.IMAGES_OF_RUN)
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
    type=options.Words(),
    help="Of a RUN: hooks, eager, graphs, compile, onnx; several separated by commas. Default: hooks, and eager on a CPU or graphs on a GPU.",
)
@option("--save", is_flag=True, help="Keep the times of the pieces in RUN, for --cost time.")
@options.DEVICE
@options.EXPLAIN
@options.JSON
def bench(run: str | None, **o: Any) -> None:
    """Time a saved RUN, or a model with untrained exits (--model), beside its bare backbone: what leaving saves, what staying costs.

    Of a RUN, each piece is measured, too. An exported model is timed beside itself with nobody leaving.
    """
    if run is not None:
        _bench_run(run, o)
        return
    for name in ("executor", "save", "data", "data_root", "classes"):
        if o[name]:
            raise PteeError(Argument(name), " is about a saved run. Give its folder, too: ptee bench RUN.")
    recipe = recipe_of_exits(o)
    require_model(o)
    require_timing(o)
    from ptee._common.devices import resolve_device
    from ptee.pipeline.timed_run import bench_untrained

    device = resolve_device(o["device"])
    how = {key: o[key] for key in ("batch_sizes", "rounds", "threads")}
    backbone = backbone_of(o)
    model = untrained(backbone, recipe).to(device)
    name_weights(backbone, model, err=o["as_json"])
    show(bench_untrained(model, **how), o)


def _bench_run(run: str, o: dict[str, Any]) -> None:
    refuse_about_model(run, o)
    require_runs(run, images=False, exported=True, **o)
    require_timing(o)
    from ptee._common.devices import resolve_device
    from ptee.deploy.manifest import is_exported
    from ptee.pipeline.timed_run import bench_exported_folder, bench_saved

    device = resolve_device(o["device"])
    if is_exported(run):
        refuse_of_run(run, o, ["executor", "save", "weights"])
        places = {key: o[key] for key in ("rounds", "threads", "data", "data_root", "classes")}
        show(bench_exported_folder(run, o["batch_sizes"], device=device, **places), o)
        return
    names = o["executor"] or ["hooks", "graphs" if device.type == "cuda" else "eager"]
    how = {key: o[key] for key in ("rounds", "save", "threads", "weights", "data", "data_root", "classes")}
    bench_saved(run, o["batch_sizes"], device=device, executors=names, word=as_option, show=partial(show, o=o), **how)
    if o["save"]:
        most = max(o["batch_sizes"])
        at_batch = f" --at-batch {most}" * (most < AT_BATCH)
        then = f"Thresholds by them: ptee tune {quoted(run)} --max-drop 0.01 --cost time{at_batch}"
        click.echo(f"\nThe times of the pieces are kept in {Path(run) / FILE}. {then}", err=o["as_json"])


@command(short_help="Write a run as files for torch or ONNX Runtime.")
@click.argument("run", type=RunName())
@option("--out", type=Place(), required=True, help="A new folder.")
@option(
    "--format",
    type=click.Choice(["pt2", "onnx", "triton"]),
    default="pt2",
    show_default=True,
    help="pt2: programs for torch; onnx: for ONNX Runtime; triton: a model repository for NVIDIA Triton.",
)
@option(
    "--int8",
    is_flag=True,
    help="Write whole numbers of 8 bits, and compare them with float32 on images. For --format onnx.",
)
@option("--calibrate", metavar="FOLDER", help="Images for --int8: a folder, or the name of a data set.")
@option("--weights", type=Place(), help="A file with the backbone's weights, if they are not where the run says.")
def export(run: str, **o: Any) -> None:
    """Write a saved RUN as files that need no Python code of the network: one for each piece of its forward pass."""
    require_runs(run, images=False, **o)
    require_export(o)
    try:
        _export(run, o)
    except KeyboardInterrupt as why:
        if is_free(o["out"]):
            raise
        raise Interrupted(f"What is in {o['out']} is complete.") from why


def _export(run: str, o: dict[str, Any]) -> None:
    from ptee.deploy.export import export as write
    from ptee.pipeline.saved_run import load_run

    if o["int8"]:
        from ptee.pipeline.int8 import export_int8

        click.echo(str(export_int8(run, o["out"], o["calibrate"], weights=o["weights"])))
        click.echo(f"\n{_written(o['out'])}")
        return
    if o["format"] == "triton":
        from ptee.serving.triton import export_triton

        folder = export_triton(load_run(run, o["weights"]), o["out"])
        click.echo(f"Written to {folder}. Serve it: tritonserver --model-repository {quoted(folder)}")
        return
    folder = write(load_run(run, o["weights"]), o["out"], format=o["format"])
    click.echo(_written(folder))


def _written(folder: Path) -> str:
    return f"Written to {folder}. Try it: python -m ptee.deploy.runner {quoted(folder)} IMAGE"
