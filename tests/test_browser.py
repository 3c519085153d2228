"""The workbook in a real JupyterLab: every notebook with a widget runs, keys and mouse change its pictures, nothing leaves
this machine; and exported to HTML, every figure is still there. Needs Chromium: see `browser`."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browser import ROOT, Lab, Notebook, Page, Widget, chromium, jupyterlab

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
WIDGET = r"\w+_(browser|explorer|stepper|monitor)\("
MAY_STAY = {"score", "beside", "order", "only", "run"}  # another order or filter may begin with the same image
ANSWER = 200  # milliseconds from a key to the new picture, on a machine that does nothing else


def with_widget(path: Path) -> bool:
    cells = nbformat.read(path, as_version=4).cells
    return any(re.search(WIDGET, cell.source) for cell in cells if cell.cell_type == "code")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. Skipped where there is none; in CI that is a failure."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        sync_playwright = None
    if sync_playwright is None or chromium() is None:
        reason = "no browser: install Debian's chromium and fonts-noto-cjk, and the test extra (playwright)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])  # root has no sandbox
        yield running
        running.close()


def finished_run(folder: Path) -> bool:
    """A copy of the finished miniature run into `folder`, if there is one that the present code takes for finished."""
    from clipcap_lib import train
    from clipcap_lib.config import MODELS, preset, runs_folder

    class NotFinishedError(Exception):
        pass

    def stop(line: dict[str, Any]) -> None:
        if line["event"] != "done before":
            raise NotFinishedError

    source, run, config = runs_folder() / "miniature", folder / "miniature", preset("miniature")
    if not all((source / part).exists() for part in ("data/manifest.json", "scores/1+2+4-board-b.json", "predictions")):
        return False
    shutil.copytree(source, run, ignore=shutil.ignore_patterns("ablation"))  # no widget looks at it
    try:
        for system in MODELS:
            train.pretrain_clip(config, run, MODELS[0].seed, system.without, progress=stop)
            train.finetune_captioner(config, run, system.name, system.seed, system.without, progress=stop)
    except NotFinishedError:
        shutil.rmtree(run)
        return False
    return True


def tiny_run(folder: Path) -> None:
    """All models of the preset miniature-debug, trained on a handful of drawn images."""
    from clipcap_lib import train
    from clipcap_lib.config import MODELS, preset
    from clipcap_lib.corpora import miniature
    from clipcap_lib.prepare import prepare

    images = {"flickr8k-cn": {"train": 40, "val": 16, "test": 4}, "hualu": {"train": 40, "board-a": 12, "board-b": 12},
              "coco-cn": {"train": 16, "val": 4, "test": 4}}
    corpora = miniature.write_corpora(folder / "corpora", images=images, processes=1)
    run, config = folder / "miniature-debug", preset("miniature-debug")
    prepare(config, run / "data", corpora, processes=1, report=lambda line: None)
    for system in MODELS:
        train.pretrain_clip(config, run, MODELS[0].seed, system.without)
        train.finetune_captioner(config, run, system.name, system.seed, system.without)


@pytest.fixture(scope="module")
def workbook(tmp_path_factory) -> dict[str, str]:
    """The environment of the notebooks: a finished run, the miniature's if there is one."""
    runs = tmp_path_factory.mktemp("runs")
    environment = {"CLIPCAP_RUNS": str(runs), "CLIPCAP_FIGURES": str(tmp_path_factory.mktemp("figures")), "CLIPCAP_DATA": "",
                   "CLIPCAP_PRESET": "miniature", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                   "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                   "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if not finished_run(runs):
        tiny_run(runs)
        environment |= {"CLIPCAP_PRESET": "miniature-debug", "CLIPCAP_DATA": str(runs / "corpora")}
    return environment


@pytest.fixture(scope="module")
def lab(workbook, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """JupyterLab on a copy of the notebooks -> its address, and the folder."""
    folder = tmp_path_factory.mktemp("lab")
    for path in NOTEBOOKS:
        shutil.copy(path, folder)
    with jupyterlab(folder, workbook) as address:
        yield address, folder


@pytest.fixture(scope="module")
def page(browser, lab) -> Iterator[Lab]:
    """The page that all notebooks are opened in."""
    page = Lab(browser, lab[0])
    assert page.elsewhere == [] and page.errors == []
    yield page
    page.close()


@pytest.fixture
def opened(page):
    """A function that opens and runs a notebook; afterwards nothing may have gone wrong or left this machine."""
    page.elsewhere.clear()
    page.errors.clear()
    notebooks: list[Notebook] = []

    def run(name: str, seconds: float = 150) -> Notebook:
        notebooks.append(Notebook(page, name, seconds))
        assert notebooks[-1].failures() == []
        return notebooks[-1]

    yield run
    for notebook in notebooks:
        notebook.close()
    assert page.elsewhere == []
    assert page.errors == []


def exercise(widget: Widget) -> list[float]:
    """Every slider by key, by mouse and by key again; the picture must change -> milliseconds of the answers."""
    assert widget.missed_by_tab() == set()
    waited = []
    for label in widget.labels("slider"):
        handle = widget.control(label)
        widget.settle()  # what an answer before has switched off arrives with its picture, not before it
        if handle.evaluate("e => e.getAttribute('aria-disabled') === 'true' || e.closest('[disabled]') !== null"
                           " || e.ariaValueMin === e.ariaValueMax"):
            continue
        for act in ("key", "click", "key"):
            at_end = handle.evaluate("e => e.ariaValueNow === e.ariaValueMax")
            arrow = "ArrowLeft" if at_end else "ArrowRight"
            if label in MAY_STAY:
                before = handle.get_attribute("aria-valuetext")
                handle.press(arrow)
                widget.settle()
                assert handle.get_attribute("aria-valuetext") != before
            else:
                state = {name: widget.control(name).get_attribute("aria-valuetext") for name in widget.labels("slider")}
                try:
                    waited.append(widget.key(label, arrow) if act == "key" else widget.click(label))
                except Exception as error:
                    raise AssertionError(f"{label}: {act} {arrow} at {state} changed no picture") from error
    return waited


def in_time(waited: list[float]) -> bool:
    """The median is within ANSWER, or as much more as this machine is slower now than one that draws bare axes in 20 ms."""
    from clipcap_lib import style

    times = []
    for _ in range(7):
        start = time.perf_counter()
        figure = style.new_picture(4.0, "", "", layout=None)
        style.place(figure, 1, 1, 5, 2)
        style.png_bytes(figure, dpi=100, small=False)
        times.append(1000 * (time.perf_counter() - start))
    print(f"{len(waited)} answers, median {statistics.median(waited):.0f} ms; bare axes {statistics.median(times):.0f} ms")
    return statistics.median(waited) < max(ANSWER, 10 * statistics.median(times))


def step(widget: Widget) -> list[float]:
    """The decoding stepper's buttons: two characters by key, one by mouse, back, to the end, and a branch."""
    first = widget.labels("button")[3]
    waited = [widget.key(first, "Enter")]
    waited.append(widget.key(widget.labels("button")[4], "Space"))
    waited += [widget.click(widget.labels("button")[3]), widget.key("one back", "Enter"), widget.click("one back")]
    waited += [widget.click("greedy to the end"), widget.key("place", "ArrowLeft"), widget.click("start over")]
    return [*waited, widget.key("greedy to the end", "Enter")]


OWN = ["""
import json, sys
from pathlib import Path
import numpy as np
from clipcap_lib import checkpoint, config as settings, plots, widgets
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.data import load_prepared
plots.use_house_style()
run = settings.runs_folder() / settings.preset(PRESET).name
rows = load_prepared(run / "data", "val")
model = checkpoint.load(run / "caption" / "model1" / "best")
signed = np.random.default_rng(0).normal(size=(4, 6, 6))
""", "widgets.training_monitor(Path('training'))",
       "widgets.decoding_stepper(model, rows[0]['image'])",
       "widgets.decoding_stepper(Ensemble([model, model]), rows[1]['image'])",
       "widgets.attention_browser(rows[0]['image'], [*'一只狗', '[SEP]'], None, "
       "{'Grad-CAM': abs(signed), 'occlusion (nats)': signed})"]


def metrics_line(step: int) -> str:
    line = {"step": step, "steps": 400, "epoch": step / 40, "loss": 4 - step / 200, "images_per_second": 300.0}
    return json.dumps(line | ({"samples": {"a.jpg": f"第{step}步"}} if step % 40 == 0 else {})) + "\n"


def test_the_monitor_follows_a_training_of_another_process_and_the_stepper_steps(opened, lab, workbook):
    """Beside the notebooks' own: a file that grows under the monitor, a stepper on an ensemble, maps of a pooled model."""
    file = lab[1] / "training" / "caption" / "model1" / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(map(metrics_line, range(10, 100, 10))), encoding="utf-8")
    cells = [nbformat.v4.new_code_cell(cell.replace("PRESET", repr(workbook["CLIPCAP_PRESET"]))) for cell in OWN]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab[1] / "own.ipynb")
    monitor, stepper, ensemble, pooled = opened("own.ipynb").widgets()

    def grow(step: int) -> None:
        with file.open("a", encoding="utf-8") as metrics:
            metrics.write(metrics_line(step))

    monitor.show()
    monitor.changes(lambda: grow(100))  # it follows from the start, as the training is not over
    monitor.control("follow").click()
    monitor.page.wait_for_timeout(2500)
    grow(110)
    monitor.key("read again", "Enter")
    grow(120)
    monitor.click("read again")
    (file.parents[2] / "clip" / "all").mkdir(parents=True)
    shutil.copy(file, file.parents[2] / "clip" / "all")
    monitor.key("read again", "Space")  # the run that was written last
    monitor.key("run", "ArrowRight")
    for widget in (stepper, ensemble):
        assert in_time(step(widget.show()))
    exercise(pooled.show())


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS if with_widget(path)])
def test_a_notebook_runs_and_keys_and_mouse_change_the_pictures_of_its_widgets(name, opened):
    notebook = opened(name)
    widgets = notebook.widgets()
    assert widgets, "the notebook shows a widget"
    waited = []
    for widget in widgets:
        widget.show()
        if "stepper(" in widget.source:
            waited += step(widget)
        waited += exercise(widget)
    assert in_time(waited)


