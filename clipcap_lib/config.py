"""Settings: frozen, documented, validated dataclasses and the four presets.

`preset("miniature")` gives a `Config`; `to_dict` / `from_dict` carry it through JSON, `fingerprint` names it by content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used. The message names the thing, the place and the way out; exit code 2."""


def on_one_line(error: BaseException) -> str:
    """What a library says of its failure, for a sentence of ours: 200 characters at most, its kind where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the joint model: a timm image encoder, a GPT-2, and the heads between them."""

    encoder: str = "res2next50"  # a timm model name
    encoder_options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model
    image_size: int = 224  # pixels a side, as the encoder sees it
    image_tokens: str = "pooled"  # "pooled": one prefix token (the original); "grid": the feature map's cells as well
    vocab_size: int = 0  # set from the tokenizer
    layers: int = 12  # GPT blocks
    width: int = 768  # GPT width, and the width of the joint space
    heads: int = 12  # attention heads a block
    context: int = 100  # most text tokens, [CLS] and [SEP] included
    dropout: float = 0.1  # in the GPT and in the heads
    initializer_range: float = 0.02  # deviation of the GPT's random weights
    pad_id: int = 0  # these three ids are the tokenizer's
    start_id: int = 2
    end_id: int = 3

    def __post_init__(self) -> None:
        _check(self.image_tokens in ("pooled", "grid"), f"image_tokens is 'pooled' or 'grid', not '{self.image_tokens}'")
        _check(self.width % self.heads == 0, f"width {self.width} is not divisible by {self.heads} heads")
        _check(min(self.layers, self.heads, self.image_size) > 0, "layers, heads and image_size must be positive")
        _check(self.context >= 3, "context must hold [CLS], a character and [SEP]")
        _check(0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1)")
        ids = (self.pad_id, self.start_id, self.end_id)
        _check(not self.vocab_size or all(0 <= one < self.vocab_size for one in ids),
               f"pad_id, start_id and end_id {ids} are not all tokens of a vocabulary of {self.vocab_size}")


@dataclass(frozen=True)
class StageConfig:
    """How one stage of training runs."""

    epochs: int  # passes over the training images; 0 skips a warm-up or scst
    batch_size: int = 160  # images a step
    learning_rate: float = 3e-4  # of AdamW, at its highest
    image_rate: float = 1.0  # the image encoder's learning rate, as a multiple of that
    freeze: tuple[str, ...] = ()  # modules of the image encoder's backbone that are not trained, such as "layer1"
    weight_decay: float = 0.01  # of matrices; biases, norms and CLIP's temperature have none
    schedule: str = "constant"  # "constant", "halving" (at 70 % and 90 %, the original's), "cosine" (to a tenth, as
    # nanoGPT's), "one-cycle" (to 0 by cosine); each after a linear warm-up
    warmup: float = 0.0  # share of the steps in which the rate rises from 0
    visits: int = 1  # times an epoch shows each image, each time with other captions of it
    captions_per_visit: int = 1  # captions trained on at each visit (scst: sampled; image: always all), sharing an encoding
    label_smoothing: float = 0.0  # of the caption loss
    mask_duplicates: bool = True  # captions that an image of the batch has itself, word for word, are no negatives of it
    clip_gradient: float = 1.0  # largest norm of the gradient; 0 leaves it as it is
    accumulation: int = 1  # parts that a batch is computed in for want of memory; a part's negatives are its own, and so are
    # the tokens that scst takes its mean over
    chunk_size: int = 0  # images encoded at a time by CLIP pretraining (gradient caching): all are negatives; 0: all at once
    contrastive: float = 0.0  # weight of a contrastive term beside the caption loss
    average: float = 0.0  # decay of a moving average of weights and buffers, which is then validated and kept; 0: none

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "visits", "captions_per_visit", "accumulation", "chunk_size")
        _check(all(isinstance(getattr(self, name), int) for name in counts), f"{', '.join(counts)} are whole numbers")
        _check(self.epochs >= 0 and self.batch_size > 0, "epochs must not be negative, batch_size must be positive")
        for name in ("learning_rate", "image_rate", "weight_decay", "clip_gradient"):
            _check(getattr(self, name) >= 0, f"{name} must not be negative, but is {getattr(self, name)}")
        _check(0 <= self.label_smoothing < 1, f"label_smoothing {self.label_smoothing} is not in [0, 1)")
        schedules = ("constant", "halving", "cosine", "one-cycle")
        _check(self.schedule in schedules, f"unknown schedule '{self.schedule}'; choose from {', '.join(schedules)}")
        _check(0 <= self.warmup < 1, f"warmup {self.warmup} is not in [0, 1)")
        whole = [self.freeze] if isinstance(self.freeze, str) else self.freeze
        object.__setattr__(self, "freeze", tuple(whole))  # JSON gives a list
        _check(self.visits > 0 and self.captions_per_visit > 0, "visits and captions_per_visit must be positive")
        _check(1 <= self.accumulation <= self.batch_size, f"accumulation {self.accumulation} is not in [1, batch_size]")
        _check(self.chunk_size >= 0 and self.contrastive >= 0, "chunk_size and contrastive must not be negative")
        _check(0 <= self.average < 1, f"average {self.average} is not in [0, 1)")


