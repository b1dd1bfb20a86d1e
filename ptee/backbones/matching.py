"""Which tensors of a file are those of a network, whatever stands around them or in front of their names.

One rule: what can be told without doubt is taken off, and what was chosen or left out is said; everything else is refused,
with the names that are there. Where a file holds averaged weights (EMA) and raw ones, the averaged ones are taken.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ptee._common.errors import BackboneError
from ptee.backbones.checkpoint import Checkpoint, shown
from ptee.backbones.library import ArgumentNames

COUNTER = "num_batches_tracked"  # of batch norm; nothing in eval mode reads it
MOST_PREFIXES = 8  # that are tried in one place
AVERAGED = re.compile(r"(?i:(^|[._])(ema|swa|avg|averaged?|averaging)([._\d]|$))|EMA|SWA|Ema(?![a-z])")
# what a training leaves beside its network: losses, metrics, a teacher, and counters of averages and of profilers
POSITIONS = re.compile(r"pos_embed|rel_pos|relative_position|pos_bias")
BEFORE_AVERAGING = "current_model_state"  # Lightning keeps the raw weights there, and the average as its state_dict
LEFTOVER = re.compile(
    r"criterion|loss|metric|accuracy|auroc|precision|recall|confusion|confmat|calibration_error|"
    r"(^|[._])((train|val|valid|test|avg)_?)?(acc|auc|f1|ece|iou|mse|mae|top\d)(_?score|\d+)?([._]|$)|"
    r"(^|\.)teacher\.|"
    r"(^|\.)(n_averaged|num_updates|decay|initted|total_ops|total_params)$",
    re.IGNORECASE,
)

Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Match:
    """A network found in a file.

    Attributes:
        tensors: by the network's own names.
        note: which tensors were taken and what was left out, in a sentence; None where there was nothing to choose.
    """

    tensors: OrderedDict[str, Tensor]
    note: str | None


@dataclass
class _Candidate:
    """An attempt to find the network under one prefix, in one dictionary of the file."""

    place: str  # the dictionary
    prefix: str  # in front of the names in it
    state: Mapping[str, Tensor]
    tensors: dict[str, Tensor]
    missing: list[str]
    unknown: list[str]  # names in the file, under the prefix
    used: set[str]  # names in the file
    renamed: str | None = None  # what the last layer is called there
    misshapen: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return ".".join(filter(None, (self.place, self.prefix.rstrip("."))))

    @property
    def averaged(self) -> bool:
        return bool(AVERAGED.search(self.where))

    @property
    def beside(self) -> list[str]:
        """Names that are neither the network's nor under its prefix."""
        return [k for k in self.state if k not in self.used and not k.startswith(self.prefix)] if self.prefix else []


def find_network(
    checkpoint: Checkpoint, own: Mapping[str, Any], kind: str, names: ArgumentNames, convert: Convert | None = None
) -> Match:
    """The tensors of a network in a file.

    Args:
        checkpoint: the file.
        own: the network's state_dict; only names, shapes and types are looked at.
        kind: what to call the network.
        names: what the caller calls the arguments, for messages.
        convert: gives tensors under earlier names the names that they have now.

    Raises:
        BackboneError: if there is none, if it is another, if its shapes differ, or if there are several.
    """
    found = [c for place, state in checkpoint.places.items() for c in _candidates(place, state, own, convert)]
    for c in found:
        _discount_copies(c, found)
    whole = [c for c in found if not c.missing and not c.unknown]
    if not whole:
        raise _refusal(checkpoint, _no_network(found, kind), names)
    fitting = [c for c in whole if not c.misshapen]
    if not fitting:
        raise _other_shapes(checkpoint, whole[0], own, names)
    chosen = _choose(checkpoint, fitting, names)
    strangers = _strangers(chosen, whole)
    if strangers:
        text = (
            f"holds a whole {kind} under {chosen.where!r}, and beside it {shown(strangers, 3)}, which {kind} does not have. "
            "Save the state_dict of the network alone"
        )
        raise _refusal(checkpoint, text, names)
    tensors = OrderedDict((key, chosen.tensors[key]) for key in own)
    if not chosen.prefix and list(chosen.state) == list(own):  # versions of modules, which are stored by name
        tensors._metadata = getattr(chosen.state, "_metadata", None)  # type: ignore[attr-defined]
    return Match(tensors, _note(checkpoint, chosen, found, fitting))


# ------------------------------------------------------------------------------------------------ candidates


def _candidates(
    place: str, state: Mapping[str, Tensor], own: Mapping[str, Any], convert: Convert | None
) -> Iterator[_Candidate]:
    for prefix in _prefixes(state, own):
        found = _attempt(place, prefix, state, own)
        if found.missing and convert is not None:
            found = _converted(found, own, convert) or found
        found.misshapen = [key for key, value in found.tensors.items() if not _same_kind(value, own[key])]
        yield found