# -- on paper ----------------------------------------------------------------------------------------------------------


def export(path: Path, target: Path, **options: str) -> Path:
    """A notebook as HTML."""
    from nbconvert import HTMLExporter

    target.write_text(HTMLExporter(**options).from_filename(str(path))[0], encoding="utf-8")
    return target


def pictures(path: Path) -> int:
    """The pictures among a notebook's outputs."""
    cells = nbformat.read(path, as_version=4).cells
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS])
def test_exported_to_html_and_opened_without_a_network_every_figure_shows(name, browser, tmp_path):
    """With the flags of `make html` nothing is asked for; without them a script is, which the figures can do without."""
    path = ROOT / "notebooks" / name
    flags = dict(re.findall(r"--HTMLExporter\.(\w+)=(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8")))
    for options in (flags, {}):
        page = Page(browser)
        page.page.goto(export(path, tmp_path / "notebook.html", **options).as_uri(), wait_until="load")
        page.page.wait_for_function("[...document.images].every(image => image.complete && image.clientWidth > 0)")
        shown = page.page.evaluate("""() => [...document.querySelectorAll('.jp-OutputArea img')].map(
          image => [image.naturalWidth, image.clientWidth])""")
        page.context.close()
        assert len(shown) == pictures(path) > 0
        assert all(own > 500 and drawn > 500 for own, drawn in shown), shown
        if options:
            assert page.elsewhere == [] and page.errors == []