@dataclass(frozen=True)
class System:
    """One captioner of the boards' table."""

    name: str
    seed: int
    without: tuple[str, ...] = ()  # corpora it is not trained on


MODELS = (  # models 1 to 3 are seeds without COCO-CN, model4 is trained with it, as the original's
    System("model1", 1, ("coco-cn",)),
    System("model2", 2, ("coco-cn",)),
    System("model3", 3, ("coco-cn",)),
    System("model4", 4),
)
ENSEMBLES = {"1+2+3": ("model1", "model2", "model3"), "1+2+4": ("model1", "model2", "model4")}
ENSEMBLE_WEIGHTS = (0.5, 0.3, 0.2)  # the original's


STAGE_NAMES = ("image", "language", "clip", "caption", "scst")


@dataclass(frozen=True)
class Config:
    """Everything that decides a result, but for the data and the seed."""

    name: str
    model: ModelConfig
    image: StageConfig  # the image encoder alone, on labelled images: the stand-in for ImageNet weights
    language: StageConfig  # the GPT alone, on captions: the stand-in for a pretrained GPT
    clip: StageConfig  # image and text encoder, contrastively
    caption: StageConfig  # the same GPT, now writing
    scst: StageConfig = StageConfig(epochs=0, captions_per_visit=5)  # self-critical: its own captions, rewarded by CIDEr-D
    scst_temperature: float = 0.5  # logits are divided by it, where those captions are drawn and in their loss: below 1 they
    # are nearer to what is written greedily
    scst_cross_entropy: float = 0.0  # weight of the training captions' own loss, in nats a token, beside the rewards'
    stored_size: int = 256  # pixels a side of prepared images
    train_resize: int = 256  # training: resize to this, then crop image_size at random
    smallest_crop: float = 1.0  # training: below 1, crops of about this share of the area up to all of it, resized
    colour_jitter: float = 0.0  # training: brightness, contrast and saturation change by up to this share
    horizontal_flip: bool = False  # mirror half of the training images (not those whose captions say left or right)
    vocabulary_minimum: int = 1  # occurrences in training captions that earn a character its place
    max_length: int = 30  # most characters of a generated caption, [SEP] included
    beam_size: int = 1  # 1 is greedy
    length_penalty: float = 1.0  # of beam search: 1 compares means of log-probabilities, 0 sums, which favours short ones
    ensemble_rule: str = "probabilities"  # what an ensemble averages: "probabilities", "log-probabilities" or "logits"
    precision: str = "auto"  # "auto": bf16 where the hardware computes in it, else fp16 (GPU) or fp32 (CPU)
    image_weights: str = "random"  # "random", "timm" (the backbone's own, fetched), or a file of its weights
    gpt_weights: str = "random"  # "random", or a GPT-2 that reads by character: a folder of transformers, or a hub name
    compile: bool = False  # on a GPU: torch.compile the image encoder for training (minutes: it pays in long runs), and the
    # GPT's layers for captioning few images at once (seconds)
    sync_batchnorm: bool = False  # several GPUs: batch statistics over all processes' images, not over each one's own
    validation_images: int = 300  # images captioned to choose the best checkpoint
    models: tuple[str, ...] = ("model1", "model2", "model3", "model4")  # those that the notebooks train

    def __post_init__(self) -> None:
        _check(self.train_resize >= self.model.image_size, "train_resize must not be smaller than image_size")
        _check(self.stored_size >= self.train_resize, "stored_size must not be smaller than train_resize")
        _check(0 < self.smallest_crop <= 1, f"smallest_crop {self.smallest_crop} is not in (0, 1]")
        _check(0 <= self.colour_jitter < 1, f"colour_jitter {self.colour_jitter} is not in [0, 1)")
        _check(self.ensemble_rule in ("probabilities", "log-probabilities", "logits"),
               f"unknown ensemble rule '{self.ensemble_rule}'; choose probabilities, log-probabilities or logits")
        _check(self.precision in ("auto", "bf16", "fp16", "fp32"), f"unknown precision '{self.precision}'")
        unknown = sorted(set(self.models) - {system.name for system in MODELS})
        _check(not unknown, f"unknown models: {', '.join(unknown)}; known are {', '.join(s.name for s in MODELS)}")
        object.__setattr__(self, "models", tuple(self.models))  # JSON gives a list
        _check(self.max_length < self.model.context, "max_length must be smaller than the context")
        _check(self.clip.epochs > 0 and self.caption.epochs > 0, "clip and caption need at least one epoch each; without "
               "CLIP pretraining, begin a captioner from another checkpoint: train --stage caption --clip FOLDER")
        _check(self.clip.batch_size >= 2 * self.clip.accumulation, f"clip: of batch_size {self.clip.batch_size} in "
               f"accumulation {self.clip.accumulation} a part has one image and no negatives; for memory, take chunk_size")
        _check(self.validation_images > 0, f"validation_images must be positive, not {self.validation_images}")
        _check(self.scst_temperature > 0, f"scst_temperature must be positive, not {self.scst_temperature}")
        _check(self.scst_cross_entropy >= 0, "scst_cross_entropy must not be negative")
        _check(self.scst.captions_per_visit > 1, "scst: a baseline of others needs captions_per_visit of at least 2")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of this room as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=dict))


