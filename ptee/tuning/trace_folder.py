"""A folder of traces as data: what `ptee trace` wrote of very many images, read column by column.

What is kept in memory of n images is a few numbers for each exit; the logits only where something asks for them, and only as
many as fit into `LIMIT`. Images stand in an order of their keys, so it does not matter which engine wrote them, nor how.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptee._common.errors import DataError, PteeError
from ptee._common.files import as_path, plain
from ptee._common.text import Readable, number_of
from ptee._common.validation import checked
from ptee.backbones.weights import recorded_hashes, weights_hash
from ptee.data.batches import UNKNOWN_LABEL
from ptee.data.labels import no_accuracy, usable_labels
from ptee.data.parts import Manifest, key_hashes, numbers, read_marks, read_whole, row_groups
from ptee.data.recorded import RecordedTraces
from ptee.exits.confidence import LEARNED, log_odds
from ptee.exits.config import BLENDED
from ptee.model.early_exit import EarlyExitModel
from ptee.tuning.traces import MANY_CLASSES, Traces, as_answered, costs_of

LIMIT = 4 * 2**30  # bytes of logits that are read into memory
LEAST = 1e-30  # a probability that has no logarithm is taken for this one


@dataclass(frozen=True)
class TraceFolder(Readable, RecordedTraces):
    """The traces of one run, or of several runs of one backbone on the same images. Data of `tune`, `evaluate` and the like."""

    folders: tuple[Path, ...]
    manifests: tuple[Manifest, ...]

    def __str__(self) -> str:
        return self.words

    def __len__(self) -> int:
        """n, without images that could not be read."""
        return self.manifests[0].rows

    @property
    def words(self) -> str:
        """What it holds, in a sentence."""
        bad = self.manifests[0].unreadable
        left_out = f", without {bad:,} that cannot be used" if bad else ""
        return f"{self.folders[0]}: traces of {number_of(len(self), 'image')}{left_out}."

    @cached_property
    def _keys(self) -> list[np.ndarray]:
        """For each folder, (n,) a hash of each image's key, in the order of its rows."""
        return [key_hashes(folder, manifest) for folder, manifest in zip(self.folders, self.manifests, strict=True)]

    @cached_property
    def images_sha256(self) -> str:
        """A hash of the keys of all images, in whichever order they were written.

        Raises:
            DataError: if the folders hold other images.
        """
        found = [hashlib.sha256(np.sort(keys).tobytes()).hexdigest() for keys in self._keys]
        for folder, other in zip(self.folders, found, strict=True):
            if other != found[0]:
                raise DataError(
                    f"{folder} holds traces of other images than {self.folders[0]}. Record both of one source."
                )
        return found[0]

    @cached_property
    def labels(self) -> Tensor:
        """(n,) -1 where there is none."""
        found = _columns(self.folders[0], self.manifests[0], {"label": (0, np.int32)})["label"]
        return torch.from_numpy(found[self._order(0)]).long()

    @property
    def labelled(self) -> bool:
        """As of `RecordedTraces`."""
        return bool((self.labels != UNKNOWN_LABEL).all())

    def backbone_answers(self, model: EarlyExitModel) -> tuple[Tensor, Tensor]:
        """The backbone's answers (n,) and the labels (n,), -1 where there is none.

        Raises:
            DataError: if none of the folders is of this model.
        """
        which = self._folder_of(model)
        wanted: dict[str, tuple[int, Any]] = {"answers": (len(model.exits) + 1, np.int32), "label": (0, np.int32)}
        found = _columns(self.folders[which], self.manifests[which], wanted)
        return torch.from_numpy(found["answers"][:, -1].copy()).long(), torch.from_numpy(found["label"]).long()

    def marks(self, rows: Tensor | None) -> Tensor:
        """As of `RecordedTraces`."""
        return read_marks(self.folders[0], self.manifests[0])[torch.from_numpy(self._order(0, rows))]

    def _order(self, which: int, rows: Tensor | None = None) -> np.ndarray:
        """(m,) where all images, or these rows of them, stand in a folder."""
        order = np.argsort(self._keys[which], kind="stable")
        return order if rows is None else order[rows.numpy()]

    def traces(self, model: EarlyExitModel, *, rows: Tensor | None, logits: bool, own: bool) -> Traces:
        """As of `RecordedTraces`.

        Raises:
            DataError: if none of the folders is of this model, or the logits that are wanted were not kept or are too many.
        """
        which = self._folder_of(model)
        manifest, folder = self.manifests[which], self.folders[which]
        E, K = len(model.exits), model.num_classes
        again = recorded_confidence(model) != manifest.about["confidence"]
        blended = model.answers == BLENDED and not own
        order = self._order(which, rows)
        wanted: dict[str, tuple[int, Any]] = {
            "label": (0, np.int32),
            "answers": (E + 1, np.int32),
            "confidence": (E, np.float32),
            "mark": (0, np.int64),
            "confidence_logits": (E, np.float32),
        }
        if logits or again or blended:
            self._require_logits(which, (E + 1) * K * len(order))
            wanted |= _of_logits(manifest, E, K)
        place = np.full(len(self), -1, dtype=np.int64)
        place[order] = np.arange(len(order))
        found = {name: torch.from_numpy(x) for name, x in _columns(folder, manifest, wanted, place).items()}
        return self._made(model, found, again, blended, logits)

    def _made(
        self, model: EarlyExitModel, found: Mapping[str, Tensor], again: bool, blended: bool, logits: bool
    ) -> Traces:
        n, E, K = len(found["label"]), len(model.exits), model.num_classes
        z = _logits(found, E, K) if "logits" in found else None
        targets, fault = usable_labels(found["label"].long(), K)
        traces = Traces(
            found["answers"].long().T.contiguous(),
            torch.cat([found["confidence"].T, torch.ones(1, n, dtype=torch.float32, device="cpu")]),
            targets,
            sample=torch.zeros(0, *model.plan.input_size, dtype=torch.float32, device="cpu"),
            logits=z,
            note=no_accuracy(fault),
            confidence_logits=found["confidence_logits"].T.contiguous(),
            confidence_name=LEARNED if again else model.confidence,
            calibrated=model.calibrated,
            marks=found["mark"],
            **costs_of(model),
        )
        if again:  # the model has another confidence now than when its answers were recorded
            traces = replace(traces, confidence_name="").under(model.confidence)
        if blended:
            traces = as_answered(model, traces)
        return traces if logits else replace(traces, logits=None, confidence_logits=None)

    def _folder_of(self, model: EarlyExitModel) -> int:
        """Which of the folders is of a model. All of them hold the same images, or else they are refused."""
        _ = self.images_sha256
        heads, same = weights_hash(model.heads)[:16], False
        for backbone in recorded_hashes(model.backbone, model.plan.input_size):
            of_backbone = [n for n, each in enumerate(self.manifests) if each.about["backbone"] == backbone]
            if found := [n for n in of_backbone if self.manifests[n].about["heads"] == heads]:
                return found[0]
            same |= bool(of_backbone)
        names = ", ".join(map(str, self.folders))
        what = "heads" if same else "another backbone"
        raise DataError(
            f"{names} {'holds' if len(self.folders) == 1 else 'hold'} traces of {'other ' * same}{what}, not of this run. Record "
            "this run: ptee trace RUN."
        )

    def _require_logits(self, which: int, numbers: int) -> None:
        """Refuse logits that a folder did not keep, or so many numbers of them that memory would not hold them."""
        if self.manifests[which].about["logits"] == 0:
            text = "holds no logits, which this needs. Record them, or ask for the exits' own answers."
            raise DataError(f"{self.folders[which]} {text}")
        if (size := 6 * numbers) > LIMIT:  # in half precision, and in single precision while they are blended
            raise DataError(
                f"The logits take {size / 2**30:.0f} GiB of memory, more than {LIMIT / 2**30:.0f} GiB. Ask for the "
                "exits' own answers (answers='own'), which need none."
            )

    def can_give_logits(self, model: EarlyExitModel, rows: Tensor | None) -> bool:
        """As of `RecordedTraces`."""
        n = len(self) if rows is None else len(rows)
        try:
            which = self._folder_of(model)
            self._require_logits(which, (len(model.exits) + 1) * model.num_classes * n)
        except DataError:
            return False
        return True

    def for_calibration(self, model: EarlyExitModel, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, str]:
        """As of `RecordedTraces`. The logits of some thousand images are in memory at once.

        Raises:
            DataError: if none of the folders is of this model, or no logits were kept.
        """
        which = self._folder_of(model)
        folder, manifest, E = self.folders[which], self.manifests[which], len(model.exits)
        self._require_logits(which, 0)
        of_logits = _of_logits(manifest, E, model.num_classes)
        odds, answers = [], []
        for group in row_groups(folder, manifest, ["answers", *of_logits]):
            found = {name: torch.from_numpy(numbers(folder, group[name], *how)) for name, how in of_logits.items()}
            odds.append(log_odds(_logits(found, E, model.num_classes)[:-1].float()))
            answers.append(torch.from_numpy(numbers(folder, group["answers"], E + 1, np.int32)).long().T)
        order = torch.from_numpy(self._order(which, rows))
        labels = self.labels if rows is None else self.labels[rows]
        targets, fault = usable_labels(labels, model.num_classes)
        return torch.cat(odds, 1)[:, order], torch.cat(answers, 1)[:, order], targets, fault


