"""Which start needs fewer captioned images? The original's claims, asked of captioners that are fine-tuned on few.

    runs/<preset>/ablation/caption/<start>-<images>-seed<seed>   the captioners
    runs/<preset>/ablation/predictions                           what they say of a set
    figures/<preset>/ablation                                    kept: predictions, table.csv, gains.csv

The first is a run of its own that sees the preset's data: `train`, `systems` and `results` work on it as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from clipcap_lib import checkpoint, metrics, results, systems, train
from clipcap_lib.config import Config, InputError
from clipcap_lib.data import data_fingerprint, load_prepared
from clipcap_lib.files import read_json, writing

STARTS = {  # each adds one thing to the one before
    "random": "GPT of random weights",
    "language": "+ GPT trained on text",
    "encoder": "+ image encoder of CLIP",
    "shared": "+ GPT of CLIP (the method)",
}
COMPARISONS = {  # what is asked -> the start that has it, the start that lacks it
    "GPT trained on text": ("language", "random"),
    "image encoder of CLIP": ("encoder", "language"),
    "both: the second claim": ("encoder", "random"),
    "GPT of CLIP: the third claim": ("shared", "encoder"),
    "all: the method": ("shared", "random"),
}
FILES = ("table.csv", "gains.csv")
SHIPPED = Path(__file__).resolve().parents[1] / "figures"


def folder_of(run: Path) -> Path:
    """runs/<preset>/ablation, which sees the preset's data as its own."""
    folder, data = Path(run) / "ablation", Path("..") / "data"  # relative: runs may be moved
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # several processes begin at once
            (folder / "data").symlink_to(data, target_is_directory=True)
    if not ((folder / "data").is_symlink() and (folder / "data").readlink() == data):
        raise InputError(f"{folder / 'data'}: is not the link to {data} that it should be; take it away")
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

    "random" and "language" see with the encoder that CLIP pretraining began from. Fewer images are shown more often: by the
    square root of how many fewer they are, rounded up. Every start takes the same steps at the same rates, and nothing is
    frozen (`StageConfig.freeze`): what CLIP has not trained must be able to learn. The checkpoint of the best validation
    CIDEr counts, so that none is judged by what it has learned by heart. Warm-ups and CLIP have seen all training images and
    captions, and are the run's, whatever the seed: that is of the images drawn, their order and what begins at random.
    Raises InputError if a start is unknown or what it starts from has not been trained.
    """
    run = Path(run)
    if start not in STARTS:
        raise InputError(f"unknown start '{start}'; choose from {', '.join(STARTS)}")
    total = len(load_prepared(run / "data", "train", without))
    if not 0 < images <= total:
        raise InputError(f"{images} captioned images: there are {total} to train on")
    alike = replace(config.caption, freeze=(), visits=config.caption.visits * math.ceil(math.sqrt(total / images)))
    return train.train_stage("caption", replace(config, caption=alike), folder_of(run), name_of(start, images, seed), seed,
                             without, _starts(config, run, start, without), progress, begin, images)


def _starts(config: Config, run: Path, start: str, without: tuple[str, ...]) -> train.Starts:
    clip, text = (run / stage / train.training_set(without) for stage in ("clip", "language"))
    found: list[tuple[Path, tuple[str, ...]]] = []
    if start in ("encoder", "shared"):
        found.append((clip, ("image_encoder", "image_head")))
    elif train.has_image_warm_up(config, run):
        found.append((run / "image" / "labelled", ("image_encoder",)))
    if start == "shared":
        found.append((clip, ("gpt",)))
    elif start != "random" and config.language.epochs:
        found.append((text, ("gpt",)))
    for folder, _ in found:
        if not ((folder / "done.json").is_file() and checkpoint.exists(folder / "best")):
            raise InputError(f"{folder}: nothing trained here; run `python -m clipcap_lib train --stage clip` first")
    return [(folder / "best", parts) for folder, parts in found]


def starts_of(config: Config) -> list[str]:
    """The starts that the settings know: without "language" where the GPT has neither a warm-up nor pretrained weights, and
    without "random" where it has pretrained ones, which bring a vocabulary of their own."""
    if config.gpt_weights != "random":
        return [start for start in STARTS if start != "random"]
    return [start for start in STARTS if start != "language" or config.language.epochs]


def captioners(config: Config, run: Path, sizes: Sequence[int], seeds: Sequence[int], without: tuple[str, ...] = (),
               progress: train.Progress = lambda line: None) -> list[Path]:
    """Fine-tune from every start on so many images, for every seed -> their folders. What is done is not done again."""
    starts = starts_of(config)

    def tell(line: dict[str, Any]) -> None:
        progress({key: value for key, value in line.items() if key != "warning"})  # of retrieval: not the question here

    return train.side_by_side([partial(captioner, config, run, start, images, seed, without)
                               for seed in seeds for images in sizes for start in starts], tell)


def predict(config: Config, run: Path, names: Sequence[str], board: str, device: str = "cpu",
            report: Callable[[str], None] = print) -> None:
    """Let captioners caption the set `board`, as `systems.predict` does, and say so in one line."""
    said: list[str] = []
    for name in names:
        systems.predict(folder_of(run), config, name, board, device=device, report=said.append)
    report(f"ablation: {len(names)} captioners on {board}: {len(said)} predicted, {len(names) - len(said)} done before")


def table(folder: Path, board: str, names: Sequence[str] | None = None) -> Any:
    """What captioners (by default all) said of `board` -> a DataFrame, a line a captioner: start, images, seed, set, CIDEr
    x 100, low, high (95 % bootstrap interval over the set's images), distinct (different captions), and what CIDEr is read
    against: shuffled (each image with another one's caption) and constant (the best single training caption), signature.

    folder: `folder_of` a run, or one of `leaderboard.kept_results`.
    """
    path, segmentation = Path(folder) / "data" / f"references-{board}.json", systems.main_segmentation(folder)
    references, rows = metrics.prepare_references(path, segmentation), []
    captions = systems.training_captions(Path(folder), data_fingerprint(Path(folder) / "data"))
    _, constant = metrics.best_constant_caption(read_json(path), captions, segmentation)
    for start, images, seed in _predicted(folder, board, names):
        name = name_of(start, images, seed)
        scores, said = _scores(folder, name, board), systems.predictions_of(folder, name, board)[0]
        low, high = metrics.bootstrap_intervals(scores)["CIDEr"]
        shuffled = metrics.score(systems.shuffled(said), references, metrics=("CIDEr",))
        rows.append({"start": start, "images": images, "seed": seed, "set": board, "CIDEr": scores.values["CIDEr"],
                     "low": low, "high": high, "distinct": len({caption for caption, in said.values()}),
                     "shuffled": shuffled.values["CIDEr"], "constant": constant, "signature": scores.signature})
    return _frame(rows, ["CIDEr", "low", "high", "distinct", "shuffled", "constant", "signature"], "start")


def gains(folder: Path, board: str, names: Sequence[str] | None = None) -> Any:
    """What each of COMPARISONS gains on `board`, for the same seed and so from the same images -> a DataFrame: comparison,
    images, seed, set, and difference, low, high, p of the paired bootstrap of CIDEr over the set's images.
    """
    there, rows = _predicted(folder, board, names), []
    for comparison, (has, lacks) in COMPARISONS.items():
        for start, images, seed in there:
            if start == has and (lacks, images, seed) in there:
                found = metrics.paired_bootstrap(*(_scores(folder, name_of(one, images, seed), board)
                                                   for one in (has, lacks)), "CIDEr")
                rows.append({"comparison": comparison, "images": images, "seed": seed, "set": board,
                             "difference": found.difference, "low": found.low, "high": found.high, "p": found.p})
    return _frame(rows, ["difference", "low", "high", "p"], "comparison")


def summary(gains: Any) -> Any:
    """`gains` over seeds -> a DataFrame by comparison and images: seeds, mean, least and most of the differences, and for
    how many seeds the interval over images lies above 0 and below.
    """
    marked = gains.assign(above=gains["low"] > 0, below=gains["high"] < 0)
    return marked.groupby(["comparison", "images"], sort=False).agg(
        seeds=("seed", "size"), mean=("difference", "mean"), least=("difference", "min"), most=("difference", "max"),
        above=("above", "sum"), below=("below", "sum"))


def between_seeds(table: Any) -> float:
    """How far two seeds of one start and number of images lie apart in CIDEr, the mean over all such pairs: the chance of
    training. NaN with one seed.
    """
    apart = [abs(a - b) for _, rows in table.groupby(["start", "images"]) for a, b in combinations(rows["CIDEr"], 2)]
    return sum(apart) / len(apart) if apart else math.nan


def export(folder: Path, output: Path) -> None:
    """Write table.csv and gains.csv of all that was predicted."""
    with writing(output):
        Path(output).mkdir(parents=True, exist_ok=True)
        for name, content in _files(folder).items():
            (Path(output) / name).write_text(content, encoding="utf-8")


def kept(preset: str) -> tuple[Any, Any] | None:
    """Table and gains of a preset that come with the workbook, in figures/<preset>/ablation; None where there are none."""
    import pandas as pd

    files = [SHIPPED / preset / "ablation" / name for name in FILES]
    return tuple(map(pd.read_csv, files)) if all(file.is_file() for file in files) else None


def wrong(folder: Path, output: Path) -> list[str]:
    """What of the files of `export` in `output` the predictions in `folder` do not give ([]: all well)."""
    return [f"{path}: is not what the predictions give; `ablation.export` writes it again"
            for name, content in _files(folder).items()
            if not ((path := Path(output) / name).is_file() and results.same_csv(path.read_bytes(), content))]


def _files(folder: Path) -> dict[str, str]:
    import pandas as pd

    sets = sorted({read_json(path)["set"] for path in (Path(folder) / "predictions").glob("*.about.json")})
    return {name: pd.concat([tell(folder, board) for board in sets]).to_csv(index=False)
            for name, tell in zip(FILES, (table, gains), strict=True)}


def _frame(rows: list[dict[str, Any]], columns: list[str], first: str) -> Any:
    import pandas as pd

    return pd.DataFrame(rows, columns=[first, "images", "seed", "set", *columns])


def _predicted(folder: Path, board: str, names: Sequence[str] | None) -> list[tuple[str, int, int]]:
    """start, images and seed of every captioner that has predicted `board`, by number of images, starts in their order."""
    order, end = list(STARTS), f"-{board}.about.json"
    there = {path.name.removesuffix(end) for path in (Path(folder) / "predictions").glob(f"*{end}")}
    found = [parts_of(name) for name in (there if names is None else there & set(names))]
    return sorted(found, key=lambda one: (one[1], order.index(one[0]), one[2]))


def _scores(folder: Path, name: str, board: str) -> metrics.Scores:
    return results.scored(folder, name, board, systems.main_segmentation(folder), ("CIDEr",))
