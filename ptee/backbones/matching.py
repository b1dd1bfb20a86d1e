"""Which tensors of a file are a network's, whatever a trainer put around them or in front of their names.

What can be told without doubt is taken off, and the user is told what was chosen or left out. Everything else is refused,
with the names that are there. If a file holds averaged (EMA) and raw weights, the averaged ones are taken. timm's own
`load_state_dict` knows four of these places and two of these prefixes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.errors import Advice, Argument, BackboneError
from ptee._common.text import number_of
from ptee.backbones.checkpoint import Checkpoint, refusal, shown
from ptee.backbones.library import CHECK

COUNTER = "num_batches_tracked"  # of batch norm; nothing in eval mode reads it
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # types of weights, and of averages of counters
MOST_PREFIXES = 8  # that are tried in one place
AVERAGED = re.compile(r"(?i:(^|[._])(ema|swa|avg|averaged?|averaging)([._\d]|$))|EMA|SWA|Ema(?![a-z])|shadow_params")
BEFORE_AVERAGING = "current_model_state"  # Lightning's place for the raw weights; its state_dict then holds the average
POSITIONS = re.compile(r"pos_embed|rel_pos|relative_position|pos_bias")
# what a training keeps beside its network: losses, metrics, a teacher, and counters of averages and of profilers
COUNTERS = re.compile(r"(^|\.)(n_averaged|num_updates|steps|decay|initted|total_ops|total_params)$", re.IGNORECASE)
LEFTOVER = re.compile(
    r"criterion|loss|metric|accuracy|auroc|precision|recall|confusion|confmat|calibration_error|"
    r"(^|[._])((train|val|valid|test|avg)_?)?(acc|auc|f1|ece|iou|mse|mae|top\d)(_?score|\d+)?([._]|$)|"
    r"(^|\.)teacher\.|" + COUNTERS.pattern,
    re.IGNORECASE,
)
NORMALISES = re.compile(r"(^|[._])(mean|std|mu|sigma)$")  # ends the name of a tensor
# Names in files that timm and torchvision published, and those that their networks have now.
EARLIER = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)\."), r"\1\2."),  # DenseNet
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_1\."), r"\1.0."),  # torchvision's ViT
    (re.compile(r"(encoder_layer_\d+\.mlp)\.linear_2\."), r"\1.3."),
    (re.compile(r"^(pos_embed|cls_token)\.(\d)$"), r"\1_\2"),  # CrossViT
)
CONVERTERS = ("checkpoint_filter_fn", "_filter_fn")  # timm's names for functions that rename old tensors

State = Mapping[str, Tensor]
Convert = Callable[[State], State]


@dataclass(frozen=True)
class Match:
    """A network's tensors in a file, by its own names, and a sentence on what was chosen, or None."""

    tensors: OrderedDict[str, Tensor]
    note: str | None


@dataclass
class _Candidate:
    """The tensors in one dictionary of the file whose names begin with one prefix, taken for the network's."""

    place: str  # of the dictionary
    prefix: str
    state: State  # the dictionary
    tensors: dict[str, Tensor]  # by the network's names
    missing: list[str]  # names of the network
    unknown: list[str]  # names in the file, under the prefix
    used: set[str]  # names in the file
    renamed: str | None = None  # in words, if the last layer has another name in the file
    misshapen: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return ".".join(filter(None, (self.place, self.prefix.rstrip("."))))

    @property
    def printed(self) -> str:
        """The same for messages: short, and without what steers a terminal."""
        return shown([self.where])

    @property
    def averaged(self) -> bool:
        return bool(AVERAGED.search(self.where))

    @property
    def is_whole(self) -> bool:
        return not self.missing and not self.unknown

    @property
    def beside(self) -> list[str]:
        """Names that are neither the network's nor under its prefix."""
        return [k for k in self.state if k not in self.used and not k.startswith(self.prefix)] if self.prefix else []


