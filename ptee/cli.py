"""The command: parse words, call one function, print. Heavy libraries are imported when a command needs them."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptee import __version__, runs
from ptee.errors import DataError, PteeError, RunError
from ptee.options import BACKBONE, DATA, DEVICE, JSON, PLACE, SPEED, THRESHOLD, WISH, Numbers

if TYPE_CHECKING:
    from ptee.backbones import Backbone
    from ptee.choosing import Choice
    from ptee.data import Data
    from ptee.front import FrontHead
    from ptee.labels import LabelMap
    from ptee.model import EarlyExitModel
    from ptee.thresholds import Solution, Wish
    from ptee.training import Epoch, History
    from ptee.tuning import Unseen

HEAD, EPOCHS, GATE_SHARE = "pool", 5, 0.1  # where nothing else is said
CHECKPOINT = "checkpoint.safetensors"
LEARNING = (  # options that are arguments of `train` as they are
    *("temperature", "loss", "cost_weight", "reach", "batch_size", "lr", "weight_decay", "seed", "patience"),
    *("precision", "schedule", "augment", "shift", "mixup"),
)
PLACES = ("pareto", "fine", "golden", "linear", "quadratic")


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Status 2: the user can mend it; 1: ptee failed; 130: interrupted."""
    words = sys.argv[1:] if arguments is None else arguments
    if int(os.environ.get("RANK", 0)):  # under `accelerate launch` the first process speaks for all
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    warnings.simplefilter("ignore")  # libraries warn about their own future; ptee says what matters in its own words
    status = 0
    try:
        status = cli.main(words, prog_name="ptee", standalone_mode=False) or 0
    except PteeError as why:
        status = _failed(_without_worker_traceback(str(why)), 2, why)
    except click.ClickException as why:
        status = _failed(why.format_message(), 2, why)
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
    "--recipe",
    help="What to take for options that are not given: ptee (learned heads, each for itself, and gates), pteenet or eenet (the "
    "papers').",
)
@click.option(
    "--targets",
    help="labels, pseudo (the backbone's answers) or soft (its probabilities). Default: labels where there are any.",
)
@click.option("--temperature", type=float, help="Of --targets soft, for --loss each: such as 2. Default: 1.")
@click.option("--loss", help="v1, v2, mc or cost: the exits learn together; each: every exit for itself. Default: v1.")
@click.option(
    "--cost-weight", type=float, default=1.0, show_default=True, help="Lambda: the price of cost in the loss."
)
@click.option("--reach", is_flag=True, help="Weight each image at an exit by the chance to get there; for --loss each.")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: 5; 30 on the digits.")
@click.option(
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Run the backbone once and keep what the heads read, or run it in every epoch.",
)
@click.option(
    "--augment",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Views of each training image: itself, its mirror image, then random crops.",
)
@click.option("--mirror/--no-mirror", default=True, help="Mirror images among the views; never of digits or signs.")
@click.option(
    "--shift",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Move feature maps by up to so many pixels of the input.",
)
@click.option(
    "--mixup",
    type=float,
    default=0.0,
    show_default=True,
    help="Mix two samples' features and targets, weights from Beta(X, X); for --loss each.",
)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate of Adam.")
@click.option("--schedule", help="Of the learning rate: constant or cosine. Default: constant.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True, help="Of Adam.")
@click.option(
    "--gate",
    help="Fit gates after the heads, which decide who leaves: agrees (is this answer the backbone's?), right (is it the "
    "label?) or best (is it the label, or would no later answer be?).",
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
    with _threads(tiny=o["model"] is None):
        _augment(o)


def _augment(o: dict[str, Any]) -> None:
    from dataclasses import replace

    from ptee.devices import resolve_device
    from ptee.recipes import followed
    from ptee.thresholds import require_labels, require_reachable

    o = followed(o)
    device = resolve_device(o["device"])
    out = o["out"] or Path("runs") / _file_name(o["model"] or "digits")
    _check_out(out, o)
    _check_settings(o)
    _note_threshold(o["threshold"])
    wish = _wish(o)
    backbone, data, targets = _digits(o) if o["model"] is None else _model_and_data(o)
    o["epochs"] = o["epochs"] or EPOCHS
    choice = _choice(backbone, data.train, device, o)
    model = _build(backbone, o)
    if choice:
        model.plan = replace(model.plan, placement="exits auto")
    if o["threshold"]:
        model.threshold = o["threshold"]
    if wish:
        require_reachable(wish, model.least_cost("answers" if o["gate"] else None))
        require_labels(wish, labelled=data.validation[0][1] >= 0)
    click.echo(f"{data.summary}\n\n{model.plan}\n")
    if backbone.source is None:
        click.echo(
            "The backbone's weights are random, so the command cannot load this run again. Give --weights FILE.\n"
        )
    front = getattr(model.heads[0], "origin", None)  # of a network in front
    if front and front.source is None:
        click.echo(
            "The front network's weights are random, and nothing trains them: its answers are worth nothing, and the command "
            "cannot load this run again. Give --front-weights FILE.\n"
        )
    o["mirror"] = o["mirror"] and data.mirror
    data, for_gates = _split(data, o)
    history = _train(model, data, targets, device, out, o)
    if int(os.environ.get("RANK", 0)):  # under `accelerate launch` the first process goes on alone
        return
    again = all(network.source is not None for network in (backbone, front) if network)
    if history.interrupted:
        _interrupted(history, out, again)
    fits = {} if for_gates is None else {"gates": _fit_gates(model, for_gates, device, o)}
    fits |= {"choice": choice.to_dict()} if choice else {}
    root = str(Path(o["data_root"] or "").resolve()) if data.split["kind"] == "torchvision" else ""
    model.results = {"data": {"source": _place(data), "root": root, "split": data.split}} | fits
    _clear(out)
    model.save_pretrained(out)  # whatever becomes of the measurement, which may take long
    try:
        part, about, found = data.validation, data.summary, None
        if wish:
            part, about, found = _tuned(model, data, part, about, wish, device, o)
            runs.update(out, threshold=model.threshold, off=list(model.off), results=model.results)
        model.results |= _evaluate(model, part, device, o, about)
        _say_how_kept(model, found)
    except KeyboardInterrupt:
        hint = f" ptee evaluate {out} measures it." if again else ""
        click.echo(f"Interrupted: the run in {out} is complete but for its results.{hint}", err=True)
        sys.exit(130)
    _save(model, history, out)
    hint = f" Another threshold: ptee evaluate {out} --threshold 0.7" if again else ""
    click.echo(f"\nSaved in {out}.{hint}")


@cli.command()
@BACKBONE
@PLACE
@JSON
def plan(as_json: bool, **o: Any) -> None:
    """Show where exits would stand and what they would cost, without training."""
    from ptee.plans import make_plan

    backbone = _backbone(o)
    backbone.module.requires_grad_(False).eval()
    found = make_plan(
        backbone,
        _exits(o["exits"], backbone),
        o["num_exits"],
        _heads(o),
        o["cost_convention"],
        head_budget=o["head_budget"],
        front=_front(o, backbone),
    )
    click.echo(runs.to_json(found.to_dict()) if as_json else str(found))


@cli.command()
@click.argument("run")
@click.option("--weights", type=click.Path(path_type=Path), help="The backbone's weights, if they were moved.")
@DATA
@THRESHOLD
@SPEED
@DEVICE
@JSON
def evaluate(run: str, as_json: bool, **o: Any) -> None:
    """Measure a saved RUN (a folder, or user/repo on the hub) again, at any threshold."""
    from ptee.defaults import INPUT_SIZE
    from ptee.devices import resolve_device

    device = resolve_device(o["device"])
    _note_threshold(o["threshold"])
    model, data, part, words, accuracy = _run_and_data(run, o)
    part, words = _left_by_tuning(model, data, part, words, o["seed"])
    click.echo(f"{words} {accuracy}", err=as_json)
    with _threads(tiny=model.origin.input.input_size == INPUT_SIZE):
        results = _evaluate(model, part, device, o, words, quiet=as_json)
    if as_json:
        click.echo(runs.to_json(results))


@cli.command()
@click.argument("run")
@click.option("--weights", type=click.Path(path_type=Path), help="The backbone's weights, if they were moved.")
@DATA
@WISH
@SPEED
@DEVICE
@JSON
def tune(run: str, as_json: bool, **o: Any) -> None:
    """Choose the thresholds of a saved RUN by a wish, measure it on other images, and keep them in the run.

    Which exits are on is chosen anew, too. Give one of --max-drop, --max-fidelity-drop and --max-cost.
    """
    from ptee.defaults import INPUT_SIZE
    from ptee.devices import resolve_device
    from ptee.thresholds import Wish

    o["threshold"] = None
    device, wish = resolve_device(o["device"]), _wish(o) or Wish.only({})
    if not Path(run).is_dir():
        raise RunError(f"There is no folder {run}, and thresholds are written into one. Give a run on this disk.")
    model, data, part, words, accuracy = _run_and_data(run, o)
    model.results = dict(model.results or {})
    click.echo(f"{words} {accuracy}", err=as_json)
    with _threads(tiny=model.origin.input.input_size == INPUT_SIZE):
        part, words, found = _tuned(model, data, part, words, wish, device, o, quiet=as_json)
        model.results |= _evaluate(model, part, device, o, words, quiet=as_json)
    runs.update(Path(run), threshold=model.threshold, off=list(model.off), results=model.results)
    if as_json:
        click.echo(runs.to_json(model.results))
        return
    _say_how_kept(model, found)
    click.echo(f"\nThe thresholds are kept in {run}.")


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
    type=Numbers(),
    default="0,0.005,0.01,0.02",
    show_default=True,
    help="Of accuracy (without labels: fidelity) that are allowed; 0.01 is one point.",
)
@click.option("--weights", type=click.Path(path_type=Path), help="The backbone's weights, if they were moved.")
@DATA
@DEVICE
@JSON
def compare(run: tuple[str, ...], as_json: bool, **o: Any) -> None:
    """Compare saved RUNs of one backbone with each other, with smaller networks and with a cut-off backbone.

    Thresholds are chosen on the calibration images; everything is reported on others.
    """
    from ptee.comparison import checked_drops, named_networks, names_of
    from ptee.comparison import compare as measure
    from ptee.defaults import INPUT_SIZE
    from ptee.devices import resolve_device
    from ptee.tuning import parts_for_all

    device, drops = resolve_device(o["device"]), checked_drops(o["drops"])
    static = named_networks(o["static"])
    opened = [_opened(name, o) for name in run]
    parts = parts_for_all([unseen for _, unseen, _ in opened])
    model, first, accuracy = opened[0]
    about = f"{first.data.source}. {parts.words}"
    with _threads(tiny=model.origin.input.input_size == INPUT_SIZE):
        found = measure(
            dict(zip(names_of(run), (model for model, *_ in opened), strict=True)),
            parts.calibration,
            parts.report,
            static=static,
            drops=drops,
            batch_size=o["batch_size"],
            num_workers=o["workers"],
            device=device,
            about=about,
        )
    click.echo(f"{about} {accuracy}", err=as_json)
    click.echo(runs.to_json(found.to_dict()) if as_json else f"\n{found}")


@cli.command()
@BACKBONE
@PLACE
@click.option(
    "--batch-sizes",
    type=Numbers(int),
    default="1,32",
    show_default=True,
    help="Images per batch, for each measurement.",
)
@click.option(
    "--training",
    is_flag=True,
    help="Time training instead, on random images: with the cache, and with the backbone in each epoch.",
)
@click.option("--images", type=click.IntRange(min=2), default=512, show_default=True, help="For --training.")
@click.option("--epochs", type=click.IntRange(min=1), default=20, show_default=True, help="For --training.")
@click.option(
    "--rounds", type=click.IntRange(min=3), help="Each is timed so often, in turns. Default: 7; 3 for --training."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: torch's own choice.")
@DEVICE
@JSON
def bench(as_json: bool, **o: Any) -> None:
    """Time a model with untrained exits beside its bare backbone: what leaving saves, what staying costs.

    With --training: what training costs with and without the cache.
    """
    import torch

    from ptee.benchmark import bench as measure
    from ptee.devices import resolve_device
    from ptee.training_speed import bench_training

    device = resolve_device(o["device"])
    if o["threads"]:
        torch.set_num_threads(o["threads"])
    model = _build(_backbone(o), o).to(device)
    found: Any = (
        bench_training(model, images=o["images"], epochs=o["epochs"], rounds=o["rounds"] or 3)
        if o["training"]
        else measure(model, o["batch_sizes"], rounds=o["rounds"] or 7)
    )
    click.echo(runs.to_json(found.to_dict()) if as_json else str(found))


@cli.command()
@click.argument("family", nargs=-1)
@JSON
def zoo(family: tuple[str, ...], as_json: bool) -> None:
    """Give every architecture family of timm and torchvision exits, and check them: minutes to an hour.

    FAMILY is a library's module of models, such as resnet or torchvision/resnet; without any, all of them.
    """
    from ptee.tables import line
    from ptee.zoo import TITLE, WIDTHS, check_all, families, summary

    verdicts = []
    if not as_json:
        click.echo(line(TITLE, WIDTHS))
    for verdict in check_all(families(family)):
        verdicts.append(verdict)
        if not as_json:
            click.echo(line(verdict.row, WIDTHS))
    click.echo(runs.to_json([v.to_dict() for v in verdicts]) if as_json else f"\n{summary(verdicts)}")


# ---------------------------------------------------------------------------------------------------- steps


def _threads(tiny: bool) -> AbstractContextManager[None]:
    """One CPU thread for a network as tiny as that on the digits, else as many as torch takes."""
    from ptee.devices import one_thread

    return one_thread() if tiny else nullcontext()


def _backbone(o: dict[str, Any]) -> Backbone:
    from ptee.backbones import load_backbone

    if o["model"] is None:
        raise click.UsageError("Which model? Give --model NAME, such as --model resnet50.")
    return load_backbone(
        o["model"],
        weights=o["weights"],
        pretrained=o["pretrained"],
        num_classes=o["num_classes"],
        input_size=o["input_size"],
        mean=o["mean"],
        std=o["std"],
        model_args=dict(o["model_args"]),
    )


def _exits(text: str | None, backbone: Backbone) -> Any:
    """A placement, fractions, or modules: what the words between the commas are."""
    from ptee.cuts import survey
    from ptee.errors import unknown
    from ptee.front import INPUT
    from ptee.placement import CHOSEN, PLACEMENTS, needs_images

    parts = [part.strip() for part in (text or "pareto").split(",") if part.strip()]
    first = [part for part in parts[:1] if part == INPUT]
    try:
        return [*first, *(float(part) for part in parts[len(first) :])]
    except ValueError:
        pass
    names = [name for name, _ in backbone.module.named_modules() if name]
    if len(parts) != 1 or parts[0] in (INPUT, *names):
        return parts
    if parts[0] == CHOSEN:
        raise needs_images()
    if parts[0] not in PLACEMENTS:
        cuts = survey(backbone.module.eval(), backbone.input.input_size).cuts
        blocks = [name for name in cuts if any(other.startswith(f"{name}.") for other in names)]
        raise unknown("placement or module", parts[0], [CHOSEN, *cuts], first=[*PLACEMENTS, *blocks][:12])
    return parts[0]


def _choice(backbone: Backbone, images: Any, device: Any, o: dict[str, Any]) -> Choice | None:
    """With --exits auto: the exits are chosen, and named from here on. None: they are placed as --exits says."""
    from ptee.choosing import choose_exits
    from ptee.placement import CHOSEN

    if o["exits"] != CHOSEN:
        return None
    drops = [o[kind] for kind in ("max_fidelity_drop", "max_drop") if o[kind] is not None]
    one: Any = [given[0] if given and len(given) == 1 else given for given in (_heads(o), o["head_budget"])]
    found = choose_exits(
        backbone, images, num_exits=o["num_exits"], head=one[0], head_budget=one[1], seed=o["seed"], device=device,
        num_workers=o["workers"], **({"max_drop": drops[0]} if drops else {}),
    )  # fmt: skip
    click.echo(f"{found}\n")
    o["exits"], o["num_exits"] = ",".join(found.modules), None
    return found


def _build(backbone: Backbone, o: dict[str, Any]) -> EarlyExitModel:
    import torch

    from ptee.model import build

    torch.manual_seed(o.get("seed", 0))
    return build(
        backbone,
        exits=_exits(o["exits"], backbone),
        num_exits=o["num_exits"],
        head=_heads(o),
        convention=o["cost_convention"],
        head_budget=o["head_budget"],
        front=_front(o, backbone),
    )


def _front(o: dict[str, Any], backbone: Backbone) -> FrontHead | str | None:
    """The network in front of the backbone, `auto`, or None."""
    from ptee.front import named_front
    from ptee.heads import AUTO

    given = {key: o[f"front_{key}"] for key in ("weights", "mean", "std") if o[f"front_{key}"]}
    if o["front"] in (None, AUTO):
        for key in given:
            raise PteeError(
                f"--front-{key} says something of a network that --front does not name. Name it, or leave it out."
            )
    return named_front(o["front"], backbone, pretrained=o["pretrained"], **given)


def _heads(o: dict[str, Any]) -> list[str]:
    return [name.strip() for name in (o["head"] or HEAD).split(",")]


def _open(source: str, backbone: Backbone, o: dict[str, Any], named: bool = False) -> tuple[Data, LabelMap]:
    """The data as this backbone takes it, with its labels; folders are not looked for where it is `named`."""
    from dataclasses import replace

    from ptee.data import image_transform, open_data, open_named
    from ptee.labels import map_labels, with_labels

    view = backbone.input
    transform = image_transform(view.input_size, view.mean, view.std, view.interpolation)
    find = open_named if named else open_data
    data = find(source, transform=transform, root=o["data_root"] and Path(o["data_root"]), seed=o.get("seed", 0))
    labels = map_labels(data.class_names, backbone.num_classes)
    parts: dict[str, Any] = {n: with_labels(getattr(data, n), labels) for n in ("train", "calibration", "validation")}
    return replace(data, **parts), labels


def _run_and_data(run: str, o: dict[str, Any]) -> tuple[EarlyExitModel, Data, Any, str, str]:
    """A saved run, its data or others, what of them its heads have not seen, and two sentences about them."""
    from ptee.model import load

    model = load(run, _moved_backbone(run, o["weights"]))
    recorded = _recorded_data(run, model)
    source = o["data"] or recorded.get("source")
    if not source:
        raise DataError(f"{run} does not say which data it was measured on. Give --data FOLDER.")
    o["data_root"] = o["data_root"] or recorded.get("root") or None
    o["seed"] = recorded.get("seed", 0)
    named = not o["data"] and not Path(source).is_absolute()  # of folders the whole path is recorded
    data, labels = _open(source, model.origin, o, named)
    part, words = _unseen(data, recorded, run)
    accuracy = labels.reason if labels.indices is not None else f"{labels.reason} So there is no accuracy."
    return model, data, part, words, accuracy


def _opened(run: str, o: dict[str, Any]) -> tuple[EarlyExitModel, Unseen, str]:
    """A saved run, its data, and a sentence about its labels."""
    from ptee.tuning import Unseen

    own = dict(o)
    model, data, part, _, accuracy = _run_and_data(run, own)
    return model, Unseen(run, data, part, own["seed"]), accuracy


def _wish(o: dict[str, Any]) -> Wish | None:
    """What thresholds are to be chosen by; None where nothing is asked for."""
    from ptee.thresholds import WISHES, Wish

    given = {kind: o[kind] for kind in WISHES}
    options = ", ".join(f"--{kind.replace('_', '-')}" for kind in WISHES)
    if any(limit is not None for limit in given.values()):
        if o["threshold"]:
            raise click.UsageError(f"--threshold gives T, {options} choose it: give one or the other.")
        return Wish.only(given)
    if o["one_threshold"]:
        raise click.UsageError(f"--one-threshold needs one of {options}.")
    return None


def _tuned(
    model: EarlyExitModel, data: Data, unseen: Any, about: str, wish: Wish, device: Any, o: dict[str, Any],
    quiet: bool = False,
) -> tuple[Any, str, Solution]:  # fmt: skip
    """Set the thresholds; and the images to report on, in a sentence too, and what was found."""
    from ptee.tuning import parts_for_tuning, tune

    parts = parts_for_tuning(data, unseen, o["seed"])
    found = tune(
        model, parts.calibration, **{wish.kind: wish.limit}, one=o["one_threshold"], batch_size=o["batch_size"],
        num_workers=o["workers"], device=device,
    )  # fmt: skip
    model.results = (model.results or {}) | {
        "tuning": {"source": _place(data), "images": parts.words} | found.to_dict()
    }
    click.echo(f"\n{parts.words}\n{found}", err=quiet)
    return parts.report, f"{about} {parts.words}", found


def _say_how_kept(model: EarlyExitModel, found: Solution | None) -> None:
    if found is not None and model.results:
        from ptee.tuning import kept

        click.echo(kept(found, model.results))


def _left_by_tuning(model: EarlyExitModel, data: Data, part: Any, words: str, seed: int) -> tuple[Any, str]:
    """Of images that a run's thresholds were chosen on, only those that were left; and a sentence about them."""
    from ptee.tuning import parts_for_tuning

    tuned = (model.results or {}).get("tuning")
    if not isinstance(tuned, dict) or tuned.get("source") != _place(data):
        return part, words
    parts = parts_for_tuning(data, part, seed)
    return parts.report, f"{words} {parts.words}"


def _place(data: Data) -> str:
    """A folder as it is found from anywhere; a name as it is."""
    folder = data.split["kind"] in ("folder", "tar")
    return str(Path(data.source).expanduser().resolve()) if folder else data.source


def _unseen(data: Data, recorded: dict[str, Any], run: str) -> tuple[Any, str]:
    """The images to measure a run on, none of which its heads were trained on; and what they are, in a sentence."""
    from torch.utils.data import ConcatDataset

    here, files = _place(data) == recorded.get("source"), recorded.get("files_sha256")
    same = here if files is None else files == data.split.get("files_sha256")
    if same or "validation" in data.split["parts"]:
        return data.validation, data.summary
    if here:  # with other files, others are drawn
        raise DataError(
            f"{data.source} has other files than when {run} was trained, so those that it has not seen cannot be told. "
            "Put them back as they were, or give other images: --data FOLDER."
        )
    every: Any = ConcatDataset([data.train, data.calibration, data.validation])
    return every, f"{data.source}: all {len(every):,} images."


def _recorded_data(run: str, model: EarlyExitModel) -> dict[str, Any]:
    """source, root, seed and files_sha256 of what a run was measured on; nothing where a stranger recorded them."""
    found = (model.results or {}).get("data")
    if not Path(run).is_dir() or not isinstance(found, dict):
        return {}
    split: Any = found.get("split") if isinstance(found.get("split"), dict) else {}
    said = {key: found.get(key) for key in ("source", "root")}
    said |= {key: split.get(key) for key in ("seed", "files_sha256")}
    return {key: value for key, value in said.items() if isinstance(value, int if key == "seed" else str)}


def _moved_backbone(run: str, weights: Path | None) -> Any:
    """The backbone of a run, with its weights from another place; None to look where the run says."""
    from ptee.backbones import rebuild

    if weights is None:
        return None
    source = runs.read(run).source
    if source is None:
        raise RunError(f"{run} cannot be evaluated from the command: its backbone is a Python module. Use ptee.load.")
    return rebuild(source | {"weights": {"file": str(weights)}}).module


def _model_and_data(o: dict[str, Any]) -> tuple[Backbone, Data, str]:
    from ptee.backbones import IMAGENET
    from ptee.defaults import imagenette

    backbone = _backbone(o)
    source, targets = o["data"], o["targets"]
    if source is None:
        if backbone.label_space != IMAGENET:
            raise DataError(
                f"No data for {backbone.name}, which is no ImageNet-1k classifier. Give images: --data FOLDER."
            )
        source, targets = str(imagenette()), targets or "pseudo"
        click.echo(
            "No --data: these exits see ten classes only (Imagenette). Give images like yours with --data FOLDER."
        )
    data, labels = _open(source, backbone, o)
    if labels.indices is None and targets == "labels":
        raise DataError(f"{labels.reason} Use --targets pseudo.")
    if labels.indices is None and o["gate"] in ("right", "best"):
        raise DataError(f"{labels.reason} Use --gate agrees.")
    fallback = (
        ""
        if labels.indices is not None or targets
        else " The heads learn the backbone's own answers (--targets pseudo)."
    )
    click.echo(f"{labels.reason}{fallback}")
    return backbone, data, targets or ("labels" if labels.indices is not None else "pseudo")


def _digits(o: dict[str, Any]) -> tuple[Backbone, Data, str]:
    from ptee import defaults
    from ptee.backbones import load_backbone

    own = {"--weights": "weights", "--num-classes": "num_classes", "--model-arg": "model_args", "--data": "data"}
    own |= {"--input-size": "input_size", "--mean": "mean", "--std": "std", "--data-root": "data_root"}
    for option, key in own.items():
        if o[key]:
            raise click.UsageError(f"{option} needs --model NAME.")
    o["head"], o["epochs"] = o["head"] or defaults.DIGITS_HEAD, o["epochs"] or defaults.DIGITS_EPOCHS
    if o["exits"] in PLACES:
        o["num_exits"] = o["num_exits"] or defaults.DIGITS_EXITS
    args: dict[str, Any] = {"input_size": defaults.INPUT_SIZE, "mean": defaults.MEAN, "std": defaults.STD}
    args["model_args"] = defaults.MODEL_ARGS
    always = o | {"seed": defaults.SEED}  # the network has seen the training images of this split
    untrained = load_backbone(defaults.MODEL, pretrained=False, **args)
    data, _ = _open("digits", untrained, always, named=True)
    file = defaults.digits_weights(data)
    if not file.is_file():
        click.echo("Training a small network on scikit-learn's handwritten digits, once.")
        defaults.train_digits_network(data, file)
    return load_backbone(defaults.MODEL, weights=file, **args), data, o["targets"] or "labels"


def _split(data: Data, o: dict[str, Any]) -> tuple[Data, Any]:
    """The data whose training images are for the heads, and the images for the gates; None where there are none."""
    from dataclasses import replace

    from ptee.decision import hold_out

    if not o["gate"]:
        return data, None
    every: Any = data.train
    for_heads, for_gates = hold_out(every, o["gate_share"] or GATE_SHARE, o["seed"])
    click.echo(
        f"Of {len(every):,} training images the heads learn on {len(for_heads):,}, and the gates on the other {len(for_gates):,}, "
        f"drawn with seed {o['seed']}.\n"
    )
    return replace(data, train=for_heads), for_gates


def _fit_gates(model: EarlyExitModel, images: Any, device: Any, o: dict[str, Any]) -> dict[str, Any]:
    from ptee.decision import fit_gates

    fits = fit_gates(
        model, images, target=o["gate"], seed=o["seed"], batch_size=o["batch_size"], num_workers=o["workers"],
        device=device,
    )  # fmt: skip
    click.echo(f"\n{fits}")
    return fits.to_dict()


def _train(model: EarlyExitModel, data: Data, targets: str, device: Any, out: Path, o: dict[str, Any]) -> History:
    from ptee.training import train

    def say(epoch: Epoch) -> None:
        _clear(out)
        fidelity = " ".join(f"{f:.3f}" for f in epoch.fidelity[:-1])
        val = "" if epoch.val_loss is None else f"  held-out {epoch.val_loss:.4f}"
        click.echo(
            f"epoch {epoch.number}/{o['epochs']}  loss {epoch.loss:.4f}{val}  fidelity {fidelity}  {epoch.seconds:.0f} s"
        )

    history = train(
        model, data.train, data.calibration, targets=targets, mirror=o["mirror"], epochs=o["epochs"], device=device,
        num_workers=o["workers"], cache=o["cache"], checkpoint=out / CHECKPOINT, resume=o["resume"], on_epoch=say,
        **{key: o[key] for key in LEARNING},
    )  # fmt: skip
    if history.warning and not o["gate"]:  # whose exits are decided by gates, which are still to come
        click.echo(f"Warning: {history.warning}", err=True)
    return history


def _interrupted(history: History, out: Path, again: bool) -> None:
    if not history.epochs:
        raise click.Abort
    hint = " The same command with --resume goes on." if again else ""
    click.echo(f"Interrupted: {len(history.epochs)} complete epochs are kept in {out}.{hint}", err=True)
    sys.exit(130)


def _evaluate(
    model: EarlyExitModel, data: Any, device: Any, o: dict[str, Any], about: str, quiet: bool = False
) -> dict[str, Any]:
    from ptee.evaluation import evaluate as measure

    results = measure(
        model,
        data,
        threshold=o["threshold"],
        batch_size=o["batch_size"],
        num_workers=o["workers"],
        device=device,
        speed=o["speed"],
        about=about,
    )
    if not quiet:
        click.echo(f"\n{results}")
    return results.to_dict()


def _check_settings(o: dict[str, Any]) -> None:
    from ptee.decision import check_target
    from ptee.settings import Settings

    check_target(o["gate"])
    if o["gate_share"] and not o["gate"]:
        raise click.UsageError("--gate-share needs --gate, such as --gate agrees.")
    Settings(targets=o["targets"] or "labels", **{key: o[key] for key in LEARNING}).checked()


def _note_threshold(threshold: list[float] | None) -> None:
    """T is compared with a confidence between 0 and 1; a percentage keeps everybody in."""
    if threshold and min(threshold) > 1:
        click.echo("T above 1: nobody leaves.", err=True)
    elif threshold and threshold[0] <= 0:
        click.echo("T at or below 0: everybody leaves at exit 0.", err=True)


def _check_out(out: Path, o: dict[str, Any]) -> None:
    """A run is written into a new or empty folder; over an earlier one only if that is said."""
    runs.require_writable(out)
    run, training = runs.is_run(out), (out / CHECKPOINT).is_file()
    if o["resume"] and not training:
        raise RunError(f"There is no interrupted training in {out}. Leave out --resume, or give its folder with --out.")
    if o["resume"] or not out.is_dir() or not any(out.iterdir()):
        return
    if not (run or training):
        raise RunError(f"{out} holds something else than a run. Give a new folder with --out.")
    if not o["overwrite"]:
        command = "ptee augment " if o["model"] is None and o["out"] is None else ""
        found = f"an interrupted training: {command}--resume goes on with it" if training else "a run"
        raise RunError(f"{out} holds {found}. Give another folder with --out, or {command}--overwrite.")


def _clear(out: Path) -> None:
    """What an earlier run left must not be taken for this one's; but until an epoch is complete, nothing is lost."""
    for name in (runs.CONFIG, runs.HEADS, runs.METRICS):
        (out / name).unlink(missing_ok=True)


def _save(model: EarlyExitModel, history: History, out: Path) -> None:
    metrics = {"results": model.results, "plan": model.plan.to_dict(), "training": history.to_dict()}
    runs.write_json(out / runs.METRICS, metrics)
    model.save_pretrained(out)
    (out / CHECKPOINT).unlink(missing_ok=True)


def _file_name(model: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in model)
