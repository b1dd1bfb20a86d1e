"""Runs an exported model: needs torch, or ONNX Runtime and numpy, and nothing of the network's own code.

`python -m ptee.deploy.runner FOLDER IMAGE ...` answers pictures.
"""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ptee._common.errors import DataError, PteeError, RunError, first_line, unknown, warn
from ptee._common.files import as_path, require_not_compressed
from ptee._common.process import lead_nowhere, ready_streams, report_nothing, unwritable
from ptee._common.text import as_shares, number_of, one_line, type_name
from ptee._common.validation import checked, named
from ptee.data.pixels import FORMATS, model_input
from ptee.deploy.arrays import Array, answers_at_end, as_numpy, join_rows, like, select_rows
from ptee.deploy.manifest import MAX_ROWS, PICTURES_NOT_KNOWN, Manifest, read_manifest
from ptee.exits.config import doubt, require_no_percentage, threshold_numbers, wrong_number


class Answers(NamedTuple):
    """What `predict` answers, one entry for each row of the batch. Arrays of numpy for ONNX, tensors of torch for pt2.

    Attributes:
        logits: (b, K) of the exit at which the row left.
        exit_index: (b,) that exit, 0..E; E is the backbone's own output.
        confidence: (b,) h of that exit; 1 at E.
        cost: (b,) what the row cost, as a fraction of the bare backbone.
    """

    logits: Array
    exit_index: Array
    confidence: Array
    cost: Array


