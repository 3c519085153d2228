"""A training step, and what it steps with: devices and precision, learning rates, the optimiser, averaged weights."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from clipcap_lib import processes
from clipcap_lib.config import InputError, StageConfig
from clipcap_lib.data import Batch
from clipcap_lib.graphs import Graph
from clipcap_lib.model import MOST_LOGIT_SCALE, ClipCap


def pick_precision(name: str) -> str:
    """"auto" -> bf16 on a GPU or CPU that computes in it, else fp16 on a GPU, fp32 on a CPU."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def accelerator(precision: str) -> Accelerator:
    """accelerate's hold on devices, precision (`Config.precision`) and processes. What had one before must be done.

    accelerate keeps a process to the precision that it was first given, and knows no public way out of it.
    """
    picked = pick_precision(precision).replace("fp32", "no")
    if picked == "fp16" and not torch.cuda.is_available():  # accelerate would train in fp32 without a word
        raise InputError("precision fp16 needs a GPU; on a CPU choose bf16, fp32 or auto")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != picked:
        AcceleratorState._reset_state()
    torch.backends.cudnn.benchmark = True  # batches of one size: a GPU tries its convolutions once and keeps the fastest
    return Accelerator(cpu=processes.on_cpu(), mixed_precision=picked)


def freeze(model: ClipCap, names: Sequence[str]) -> None:
    """Take modules of the image encoder's backbone out of training; their BatchNorm statistics still follow the data.

    Raises InputError for a name that the backbone does not have.
    """
    backbone = model.image_encoder.backbone
    if unknown := sorted(set(names) - {name for name, _ in backbone.named_modules()}):
        raise InputError(f"freeze: the encoder {model.config.encoder} has no {', '.join(unknown)}; its modules are "
                         + ", ".join(name for name, _ in backbone.named_children()))
    if names:  # timm takes an empty list for everything
        timm.utils.freeze(backbone, list(names), include_bn_running_stats=False)


def learning_rate(stage: StageConfig, step: int, steps: int) -> float:
    """The rate at `step` of `steps`: linear warm-up, then what the schedule says (see `StageConfig.schedule`)."""
    warmup = int(stage.warmup * steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))  # 1 -> 0
    if stage.schedule == "halving":
        return stage.learning_rate * 0.5 ** ((step >= 0.7 * steps) + (step >= 0.9 * steps))
    if stage.schedule == "cosine":
        return stage.learning_rate * (0.1 + 0.9 * falling)
    if stage.schedule == "one-cycle":
        return stage.learning_rate * falling
    return stage.learning_rate


def parameter_groups(model: ClipCap, stage: StageConfig) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay; biases, norms and CLIP's temperature do not. The image encoder has its own rate."""
    of_image = {id(p) for p in model.image_encoder.parameters()}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault((parameter.ndim >= 2, id(parameter) in of_image), []).append(parameter)
    return [{"params": parameters, "weight_decay": stage.weight_decay if decays else 0.0,
             "factor": stage.image_rate if image else 1.0} for (decays, image), parameters in groups.items()]


def optimizer(model: ClipCap, stage: StageConfig) -> torch.optim.AdamW:
    """Fused AdamW. On a GPU its learning rates are tensors there, which a captured step reads; see `set_learning_rate`."""
    on_gpu = next(model.parameters()).is_cuda
    made = torch.optim.AdamW(parameter_groups(model, stage), lr=stage.learning_rate, fused=True, capturable=on_gpu)
    for group in made.param_groups if on_gpu else ():
        group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    return made


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let every group learn at `rate` times its own factor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate * group["factor"])
        else:
            group["lr"] = rate * group["factor"]


class TrainingStep:
    """`step(batch)` -> the loss and the norm of the gradient before it was clipped, scalars on the device; weights move on.

    On a single GPU the step is captured as a graph when a batch of the same shape comes for the third time: it has about
    2,500 kernels at `hualu` size, and launching them one by one takes the host longer than they take. Graphs keep their
    memory, so that a training takes up to twice as much; where there is not enough, steps are taken one kernel at a time.
    Not captured are fp16 with its scaler, accumulation, gradient caching, and stages that say so.
    """

    WARM = 2  # steps of a shape before it is captured

    def __init__(self, stage: Any, model: ClipCap, optimizer: Any, accelerator: Accelerator):
        self.stage, self.model, self.optimizer, self.accelerator = stage, model, optimizer, accelerator
        settings: StageConfig = stage.stage
        self.captures = (accelerator.device.type == "cuda" and accelerator.num_processes == 1 and accelerator.scaler is None
                         and settings.accumulation == 1 and not settings.chunk_size and stage.capturable)
        self.seen: Counter[tuple[torch.Size, ...]] = Counter()
        self.graphs: dict[tuple[torch.Size, ...], Graph] = {}

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.captures:
            try:
                return self._replay(*batch.tensors())
            except torch.cuda.OutOfMemoryError:
                self.captures = False
                self.graphs.clear()
                self.optimizer.zero_grad()
                torch.cuda.empty_cache()
        return self._take(*batch.tensors())

    def _replay(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        shapes = tuple(one.shape for one in tensors)
        self.seen[shapes] += 1
        if self.seen[shapes] <= self.WARM:
            return self._take(*tensors)
        if shapes not in self.graphs:
            pool = next(iter(self.graphs.values())).graph.pool() if self.graphs else None
            self.graphs[shapes] = Graph(self._take, *tensors, warm=0, pool=pool)
        loss, norm = self.graphs[shapes](*tensors)
        return loss.clone(), norm.clone()

    def _take(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        batch, settings, loss = Batch(*tensors), self.stage.stage, 0
        for part in batch.parts(settings.accumulation):
            with self.accelerator.autocast():
                share = self.stage.loss(self.model, part) * (len(part.images) / len(batch.images))
            self.accelerator.backward(share)
            loss += share.detach()
        processes.average_gradients(self.model.parameters())
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), settings.clip_gradient or math.inf)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MOST_LOGIT_SCALE)
        self.optimizer.zero_grad()
        return loss, norm


class Average:
    """An exponential moving average of a model: of its weights and of its buffers, BatchNorm's statistics among them.

    Early on it forgets faster, min(decay, (1 + step) / (10 + step)), or random weights would stay in it for long. Whole
    numbers are copied. timm's own averages tied weights twice a step, torch's has no such beginning.
    """

    def __init__(self, model: ClipCap, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: ClipCap, step: int) -> None:
        """Take in the weights after `step` steps."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        pairs = list(zip([*self.model.parameters(), *self.model.buffers()], [*model.parameters(), *model.buffers()],
                         strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([kept for kept, _ in floating], [new for _, new in floating], weight)
        for kept, new in pairs:
            if not kept.is_floating_point():
                kept.copy_(new)
