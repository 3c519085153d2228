"""Prepared Parquet -> batches. Everything random derives from (seed, epoch, visit, image): workers change no bits."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from clipcap_lib.config import Config, InputError, StageConfig, fingerprint, on_one_line
from clipcap_lib.files import exclusive, read_json, write_atomically
from clipcap_lib.images import as_seen
from clipcap_lib.tokenizer import encode

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Sample = tuple[int, int, int]  # epoch, visit, image
_LEFT_RIGHT = ("左", "右")
MOST_KEPT = 2**32  # bytes of decoded training images that are kept; of a set that takes more, none are


def _shards(data: Path, split: str, without: Iterable[str] = ()) -> list[Path]:
    return sorted(path for path in Path(data).glob(f"*-{glob.escape(split)}-[0-9]*.parquet")
                  if path.name.rsplit(f"-{split}-", 1)[0] not in set(without))


def is_prepared(data: Path, split: str) -> bool:
    """Whether there are prepared images of a split, such as "labelled", which only drawn corpora have."""
    return bool(_shards(data, split))


def data_fingerprint(data: Path) -> str:
    """Changes with what `prepare` wrote there. Raises InputError if nothing was."""
    return read_json(Path(data) / "manifest.json")["fingerprint"]


def check_without(data: Path, without: Sequence[str]) -> None:
    """Raise InputError for a corpus that is to be left out and is not there (it would be left out by name only), or where
    none is left.
    """
    if not without:
        return
    prepared = read_json(Path(data) / "manifest.json")["images"]
    there = list(dict.fromkeys(key.split("/")[0] for key in prepared))
    if unknown := [corpus for corpus in without if corpus not in there]:
        raise InputError(f"--without {unknown[0]}: no such corpus was prepared; there are {', '.join(there)}")
    if {corpus for corpus in there if f"{corpus}/train" in prepared} <= set(without):
        raise InputError(f"--without leaves no corpus to train on; there are {', '.join(there)}")


def load_prepared(data: Path, split: str, without: Iterable[str] = ()) -> Dataset:
    """The prepared rows of a split, memory-mapped, but those of the corpora `without`, in a fixed order.

    Raises InputError if the split was not prepared.
    """
    import datasets

    data, shards = Path(data), _shards(data, split, without)
    if not (data / "manifest.json").is_file():
        raise InputError(f"{data}: nothing prepared here; run `python -m clipcap_lib prepare` first")
    if not shards:
        prepared = dict.fromkeys(key.split("/")[1] for key in read_json(data / "manifest.json").get("images", ()))
        raise InputError(f"{data}: no prepared images for '{split}'; the corpora given to prepare have "
                         f"{', '.join(prepared) or 'no images'}")
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset("parquet", data_files=[glob.escape(str(s)) for s in shards], split="train",
                                     cache_dir=str(data / "cache"))
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:  # ValueError: of damaged Parquet
        said = on_one_line(error.__cause__ or error)
        raise InputError(f"{data}: the prepared images cannot be read, or not be unpacked into {data / 'cache'} ({said}); "
                         "make room, or run `python -m clipcap_lib prepare` again") from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """A PIL image of any size and mode -> pixels (3, size, size) uint8: as `images.as_seen`, squashed, not normalised."""
    image = as_seen(image).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def augment(pixels: Tensor, config: Config, random: np.random.Generator, mirror: bool) -> Tensor:
    """Crop at random, mirror half of the time if `mirror`, change the light: (3, R, R) -> (3, S, S), both uint8.

    Crops are of image_size S; with `smallest_crop` below 1 their share of the area is drawn from there up to 1, their shape
    from 3:4 to 4:3, as for ImageNet (Szegedy et al. 2015, arXiv 1409.4842); sides longer than the image are cut to it, and
    the crop is resized to S. `colour_jitter` j multiplies brightness, contrast and saturation by factors of [1 - j, 1 + j].
    """
    whole, size = config.train_resize, config.model.image_size
    if config.smallest_crop < 1:
        area, shape = random.uniform(config.smallest_crop, 1), math.exp(random.uniform(-1, 1) * math.log(4 / 3))
        height, width = (min(whole, round(whole * math.sqrt(area * s))) for s in (shape, 1 / shape))
    else:
        height = width = size
    top, left = (int(random.integers(0, whole - length + 1)) for length in (height, width))
    pixels = pixels[:, top:top + height, left:left + width]
    if (height, width) != (size, size):
        pixels = F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]
    if mirror and random.random() < 0.5:
        pixels = pixels.flip(-1)
    if config.colour_jitter:
        from torchvision.transforms.v2 import functional as colours

        factors = random.uniform(1 - config.colour_jitter, 1 + config.colour_jitter, size=3).tolist()
        for adjust, factor in zip((colours.adjust_brightness, colours.adjust_contrast, colours.adjust_saturation), factors,
                                  strict=True):
            pixels = adjust(pixels, factor)
    return pixels


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
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self.tensors()))

    def parts(self, count: int) -> Iterator[Batch]:
        """The batch in at most `count` parts of consecutive images, each with their captions."""
        each = len(self.ids) // len(self.images)  # C
        size = -(-len(self.images) // count)
        for start in range(0, len(self.images), size):
            rows = slice(start * each, (start + size) * each)
            yield Batch(self.images[start:start + size], self.ids[rows], self.image_of[rows], self.text_of[rows])

    def pin_memory(self) -> Batch:
        """In memory that a GPU copies from while it computes: the DataLoader calls it."""
        return Batch(*(tensor.pin_memory() for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, in the order of the fields."""
        return self.images, self.ids, self.image_of, self.text_of