class Runner:
    """An exported early-exit model. Made by `load_exported`.

    Attributes:
        manifest: what it was exported with.
        pieces: for each piece of the manifest what runs it. It gives (what is alive ..., logits (b, K), h (b,)); the last gives the
            backbone's answer and the blended one.
        device: where they run.
    """

    def __init__(self, manifest: Manifest, pieces: Sequence[Callable[..., Sequence[Array]]], device: str) -> None:
        self.manifest, self.pieces, self.device = manifest, pieces, device
        self._thresholds = self._each(manifest.thresholds)
        self._again: partial[Runner] | None = None

    def __reduce__(self) -> Any:
        """A copy, here or in another process, opens the folder again; its thresholds are those of now."""
        if self._again is None:
            raise PteeError(
                "Only what ptee.load_exported opened can be copied or pickled: a copy opens its folder again."
            )
        return _opened_again, (self._again, self.manifest.fingerprint, self._thresholds.copy())

    def __repr__(self) -> str:
        return f"Runner({self.manifest.backbone}, {number_of(len(self.manifest.exits), 'exit')}, on {self.device})"

    def __setattr__(self, name: str, value: Any) -> None:
        """A misspelt or fixed setting would be taken without a word, and change nothing."""
        if not name.startswith("_") and name not in ("manifest", "pieces", "device", "threshold"):
            raise unknown("setting of an exported model", name, ["threshold"], argument=name)
        super().__setattr__(name, value)

    @property
    def threshold(self) -> list[float]:
        """T of each exit. Set it at any time, to one number or one for each exit; what may be one is as for `EarlyExitModel`."""
        return self._thresholds.tolist()

    @threshold.setter
    def threshold(self, value: Any) -> None:
        wide = self._each(value)
        if wide.ndim != 1:
            raise wrong_number(" x ".join(map(str, wide.shape)), len(self.manifest.exits), value)
        self._thresholds = wide

    def _each(self, value: Any) -> np.ndarray:
        """(E,) or (b, E) thresholds."""
        exits, given = len(self.manifest.exits), threshold_numbers(value)
        if given.ndim < 2 and (words := doubt(given.ravel().tolist())):
            warn(words)
        try:
            wide = np.broadcast_to(given, (*given.shape[:-1], exits))
        except ValueError as why:
            raise wrong_number(str(given.shape[-1]), exits, value) from why
        if wide.ndim > 2:
            raise wrong_number(" x ".join(map(str, given.shape)), exits, value)
        return wide

    def __call__(self, x: Array) -> Array:
        """Logits (b, K)."""
        return self.predict(x).logits

    @named
    def predict(self, x: Array, threshold: Any = None) -> Answers:
        """Answer each row at the first exit with h >= T.

        Args:
            x: (b, c, h, w) images, an array of numpy for ONNX or a tensor for pt2.
            threshold: for this call; None: `self.threshold`.

        Raises:
            PteeError: for images of another size or type.
        """
        x = self._prepared(x)
        limits = self._thresholds if threshold is None else self._each(threshold)
        try:
            limits = np.broadcast_to(limits, (len(x), len(self.manifest.exits))).copy()
        except ValueError as why:
            raise PteeError(f"Thresholds of shape {limits.shape} do not fit {len(x)} images.") from why
        limits[:, list(self.manifest.off)] = np.inf  # their answers are for later exits
        parts: list[tuple[np.ndarray, int, Array, np.ndarray]] = []
        rows, alive = np.arange(len(x)), [x]
        for piece, run in zip(self.manifest.pieces[:-1], self.pieces, strict=False):
            *alive, logits, h = run(*alive)
            h = as_numpy(h).astype(np.float32)
            leaving = h.astype(np.float64) >= limits[rows, piece.exit]
            gone, stay = np.flatnonzero(leaving), np.flatnonzero(~leaving)
            if len(gone):
                parts.append((rows[gone], piece.exit, logits[gone], h[gone]))
            if not len(stay):
                break
            if len(gone):
                rows = rows[stay]
                alive = [select_rows(t, stay, *where) for t, where in zip(alive, piece.rows, strict=True)]
        else:
            parts.append(self._end(rows, limits, *self.pieces[-1](*alive)))
        return self._joined(parts)

    def _end(
        self, rows: np.ndarray, limits: np.ndarray, own: Array, blended: Array
    ) -> tuple[np.ndarray, int, Array, np.ndarray]:
        """Rows that no exit could take get the backbone's own answer."""
        possible = (limits[rows][:, self.manifest.ends[:-1]] <= 1).any(1)
        logits = answers_at_end(possible, own, blended)
        return rows, len(self.manifest.exits), logits, np.ones(len(rows), dtype=np.float32)

    def _joined(self, parts: Sequence[tuple[np.ndarray, int, Array, np.ndarray]]) -> Answers:
        back = np.argsort(np.concatenate([rows for rows, *_ in parts]))
        exits = np.concatenate([np.full(len(rows), exit) for rows, exit, *_ in parts])[back]
        logits = join_rows([logits for *_, logits, _ in parts])[back]
        h = np.concatenate([h for *_, h in parts])[back]
        cost = np.asarray(self.manifest.costs, dtype=np.float32)[exits]
        return Answers(logits, *(like(logits, t) for t in (exits, h, cost)))

    def _prepared(self, x: Array) -> Array:
        size, dtype = tuple(self.manifest.input_size), self.manifest.dtype
        if self.manifest.format == "onnx":
            kind, fits, cast = "an array of numpy", isinstance(x, np.ndarray), f"x.astype({dtype!r})"
            advice = " Give x.cpu().numpy()." * hasattr(x, "cpu")
        else:
            import torch

            from ptee.data.batches import require_plain

            kind, fits, cast = "a tensor of torch", isinstance(x, torch.Tensor), f"x.to(torch.{dtype})"
            advice = " Give torch.from_numpy(x)." * isinstance(x, np.ndarray)
            require_plain(x)
        if not fits:
            raise PteeError(f"This model takes {kind} (b, c, h, w), not {type(x).__name__}.{advice}")
        if x.ndim != 4 or tuple(x.shape[1:]) != size or not len(x):
            one = " For one image give x[None]." if tuple(x.shape) == size else ""
            wanted = f"images (b, {', '.join(map(str, size))}), b of 1 or more"
            raise PteeError(f"This model takes {wanted}, not {tuple(x.shape)}.{one}")
        if type_name(x.dtype) != dtype:
            raise PteeError(f"This model takes images of type {dtype}, not {x.dtype}. Give them normalised, as {cast}.")
        if isinstance(x, np.ndarray):
            return x
        if len(x) > MAX_ROWS:
            raise PteeError(f"This model takes up to {MAX_ROWS:,} images at once, not {len(x):,}. Give them in parts.")
        return x.to(self.device)

    def try_out(self) -> None:
        """Answer images of zeros, one of which leaves at the first exit."""
        x = np.zeros((2, *self.manifest.input_size), dtype=np.float32)
        limits = np.full((2, len(self.manifest.exits)), 2.0)
        limits[0] = 0.0
        out = self.predict(self.from_host(x), limits)
        if tuple(out.logits.shape) != (2, self.manifest.classes):
            raise ValueError(f"answers have the shape {tuple(out.logits.shape)}")

    def images(self, paths: Sequence[str | Path]) -> Array:
        """Pictures from files, as the model takes them: (b, c, h, w).

        Raises:
            PteeError: if one cannot be read, or nobody said how they are normalised.
        """
        self.require_pixels_known()
        return self.from_host(np.stack([self._picture(path) for path in paths]))

    def require_pixels_known(self) -> None:
        """Refuse pictures if nobody said by which mean and std they are normalised."""
        if not self.manifest.pixels_known:
            raise PteeError(PICTURES_NOT_KNOWN)

    def _picture(self, path: str | Path) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(path, formats=FORMATS) as file:
                m = self.manifest
                return model_input(file, m.input_size, m.mean, m.std, m.interpolation)
        except FileNotFoundError as why:
            raise PteeError(f"There is no file {path}.") from why
        except IsADirectoryError as why:
            raise PteeError(f"{path} is a folder. Name the pictures in it, such as {path}/*.jpg.") from why
        except (OSError, DataError) as why:
            raise PteeError(f"{path} is no picture that can be read: {first_line(why)}") from why

    def from_host(self, x: np.ndarray) -> Array:
        """Images (b, c, h, w) float32 as `predict` takes them: of the model's number type, and a tensor for pt2."""
        if self.manifest.format == "onnx":
            return x.astype(self.manifest.dtype)
        import torch

        return torch.from_numpy(x).to(getattr(torch, self.manifest.dtype))


