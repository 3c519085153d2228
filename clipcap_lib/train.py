"""One training loop, two stages (CLIP pretraining, caption fine-tuning), two warm-ups (image encoder, GPT), and SCST.

    runs/<preset>/<stage>/<name>/
      best/   the checkpoint later steps use      last/   the latest one, where a run that was cut off goes on
      metrics.jsonl   one line every few steps    done.json   what made it; written when all steps are taken

The same command run again returns at once if nothing has changed, goes on if it was cut off, and says which. Started once
a GPU by `accelerate launch`, `torchrun` or `launch`, the same functions train one model together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from clipcap_lib import checkpoint, optimisation, processes
from clipcap_lib.config import Config, InputError, fingerprint
from clipcap_lib.data import TrainingData, data_fingerprint, drawn, is_prepared, load_prepared, spread
from clipcap_lib.embeddings import embed, nearest_captions, retrieval, retrieval_of_set, similarities
from clipcap_lib.files import read_json, write_json, writing
from clipcap_lib.journal import Journal
from clipcap_lib.model import ClipCap
from clipcap_lib.optimisation import Average, TrainingStep, learning_rate, set_learning_rate
from clipcap_lib.pretrained import identity, load_pretrained, training_tokenizer
from clipcap_lib.processes import launch, side_by_side
from clipcap_lib.stages import STAGES, CaptionStage, ClipStage, ImageStage, LanguageStage, ScstStage, Stage

__all__ = ["CaptionStage", "ClipStage", "ImageStage", "LanguageStage", "ScstStage", "embed", "finetune_captioner", "fit",
           "launch", "nearest_captions", "new_model", "pretrain_clip", "retrieval", "retrieval_of_set", "self_critical",
           "side_by_side", "similarities", "train_stage", "training_set"]

LOG_EVERY = 10  # steps between lines of metrics.jsonl
SAVE_EVERY = 500  # steps between checkpoints within an epoch; a multiple of LOG_EVERY: only what was checked is kept
Progress = Callable[[dict[str, Any]], None]


# -- the loop ---------------------------------------------------------------------------------------------------------


def fit(stage: Stage, model: ClipCap, data: TrainingData, config: Config, folder: Path, about: Mapping[str, Any],
        progress: Progress) -> Path:
    """Train `model` on `data` until the stage's epochs are over -> `folder`. See the head of this file.

    Raises InputError if a loss or gradient is not finite, naming the step; the last good checkpoint stays.
    """
    seed, settings, steps = about["seed"], stage.stage, stage.stage.epochs * data.steps_per_epoch
    accelerator = optimisation.accelerator(config.precision)
    processes.keep_freed_memory()
    optimisation.freeze(model.to(accelerator.device), settings.freeze)
    before = stage.before(model.eval()) if accelerator.is_main_process else {}
    if config.sync_batchnorm and accelerator.num_processes > 1:
        model = processes.synchronised(model)
    optimizer = optimisation.optimizer(model, settings)
    average = Average(model, settings.average) if settings.average else None
    if config.compile and accelerator.device.type == "cuda":
        part = -(-settings.batch_size // (accelerator.num_processes * settings.accumulation))
        model.image_encoder.compile_for(settings.chunk_size or part)
    run = _Run(stage, model, average, optimizer, config, folder, dict(about), accelerator, progress)
    step = run.begin(steps)
    optimizer, batches = accelerator.prepare_optimizer(optimizer), data.batches(step)
    take = TrainingStep(stage, model, optimizer, accelerator)
    losses, norms, images, since = [], [], 0, time.perf_counter()
    while step < steps:
        model.train()
        rate = learning_rate(settings, step, steps)
        set_learning_rate(optimizer, rate)
        set_seed(_seed(seed, step))  # dropout depends on the step alone, so that a resumed run repeats it
        batch = next(batches).to(accelerator.device)
        loss, norm = take(batch)
        step += 1
        if average:
            average.update(model, step)
        losses.append(loss)
        norms.append(norm)
        images += len(batch.images) * accelerator.num_processes

        epoch_ends = step % data.steps_per_epoch == 0
        if step % LOG_EVERY == 0 or epoch_ends:
            loss, norm = run.check(step, losses, norms)
            line = {"stage": stage.name, "step": step, "steps": steps, "epoch": step / data.steps_per_epoch, "loss": loss,
                    "gradient_norm": norm, "learning_rate": rate, **run.told(),
                    "images_per_second": images / (time.perf_counter() - since)}
            run.record(line, validate=epoch_ends)
            if epoch_ends or step % SAVE_EVERY == 0:
                run.save_last(step)
            losses, norms, images, since = [], [], 0, time.perf_counter()
    return run.finish(step, before)


def _seed(*parts: int) -> int:
    """A seed for torch from whole numbers; processes after the first have seeds of their own."""
    mine = (processes.rank(),) if processes.rank() else ()
    return int(np.random.SeedSequence((*parts, *mine)).generate_state(1)[0])


class _Run:
    """What hangs off the loop: going on where a run was cut off, checks, the journal, validation, checkpoints.

    With several processes the main one validates and writes, the others wait for it.
    """

    def __init__(self, stage: Stage, model: ClipCap, average: Average | None, optimizer: torch.optim.Optimizer,
                 config: Config, folder: Path, about: dict[str, Any], accelerator: Accelerator, progress: Progress):
        self.stage, self.model, self.optimizer, self.config = stage, model, optimizer, config
        self.averaged = average.model if average else None
        self.folder, self.about, self.accelerator = folder, about, accelerator
        self.main, self.best, self.line = accelerator.is_main_process, -math.inf, {}
        self.progress = progress if self.main else lambda line: None

    def begin(self, steps: int) -> int:
        """Go on from `last` if it is of this very run, else put away what stands there -> the step to go on from."""
        last, step = self.folder / "last", 0
        if processes.of_main(self.main and _goes_on(last) and
                             checkpoint.about(last)["fingerprint"] == self.about["fingerprint"]):
            state = checkpoint.resume(last, self.model, self.optimizer, self.averaged, self.accelerator.scaler)
            step, self.best = state["step"], state["best"] if state["best"] is not None else -math.inf
            self.progress({**self.about, "event": "resumed", "step": step, "steps": steps})
        processes.wait()  # all have looked
        if self.main:
            if not step and (kept := checkpoint.put_away(self.folder, self.about["fingerprint"])):
                self.progress({**self.about, "event": "replaces", "kept": str(kept)})
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self.journal = Journal(self.folder, step)
            self.line = self.journal.last
        return step

    def check(self, step: int, losses: list[Tensor], norms: list[Tensor]) -> tuple[float, float | None]:
        """Mean loss and gradient norm of the steps up to `step`. Read here only: each reading makes a GPU's host wait.

        Raises InputError naming the first step at which one was not finite. With fp16, steps whose gradients overflow are
        skipped and the scale is lowered: that is a fault only when no step is left over at a scale below 1. The norm is
        that of the other steps, None if there is none.
        """
        values = self.accelerator.reduce(torch.stack([torch.stack(losses).float(), torch.stack(norms).float()]), "mean")
        finite, scaler = values.isfinite(), self.accelerator.scaler
        taken = values[1, finite[1]]
        if scaler is not None and (len(taken) or scaler.get_scale() >= 1):
            finite[1] = True
        good = finite.all(dim=0).tolist()
        if not all(good):
            first = good.index(False)
            what, value = ("gradient", values[1, first]) if finite[0, first] else ("loss", values[0, first])
            raise InputError(f"{self.folder}: the {what} of step {step - len(good) + 1 + first} is {value.item()}; the "
                             f"checkpoint before it is kept. Lower the learning rate or use precision fp32")
        return values[0].mean().item(), taken.mean().item() if len(taken) else None

    def told(self) -> dict[str, float]:
        """What the stage tells of its steps, a mean over processes."""
        return {name: self.accelerator.reduce(torch.tensor(value, device=self.accelerator.device), "mean").item()
                for name, value in self.stage.told().items()}

    def record(self, line: dict[str, Any], validate: bool) -> None:
        """Write a line of the journal; at the end of an epoch validate, and keep the best checkpoint."""
        if validate:
            self._share_statistics()
        if self.main:
            if validate:
                line |= self._validated(line["step"])
            self.journal.write(line)
            self.progress({**self.about, **line, "event": "step"})
            self.line = line
        if validate:
            processes.wait()

    def _share_statistics(self) -> None:
        """What BatchNorm has seen in each process, averaged: for the weights and for their moving average."""
        for model in filter(None, (self.model, self.averaged)):
            processes.average_buffers(model)

    def _validated(self, step: int) -> dict[str, Any]:
        judged = self.averaged or self.model
        found = self.stage.validate(judged.eval())
        said = {name: found.pop(name) for name in ("samples", "warning") if name in found}
        found = {name: round(value, 4) for name, value in found.items()}
        score = found[self.stage.best_by] if self.stage.best_by else float(step)
        if score >= self.best:  # of equals, as few validation images often give, the one that was trained longer
            self.best = score
            checkpoint.save(self.folder / "best", judged, self.config,
                            {**self.about, "step": step, "best": score, "validation": found})
        return {"validation": found} | said

    def save_last(self, step: int) -> None:
        """Keep all that the run needs to go on from here."""
        self._share_statistics()
        if self.main:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            checkpoint.save(self.folder / "last", self.model, self.config, self._at(step), self.optimizer, self.averaged,
                            scaler)

    def finish(self, step: int, before: dict[str, float]) -> Path:
        """Judge the best checkpoint, say that the run is over, and keep the last weights without the optimiser."""
        if self.main:
            best = self.folder / "best"
            found = self.stage.after(checkpoint.load(best, self.accelerator.device), before) if before else {}
            with writing(self.folder / "done.json"):
                write_json(self.folder / "done.json", {**self._at(step), **found, "device": str(self.accelerator.device),
                                                       "processes": processes.count(), "torch": torch.__version__})
            if self.stage.best_by:
                checkpoint.save(self.folder / "last", self.averaged or self.model, self.config, self._at(step))
            else:  # the last is the best
                checkpoint.remove(self.folder / "last")
            self.journal.close()
            if found and self.line:
                self.progress({**self.about, **self.line, **found, "event": "step"})
        processes.wait()
        return self.folder

    def _at(self, step: int) -> dict[str, Any]:
        return {**self.about, "step": step, "best": self.best if math.isfinite(self.best) else None}


def _goes_on(last: Path) -> bool:
    """Whether a run can go on from there: one that is over keeps its last weights without the optimiser."""
    return checkpoint.exists(last) and (last / checkpoint.TRAINER).is_file()


def _is_done(folder: Path, mark: str) -> bool:
    """Whether a run is over. Cut off behind its last step, it goes on from there to its end."""
    done = folder / "done.json"
    return done.is_file() and read_json(done)["fingerprint"] == mark and not _goes_on(folder / "last")


# -- the recipe -------------------------------------------------------------------------------------------------------


def new_model(config: Config, tokenizer: PreTrainedTokenizerFast, seed: int) -> ClipCap:
    """A model with random weights for this vocabulary, the same for the same seed."""
    set_seed(seed)
    return ClipCap(replace(config.model, **checkpoint.model_info(tokenizer)), tokenizer)


Starts = Sequence[tuple[Path, tuple[str, ...] | None]]  # checkpoints, and which parts of the model they give (None: all)


def train_stage(name: str, config: Config, run: Path, output: str, seed: int, without: tuple[str, ...] = (),
                starts: Starts = (), progress: Progress = lambda line: None, begin: bool = True,
                images: int | None = None) -> Path | None:
    """Train one stage on runs/<preset>/data -> runs/<preset>/<stage>/<output>, or return it if it is done.

    starts: the checkpoints whose weights the model takes over. begin: False returns None where there is something to train.
    images: only so many of the training images, drawn for the seed.
    A run of another seed, setting or data that stands there is put into runs/<preset>/replaced, and taken back when it is
    asked for again.
    One training at a time works on an output. Raises InputError if the data, a checkpoint or pretrained weights do not fit.
    """
    processes.start()
    with processes.alone(Path(run), name, output):
        return _train_stage(name, config, Path(run), output, seed, without, starts, progress, begin, images)


def _train_stage(name: str, config: Config, run: Path, output: str, seed: int, without: tuple[str, ...],
                 starts: Starts, progress: Progress, begin: bool, images: int | None) -> Path | None:
    kind, data, folder = STAGES[name], run / "data", run / name / output
    with processes.main_first():  # it fills the cache that the others read
        rows = drawn(load_prepared(data, "labelled" if kind is ImageStage else "train", without), images, seed)
        validation, all_validation = validation_rows(config, run, without), load_prepared(data, "val", without)
    about = {"stage": name, "name": output, "seed": seed, "without": list(without), "images": len(rows),
             "starts": [[checkpoint.about(path)["fingerprint"], parts] for path, parts in starts],
             "data": data_fingerprint(data)}
    from_elsewhere = all(parts for _, parts in starts)  # not all of the model comes from a checkpoint
    weights = [identity(source) if from_elsewhere else source for source in (config.image_weights, config.gpt_weights)]
    settings = [getattr(config, name), config.model, config.train_resize, config.horizontal_flip, config.max_length,
                config.validation_images, config.precision, *weights, config.sync_batchnorm,
                config.smallest_crop, config.colour_jitter, config.compile]
    settings += ["validation spread"] if len(validation) < len(all_validation) else []  # once it was the first ones
    settings += [config.scst_temperature] if name == "scst" else []
    settings += [config.scst_cross_entropy] if name == "scst" and config.scst_cross_entropy else []
    about["fingerprint"] = fingerprint(*settings, about)
    if not processes.rank():
        checkpoint.take_back(folder, about["fingerprint"])
    if processes.of_main(not processes.rank() and _is_done(folder, about["fingerprint"])):
        if processes.rank() == 0:
            progress({**about, "event": "done before"})
        return folder
    if not begin:
        return None
    tokenizer = training_tokenizer(config, data)
    model = new_model(config, tokenizer, seed)
    if from_elsewhere:
        load_pretrained(model, config)
    for path, parts in starts:
        checkpoint.load_weights(model, path, parts)
    stage = kind(config, validation, tokenizer, rows)
    shown = TrainingData(rows, tokenizer, config, stage.stage, seed, process=processes.rank(), processes=processes.count(),
                         images=kind.sees_images, by_length=kind.by_length, data=data)
    return fit(stage, model, shown, config, folder, about, progress)


def validation_rows(config: Config, run: Path, without: tuple[str, ...] = ()) -> Any:
    """The images that a run validates on: `Config.validation_images` at most, of all the corpora that it trains on."""
    return spread(load_prepared(Path(run) / "data", "val", without), config.validation_images)


def pretrain_image_encoder(config: Config, run: Path, seed: int = 1, progress: Progress = lambda line: None,
                           begin: bool = True) -> Path | None:
    """The image encoder's warm-up on labelled images -> runs/<preset>/image/labelled."""
    return train_stage("image", config, run, "labelled", seed, progress=progress, begin=begin)


