"""Makes ptee/backbones/timm_imagenet.csv anew, from the folder results/ of timm's repository.

python recipes/scripts/published.py pytorch-image-models/results > ptee/backbones/timm_imagenet.csv

Then put the date of that folder into SOURCE, in ptee/backbones/published.py.
"""

import csv
import sys
from pathlib import Path

GPU, CPU = (
    "benchmark-infer-amp-nchw-pt291-cu130-5090.csv",
    "benchmark-infer-fp32-nchw-pt240-cpu-i9_10940x-dynamo.csv",
)
COLUMNS = ("model", "img_size", "top1", "param_count", "gmacs", "gpu_images_per_s", "cpu_images_per_s")


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def speeds(file: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The measurements of a file by network, without the tag of its weights, and image size."""
    return {(row["model"], row["infer_img_size"]): row for row in rows_of(file)}


folder = Path(sys.argv[1])
gpu, cpu = (speeds(folder / name) for name in (GPU, CPU))
out = csv.writer(sys.stdout, lineterminator="\n")
out.writerow(COLUMNS)
for row in rows_of(folder / "results-imagenet.csv"):
    key = row["model"].partition(".")[0], row["img_size"]
    if key not in gpu or not gpu[key]["infer_gmacs"]:
        continue
    on_cpu = cpu[key]["infer_samples_per_sec"] if key in cpu else ""
    count = row["param_count"].replace(",", "")
    out.writerow(
        (
            row["model"],
            row["img_size"],
            row["top1"],
            count,
            gpu[key]["infer_gmacs"],
            gpu[key]["infer_samples_per_sec"],
            on_cpu,
        )
    )
