"""The command: parse words, call one function, print. Heavy libraries are imported when a command needs them."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click

from ptee import __version__
from ptee._common.allocation import keep_freed_memory
from ptee._common.errors import Interrupted, PteeError, RunError, unknown
from ptee._common.files import to_json
from ptee.cli.options import (
    BACKBONE,
    DATA,
    DEVICE,
    JSON,
    MOVED_WEIGHTS,
    PLACE,
    SPEED,
    THRESHOLD,
    WISH,
    Numbers,
    as_option,
    in_options,
)
from ptee.model import saving as runs


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Status 2: the user can mend it; 1: ptee failed; 130: interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    if int(os.environ.get("RANK", 0)):  # under `accelerate launch` the first process speaks for all
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    if arguments is None:  # the process is ours
        keep_freed_memory()
    warnings.simplefilter("ignore")  # libraries warn about their own future; ptee says what matters in its own words
    status = 0
    try:
        status = cli.main(words, prog_name="ptee", standalone_mode=False) or 0
    except PteeError as why:
        status = _failed(in_options(_without_worker_traceback(why.worded(as_option)), cli.commands.values()), 2, why)
    except click.ClickException as why:
        status = _failed(why.format_message(), 2, why)
    except Interrupted as why:
        status = _failed(str(why), 130)
    except (KeyboardInterrupt, click.Abort):
        status = _failed("Interrupted.", 130)
    except Exception as why:
        if type(why).__name__ == "OutOfMemoryError":
            sys.exit(_failed("The device ran out of memory. Give a smaller --batch-size, or --device cpu.", 2, why))
        status = _failed(
            f"ptee failed: {type(why).__name__}: {why}. PTEE_DEBUG=1 shows where; please report it.", 1, why
        )
    sys.exit(status)


def _without_worker_traceback(message: str) -> str:
    """An error of a process that loads images arrives with that process's traceback; its last line says it all."""
    if "Original Traceback" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]


def _failed(message: str, status: int, why: BaseException | None = None) -> int:
    if why is not None and os.environ.get("PTEE_DEBUG"):
        traceback.print_exception(why)
    click.echo(" ".join(message.split()), err=True)
    return status