def pretrain_clip(config: Config, run: Path, seed: int = 1, without: tuple[str, ...] = (),
                  progress: Progress = lambda line: None, begin: bool = True) -> Path | None:
    """Stage one, preceded by the warm-ups that the settings ask for -> runs/<preset>/clip/<training set>."""
    name, starts = training_set(without), []
    if has_image_warm_up(config, run):
        starts.append((pretrain_image_encoder(config, run, seed, progress, begin), ("image_encoder",)))
    if config.language.epochs:
        starts.append((train_stage("language", config, run, name, seed, without, (), progress, begin), ("gpt",)))
    if not all(folder for folder, _ in starts):
        return None
    return train_stage("clip", config, run, name, seed, without, [(folder / "best", parts) for folder, parts in starts],
                       progress, begin)


def has_image_warm_up(config: Config, run: Path) -> bool:
    """Whether the image encoder has a warm-up: labelled images are there beside drawn corpora only."""
    return config.image.epochs > 0 and is_prepared(Path(run) / "data", "labelled")


def finetune_captioner(config: Config, run: Path, name: str, seed: int = 1, without: tuple[str, ...] = (),
                       clip: Path | None = None, progress: Progress = lambda line: None, begin: bool = True) -> Path | None:
    """Stage two -> runs/<preset>/caption/<name>: image encoder, head and GPT go on from the CLIP checkpoint.

    clip: a checkpoint, or the folder of a run whose `best` it is.
    """
    clip = Path(clip or Path(run) / "clip" / training_set(without))
    start = clip if checkpoint.exists(clip) else clip / "best"
    if not checkpoint.exists(start):
        raise InputError(f"{clip}: no CLIP checkpoint here; run `python -m clipcap_lib train --stage clip` first")
    return train_stage("caption", config, run, name, seed, without, [(start, None)], progress, begin)


def self_critical(config: Config, run: Path, name: str, seed: int = 1, without: tuple[str, ...] = (),
                  caption: Path | None = None, progress: Progress = lambda line: None, begin: bool = True) -> Path | None:
    """The optional third stage -> runs/<preset>/scst/<name>: the captioner goes on by the scores of its own captions."""
    caption = Path(caption or Path(run) / "caption" / name)
    if not checkpoint.exists(caption / "best"):
        raise InputError(f"{caption}: no captioner here; run `python -m clipcap_lib train --stage caption` first")
    if not config.scst.epochs:
        raise InputError(f"preset '{config.name}' has no self-critical stage: its scst.epochs is 0")
    return train_stage("scst", config, run, name, seed, without, [(caption / "best", None)], progress, begin)


def training_set(without: tuple[str, ...]) -> str:
    """The name of a training set: "all", or "without-coco-cn"."""
    return "without-" + "-".join(without) if without else "all"
