"""Throughput and memory of `ptee trace` by number of images, engine and workers: a line for each run.

python recipes/scripts/trace_scale.py RUN SHARDS WORK --shards 5,10,20 --workers 1,2 --engines local,ray

Memory is that of the command and all processes that it started (with Ray also Ray's own), in MiB: the largest in the first and in the
last third of the run. If the last is no larger, memory is flat.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

from ptee._common.files import read_object


def memory_of(pid: int) -> int:
    """MiB in use by a process and its descendants; what several share is divided among them."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(map(_pss, family)) // 1024


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def measured(command: list[str]) -> tuple[float, float, list[int]]:
    """Seconds of a command, seconds of its processors, and its memory every two seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin, used = time.perf_counter(), []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            time.sleep(2)
            used.append(memory_of(process.pid))
        if process.returncode:
            raise SystemExit(process.stderr.read())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - begin, busy, used


def main() -> None:
    """Read the arguments, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--shards", default="5,10,20")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--engines", default="local,ray")
    o = parser.parse_args()
    print("engine  workers     images  seconds  images/s    CPU s  MiB first third  MiB last third", flush=True)
    shards = sorted(o.source.glob("*.tar"))
    for engine, n, workers in product(o.engines.split(","), map(int, o.shards.split(",")), o.workers.split(",")):
        data, out = o.work / f"data-{n}", o.work / f"{engine}-{workers}-{n}"
        data.mkdir(parents=True, exist_ok=True)
        for shard in shards[:n]:
            if not (data / shard.name).exists():
                (data / shard.name).hardlink_to(shard)
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "ptee", "trace", o.run, "--data", str(data), "--out", str(out)]
        seconds, busy, used = measured([*command, "--engine", engine, "--workers", workers])
        images = sum(part["rows"] for part in read_object(out / "manifest.json", 2**26)["parts"])
        third = max(1, len(used) // 3)
        cpu = f"{busy:.0f}" if engine == "local" else "-"  # Ray's workers are not the command's children
        print(
            f"{engine:6}  {workers:>7}  {images:9,}  {seconds:7.0f}  {images / seconds:8.0f}  {cpu:>7}  {max(used[:third]):15,}"
            f"  {max(used[-third:]):14,}",
            flush=True,
        )


if __name__ == "__main__":
    main()
