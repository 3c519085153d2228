"""CUDA graphs: many small kernels, launched at once. A GPU is done with most of them before Python has launched the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Graph:
    """A function of tensors as a captured graph: `graph(*inputs)` copies the inputs, runs it and returns its outputs.

    An input can be a whole number, which is then a tensor (1,) to the function; at least one is a tensor. The outputs lie in
    memory that the next call writes again. warm: how often the function is called beforehand, with all its effects, because
    libraries allocate and choose kernels on their first calls, which cannot be captured. pool: memory shared with graphs
    whose outputs are not needed once another of them runs.
    """

    def __init__(self, run: Callable[..., Any], *inputs: Tensor | int, warm: int = 3, pool: Any = None):
        device = next(one.device for one in inputs if isinstance(one, Tensor))
        with torch.inference_mode(False):  # a graph that was made in that mode may be called outside of it
            self.inputs = [torch.full((1,), one, device=device) if isinstance(one, int) else one.clone() for one in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(warm):
                run(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": a DataLoader's thread may go on pinning memory meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.output = run(*self.inputs)

    def __call__(self, *inputs: Tensor | int) -> Any:
        for kept, one in zip(self.inputs, inputs, strict=True):
            if isinstance(one, int):
                kept.fill_(one)
            else:
                kept.copy_(one, non_blocking=True)
        self.graph.replay()
        return self.output