def find_network(checkpoint: Checkpoint, module: nn.Module) -> Match:
    """The tensors of a module in a file.

    Only the module's names, shapes and types are read, so it may be on the meta device.
    """
    own, kind = module.state_dict(), type(module).__name__
    convert, found = _converter(module), []
    for place, state in checkpoint.places.items():
        here = list(_candidates(place, state, own))
        here = [_converted(c, own, convert) if c.missing else c for c in here]
        for c in here:
            c.misshapen = [key for key, value in c.tensors.items() if not _same_kind(value, own[key])]
            _discount_copies(c, here)
        found += here
    whole = [c for c in found if c.is_whole]
    if not whole:
        text, advice = _no_network(found, kind)
        raise refusal(checkpoint.file, text, *advice)
    fitting = [c for c in whole if not c.misshapen]
    if not fitting:
        raise _other_shapes(checkpoint, whole[0], module)
    chosen = _choose(checkpoint, fitting)
    if strangers := _strangers(chosen, whole):
        text = f"holds a whole {kind} under {chosen.printed!r}, and beside it {shown(strangers, 3)}, which {kind} does not have. "
        alone = ("Save the state_dict of the network alone. ", *CHECK)
        raise refusal(checkpoint.file, text, *(_as_arguments(strangers) or alone))
    tensors = OrderedDict((key, chosen.tensors[key]) for key in own)
    if not chosen.prefix and list(chosen.state) == list(own):  # versions of modules, which are stored by name
        tensors._metadata = getattr(chosen.state, "_metadata", None)  # type: ignore[attr-defined]
    return Match(tensors, _note(checkpoint, chosen, found, fitting))


# ------------------------------------------------------------------------------------------------ candidates


def _candidates(place: str, state: State, own: State) -> Iterator[_Candidate]:
    """One candidate for each likely prefix: those in front of most of the network's names, that of all names, and none."""
    votes: Counter[str] = Counter()
    for name in state:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        votes.update(name[:start] for start in starts if name[start:] in own)
    likely = [prefix for prefix, _ in votes.most_common(MOST_PREFIXES)]
    for prefix in dict.fromkeys([*likely, _common_prefix(list(state)), ""]):
        yield _candidate(place, prefix, state, own)


def _common_prefix(names: list[str]) -> str:
    """The dotted parts that all names begin with, without the last part of any name."""
    first, last = min(names).split("."), max(names).split(".")
    same = 0
    while same < min(len(first), len(last)) - 1 and first[same] == last[same]:
        same += 1
    return "".join(f"{part}." for part in first[:same])


def _candidate(place: str, prefix: str, state: State, own: State) -> _Candidate:
    tensors = {key: _counted(key, state[prefix + key]) for key in own if prefix + key in state}
    found = _Candidate(place, prefix, state, tensors, [], [], {prefix + key for key in tensors})
    if tensors:  # older files lack the counters of batch norm
        tensors |= {key: own[key] for key in own if key.endswith(COUNTER) and key not in tensors}
    found.missing = [key for key in own if key not in tensors]
    _take_from_parents(found)
    inside = [name for name in state if name.startswith(prefix) and name not in found.used]
    parts = {key.partition(".")[0] for key in own}
    found.unknown = [name for name in inside if not _beside(name[len(prefix) :], parts)]
    _rename_last_layer(found, own)
    return found


def _beside(name: str, parts: Collection[str]) -> bool:
    """Whether a training keeps this beside its network. Within a part of the network only counters are."""
    return bool(COUNTERS.search(name) or (LEFTOVER.search(name) and name.partition(".")[0] not in parts))


def _counted(key: str, value: Tensor) -> Tensor:
    """The tensor. A counter of batch norm that was averaged with the weights is a float, and becomes whole again."""
    is_average = key.endswith(COUNTER) and isinstance(value, Tensor) and value.dtype in FLOATS
    return value.round().long() if is_average and value.numel() == 1 and value.isfinite() else value


def _take_from_parents(found: _Candidate) -> None:
    """What is missing under the prefix may lie in front of it: a bare `fc.weight` beside `backbone.conv1.weight`."""
    parents = [found.prefix[:at] for at in range(len(found.prefix) - 1) if at == 0 or found.prefix[at - 1] == "."]
    for parent in parents if found.tensors else ():
        has_copies = any(parent + key in found.state for key in found.tensors)
        if found.missing and not has_copies and all(parent + key in found.state for key in found.missing):
            found.tensors |= {key: found.state[parent + key] for key in found.missing}
            found.used |= {parent + key for key in found.missing}
            found.missing = []


def _rename_last_layer(found: _Candidate, own: State) -> None:
    """Only the last layer is missing, and one other layer is left over, for as many features: it is the last layer."""
    layer = next(reversed(list(own)), "").rpartition(".")[0]
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
    found.renamed = f"{shown([other.pop()])} is taken for {layer}"
    found.missing, found.unknown = [], []


