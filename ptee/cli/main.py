"""The entrance: run a command, and say in one line what went wrong. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from ptee import __version__
from ptee._common.errors import Argument, Interrupted, PteeError, called_here, ended_worker, ran_out_of_memory, unknown
from ptee._common.files import is_folder
from ptee._common.process import lead_nowhere, ready_streams, unwritable
from ptee._common.text import one_line, with_run

GOING_ON = ("sweep", "trace", "cache")  # commands that keep what is whole, if they are not to begin anew
EXAMPLES = {  # of all commands that do not run without a word more
    "advise": "resnet50",
    "evaluate": "RUN",
    "tune": "RUN --max-drop 0.01",
    "compare": "RUN",
    "report": "RUN",
    "export": "RUN --out exported",
    "serve": "RUN --local",
    "trace": "RUN --data FOLDER --out traces",
    "cache": "RUN --data FOLDER --out cache",
    "sweep": "--over seed=0,1,2 --model resnet50 --data FOLDER --out runs/sweep",
    "plot": "RUN --out curve.html",
}
WITHOUT_IMAGES = ("plan", "advise")  # these write nothing, either
MEASURING = ("plan", "advise", "evaluate", "compare", "bench")  # commands that print what they found
KEPT = {"--save", "--csv", "--html"}  # options by which these write


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Status 2: the user can mend it; 1: ptee failed; 130: interrupted; 141: nobody reads the output."""
    words = sys.argv[1:] if arguments is None else arguments
    ready_streams()
    if _is_a_further_process(words):
        lead_nowhere()
    warnings.simplefilter("ignore")  # libraries warn about their own future; ptee says what matters in its own words
    try:
        from ptee.cli.commands import add_commands

        add_commands(cli)
        status = cli.main(words, prog_name="ptee", standalone_mode=False) or 0
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as why:
        status = _failed(why.__cause__ if isinstance(why, _NotForClick) and why.__cause__ else why, words)
    sys.exit(status)


def _is_a_further_process(words: list[str]) -> bool:
    """Whether others train together with this one, of which only the first prints, as under `accelerate launch`."""
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()
    return "augment" in words[:1] and launched and os.environ["RANK"].isdecimal() and int(os.environ["RANK"]) > 0


def _full_output() -> OSError | None:
    """Why standard output cannot be written, if it cannot."""
    try:
        print(flush=True)
    except OSError as why:
        lead_nowhere()
        return why
    return None


def _failed(error: BaseException, words: list[str]) -> int:
    """Print an error in one line. Gives the exit status."""
    error = ended_worker(error) or error
    if isinstance(error, KeyboardInterrupt | click.Abort):
        message, status = _interrupted(words), 130
        if isinstance(error, Interrupted):
            said = str(error)
            message = f"Interrupted: {said[:1].lower()}{said[1:]}"
    elif isinstance(error, PteeError):
        message, status = _worded(error, words), 2
    elif isinstance(error, click.NoSuchOption) and (advice := _as_setting(error)):
        message, status = _about_run(f"{error.option_name} is no option of this command. {advice}.", words), 2
    elif isinstance(error, click.UsageError) and (model := _bare_model(error)):
        message, status = f"The word {model} has no option before it. Did you mean --model {model}?", 2
    elif isinstance(error, click.MissingParameter) and words and words[0] in EXAMPLES:
        example = f"ptee {words[0]} {EXAMPLES[words[0]]}"
        message, status = f"{error.format_message()} Such as: {with_run(_about_run(example, words), 'runs/r50')}", 2
    elif isinstance(error, click.ClickException):
        message, status = error.format_message(), 2
    elif ran_out_of_memory(error):
        message, status = "The device ran out of memory. Give a smaller --batch-size, or --device cpu.", 2
    elif isinstance(error, OSError) and (reason := _full_output()):
        message, status = unwritable(reason)
    else:
        name = type(error).__name__
        message, status = f"ptee failed: {name}: {error}. PTEE_DEBUG=1 shows where; please report it.", 1
    if status != 130 and os.environ.get("PTEE_DEBUG"):
        traceback.print_exception(error)
    return _say(message, status)


def _interrupted(words: list[str]) -> str:
    """What Ctrl-C left, and what to type, where the command does not say it itself."""
    name = words[0] if words else ""
    if name in GOING_ON and "--overwrite" not in words:
        return "Interrupted. The same command goes on."
    if name in MEASURING and KEPT.isdisjoint(word.partition("=")[0] for word in words):
        return "Interrupted: what was measured is lost, and no file was changed. The same command begins again."
    if name == "export":
        return "Interrupted: nothing was written. The same command begins again."
    if name == "augment":  # before an epoch was complete; later the training says what it kept
        if "--resume" in words:
            return "Interrupted: what was trained before is kept. The same command goes on."
        as_it_was = " What was in the run's folder is as it was." * ("--overwrite" in words)
        return f"Interrupted: no epoch of the exits was complete, so nothing was kept.{as_it_was}"
    return "Interrupted."  # what it wrote so far may be whole