def from_dict(kind: type, values: Mapping[str, Any]) -> Any:
    """Rebuild a dataclass of this room from `to_dict`, validated. Raises InputError on unknown names and wrong types."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    _check(not unknown, f"unknown settings for {kind.__name__}: {', '.join(unknown)}")
    for name, value in values.items():
        expected = {"int": int, "float": (int, float), "str": str, "bool": bool}.get(fields[name].type, object)
        _check(isinstance(value, expected) and not (isinstance(value, bool) and fields[name].type in ("int", "float")),
               f"{kind.__name__}: {name} must be of type {fields[name].type}, not {value!r}")
    nested = {"model": ModelConfig, **dict.fromkeys(STAGE_NAMES, StageConfig)}
    return kind(**{name: from_dict(nested[name], value) if name in nested and isinstance(value, Mapping) else value
                   for name, value in values.items()})


def fingerprint(*parts: Any) -> str:
    """Twelve hex digits that change when any part does. Parts are JSON types or dataclasses of this room."""
    plain = [to_dict(part) if dataclasses.is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:12]


_MINIATURE_RES2NEXT = dict(layers=[1, 1, 1, 1], channels=[16, 32, 64, 128], output_stride=16,
                           stem_type="deep_tiered", stem_width=16)  # three small convolutions learn faster than one of 7 x 7

PRESETS = {
    # drawn scenes, a laptop: the whole story in minutes
    "miniature": Config(
        name="miniature",
        model=ModelConfig(encoder_options=_MINIATURE_RES2NEXT, image_size=96, image_tokens="grid", layers=2, width=128,
                          heads=4, context=40, dropout=0.0),
        image=StageConfig(epochs=4, batch_size=32, learning_rate=6e-3, schedule="one-cycle", warmup=0.1,
                          clip_gradient=5.0),
        language=StageConfig(epochs=1, batch_size=64, learning_rate=2e-3, schedule="one-cycle", warmup=0.1, visits=4),
        clip=StageConfig(epochs=4, batch_size=64, learning_rate=1e-3, image_rate=2.0, schedule="one-cycle", warmup=0.1,
                         freeze=("conv1", "bn1", "layer1"), clip_gradient=5.0),
        caption=StageConfig(epochs=3, batch_size=32, learning_rate=2e-3, schedule="one-cycle", warmup=0.1,
                            captions_per_visit=3, label_smoothing=0.1, freeze=("conv1", "bn1", "layer1"), clip_gradient=5.0),
        scst=StageConfig(epochs=2, batch_size=32, learning_rate=3e-4, schedule="one-cycle", warmup=0.1,
                         captions_per_visit=5, freeze=("conv1", "bn1", "layer1"), clip_gradient=5.0),
        stored_size=104, train_resize=104, horizontal_flip=True, beam_size=3,
    ),
    # the real Flickr8k-CN on two CPU cores
    "flickr8k-small": Config(
        name="flickr8k-small",
        model=ModelConfig(encoder="resnet10t", image_size=96, image_tokens="grid", layers=2, width=256, heads=4,
                          context=40, dropout=0.0),
        image=StageConfig(epochs=0),
        language=StageConfig(epochs=2, batch_size=64, learning_rate=1e-3, schedule="one-cycle", warmup=0.1, visits=2),
        clip=StageConfig(epochs=3, batch_size=64, learning_rate=5e-4, schedule="one-cycle", warmup=0.1),
        caption=StageConfig(epochs=7, batch_size=32, learning_rate=8e-4, schedule="one-cycle", warmup=0.1,
                            captions_per_visit=2, label_smoothing=0.1, freeze=("conv1", "bn1", "layer1"), clip_gradient=5.0),
        scst=StageConfig(epochs=2, batch_size=32, learning_rate=1e-4, schedule="one-cycle", warmup=0.1,
                         captions_per_visit=5, freeze=("conv1", "bn1", "layer1"), clip_gradient=5.0),
        stored_size=112, train_resize=112, horizontal_flip=True, vocabulary_minimum=2, beam_size=3, length_penalty=0.0,
        models=("model1",),
    ),
    # the real Flickr8k-CN on one GPU
    "flickr8k": Config(
        name="flickr8k",
        model=ModelConfig(encoder="resnet18d", encoder_options=dict(output_stride=16), image_size=128, image_tokens="grid",
                          layers=4, width=384, heads=6, context=40),
        image=StageConfig(epochs=0),
        language=StageConfig(epochs=2, batch_size=64, learning_rate=1e-3, schedule="one-cycle", warmup=0.1, visits=2),
        clip=StageConfig(epochs=8, batch_size=64, learning_rate=1e-3, schedule="one-cycle", warmup=0.1),
        caption=StageConfig(epochs=18, batch_size=64, learning_rate=1e-3, schedule="one-cycle", warmup=0.1,
                            captions_per_visit=5, label_smoothing=0.1),
        scst=StageConfig(epochs=2, batch_size=64, learning_rate=1e-4, schedule="one-cycle", warmup=0.1,
                         captions_per_visit=5, freeze=("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
        scst_cross_entropy=0.5,
        stored_size=128, train_resize=128, smallest_crop=0.7, horizontal_flip=True, vocabulary_minimum=2, beam_size=3,
        models=("model1", "model2", "model3"),
    ),
    # the original's settings
    "hualu": Config(
        name="hualu",
        model=ModelConfig(),
        image=StageConfig(epochs=0),
        language=StageConfig(epochs=0),
        clip=StageConfig(epochs=5, visits=5, mask_duplicates=False),
        caption=StageConfig(epochs=20, visits=5, schedule="halving", warmup=0.1),
        ensemble_rule="logits", compile=True,
    ),
}


def preset(name: str) -> Config:
    """The preset of that name; with "-debug" after it, as --debug runs it. Raises InputError naming the known ones."""
    base = name.removesuffix("-debug")
    _check(base in PRESETS, f"unknown preset '{name}'; known are {', '.join(PRESETS)}")
    return PRESETS[base] if base == name else debug_config(PRESETS[base])


def debug_config(config: Config) -> Config:
    """One epoch of each stage. On the command line, --debug also cuts the data."""
    stages = {name: replace(getattr(config, name), epochs=min(1, getattr(config, name).epochs), visits=1)
              for name in STAGE_NAMES}
    return replace(config, name=f"{config.name}-debug", validation_images=100, **stages)


def runs_folder() -> Path:
    """Where runs are kept: CLIPCAP_RUNS, or runs/ of the checkout."""
    return Path(os.environ.get("CLIPCAP_RUNS") or Path(__file__).resolve().parents[1] / "runs")


def figures_folder(config: Config) -> Path:
    """Where notebooks put their figures: CLIPCAP_FIGURES, or figures/latest/<preset> of the checkout (not tracked)."""
    default = Path(__file__).resolve().parents[1] / "figures" / "latest" / config.name
    return Path(os.environ.get("CLIPCAP_FIGURES") or default)


def data_root(config: Config, given: str | Path | None = None) -> Path | None:
    """The folder of the raw corpora: `given`, or CLIPCAP_DATA, or None where the miniature corpora are drawn.

    Raises InputError for other presets without a folder: they want real corpora.
    """
    root = given or os.environ.get("CLIPCAP_DATA") or None
    _check(root is not None or config.name.startswith("miniature"),
           f"preset '{config.name}' needs real corpora: give the folder that holds flickr8k-cn and others as --data-root "
           f"or in CLIPCAP_DATA, or use --preset miniature")
    return Path(root) if root else None
