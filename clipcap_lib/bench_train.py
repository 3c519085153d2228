"""A CLIP step as `train` takes it, beside a plain one of the original's shape and beside the image encoder alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from clipcap_lib import optimisation, processes
from clipcap_lib.config import Config
from clipcap_lib.data import Batch, TrainingData, pad
from clipcap_lib.graphs import Graph
from clipcap_lib.images import jpeg
from clipcap_lib.model import ClipCap, ImageEncoder
from clipcap_lib.optimisation import TrainingStep
from clipcap_lib.stages import ClipStage
from clipcap_lib.timing import Report, Rows, Variant, measure, seconds_a_call
from clipcap_lib.tokenizer import SPECIAL_TOKENS, build_tokenizer

PLAIN_TOKENS = 100  # the original pads every caption to this
VOCABULARY = 5000  # characters, about those of all corpora together
CHARACTERS = 14  # of a caption in `train`: about the mean of real ones; with [CLS] and [SEP] a multiple of 8


def measure_train(config: Config, tiny: bool, report: Report) -> Rows:
    """One CLIP step on batches that lie on the device, the same fed by `TrainingData`, and the image encoder alone."""
    model, pixels = random_model(config)
    on_gpu = torch.cuda.is_available()
    size = 4 if tiny else config.clip.batch_size if on_gpu else min(16, config.clip.batch_size)
    images, draw = pixels(size), random.Random(0)
    captions = [[model.start_id, *draw.choices(range(4, VOCABULARY), k=CHARACTERS), model.end_id] for _ in range(size)]
    padded = pad(captions, model.pad_id).to(images.device)
    padded_to_100 = F.pad(padded, (0, PLAIN_TOKENS - padded.shape[1]), value=model.pad_id)
    stage, batch = ClipStage(config, None), Batch(images, padded, torch.arange(size), torch.arange(size)).to(images.device)
    accelerator = optimisation.accelerator(config.precision)
    optimizer = accelerator.prepare_optimizer(optimisation.optimizer(model, config.clip))
    ours = TrainingStep(stage, model, optimizer, accelerator)
    plain_optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    encoder, compiled = model.image_encoder, config.compile and on_gpu
    if compiled:
        encoder.compile_for(size)
    pool = torch.cuda.graph_pool_handle() if on_gpu else None

    def plain() -> None:
        _plain_clip_loss(model, images, padded_to_100).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    def alone(encoder: ImageEncoder) -> Callable[[], object]:
        def step(images: Tensor) -> None:
            with accelerator.autocast():
                pooled = encoder(images)[0]
            pooled.float().sum().backward()
            model.zero_grad()

        return partial(Graph(step, images, pool=pool) if on_gpu else step, images)

    variants = {"plain": Variant(plain, size), "ours": Variant(partial(ours, batch), size),
                "encoder_only": Variant(alone(encoder), size)}
    for name, form in (("channels first", torch.contiguous_format), ("channels last", torch.channels_last)):
        for compile in (False, True) if compiled and form is encoder.memory_format else (False,):
            other = copy.copy(encoder)  # the same layers, set otherwise
            other.memory_format, other.compiled = form, None
            if compile:
                other.compile_for(size)
            variants[f"encoder, {name}{', compiled' * compile}"] = Variant(alone(other), size)
    data = made_up_data(config, size, 2 * size if tiny else 20 * size)
    seconds = measure(variants, tiny, report)
    rows: Rows = {name: (1 / value, "pairs/s") for name, value in seconds.items()}

    def anew() -> TrainingStep:
        """A step that has not captured its graph yet, as at the start of a training."""
        return TrainingStep(stage, model, optimizer, accelerator)

    fed, unfed = _with_data(anew(), batch, data, 1 if tiny else 3)
    rows |= {"with_data": (size / fed, "pairs/s"), "without_data": (size / unfed, "pairs/s")}
    for name, step in (("plain", plain), ("ours", partial(anew(), batch))) if on_gpu else ():
        before = torch.cuda.memory_allocated()  # weights, and the moments of both optimisers
        torch.cuda.reset_peak_memory_stats()
        for _ in range(TrainingStep.WARM + 1):
            step()
        own = 3 * sum(p.nbytes for p in model.parameters())  # weights and the moments of one
        rows[f"{name} peak memory"] = (torch.cuda.max_memory_allocated() - before + own) / 2**30, "GiB"
    return rows


def _with_data(step: Callable[[Batch], object], batch: Batch, data: TrainingData, rounds: int) -> tuple[float, float]:
    """Seconds a step that takes its batches from `data`, over several times as many as its workers hold ready, and seconds a
    step on `batch`, half of them timed before those and half behind.

    Apart from the other variants: workers that read ahead would slow those down, and the batches that they had made
    meanwhile would last for all the steps of a turn.
    """
    ahead = max(2, 2 * data.workers)  # a DataLoader's workers hold two batches each
    given = Variant(lambda: step(batch))
    seconds_a_call(given, 4)  # a GPU captures its graph

    def fed() -> float:
        batches = data.batches()  # its workers end with it
        one = Variant(lambda: step(next(batches).to(batch.images.device)))
        seconds_a_call(one, ahead)
        return seconds_a_call(one, rounds * ahead)

    before, found, behind = seconds_a_call(given, rounds * ahead // 2), fed(), seconds_a_call(given, rounds * ahead // 2)
    return found, (before + behind) / 2


def made_up_data(config: Config, batch_size: int, images: int) -> TrainingData:
    """Training data of noise that takes as long to decode as photos, none of it kept decoded: as of a corpus of any size."""
    from datasets import Dataset, Image

    draw = np.random.default_rng(0)
    words = [chr(0x4E00 + number) for number in range(VOCABULARY - len(SPECIAL_TOKENS))]
    rows = {"image": [], "captions": []}
    for _ in range(images):
        rough = PIL.Image.fromarray(draw.integers(256, size=(24, 24, 3), dtype=np.uint8))
        rows["image"].append({"bytes": jpeg(rough.resize((config.stored_size,) * 2, PIL.Image.Resampling.BICUBIC))})
        rows["captions"].append(["".join(words[i] for i in draw.integers(len(words), size=CHARACTERS)) for _ in range(5)])
    return TrainingData(Dataset.from_dict(rows).cast_column("image", Image()), build_tokenizer([*SPECIAL_TOKENS, *words]),
                        config, replace(config.clip, batch_size=batch_size), seed=1)


def random_model(config: Config) -> tuple[ClipCap, Callable[[int], Tensor]]:
    """A model with random weights, they take as long as trained ones, and a function that makes so many images for it."""
    processes.keep_freed_memory()  # as every process with a model does
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = max(config.model.context, PLAIN_TOKENS)  # room for the original's shape in every preset
    model = ClipCap(replace(config.model, vocab_size=VOCABULARY, context=context)).to(device)
    size = config.model.image_size
    return model, lambda count: torch.randint(256, (count, 3, size, size), dtype=torch.uint8, device=device)


def _plain_clip_loss(model: ClipCap, images: Tensor, ids: Tensor) -> Tensor:
    """The original's step written down plainly: channels first, and a GPT that reads every pad. See `ClipStage.loss`."""
    encoder, rows = model.image_encoder, torch.arange(len(ids), device=ids.device)
    image = model.image_head(encoder.backbone((images.float() - encoder.mean) / encoder.deviation))
    hidden = model.gpt.transformer(input_ids=ids, use_cache=False)[0]
    text = model.text_head(hidden[rows, (ids == model.end_id).int().argmax(dim=1)])
    logits = model.logit_scale.exp() * F.normalize(image) @ F.normalize(text).mT
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.mT, rows)) / 2