def _prefixes(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> list[str]:
    """What may stand in front of the network's names: what does in front of most of them, and of every name."""
    votes: Counter[str] = Counter()
    for name in state:
        at = 0
        while at >= 0:
            if name[at:] in own:
                votes[name[:at]] += 1
            at = name.find(".", at) + 1 or -1
    common = _common_prefix(list(state))
    likely = [prefix for prefix, _ in votes.most_common(MOST_PREFIXES)]
    return list(dict.fromkeys([*likely, common, ""]))


def _common_prefix(names: list[str]) -> str:
    """The parts of a name that all of them begin with."""
    first, last = min(names).split("."), max(names).split(".")
    same = 0
    while same < min(len(first), len(last)) - 1 and first[same] == last[same]:
        same += 1
    return "".join(f"{part}." for part in first[:same])


def _attempt(place: str, prefix: str, state: Mapping[str, Tensor], own: Mapping[str, Any]) -> _Candidate:
    tensors = {key: state[prefix + key] for key in own if prefix + key in state}
    found = _Candidate(place, prefix, state, tensors, [], [], {prefix + key for key in tensors})
    _add_counters(found, own)
    found.missing = [key for key in own if key not in tensors]
    _take_from_parents(found)
    inside = [name for name in state if name.startswith(prefix) and name not in found.used]
    found.unknown = [name for name in inside if not LEFTOVER.search(name[len(prefix) :])]
    _rename_last_layer(found, own)
    return found


def _add_counters(found: _Candidate, own: Mapping[str, Any]) -> None:
    """Older files lack the counters of batch norm."""
    if found.tensors:
        found.tensors |= {key: own[key] for key in own if key.endswith(COUNTER) and key not in found.tensors}


def _take_from_parents(found: _Candidate) -> None:
    """`backbone.conv1.weight` beside a bare `fc.weight`: what is missing under the prefix may lie in front of it."""
    parents = [found.prefix[:at] for at in range(len(found.prefix) - 1) if at == 0 or found.prefix[at - 1] == "."]
    for parent in parents if found.tensors else ():
        both = any(parent + key in found.state for key in found.tensors)
        if found.missing and not both and all(parent + key in found.state for key in found.missing):
            found.tensors |= {key: found.state[parent + key] for key in found.missing}
            found.used |= {parent + key for key in found.missing}
            found.missing = []


def _rename_last_layer(found: _Candidate, own: Mapping[str, Any]) -> None:
    """The last layer under another name: nothing else is missing, and one layer alone, for as many features, is left over."""
    layer = next(iter(list(own)[-1:]), "").rpartition(".")[0]
    if not layer or not found.missing or found.missing != [key for key in own if key.startswith(f"{layer}.")]:
        return
    spare = found.unknown or [name for name in found.beside if not LEFTOVER.search(name)]
    other = {name.rpartition(".")[0] for name in spare}
    pairs = {f"{layer}.{name.rpartition('.')[2]}": name for name in spare}
    if len(other) != 1 or pairs.keys() != set(found.missing):
        return
    if any(found.state[name].shape[1:] != own[key].shape[1:] for key, name in pairs.items()):
        return
    found.tensors |= {key: found.state[name] for key, name in pairs.items()}
    found.used |= set(spare)
    found.renamed = f"{other.pop()} is taken for {layer}"
    found.missing, found.unknown = [], []


def _discount_copies(candidate: _Candidate, found: list[_Candidate]) -> None:
    """Another copy of the network under a longer prefix, such as `ema.`, is nothing unknown."""
    copies = [c for c in found if c.state is candidate.state and not c.missing]
    longer = tuple(c.prefix for c in copies if len(c.prefix) > len(candidate.prefix))
    candidate.unknown = [name for name in candidate.unknown if not name.startswith(longer)]


def _converted(found: _Candidate, own: Mapping[str, Any], convert: Convert) -> _Candidate | None:
    """The attempt once more with the names that the library gives to tensors of earlier versions."""
    prefix = found.prefix
    inside = {name[len(prefix) :]: value for name, value in found.state.items() if name.startswith(prefix)}
    try:
        renamed = dict(convert(inside))
    except Exception:  # made for files of that family alone, so it fails on others
        return None
    # a table of positions that was stretched to another size is no longer what was trained
    if any(key in inside and inside[key].numel() != renamed[key].numel() for key in filter(POSITIONS.search, renamed)):
        return None
    again = _attempt(found.place, "", renamed, own)
    if again.missing or again.unknown:
        return None
    used = {name for name in found.state if name.startswith(prefix)}
    return _Candidate(found.place, prefix, found.state, again.tensors, [], [], used, again.renamed)


def _same_kind(value: Tensor, wanted: Any) -> bool:
    """Same shape, and numbers that the network can hold: those of a quantised network are not its weights."""
    if not isinstance(wanted, Tensor) or value.shape != wanted.shape:
        return False
    return value.is_floating_point() == wanted.is_floating_point() and value.is_complex() == wanted.is_complex()


# ------------------------------------------------------------------------------------------------ the choice


def _choose(checkpoint: Checkpoint, fitting: list[_Candidate], names: ArgumentNames) -> _Candidate:
    """The averaged network where there is one; of several that differ, none."""
    pool = [c for c in fitting if c.averaged]
    pool = pool or [c for c in fitting if BEFORE_AVERAGING not in c.place] or fitting
    others = [c for c in pool[1:] if not _equal(c.tensors, pool[0].tensors)]
    if not others:
        return pool[0]
    places = ", ".join(repr(c.where) for c in (pool[0], *others))
    text = f"{checkpoint.file} holds several networks that fit: {places}. Save the state_dict of the one that you mean."
    raise BackboneError(text, argument=names.weights_argument, value=str(checkpoint.file))


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    pairs = ((value, others[key]) for key, value in some.items() if not key.endswith(COUNTER))
    return all(one is other or torch.equal(one, other) for one, other in pairs)  # what is one need not be read


def _strangers(chosen: _Candidate, whole: list[_Candidate]) -> list[str]:
    """Names beside the network that are neither another copy of it nor what a training leaves."""
    copies = tuple(c.prefix for c in whole if c.state is chosen.state and c.prefix)
    used = {name for c in whole if c.state is chosen.state for name in c.used}
    return [n for n in chosen.beside if n not in used and not n.startswith(copies) and not LEFTOVER.search(n)]


def _note(checkpoint: Checkpoint, chosen: _Candidate, found: list[_Candidate], fitting: list[_Candidate]) -> str | None:
    """What a user should know of the choice."""
    said = []
    raw = [c for c in fitting if not c.averaged and not _equal(c.tensors, chosen.tensors)]  # only behind averaged ones
    partial = [c.where for c in found if c.averaged and c not in fitting and c.tensors and c.where != chosen.where]
    if raw:
        said.append(
            f"its averaged weights ({chosen.where}) are taken, not the raw ones ({raw[0].where or 'at its top'})"
        )
    elif not chosen.averaged and partial:
        said.append(f"its averaged weights ({partial[0]}) are no whole network, so the raw ones are taken")
    if chosen.renamed:
        said.append(chosen.renamed)
    left = [name for name in chosen.state if name not in chosen.used and LEFTOVER.search(name)]
    if left:
        said.append(f"{shown(left, 3)} {'is' if len(left) == 1 else 'are'} left out")
    return f"{checkpoint.file}: {'; '.join(said)}." if said else None


# ------------------------------------------------------------------------------------------------ refusals


def _no_network(found: list[_Candidate], kind: str) -> str:
    nearest = max(found, key=lambda c: (len(c.tensors), -len(c.missing), -len(c.unknown)))
    if not nearest.tensors:
        names = sorted((name for c in found[:1] for name in c.state), key=lambda name: name.endswith(COUNTER))
        return f"holds no {kind}: its tensors are called {shown(names, 4)}"
    unknown = sorted(nearest.unknown + nearest.beside, key=lambda name: name.endswith(COUNTER))  # last: these say least
    if not nearest.missing:
        return f"has unknown {shown(unknown, 3)} beside a whole {kind}. Save the state_dict of the network alone"
    there = f"has unknown {shown(unknown, 3)}" if unknown else f"has only {shown(list(nearest.tensors), 3)}"
    return f"is of another model: it lacks {shown(nearest.missing, 3)} and {there}"


def _refusal(checkpoint: Checkpoint, text: str, names: ArgumentNames) -> BackboneError:
    check = names.check("model", "model_args" if names.model_args else "weights")
    return BackboneError(
        f"{checkpoint.file} {text}. ", *check, argument=names.weights_argument, value=str(checkpoint.file)
    )


def _other_shapes(
    checkpoint: Checkpoint, found: _Candidate, own: Mapping[str, Any], names: ArgumentNames
) -> BackboneError:
    """The tensors have the right names, but other shapes or types of numbers."""
    wrong, have = found.misshapen, found.tensors
    same_shape = [key for key in wrong if have[key].shape == own[key].shape]
    if same_shape:
        key = same_shape[0]
        text = (
            f"holds {have[key].dtype} in {shown(same_shape, 3)}, where the model has {own[key].dtype}: it is quantised"
        )
        return _refusal(checkpoint, f"{text}. Save the network's weights as floating-point numbers", names)
    classes = {(len(have[key]), len(own[key])) for key in wrong if have[key].dim() and own[key].dim()}
    if len(classes) == 1 and all(have[key].shape[1:] == own[key].shape[1:] for key in wrong):
        there, here = classes.pop()
        advice = names.advice(f"Try {{num_classes:{there}}}.")
        text = f"{checkpoint.file} has {there} classes ({shown(wrong)}), the model has {here}. "
        return BackboneError(text, *advice, argument=names.num_classes or names.weights_argument, value=here)
    shapes = [f"{shown([key])} {tuple(have[key].shape)}, not {tuple(own[key].shape)}" for key in wrong]
    more = f" and {len(shapes) - 5} more" if len(shapes) > 5 else ""
    text = f"{checkpoint.file} has other shapes: {', '.join(shapes[:5])}{more}. "
    check = names.check("model", "model_args", "input_size")
    return BackboneError(text, *check, argument=names.weights_argument, value=str(checkpoint.file))
