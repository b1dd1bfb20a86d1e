"""The settings of a training: what each one means, its default, and which of them go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from typing_extensions import Self

from ptee._common.errors import Argument, PteeError, RunError
from ptee._common.validation import BATCH_SIZE, FrozenConfig, Number, Whole, YesNo

OPERATIONS: Literal["operations"] = "operations"
SEPARATE = "separate"  # the loss in which every head learns for itself
WEIGHTED = "weighted"  # likewise, and the backbone's own answer counts, too
ALONE = (SEPARATE, WEIGHTED)
TOGETHER: Literal["together"] = "together"
ONE_BY_ONE: Literal["one by one"] = "one by one"
# The names of the thesis (v1, v2), of differentiable branching (db) and of BranchyNet, and an older one.
ALIASES = {"each": SEPARATE, "v1": "joint", "v2": "joint_each_exit", "db": "joint", "branchynet": WEIGHTED}
LARGEST_LR, LARGEST_WEIGHT = 1e30, 1e12  # beyond them single precision overflows, whatever is learnt
MIN_EPOCHS, MAX_EPOCHS, UPDATES = 12, 40, 5_000  # epochs="auto"
SHIFTED_PART = 8  # shift="auto": an eighth of a side, as crops of padded images commonly do
Auto = Literal["auto"]
Loss = Literal["separate", "weighted", "joint", "joint_each_exit", "mc", "cost", "each", "v1", "v2", "db", "branchynet"]
Targets = Literal["labels", "pseudo", "soft"]
Backbone = Literal["frozen", "joint"]
FROZEN: Backbone = "frozen"
JOINT: Backbone = "joint"
BACKBONE_WORDS = (
    "frozen (not a byte of it changes) or joint (it learns together with the heads, in training mode, and its weights are "
    "saved in the run)."
)
# The weights of the optimizer's learning rate and weight decay where none are given.
LR = {"muon": 0.01, "adam": 0.001, "adamw": 0.001}
WEIGHT_DECAY = {"muon": 0.05, "adam": 0.0, "adamw": 0.0}
# Settings that the data do not change: the recipe has their final values.
SETTLED = ("loss", "epochs", "batch_size", "optimizer", "lr", "weight_decay", "schedule", "patience", "order", "seed")


def _lower(name: Any) -> Any:
    """V1 is v1."""
    return name.lower() if isinstance(name, str) else name


class TrainingConfig(FrozenConfig):
    """How the heads are trained. Every setting has a default; None and "auto" depend on other settings or on the data."""

    backbone: Backbone | None = Field(
        default=None, description=f"As in the recipe: {BACKBONE_WORDS} Default: frozen, or what the recipe says."
    )
    backbone_lr: Number | None = Field(
        default=None,
        gt=0,
        le=LARGEST_LR,
        description="Learning rate of the backbone at the beginning, where it learns. Default: that of the heads.",
    )
    loss: Annotated[Loss, BeforeValidator(_lower), AfterValidator(lambda name: ALIASES.get(name, name))] = Field(
        default="separate",
        description="What is minimised. separate: every head learns for itself, and its confidence learns whether the head "
        "is right. weighted: the same as a weighted sum, to which the backbone's own answer belongs. joint: cross-entropy of "
        "the exits' answers blended by their confidences, plus the expected cost. joint_each_exit: the same, averaged over all exits. mc: the cross-entropy alone. cost: the expected cost alone. "
        "Other names: v1 and db (joint), v2 (joint_each_exit), branchynet (weighted), each (separate).",
    )
    targets: Targets | None = Field(
        default=None,
        description="What the heads learn: the labels, pseudo (the class that the backbone predicts) or soft (the backbone's "
        "probabilities). The last two need no labels. Default: soft for the loss separate, labels for the others.",
    )
    temperature: Number | None = Field(
        default=None,
        gt=0,
        description="Softens the probabilities of soft targets: logits are divided by it. Only for the loss separate. "
        "Default: 2.",
    )
    cost_weight: Number | None = Field(
        default=None,
        ge=0,
        le=LARGEST_WEIGHT,
        description="What one unit of cost is worth in cross-entropy. Only for the joint losses. Default: 1.",
    )
    cost_unit: Literal["operations", "parameters"] = Field(
        default=OPERATIONS,
        description="What the cost in the joint losses is a share of: operations, which take the time, or parameters, as in "
        "EENet's thesis, whose cost weights belong to that.",
    )
    order: Literal["together", "one by one"] = Field(
        default=TOGETHER,
        description="together: all heads learn at the same time. one by one: the first head learns, is kept as it is, and the next "
        "is added, each for all epochs and with its own share of the schedule.",
    )
    exit_weights: tuple[Annotated[Number, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=2,
        description="The weight of each exit and of the backbone's own answer in the loss weighted, such as 1,1,0.3. "
        "Default: 1 each.",
    )
    epochs: Annotated[Whole, Field(ge=1)] | Auto = Field(
        default="auto",
        description=f"Passes over the training images; where heads learn one by one, for each of them. auto: enough for about {UPDATES:,} updates, between {MIN_EPOCHS} and "
        f"{MAX_EPOCHS}.",
    )
    batch_size: Whole = Field(
        default=BATCH_SIZE, ge=1, description="Images in each update, those of all processes together."
    )
    optimizer: Literal["muon", "adam", "adamw"] | None = Field(
        default=None,
        description="muon (convolutions learn in far fewer epochs), adam or adamw. Default: muon for the loss separate, adam "
        "for the others.",
    )
    lr: Number | None = Field(
        default=None,
        gt=0,
        le=LARGEST_LR,
        description="Learning rate at the beginning. Default: 0.01 for muon, 0.001 for the others.",
    )
    weight_decay: Number | None = Field(
        default=None,
        ge=0,
        description="Weight decay of matrices and convolutions, not of biases and normalisation. Default: 0.05 for muon, 0 for "
        "the others.",
    )
    schedule: Literal["constant", "cosine"] | None = Field(
        default=None,
        description="The learning rate stays constant, or falls to 0 along half a cosine. Default: cosine for the loss "
        "separate, constant for the others.",
    )
    views: Annotated[Whole, Field(ge=1, lt=2**16)] | Auto = Field(
        default="auto",
        description="Views of each training image: the image itself, its mirror image, then random crops. Each epoch draws one "
        "of them. auto: 2, and 1 for a loader, which makes its own batches.",
    )
    mirror: YesNo = Field(
        default=True,
        description="A mirror image shows the same class. Switch it off for digits, letters and traffic signs.",
    )
    shift: Annotated[Whole, Field(ge=0)] | Auto = Field(
        default="auto",
        description="Moves the feature maps of each image at random, by up to so many pixels of the input. auto: an eighth of "
        "the image's side, and 0 where no head reads maps.",
    )
    patience: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None,
        description="Stop after so many epochs without a lower loss, and keep the best heads. Default: never stop early.",
    )
    precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        default="auto", description="Mixed precision: no, bf16 or fp16. auto: bf16 where the device computes in it."
    )
    seed: Whole = Field(
        default=0, ge=0, lt=2**32, description="Seed of the order of the images and of all that is drawn at random."
    )
    cache: YesNo | Auto = Field(
        default="auto",
        description="Run the backbone once over the images and keep what the heads read, instead of in every epoch. Needs data "
        "that gives the same image each time. auto: if that fits (`ptee plan --images` says), else the backbone runs in every "
        "epoch.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        alone, targets = self.loss in ALONE, self.resolved_targets
        if self.temperature not in (None, 1) and not (self.loss == SEPARATE and targets == "soft"):
            raise _clash(
                "temperature", self.temperature, "needs loss='separate' and targets='soft'",
                f"loss={self.loss!r} and targets={targets!r}",
            )  # fmt: skip
        if self.cost_weight is not None and alone:
            raise _clash(
                "cost_weight", self.cost_weight, "needs a joint loss, such as loss='joint'", f"loss={self.loss!r}"
            )
        if self.cost_unit != OPERATIONS and alone:
            raise _clash("cost_unit", self.cost_unit, "needs a joint loss, such as loss='joint'", f"loss={self.loss!r}")
        if self.exit_weights is not None and self.loss != WEIGHTED:
            raise _clash("exit_weights", self.exit_weights, "needs loss='weighted'", f"loss={self.loss!r}")
        weights = self.exit_weights or ()
        learning = weights[:-1] or weights if self.backbone == FROZEN else weights
        if self.exit_weights is not None and not any(learning):
            given = Argument("exit_weights", str(self.exit_weights))
            text = " is 0 for every answer that can be learnt (the last is the backbone's). Give a larger one."
            raise PteeError(given, text, value=self.exit_weights)
        self._check_backbone()
        self._check_order()
        return self

    def _check_order(self) -> None:
        if (
            self.order == ONE_BY_ONE and self.backbone == JOINT
        ):  # the heads before would read other maps than they learnt from
            raise _clash("order", ONE_BY_ONE, "needs backbone='frozen'", f"backbone={self.backbone!r}")
        if self.order == ONE_BY_ONE and self.patience is not None:
            raise _clash("order", ONE_BY_ONE, "has a fixed number of epochs for each exit", f"patience={self.patience}")

    def _check_backbone(self) -> None:
        if self.backbone == FROZEN and self.backbone_lr is not None:
            raise _clash("backbone_lr", self.backbone_lr, "needs backbone='joint'", "backbone='frozen'")
        if self.backbone != JOINT:
            return
        if self.loss == SEPARATE:
            text = " needs a loss in which the backbone's own answer counts. Give "
            possible = Argument.text("loss", "joint_each_exit"), " or ", Argument.text("loss", WEIGHTED)
            raise PteeError(Argument.text("backbone", JOINT), text, *possible, ".", value=JOINT)
        if self.resolved_targets != "labels":  # else it would learn its own answers
            raise _clash("backbone", JOINT, "needs targets='labels'", f"targets={self.targets!r}")

    @property
    def resolved_targets(self) -> str:
        """The targets, also if None is given."""
        return self.targets or ("soft" if self.loss == SEPARATE else "labels")

    def resolved(self) -> TrainingConfig:
        """This config with a value for every None that depends on another setting."""
        alone, backbone = self.loss == SEPARATE, self.backbone or FROZEN
        optimizer = self.optimizer or ("muon" if alone else "adam")
        softened = alone and self.resolved_targets == "soft"
        values: dict[str, Any] = {
            "backbone": backbone,
            "targets": self.resolved_targets,
            "temperature": 2.0 if softened else 1.0,
            "cost_weight": None if self.loss in ALONE else 1.0,
            "optimizer": optimizer,
            "lr": LR[optimizer],
            "backbone_lr": (self.lr or LR[optimizer]) if backbone == JOINT else None,
            "weight_decay": WEIGHT_DECAY[optimizer],
            "schedule": "cosine" if alone else "constant",
        }
        return self.changed(**{name: value for name, value in values.items() if getattr(self, name) is None})


def passes(config: TrainingConfig, exits: int) -> int:
    """The epochs of a resolved training in all: one by one, each exit has its own."""
    assert isinstance(config.epochs, int)
    return config.epochs * (exits if config.order == ONE_BY_ONE else 1)


def require_weight_each(weights: tuple[float, ...] | None, answers: int) -> None:
    """Refuse weights of the loss that are not one for each answer, the backbone's own included."""
    if weights is not None and len(weights) != answers:
        text = (
            f" has {len(weights)} numbers, and these are {answers} answers with the backbone's own. Give one for each."
        )
        raise PteeError(Argument("exit_weights", str(weights)), text, value=weights)


def epochs_for(images: int, batch_size: int) -> int:
    """How many epochs "auto" means for so many training images: enough updates, and not too many passes over the data."""
    return min(max(MIN_EPOCHS, -(-UPDATES * batch_size // images)), MAX_EPOCHS)


def shift_for(input_size: tuple[int, int, int]) -> int:
    """How many pixels "auto" means for images (c, h, w), if some head reads maps."""
    return min(input_size[1:]) // SHIFTED_PART


def other_settings(then: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """With which of these settings another training was begun, in words; empty if there are none."""
    others = [f"{name} {then.get(name)!s:.60} (now {now.get(name)!s:.60})" for name in names]
    return [f"with {', '.join(others)}"] * bool(others)


def of_another_training(checkpoint: Path, words: Sequence[str]) -> RunError:
    """The error of a checkpoint that does not belong to the training that is to go on."""
    text = f"{checkpoint} belongs to a training {' and '.join(words)}. Use the same settings and data, or delete it."
    return RunError(text, argument="checkpoint")


def _clash(name: str, value: Any, needs: str, given: str) -> PteeError:
    text = f" {needs}, and this training has {given}. Leave {name} out, or change the others."
    return PteeError(Argument(name, repr(value)), text, value=value)