def pad(rows: Sequence[Sequence[int]], pad_id: int, length: int = 0) -> Tensor:
    """Token ids of different lengths -> (N, T), padded on the right to the longest, and to at least `length`."""
    length = max(length, *(len(row) for row in rows))
    return torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows])


class Pixels:
    """Images of rows as pixels (3, R, R) uint8 by number, each resized to R.

    If all fit in MOST_KEPT they are decoded once, into a file in the data's cache that later stages and other processes map
    into memory; else, or if the disk is full, again and again.
    """

    def __init__(self, rows: Dataset, size: int, data: Path | None = None, workers: int = 0):
        self.rows, self.size, self.file = rows, size, None
        if data is None or len(rows) * 3 * size**2 > MOST_KEPT:
            return
        mark = fingerprint(data_fingerprint(data), rows["file_name"][:], size)
        file = data / "cache" / f"pixels-{mark}.bin"
        with suppress(OSError, InputError), exclusive(file.parent, f"{file.name}.lock"):
            if not file.is_file():
                for left in file.parent.glob(f".{file.name}.*.partial"):  # by a run that was killed
                    left.unlink()
                write_atomically(file, lambda path: self._decode(path, workers))
            self.file = file

    def _decode(self, path: Path, workers: int) -> None:
        with path.open("wb") as file:
            for part in DataLoader(self, batch_size=256, num_workers=workers, collate_fn=torch.stack):
                file.write(part.numpy().data)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        """The images of these numbers."""
        if self.file is None:  # read together: a row by itself costs half as much again
            return [to_pixels(image, self.size) for image in self.rows[numbers]["image"]]
        kept = np.memmap(self.file, np.uint8, "r", shape=(len(self.rows), 3, self.size, self.size))
        return [torch.from_numpy(np.array(kept[number])) for number in numbers]

    __getitems__ = read  # as a DataLoader asks for them


