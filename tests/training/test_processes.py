"""Several processes train as one would: the same heads within the order of sums; one that is lost ends all, and --resume goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import slow

from ptee._common.shares import Share, ShareOfBatches, is_lost

HERE = Path(__file__).parent
TRAINING = """
import json
import os
import sys
import torch
from learning import N, data, fit, heads, made
from torch.utils.data import Dataset, TensorDataset
from ptee._common.errors import PteeError

head, settings, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
rank = os.environ.get("RANK", "0")


class Leaving(Dataset):  # the second process is gone in the second epoch
    def __init__(self, items):
        self.items, self.left = items, settings.pop("leaves")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.left -= 1
        if rank == "1" and not self.left:
            os._exit(9)
        return self.items[i]


if "checkpoint" in settings:
    settings["checkpoint"] = settings["checkpoint"].replace("RANK", rank)
items = TensorDataset(*data()[: N - 3])
model = made(head, seed=0 if rank == "0" else 1)  # the heads of the first process are everybody's
try:
    history = fit(model, Leaving(items) if "leaves" in settings else items, TensorDataset(*data()[:20]), **settings)
except PteeError as why:
    sys.exit(str(why))
if rank == "0":
    found = [[e.loss, e.val_loss, *e.fidelity, *e.leaving] for e in history.epochs]
    torch.save({"heads": heads(model), "epochs": torch.tensor(found)}, out)
"""
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "accelerate launch": (
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
    ),
}


def trained(place: Path, head: str, settings: dict, launcher: str | None = None) -> subprocess.CompletedProcess:
    """A training by one process, or by two that a launcher starts. What it finds is in found.pt."""
    launch = ["-m", *LAUNCHERS[launcher]] if launcher else []
    words = command(place, head, settings, launch)
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)


def alone(place: Path, head: str, settings: dict) -> list[subprocess.CompletedProcess]:
    """A training by two processes without a launcher, which would end one as soon as the other has ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def run(rank: str) -> subprocess.CompletedProcess:
        words, own = command(place, head, settings, []), {"RANK": rank, "LOCAL_RANK": rank}
        return subprocess.run(words, env=environment() | where | own, capture_output=True, text=True, timeout=120)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, ["0", "1"]))


def command(place: Path, head: str, settings: dict, launch: list[str]) -> list[str]:
    script = place / "training.py"
    script.write_text(TRAINING)
    return [sys.executable, "-W", "ignore", *launch, str(script), head, json.dumps(settings), str(place / "found.pt")]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def found(place: Path) -> dict:
    return torch.load(place / "found.pt")


JOINT = {"batch_size": 16, "epochs": 3}
ONE_ROW_LEFT = {"batch_size": 11, "epochs": 3, "schedule": "cosine"}  # too few for batch norm and for two processes
VIEWS = {
    "batch_size": 8,
    "epochs": 3,
    "views": 2,
    "shift": 2,
    "loss": "separate",
    "targets": "soft",
    "optimizer": "adamw",
}


@pytest.mark.parametrize(
    ("head", "settings", "launcher"),
    [
        slow("conv1", JOINT, "torchrun"),
        slow("res-8x1-16x1", VIEWS, "torchrun"),
        slow("pool", JOINT, "accelerate launch"),
        slow("conv1", ONE_ROW_LEFT, "torchrun"),
    ],
)
def test_two_processes_learn_what_one_does(head, settings, launcher, tmp_path):
    places = [tmp_path / "one", tmp_path / "two"]
    for place, how in zip(places, (None, launcher), strict=True):
        place.mkdir()
        done = trained(place, head, settings, how)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = map(found, places)
    for name, value in one["heads"].items():
        assert torch.allclose(value.float(), two["heads"][name].float(), rtol=1e-3, atol=1e-4), name
    assert torch.allclose(one["epochs"], two["epochs"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_processes_that_do_not_share_their_disk_do_not_wait_for_each_other_on_resume(tmp_path):
    settings = {"batch_size": 16, "epochs": 3, "checkpoint": str(tmp_path / "RANK.safetensors")}
    done = trained(tmp_path, "pool", settings | {"epochs": 1}, "torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["0.safetensors"]  # the first process writes
    for each in alone(tmp_path, "pool", settings | {"resume": True}):
        assert each.returncode == 1
        assert "of 0 to 1 epochs. Keep it on a disk that all of them share" in each.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_is_lost_ends_all_in_one_line_and_resume_goes_on(tmp_path):
    kept = str(tmp_path / "checkpoint.safetensors")
    settings = {"batch_size": 16, "epochs": 3, "checkpoint": kept}
    whole = trained(tmp_path, "conv1", {"batch_size": 16, "epochs": 3}, "torchrun")
    assert whole.returncode == 0, whole.stderr[-3000:]
    expected = found(tmp_path)
    left, lost = alone(tmp_path, "conv1", settings | {"leaves": 60})[::-1]
    assert (left.returncode, lost.returncode) == (9, 1)
    assert Path(kept).is_file()
    (said,) = [line for line in lost.stderr.splitlines() if "processes that train together has ended" in line]
    assert "resume=True" in said
    again = trained(tmp_path, "conv1", settings | {"resume": True}, "torchrun")
    assert again.returncode == 0, again.stderr[-3000:]
    for name, value in expected["heads"].items():
        assert torch.allclose(value.float(), found(tmp_path)["heads"][name].float(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("whole", [1, 2, 3, 7, 8])
def test_shares_hold_each_row_once_and_their_weights_average_to_one(whole):
    shares = [Share(whole, number, 3) for number in range(3)]
    assert sorted(row for share in shares for row in share.of(list(range(whole)))) == list(range(whole))
    assert sum(share.weight for share in shares) / 3 == pytest.approx(1)


def test_batches_in_which_a_process_would_have_no_row_are_left_out_by_all():
    batches = [[0, 1, 2, 3], [4]]
    assert [list(ShareOfBatches(batches, number, 2, fewest=1)) for number in (0, 1)] == [[[0, 2]], [[1, 3]]]
    assert [list(ShareOfBatches(batches, number, 2, fewest=0)) for number in (0, 1)] == [[[0, 2], [4]], [[1, 3]]]


def test_an_error_of_a_lost_connection_is_known():
    assert is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:6377"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


FIRST = """
import os
from ptee._common.devices import of_main_process
print("found", of_main_process(lambda: os.environ["RANK"], "cpu"), flush=True)
"""


@pytest.mark.slow
def test_all_processes_get_what_the_first_one_measured(tmp_path):
    (tmp_path / "first.py").write_text(FIRST)
    words = [sys.executable, "-W", "ignore", "-m", *LAUNCHERS["torchrun"], str(tmp_path / "first.py")]
    done = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[:2] == ["found 0", "found 0"], done
