"""The commands for very many images: on several processes of this machine, or on a cluster of Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from cloup import command, option, option_group

from ptee._common.errors import Interrupted
from ptee._common.text import quoted
from ptee.cli import options
from ptee.cli.options import Place, Real, RunName, as_option, in_groups
from ptee.cli.values import require_runs

SOURCE = option_group(
    "Data",
    option(
        "--data",
        required=True,
        help="A folder of webdataset shards (*.tar), of *.parquet, or of pictures (CLASS/*.jpg); or one shard or table.",
    ),
    options.CLASSES,
    option(
        "--max-unreadable",
        type=Real(0, 1),
        default=0.001,
        show_default=True,
        help="The share of images that may be damaged.",
    ),
)
ENGINE = option_group(
    "Engine",
    option(
        "--engine",
        default="local",
        show_default=True,
        help="local: this machine. ray: the cluster of RAY_ADDRESS, or this machine, by Ray Data.",
    ),
    option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, or actors of Ray."),
    options.BATCH_SIZE,
    options.DEVICE,
)
INTO = option_group(
    "Output",
    option(
        "--out", type=Place(), required=True, help="A new folder, or one that the same command began: then it goes on."
    ),
    option("--overwrite", is_flag=True, help="Replace what another run or source left there."),
    options.WEIGHTS,
)


@contextmanager
def _goes_on(overwrite: bool) -> Iterator[None]:
    """Ctrl-C ends with what to type: parts that are whole are kept."""
    try:
        yield
    except KeyboardInterrupt as why:
        anew = " without --overwrite" * overwrite  # which would begin again
        raise Interrupted(f"Whole parts are kept. The same command{anew} goes on.") from why


class Logits(click.ParamType):
    """all (None), or how many."""

    name = "all|k"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Called by click."""
        if value != "all" and not str(value).isdecimal():
            self.fail(f"{value!r} is no number. Give all, how many of the largest, or 0 for none.", param, ctx)
        return None if value == "all" else int(value)


OF_BOTH = (
    "data",
    "out",
    "engine",
    "workers",
    "classes",
    "weights",
    "batch_size",
    "device",
    "max_unreadable",
    "overwrite",
)


@command(short_help="Record what all exits answer for very many images.")
@click.argument("run", type=RunName())
@in_groups(SOURCE, ENGINE, INTO)
@option(
    "--logits",
    type=Logits(),
    default="all",
    show_default=True,
    help="How many of each answer's log-probabilities are kept, the largest first; 0 is enough for own answers.",
)
def trace(run: str, **o: Any) -> None:
    """Let every exit of a saved RUN answer each image of a source, and keep the answers in a folder of parquet files.

    tune, evaluate and compare read it: --traces FOLDER. If it is interrupted, the same command goes on.
    """
    require_runs(run, images=False, **o | {"data": None})  # which may be one file, too
    from ptee.scale.trace import record

    with _goes_on(o["overwrite"]):
        found = record(run, logits=o["logits"], log=click.echo, word=as_option, **{name: o[name] for name in OF_BOTH})
    either = "--max-drop 0.01, or --max-fidelity-drop 0.01, which needs no labels"
    target = either if found.labelled else "--max-fidelity-drop 0.01"
    click.echo(f"Choose thresholds by them: ptee tune {quoted(run)} --traces {quoted(found.folders[0])} {target}")


@command(short_help="Keep what the heads read of very many images.")
@click.argument("run", type=RunName())
@in_groups(SOURCE, ENGINE, INTO)
@option(
    "--limit",
    type=Real(0, min_open=True),
    default=32,
    show_default=True,
    metavar="GIB",
    help="What the folder may take, in GiB.",
)
def cache(run: str, **o: Any) -> None:
    """Run the backbone once over a source, and keep what the heads of a saved RUN read of it in a folder of parquet files.

    The size is said first. In Python, ptee.train(model, ptee.open_cache(FOLDER)) trains on it. If it is interrupted, the same
    command goes on.
    """
    require_runs(run, images=False, **o | {"data": None})  # which may be one file, too
    from ptee.scale.cache import cache as write

    with _goes_on(o["overwrite"]):
        write(run, limit=int(o["limit"] * 2**30), log=click.echo, word=as_option, **{name: o[name] for name in OF_BOTH})
    begin = f"model = ptee.load({run!r}); model.off = []; model.confidence = 'learned'"
    train = f"ptee.train(model, ptee.open_cache({str(o['out'])!r})); model.save_pretrained('trained')"
    click.echo(f"Train on it in Python, and choose thresholds afterwards (ptee tune trained): {begin}; {train}")
