"""The early-exit model: a frozen backbone with a hook and a head at each cut, and a threshold for each exit.

`predict` and `all_exits` run the backbone's own forward pass. At each cut the hook asks the running call what to do
(`ptee.model.forward`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError, RunError, first_line, ran_out_of_memory
from ptee._common.files import as_path
from ptee._common.process import Lock
from ptee._common.validation import named
from ptee.analysis.freezing import Attachment, device_of, one_parameter
from ptee.analysis.replay import merged
from ptee.backbones.load import Backbone
from ptee.exits.blend import OWN, Blend, confidence_of_blend
from ptee.exits.confidence import Calibrated, find_confidence
from ptee.exits.front import FrontHead
from ptee.exits.heads import ExitHead, HeadOutput
from ptee.exits.placement import INPUT
from ptee.exits.plan import Exit, Plan
from ptee.model import card
from ptee.model import saving as runs
from ptee.model.forward import (
    AllExits,
    Call,
    ExitHook,
    ExitOutput,
    Reading,
    RecordAll,
    RecordInputs,
    StopForward,
    kind_of_call,
    running,
    widest_type,
)
from ptee.model.images import (
    detached,
    refuse_capture,
    refuse_export,
    require_device,
    require_eval,
    require_images,
    require_values,
    wrong_size,
    wrong_type,
)
from ptee.model.production import InProduction, unseen
from ptee.model.settings import DEFAULT_THRESHOLD, Settings, Thresholds, for_each_row


class EarlyExitModel(
    Settings,
    InProduction,
    nn.Module,
    ModelHubMixin,
    library_name="ptee",
    tags=["early-exit", "image-classification"],
    pipeline_tag="image-classification",
    model_card_template=card.TEMPLATE,
):
    """A classifier in which a row leaves as soon as an exit is confident. Made by `augment` and `load`.

    The backbone is the module that was given, not a copy. It is frozen and always in eval mode. The hooks at its cuts do
    nothing unless this model is called. Only the heads are trained. `detach` gives the backbone back as it was; so does
    deleting the model.

    Attributes:
        backbone: the user's module.
        heads: one ExitHead for each early exit.
        plan: where the exits stand and what they cost.
        calibrated: the two numbers of each exit that `ptee.calibrate` fitted, or None.
        blend: the weights of the answers that `ptee.tune` fitted, or None.
        results: what was measured last, JSON-able, or None; saved with the model.
    """

    _hub_mixin_config: Any = ""  # None would make the mixin keep a deep copy of the backbone

    def __init__(self, network: Backbone, plan: Plan, exit_heads: Sequence[ExitHead]) -> None:
        super().__init__()
        self.plan = plan
        self.origin = network
        self.exit_hooks = [ExitHook() for _ in plan.cuts]
        self._steps = merged([cut.steps for cut in plan.cuts])
        hooks = {cut.name: hook for cut, hook in zip(plan.cuts, self.exit_hooks, strict=True) if cut.name != INPUT}
        self._hold = Attachment(network.module, hooks, list(self._steps))
        self.backbone = network.module
        like = one_parameter(network.module)
        self.heads = nn.ModuleList(exit_heads).to(like.device, widest_type(network.module))
        self.as_built = runs.tensors_of(self)  # only such can be saved
        self.heads_as_drawn = ""  # a hash of heads that `augment` made
        self.calibrated: Calibrated | None = None
        self.blend: Blend | None = None
        self._answers = OWN
        self.choosing = Lock()
        self.results: dict[str, Any] | None = None
        self.versions: runs.Versions = {}
        self._thresholds: tuple[float, ...] = ()
        self.threshold = DEFAULT_THRESHOLD
        self.eval()
        self._answer_types: dict[tuple[torch.dtype | None, ...], torch.dtype] = {}
        self.answer_type(like.new_zeros(1, *plan.input_size))

    # -------------------------------------------------------------------------------------------- what it is

    @property
    def exits(self) -> tuple[Exit, ...]:
        """The E early exits, in order: name and costs."""
        return self.plan.exits

    @property
    def num_classes(self) -> int:
        """K, how many classes there are."""
        return self.plan.classes

    @property
    def costs(self) -> tuple[float, ...]:
        """c_0 .. c_E, what a row costs that leaves at each exit, as fractions of the bare backbone."""
        return self.plan.costs

    # -------------------------------------------------------------------------------------------- what it does

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, K) of images (b, c, h, w), each row's from the exit at which it left."""
        refuse_export()
        return self.predict(x).logits

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks for before it begins."""
        return refuse_capture()

    @torch.compiler.disable
    @named
    def predict(self, x: Tensor, threshold: Thresholds | None = None, *, soft: bool = False) -> ExitOutput:
        """Answer each row at the first exit that is confident enough; only the other rows go on.

        Each exit costs one synchronisation of GPU and host; a `threshold` tensor on the GPU one more, to check it for NaN.

        Args:
            x: (b, c, h, w) images on the model's device. Of another size than `plan.input_size` they may run; T was not chosen for them.
            threshold: for this call; anything that broadcasts to (b, E). None: `self.threshold`.
            soft: no row leaves. The answer is Y_0, blended of all exits that are on, at full cost (see `SoftAnswer`).

        Raises:
            PteeError: for a threshold that is NaN, of another shape or given for soft answers, other images, or in training mode.
        """
        if torch.jit.is_tracing():
            refuse_capture()
        refuse_export()
        require_eval(self)
        self.require_ready(x)
        require_values(x)
        steps = {self.backbone.get_submodule(name): step for name, step in self._steps.items()}
        kind = kind_of_call(soft, threshold is not None)
        with self.choosing:
            call = kind(self, len(x), self.thresholds_of_call(threshold, len(x)), steps)
        seen = unseen if soft else self.watching(x, audited=threshold is None)
        try:
            out = call.result(self._run(call, x) if len(x) else self._no_rows(x))
        except StopForward:
            out = call.result(None, self.answer_type(x))
        return seen(out)

    @torch.compiler.disable
    def all_exits(self, x: Tensor) -> AllExits:
        """Every exit's own answer for every row; no row leaves. Gradients reach the heads, and images that require them.

        `model.blended` turns own answers into blended ones.

        Args:
            x: (b, c, h, w) images on the model's device.

        Raises:
            PteeError: if the images are no batch on the model's device and of its number type.
        """
        self.require_ready(x)
        if len(x) == 0:
            empty = HeadOutput(self._no_rows(x), x.new_zeros(0, dtype=torch.float32))
            return self._all_exits([empty] * len(self.exits), empty.logits)
        call = RecordAll(self, len(x))
        answer = self._run(call, x)
        return self._all_exits(call.outputs, answer)

    def read(self, x: Tensor) -> Reading:
        """The heads' inputs for images (b, c, h, w), and the backbone's answer: all that training needs of the backbone."""
        self.require_ready(x)
        call = RecordInputs(self, len(x))
        answer = self._run(call, x)
        return Reading(tuple(call.inputs), answer)

    def answer(self, reading: Reading) -> AllExits:
        """Every exit's answer to what `read` gave, or to rows of it, as `all_exits` gives it for the images."""
        outputs: list[HeadOutput] = []
        for head, x in zip(self.heads, reading.inputs, strict=True):
            assert isinstance(head, ExitHead)
            outputs.append(head.answer(x, [output.logits for output in outputs]))
        return self._all_exits(outputs, reading.logits)

    def _all_exits(self, outputs: Sequence[HeadOutput], answer: Tensor) -> AllExits:
        logits, confidence_logits = [o.logits for o in outputs], [o.confidence_logit for o in outputs]
        confidence = find_confidence(self.confidence, self.calibrated)
        return AllExits(
            torch.stack([*(y.to(answer.dtype) for y in logits), answer]),
            confidence.at_all_exits(logits, confidence_logits),
            torch.stack(confidence_logits),
        )

    def blended(self, own: AllExits) -> AllExits:
        """What `predict` would answer at each exit that is on, from each exit's own answer; as it is if answers are "own"."""
        if self.answers == OWN or self.blend is None:
            return own
        mixed = self.blend.at_all_exits(own.logits, self.plan.on)
        logits = torch.where(mixed.isnan().any(-1, keepdim=True), own.logits, mixed)
        confidence = find_confidence(confidence_of_blend(self.confidence), self.calibrated)
        h = confidence.at_all_exits(mixed[:-1], own.confidence_logits)
        return AllExits(logits.to(own.logits.dtype), h, own.confidence_logits)

    def require_all_on(self) -> None:
        """Refuse to train or calibrate while exits are off."""
        if self.off:
            raise PteeError(
                f"Exits are off ({', '.join(map(str, self.off))}), and training and calibration serve all exits. Switch all on "
                "first (model.off = []), and tune again afterwards (ptee.tune)."
            )

    def train(self, mode: bool = True) -> EarlyExitModel:
        """Put the heads into training mode; the backbone stays in eval mode, unless it learns."""
        for part in self.children():
            if part is not self.backbone:  # another thread may be running it, so its mode never changes
                part.train(mode)
        self.backbone.train(mode and self._hold.learns)
        self.training = mode
        return self

    @contextmanager
    def learning_backbone(self) -> Iterator[None]:
        """Meanwhile the backbone learns, too; from then on its weights are saved with the model."""
        with self._hold.learning():
            self.origin = self.origin.trained()
            yield

    def detach(self) -> nn.Module:
        """Take the backbone back, without hooks, its gradients and modes as they were before `augment`.

        A front network is given back in the same way.
        """
        self._hold.release()
        for head in self.heads:
            if isinstance(head, FrontHead):
                head.release()
        return self.backbone

    @property
    def detached(self) -> bool:
        """Whether the backbone was given back."""
        return self._hold.released

    def require_ready(self, x: Tensor) -> None:
        """Check the images, and restore what was done to the backbone without this model."""
        if self.detached:
            raise detached()
        require_images(x, self.plan.input_size[0])
        require_device(x, device_of(self.heads))
        self._hold.keep()
        own = one_parameter(self.backbone).dtype
        if x.dtype == own:
            return
        try:  # autocast or the backbone's own code may convert it
            self.answer_type(x.new_zeros(1, *self.plan.input_size))
        except Exception as why:  # whatever that code raises
            raise wrong_type(x, own, first_line(why)) from why

    def prepared(self, x: Tensor) -> Tensor:
        """A copy of images (b, c, h, w) of a data set, on the model's device and in its number type, if `predict` would take them then.

        A copy, because a network may write into its images, and a data set may give the same ones again.
        """
        require_images(x, self.plan.input_size[0])
        return x.to(device_of(self.heads), one_parameter(self.backbone).dtype, copy=True)

    def _run(self, call: Call, x: Tensor) -> Tensor:
        """The backbone's answer in a call, with gradients only where the images or the backbone require them."""
        call.through = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.backbone.parameters())
        )
        try:
            with running(call), torch.set_grad_enabled(call.through):
                answer = call.forward(self.backbone, x)
        except PteeError:
            raise
        except Exception as why:
            if x.shape[1:] == tuple(self.plan.input_size) or ran_out_of_memory(why):
                raise
            raise wrong_size(x, self.plan.input_size, first_line(why)) from why
        call.check(answer)
        return answer

    def answer_type(self, x: Tensor) -> torch.dtype:
        """The number type of the backbone's answer to such images, in the autocast that is on. Each is tried out once."""
        kind = x.device.type
        around = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        types = (x.dtype, one_parameter(self.backbone).dtype, around)
        if types not in self._answer_types:
            with torch.no_grad(), running(None):
                self._answer_types[types] = self.backbone(x.new_zeros(1, *x.shape[1:])).dtype
        return self._answer_types[types]

    def _no_rows(self, x: Tensor) -> Tensor:
        return x.new_zeros(0, self.num_classes, dtype=self.answer_type(x))

    def thresholds_of_call(self, threshold: Thresholds | None, rows: int) -> list[float | Tensor]:
        """The thresholds of a call: for each exit a number or a tensor (b,)."""
        if threshold is None:
            return list(self._thresholds)
        return for_each_row(threshold, len(self.exits), rows, device_of(self.heads))

    # -------------------------------------------------------------------------------------------- saving

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        more_files: Mapping[str, str] | None = None,
        **hub: Any,
    ) -> str | None:
        """Write config.json and heads.safetensors into a folder; a backbone that learnt, too, and no other.

        All files are written or, on failure, none: a run that was there stays as it was.

        Args:
            save_directory: made where it does not exist.
            repo_id: on the hub, for push_to_hub.
            push_to_hub: upload the folder.
            model_card_kwargs: for README.md, which is written anew unless somebody else wrote it.
            more_files: texts of further files of the folder, by name.
            hub: further arguments of huggingface_hub's push_to_hub.

        Raises:
            RunError: if it cannot be written.
        """
        folder = as_path(save_directory, "save_directory")
        try:
            config = runs.describe(self)
            backbone = self.backbone.state_dict() if self.origin.learnt else None
            text = card.text_for(self, folder, model_card_kwargs)
            runs.write(folder, config, self.heads.state_dict(), text, more_files, backbone, self.versions)
            if push_to_hub:
                return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **hub)
        except OSError as why:
            raise RunError(f"Cannot write {folder}: {first_line(why)} Choose another folder.") from why
        return None

    @classmethod
    def from_pretrained(  # the mixin's would read config.json before it is checked
        cls, pretrained_model_name_or_path: str | Path, *, backbone: nn.Module | None = None, **hub: Any
    ) -> EarlyExitModel:
        """`load`, under the hub's usual name."""
        return ptee.load(pretrained_model_name_or_path, backbone, **hub)


def require_early_exit(model: Any) -> None:
    """Refuse what is no early-exit model, naming what it is, and one that was detached. Its backbone is put back in eval mode."""
    if isinstance(getattr(model, "model", None), EarlyExitModel):  # as in what ptee.optimize made
        raise PteeError(f"This is of type {type(model).__name__}, and the early-exit model is its .model. Give that.")
    whole = getattr(model, "_orig_mod", model)  # which torch.compile wraps
    if not isinstance(whole, EarlyExitModel):
        kind = "a module of class" if isinstance(model, nn.Module) else "of type"
        raise PteeError(
            f"This is {kind} {type(model).__name__}, not an early-exit model. Give what ptee.augment or ptee.load returned."
        )
    if whole.detached:
        raise detached()
    whole._hold.keep()