@checked
def open_traces(*folders: str | Path) -> TraceFolder:
    """The traces in folders that `ptee.record` or `ptee trace` wrote: of one run, or of several runs of one backbone on the same images.

    Raises:
        DataError: if one is not finished, is damaged, or holds something else.
    """
    if not folders:
        raise PteeError("Give a folder of traces.", argument="folders")
    paths = tuple(as_path(folder, "folders") for folder in folders)
    manifests = []
    for path in paths:
        manifest = read_whole(path, "traces")
        missing = [key for key in ("heads", "backbone", "confidence", "logits") if key not in manifest.about]
        if missing or not (manifest.about["logits"] == "all" or type(manifest.about["logits"]) is int):
            raise DataError(
                f"{path}: its manifest does not say {missing[0] if missing else 'logits'}. Record it again."
            )
        if not manifest.rows:
            raise DataError(f"{path} holds no image that can be used.")
        manifests.append(manifest)
    return TraceFolder(paths, tuple(manifests))


def recorded_confidence(model: EarlyExitModel) -> dict[str, Any]:
    """What a manifest says of a model's confidence."""
    return {"name": model.confidence} | (plain(model.calibrated) if model.calibrated is not None else {})


def _of_logits(manifest: Manifest, exits: int, num_classes: int) -> dict[str, tuple[int, Any]]:
    """The columns that hold logits, with their width and type."""
    kept = manifest.about["logits"]
    if kept == "all":
        return {"logits": ((exits + 1) * num_classes, np.float16)}
    width = (exits + 1) * min(kept, num_classes)
    return {"logits": (width, np.float16), "classes": (width, np.int32)}


