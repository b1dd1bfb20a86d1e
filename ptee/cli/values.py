"""From the options of a command to the values that it works with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ptee._common.errors import Argument, BackboneError, DataError, PteeError
from ptee._common.listing import require_place
from ptee._common.validation import LONGEST_VALUE
from ptee.cli.checks import require_recipe, require_thresholds
from ptee.cli.options import as_option, given_settings

IMAGES = ("input_size", "mean", "std", "interpolation")  # how pictures are prepared
NEED_A_MODEL = ("classes", "weights", "num_classes", "model_args", "data", "data_root", *IMAGES)
GIVE_MODEL = Argument("model", "NAME")


def show(found: Any, o: dict[str, Any]) -> None:
    """Print a result: as JSON, or as a table, with its legend if --explain asks for it."""
    from ptee._common.files import to_json

    legend = f"\n\n{found.legend}" if o.get("explain") else ""
    click.echo(to_json(found.to_dict()) if o["as_json"] else f"{found}{legend}")


def recipe_of(o: dict[str, Any], default: Any = None) -> Any:
    """The recipe of --recipe, or the default, with the settings of the other options."""
    from ptee.pipeline.recipe import make_recipe

    recipe = o.pop("recipe", None)
    given = given_settings(o)
    made = make_recipe(default if recipe is None else recipe, given)
    made.thresholds.require_used(given)
    require_recipe(made)
    return made


def recipe_of_exits(o: dict[str, Any]) -> Any:
    """The recipe of a command that trains nothing. A setting that it could not use is refused."""
    for path, value in o["set"]:
        if not path.startswith("exits."):
            raise PteeError(
                f"--set {path}={value!s:.{LONGEST_VALUE}} changes nothing here, where no head is trained. Only settings of exits do, such as "
                "exits.head=pool."
            )
    return recipe_of(o)


def require_runs(*runs: str, images: bool = True, exported: bool = False, **o: Any) -> None:
    """Refuse runs that cannot be opened, before torch is imported, which takes seconds and most of a gigabyte.

    `images`: those of the runs are wanted, if none are given. `exported`: an exported model will do.
    """
    from ptee.deploy.manifest import is_exported, read_manifest
    from ptee.pipeline.recorded import require_openable, require_same_input

    for name in ("data", "data_root", "classes") if o.get("traces") else ():
        if o[name]:
            raise PteeError(Argument(name), " is about images, and traces are given in their place. Leave it out.")
    if len(runs) > 1:
        require_same_input(runs)
    for run in runs:
        if exported and is_exported(run):
            exits = len(read_manifest(Path(run)).exits)
        else:
            exits = require_openable(run, weights=o["weights"], images=images and o.get("data") is None)
        require_thresholds(o.get("threshold"), exits)
    if o.get("data") is not None:
        require_place(o["data"])


def require_model(o: dict[str, Any]) -> None:
    """Refuse a command without --model, and one whose --data is no place of images, before anything heavy is imported."""
    if o["model"] is None:
        example = Argument.text("model", "resnet50")
        raise PteeError("Which model? Give ", GIVE_MODEL, ", such as ", example, ".", argument="model")
    if o.get("data") is not None:
        require_place(o["data"])


def require_names(o: dict[str, Any]) -> None:
    """Refuse a model, a data set or a device that there is not. It takes the time to import torch and timm, no more."""
    from ptee._common.devices import resolve_device
    from ptee.backbones.load import find_model
    from ptee.data.sources import require_source

    resolve_device(o["device"])
    if o["model"] is not None:
        find_model(o["model"])
    if o["data"] is not None:
        require_source(o["data"])


def backbone_of(o: dict[str, Any]) -> Any:
    """The model of --model. Data that are not there are refused first, because its weights may have to be downloaded."""
    require_model(o)
    from ptee.backbones.load import load_backbone
    from ptee.data.sources import require_source

    if o.get("data") is not None:
        require_source(o["data"])
    keys = ("weights", "pretrained", "num_classes", *IMAGES)
    return load_backbone(o["model"], model_args=dict(o["model_args"]), **{key: o[key] for key in keys if key in o})


def require_places(backbone: Any, recipe: Any) -> None:
    """Refuse exits at modules that the backbone does not have, before images are read. Placing says what it has instead."""
    from ptee.exits.placement import INPUT, PLACEMENTS

    places = recipe.exits.places
    several = places if isinstance(places, list | tuple) else [places]
    named = [place for place in several if isinstance(place, str)]
    known = {*PLACEMENTS, INPUT, *dict(backbone.module.named_modules())} if named else set()
    if not known.issuperset(named):
        untrained(backbone, recipe).detach()


def untrained(backbone: Any, recipe: Any, times: Any = None) -> Any:
    """A model with the exits of a recipe, whose heads are not trained."""
    from ptee.pipeline.fit import build_model

    return build_model(backbone, recipe, times)


def name_weights(backbone: Any, model: Any, err: bool = False) -> None:
    """Print which tensors of files of weights were taken, as a training does."""
    from ptee.pipeline.fit import weights_taken

    for words in weights_taken(backbone, model):
        click.echo(f"{words}\n", err=err)


def name_others(backbone: Any, err: bool = False) -> None:
    """Print which published networks are as good as a backbone for less, if any is."""
    from ptee.backbones.published import in_short

    if words := in_short(backbone):
        click.echo(f"\n{words}", err=err)


def no_images(model: str) -> DataError:
    """The error where a model has no images."""
    return DataError(f"No images for {model}. Give some: ", Argument("data", "FOLDER"), ".", argument="data")


def open_for(backbone: Any, o: dict[str, Any], seed: int, **more: Any) -> tuple[Any, Any]:
    """The images of --data for a backbone, and its labels."""
    from ptee.pipeline.images import open_images

    places = {"root": o["data_root"], "classes": o["classes"], "device": o["device"]}
    return open_images(o["data"], backbone, seed=seed, check=True, **places, **more)


def prepared(backbone: Any, o: dict[str, Any]) -> str:
    """How pictures become images of a backbone, and who says so, in a line."""
    images, library = backbone.input, (backbone.architecture or {}).get("library", "its library")
    given = [name for name in IMAGES if o[name] is not None]
    own = f"as {library} has it for {backbone.name}"
    who = f"{', '.join(map(as_option, map(Argument, given)))} as given, the rest {own}" if given else own
    who = "as given" if len(given) == len(IMAGES) else who
    other = not {"mean", "std"}.intersection(given) and o["weights"] is not None
    (_, height, width), ask = images.input_size, " If your weights were trained otherwise, give --mean and --std."
    size = f"Pictures are resized ({images.interpolation}), cut to {height} x {width}"
    return f"{size} and {images.normalised}: {who}.{ask * other}"


def data_for(backbone: Any, recipe: Any, o: dict[str, Any], out: Path) -> tuple[Any, Any]:
    """The images, all of which can be read, and the recipe that their labels allow."""
    from ptee.data.labels import describe_labels
    from ptee.pipeline.demo import imagenette
    from ptee.pipeline.images import described_change, recipe_for, undoubted
    from ptee.pipeline.run_folder import removed_pictures, require_readable

    if o["data"] is None:
        if backbone.label_space != "imagenet-1k":
            raise no_images(backbone.name)
        click.echo(
            "No --data: these exits see ten classes only (Imagenette). Give images like yours with --data FOLDER."
        )
        o = o | {"data": str(imagenette())}
    removed = removed_pictures(out) if o["resume"] else ()
    data, labels = open_for(
        backbone, o, recipe.seed, removed=removed, require=partial(require_readable, out=out, overwrite=o["overwrite"])
    )
    labels = undoubted(labels, recipe)
    adapted = recipe_for(labels, recipe)
    click.echo(prepared(backbone, o))
    click.echo(describe_labels(labels, as_option) + described_change(recipe, adapted))
    return data, adapted


def file_name(model: str) -> str:
    """A name that a folder can have."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in model)


