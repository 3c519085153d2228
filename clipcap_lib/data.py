"""Prepared Parquet -> batches. Everything random derives from (seed, epoch, visit, image): workers change no bits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from clipcap_lib.config import Config, InputError, StageConfig
from clipcap_lib.tokenizer import encode

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Sample = tuple[int, int, int]  # epoch, visit, image
_LEFT_RIGHT = ("左", "右")


def _shards(data: Path, split: str, without: Iterable[str] = ()) -> list[Path]:
    return sorted(path for path in Path(data).glob(f"*-{split}-[0-9]*.parquet")
                  if path.name.rsplit(f"-{split}-", 1)[0] not in set(without))


def is_prepared(data: Path, split: str) -> bool:
    """Whether there are prepared images of a split, such as "labelled", which only drawn corpora have."""
    return bool(_shards(data, split))


def load_prepared(data: Path, split: str, without: Iterable[str] = ()) -> Dataset:
    """The prepared rows of a split, memory-mapped, but those of the corpora `without`, in a fixed order.

    Raises InputError if the split was not prepared.
    """
    import datasets

    data, shards = Path(data), _shards(data, split, without)
    if not (data / "manifest.json").is_file():
        raise InputError(f"{data}: nothing prepared here; run `python -m clipcap_lib prepare` first")
    if not shards:
        raise InputError(f"{data}: no prepared images for '{split}'; the corpora given to prepare have no such split")
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset("parquet", data_files=[str(s) for s in shards], split="train",
                                     cache_dir=str(data / "cache"))
    finally:
        if bars:
            datasets.enable_progress_bars()


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """A PIL image of any size and mode -> pixels (3, size, size) uint8: upright, RGB, squashed, not normalised."""
    image = ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def training_pixels(image: Image.Image, config: Config, random: np.random.Generator, mirror: bool) -> Tensor:
    """Resize to train_resize, crop image_size at random, mirror half of the time if allowed -> (3, S, S) uint8."""
    pixels = to_pixels(image, config.train_resize)
    top, left = random.integers(0, config.train_resize - config.model.image_size + 1, size=2)
    pixels = pixels[:, top:top + config.model.image_size, left:left + config.model.image_size]
    return pixels.flip(-1) if mirror and random.random() < 0.5 else pixels


@dataclass(frozen=True)
class Batch:
    """N images with C captions each: images (N, 3, S, S) uint8, ids (N * C, T), image n's captions being rows n*C ..

    image_of (N * C,) says by number whose caption a row is, and text_of (N * C,) which caption, equal for equal words.
    """

    images: Tensor
    ids: Tensor
    image_of: Tensor
    text_of: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def parts(self, count: int) -> Iterator[Batch]:
        """The batch in at most `count` parts of consecutive images, each with their captions."""
        each = len(self.ids) // len(self.images)  # C
        size = -(-len(self.images) // count)
        for start in range(0, len(self.images), size):
            rows = slice(start * each, (start + size) * each)
            yield Batch(self.images[start:start + size], self.ids[rows], self.image_of[rows], self.text_of[rows])

    def pin_memory(self) -> Batch:
        """In memory that a GPU copies from while it computes: the DataLoader calls it."""
        return Batch(*(tensor.pin_memory() for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.images, self.ids, self.image_of, self.text_of


def pad(rows: Sequence[Sequence[int]], pad_id: int, length: int = 0) -> Tensor:
    """Token ids of different lengths -> (N, T), padded on the right to the longest, and to at least `length`."""
    length = max(length, *(len(row) for row in rows))
    return torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows])


class TrainingData:
    """The training rows of one stage: `batches(step)` yields Batch after Batch from any step on, the same every time.

    An epoch shows every image `visits` times, each time with `captions_per_visit` of its captions, drawn without
    repetition until all were seen; batches hold captions of similar length. Of several processes, each gets its share of
    every batch, equally many: where they do not divide it, its first images are in it twice.
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerFast, config: Config, stage: StageConfig, seed: int,
                 workers: int | None = None, process: int = 0, processes: int = 1):
        self.rows, self.config, self.stage, self.seed = rows, config, stage, seed
        self.process, self.processes = process, processes
        self._drawn: dict[Sample, list[int]] = {}
        self.pad_id = tokenizer.pad_token_id
        self.round_to = 8 if torch.cuda.is_available() else 1  # matrix units and compiled code like few, round lengths
        # on a CPU the cores compute; on a GPU they decode
        self.workers = min(8, os.cpu_count() or 1) if workers is None and torch.cuda.is_available() else workers or 0
        captions = rows["captions"][:]
        flat = [caption for row in captions for caption in row]
        ids = encode(tokenizer, flat, config.model.context)
        ids = [np.asarray(row, dtype=np.int32) for row in ids]
        self.tokens = np.concatenate(ids)
        self.token_starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
        numbers: dict[bytes, int] = {}
        self.text_of = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in ids])
        self.caption_starts = np.concatenate([[0], np.cumsum([len(row) for row in captions])])
        self.may_mirror = np.array([not any(c in caption for caption in row for c in _LEFT_RIGHT) for row in captions])
        self.steps_per_epoch = -(-len(rows) // stage.batch_size) * stage.visits

    def captions(self, sample: Sample) -> list[int]:
        """Which captions (numbers over all rows) the sample shows."""
        if sample in self._drawn:  # asked for when lengths are sorted, and again when the batch is put together
            return self._drawn[sample]
        epoch, visit, image = sample
        first, count = self.caption_starts[image], self.caption_starts[image + 1] - self.caption_starts[image]
        drawn = []
        for turn in range(self.stage.captions_per_visit):
            cycle, place = divmod((epoch * self.stage.visits + visit) * self.stage.captions_per_visit + turn, int(count))
            order = np.random.default_rng((self.seed, 1, image, cycle)).permutation(count)
            drawn.append(int(first + order[place]))
        if len(self._drawn) > 2**16:
            self._drawn.clear()
        self._drawn[sample] = drawn
        return drawn

    def ids(self, caption: int) -> np.ndarray:
        return self.tokens[self.token_starts[caption]:self.token_starts[caption + 1]]

    def epoch_batches(self, epoch: int) -> list[list[Sample]]:
        """The samples of every step of an epoch: shuffled, grouped by caption length, and shuffled again."""
        batches = []
        for visit in range(self.stage.visits):
            random = np.random.default_rng((self.seed, 2, epoch, visit))
            samples = [(epoch, visit, int(image)) for image in random.permutation(len(self.rows))]
            longest = {s: max(len(self.ids(c)) for c in self.captions(s)) for s in samples}
            size = self.stage.batch_size
            for start in range(0, len(samples), 20 * size):  # lengths are sorted within 20 batches only
                bucket = sorted(samples[start:start + 20 * size], key=longest.__getitem__)
                batches += [bucket[i:i + size] for i in range(0, len(bucket), size)]
        return [batches[i] for i in np.random.default_rng((self.seed, 3, epoch)).permutation(len(batches))]

    def share(self, samples: list[Sample]) -> list[Sample]:
        """This process's part of a batch."""
        even = -(-len(samples) // self.processes) * self.processes
        return list(islice(cycle(samples), self.process, even, self.processes))

    def __getitems__(self, samples: list[Sample]) -> list[tuple[Tensor, Sample]]:
        """Pixels (3, S, S) of each sample, and the sample: read together, for a row by itself costs half as much again."""
        images = self.rows[[image for _, _, image in samples]]["image"]
        return [(self._augmented(sample, image), sample) for sample, image in zip(samples, images, strict=True)]

    def _augmented(self, sample: Sample, image: Image.Image) -> Tensor:
        """Augmentation depends on (seed, epoch, visit, image) alone, so that workers do not change it."""
        epoch, visit, number = sample
        random = np.random.default_rng((self.seed, 4, epoch, visit, number))
        return training_pixels(image, self.config, random, self.config.horizontal_flip and bool(self.may_mirror[number]))

    def _collate(self, items: list[tuple[Tensor, Sample]]) -> Batch:
        shown = [(sample[2], caption) for _, sample in items for caption in self.captions(sample)]
        ids = [self.ids(caption).tolist() for _, caption in shown]
        length = -(-max(map(len, ids)) // self.round_to) * self.round_to
        return Batch(torch.stack([pixels for pixels, _ in items]),
                     pad(ids, self.pad_id, min(length, self.config.model.context)),
                     torch.tensor([image for image, _ in shown]), torch.from_numpy(self.text_of[[c for _, c in shown]]))

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """Batches from `step` on, epoch after epoch, without end."""
        def steps() -> Iterator[list[Sample]]:
            epoch, skip = divmod(step, self.steps_per_epoch)
            while True:
                yield from map(self.share, self.epoch_batches(epoch)[skip:])
                epoch, skip = epoch + 1, 0

        return iter(DataLoader(self, batch_sampler=steps(), collate_fn=self._collate, num_workers=self.workers,
                               pin_memory=torch.cuda.is_available(), persistent_workers=self.workers > 0))


def image_batches(rows: Dataset, size: int = 64) -> Iterator[tuple[list[str], list[Any]]]:
    """(file names, PIL images) of a split, in order, for evaluation."""
    for start in range(0, len(rows), size):
        part = rows[start:start + size]
        yield part["file_name"], part["image"]