def _say(message: str, status: int) -> int:
    """Print one line on standard error, and give the status on."""
    try:
        click.echo(one_line(message), err=True)
    except OSError:
        lead_nowhere("stderr")
    return status


def _worded(error: PteeError, words: list[str]) -> str:
    """The message, with options of the command that was typed in place of Python's arguments."""
    from ptee.cli.options import as_option

    command = cli.commands.get(words[0]) if words else None
    message = error.worded(lambda argument: as_option(argument, command))
    if "Original Traceback" in message:  # of a process that loads images: its last line says it all
        return message.strip().splitlines()[-1].partition(": ")[2]
    return _about_run(message, words)


def _about_run(message: str, words: list[str]) -> str:
    """The message with the name of the run that was typed, if it is one."""
    from ptee.model.run_files import is_run

    given = words[1:] if "RUN" in message else []
    runs = {word for word in given if is_folder(Path(word)) and is_run(Path(word))}
    return with_run(message, runs.pop()) if len(runs) == 1 else message


def _as_setting(error: click.NoSuchOption) -> str:
    """What to type in place of an unknown option that is called like a setting, in a sentence; empty if none is."""
    from ptee.cli.options import ONLY_EXITS, SETTINGS, as_option
    from ptee.pipeline.recipe import path_of
    from ptee.tuning.config import MEASURE_AT, SET_CONFIDENCE, SET_THRESHOLD

    command = error.ctx.command if error.ctx else None
    name = error.option_name.lstrip("-").replace("-", "_")
    options = {option for parameter in command.params for option in parameter.opts} if command else set()
    if name == "set" and "--over" in options:
        return "Give --over NAME=VALUE: one value for all runs, or several separated by commas"
    if command and command.name == "tune" and name == "threshold":
        return (
            f"tune chooses thresholds. One of your own is measured by {MEASURE_AT}, and kept in Python: {SET_THRESHOLD}"
        )
    if command and command.name == "serve" and name == "threshold":
        return (
            f"A request may bring its own, as /predict?threshold=0.7. That of a run is set in Python: {SET_THRESHOLD}"
        )
    if command and command.name in WITHOUT_IMAGES and name in ("data", "data_root", "classes"):
        return f"ptee {command.name} reads no images. ptee augment does"
    if command and command.name in WITHOUT_IMAGES and name in ("out", "overwrite", "resume"):
        return f"ptee {command.name} writes nothing. ptee augment does"
    if command and command.name == "advise" and name == "model":
        return "The model is the first word: ptee advise NAME"
    if command and command.name == "sweep" and name == "recipe":
        return "The recipe is the first word: ptee sweep RECIPE --over NAME=VALUE,VALUE"
    if not options & {"--set", "--over"}:
        of_run = command is not None and name == "confidence" and any(p.name == "run" for p in command.params)
        return f"That of a run is set in Python: {SET_CONFIDENCE}" if of_run else ""
    name = called_here(name)
    try:
        path = path_of(name)
    except PteeError:
        return ""
    if command and command.name in ONLY_EXITS and not path.startswith("exits."):
        return ""
    is_flag = isinstance(SETTINGS[path].default, bool)
    return f"Give {as_option(Argument(name, 'true' if is_flag else 'VALUE'), command)}"


def _bare_model(error: click.UsageError) -> str:
    """The word that was typed without --model before it, where that is missing and nothing else was; else empty."""
    extra = re.fullmatch(r"Got unexpected extra argument \(([a-zA-Z]\S*)\)", error.message)
    lacks_model = error.ctx is not None and error.ctx.params.get("model", "") is None
    return extra[1] if extra and lacks_model and not Path(extra[1]).exists() else ""


class _NotForClick(Exception):  # noqa: N818 - the error is its cause
    """click would end the program without a word on a BrokenPipeError, and without what was kept on `Interrupted`."""


@contextmanager
def _past_click() -> Iterator[None]:
    try:
        yield
    except (BrokenPipeError, Interrupted) as why:
        raise _NotForClick from why


class _InOrder(click.Group):
    """Lists commands in the order in which they were added."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Called by click. Prints the help."""
        with _past_click():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Called by click. Runs the command."""
        with _past_click():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Called by click, which would not say which commands there are, nor that a text is empty."""
        if args and args[0][:1] != "-" and args[0] not in self.commands and not ctx.resilient_parsing:
            raise unknown("command", args[0], self.commands)
        for before, word in pairwise(args):
            option, equals, value = word.partition("=")
            if not (value if equals and option.startswith("--") else word):
                text = f"The value after {option or before} is empty, as that of a shell's variable that is not set. Give one."
                raise PteeError(text)
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
    ptee augment                            a small network on handwritten digits, to see how it works
    ptee augment --model resnet50 --data FOLDER --exits pareto --out runs/r50
    ptee evaluate runs/r50 --data FOLDER --threshold 0.7
    ptee tune runs/r50 --max-drop 0.01
    ptee compare runs/r50 runs/other --static resnet18
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
