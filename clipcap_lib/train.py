"""One training loop, two stages (CLIP pretraining, caption fine-tuning) and two warm-ups (image encoder, GPT).

    runs/<preset>/<stage>/<name>/
      best/   the checkpoint later steps use      last/   where a run that was cut off goes on
      metrics.jsonl   one line every few steps    done.json   what made it; written last

The same command run again returns at once if nothing has changed, goes on if it was cut off, and says which.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from clipcap_lib import checkpoint, decode, metrics
from clipcap_lib.config import Config, InputError, StageConfig, fingerprint
from clipcap_lib.data import Batch, TrainingData, image_batches, is_prepared, load_prepared, pad
from clipcap_lib.losses import caption_loss, contrastive_loss, same_caption
from clipcap_lib.model import ClipCap
from clipcap_lib.prepare import exclusive, read_json, write_json
from clipcap_lib.tokenizer import encode, load_tokenizer

LOG_EVERY = 10  # steps between lines of metrics.jsonl
SAVE_EVERY = 500  # steps between checkpoints within an epoch
Progress = Callable[[dict[str, Any]], None]


def pick_precision(name: str) -> str:
    """"auto" -> bf16 on a GPU or CPU that computes in it, else fp16 on a GPU, fp32 on a CPU."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def keep_freed_memory() -> None:
    """Let glibc keep the memory that tensors free, for the next ones: measured, a fifth less time a step on a CPU.

    By default it hands large blocks back to the system, which then fills them with zeros, page by page, at every step.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such thing
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which is not trimmed


def learning_rate(stage: StageConfig, step: int, steps: int) -> float:
    """The rate at `step` of `steps`: linear warm-up, then constant, halved at 70 % and 90 %, or a cosine to zero."""
    warmup = int(stage.warmup * steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    if stage.schedule == "halving":
        return stage.learning_rate * 0.5 ** ((step >= 0.7 * steps) + (step >= 0.9 * steps))
    if stage.schedule == "one-cycle":
        return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return stage.learning_rate


def parameter_groups(model: ClipCap, stage: StageConfig) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, biases, norms and the temperature do not; the image encoder has a rate of its own."""
    of_image = {id(p) for p in model.image_encoder.parameters()}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault((parameter.ndim >= 2, id(parameter) in of_image), []).append(parameter)
    return [{"params": parameters, "weight_decay": stage.weight_decay if decays else 0.0,
             "factor": stage.image_rate if image else 1.0} for (decays, image), parameters in groups.items()]


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


# -- the stages: a loss, a validation, and which of its numbers chooses the best checkpoint ---------------------------


class ImageStage:
    """The image encoder alone learns to name labelled objects: the stand-in for weights pretrained on ImageNet.

    Classes are read off the first dimensions of the image head, which CLIP pretraining then learns anew.
    """

    name, best_by = "image", None

    def __init__(self, config: Config, validation: Any, tokenizer: PreTrainedTokenizerFast, rows: Any):
        self.stage = config.image
        labels = sorted({row[0] for row in rows["captions"][:]})
        self.classes = pad(encode(tokenizer, labels, config.model.context), tokenizer.pad_token_id)  # (classes, T)
        if len(labels) > config.model.width or len(self.classes.unique(dim=0)) < len(labels):
            raise InputError(f"{len(labels)} classes of labelled images cannot be told apart by this model and vocabulary")

    def loss(self, model: ClipCap, batch: Batch) -> Tensor:
        ids = F.pad(batch.ids, (0, self.classes.shape[1] - batch.ids.shape[1]), value=model.pad_id)
        targets = (ids[:, None] == self.classes.to(ids.device)).all(dim=-1).int().argmax(dim=1)
        logits = model.image_head(model.image_encoder(batch.images)[0])[:, :len(self.classes)]
        return F.cross_entropy(logits.float(), targets)

    def validate(self, model: ClipCap) -> dict[str, float]:
        return {}


