"""Memory: what a training step of each stage takes, the largest batch that fits on this device, and the peak of a call.

On a GPU the allocator tells the peak, and the largest batch is tried. On a CPU the peak is that of the process (VmHWM, Linux
only) at two batch sizes, and the largest batch is an estimate from the line through them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch

from clipcap_lib import optimisation
from clipcap_lib.config import Config, InputError
from clipcap_lib.data import Batch
from clipcap_lib.model import ClipCap
from clipcap_lib.optimisation import TrainingStep
from clipcap_lib.stages import STAGES

TOKENS = 16  # a caption of 14 characters, [CLS] and [SEP]
VOCABULARY = 5000
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_memory(config: Config, tiny: bool, report: Callable[[str], None]) -> dict[str, tuple[float, str]]:
    """Rows of `bench --what memory`: for both stages what is always taken, what an image adds, and what fits."""
    rows: dict[str, tuple[float, str]] = {}
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not _RESET.exists():
        raise InputError("memory is measured on a GPU, or on a CPU under Linux; this machine has neither")
    capacity = torch.cuda.get_device_properties(0).total_memory if on_gpu else psutil.virtual_memory().total
    for name in ("clip", "caption"):
        step, settings = _step(config, name), getattr(config, name)
        few, more = (2, 4) if tiny else (8, 16)
        step(few)  # the optimiser's moments come into being
        peaks = [_peak(lambda size=size, step=step: step(size)) for size in (few, more)]
        an_image = max(1.0, (peaks[1] - peaks[0]) / (more - few))
        always = max(1.0, peaks[0] - few * an_image)
        largest = max(1, int((capacity - always) / an_image))
        if on_gpu and not tiny:
            largest = _that_fits(step, largest)
        rows |= {f"{name}: always": (always / 2**30, "GiB"), f"{name}: an image": (an_image / 2**20, "MiB"),
                 f"{name}: the preset's {settings.batch_size}": ((always + settings.batch_size * an_image) / 2**30, "GiB"),
                 f"{name}: largest batch": (largest, "images")}
        report(f"  {name}: {always / 2**30:.2f} GiB and {an_image / 2**20:.1f} MiB an image")
        del step
    return rows


def _step(config: Config, name: str) -> Callable[[int], None]:
    """A function that takes one training step of a stage on so many made-up images."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ClipCap(replace(config.model, vocab_size=VOCABULARY)).to(device).train()
    stage = STAGES[name](config, {"captions": [["一"]]})
    accelerator = optimisation.accelerator(config.precision)
    optimizer = accelerator.prepare_optimizer(optimisation.optimizer(model, stage.stage))
    take = TrainingStep(stage, model, optimizer, accelerator)
    each, size = stage.stage.captions_per_visit, config.model.image_size

    def step(images: int) -> None:
        ids = torch.randint(4, VOCABULARY, (images * each, TOKENS), device=device)
        ids[:, 0], ids[:, -1] = model.start_id, model.end_id
        numbers = torch.arange(images * each, device=device)
        take(Batch(torch.randint(256, (images, 3, size, size), dtype=torch.uint8, device=device), ids, numbers // each,
                   numbers))

    return step


def _peak(act: Callable[[], None]) -> float:
    """Most bytes in use during a call."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        act()
        return torch.cuda.max_memory_allocated()
    _RESET.write_text("5")  # the peak begins anew
    act()
    return 1024 * int(next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")).split()[1])


def _that_fits(step: Callable[[int], None], images: int) -> int:
    """The largest batch up to `images`, in steps of 5 %, that a GPU takes: fragments cost memory that no line foresees."""
    while images > 1:
        try:
            step(images)
            return images
        except torch.cuda.OutOfMemoryError:
            images = min(images - 1, int(images * 0.95))
        torch.cuda.empty_cache()
    return images


def peak_memory(call: Callable[..., object], arguments: tuple, keywords: Mapping[str, Any]) -> int:
    """Bytes that `call` and the processes it starts hold together at most (PSS: what they share counts once).

    0 where the system does not tell PSS. Raises RuntimeError if the call fails.
    """
    process = get_context("spawn").Process(target=call, args=arguments, kwargs=keywords)
    process.start()
    peak, tree = 0, psutil.Process(process.pid)
    while process.is_alive():
        held = 0
        for one in [tree, *_children(tree)]:
            try:
                held += getattr(one.memory_full_info(), "pss", 0)
            except psutil.Error:  # it has just ended
                continue
        peak = max(peak, held)
        time.sleep(0.02)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{getattr(call, '__name__', call)}: the process whose memory was measured ended with "
                           f"{process.exitcode}")
    return peak


def _children(tree: psutil.Process) -> list[psutil.Process]:
    try:
        return tree.children(recursive=True)
    except psutil.Error:
        return []
