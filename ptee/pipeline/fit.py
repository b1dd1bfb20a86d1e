"""`ptee augment`, step by step: data, plan, training, gates, thresholds, results, and the run that is saved.

`o` are the options of the command by name; `say` prints.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptee._common.devices import resolve_device
from ptee._common.errors import DataError, Interrupted, PteeError, RunError
from ptee.backbones.load import IMAGENET, Backbone, load_backbone
from ptee.data.labels import LabelMap
from ptee.data.splits import Data, Unseen
from ptee.evaluation.targets import Wish, checked_margin, remark, require_labels, require_reachable
from ptee.evaluation.tuning import kept
from ptee.exits.heads import AUTO
from ptee.exits.placement import CHOSEN, PLACEMENTS
from ptee.model import saving as runs
from ptee.model.early_exit import EarlyExitModel
from ptee.pipeline import asked, choosing, unreadable
from ptee.pipeline import demo as defaults
from ptee.pipeline.asked import Options, Say
from ptee.pipeline.choosing import Choice
from ptee.pipeline.measuring import measured, tuned
from ptee.pipeline.recipe import MAY_LOSE, NO_GATE, RECIPE, epochs_for, followed, shift_for
from ptee.training import calibration as decision
from ptee.training import trainer as training
from ptee.training.calibration import check_target, fit_gates, hang_unfitted_gates, hold_out
from ptee.training.config import Settings
from ptee.training.history import Epoch, History

EPOCHS, GATE_SHARE = 5, 0.1  # where nothing else is said
CHECKPOINT = "checkpoint.safetensors"
LEARNING = (  # options that are arguments of `train` as they are
    *("temperature", "loss", "cost_weight", "reach", "batch_size", "optimizer", "lr", "weight_decay", "seed"),
    *("patience", "precision", "schedule", "augment", "shift", "mixup"),
)


def augment(o: Options, say: Say) -> None:
    """Hang exits on a model, train their heads, measure, and save a run.

    Args:
        o: options of the command.
        say: prints.

    Raises:
        PteeError: if something that is asked for cannot be; where possible before the training.
        Interrupted: if the user ends it while it trains or measures.
    """
    asked_for_gates = (o["gate"] or o["gate_share"]) is not None
    o = followed(o)
    o["device"] = resolve_device(o["device"])
    o["out"] = _folder(o)
    _check_settings(o)
    if said := remark(o["threshold"]):
        say(said, err=True)
    wish = asked.wish(o)
    backbone, data, targets = _digits(o, say) if o["model"] is None else _model_and_data(o, say)
    wish = wish or _usual_wish(data, o)
    choice = _choice(backbone, data.train, o, say)
    model = _planned(backbone, choice, o)
    if wish:
        least = model.least_cost("answers" if o["gate"] else None)
        require_reachable(wish, least, checked_margin(wish, o["margin"]))
        require_labels(wish, labelled=data.validation[0][1] >= 0)
    say(f"{data.summary}\n\n{model.plan}\n")
    again = _told_of_random_weights(model, say)
    _settle(o, data, model)
    data, for_gates = _split(data, o, say, asked_for_gates)
    complete: list[Epoch] = []
    try:
        history = _train_on_files(model, data, targets, o, say, complete)
        if int(os.environ.get("RANK", 0)):  # under `accelerate launch` the first process goes on alone
            return
        if history.interrupted:
            raise KeyboardInterrupt
        model.results = {"data": _about(data, o)} | _gates(model, for_gates, o, say)
    except KeyboardInterrupt as why:
        raise _interrupted(complete, o, again) from why
    model.results |= {"choice": choice.to_dict()} if choice else {}
    _clear(o["out"])
    model.save_pretrained(o["out"])  # whatever becomes of the measurement, which may take long
    try:
        _measure(model, data, wish, o, say)
    except KeyboardInterrupt as why:
        hint = f" ptee evaluate {o['out']} measures it." if again else ""
        raise Interrupted(f"Interrupted: the run in {o['out']} is complete but for its results.{hint}") from why
    _save(model, history, o["out"])
    to_turn = again and len(model.off) < len(model.exits)  # a threshold
    hint = f" Another threshold: ptee evaluate {o['out']} --threshold 0.7" if to_turn else ""
    say(f"\nSaved in {o['out']}.{hint}")


# ---------------------------------------------------------------------------------------------------- checked first


def _folder(o: Options) -> Path:
    """Of the run: a new or empty one; that of an earlier run only if that is said."""
    out = o["out"] or Path("runs") / _file_name(o["model"] or "digits")
    runs.require_writable(out)
    run, unfinished = runs.is_run(out), (out / CHECKPOINT).is_file()
    stopped = (out / unreadable.FILE).is_file()  # before the training, by pictures that could not be read
    if o["resume"] and not (unfinished or stopped):
        raise RunError(f"There is no interrupted training in {out}. Leave out --resume, or give its folder with --out.")
    if o["resume"] or not out.is_dir() or not any(path.name != unreadable.FILE for path in out.iterdir()):
        return out
    if not (run or unfinished):
        raise RunError(f"{out} holds something else than a run. Give a new folder with --out.")
    if not o["overwrite"]:
        command = "ptee augment " if o["model"] is None and o["out"] is None else ""
        found = f"an interrupted training: {command}--resume goes on with it" if unfinished else "a run"
        raise RunError(f"{out} holds {found}. Give another folder with --out, or {command}--overwrite.")
    return out


def _file_name(model: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in model)


def _usual_wish(data: Data, o: Options) -> Wish | None:
    """What thresholds are chosen by where nothing is said of them; None: the exits keep T as it is."""
    if o["threshold"] or o["recipe"] != RECIPE:
        return None
    about_accuracy = data.validation[0][1] >= 0 and not o.get("labels_in_doubt")
    return Wish("max_drop" if about_accuracy else "max_fidelity_drop", MAY_LOSE)


def _check_settings(o: Options) -> None:
    check_target(o["gate"], NO_GATE)
    if o["gate_share"] and not o["gate"]:
        raise PteeError("--gate-share needs --gate, such as --gate agrees.")
    own = {key: o[key] for key in LEARNING if o[key] != AUTO}
    Settings(targets=o["targets"] or "labels", **own).checked()


# ---------------------------------------------------------------------------------------------------- data


def _model_and_data(o: Options, say: Say) -> tuple[Backbone, Data, str]:
    """The backbone, the data, and what the heads learn."""
    backbone = asked.backbone(o)
    source, targets = o["data"], o["targets"]
    if source is None:
        if backbone.label_space != IMAGENET:
            raise DataError(
                f"No data for {backbone.name}, which is no ImageNet-1k classifier. Give images: --data FOLDER."
            )
        source, targets = str(defaults.imagenette()), targets or "pseudo"
        say("No --data: these exits see ten classes only (Imagenette). Give images like yours with --data FOLDER.")
    data, labels = _images(source, backbone, o)
    if labels.indices is None and targets == "labels":
        raise DataError(f"{labels.reason} Use --targets pseudo.")
    if labels.indices is None and o["gate"] in ("right", "best"):
        raise DataError(f"{labels.reason} Use --gate agrees.")
    if o["max_drop"] is not None:
        labels.require_accuracy(f"max_drop={o['max_drop']}", f"max_fidelity_drop={o['max_drop']}")
    if o["targets"] == "labels":
        labels.require_accuracy("targets=labels", "targets=pseudo")
    if o["gate"] in ("right", "best"):
        labels.require_accuracy(f"gate={o['gate']}", "gate=agrees")
    o["labels_in_doubt"] = bool(labels.doubt)
    can_learn = labels.indices is not None and not labels.doubt
    fallback = "" if can_learn or targets else " The heads learn the backbone's own answers (--targets pseudo)."
    say(f"{labels.reason} {labels.doubt}".rstrip() + fallback)
    return backbone, data, targets or ("labels" if can_learn else "pseudo")


def _images(source: str, backbone: Backbone, o: Options) -> tuple[Data, LabelMap]:
    """The data, all pictures of which can be read; with --resume without those that could not be and were removed."""
    out = o["out"]

    def require(data: Data) -> None:
        if not o["resume"]:
            unreadable.forget(out)
        unreadable.require_readable(data, out, CHECKPOINT)

    return asked.images(
        source, backbone, seed=o["seed"], root=o["data_root"], classes=o["classes"], check=True, device=o["device"],
        removed=unreadable.recorded(out) if o["resume"] else (), require=require,
    )  # fmt: skip


def _digits(o: Options, say: Say) -> tuple[Backbone, Data, str]:
    """The same where no model is named."""
    own = {"--weights": "weights", "--num-classes": "num_classes", "--model-arg": "model_args", "--data": "data"}
    own |= {
        "--classes": "classes",
        "--input-size": "input_size",
        "--mean": "mean",
        "--std": "std",
        "--data-root": "data_root",
    }
    for option, key in own.items():
        if o[key]:
            raise PteeError(f"{option} needs --model NAME.")
    o["head"], o["epochs"] = o["head"] or defaults.DIGITS_HEAD, o["epochs"] or defaults.DIGITS_EPOCHS
    if o["exits"] in PLACEMENTS:
        o["num_exits"] = o["num_exits"] or defaults.DIGITS_EXITS
    args: dict[str, Any] = {"input_size": defaults.INPUT_SIZE, "mean": defaults.MEAN, "std": defaults.STD}
    args["model_args"] = defaults.MODEL_ARGS
    untrained = load_backbone(defaults.MODEL, pretrained=False, **args)
    # Whatever --seed: the network has seen the training images of this split.
    data, _ = asked.images("digits", untrained, seed=defaults.SEED, named=True)
    file = defaults.digits_weights(data)
    if not file.is_file():
        say("Training a small network on scikit-learn's handwritten digits, once.")
        defaults.train_digits_network(data, file)
    return load_backbone(defaults.MODEL, weights=file, **args), data, o["targets"] or "labels"


def _split(data: Data, o: Options, say: Say, asked_for_gates: bool) -> tuple[Data, Any]:
    """The data whose training images are for the heads, and the images to fit gates on; None where there are none."""
    every: Any = data.train
    if o["gate"] and not asked_for_gates and len(every) * (o["gate_share"] or GATE_SHARE) < decision.FEWEST:
        say(
            f"{len(every):,} training images are too few to fit gates as well: the heads learn on all, and h is the largest "
            "probability.\n"
        )
        return data, None
    if not o["gate"]:
        return data, None
    for_heads, for_gates = hold_out(every, o["gate_share"] or GATE_SHARE, o["seed"])
    say(
        f"Of {len(every):,} training images the heads learn on {len(for_heads):,}, and the gates on the other {len(for_gates):,}, "
        f"drawn with seed {o['seed']}.\n"
    )
    return replace(data, train=for_heads), for_gates


def _about(data: Data, o: Options) -> dict[str, Any]:
    """Where `reopening` finds the data again."""
    root = str(Path(o["data_root"] or "").resolve()) if data.split["kind"] == "torchvision" else ""
    return {"source": data.place, "root": root, "split": data.split}


# ---------------------------------------------------------------------------------------------------- the model


def _choice(backbone: Backbone, images: Any, o: Options, say: Say) -> Choice | None:
    """With --exits auto: the exits are chosen, and named from here on. None: they are placed as --exits says."""
    if o["exits"] != CHOSEN:
        return None
    drops = [o[kind] for kind in ("max_fidelity_drop", "max_drop") if o[kind] is not None]
    one: Any = [given[0] if given and len(given) == 1 else given for given in (asked.heads(o), o["head_budget"])]
    found = choosing.choose_exits(
        backbone, images, num_exits=o["num_exits"], head=one[0], head_budget=one[1], seed=o["seed"], device=o["device"],
        num_workers=o["workers"], **({"max_drop": drops[0]} if drops else {}),
    )  # fmt: skip
    say(f"{found}\n")
    o["exits"], o["num_exits"] = ",".join(found.modules), None
    return found


def _planned(backbone: Backbone, choice: Choice | None, o: Options) -> EarlyExitModel:
    model = asked.untrained(backbone, o)
    if choice:
        model.plan = replace(model.plan, placement="exits auto")
    if o["threshold"]:
        model.threshold = o["threshold"]
    return model


def _told_of_random_weights(model: EarlyExitModel, say: Say) -> bool:
    """Whether the command can load the run again: not where a network of it has no weights but those drawn here."""
    front = getattr(model.heads[0], "origin", None)  # of a network in front
    if model.origin.source is None:
        say("The backbone's weights are random, so the command cannot load this run again. Give --weights FILE.\n")
    if front and front.source is None:
        say(
            "The front network's weights are random, and nothing trains them: its answers are worth nothing, and the command "
            "cannot load this run again. Give --front-weights FILE.\n"
        )
    return all(network.source is not None for network in (model.origin, front) if network)


def _settle(o: Options, data: Data, model: EarlyExitModel) -> None:
    """Put numbers in place of what is left to the data and the model."""
    every: Any = data.train
    if o["epochs"] == AUTO:
        o["epochs"] = epochs_for(len(every), o["batch_size"])
    o["epochs"] = o["epochs"] or EPOCHS
    o["mirror"] = o["mirror"] and data.mirror
    if o["shift"] == AUTO:
        o["shift"] = shift_for(model.plan.input_size) if training.reads_maps(model) else 0


def _train_on_files(
    model: EarlyExitModel, data: Data, targets: str, o: Options, say: Say, complete: list[Epoch]
) -> History:
    """Train. If a picture cannot be read any more, all such pictures are named, and recorded for --resume."""
    try:
        return _train(model, data, targets, o, say, complete)
    except DataError:
        unreadable.require_readable(data, o["out"], CHECKPOINT)
        raise


def _train(model: EarlyExitModel, data: Data, targets: str, o: Options, say: Say, complete: list[Epoch]) -> History:
    """Epochs are added to `complete` once they are kept in the folder."""

    def tell(epoch: Epoch) -> None:
        complete.append(epoch)
        _clear(o["out"])
        say(epoch.line(o["epochs"]))

    history = training.train(
        model, data.train, data.calibration, targets=targets, mirror=o["mirror"], epochs=o["epochs"], device=o["device"],
        num_workers=o["workers"], cache=o["cache"], checkpoint=o["out"] / CHECKPOINT, resume=o["resume"] and (o["out"] / CHECKPOINT).is_file(), on_epoch=tell, on_cache=say,
        **{key: o[key] for key in LEARNING},
    )  # fmt: skip
    if history.warning and not o["gate"]:  # whose exits are decided by gates, which are still to come
        say(f"Warning: {history.warning}", err=True)
    return history


def _interrupted(complete: list[Epoch], o: Options, again: bool) -> Interrupted:
    """What is kept of a training, in epochs that are complete in this run of the command or, resumed, in one before."""
    if not complete and not o["resume"]:
        return Interrupted("Interrupted.")
    kept = f"{complete[-1].number} complete epochs are" if complete else "what was trained before is"
    hint = " The same command with --resume goes on." if again else ""
    return Interrupted(f"Interrupted: {kept} kept in {o['out']}.{hint}")


def _gates(model: EarlyExitModel, images: Any, o: Options, say: Say) -> dict[str, Any]:
    """Hang gates, where they are asked for, and say what is to be recorded of them; without images they stay unfitted."""
    if not o["gate"]:
        return {}
    if images is None:
        return {"gates": hang_unfitted_gates(model, o["gate"]).to_dict()}
    fits = fit_gates(
        model, images, target=o["gate"], seed=o["seed"], batch_size=o["batch_size"], num_workers=o["workers"],
        device=o["device"],
    )  # fmt: skip
    say(f"\n{fits}")
    return {"gates": fits.to_dict()}


# ---------------------------------------------------------------------------------------------------- results, the run


def _measure(model: EarlyExitModel, data: Data, wish: Wish | None, o: Options, say: Say) -> None:
    """Set the thresholds where they are wished for, and measure; the results are the model's then."""
    images, about, found = data.validation, data.summary, None
    if wish:
        parts, found = tuned(model, Unseen(str(o["out"]), data, images, o["seed"]), wish, o, say)
        images, about = parts.report, f"{about} {parts.words}"
        runs.update(o["out"], threshold=model.threshold, off=list(model.off), results=model.results)
    results = measured(model, images, o, about)
    say(f"\n{results}")
    model.results = (model.results or {}) | results.to_dict()
    if found is not None:
        say(kept(found, model.results))


def _clear(out: Path) -> None:
    """What an earlier run left must not be taken for this one's; but until an epoch is complete, nothing is lost."""
    for name in (runs.CONFIG, runs.HEADS, runs.METRICS):
        (out / name).unlink(missing_ok=True)


def _save(model: EarlyExitModel, history: History, out: Path) -> None:
    metrics = {"results": model.results, "plan": model.plan.to_dict(), "training": history.to_dict()}
    runs.write_json(out / runs.METRICS, metrics)
    model.save_pretrained(out)
    (out / CHECKPOINT).unlink(missing_ok=True)
    unreadable.forget(out)