def _converter(module: nn.Module) -> Convert:
    """Gives tensors of original or earlier releases their new names: by `EARLIER`, and by timm's own function for this family."""
    home = sys.modules.get(type(module).__module__)
    if home is None or not home.__name__.startswith(("timm.", "ptee.")):
        return _renamed
    rename = next((getattr(home, name) for name in CONVERTERS if hasattr(home, name)), None)
    if rename is None:
        return _renamed
    takes_module = len(inspect.signature(rename).parameters) > 1  # some take the tensors alone
    return lambda state: rename(_renamed(state), module) if takes_module else rename(_renamed(state))


def _renamed(state: State) -> dict[str, Tensor]:
    """The tensors under the names that `EARLIER` knows."""
    names = {name: name for name in state}
    for earlier, now in EARLIER:
        names = {name: earlier.sub(now, other) for name, other in names.items()}
    return {names[name]: value for name, value in state.items()}


def _converted(found: _Candidate, own: State, convert: Convert) -> _Candidate:
    """The candidate under its new names, or the candidate itself if these do not fit."""
    prefix = found.prefix
    inside = {name[len(prefix) :]: value for name, value in found.state.items() if name.startswith(prefix)}
    try:
        renamed = dict(convert(inside))
    except Exception:  # it is made for files of one family, and fails on others
        return found
    # a table of positions that was stretched to another size is no longer what was trained
    if any(key in inside and inside[key].numel() != renamed[key].numel() for key in filter(POSITIONS.search, renamed)):
        return found
    again = _candidate(found.place, "", renamed, own)
    if not again.is_whole:
        return found
    used = {name for name in found.state if name.startswith(prefix)}
    return _Candidate(found.place, prefix, found.state, again.tensors, [], [], used, again.renamed)


def _discount_copies(candidate: _Candidate, here: Sequence[_Candidate]) -> None:
    """Another copy of the network in the same dictionary under a longer prefix, such as `ema.`, is nothing unknown."""
    copies = [c for c in here if not c.missing]
    longer = tuple(c.prefix for c in copies if len(c.prefix) > len(candidate.prefix))
    candidate.unknown = [name for name in candidate.unknown if not name.startswith(longer)]


def _same_kind(value: Tensor, wanted: Any) -> bool:
    """The same shape and kind of numbers: the integers or 8-bit floats of a quantised network are not its weights."""
    if not isinstance(wanted, Tensor) or value.shape != wanted.shape:
        return False
    if value.is_floating_point() and value.dtype not in (*FLOATS, wanted.dtype):
        return False
    return value.is_floating_point() == wanted.is_floating_point() and value.is_complex() == wanted.is_complex()


# ------------------------------------------------------------------------------------------------ the choice


def _choose(checkpoint: Checkpoint, fitting: list[_Candidate]) -> _Candidate:
    """The averaged network, if there is one. Several that differ are refused."""
    pool = [c for c in fitting if c.averaged]
    pool = pool or [c for c in fitting if BEFORE_AVERAGING not in c.place] or fitting
    others = [c for c in pool[1:] if not _equal(c.tensors, pool[0].tensors)]
    if not others:
        return pool[0]
    places = ", ".join(repr(c.printed) for c in (pool[0], *others))
    text = f"holds several networks that fit: {places}. Save the state_dict of the one that you mean."
    raise refusal(checkpoint.file, text)


def _equal(some: State, others: State) -> bool:
    pairs = ((value, others[key]) for key, value in some.items() if not key.endswith(COUNTER))
    return all(one is other or torch.equal(one, other) for one, other in pairs)  # the same tensor need not be read


def _strangers(chosen: _Candidate, whole: list[_Candidate]) -> list[str]:
    """Names beside the network that belong neither to a copy of it nor to what a training keeps."""
    same_place = [c for c in whole if c.state is chosen.state]
    copies = tuple(c.prefix for c in same_place if c.prefix)
    used = {name for c in same_place for name in c.used}
    return [n for n in chosen.beside if n not in used and not n.startswith(copies) and not LEFTOVER.search(n)]


