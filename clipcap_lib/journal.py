"""What a run writes down while it trains: metrics.jsonl, a line every few steps, and the same for TensorBoard.

TensorBoard is used where it is installed (`pip install -e .[tensorboard]`): its files lie in <run>/tensorboard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipcap_lib.files import write_atomically, writing

EVENTS = {  # what a run tells beside its steps, in words
    "done before": "done before, nothing has changed",
    "resumed": "goes on at step {step} of {steps}",
    "replaces": "another run stood here; it is kept in {kept}",
}
_CURVES = ("loss", "reward", "gradient_norm", "learning_rate", "images_per_second")


class Journal:
    """The journal of one run, opened at the step where the run begins or goes on: later lines will be written again."""

    def __init__(self, folder: Path, step: int):
        self.path, self.last = folder / "metrics.jsonl", {}  # the line that was written last
        if self.path.is_file():
            kept = [line for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(True)
                    if _step_of(line) <= step]
            self.last = json.loads(kept[-1]) if kept else {}
            with writing(self.path):
                write_atomically(self.path, lambda place: place.write_text("".join(kept), encoding="utf-8"))
        self.board = _board(folder / "tensorboard", step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Put down a line. Raises InputError if the disk takes no more."""
        with writing(self.path):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            if self.board:
                self._draw(line)

    def _draw(self, line: Mapping[str, Any]) -> None:
        values = {f"train/{name}": line[name] for name in _CURVES if line.get(name) is not None}
        values |= {f"validation/{name}": value for name, value in line.get("validation", {}).items()}
        for name, value in values.items():
            self.board.add_scalar(name, value, line["step"])
        for file, caption in line.get("samples", {}).items():
            self.board.add_text(f"samples/{file}", caption, line["step"])

    def close(self) -> None:
        if self.board:
            self.board.close()


def _step_of(line: str) -> float:
    """Infinity for a line that is not whole, as a power failure leaves one."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
