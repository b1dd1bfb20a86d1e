"""The zoo: the smallest model of every architecture family of timm and torchvision gets exits, and the exits are checked.

Weights and images are random, because the checks are about plumbing: where the exits stand, whether the right rows
leave, and what was counted. `ptee evaluate` says how good exits are on real images.

`pytest -m zoo` runs the checks. `python tests/zoo.py > recipes/networks.txt` prints the table; `python tests/zoo.py resnet pit`
tries two families.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from ptee._common.errors import PteeError, unknown
from ptee._common.process import no_fused_attention
from ptee.analysis.arithmetic import TOLERANCES, exact_arithmetic, exact_copy, exact_images, tolerance
from ptee.analysis.cut_points import random_images
from ptee.analysis.macs import count
from ptee.backbones.load import load_backbone
from ptee.exits.heads import ExitHead
from ptee.model.build import build
from ptee.model.early_exit import EarlyExitModel

EXITS, PLACEMENT, HEAD = 3, "pareto", "pool"
ROWS = 2 * EXITS  # at each exit one row leaves, the others never
COUNTED = 0.01  # relative difference to torch's own counter
CLASSES = 1000  # of a model that has no classifier of its own

# The smallest of each of timm's modules, by parameters. Finding them anew builds all 1,300 models of timm 1.0.31, which takes
# ten minutes; a module that is not among them, of a newer timm, is searched.
SMALLEST = {
    "beit_base_patch16_224", "halonet_h1", "test_byobnet", "cait_xxs24_224", "coat_tiny", "convit_tiny",
    "convmixer_768_32", "test_convnext", "cpubone_nano", "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s",
    "cspnext_tiny", "davit_tiny", "deepseek_vit_412m", "deit_tiny_patch16_224", "densenet121", "dla46x_c", "dpn48b",
    "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "test_efficientnet", "efficientvim_m1",
    "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_336", "fasternet_t0", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "gemma4_vit_167m", "ghostnet_050", "hardcorenas_b", "hgnetv2_b0",
    "hiera_tiny_224", "hieradet_small", "hrnet_w18_small", "iformer_t", "inception_next_atto",
    "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2_small", "levit_128s", "lowformer_b0",
    "test_mambaout", "test_coatnet", "poolformerv2_s12", "gmlp_ti16_224", "mobilenetv3_small_050",
    "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny", "naflexvit_base_patch16_parfac_gap", "nasnetalarge",
    "nest_tiny", "nextvit_small", "test_nfnet", "pit_ti_224", "pnasnet5large", "pvt_v2_b0", "qwen3_vit_88m",
    "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1", "res2next50", "resnest14d", "test_resnet",
    "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18",
    "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "vgg11",
    "visformer_tiny", "test_vit", "vit_tiny_r_s16_p8_224", "test_vit_relpos", "samvit_base_patch16_224",
    "vitamin_small_224", "volo_d1_224", "ese_vovnet19b_slim_dw", "legacy_xception", "xception41p",
    "xcit_nano_12_p8_224",
}  # fmt: skip
TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t",
    "vgg11", "vit_b_32",
)  # fmt: skip

# At their own image size, 546 to 768 pixels, one check of these takes ten minutes on two cores.
SMALLER_IMAGE = {"qwen3_vit_88m": 96, "gemma4_vit_167m": 96, "deepseek_vit_412m": 126}


@dataclass(frozen=True)
class Family:
    """A library's module of models, and the one that stands for it.

    Attributes:
        library: "timm" or "torchvision".
        name: of the module, such as `resnet`.
        model: its smallest model.
    """

    library: str
    name: str
    model: str

    @property
    def input_size(self) -> tuple[int, int, int] | None:
        """(c, h, w) at which the model is checked; None for the size of its own configuration."""
        pixels = SMALLER_IMAGE.get(self.model)
        return (3, pixels, pixels) if pixels else None


@dataclass(frozen=True)
class Verdict:
    """What became of a family.

    Attributes:
        family: which.
        input_size: (c, h, w) of the images.
        exits: name and share of the backbone's cost of each exit.
        anew: at how many of them the forward pass begins anew (`analysis.replay`).
        heads_read: the layout that each head reads.
        seconds: from its name to a model with exits: build, search, verify, count.
        refusal: why there are no exits, as the user would read it; or which check failed. Empty where all is well.
    """

    family: Family
    input_size: tuple[int, ...] = ()
    exits: list[tuple[str, float]] = field(default_factory=list)
    anew: int = 0
    heads_read: list[str] = field(default_factory=list)
    seconds: float = 0.0
    refusal: str = ""

    @property
    def gap(self) -> float:
        """The largest share of the backbone's cost between two exits, or between one and an end."""
        stands = [0.0, *(share for _, share in self.exits), 1.0]
        return max(b - a for a, b in pairwise(stands))

    @property
    def row(self) -> list[str]:
        """What the table says of it."""
        fractions = " ".join(f"{share:.2f}" for _, share in self.exits) or "-"
        gap = f"{self.gap:.2f}" if self.exits else "-"
        again = f", {self.anew} of {len(self.exits)} begin anew" if self.anew else ""
        layouts = "/".join(dict.fromkeys(self.heads_read)) or "-"
        size = f", with images of {self.input_size[-1]} pixels" if self.family.input_size and self.exits else ""
        return [
            self.family.library, self.family.name, self.family.model, layouts, fractions, gap, f"{self.seconds:.1f}",
            (self.refusal or f"ok{again}") + size,
        ]  # fmt: skip


