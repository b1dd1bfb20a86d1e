"""`ptee report` and `ptee plot`: a run on one page, and single figures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command import assert_refused, files, read_json

CHROMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ONE = ("--lines", "own", "--drops", "0.1")


def part_of(page: str) -> set[str]:
    """The parts that a page has."""
    text = Path(page).read_text(encoding="utf-8")
    return {key for key in ("thresholds", "network", "gallery", "training", "made") if f'<section id="{key}">' in text}


def test_a_run_is_reported_on_one_page_and_left_as_it_was(run, finished):
    before = files(finished)
    done = run("report", finished, *ONE, "--out", "new/report.html")
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("Written to new/report.html\n")
    assert part_of("new/report.html") == {"thresholds", "network", "gallery", "training", "made"}
    assert f"ptee tune {finished} --max-drop 0.1" in Path("new/report.html").read_text()
    assert files(finished) == before


def test_a_page_is_replaced_and_it_is_said_but_no_other_file(run, finished):
    for end in ("", ", in place of the page that was there"):
        assert run("report", finished, "--recorded").out.endswith(f"Written to report.html{end}\n")
    Path("report.html").write_text("<p>my own</p>")
    said = "report.html is there, and no page of ptee. Remove it, or give another name, such as --"
    for words in (("report", finished, "--recorded"), ("compare", finished, "--html", "report.html")):
        assert_refused(run(*words), said)
    assert Path("report.html").read_text() == "<p>my own</p>"


def test_a_run_is_reported_beside_another_one(run, finished):
    shutil.copytree(finished, "twin")
    done = run("report", finished, "--against", "twin", *ONE, "--no-images")
    assert (done.status, done.err) == (0, "")
    assert part_of("report.html") == {"thresholds", "network", "training", "made"}
    assert '"twin"' in Path("report.html").read_text()


def test_without_its_images_a_run_is_reported_by_what_it_recorded(run, finished):
    config = read_json(finished, "config.json")
    metrics = read_json(finished, "metrics.json")
    for held in (config, metrics):
        held["results"]["data"]["source"] = "/gone"
    Path(finished, "config.json").write_text(json.dumps(config))
    Path(finished, "metrics.json").write_text(json.dumps(metrics))
    assert_refused(run("report", finished), "/gone")
    assert not Path("report.html").exists()
    done = run("report", finished, "--recorded")
    assert (done.status, done.err) == (0, "")
    assert part_of("report.html") == {"network", "training", "made"}


def test_recorded_numbers_that_are_of_other_thresholds_are_said_to_be(run, finished):
    assert run("report", finished, "--recorded").status == 0
    assert "other thresholds" not in Path("report.html").read_text()
    config = read_json(finished, "config.json")
    config["threshold"] = [0.25 for _ in config["threshold"]]
    Path(finished, "config.json").write_text(json.dumps(config))
    assert run("report", finished, "--recorded").status == 0
    page = Path("report.html").read_text()
    assert re.search(
        r"measured with other thresholds \(.*\) than the model has now \(0\.25.*\), so they are not its own", page
    )


def half_written(folder: Path) -> None:
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes()[:99])


def without_metrics(folder: Path) -> None:
    (folder / "metrics.json").unlink()


def with_other_metrics(folder: Path) -> None:
    (folder / "metrics.json").write_text('{"results": {"rows": 3, "leaving": [1]}}')


REFUSED = {
    "a run that is half written": (half_written, [], "config.json is no complete JSON"),
    "a run that recorded nothing": (without_metrics, ["--recorded"], "no metrics.json.*--data FOLDER"),
    "a run with a foreign record": (with_other_metrics, [], "metrics.json does not hold what a run records"),
    "a folder as the page": (None, ["--out", "."], "is a folder"),
    "a name of no page": (None, ["--out", "report.pdf"], "ends in .html, such as --out report.html"),
    "drops and no images": (None, ["--recorded", "--drops", "0"], "--drops needs images, and --recorded reads none"),
    "images and none": (None, ["--recorded", "--data", "x"], "--data needs images, and --recorded reads none"),
    "figures over a file": (None, ["--figures", "out/config.json"], "config.json is a file"),
    "itself again": (None, ["--against", "./out"], "is given twice"),
}


@pytest.mark.parametrize(("change", "words", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_reported_is_refused_in_one_line_and_nothing_is_written(run, finished, change, words, said):
    if change is not None:
        change(finished)
    before = sorted(Path().rglob("*"))
    assert_refused(run("report", finished, *words), said)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("kind", ["curve", "threshold", "exits", "network", "epochs", "confidence", "gallery"])
def test_each_kind_of_figure_of_a_run_is_drawn(run, finished, kind):
    done = run("plot", finished, "--kind", kind, *(ONE if kind == "curve" else ()), "--out", f"{kind}.html")
    assert (done.status, done.out) == (0, f"Drawn in {kind}.html\n"), done
    assert '<div class="figure" id="figure-figure"' in Path(f"{kind}.html").read_text()


@pytest.mark.parametrize("kind", ["curve", "lambda"])
def test_each_kind_of_figure_of_a_sweep_is_drawn(run, elsewhere, kind):
    lines = [
        "run,training.cost_weight,cost,accuracy,fidelity,backbone's accuracy",
        "a,0.1,.5,.8,.9,.9",
        "b,1,.4,-,.9,-",
    ]
    (elsewhere / "sweep.csv").write_text("\n".join(lines))
    assert run("plot", ".", "--kind", kind, "--out", "x.html").status == 0
    text = Path("x.html").read_text()
    assert "training.cost_weight" in text or kind == "curve"


UNDRAWN = {
    "an unknown kind": (["--kind", "curv"], "Unknown kind of figure 'curv'. Did you mean 'curve'"),
    "a kind of a sweep": (["--kind", "lambda"], "'lambda' is a figure of a sweep, and this is a run. Choices: curve, "),
    "a name of no picture": (["--out", "x.jpg"], "ends in .png or .svg or .html"),
    "networks to compare with": (
        ["--kind", "exits", "--static", "resnet18"],
        "--static is of no use for --kind exits.",
    ),
    "a unit of cost": (["--kind", "gallery", "--cost", "time"], "--cost is of no use for --kind gallery."),
    "images for the network": (["--kind", "network", "--data", "x"], "--data is of no use for --kind network."),
}


@pytest.mark.parametrize(("words", "said"), UNDRAWN.values(), ids=UNDRAWN)
def test_what_cannot_be_drawn_is_refused(run, finished, words, said):
    assert_refused(run("plot", finished, "--out", "x.html", *words), said)


def test_the_network_is_drawn_without_images(run, finished, monkeypatch):
    monkeypatch.setattr("ptee.data.sources.open_data", None)
    assert run("plot", finished, "--kind", "network", "--out", "network.html").status == 0


def test_options_that_a_figure_of_a_sweep_has_no_use_for_are_refused(run, elsewhere):
    (elsewhere / "sweep.csv").write_text("run,a,cost,accuracy,fidelity,backbone's accuracy\nx,1,.5,.8,.9,.9")
    assert_refused(run("plot", ".", "--out", "x.html", "--drops", "0"), "--drops is of no use for a figure of a sweep")


NO_TABLES = [
    "run\n",
    "run,a,cost\nx,1,y",
    "run,cost,accuracy,fidelity,backbone's accuracy\n",
    f"run,a,cost,accuracy,fidelity,backbone's accuracy\nx,{'1' * 200_000},.5,.8,.9,.9",  # longer than csv takes
]


@pytest.mark.parametrize("text", NO_TABLES, ids=range(len(NO_TABLES)))
def test_a_sweep_without_a_table_is_refused(run, elsewhere, text):
    (elsewhere / "sweep.csv").write_text(text)
    assert_refused(run("plot", ".", "--out", "x.html"), "sweep")
    assert not Path("x.html").exists()


def test_plot_knows_figures_by_the_names_that_a_report_writes_them_under(run, finished):
    from ptee.pipeline.recorded import NAMES_OF_REPORT

    for name, kind in NAMES_OF_REPORT.items():
        done = run(
            "plot", finished, "--kind", name, "--out", f"{name}.html", *(("--lines", "own") if kind == "curve" else ())
        )
        assert done.status == 0, done


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, CHROMES)), reason="needs Chrome: plotly_get_chrome, or a package of the system"
)
def test_figures_are_written_as_svg_and_png(run, finished):
    pytest.importorskip("kaleido", reason="needs kaleido: pip install 'ptee-exits[figures]'")
    done = run("report", finished, *ONE, "--figures", "figures")
    assert done.status == 0, done
    names = {file.stem for file in Path("figures").glob("*.svg")}
    assert names == {file.stem for file in Path("figures").glob("*.png")} >= {"accuracy", "shares", "network"}
    assert all(file.stat().st_size > 2000 for file in Path("figures").iterdir())