class LanguageStage:
    """The GPT alone learns to write captions: the stand-in for a GPT pretrained on other text."""

    name, best_by = "language", None

    def __init__(self, config: Config, validation: Any, *_: Any):
        self.stage = config.language

    def loss(self, model: ClipCap, batch: Batch) -> Tensor:
        return caption_loss(model.language_logits(batch.ids[:, :-1]), batch.ids[:, 1:], model.pad_id)

    def validate(self, model: ClipCap) -> dict[str, float]:
        return {}


class ClipStage:
    """Both encoders learn the joint space."""

    name, best_by = "clip", "recall_sum"

    def __init__(self, config: Config, validation: Any, *_: Any):
        self.stage, self.validation = config.clip, validation

    def loss(self, model: ClipCap, batch: Batch) -> Tensor:
        duplicates = same_caption(batch.ids) if self.stage.mask_duplicates else None
        return contrastive_loss(model.encode_image(batch.images), model.encode_text(batch.ids), model.scale(),
                                duplicates)

    def validate(self, model: ClipCap) -> dict[str, float]:
        recalls = retrieval(model, self.validation)
        return {**recalls, "recall_sum": sum(value for name, value in recalls.items() if "R@" in name)}


class CaptionStage:
    """The same GPT learns to continue the image's prefix; the best checkpoint is the one with the best CIDEr."""

    name, best_by = "caption", "CIDEr"

    def __init__(self, config: Config, validation: Any, *_: Any):
        self.stage, self.config, self.validation = config.caption, config, validation
        self.references = [metrics.segment(captions, "characters") for captions in validation["captions"][:]]
        self.frequencies = metrics.document_frequencies(self.references)

    def loss(self, model: ClipCap, batch: Batch) -> Tensor:
        logits = model.caption_logits(model.prefix(batch.images), batch.ids[:, :-1])
        return caption_loss(logits, batch.ids[:, 1:], model.pad_id, self.stage.label_smoothing)

    def validate(self, model: ClipCap) -> dict[str, float]:
        captions = [caption for _, images in image_batches(self.validation)
                    for caption in decode.caption(model, model.tokenizer, images, max_length=self.config.max_length)]
        values = metrics.cider_d(metrics.segment(captions, "characters"), self.references, self.frequencies)
        return {"CIDEr": 100 * float(np.mean(values)), "distinct": len(set(captions))}


STAGES = {kind.name: kind for kind in (ImageStage, LanguageStage, ClipStage, CaptionStage)}


@torch.inference_mode()
def embed(model: ClipCap, rows: Any, captions: list[list[str]]) -> tuple[Tensor, Tensor, np.ndarray]:
    """Unit-norm embeddings of prepared rows and their captions: images (I, D), texts (T, D), image of each text (T,)."""
    images = torch.cat([model.encode_image(model.preprocess(images)) for _, images in image_batches(rows)])
    image_of_text = np.repeat(np.arange(len(captions)), [len(row) for row in captions])
    ids = encode(model.tokenizer, [c for row in captions for c in row], model.config.context)
    texts = [model.encode_text(pad(ids[i:i + 256], model.pad_id).to(images.device)) for i in range(0, len(ids), 256)]
    return images.float(), torch.cat(texts).float(), image_of_text


def retrieval(model: ClipCap, rows: Any, captions_per_image: int = 1) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent and median ranks, both ways, over all images of `rows` and their captions."""
    return retrieval_of_set(model, rows, dict(zip(rows["file_name"][:], rows["captions"][:], strict=True)),
                            captions_per_image)


def retrieval_of_set(model: ClipCap, rows: Any, references: Mapping[str, list[str]],
                     captions_per_image: int = 1) -> dict[str, float]:
    """The same with captions from elsewhere: a board's are held apart from its images."""
    captions = [references[file][:captions_per_image] for file in rows["file_name"][:]]
    images, texts, image_of_text = embed(model, rows, captions)
    return metrics.recall_at_k((images @ texts.mT).cpu().numpy(), image_of_text)


def similarities(model: ClipCap, rows: Any, captions: list[list[str]]) -> np.ndarray:
    """Cosine similarities (I, T) of prepared rows and texts, in order."""
    images, texts, _ = embed(model, rows, captions)
    return (images @ texts.mT).cpu().numpy()


