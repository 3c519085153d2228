"""Several processes: those that train one model together, and those that train several models side by side.

`accelerate launch`, `torchrun` or `launch` below start the same function once a GPU; each process takes its share of every
batch: gathering with gradients, averaging. That does nothing, at no cost, where there is one process.
And what every process with a model asks of its memory.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch import distributed as dist

from clipcap_lib.config import InputError
from clipcap_lib.files import exclusive

START = "spawn"  # how processes are started: a notebook's process has threads and may hold a GPU, which no fork survives


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; 0 is the main process, the only one that writes."""
    return dist.get_rank() if count() > 1 else 0


def gather(rows: Tensor) -> Tensor:
    """Rows (N, ..) of every process, in their order -> (processes * N, ..). Every process gives as many.

    Gradients flow back: each process's rows get the *sum* of what all processes' losses say of them. Where every process
    computes the same loss of all rows, `average_gradients` then gives exactly that loss's gradient.
    """
    if count() == 1:
        return rows
    if rows.is_floating_point() and rows.dtype.itemsize < 4:
        rows = rows.float()  # sums over processes, in full precision
    if not rows.requires_grad:
        found = [torch.empty_like(rows) for _ in range(count())]
        dist.all_gather(found, rows.contiguous())
        return torch.cat(found)
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows))


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every gradient becomes its mean over the processes: one message for all of them."""
    if count() > 1:
        _average([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Running statistics become their mean over the processes: done before the model is judged or kept."""
    if count() > 1:
        _average([buffer for buffer in model.buffers() if buffer.is_floating_point()])