def refuse_without_model(o: dict[str, Any]) -> None:
    """Refuse options that are about a model where none is given."""
    given = [Argument(key) for key in NEED_A_MODEL if o[key]]
    if not o["pretrained"]:
        given.insert(0, Argument("pretrained", "False"))
    if given:
        raise PteeError(given[0], " needs a model. Give ", GIVE_MODEL, ".", argument="model")


def refuse_about_model(run: str, o: dict[str, Any]) -> None:
    """Refuse options that are about a model where a run is given."""
    if o["model"] is not None:
        raise PteeError(f"Both the run {run} and ", Argument.text("model", o["model"]), " are given. Give one of them.")
    given = [name for name in ("num_classes", "model_args", "input_size", "recipe") if o[name]]
    given += ["pretrained"] * (not o["pretrained"]) + list(given_settings(o))
    if given:
        wrong = Argument(given[0], "False" if given[0] == "pretrained" else "")
        raise PteeError(wrong, " is about a model with untrained exits, and a run has its own. Leave it out.")


def refuse_of_run(run: str, o: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse options of these names, which are about a run, where an exported model is given."""
    for name in names:
        if o[name]:
            wrong = Argument(name, "True" if o[name] is True else "")
            raise PteeError(wrong, f" is about a run, and {run} is an exported model. Leave it out.")


def refuse_given(options: Iterable[str], why: str) -> None:
    """Refuse options that were typed and would change nothing, because of what another option asks for.

    Args:
        options: names of the command's parameters; those that it lacks are passed over.
        why: "OPTION " and this make the sentence.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in options and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE:
            raise PteeError(f"{parameter.opts[0]} {why}", argument=parameter.name)


def remark_on(threshold: Any) -> None:
    """Print what is odd about thresholds, if anything is."""
    from ptee.exits.config import remark

    if words := remark([threshold] if isinstance(threshold, int | float) else threshold):
        click.echo(words, err=True)


def where_of(o: dict[str, Any]) -> dict[str, Any]:
    """Where a saved run's weights and images are, and where the backbone is tried on these."""
    from ptee._common.devices import resolve_device

    places = {key: o[key] for key in ("weights", "data", "data_root", "classes")}
    return {**places, "device": resolve_device(o["device"]), "word": as_option}


def opened_runs(runs: Mapping[str, str], o: dict[str, Any], max_drop: float | None = None) -> dict[str, Any]:
    """Saved runs by name, with the images of --data, their own, or what --traces recorded of them."""
    from ptee.pipeline.saved_run import open_run, open_traced

    if not o["traces"]:
        how = where_of(o) | ({} if max_drop is None else {"max_drop": max_drop})
        return {name: open_run(run, **how) for name, run in runs.items()}
    from ptee.tuning.trace_folder import open_traces

    traces = open_traces(*o["traces"])
    how = {"weights": o["weights"], "max_drop": max_drop, "word": as_option}
    return {name: open_traced(run, traces, **how) for name, run in runs.items()}


def how_of(o: dict[str, Any]) -> dict[str, Any]:
    """How images are run through a model."""
    from ptee._common.devices import resolve_device

    how = {"batch_size": o["batch_size"], "num_workers": o["workers"], "device": resolve_device(o["device"])}
    if o.get("traces"):  # of which nothing can be timed
        return how | ({"speed": False} if "speed" in o else {})
    return how | {key: o[key] for key in ("speed",) if key in o}


def names_of(runs: tuple[str, ...]) -> dict[str, str]:
    """Runs by the name of their folder, or by the whole path where two folders have one name."""
    places = [Path(run).resolve() for run in runs]
    for run, place in zip(reversed(runs), reversed(places), strict=True):
        if places.count(place) > 1:
            raise PteeError(f"The run {run} is given twice. Give each run once.")
    ends = [Path(run).absolute().name for run in runs]
    return {end if ends.count(end) == 1 else run: run for run, end in zip(runs, ends, strict=True)}


def static_networks(texts: tuple[str, ...], runs: Sequence[str]) -> dict[str, Any]:
    """Smaller networks by name, for the classes of runs.

    Those with a file of weights are built for as many, and take the images of the runs. Of ImageNet's number they are published
    networks more often than a user's own, and take the images that they were published for.
    """
    from ptee.data.labels import IMAGENET_CLASSES
    from ptee.model.run_files import read_config

    found: dict[str, Any] = {}
    of_runs = [Path(run).absolute().name for run in runs]
    for name, equals, file in (text.partition("=") for text in texts):
        called = f"network {name}" if name in of_runs else name
        if called in found:
            raise PteeError(f"--static {name} is given twice. Give each network once.")
        about = read_config(runs[0])[0].backbone
        images = about.input.model_dump() if equals and about.classes != IMAGENET_CLASSES else {}
        found[called] = _static(name, file if equals else None, about.classes, images)
    return found


def _static(name: str, file: str | None, classes: int, images: dict[str, Any]) -> Any:
    from ptee.backbones.library import other_words
    from ptee.backbones.load import load_backbone

    give = (f"Give a file of its weights for these {classes} classes: ", Argument(f"static={name}", "FILE"), ".")
    try:
        with other_words({"weights": f"static={name}", "num_classes": "num_classes"}):
            network = load_backbone(name, weights=file, num_classes=None if file is None else classes, **images)
    except BackboneError as why:
        if why.argument != "num_classes":
            raise
        raise BackboneError(f"The network {name}: ", why.parts[0], *give, argument="static") from why
    if network.num_classes != classes:
        text = f"The network {name} has {network.num_classes} classes, the run {classes}. "
        raise BackboneError(text, *give, argument="static")
    if network.note:  # which tensors of the file were taken; what is compared goes to standard output
        click.echo(network.note, err=True)
    return network