def nearest_captions(model: ClipCap, rows: Any, references: Mapping[str, list[str]], queries: Sequence[int],
                     k: int = 3) -> dict[str, list[str]]:
    """For some of the rows, the k different captions of the whole set that are most similar -> {file: captions}."""
    files = rows["file_name"][:]
    pool = list(dict.fromkeys(references[file][0] for file in files))
    found = similarities(model, rows.select(list(queries)), [pool])
    return {files[query]: [pool[i] for i in np.argsort(-row, kind="stable")[:k]]
            for query, row in zip(queries, found, strict=True)}


# -- the loop ---------------------------------------------------------------------------------------------------------


def fit(stage: Any, model: ClipCap, data: TrainingData, config: Config, folder: Path, about: Mapping[str, Any],
        progress: Progress) -> Path:
    """Train `model` on `data` until the stage's epochs are over -> `folder`. See the head of this file.

    Raises InputError if the loss is no longer finite, naming the step; the last good checkpoint stays.
    """
    seed, steps = about["seed"], stage.stage.epochs * data.steps_per_epoch
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(p := pick_precision(config.precision), p))
    model.to(accelerator.device)
    keep_freed_memory()
    freeze(model, stage.stage.freeze)
    optimizer = torch.optim.AdamW(parameter_groups(model, stage.stage), lr=stage.stage.learning_rate,
                                  fused=True)
    step, best = 0, -math.inf
    if checkpoint.exists(folder / "last") and checkpoint.about(folder / "last")["fingerprint"] == about["fingerprint"]:
        state = checkpoint.resume(folder / "last", model, optimizer)
        step, best = state["step"], state["best"] if state["best"] is not None else -math.inf
        progress({**about, "event": "resumed", "step": step, "steps": steps})
    else:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _truncate_log(folder / "metrics.jsonl", step)
    optimizer = accelerator.prepare_optimizer(optimizer)
    batches = data.batches(step)
    losses, images, since = [], 0, time.perf_counter()
    while step < steps:
        model.train()
        rate = learning_rate(stage.stage, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        set_seed(fingerprint_seed(seed, step))  # dropout depends on the step alone, so that a resumed run repeats it
        batch = next(batches).to(accelerator.device)
        with accelerator.autocast():
            loss = stage.loss(model, batch)
        accelerator.backward(loss)
        if stage.stage.clip_gradient:
            accelerator.clip_grad_norm_(model.parameters(), stage.stage.clip_gradient)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        losses.append(loss.detach())
        images += len(batch.images)

        epoch_ends = step % data.steps_per_epoch == 0
        if step % LOG_EVERY == 0 or epoch_ends:
            value = torch.stack(losses).mean().item()
            if not math.isfinite(value):
                raise InputError(f"{folder}: the loss is {value} at one of the steps {step - len(losses) + 1} to {step}; "
                                 f"the checkpoint before it is kept. Lower the learning rate or use precision fp32")
            line = {"stage": stage.name, "step": step, "steps": steps, "epoch": step / data.steps_per_epoch,
                    "loss": value, "learning_rate": rate, "images_per_second": images / (time.perf_counter() - since)}
            losses, images, since = [], 0, time.perf_counter()
            if epoch_ends:
                model.eval()
                line["validation"] = {k: round(v, 4) for k, v in stage.validate(model).items()}
                score = line["validation"][stage.best_by] if stage.best_by else float(step)
                if score > best:
                    best = score
                    checkpoint.save(folder / "best", model, config, {**about, "step": step, "best": best,
                                                                     "validation": line["validation"]})
            _append(folder / "metrics.jsonl", line)
            progress({**about, **line, "event": "step"})
        if (epoch_ends or step % SAVE_EVERY == 0) and step < steps:
            checkpoint.save(folder / "last", model, config,
                            {**about, "step": step, "best": best if math.isfinite(best) else None}, optimizer.optimizer)
    write_json(folder / "done.json", {**about, "step": step, "best": best, "device": str(accelerator.device),
                                      "torch": torch.__version__})
    shutil.rmtree(folder / "last", ignore_errors=True)
    return folder


def fingerprint_seed(*parts: int) -> int:
    """A seed for torch from whole numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _truncate_log(path: Path, step: int) -> None:
    """Keep the lines up to `step`: what came after it will be written again."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(True)
                 if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(lines), encoding="utf-8")