class _InOrder(click.Group):
    """Commands are listed as they are written."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """As click asks for it; click itself would not say which commands there are."""
        if args and args[0][:1] != "-" and args[0] not in self.commands and not ctx.resilient_parsing:
            raise unknown("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_InOrder,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Early exits for a trained image classifier that stays frozen.

    \b
    ptee augment                            a small network on handwritten digits, to see how it goes
    ptee augment --model resnet50 --data FOLDER --exits pareto --out runs/r50
    ptee evaluate runs/r50 --data FOLDER --threshold 0.7
    ptee tune runs/r50 --max-drop 0.01
    ptee compare runs/r50 runs/other --static resnet18
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


# ---------------------------------------------------------------------------------------------------- commands


@cli.command()
@BACKBONE
@PLACE
@DATA
@click.option(
    "--targets",
    help="labels, pseudo (the backbone's answers) or soft (its probabilities).",
)
@click.option("--temperature", type=float, help="Of --targets soft, for --loss each: such as 2.")
@click.option("--loss", help="v1, v2, mc or cost: the exits learn together; each: every exit for itself.")
@click.option("--cost-weight", type=float, help="Lambda: the price of cost in the losses v1, v2 and cost. Default: 1.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training images.")
@click.option(
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Run the backbone once and keep what the heads read, or run it in every epoch.",
)
@click.option(
    "--augment",
    type=click.IntRange(min=1),
    help="Views of each training image: itself, its mirror image, then random crops.",
)
@click.option("--mirror/--no-mirror", default=True, help="Mirror images among the views; never of digits or signs.")
@click.option(
    "--shift",
    type=click.IntRange(min=0),
    help="Move feature maps by up to so many pixels of the input.",
)
@click.option("--optimizer", help="adam, adamw or muon, with which learned heads learn in fewer epochs.")
@click.option("--lr", type=float, help="Learning rate.")
@click.option("--schedule", help="Of the learning rate: constant or cosine.")
@click.option("--weight-decay", type=float, help="Of matrices and convolutions.")
@click.option(
    "--gate",
    help="Fit gates after the heads, which decide who leaves: agrees (is this answer the backbone's?), right (is it the "
    "label?) or best (is it the label, or would no later answer be?); none.",
)
@click.option(
    "--gate-share",
    type=click.FloatRange(0, 0.5, min_open=True),
    help="Of the training images, for the gates; the heads do not see them. Default: 0.1.",
)
@click.option("--patience", type=click.IntRange(min=1), help="Stop after so many epochs that are no better.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="Of the heads, the order and the split of the data.",
)
@click.option("--precision", default="auto", show_default=True, help="auto (bf16 where it is fast), no, bf16 or fp16.")
@THRESHOLD
@WISH
@SPEED
@DEVICE
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the run. Default: runs/NAME.")
@click.option("--resume", is_flag=True, help="Go on with the training that was interrupted in --out.")
@click.option("--overwrite", is_flag=True, help="Replace the run that --out holds.")
def augment(**o: Any) -> None:
    """Hang exits on a model, train their heads, measure, and save a run.

    Without --model: a small network on handwritten digits, no data and no connection needed.
    """
    from ptee.pipeline import fit as augmenting

    with _threads(tiny=o["model"] is None):
        augmenting.augment(o, click.echo)


@cli.command()
@BACKBONE
@PLACE
@JSON
def plan(as_json: bool, **o: Any) -> None:
    """Show where exits would stand and what they would cost, without training."""
    from ptee.exits.plan import make_plan
    from ptee.pipeline import asked
    from ptee.pipeline.recipe import followed

    o = followed(o)
    backbone = asked.backbone(o)
    backbone.module.requires_grad_(False).eval()
    found = asked.placed(make_plan, backbone, o)
    click.echo(to_json(found.to_dict()) if as_json else str(found))


@cli.command()
@click.argument("run")
@MOVED_WEIGHTS
@DATA
@THRESHOLD
@SPEED
@DEVICE
@JSON
def evaluate(run: str, as_json: bool, **o: Any) -> None:
    """Measure a saved RUN (a folder, or user/repo on the hub) again, at any threshold."""
    from ptee._common.devices import resolve_device
    from ptee.evaluation.targets import remark
    from ptee.pipeline.measuring import measured
    from ptee.pipeline.saved_run import reopened

    o["device"] = resolve_device(o["device"])
    if said := remark(o["threshold"]):
        click.echo(said, err=True)
    opened = reopened(run, o)
    images, words = opened.left_by_tuning(given=o["threshold"] is not None)
    click.echo(f"{words} {opened.accuracy}", err=as_json)
    with _threads(opened.tiny):
        results = measured(opened.model, images, o, words)
    click.echo(to_json(results.to_dict()) if as_json else f"\n{results}")


@cli.command()
@click.argument("run")
@MOVED_WEIGHTS
@DATA
@WISH
@SPEED
@DEVICE
@JSON
def tune(run: str, as_json: bool, **o: Any) -> None:
    """Choose the thresholds of a saved RUN by a wish, measure it on other images, and keep them in the run.

    Which exits are on is chosen anew, too. Give one of --max-drop, --max-fidelity-drop and --max-cost.
    """
    from ptee._common.devices import resolve_device
    from ptee.evaluation.targets import Wish
    from ptee.evaluation.tuning import kept
    from ptee.pipeline import asked
    from ptee.pipeline.measuring import measured, tuned
    from ptee.pipeline.saved_run import reopened

    o["threshold"] = None
    o["device"], wish = resolve_device(o["device"]), asked.wish(o) or Wish.only({})
    if not Path(run).is_dir():
        raise RunError(f"There is no folder {run}, and thresholds are written into one. Give a run on this disk.")
    opened = reopened(run, o)
    model = opened.model
    click.echo(f"{opened.words} {opened.accuracy}", err=as_json)
    with _threads(opened.tiny):
        parts, found = tuned(model, opened.unseen, wish, o, partial(click.echo, err=as_json))
        results = measured(model, parts.report, o, f"{opened.words} {parts.words}")
    if not as_json:
        click.echo(f"\n{results}")
    model.results = (model.results or {}) | results.to_dict()
    runs.update(Path(run), threshold=model.threshold, off=list(model.off), results=model.results)
    if as_json:
        click.echo(to_json(model.results))
    else:
        click.echo(f"{kept(found, model.results)}\n\nThe thresholds are kept in {run}.")


@cli.command()
@click.argument("run", nargs=-1, required=True)
@click.option(
    "--static",
    metavar="NAME[=FILE]",
    multiple=True,
    help="A smaller network to compare with, and a file of its weights. Default: the published ones. Repeatable.",
)
@click.option(
    "--drops",
    type=Numbers(example="0,0.01"),
    default="0,0.005,0.01,0.02",
    show_default=True,
    help="Of accuracy (without labels: fidelity) that are allowed; 0.01 is one point.",
)
@click.option(
    "--lines",
    default="learned,one_threshold,max_prob,entropy,patience,oracle,truncation",
    show_default=True,
    help="Which lines each run gets, for a short table of many runs. What is said in words is of these.",
)
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path),
    help="Draw cost against accuracy, too: one page, such as curve.html.",
)
@MOVED_WEIGHTS
@DATA
@DEVICE
@JSON
def compare(run: tuple[str, ...], as_json: bool, page: Path | None, **o: Any) -> None:
    """Compare saved RUNs of one backbone with each other, with smaller networks and with a cut-off backbone.

    Thresholds are chosen on the calibration images; everything is reported on others.
    """
    from ptee._common.devices import resolve_device
    from ptee.evaluation import report
    from ptee.evaluation.comparison import checked_drops, checked_lines
    from ptee.evaluation.comparison import compare as measure
    from ptee.evaluation.tuning import parts_for_all
    from ptee.pipeline.asked import named_networks, names_of
    from ptee.pipeline.saved_run import reopened

    if page is not None:
        report.require_page(page)
    device, drops = resolve_device(o["device"]), checked_drops(o["drops"])
    lines = checked_lines([name.strip() for name in o["lines"].split(",")])
    static = named_networks(o["static"])
    names = names_of(run)
    opened = [reopened(name, o) for name in run]
    parts = parts_for_all([each.unseen for each in opened])
    about = f"{opened[0].unseen.data.source}. {parts.words}"
    click.echo(f"{about} {opened[0].accuracy}", err=as_json)
    with _threads(opened[0].tiny):
        found = measure(
            dict(zip(names, (each.model for each in opened), strict=True)),
            parts.calibration,
            parts.report,
            static=static,
            drops=drops,
            lines=lines,
            batch_size=o["batch_size"],
            num_workers=o["workers"],
            device=device,
            about=about,
        )
    click.echo(to_json(found.to_dict()) if as_json else f"\n{found}")
    if page is not None:
        report.write(found, page)
        click.echo(f"\nDrawn in {page}", err=as_json)


@cli.command()
@BACKBONE
@PLACE
@click.option(
    "--batch-sizes",
    type=Numbers(int, "1,32"),
    help="Images per batch, for each measurement. Default: 1,32.",
)
@click.option(
    "--training",
    is_flag=True,
    help="Time training instead, on random images: with the cache, and with the backbone in each epoch.",
)
@click.option("--images", type=click.IntRange(min=2), help="For --training. Default: 512.")
@click.option("--epochs", type=click.IntRange(min=1), help="For --training. Default: 20.")
@click.option(
    "--rounds", type=click.IntRange(min=3), help="Each is timed so often, in turns. Default: 7; 3 for --training."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's own choice.")
@DEVICE
@JSON
def bench(as_json: bool, **o: Any) -> None:
    """Time a model with untrained exits beside its bare backbone: what leaving saves, what staying costs.

    With --training: what training costs with and without the cache. Without --recipe: pareto, pool heads.
    """
    import torch

    from ptee._common.devices import resolve_device
    from ptee.evaluation.benchmark import bench as measure
    from ptee.pipeline import asked
    from ptee.pipeline.recipe import followed
    from ptee.pipeline.training_speed import bench_training

    ways: dict[bool, tuple[str, ...]] = {True: ("images", "epochs"), False: ("batch_sizes",)}
    for option in ways[not o["training"]]:
        if o[option] is not None:
            goes = "does not go with" if o["training"] else "goes only with"
            raise PteeError(f"--{option.replace('_', '-')} {goes} --training. Leave it out.")
    # before a recipe says how many epochs it takes
    given = {option: o[option] for option in (*ways[o["training"]], "rounds") if o[option] is not None}
    device = resolve_device(o["device"])
    if o["threads"]:
        torch.set_num_threads(o["threads"])
    if o["recipe"] is not None:
        o = followed(o)
    model = asked.untrained(asked.backbone(o), o).to(device)
    found: Any = (bench_training if o["training"] else measure)(model, **given)
    click.echo(to_json(found.to_dict()) if as_json else str(found))


@cli.command()
@click.argument("family", nargs=-1)
@JSON
def zoo(family: tuple[str, ...], as_json: bool) -> None:
    """Give every architecture family of timm and torchvision exits, and check them: minutes to an hour.

    FAMILY is a library's module of models, such as resnet or torchvision/resnet; without any, all of them.
    """
    from ptee._common.text import line
    from ptee.pipeline.zoo import TITLE, WIDTHS, check_all, families, summary

    wanted, verdicts = families(family), []
    if not as_json:
        click.echo(line(TITLE, WIDTHS))
    for verdict in check_all(wanted):
        verdicts.append(verdict)
        if not as_json:
            click.echo(line(verdict.row, WIDTHS))
    click.echo(to_json([v.to_dict() for v in verdicts]) if as_json else f"\n{summary(verdicts)}")


def _threads(tiny: bool) -> AbstractContextManager[None]:
    """One CPU thread for a network as tiny as that on the digits, else as many as torch takes."""
    from ptee._common.devices import one_thread

    return one_thread() if tiny else nullcontext()
