"""How long things take: variants that take turns, and the median of each."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

REPEATS = 5  # timings of each variant
AT_LEAST = 0.5  # seconds a timing lasts: what is faster is called several times
Rows = dict[str, tuple[float, str]]  # name -> value, unit
Report = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """Something to be timed."""

    call: Callable[[], object]
    images: int = 1  # images, pairs or bytes a call works on
    before: Callable[[], object] | None = None  # done before every call, not timed


def measure(variants: Mapping[str, Variant], tiny: bool = False, report: Report = lambda line: None) -> dict[str, float]:
    """Time the variants in turns -> median seconds an image of each. tiny: how long the first calls take."""
    calls, first = {}, {}
    for name, variant in variants.items():
        for _ in range(4 if torch.cuda.is_available() else 1):  # a GPU's first calls choose kernels and capture them
            seconds = seconds_a_call(variant, 1)
        first[name] = seconds / variant.images
        calls[name] = 1 if variant.before else min(100, math.ceil(AT_LEAST / seconds))
        report(f"  {name}: {seconds:.3g} s at first")
    if tiny:
        return first
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(REPEATS):
        for name, variant in variants.items():
            found[name].append(seconds_a_call(variant, calls[name]) / variant.images)
        report(f"  turn {turn + 1} is over")
    return {name: statistics.median(values) for name, values in found.items()}


def seconds_a_call(variant: Variant, calls: int) -> float:
    """Wall-clock seconds a call of so many, all work that the GPU was given included."""
    if variant.before:
        variant.before()
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        variant.call()
    wait()
    return (time.perf_counter() - start) / calls
