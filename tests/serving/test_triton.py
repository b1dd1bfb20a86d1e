"""A repository for Triton. There is no Triton here: its Python part runs against stand-ins, which give the pieces to ONNX Runtime."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from extras import needs_onnx
from served import T, images
from small import SIZE, blended, made

from ptee._common.errors import RunError
from ptee.serving.triton import export_triton, model_name

pytestmark = [
    pytest.mark.cpu("what is exported is the same on every device"),
    pytest.mark.slow,
    needs_onnx,
]


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def as_numpy(self) -> np.ndarray:
        return self._array


def stand_in(repository: Path) -> ModuleType:
    """`triton_python_backend_utils`, as far as the model calls it. Tensors of rows alone are (b, 1), as Triton hands them on."""
    import onnxruntime

    module: Any = ModuleType("triton_python_backend_utils")

    class TritonModelException(Exception):  # noqa: N818 - its name there
        pass

    class InferenceRequest:
        def __init__(
            self, model_name: str, requested_output_names: list[str], inputs: list[Tensor], preferred_memory: Any
        ) -> None:
            self.model, self.wanted, self.given = model_name, requested_output_names, inputs

        async def async_exec(self) -> Any:
            await asyncio.sleep(0)
            config = (repository / self.model / "config.pbtxt").read_text()
            most, rows = int(re.search(r"max_batch_size: (\d+)", config)[1]), len(self.given[0]._array)
            if most and rows > most:  # as Triton does
                error = SimpleNamespace(message=lambda: f"inference request batch-size must be <= {most}, not {rows}")
                return SimpleNamespace(has_error=lambda: True, error=lambda: error)
            session = onnxruntime.InferenceSession(
                repository / self.model / "1" / "model.onnx", providers=["CPUExecutionProvider"]
            )
            sizes = {t.name: len(t.shape) for t in session.get_inputs()}
            feed = {t._name: t._array.reshape(t._array.shape[: sizes[t._name]]) for t in self.given}
            said = zip(self.wanted, session.run(self.wanted, feed), strict=True)
            tensors = {name: Tensor(name, a[:, None] if a.ndim == 1 else a) for name, a in said}
            return SimpleNamespace(has_error=lambda: False, tensors=tensors)

    module.Tensor, module.TritonModelException = Tensor, TritonModelException
    module.TritonError = str
    module.InferenceRequest = InferenceRequest
    module.InferenceResponse = lambda output_tensors=(), error=None: SimpleNamespace(
        tensors={t._name: t._array for t in output_tensors}, error=error
    )
    module.TRITONSERVER_MEMORY_CPU, module.PreferredMemory = 0, lambda kind, number: None
    module.get_input_tensor_by_name = lambda request, name: request.get(name)
    module.get_output_tensor_by_name = lambda response, name: response.tensors[name]
    return module


def module_of(file: Path) -> Any:
    """A module that lies in no package."""
    spec = importlib.util.spec_from_file_location(f"{file.stem}_here", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(repository: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model as Triton would load it."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in(repository))
    model = module_of(repository / name / "1" / "model.py").TritonPythonModel()
    model.initialize({"model_repository": str(repository / name), "model_version": "1"})
    return model


def request(x: np.ndarray, threshold: Any = None) -> dict[str, Tensor]:
    given = {"IMAGES": Tensor("IMAGES", x)}
    return (
        given
        if threshold is None
        else given | {"THRESHOLD": Tensor("THRESHOLD", np.asarray(threshold, dtype=np.float32))}
    )


@pytest.mark.parametrize("make", [made, blended])
def test_the_loop_of_the_repository_answers_as_predict(make, tmp_path, monkeypatch):
    model = make()
    model.threshold = T
    repository = export_triton(model, tmp_path / "repository")
    served = loaded(repository, model_name(model.plan.backbone), monkeypatch)
    x = images(20)
    asked = [None, 0.0, 2.0, [2.0, 0.4], [0.5]]
    responses = asyncio.run(served.execute([request(x, threshold) for threshold in asked]))
    for threshold, response in zip(asked, responses, strict=True):
        with torch.no_grad():
            want = model.predict(torch.from_numpy(x), threshold)
        assert response.error is None
        assert response.tensors["EXIT"].tolist() == want.exit_index.tolist()
        np.testing.assert_allclose(response.tensors["LOGITS"], want.logits.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(response.tensors["COST"], want.cost.numpy())
        np.testing.assert_allclose(response.tensors["CONFIDENCE"], want.confidence.numpy(), atol=1e-4)
        assert response.tensors["CLASS"].tolist() == want.logits.argmax(1).tolist()


def test_more_images_than_a_piece_takes_at_once_are_answered_in_parts(tmp_path, monkeypatch):
    model = made()
    model.threshold = T
    repository = export_triton(model, tmp_path / "repository")
    served = loaded(repository, model_name(model.plan.backbone), monkeypatch)
    x = images(300)
    (response,) = asyncio.run(served.execute([request(x)]))
    with torch.no_grad():
        want = model.predict(torch.from_numpy(x))
    assert response.error is None
    assert response.tensors["EXIT"].tolist() == want.exit_index.tolist()
    np.testing.assert_allclose(response.tensors["LOGITS"], want.logits.numpy(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_answered_is_an_error_of_one_line(tmp_path, monkeypatch):
    repository = export_triton(made(), tmp_path / "repository")
    served = loaded(repository, model_name(made().plan.backbone), monkeypatch)
    wrong = [request(np.zeros((1, 3, 9, 9), np.float32)), request(images(1), [1, 2, 3]), request(images(1), np.nan)]
    *bad, good = asyncio.run(served.execute([*wrong, request(images(1))]))
    assert all("\n" not in response.error for response in bad)
    assert good.error is None


def test_the_configurations_are_those_of_triton(tmp_path):
    client = pytest.importorskip("tritonclient", reason="needs pip install tritonclient protobuf")
    from google.protobuf import text_format

    config = module_of(Path(client.__path__[0]) / "grpc" / "model_config_pb2.py")  # the package itself asks for grpc
    repository = export_triton(made(), tmp_path / "repository")
    found = {
        file.parent.name: text_format.Parse(file.read_text(), config.ModelConfig())
        for file in repository.glob("*/config.pbtxt")
    }
    name = model_name(made().plan.backbone)
    assert set(found) == {name, *(f"{name}_piece_{n}" for n in range(3))}
    assert all(each.name == folder for folder, each in found.items())
    assert found[name].backend == "python"
    first = found[f"{name}_piece_0"]
    assert (
        first.platform == "onnxruntime_onnx" and list(first.input[0].dims) == list(SIZE) and first.max_batch_size == 64
    )
    assert first.HasField("dynamic_batching")


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    with pytest.raises(RunError, match="exists"):
        export_triton(made(), tmp_path / "there")
    assert [file.name for file in tmp_path.rglob("*")] == ["there", "mine"]


def test_the_pieces_are_named_in_a_file(tmp_path):
    model = made()
    model.off = [1]
    repository = export_triton(model, tmp_path / "repository")
    facts = json.loads((repository / model_name(model.plan.backbone) / "1" / "pieces.json").read_text())
    assert facts["off"] == [1] and len(facts["pieces"]) == 2 and facts["thresholds"] == model.threshold