class TrainingData:
    """The training rows of one stage: `batches(step)` yields Batch after Batch from any step on, the same every time.

    An epoch shows every image `visits` times, each time with `captions_per_visit` of its captions, drawn without
    repetition until all were seen; `by_length`: batches hold captions of similar length. Of several processes, each gets its
    share of every batch, equally many: where they do not divide it, its first images are in it twice. Without `images`, for
    a stage that does not look at them, their pixels are of size 0. data: the folder that the rows come from, whose cache may
    keep decoded images.
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerFast, config: Config, stage: StageConfig, seed: int,
                 workers: int | None = None, process: int = 0, processes: int = 1, images: bool = True,
                 by_length: bool = True, data: Path | None = None):
        self.rows, self.config, self.stage, self.seed = rows, config, stage, seed
        self.process, self.processes, self.by_length = process, processes, by_length
        self.pad_id = tokenizer.pad_token_id
        self.round_to = 8 if torch.cuda.is_available() else 1  # matrix units and compiled code like few, round lengths
        self.workers = _workers() if workers is None else workers
        self.pixels = Pixels(rows, config.train_resize, data, self.workers) if images else None
        captions = rows["captions"][:]
        flat = [caption for row in captions for caption in row]
        ids = encode(tokenizer, flat, config.model.context)
        ids = [np.asarray(row, dtype=np.int32) for row in ids]
        self.tokens = np.concatenate(ids)
        self.token_starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
        numbers: dict[bytes, int] = {}
        self.text_of = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in ids])
        self.caption_counts = np.array([len(row) for row in captions])
        self.caption_starts = np.concatenate([[0], np.cumsum(self.caption_counts)[:-1]])
        # the order in which an image's captions are shown, and the cycle that it is of
        self.orders = np.zeros((len(captions), self.caption_counts.max()), np.int16)
        self.cycles = np.full(len(captions), -1)
        self.may_mirror = np.array([not any(c in caption for caption in row for c in _LEFT_RIGHT) for row in captions])
        self.steps_per_epoch = -(-len(rows) // stage.batch_size) * stage.visits

    def captions(self, sample: Sample) -> list[int]:
        """Which captions (numbers over all rows) the sample shows."""
        epoch, visit, image = sample
        return self._shown(epoch, visit, np.array([image]))[0].tolist()

    def _shown(self, epoch: int, visit: int, images: np.ndarray) -> np.ndarray:
        """The captions that images (n,) show at a visit: (n, C). Their orders are drawn anew when all were seen."""
        first, count, each = self.caption_starts[images], self.caption_counts[images], self.stage.captions_per_visit
        shown = first[:, None] + np.arange(each)
        some = np.flatnonzero(count != each)  # of the others all captions every time: nothing to draw
        for turn in range(each) if len(some) else ():
            cycle, place = np.divmod((epoch * self.stage.visits + visit) * each + turn, count[some])
            for i in np.flatnonzero(self.cycles[images[some]] != cycle):  # each drawing takes as long as all the rest
                image = images[some[i]]
                random = np.random.default_rng((self.seed, 1, int(image), int(cycle[i])))
                self.orders[image, :count[some[i]]], self.cycles[image] = random.permutation(count[some[i]]), cycle[i]
            shown[some, turn] = first[some] + self.orders[images[some], place]
        return shown

    def ids(self, caption: int) -> np.ndarray:
        return self.tokens[self.token_starts[caption]:self.token_starts[caption + 1]]

    def epoch_batches(self, epoch: int) -> list[list[Sample]]:
        """The samples of every step of an epoch: shuffled, grouped by caption length if asked for, and shuffled again."""
        batches = []
        for visit in range(self.stage.visits):
            random = np.random.default_rng((self.seed, 2, epoch, visit))
            images, size = random.permutation(len(self.rows)), self.stage.batch_size
            longest = (np.diff(self.token_starts)[self._shown(epoch, visit, images)].max(axis=1) if self.by_length
                       else np.zeros(len(images)))
            for start in range(0, len(images), 20 * size):  # lengths are sorted within 20 batches only
                part = slice(start, start + 20 * size)
                bucket = [(epoch, visit, i) for i in images[part][np.argsort(longest[part], kind="stable")].tolist()]
                batches += [bucket[i:i + size] for i in range(0, len(bucket), size)]
        return [batches[i] for i in np.random.default_rng((self.seed, 3, epoch)).permutation(len(batches))]

    def share(self, samples: list[Sample]) -> list[Sample]:
        """This process's part of a batch."""
        even = -(-len(samples) // self.processes) * self.processes
        return list(islice(cycle(samples), self.process, even, self.processes))

    def __getitems__(self, samples: list[Sample]) -> list[tuple[Tensor, Sample]]:
        """Pixels (3, S, S) of each sample, and the sample."""
        if self.pixels is None:
            return [(torch.empty(3, 0, 0, dtype=torch.uint8), sample) for sample in samples]
        found = self.pixels.read([image for _, _, image in samples])
        return [(self._augmented(sample, pixels), sample) for sample, pixels in zip(samples, found, strict=True)]

    def _augmented(self, sample: Sample, pixels: Tensor) -> Tensor:
        """Augmentation depends on (seed, epoch, visit, image) alone, so that workers do not change it."""
        epoch, visit, number = sample
        random = np.random.default_rng((self.seed, 4, epoch, visit, number))
        return augment(pixels, self.config, random, self.config.horizontal_flip and bool(self.may_mirror[number]))

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


def _workers() -> int:
    """Processes that read images: none on a CPU, whose cores compute; on a GPU this training process's share of up to 16."""
    if not torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def spread(rows: Dataset, count: int) -> Dataset:
    """So many rows at most, evenly from first to last: rows lie corpus by corpus, and the first would be of one only."""
    total = len(rows)
    return rows if total <= count else rows.select([place * total // count for place in range(count)])


def drawn(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """So many rows at most (None: all), drawn for the seed, in their order. The fewer are among the more."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng((seed, 5)).permutation(len(rows))[:count]))


def image_batches(rows: Dataset, size: int = 64) -> Iterator[tuple[list[str], list[Any]]]:
    """(file names, PIL images) of a split, in order, for evaluation."""
    for start in range(0, len(rows), size):
        part = rows[start:start + size]
        yield part["file_name"], part["image"]
