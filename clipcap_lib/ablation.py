"""Which start needs fewer captioned images? The original's claims, asked of captioners that are fine-tuned on few.

    runs/<preset>/ablation/caption/<start>-<images>-seed<seed>   the captioners
    runs/<preset>/ablation/predictions                           what they say of a set

The folder is a run of its own beside the preset's data: `train`, `systems` and `results` work on it as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from clipcap_lib import checkpoint, metrics, results, systems, train
from clipcap_lib.config import Config, InputError
from clipcap_lib.data import load_prepared
from clipcap_lib.files import writing

STARTS = {  # each adds one thing to the one before
    "random": "GPT of random weights",
    "language": "+ GPT trained on text",
    "encoder": "+ image encoder of CLIP",
    "shared": "+ GPT of CLIP (the method)",
}
CLAIMS = {  # start -> what it is to show against the one before
    "language": "a GPT pretrained on text saves captioned images",
    "encoder": "so does CLIP's image encoder",
    "shared": "and sharing the GPT with CLIP's text encoder saves more",
}


def folder_of(run: Path) -> Path:
    """runs/<preset>/ablation, which sees the preset's data as its own."""
    run = Path(run).resolve()
    folder = run / "ablation"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "data").is_symlink():
            (folder / "data").symlink_to(run / "data", target_is_directory=True)
    return folder


def name_of(start: str, images: int, seed: int) -> str:
    """The name of a captioner, by which `parts_of` knows it again."""
    return f"{start}-{images}-seed{seed}"


def parts_of(name: str) -> tuple[str, int, int]:
    """"shared-250-seed1" -> ("shared", 250, 1). Raises InputError for another name."""
    start, _, rest = name.partition("-")
    images, _, seed = rest.partition("-seed")
    if start not in STARTS or not (images.isdecimal() and seed.isdecimal()):
        raise InputError(f"{name}: no captioner of an ablation, whose names are such as {name_of('shared', 250, 1)}")
    return start, int(images), int(seed)


def captioner(config: Config, run: Path, start: str, images: int, seed: int = 1, without: tuple[str, ...] = (),
              progress: train.Progress = lambda line: None, begin: bool = True) -> Path | None:
    """Fine-tune a captioner from `start` (see STARTS) on so many images -> runs/<preset>/ablation/caption/<name>.

    "random" and "language" see with the encoder that CLIP pretraining began from. Fewer images are shown more often, by the
    square root of how many fewer they are, and every start takes the same steps at the same rates; the checkpoint of the best
    validation CIDEr counts, so that none is judged by what it has learned by heart. Warm-ups and CLIP have seen all training
    images and captions, and are those of the run, whatever the seed: it is of the drawn images, their order and new weights.
    Raises InputError if a start is unknown or what it starts from has not been trained.
    """
    run = Path(run)
    if start not in STARTS:
        raise InputError(f"unknown start '{start}'; choose from {', '.join(STARTS)}")
    total = len(load_prepared(run / "data", "train", without))
    if not 0 < images <= total:
        raise InputError(f"{images} captioned images: there are {total} to train on")
    shown = replace(config.caption, visits=config.caption.visits * math.ceil(math.sqrt(total / images)))
    config = replace(config, caption=shown, gpt_weights="random" if start == "random" else config.gpt_weights)
    return train.train_stage("caption", config, folder_of(run), name_of(start, images, seed), seed, without,
                             _starts(config, run, start, without), progress, begin, images)


def _starts(config: Config, run: Path, start: str, without: tuple[str, ...]) -> train.Starts:
    clip = run / "clip" / train.training_set(without)
    if start == "shared":
        found: train.Starts = [(clip, None)]
    elif start == "encoder":
        found = [(clip, ("image_encoder", "image_head"))]
    else:
        found = [(run / "image" / "labelled", ("image_encoder",))] if train.has_image_warm_up(config, run) else []
    if start in ("language", "encoder") and config.language.epochs:
        found = [*found, (run / "language" / train.training_set(without), ("gpt",))]
    for folder, _ in found:
        if not checkpoint.exists(folder / "best"):
            raise InputError(f"{folder}: nothing trained here; run `python -m clipcap_lib train --stage clip` first")
    return [(folder / "best", parts) for folder, parts in found]


def captioners(config: Config, run: Path, sizes: Sequence[int], seeds: Sequence[int], without: tuple[str, ...] = (),
               progress: train.Progress = lambda line: None) -> list[Path]:
    """Fine-tune from every start on so many images, for every seed -> their folders. What is done is not done again."""
    return train.side_by_side([partial(captioner, config, run, start, images, seed, without)
                               for seed in seeds for images in sizes for start in STARTS], progress)


def predict(config: Config, run: Path, names: Sequence[str], board: str, device: str = "cpu",
            report: Callable[[str], None] = print) -> None:
    """Let captioners caption the set `board`, as `systems.predict` does."""
    for name in names:
        systems.predict(folder_of(run), config, name, board, device=device, report=report)


def table(folder: Path, board: str) -> Any:
    """What was predicted on `board` -> a DataFrame: start, images, seed, CIDEr x 100, low, high (95 % bootstrap interval
    over images), distinct (different captions), signature. folder: `folder_of` a run, or `leaderboard.kept_results`.
    """
    import pandas as pd

    rows = []
    for name in _predicted(folder, board):
        start, images, seed = parts_of(name)
        scores = _scores(folder, name, board)
        low, high = metrics.bootstrap_intervals(scores)["CIDEr"]
        said = systems.predictions_of(folder, name, board)[0]
        rows.append({"start": start, "images": images, "seed": seed, "CIDEr": scores.values["CIDEr"], "low": low,
                     "high": high, "distinct": len({caption for caption, in said.values()}), "signature": scores.signature})
    order = list(STARTS)
    rows.sort(key=lambda row: (row["images"], order.index(row["start"]), row["seed"]))
    return pd.DataFrame(rows)


def gains(folder: Path, board: str) -> Any:
    """What each start adds to the one before, on the same images for the same seed -> a DataFrame: start, images, seed,
    difference, low, high, p of the paired bootstrap of CIDEr over the set's images.
    """
    import pandas as pd

    order, names = list(STARTS), set(_predicted(folder, board))
    rows = []
    for start, images, seed in sorted(map(parts_of, names), key=lambda one: (one[1], order.index(one[0]), one[2])):
        before = name_of(order[order.index(start) - 1], images, seed)
        if start in CLAIMS and before in names:
            found = metrics.paired_bootstrap(_scores(folder, name_of(start, images, seed), board),
                                             _scores(folder, before, board), "CIDEr")
            rows.append({"start": start, "images": images, "seed": seed, "difference": found.difference, "low": found.low,
                         "high": found.high, "p": found.p})
    return pd.DataFrame(rows)


def _predicted(folder: Path, board: str) -> list[str]:
    end = f"-{board}.about.json"
    return [path.name.removesuffix(end) for path in sorted((Path(folder) / "predictions").glob(f"*{end}"))]


def _scores(folder: Path, name: str, board: str) -> metrics.Scores:
    return results.scored(folder, name, board, systems.main_segmentation(folder), ("CIDEr",))
