"""`ptee serve`: a run or an exported model behind HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from cloup import command, option, option_group

from ptee._common.errors import Argument, PteeError
from ptee._common.text import number_of
from ptee.cli.options import DEVICE, WEIGHTS, File, Real, RunName, in_groups
from ptee.cli.values import refuse_of_run, require_runs

STOPPED = "Stopped. All that came was answered."
NEEDS = {
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "httptools": "uvicorn[standard]",
    "prometheus_client": "prometheus_client",
}
ADDRESS = option_group(
    "Address",
    option("--host", default="127.0.0.1", show_default=True, help="Address; 0.0.0.0 is all of this machine's."),
    option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port."),
    option(
        "--token-file", type=File(), help="A file with a token: who sends that may change settings. Or set PTEE_TOKEN."
    ),
    option(
        "--grace-s", type=Real(0, 3600), default=2.0, show_default=True, help="Seconds between SIGTERM and the end."
    ),
)
LIMITS = option_group(
    "What callers may send",
    option("--max-upload-mb", type=Real(0.001, 1024), default=8.0, show_default=True, help="Size of a request."),
    option(
        "--max-pixels",
        type=click.IntRange(1, 10**8),
        default=16_000_000,
        show_default=True,
        help="Pixels of a picture.",
    ),
    option("--max-images", type=click.IntRange(1, 4096), default=64, show_default=True, help="Images of an array."),
    option("--min-threshold", type=Real(-1, 2), default=0.0, show_default=True, help="Least T of a request."),
    option("--max-threshold", type=Real(-1, 2), default=2.0, show_default=True, help="Largest T of a request."),
)
BATCHES = option_group(
    "Batches",
    option(
        "--p99-ms",
        type=Real(1),
        help="A request that would take longer than this is refused with 503. Default: no limit.",
    ),
    option(
        "--max-queue",
        type=click.IntRange(1, 10**6),
        default=512,
        show_default=True,
        help="Images that may wait or be answered at once.",
    ),
    option(
        "--max-batch",
        type=click.IntRange(1, 256),
        default=64,
        show_default=True,
        help="Largest batch. A smaller one is taken where that is as fast.",
    ),
    option(
        "--max-wait-ms",
        type=Real(0),
        help="How long an image may wait behind an exit for others. Default: a quarter of --p99-ms, or 25.",
    ),
    option(
        "--rebatch/--no-rebatch",
        default=True,
        help="Collect images of several callers for the later pieces, where it pays.",
    ),
    option(
        "--workers",
        type=click.IntRange(1, 64),
        default=1,
        show_default=True,
        help="Threads, or replicas of each piece under Ray, that compute.",
    ),
    option("--threads", type=click.IntRange(1, 256), help="CPU threads of one batch. Default: torch's own choice."),
)
WATCH = option_group(
    "Monitor (of a run, with --local)",
    option(
        "--max-fidelity-drop",
        type=Real(0, 1, min_open=True, max_open=True),
        help="Raise an alarm if more of the answers than this differ from the backbone's.",
    ),
    option(
        "--audit",
        type=Real(0, 1),
        default=0.05,
        show_default=True,
        help="Share of the images that go through the backbone, too.",
    ),
)


@command(short_help="Answer images over HTTP.")
@click.argument("run", type=RunName())
@option("--local", is_flag=True, help="Serve in one process, without Ray.")
@option("--bare", is_flag=True, help="Serve the backbone alone, with all exits off, to compare with.")
@in_groups(ADDRESS, LIMITS, BATCHES, WATCH)
@WEIGHTS
@DEVICE
def serve(run: str, **o: Any) -> None:
    """Answer images over HTTP with a saved RUN, or with what `ptee export` wrote.

    With Ray Serve: one deployment for each piece of the model. With --local: one process.

    \b
    curl --data-binary @a.jpg -H "Content-Type: image/jpeg" localhost:8000/predict

    TLS is left to a proxy in front.
    """
    _require_libraries(o["local"])
    require_runs(run, images=False, exported=True, **o)
    if o["min_threshold"] > o["max_threshold"]:
        raise PteeError(
            Argument("min_threshold", str(o["min_threshold"])), " is above ", Argument("max_threshold"), "."
        )
    from ptee.serving.settings import read_token

    o["token"] = read_token(o.pop("token_file"))
    (_serve_local if o.pop("local") else _serve_with_ray)(run, o)


def _require_libraries(local: bool) -> None:
    if find_spec("resource") is None:
        raise PteeError("ptee serve needs Linux or macOS. On Windows run it in WSL or in a container.")
    needs = NEEDS if local else {**NEEDS, "ray": "ray[serve]"}
    missing = [package for name, package in needs.items() if find_spec(name) is None]
    if missing:
        other = " Or serve in one process: --local." if not local and missing == ["ray[serve]"] else ""
        raise PteeError(f"ptee serve needs {', '.join(missing)}: pip install 'ptee-exits[serve]'.{other}")


def _serve_local(run: str, o: Mapping[str, Any]) -> None:
    """Serve in this process until SIGTERM.

    Args:
        run: a folder, or user/repo on the hub.
        o: the options of `ptee serve`.

    Raises:
        PteeError: in one line, before the port is taken.
    """
    from ptee.serving.app import app_of
    from ptee.serving.local import Batching, LocalServer, reserved, run_http

    where = reserved(o["host"], o["port"])
    try:
        click.echo(f"Loading {run}, and measuring how long its pieces take.{_on_pixels(run)}")
        how = Batching(o["max_batch"], o["max_wait_ms"], o["p99_ms"], o["max_queue"], o["rebatch"], o["workers"])
        server = LocalServer(_opened(run, o), how)
        many = number_of(len(server.policy.sizes), "piece")
        click.echo(f"{server.about.backbone}, in {many}\n\n{server.policy}\n")
        app = app_of(server, _rules_of(o))
        run_http(app, where, lambda: click.echo(_answering(o)), grace_s=o["grace_s"])
    finally:
        where.close()
    click.echo(STOPPED)


def _serve_with_ray(run: str, o: Mapping[str, Any]) -> None:
    """Serve with Ray until SIGTERM: the arguments are those of `_serve_local`."""
    from ptee._common.devices import resolve_device
    from ptee.deploy.manifest import is_exported
    from ptee.serving.local import Batching
    from ptee.serving.pieces import Source
    from ptee.serving.ray_serve import run_with_ray

    exported = is_exported(run)
    _refuse(run, exported, o)
    if o["max_fidelity_drop"] is not None:
        raise PteeError(
            Argument("max_fidelity_drop"), " is for one process. Give ", Argument("local", "True"), ", too."
        )
    wait_s = Batching(max_wait_ms=o["max_wait_ms"], p99_ms=o["p99_ms"], rebatch=o["rebatch"]).max_wait_s
    place = str(Path(run).resolve()) if Path(run).is_dir() else run
    device = str(o["device"] or "cpu") if exported else str(resolve_device(o["device"]))
    weights = None if o["weights"] is None else o["weights"].resolve()
    source = Source(place, exported, device, weights, o["max_batch"], wait_s, o["max_queue"], o["bare"])
    click.echo(f"Starting Ray, with a deployment for each piece of {run}.{_on_pixels(run)}")
    p99_s = None if o["p99_ms"] is None else o["p99_ms"] / 1000
    how = {"host": o["host"], "port": o["port"], "workers": o["workers"], "p99_s": p99_s}
    run_with_ray(source, _rules_of(o), started=lambda: click.echo(_answering(o)), **how)
    click.echo(STOPPED)


def _on_pixels(run: str) -> str:
    """A line, if uploaded pictures are normalised by numbers that nobody gave; else empty."""
    from ptee.deploy.manifest import UPLOADS_NOT_KNOWN, is_exported, read_manifest

    known = not is_exported(run) or read_manifest(Path(run)).pixels_known
    return "" if known else f"\n{UPLOADS_NOT_KNOWN}"


def _answering(o: Mapping[str, Any]) -> str:
    return f"Answering at http://{o['host']}:{o['port']}/predict"


def _rules_of(o: Mapping[str, Any]) -> Any:
    """What callers may do."""
    from ptee.serving.app import Rules
    from ptee.serving.uploads import Limits

    limits = Limits(int(o["max_upload_mb"] * 2**20), o["max_pixels"], o["max_images"])
    return Rules(limits, (o["min_threshold"], o["max_threshold"]), o["token"])


def _opened(run: str, o: Mapping[str, Any]) -> Any:
    """The model that answers: an early-exit model on its device, or a runner."""
    from ptee.deploy.manifest import is_exported
    from ptee.deploy.runner import load_exported

    exported = is_exported(run)
    _refuse(run, exported, o)
    if exported:
        if o["threads"]:
            _set_threads(Path(run), o["threads"])
        return load_exported(run, o["device"], threads=o["threads"])
    import torch

    from ptee._common.devices import resolve_device
    from ptee.pipeline.saved_run import load_run, usual_threads

    device = resolve_device(o["device"])
    model = load_run(run, o["weights"]).to(device)
    if threads := o["threads"] or usual_threads(model):
        torch.set_num_threads(threads)
    if o["bare"]:
        model.answers, model.off = "own", range(len(model.exits))
    elif o["max_fidelity_drop"] is not None:
        model.monitor(audit=o["audit"], max_fidelity_drop=o["max_fidelity_drop"])
    return model


def _set_threads(folder: Path, threads: int) -> None:
    from ptee.deploy.manifest import read_manifest

    if read_manifest(folder).format == "pt2":  # else torch is not needed
        import torch

        torch.set_num_threads(threads)


def _refuse(run: str, exported: bool, o: Mapping[str, Any]) -> None:
    """Options that are about something else than what is served."""
    if exported:
        refuse_of_run(run, o, ["bare", "max_fidelity_drop", "weights"])
    if o["bare"] and o["max_fidelity_drop"]:
        raise PteeError(Argument("max_fidelity_drop"), " watches exits, and ", Argument("bare", "True"), " has none.")