TITLE = ["library", "family", "model", "layout", "exits at", "gap", "seconds", "verdict"]
WIDTHS = [11, 25, 33, 9, 14, 4, 7, 0]


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many families of each library have exits that work."""
    by_library: dict[str, list[bool]] = {}
    for v in verdicts:
        by_library.setdefault(v.family.library, []).append(not v.refusal)
    counts = ", ".join(f"{sum(good)} of {len(good)} of {library}" for library, good in by_library.items())
    return (
        f"Families with {EXITS} working exits: {counts}. exits at: shares of the backbone's multiply-accumulates; gap: the "
        "largest between two of them, or one and an end; seconds: from the model's name to its exits. ok: with T > 1 the backbone's answers bit for "
        "bit, in batches the answers of rows alone, and torch's own count at each exit within 1 %; begin anew: where rows "
        "leave, the forward pass starts again without computing anything twice."
    )


def families(only: Sequence[str] = ()) -> list[Family]:
    """All families of both libraries, or those named (`resnet`, `timm/resnet`, in any case), in alphabetical order.

    Raises:
        UnknownName: if there is no such family.
    """
    from torchvision import models

    found = [Family("timm", module, model) for module, model in sorted(_timm_models().items())]
    for name in TORCHVISION:
        home = sys.modules[models.get_model_builder(name).__module__].__name__
        found.append(Family("torchvision", home.rpartition(".")[2], name))
    names = {key for f in found for key in (f.name, f"{f.library}/{f.name}")}
    asked = {name.lower() for name in only}
    for name in only:
        if name.lower() not in names:
            raise unknown("family", name, sorted(names))
    return [f for f in found if not only or asked & {f.name, f"{f.library}/{f.name}"}]


def _timm_models() -> dict[str, str]:
    """The smallest model of each of timm's own modules; ptee registers more there."""
    import timm

    by_module = {module: timm.list_models(module=module) for module in timm.list_modules()}
    by_module = {m: names for m, names in by_module.items() if names and _is_timms(timm.model_entrypoint(names[0]))}
    return {
        module: next((name for name in names if name in SMALLEST), None) or smallest(names)
        for module, names in by_module.items()
    }


def _is_timms(build: Callable[..., nn.Module]) -> bool:
    return build.__module__.startswith("timm.")


def smallest(names: Sequence[str]) -> str:
    """The model with the fewest parameters, of those that have a classifier where any has; built without memory."""
    import timm

    sizes = []
    for name in names:
        with torch.device("meta"):
            module = timm.create_model(name)
        sizes.append((getattr(module, "num_classes", 0) == 0, sum(p.numel() for p in module.parameters()), name))
    return min(sizes)[2]


def check(family: Family) -> Verdict:
    """Place exits on a family's model and try them: answers, rows, costs."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        backbone = load_backbone(
            f"{family.library}/{family.model}",
            pretrained=False,
            num_classes=classes_of(family),
            input_size=family.input_size,
        )
        model = build(backbone, exits=PLACEMENT, num_exits=EXITS, head=HEAD)
    except PteeError as why:
        return Verdict(family, seconds=time.perf_counter() - start, refusal=str(why))
    seconds = time.perf_counter() - start
    return Verdict(
        family,
        backbone.input.input_size,
        [(e.name, e.backbone_cost) for e in model.exits],
        sum(bool(cut.steps) for cut in model.plan.cuts),
        [cut.layout.order for cut in model.plan.cuts],
        seconds,
        failure(model, random_images(model.backbone, ROWS, backbone.input.input_size)),
    )


def main(names: Sequence[str]) -> None:
    """Print a table of the families, line by line as they are checked.

    Args:
        names: as of `families`.
    """
    wanted, verdicts = families(names), []
    print(line(TITLE, WIDTHS))
    for family in wanted:
        verdicts.append(check(family))
        print(line(verdicts[-1].row, WIDTHS), flush=True)
    print(f"\n{summary(verdicts)}")


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line of a table."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def classes_of(family: Family) -> int | None:
    """None for the model's own number, unless it has no classifier."""
    if family.library != "timm":
        return None
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(family.model)
    return CLASSES if cfg is not None and not cfg.num_classes else None


# ---------------------------------------------------------------------------------------------------- the checks


