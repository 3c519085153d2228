"""A real JupyterLab in headless Chromium, for the tests: the server, a notebook in it, and a widget in the notebook."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "only-for-this-test"
PATIENCE = 20_000  # milliseconds for an answer, on a machine that is busy with other things as well

FORGET = """
import ipywidgets, matplotlib.pyplot
ipywidgets.Widget.close_all()
matplotlib.pyplot.close("all")
get_ipython().run_line_magic("reset", "-f")
"""

# Written into every page: when the last key or button went down, and how often, and how soon after it, a picture came.
WATCH = """
  window.answers = []; window.pressed = 0
  for (const kind of ['keydown', 'pointerdown', 'change'])
    document.addEventListener(kind, event => { window.pressed = performance.now() }, true)
  document.addEventListener('load', event => {
    if (event.target.classList?.contains('widget-image')) window.answers.push(performance.now() - window.pressed)
  }, true)
"""


def chromium() -> str | None:
    """The system's Chromium."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def jupyterlab(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """JupyterLab as `make lab` starts it, on a free port and with settings of its own -> its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    flags = [flag for flag in re.search(r"jupyter lab (.*)", recipe)[1].split() if not flag.startswith("--notebook-dir")]
    own = {f"JUPYTER_{kind}_DIR": str(folder / ".jupyter" / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *flags, "--no-browser", "--allow-root", f"--port={port}",
             "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}",
             "--LabApp.expose_app_in_browser=True"],
            env={**os.environ, **own, "IPYTHONDIR": str(folder / ".ipython"), **environment}, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


class Page:
    """A page that reaches nothing but this machine; what it asked for elsewhere and what went wrong in it are kept."""

    def __init__(self, browser: Any):
        self.context = browser.new_context(viewport={"width": 1400, "height": 1000})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        self.page.add_init_script(WATCH)
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(f"{said.text} {said.location}"))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("websocket", lambda socket: self._note(socket.url))
        self.context.route("**/*", self._route)

    def _note(self, url: str) -> bool:
        here = re.match(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|(data|blob|about|file):", url) is not None
        if not here:
            self.elsewhere.append(url)
        return here

    def _route(self, route: Any) -> None:
        route.continue_() if self._note(route.request.url) else route.abort()


class Lab(Page):
    """JupyterLab in one page, and one kernel for its notebooks, one after the other: the next finds everything imported."""

    def __init__(self, browser: Any, address: str):
        super().__init__(browser)
        self.kernel: dict[str, str] | None = None
        self.page.goto(f"{address}/lab?token={TOKEN}&reset", timeout=60_000)
        self.page.wait_for_function("window.jupyterapp?.shell.currentWidget", timeout=60_000)  # the launcher

    def close(self) -> None:
        """End the page; the kernel ends with the server."""
        self.context.close()


class Notebook:
    """A notebook, opened and run from its first to its last cell; of the one before, the kernel has forgotten all names."""

    def __init__(self, lab: Lab, name: str, seconds: float):
        self.page = lab.page
        self.page.evaluate("""async ([path, kernel]) => {
          await jupyterapp.commands.execute('docmanager:open', {path, kernel, factory: 'Notebook'}) }""", [name, lab.kernel])
        here = "window.jupyterapp.shell.currentWidget"
        self.page.wait_for_function(f"""name => {here}?.context?.path === name
          && {here}.sessionContext?.session?.kernel?.status === 'idle'""", arg=name, timeout=60_000)
        lab.kernel = {"id": self.page.evaluate(f"{here}.sessionContext.session.kernel.id")}
        self.page.evaluate("""() => { window.ran = null; const told = jupyterapp.commands.execute('notebook:run-all-cells')
          told.then(() => { window.ran = 'yes' }, error => { window.ran = `${error}` }) }""")
        self.page.wait_for_function("window.ran !== null", timeout=1000 * seconds)

    def failures(self) -> list[str]:
        """What stands in error outputs, cell by cell."""
        return self.page.evaluate("""() => jupyterapp.shell.currentWidget.content.widgets.flatMap((cell, index) =>
          (cell.model.outputs?.toJSON() ?? []).filter(out => out.output_type === 'error')
          .map(out => `cell ${index}: ${out.ename}: ${out.evalue}`))""")

    def widgets(self) -> list[Widget]:
        """The widgets, in order, each scrolled to by its `show`."""
        cells = self.page.evaluate("""() => jupyterapp.shell.currentWidget.content.widgets.flatMap((cell, index) =>
          (cell.model.outputs?.toJSON() ?? []).some(output => output.data?.['application/vnd.jupyter.widget-view+json'])
          ? [index] : [])""")
        return [Widget(self, cell) for cell in cells]

    def close(self) -> None:
        """End its widgets, let the kernel forget its names, and close its tab."""
        self.page.evaluate("""async code => { const notebook = jupyterapp.shell.currentWidget
          await notebook.sessionContext.session.kernel.requestExecute({code}).done; notebook.dispose() }""", FORGET)


class Widget:
    """The output of one cell: controls, found by what is written beside them, and a picture."""

    def __init__(self, notebook: Notebook, cell: int):
        self.page, self.cell = notebook.page, cell
        self.source: str = self.page.evaluate(
            "cell => jupyterapp.shell.currentWidget.content.widgets[cell].model.sharedModel.getSource()", cell)
        self.box = self.page.locator(f"[data-tested='{cell}'] .jp-OutputArea-output").last

    def show(self) -> Widget:
        """Scroll to it, as cells out of sight are not in the page, and wait for its picture."""
        self.page.evaluate("""async index => { const notebook = jupyterapp.shell.currentWidget.content
          await notebook.scrollToItem(index, 'start'); notebook.widgets[index].node.dataset.tested = index }""", self.cell)
        self.image.wait_for()
        self.page.wait_for_function("image => image.complete && image.naturalWidth > 500", arg=self.image.element_handle())
        return self

    @property
    def image(self) -> Any:
        return self.box.locator("img.widget-image").first

    def pixels(self) -> str:
        """A digest of the picture's pixels as they are drawn."""
        return self.image.evaluate("""async image => { await image.decode()
          const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight), pen = canvas.getContext('2d')
          pen.drawImage(image, 0, 0)
          const data = pen.getImageData(0, 0, canvas.width, canvas.height).data
          const hash = await crypto.subtle.digest('SHA-256', data)
          return Array.from(new Uint8Array(hash), byte => byte.toString(16)).join('') }""")

    def changes(self, act: Callable[[], Any]) -> float:
        """Do something; the picture must be another afterwards -> milliseconds from the key to the new picture."""
        before, seen = self.pixels(), self.page.evaluate("window.answers.length")
        act()
        self.page.wait_for_function("seen => window.answers.length > seen", arg=seen)
        waited = self.page.evaluate("seen => window.answers[seen]", seen)
        self.settle()
        assert self.pixels() != before, "the picture was drawn again and is the same"
        return waited

    def settle(self) -> None:
        """Wait until the kernel has nothing to do and no further picture comes."""
        self.page.wait_for_function("jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'")
        self.page.wait_for_timeout(60)

    def labels(self, kind: str) -> list[str]:
        """What is written beside the sliders, or on the buttons."""
        if kind == "button":
            return self.box.locator("button.jupyter-button").all_text_contents()
        return self.box.locator(".widget-inline-hbox:has(.noUi-handle) > .widget-label").all_text_contents()

    def control(self, label: str) -> Any:
        """The element of a control that takes the keys: a slider's handle, or a button."""
        name = re.compile(rf"^\s*{re.escape(label)}\s*$")
        row = self.box.locator(".widget-inline-hbox").filter(has=self.page.locator(".widget-label", has_text=name))
        if row.count():
            return row.locator(".noUi-handle").first
        return self.box.locator("button.jupyter-button", has_text=label).first

    def key(self, label: str, key: str) -> float:
        """Press a key on a control; the picture must change."""
        self.control(label).focus()
        return self.changes(lambda: self.page.keyboard.press(key))

    def click(self, label: str) -> float:
        """Click a button, or a slider's track at another place; the picture must change."""
        control = self.control(label)
        if "noUi-handle" not in control.get_attribute("class"):
            return self.changes(control.click)
        track = control.locator("xpath=ancestor::*[contains(@class, 'noUi-target')]")
        box = track.bounding_box()
        share = float(control.get_attribute("aria-valuenow")) - float(control.get_attribute("aria-valuemin"))
        share /= float(control.get_attribute("aria-valuemax")) - float(control.get_attribute("aria-valuemin"))
        x = box["x"] + box["width"] * (0.04 if share > 0.5 else 0.96)
        return self.changes(lambda: self.page.mouse.click(x, box["y"] + box["height"] / 2))

    def missed_by_tab(self) -> set[int]:
        """The controls, by number, that the tab key does not reach from the first one on."""
        controls = self.box.locator(".noUi-handle, button.jupyter-button:enabled")
        count = controls.count()
        controls.first.focus()
        reached = set()
        for _ in range(3 * count):  # a slider's number can be typed into: a stop of its own
            reached.add(self.page.evaluate("""box => [...box.querySelectorAll(
              '.noUi-handle, button.jupyter-button:enabled')].indexOf(document.activeElement)""", self.box.element_handle()))
            self.page.keyboard.press("Tab")
        return set(range(count)) - reached