def _columns(
    folder: Path, manifest: Manifest, wanted: Mapping[str, tuple[int, Any]], place: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Columns of all rows, by name, width (0: a number in each row) and type. `place`: (n,) where each row goes, or -1."""
    n = manifest.rows if place is None else int((place >= 0).sum())
    found = {name: np.empty((n, width) if width else n, kind) for name, (width, kind) in wanted.items()}
    start = 0
    for group in row_groups(folder, manifest, list(wanted)):
        to = np.arange(start, start + len(group)) if place is None else place[start : start + len(group)]
        for name, (width, kind) in wanted.items():
            found[name][to[to >= 0]] = numbers(folder, group[name], width, kind)[to >= 0]
        start += len(group)
    return found


def _logits(found: Mapping[str, Tensor], exits: int, num_classes: int) -> Tensor:
    """(E+1, n, K) log-probabilities. Of those that were not kept, each gets an equal share of what is left."""
    z = found["logits"].view(len(found["logits"]), exits + 1, -1).transpose(0, 1)
    if "classes" not in found:
        return z.float() if num_classes <= MANY_CLASSES else z.contiguous()
    classes = found["classes"].view(len(found["logits"]), exits + 1, -1).transpose(0, 1).long()
    left = (1 - z.float().exp().sum(-1, keepdim=True)).clamp(min=LEAST) / max(1, num_classes - z.shape[-1])
    return left.log().expand(*z.shape[:2], num_classes).contiguous().scatter_(-1, classes, z.float())