@checked
def load_exported(folder: str | Path, device: str | None = None, *, threads: int | None = None) -> Runner:
    """Open what `ptee.export` or `ptee export` wrote.

    Args:
        folder: with its manifest.
        device: "cpu", "cuda" or "cuda:1"; None: the CPU.
        threads: of ONNX Runtime on a CPU. None: its own choice, one for each core. For torch, `torch.set_num_threads` says it.

    Raises:
        RunError: if a file is missing, was changed, or is of a newer version.
        PteeError: if a library or the device is missing.
    """
    place, device = as_path(folder, "folder"), str(device or "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise PteeError(
            f"device={device!r:.60} is not possible. Give 'cpu' or 'cuda'.", argument="device", value=device
        )
    manifest = read_manifest(place)
    load = partial(onnx_piece, threads=threads) if manifest.format == "onnx" else _pt2
    runner = Runner(manifest, [load(place / piece.file, device) for piece in manifest.pieces], device)
    runner._again = partial(load_exported, place.absolute(), device, threads=threads)
    try:
        runner.try_out()
    except Exception as why:  # whatever the library raises
        raise RunError(
            f"{place}: its files do not fit its manifest ({first_line(why)}) Export the model again."
        ) from why
    return runner


def _opened_again(opened: partial[Runner], fingerprint: str, thresholds: np.ndarray) -> Runner:
    runner = opened()
    if runner.manifest.fingerprint != fingerprint:
        raise RunError(
            f"{opened.args[0]} holds another model than the one that was copied or pickled: it was exported again. Open it by "
            "ptee.load_exported, and copy or pickle that."
        )
    runner._thresholds = thresholds
    return runner


def onnx_piece(file: Path, device: str, threads: int | None = None) -> Callable[..., Sequence[Array]]:
    """What runs a file by ONNX Runtime."""
    report_nothing()
    try:
        import onnxruntime
    except ImportError as why:
        raise PteeError("This model needs ONNX Runtime: pip install onnxruntime") from why
    provider = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise PteeError(
            f"ONNX Runtime has no {provider} here, so device={device!r} is not possible. Give device='cpu'."
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it prints names from the file as they are; what fails it raises, too
    options.intra_op_num_threads = threads or 0
    # Each piece has threads of its own. Those of one that is done would go on spinning while the next one computes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    gpu = {"device_id": int(device.partition(":")[2] or 0)} if device.startswith("cuda") else {}
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=[(provider, gpu)])
    except Exception as why:  # whatever the runtime raises
        raise RunError(f"{file} is no model that ONNX Runtime can read: {first_line(why)}") from why
    session.disable_fallback()  # to the CPU, without a word
    if session.get_providers()[0] != provider:
        raise PteeError(
            f"ONNX Runtime cannot load its {provider} here, so device={device!r} is not possible. Give device='cpu'."
        )
    names = [given.name for given in session.get_inputs()]
    return lambda *alive: session.run(None, dict(zip(names, alive, strict=True)))


def _pt2(file: Path, device: str) -> Callable[..., Sequence[Array]]:
    import torch

    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= (gpus := torch.cuda.device_count()):
        there = f"{gpus} NVIDIA GPUs are here" if gpus else "no NVIDIA GPU is here"
        text = f"device={device!r} is not possible: {there}. Give 'cpu' or another."
        raise PteeError(text, argument="device", value=device)
    module = _program(file, device)

    def run(*alive: Any) -> Sequence[Any]:
        with torch.no_grad(), torch.autocast(device.partition(":")[0], enabled=False):  # a program has its own types
            return module(*alive)

    return run


