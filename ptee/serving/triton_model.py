"""The model of a repository for NVIDIA Triton that runs the pieces: `ptee export --format triton` copies this file there.

Triton's Python has numpy and `triton_python_backend_utils`, and no ptee. Each request runs through the pieces as `predict` does. The
requests of a batch do so at once, so that Triton's dynamic batching fills the later pieces with the rows that are left of each.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # Triton gives it

LIMITED = "THRESHOLD"


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what the pieces are, which stands beside this file."""
        place = Path(args["model_repository"]) / args["model_version"] / "pieces.json"
        self.facts: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        self.exits = len(self.facts["thresholds"])

    async def execute(self, requests: list[Any]) -> list[Any]:
        """The responses, one for each request."""
        return list(await asyncio.gather(*map(self._response, requests)))

    async def _response(self, request: Any) -> Any:
        try:
            images = pb_utils.get_input_tensor_by_name(request, "IMAGES").as_numpy()
            found = await self._answered(images, self._limits(request, images))
        except (ValueError, pb_utils.TritonModelException) as why:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(" ".join(str(why).split())))
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor(name, array) for name, array in found.items()]
        )

    def _limits(self, request: Any, images: np.ndarray) -> np.ndarray:
        """Thresholds (b, E): of the request, or those of the export."""
        if images.ndim != 4 or list(images.shape[1:]) != self.facts["input_size"] or not len(images):
            raise ValueError(f"This model takes images (b, {self.facts['input_size']}), not {images.shape}.")
        given = pb_utils.get_input_tensor_by_name(request, LIMITED)
        limits = np.asarray(self.facts["thresholds"] if given is None else given.as_numpy(), dtype=np.float64).reshape(
            -1
        )
        if len(limits) not in (1, self.exits) or np.isnan(limits).any():
            raise ValueError(f"{LIMITED} is one number, or one for each of the {self.exits} exits.")
        wide = np.broadcast_to(limits, (len(images), self.exits)).copy()
        wide[:, self.facts["off"]] = np.inf
        return wide

    async def _answered(self, images: np.ndarray, limits: np.ndarray) -> dict[str, np.ndarray]:
        *early, last = self.facts["pieces"]
        rows, alive = np.arange(len(images)), [images]
        logits = np.zeros((len(images), self.facts["classes"]), dtype=np.float32)
        exits = np.full(len(images), self.exits, dtype=np.int64)
        h = np.ones(len(images), dtype=np.float32)
        for piece in early:
            *alive, said, sure = await self._run(piece, alive)
            sure = sure.reshape(-1)  # Triton gives (b, 1)
            leaving = sure.astype(np.float64) >= limits[rows, piece["exit"]]
            gone = rows[leaving]
            logits[gone], exits[gone], h[gone] = said[leaving], piece["exit"], sure[leaving]
            stay = np.flatnonzero(~leaving)
            rows, alive = rows[stay], [_select(t, stay, *w) for t, w in zip(alive, piece["rows"], strict=True)]
            if not len(rows):
                break
        if len(rows):
            own, blended = await self._run(last, alive)
            possible = np.any(limits[rows][:, [piece["exit"] for piece in early]] <= 1, axis=1)
            logits[rows] = np.where(possible[:, None], blended, own)
        return _outputs(logits, exits, h, np.asarray(self.facts["costs"], dtype=np.float32))

    async def _run(self, piece: dict[str, Any], alive: list[np.ndarray]) -> list[np.ndarray]:
        """A piece, in parts of at most as many rows as it takes, all asked for at once: Triton refuses larger ones."""
        rows = len(alive[0])
        most = piece["max_batch"] or rows
        parts = [[t[first : first + most] for t in alive] for first in range(0, rows, most)]
        found = await asyncio.gather(*(self._run_part(piece, part) for part in parts))
        return [np.concatenate(column) for column in zip(*found, strict=True)] if len(found) > 1 else found[0]

    async def _run_part(self, piece: dict[str, Any], alive: list[np.ndarray]) -> list[np.ndarray]:
        """A piece, as a model of the same repository."""
        given = [pb_utils.Tensor(name, np.ascontiguousarray(t)) for name, t in zip(piece["inputs"], alive, strict=True)]
        names = piece["outputs"]
        wanted = list(dict.fromkeys(names))
        request = pb_utils.InferenceRequest(
            model_name=piece["model"], requested_output_names=wanted, inputs=given,
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )  # fmt: skip
        response = await request.async_exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        return [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in names]


def _select(t: np.ndarray, rows: np.ndarray, axis: int, each: int) -> np.ndarray:
    """The part of an array that belongs to these rows."""
    return np.take(t, (rows[:, None] * each + np.arange(each)).reshape(-1), axis)


def _outputs(logits: np.ndarray, exits: np.ndarray, h: np.ndarray, costs: np.ndarray) -> dict[str, np.ndarray]:
    wide = logits.astype(np.float64)
    probability = 1 / np.exp(wide - wide.max(1, keepdims=True)).sum(1)
    return {
        "LOGITS": logits, "CLASS": logits.argmax(1).astype(np.int64), "PROBABILITY": probability.astype(np.float32),
        "EXIT": exits, "CONFIDENCE": h, "COST": costs[exits],
    }  # fmt: skip