def _note(checkpoint: Checkpoint, chosen: _Candidate, found: list[_Candidate], fitting: list[_Candidate]) -> str | None:
    """What a user should know of the choice."""
    said = []
    raw = [c for c in fitting if not c.averaged and not _equal(c.tensors, chosen.tensors)]  # only behind averaged ones
    partial = [c.printed for c in found if c.averaged and c not in fitting and c.tensors and c.where != chosen.where]
    if raw:
        at = raw[0].printed or "at its top"
        said.append(f"its averaged weights ({chosen.printed}) are taken, not the raw ones ({at})")
    elif not chosen.averaged and partial:
        said.append(f"its averaged weights ({partial[0]}) are no whole network, so the raw ones are taken")
    elif not chosen.averaged and (lists := list(filter(AVERAGED.search, checkpoint.nameless))):
        said.append(f"its averaged weights ({shown(lists[:1])}) have no names, so the raw ones are taken")
    if chosen.renamed:
        said.append(chosen.renamed)
    left = [name for name in chosen.state if name not in chosen.used and LEFTOVER.search(name)]
    if left:
        said.append(f"{shown(left, 3)} {'is' if len(left) == 1 else 'are'} left out")
    return f"{checkpoint.file}: {'; '.join(said)}." if said else None


# ------------------------------------------------------------------------------------------------ refusals


def _no_network(found: list[_Candidate], kind: str) -> tuple[str, Advice]:
    """What to say where no candidate is whole, and what to do."""
    nearest = max(found, key=lambda c: (len(c.tensors), -len(c.missing), -len(c.unknown)))
    if not nearest.tensors:
        return f"holds no {kind}: its tensors are called {shown(_counters_last(found[0].state), 4)}. ", CHECK
    unknown = _counters_last(nearest.unknown + nearest.beside)
    if not nearest.missing:
        larger = ("It may be of a larger network, or hold another beside this one. ", *CHECK)
        return f"has unknown {shown(unknown, 3)} beside a whole {kind}. ", _as_arguments(unknown) or larger
    unknown = unknown or [name for name in nearest.state if name not in nearest.used and not COUNTERS.search(name)]
    there = f"has unknown {shown(unknown, 3)}" if unknown else f"has {shown(list(nearest.tensors), 3)}"
    return f"is of another model: it lacks {shown(nearest.missing, 3)} and {there}. ", CHECK


def _as_arguments(names: Sequence[str]) -> Advice:
    """What to do with tensors that normalise images, if all of these do by their names; else empty."""
    if not all(map(NORMALISES.search, names)):
        return ()
    text = "They normalise images: save the state_dict without them, and give them as "
    return (text, Argument("mean"), " and ", Argument("std"), ".")


def _counters_last(names: Sequence[str] | State) -> list[str]:
    return sorted(names, key=lambda name: name.endswith(COUNTER))


def _other_shapes(checkpoint: Checkpoint, found: _Candidate, module: nn.Module) -> BackboneError:
    """The tensors have the right names, but other shapes or kinds of numbers."""
    wrong, have, own = found.misshapen, found.tensors, module.state_dict()
    if empty := [key for key in wrong if have[key].numel() == 0 < own[key].numel()]:
        text = f"holds no numbers in {shown(empty, 3)}. DeepSpeed (ZeRO-3) keeps weights in other files: run zero_to_fp32.py, "
        return refusal(checkpoint.file, f"{text}which lies beside them, and give the file that it writes.")
    if same_shape := [key for key in wrong if have[key].shape == own[key].shape]:
        key = same_shape[0]
        why = "" if have[key].is_complex() else ": it is quantised"
        return refusal(
            checkpoint.file,
            f"holds {have[key].dtype} in {shown(same_shape, 3)}, where the model has {own[key].dtype}{why}. "
            "Save the network's weights as floating-point numbers. ",
            *CHECK,
        )
    classes = {(len(have[key]), len(own[key])) for key in wrong if have[key].dim() and own[key].dim()}
    if len(classes) == 1 and all(have[key].shape[1:] == own[key].shape[1:] for key in wrong):
        there, here = classes.pop()
        text = f"{checkpoint.file} has {number_of(there, 'class')} ({shown(wrong)}), the model has {here}. "
        advice = ("Try ", Argument("num_classes", str(there)), ".")
        return BackboneError(text, *advice, argument="num_classes", value=here)
    shapes = [f"{shown([key])} {tuple(have[key].shape)}, not {tuple(own[key].shape)}" for key in wrong]
    more = f" and {len(shapes) - 5} more" if len(shapes) > 5 else ""
    check = ("Check ", Argument("model"), ", ", Argument("model_args"), " and ", Argument("input_size"), ".")
    return refusal(checkpoint.file, f"has other shapes: {', '.join(shapes[:5])}{more}. ", *check)