def _program(file: Path, device: str) -> Any:
    """The module in a file, which was made on a CPU, on another device."""
    import torch
    from torch.export.passes import move_to_device_pass

    from ptee._common.process import no_logs, no_pickles

    try:
        with zipfile.ZipFile(file) as archive:
            require_not_compressed(file, archive)
        with no_pickles, no_logs, torch.device("cpu"):  # whatever torch's default device is
            program = torch.export.load(file)
            return (program if device == "cpu" else move_to_device_pass(program, device)).module()
    except Exception as why:  # whatever torch raises
        raise RunError(f"{file} cannot be loaded: {first_line(why)}") from why


USAGE = "usage: python -m ptee.deploy.runner FOLDER IMAGE ..."
THRESHOLD = "--threshold"
HELP = f"""{USAGE}

Answers pictures with a model that ptee export wrote into FOLDER: for each its class, where it left, and what it cost (1 is the whole
network). A picture that cannot be read is named, the others are answered, and the status is 2.

python -m ptee.deploy.runner exported cat.jpg dog.jpg
python -m ptee.deploy.runner exported cat.jpg --threshold 0.9       # for this call; or one for each exit: 0.9,0.8"""


def main(arguments: Sequence[str]) -> int:
    """Print the answer to each picture. The status is that of the command ptee."""
    ready_streams()
    faults: list[str] = []
    try:
        if {"-h", "--help"} & {*arguments}:
            lines = [HELP]
        else:
            threshold, words = _without_threshold(arguments)
            if len(words) < 2:
                raise PteeError(f"{USAGE}, such as exported cat.jpg. --help says more.")
            lines, faults = _answered(*words, threshold=threshold)
    except PteeError as why:
        return _say(str(why), 2)
    except KeyboardInterrupt:
        return _say("Interrupted.", 130)
    try:
        print(*lines, sep="\n", end="\n" * bool(lines), flush=True)
    except OSError as why:
        lead_nowhere()
        return _say(*unwritable(why))
    return max((_say(fault, 2) for fault in faults), default=0)


def _without_threshold(arguments: Sequence[str]) -> tuple[list[float] | None, list[str]]:
    """The numbers of --threshold, if it is given, and the other words of the call."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument(THRESHOLD, nargs="?", const="")
    given, odd = parser.parse_known_intermixed_args(arguments)
    if odd:
        raise unknown("option", odd[0], [THRESHOLD])
    if (found := given.threshold) is None:
        return None, given.words
    try:
        numbers = [float(number) for number in found.split(",")]
    except ValueError as why:
        meant = f" Did you mean {shares}?" if (shares := as_shares(found.split(","))) else ""
        text = f"{THRESHOLD} {found!r:.60} is no number. Give one, or one for each exit: 0.9,0.8.{meant}"
        raise PteeError(text) from why
    require_no_percentage(numbers)
    return numbers, given.words


def _answered(folder: str, *paths: str, threshold: Sequence[float] | None = None) -> tuple[list[str], list[str]]:
    """A line for each picture, and one for each that cannot be read. `threshold`: other ones than those of the folder."""
    runner = load_exported(folder)
    runner.require_pixels_known()
    if threshold is not None:
        runner.threshold = threshold
    read: list[tuple[str, np.ndarray]] = []
    faults: list[str] = []
    for path in paths:
        try:
            read.append((path, runner._picture(path)))
        except PteeError as why:
            faults.append(str(why))
    return _lines(runner, read) if read else [], faults


def _lines(runner: Runner, pictures: Sequence[tuple[str, np.ndarray]]) -> list[str]:
    paths, pixels = zip(*pictures, strict=True)
    out = runner.predict(runner.from_host(np.stack(pixels)))
    rows = zip(paths, as_numpy(out.logits), out.exit_index, out.cost, strict=True)
    places = [f"exit {n}" for n in range(len(runner.threshold))] + ["end of the backbone"]
    names = [f" ({name})" for name in runner.manifest.class_names] or [""] * runner.manifest.classes
    return [
        f"{path}: class {int(logits.argmax())}{names[int(logits.argmax())]}, {places[int(exit)]}, cost {float(cost):.2f}"
        for path, logits, exit, cost in rows
    ]


def _say(message: str, status: int) -> int:
    """Print one line on standard error, and give the status on."""
    try:
        print(one_line(message), file=sys.stderr, flush=True)
    except OSError:
        lead_nowhere("stderr")
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