# -- the recipe -------------------------------------------------------------------------------------------------------


def new_model(config: Config, tokenizer: PreTrainedTokenizerFast, seed: int) -> ClipCap:
    """A model with random weights for this vocabulary, the same for the same seed."""
    set_seed(seed)
    return ClipCap(replace(config.model, **checkpoint.model_info(tokenizer)), tokenizer)


Starts = Sequence[tuple[Path, tuple[str, ...] | None]]  # checkpoints, and which parts of the model they give (None: all)


def train_stage(name: str, config: Config, run: Path, output: str, seed: int, without: tuple[str, ...] = (),
                starts: Starts = (), progress: Progress = lambda line: None) -> Path:
    """Train one stage on runs/<preset>/data -> runs/<preset>/<stage>/<output>, or return it if it is done.

    starts: the checkpoints whose weights the model takes over. One process at a time works in a run.
    Raises InputError if the data or a checkpoint does not fit.
    """
    with exclusive(Path(run)):
        return _train_stage(name, config, Path(run), output, seed, without, starts, progress)


def _train_stage(name: str, config: Config, run: Path, output: str, seed: int, without: tuple[str, ...],
                 starts: Starts, progress: Progress) -> Path:
    kind, data, folder = STAGES[name], run / "data", run / name / output
    rows = load_prepared(data, "labelled" if kind is ImageStage else "train", without)
    validation = load_prepared(data, "val", without)
    validation = validation.select(range(min(len(validation), config.validation_images)))
    about = {"stage": name, "name": output, "seed": seed, "without": list(without), "images": len(rows),
             "starts": [[checkpoint.about(path)["fingerprint"], parts] for path, parts in starts],
             "data": read_json(data / "manifest.json")["fingerprint"]}
    settings = [getattr(config, name), config.model, config.train_resize, config.horizontal_flip, config.max_length,
                config.validation_images, config.precision]
    about["fingerprint"] = fingerprint(*settings, about)
    if (folder / "done.json").is_file() and read_json(folder / "done.json")["fingerprint"] == about["fingerprint"]:
        progress({**about, "event": "done before"})
        return folder
    tokenizer = load_tokenizer(data / "tokenizer")
    model = new_model(config, tokenizer, seed)
    for path, parts in starts:
        checkpoint.load_weights(model, path, parts)
    stage = kind(config, validation, tokenizer, rows)
    return fit(stage, model, TrainingData(rows, tokenizer, config, stage.stage, seed), config, folder, about, progress)


def pretrain_clip(config: Config, run: Path, seed: int = 1, without: tuple[str, ...] = (),
                  progress: Progress = lambda line: None) -> Path:
    """Stage one, preceded by the warm-ups that the settings ask for -> runs/<preset>/clip/<training set>.

    Labelled images are there beside drawn corpora only; where there are none, the image encoder begins untrained.
    """
    name, starts = training_set(without), []
    if config.image.epochs and is_prepared(Path(run) / "data", "labelled"):
        starts.append((train_stage("image", config, run, "labelled", seed, progress=progress) / "best",
                       ("image_encoder",)))
    if config.language.epochs:
        starts.append((train_stage("language", config, run, name, seed, without, progress=progress) / "best", ("gpt",)))
    return train_stage("clip", config, run, name, seed, without, starts, progress)


def finetune_captioner(config: Config, run: Path, name: str, seed: int = 1, without: tuple[str, ...] = (),
                       clip: Path | None = None, progress: Progress = lambda line: None) -> Path:
    """Stage two -> runs/<preset>/caption/<name>: image encoder, head and GPT go on from the CLIP checkpoint."""
    clip = Path(clip or Path(run) / "clip" / training_set(without))
    if not checkpoint.exists(clip / "best"):
        raise InputError(f"{clip}: no CLIP checkpoint here; run `python -m clipcap_lib train --stage clip` first")
    return train_stage("caption", config, run, name, seed, without, [(clip / "best", None)], progress)


def training_set(without: tuple[str, ...]) -> str:
    """The name of a training set: "all", or "without-coco-cn"."""
    return "without-" + "-".join(without) if without else "all"
