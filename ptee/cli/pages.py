"""The commands that draw: the page of a run, and single figures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from cloup import command, option

from ptee._common.writing import PICTURES, require_name, require_page, require_writable
from ptee.cli import options
from ptee.cli.checks import require_times
from ptee.cli.options import PREFIX, Numbers, Place, RunName, given_settings, in_groups
from ptee.cli.values import how_of, names_of, refuse_given, require_runs, static_networks, where_of
from ptee.model.run_files import metrics_of
from ptee.pipeline.recorded import (
    FIGURES_OF_RUN,
    FIGURES_OF_SWEEP,
    NAMES_OF_REPORT,
    WITHOUT_IMAGES,
    is_sweep,
    require_kind,
)

OF_COMPARING = (
    "static",
    "drops",
    "lines",
    *(f"{PREFIX}thresholds__{name}" for name in ("cost", "at_batch", "executor")),
)
OF_READING = ("data", "data_root", "classes", "workers", "batch_size", "device")
COMPARED = (
    option(
        "--static",
        metavar="NAME[=FILE]",
        multiple=True,
        help="A smaller network to compare with, and a file of its weights. Default: its published weights. Repeatable.",
    ),
    option(
        "--drops",
        type=Numbers(example="0,0.01"),
        default="0,0.005,0.01,0.02",
        show_default=True,
        help="Allowed drops of accuracy (without labels: of fidelity); 0.01 is one percentage point.",
    ),
    option(
        "--lines",
        type=options.Words(),
        default="own,blended,one_threshold,max_prob,entropy,patience,oracle,truncation",
        help="Which lines each run gets in the table, separated by commas; fewer make a short table of many runs. Default: all of own, "
        "blended, one_threshold, max_prob, entropy, patience, oracle, truncation.",
    ),
)


def require_comparing(runs: Sequence[str], o: dict[str, Any]) -> Any:
    """Refuse options by which runs cannot be compared, and costs in seconds of runs that keep no times. Gives the settings of the cost."""
    from ptee.evaluation.comparison_lines import checked_lines
    from ptee.pipeline.recipe import make_recipe
    from ptee.tuning.config import TIME, DropsConfig

    given = given_settings(o)
    by = make_recipe(None, given).thresholds
    by.require_used(given)
    checked_lines(o["lines"])
    DropsConfig(drops=o["drops"])
    if by.cost == TIME:
        require_times(runs)
    return by


def comparison_of(runs: Sequence[str], o: dict[str, Any], by: Any) -> dict[str, Any]:
    """How runs are compared, by the options of a command, and by what cost."""
    how = {"cost": by.cost, "at_batch": by.at_batch, "executor": by.executor} | how_of(o)
    return how | {"static": static_networks(o["static"], runs), "drops": o["drops"], "lines": o["lines"]}


@command(short_help="Draw all about a run on one page.")
@click.argument("run", type=RunName())
@option("--against", type=RunName(), multiple=True, metavar="RUN", help="Another run of the same backbone. Repeatable.")
@option("--out", type=Place(), default="report.html", show_default=True, help="The page.")
@option("--images/--no-images", default=True, show_default=True, help="Put thumbnails of some images into the page.")
@option("--recorded", is_flag=True, help="Read no images: show only what the run recorded.")
@option("--figures", type=Place(), metavar="FOLDER", help="Write the figures here, too, as SVG and PNG.")
@in_groups(*COMPARED, *options.TIME_OF_RUN)
@options.OF_IMAGES
def report(run: str, against: tuple[str, ...], **o: Any) -> None:
    """Draw all about a saved RUN on one page, in one file that needs nothing else: what it saves and loses, and why.

    The run is measured on images that its heads have not seen, beside the alternatives, as in ptee compare.
    """
    runs = (run, *against)
    folders = names_of(runs)
    if o["recorded"]:
        refuse_given(
            ("against", "images", *OF_COMPARING, *OF_READING),
            "needs images, and --recorded reads none. Leave one of them out.",
        )
    require_runs(*runs, **o | {"images": not o["recorded"]})
    metrics_of(Path(run))  # refuses what cannot be read
    by = require_comparing(runs, o)
    in_place = require_page(o["out"])
    if o["figures"] is not None:
        from ptee.report.pictures import require_kaleido

        require_writable(o["figures"])
        require_kaleido()
    from ptee.pipeline.reported import read_recorded, recorded_only, reported
    from ptee.pipeline.saved_run import open_run
    from ptee.report.page import write_page

    read_recorded(run)
    if o["recorded"]:
        said = recorded_only(run, o["weights"])
    else:
        how = comparison_of(runs, o, by)
        opened = {name: open_run(folder, **where_of(o)) for name, folder in folders.items()}
        with next(iter(opened.values())).at_work():
            said, _ = reported(opened, folders, log=click.echo, pictures=o["images"], **how)
    parts = write_page(said, o["out"])
    if o["figures"] is not None:
        from ptee.report.pictures import write_figures

        write_figures(parts, o["figures"])
        click.echo(f"The figures are in {o['figures']}.")
    click.echo(f"Written to {o['out']}{in_place}")


@command(short_help="Draw one figure of a run or a sweep.")
@click.argument("run", type=RunName())
@option(
    "--kind",
    default="curve",
    help=f"Which figure: {', '.join(FIGURES_OF_RUN)}. Of a sweep: {', '.join(FIGURES_OF_SWEEP)}. "
    f"The file names of ptee report --figures count, too: {', '.join(NAMES_OF_REPORT)}. Default: curve.",
)
@option("--out", type=Place(), required=True, help="FILE.html, or a still picture: FILE.png, FILE.svg.")
@in_groups(*COMPARED, *options.TIME_OF_RUN)
@options.OF_IMAGES
def plot(run: str, kind: str, **o: Any) -> None:
    """Draw one figure of a saved RUN, or of the folder of a sweep, into a file.

    PNG and SVG need kaleido and Chrome; a page needs neither.
    """
    of_sweep, kind = is_sweep(Path(run)), NAMES_OF_REPORT.get(kind, kind)
    require_kind(kind, of_sweep)
    _refuse_unused(kind, of_sweep)
    if not of_sweep:
        require_runs(run, **o | {"images": kind not in WITHOUT_IMAGES})
        metrics_of(Path(run))  # refuses what cannot be read
    by = require_comparing([] if of_sweep else [run], o)
    require_name(o["out"], PICTURES, "out", "a picture")
    from ptee.pipeline.reported import recorded_figure, run_figure, sweep_figure
    from ptee.report.pictures import require_picture, write_figure

    require_picture(o["out"])
    if of_sweep:
        figure, title = sweep_figure(Path(run), kind)
    elif kind in WITHOUT_IMAGES:
        figure, title = recorded_figure(run, kind, o["weights"])
    else:
        from ptee.pipeline.saved_run import open_run

        how = comparison_of([run], o, by)
        opened = open_run(run, **where_of(o))
        with opened.at_work():
            how = how if kind == "curve" else {key: how[key] for key in ("batch_size", "num_workers", "device")}
            figure, title = run_figure(opened, run, kind, log=partial(click.echo, err=True), **how)
    write_figure(figure, o["out"], title)
    click.echo(f"Drawn in {o['out']}")


def _refuse_unused(kind: str, of_sweep: bool) -> None:
    """Refuse options that this kind of figure has no use for."""
    if of_sweep:
        refuse_given((*OF_COMPARING, *OF_READING, "weights"), "is of no use for a figure of a sweep. Leave it out.")
    elif kind != "curve":
        unused = (*OF_COMPARING, *OF_READING) if kind in WITHOUT_IMAGES else OF_COMPARING
        refuse_given(unused, f"is of no use for --kind {kind}. Leave it out.")