@torch.no_grad()
def failure(model: EarlyExitModel, images: Tensor) -> str:
    """What is wrong with a model's exits; empty if nothing is.

    Args:
        model: with untrained heads, whose confidences are spread here.
        images: (b, c, h, w) of which one leaves at each exit.
    """
    with exact_arithmetic:
        expected = model.backbone(images)
        model.threshold = 2.0
        if not torch.equal(model(images), expected):
            return "wrong: with T > 1 the answers are not the backbone's"
        if (wrong := _rows_alone(model, images)) and not _right_in_float64(model, images):
            return wrong
        return _costs(model, images[:1])


def _right_in_float64(model: EarlyExitModel, images: Tensor) -> bool:
    """Whether it was rounding that put a row's answers apart."""
    exact = exact_copy(model)
    try:
        return isinstance(exact, EarlyExitModel) and not _rows_alone(exact, exact_images(images, exact))
    except Exception:  # it casts to a type of its own
        return False


def _off(got: Tensor, expected: Tensor) -> float:
    """How far answers lie apart, where that is more than rounding does; else 0."""
    gap = (got - expected).abs().max().item()
    relative = max(tolerance(expected.dtype, expected.device), TOLERANCES[torch.float32])
    return 0.0 if gap <= relative * max(1.0, expected.abs().max().item()) else gap


def _rows_alone(model: EarlyExitModel, images: Tensor) -> str:
    every = _spread(model, images)
    together = model.predict(images)
    if sorted(set(together.exit_index.tolist())) != list(range(len(model.exits) + 1)):
        return f"not tried: rows left at exits {sorted(set(together.exit_index.tolist()))} only"
    if wrong := _rows_at_one_exit(model, images[:4], every[:, :4]):
        return wrong
    for i in range(len(images)):
        alone = model.predict(images[i : i + 1])
        n = int(together.exit_index[i])
        if int(alone.exit_index[0]) != n:
            return f"wrong: a row that leaves at exit {n} in a batch leaves at exit {int(alone.exit_index[0])} alone"
        for other, words in ((alone.logits[0], "alone"), (every[n, i], "where nobody leaves")):
            if gap := _off(together.logits[i], other):
                return f"wrong: a row's answer at exit {n} is off by {gap:.1e} from its answer {words}"
    return ""


def _rows_at_one_exit(model: EarlyExitModel, images: Tensor, every: Tensor) -> str:
    """Every second row leaves at one exit, the others at none."""
    here = torch.arange(len(images), device=images.device) % 2 == 0
    for n in range(len(model.exits)):
        thresholds = torch.full((len(images), len(model.exits)), 2.0, device=images.device)
        thresholds[here, n] = 0.0
        got = model.predict(images, thresholds)
        expected = torch.where(here[:, None], every[n], every[-1])
        if gap := _off(got.logits, expected):
            return f"wrong: where every second row leaves at exit {n}, answers are off by {gap:.1e}"
    return ""


def _spread(model: EarlyExitModel, images: Tensor) -> Tensor:
    """Set each exit's threshold so that the surest row of those that are left goes there, and clearly so.

    Returns:
        (E+1, b, K) what every exit answers.
    """
    thresholds = []
    left = torch.arange(len(images), device=images.device)
    every = model.all_exits(images)
    for head, h in zip(model.heads, every.confidence_logits, strict=True):
        assert isinstance(head, ExitHead)
        spread = h.std().clamp_min(1e-30)
        head.confidence.weight.div_(spread)
        head.confidence.bias.sub_(h.mean()).div_(spread)
        surest, next_one = ((h[left] - h.mean()) / spread).sort(descending=True).values[:2].tolist()
        thresholds.append(torch.tensor((surest + next_one) / 2).sigmoid().item())
        left = left[h[left].argsort(descending=True)[1:]]
    model.threshold = thresholds
    return every.logits


def _costs(model: EarlyExitModel, image: Tensor) -> str:
    """Counted against torch's own counter, on the operators that both know: convolutions and matrix products."""
    counts, executed = count(model.backbone, image, products_only=True), executed_macs(model.backbone, image)
    for e in model.exits:
        ours, theirs = counts.until[e.name], executed[e.name]
        if not abs(ours - theirs) <= COUNTED * theirs:
            return f"wrong: {ours:,} multiply-accumulates counted at {e.name}, torch counts {theirs:,.0f}"
    return ""


def executed_macs(module: nn.Module, image: Tensor) -> dict[str, float]:
    """Multiply-accumulates that torch's counter has seen when each module has given its output."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter, executed = FlopCounterMode(display=False), {}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: executed.update({name: counter.get_total_flops() / 2}))
        for name, part in module.named_modules()
    ]
    try:
        # without oneDNN a recurrent layer is run by products that the counter sees
        with no_fused_attention, sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False), counter:
            module(image)
    finally:
        for hook in hooks:
            hook.remove()
    return executed


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PteeError as why:
        sys.exit(str(why))