def _average(tensors: list[Tensor]) -> None:
    if tensors:
        joined = nn.utils.parameters_to_vector(tensors)
        dist.all_reduce(joined)
        for tensor, mean in zip(tensors, joined.div_(count()).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def of_main(value: Any) -> Any:
    """What the main process gives, in every process: decided once, where each could see something else on its disk."""
    return broadcast_object_list([value])[0] if count() > 1 else value


def synchronised(model: nn.Module) -> nn.Module:
    """The model with batch statistics over all processes' images. Raises InputError on a CPU: PyTorch has none there."""
    if next(model.parameters()).device.type == "cpu":
        raise InputError("sync_batchnorm works on GPUs only; on a CPU every process has its own statistics")
    from timm.layers import convert_sync_batchnorm  # knows timm's own kinds of BatchNorm as well

    return convert_sync_batchnorm(model)


def start() -> None:
    """Join the other processes, where `accelerate launch`, `torchrun` or `launch` started several."""
    if "LOCAL_RANK" in os.environ:
        PartialState(cpu=on_cpu())


def on_cpu() -> bool:
    """Whether several processes were started on a CPU: accelerate joins them only when told."""
    return "LOCAL_RANK" in os.environ and not torch.cuda.is_available()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process does what is within before the others do."""
    if rank():
        wait()
    yield
    if not rank():
        wait()


@contextmanager
def alone(run: Path, stage: str, output: str) -> Iterator[None]:
    """The processes of one training have <run>/<stage>/<output> to themselves, and the data of `run` stay as they are.

    The main one holds the locks for all.
    """
    if rank() == 0:
        data = (run / "data").resolve()  # an ablation's are those of the run that it belongs to
        with exclusive(data.parent, shared=True), exclusive(run / stage, f".{output}.lock"):
            wait()
            yield
    else:
        wait()
        yield


def wait() -> None:
    """Until every process is here."""
    if count() > 1:
        dist.barrier()


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free, for the next ones: on a CPU a fifth less time a training step, measured,
    and a third less for the encoder of 37 images.

    By default it hands large blocks back to the system, which then fills them with zeros, page by page, at every step.
    """
    with suppress(OSError, AttributeError):  # another C library has no such thing
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which is not trimmed


def launch(function: Callable[..., Any], *arguments: Any, gpus: int, progress: Callable[[dict], None] = lambda line: None,
           **named: Any) -> Any:
    """Call a training function in `gpus` processes that train together -> what the main process returns.

        train.launch(train.pretrain_clip, config, run, gpus=2, seed=1, progress=live)

    One process a GPU, or, without GPUs, that many on the CPU. `progress` is called here with what the main process reports.
    Raises InputError with the words of the process that raised it.
    """
    if gpus < 1 or (torch.cuda.is_available() and gpus > torch.cuda.device_count()):
        there = f"this machine has {torch.cuda.device_count()}; " if torch.cuda.is_available() else ""
        raise InputError(f"gpus={gpus}: {there}give from 1 to as many as there are (without GPUs: processes on the CPU)")
    said = torch.multiprocessing.get_context(START).Queue()
    return _listen(_process, (gpus, _free_port(), said, function, arguments, named), gpus, said, progress)["result"]


def side_by_side(calls: Sequence[Callable[..., Any]], progress: Callable[[dict], None] = lambda line: None) -> list[Any]:
    """Train several models -> what each call returns. On a CPU as many at once as there are cores, each with its share.

        train.side_by_side([partial(train.finetune_captioner, config, run, name, seed) for name, seed in seeds], live)

    The steps of a small model are too small to be divided: two models on a core each are done before one after the other on
    two. On GPUs, or where PyTorch is given one thread (OMP_NUM_THREADS=1), they are trained here, one after the other.
    Each call takes `progress`, and `begin`: with begin=False it returns None instead of training what is not done.
    Raises InputError as the call that raised it, and ends the others; they go on when called again.
    """
    at_once = min(torch.get_num_threads(), len(calls))
    if at_once < 2 or torch.cuda.is_available() or "LOCAL_RANK" in os.environ:
        return [call(progress=progress) for call in calls]
    found = [call(progress=progress, begin=False) for call in calls]  # what is done needs no process
    left = [number for number, result in enumerate(found) if result is None]
    if left:
        context = torch.multiprocessing.get_context(START)
        said, todo = context.Queue(), context.SimpleQueue()
        for number in [*left, *[None] * at_once]:
            todo.put(number)
        # threads: a share of all calls, not of those left, so that a run that is cut off goes on with the same bits
        results = _listen(_worker, (torch.get_num_threads() // at_once, todo, said, calls), min(at_once, len(left)), said,
                          progress)
        found = [results.get(number, result) for number, result in enumerate(found)]
    return found


def _listen(target: Callable[..., None], arguments: tuple, processes: int, said: Any,
            progress: Callable[[dict], None]) -> dict[Any, Any]:
    """Start processes and pass on their progress until they end -> what else they said, by its name."""
    started = torch.multiprocessing.start_processes(target, arguments, nprocs=processes, join=False, start_method=START)
    found: dict[Any, Any] = {}

    def hear() -> None:
        while not said.empty():
            kind, content = said.get()
            progress(content) if kind == "progress" else found.update({kind: content})

    try:
        while not started.join(timeout=0.2):
            hear()
        hear()
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
        hear()
        raise InputError(found["error"]) if "error" in found else error from error
    finally:
        for process in started.processes:  # an interrupted cell leaves none behind
            process.terminate()
    return found


@contextmanager
def _speaking(said: Any) -> Iterator[Callable[[dict], None]]:
    """Within a started process: its `progress`. Its last words are sent before it ends."""
    try:
        yield lambda line: said.put(("progress", line))
    except InputError as error:
        said.put(("error", str(error)))
        raise
    finally:
        said.close()
        said.join_thread()


def _worker(_: int, threads: int, todo: Any, said: Any, calls: Sequence[Callable[..., Any]]) -> None:
    """One of the processes that `side_by_side` started: a call after another."""
    torch.set_num_threads(threads)
    with _speaking(said) as progress:
        while (number := todo.get()) is not None:
            said.put((number, calls[number](progress=progress)))


def _process(index: int, processes: int, port: int, said: Any, function: Callable[..., Any], arguments: tuple,
             named: dict[str, Any]) -> None:
    """One of the processes that `launch` started: what torchrun would have set, then the function."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS=str(threads))
    torch.set_num_threads(threads)
    try:
        with _speaking(said) as progress:
            result = function(*arguments, **named, progress=progress)
            if index == 0:
                said.put(("result", result))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
