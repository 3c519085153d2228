"""Watching a training: the file that it writes, and two views of it: beside the training, and within its own cell."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from clipcap_lib import controls, plots
from clipcap_lib.journal import EVENTS

QUIET = 60  # seconds without a new line after which the monitor says so
EVERY = 2.0  # seconds between two readings
WAIT = 600  # seconds that a folder's monitor waits for the next stage
NEWEST = "the newest"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; one that is still being written is left out."""
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).is_file() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line with its validation values as values of their own, and without samples."""
    return {name: value for name, value in {**line, **line.get("validation", {})}.items()
            if name not in ("validation", "samples", "warning")}


def read_metrics(path: Path) -> Any:
    """metrics.jsonl -> DataFrame: a row a line, validation values as columns of their own; empty if there is no file."""
    import pandas as pd

    return pd.DataFrame(map(_flat, _lines(path)))


def read_samples(path: Path) -> dict[str, str]:
    """The captions of the last validation that kept some: {file: caption}; files are numbered where it kept no names."""
    return _samples(list(_lines(path)))


def _samples(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    kept = (line.get("samples") or line.get("validation", {}).get("samples") for line in reversed(lines))
    found = next(filter(None, kept), {})
    return dict(found) if isinstance(found, Mapping) else {f"{i}": caption for i, caption in enumerate(found, 1)}


def _curve_columns(frame: Any) -> list[str]:
    first = "reward" if "reward" in frame else "loss"  # a self-critical loss tells nothing: advantages sum to 0
    wanted = (first, "image->text R@1", "text->image R@1", "CIDEr", "distinct", "images_per_second")
    return [name for name in wanted if name in frame]


def _status(line: Mapping[str, Any]) -> str:
    return (f"epoch {line['epoch']:.1f}, step {line['step']:.0f}" + (f" of {line['steps']:.0f}" if "steps" in line else "")
            + f", loss {line['loss']:.3f}" + (f", reward {line['reward']:.2f}" if "reward" in line else "")
            + f", {line['images_per_second']:.0f} images/s")


def _name(path: Path) -> str:
    return "/".join(path.parent.parts[-2:])


def training_monitor(place: Path) -> Any:
    """Curves, throughput and sample captions of a training that runs, here or in another process, or that is over.

    place: a run's metrics.jsonl, or a folder: all runs in it can be chosen then, "the newest" first. All that is shown
    comes from the file, so that a notebook opened anew goes on where the training is. It is read again every two seconds
    while "follow" is on and the kernel has nothing else to do, as from the start if the training is not over. It goes off
    when the training is over; with a folder's newest some minutes later, as a next stage may follow.
    """
    import ipywidgets

    place = Path(place)
    read: dict[str, Any] = {}  # what was read last; drawn again only when something is new

    def files() -> list[Path]:
        if place.suffix == ".jsonl" or not place.is_dir():
            return [place]
        found = sorted(place.rglob("metrics.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
        return found or [place / "metrics.jsonl"]

    def label(path: Path) -> str:
        """Short, and another one for each run of the folder."""
        within = path.parent.relative_to(place).as_posix() if path != place else "."
        return _name(path) if within.count("/") < 1 else within

    def settle() -> None:
        names = (NEWEST, *sorted(map(label, files())))
        if chosen.options != names:
            kept = chosen.value
            chosen.options = names
            chosen.value = kept if kept in names else NEWEST

    def draw(run: str) -> Any:
        path = next(path for path in files() if run in (NEWEST, label(path)))
        stamp = path.stat() if path.is_file() else None
        quiet = int(time.time() - stamp.st_mtime) // QUIET if stamp else 0
        key = (path, stamp and (stamp.st_mtime_ns, stamp.st_size), quiet, (path.parent / "done.json").is_file())
        if key != read.get("key"):
            lines = list(_lines(path))
            over = bool(lines) and (key[-1] or lines[-1]["step"] == lines[-1].get("steps"))
            state = "over" if over else f"nothing new for {quiet} min" if quiet else "running"
            read.update(key=key, over=over, written=stamp.st_mtime if stamp else 0, figure=_picture(path, lines, state))
        return read["figure"]

    def goes_on() -> bool:
        several = chosen.value == NEWEST and place.suffix != ".jsonl"
        return not read["over"] or (several and time.time() - read["written"] < WAIT)

    async def keep_up() -> None:
        while follow.value and goes_on():
            await asyncio.sleep(EVERY)
            box.redraw()
        follow.value = False

    def start(_: Any = None) -> None:
        with suppress(RuntimeError):  # outside of a notebook no loop runs: the button is left
            if box.task and box.task is not asyncio.current_task():
                box.task.cancel()  # else it could go on beside the next one
            if follow.value:
                box.task = asyncio.get_running_loop().create_task(keep_up())

    chosen = controls.menu("run", [NEWEST])
    box = controls.panel({"run": chosen}, draw, settle=settle)
    follow = ipywidgets.ToggleButton(value=not read["over"], description="follow",
                                     tooltip="read the file again every two seconds", layout={"width": "auto"})
    box.task = None
    controls.add(box, follow=follow, refresh=controls.button("read again", box.redraw, "read the run's file again"))
    follow.observe(start, "value")
    start()
    return box


def _picture(path: Path, lines: Sequence[Mapping[str, Any]], state: str) -> Any:
    import pandas as pd

    if not lines:
        return plots.training_state(pd.DataFrame(), ["loss"], {}, title=f"{path}: nothing is written yet")
    frame = pd.DataFrame(map(_flat, lines))
    return plots.training_state(frame, _curve_columns(frame), _samples(lines),
                                title=f"{_name(path)} ({state}): {_status(lines[-1])}")


class LiveTraining:
    """A `progress` for training that keeps one line a run, and the curves of a run that is going on, up to date.

    Of runs that go on side by side, the curves shown are those of the first until it is over. Outside of a notebook it
    prints a line at the end of each epoch.
    """

    def __init__(self, share: float = 0.03):
        self.share = share  # of the time that may go into drawing the curves: training waits meanwhile
        self.lines: dict[str, str] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self._handles: dict[str, Any] = {}
        self._next, self._shown, self._over = 0.0, "", True

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Take what `train` reports: `event` is "step" or one of `EVENTS`."""
        run = f"{line['stage']}/{line['name']}"
        over = line["event"] == "done before" or line.get("step") == line.get("steps")
        if line["event"] in EVENTS:
            self.lines[run] = EVENTS[line["event"]].format(**line)
        else:
            self.history.setdefault(run, []).append(dict(line))
            best = "".join(f", {k} {v:.1f}" for k, v in line.get("validation", {}).items() if k in ("CIDEr", "recall_sum"))
            self.lines[run] = _status(line) + best + (f"; warning: {line['warning']}" if "warning" in line else "")
        if self._over:
            self._shown = run
        if run == self._shown:
            self._over = over
        if not self._notebook():
            if line["event"] != "step" or "validation" in line:
                print(f"{run}: {self.lines[run]}", flush=True)
        elif over or line["event"] != "step" or time.monotonic() > self._next:
            started = time.monotonic()
            self._draw()
            self._next = time.monotonic() + (time.monotonic() - started) / self.share

    @staticmethod
    def _notebook() -> bool:
        import sys

        return "IPython" in sys.modules and getattr(sys.modules["IPython"].get_ipython(), "kernel", None) is not None

    def _draw(self) -> None:
        import pandas as pd
        from IPython.display import Pretty

        self._update("text", Pretty("\n".join(f"{name}: {text}" for name, text in self.lines.items())))
        history = self.history.get(self._shown)
        if history:
            frame = pd.DataFrame(map(_flat, history))
            self._update("curves", plots.training_state(frame, _curve_columns(frame), _samples(history),
                                                        title=f"Training {self._shown}"))

    def _update(self, name: str, shown: Any) -> None:
        from IPython.display import display

        if name in self._handles:
            self._handles[name].update(shown)
        else:
            self._handles[name] = display(shown, display_id=True)
