"""The systems of the boards' table, and what they say of a set: a file of predictions each.

    runs/<preset>/predictions/<system>-<set>.json         {file: [caption]}, the original's res.json form
    runs/<preset>/predictions/<system>-<set>.about.json   which checkpoints, weights, rule, beam; how long it took

A system is a trained model, an ensemble, or one of `BASELINES`: ceiling and floors are predictions like any other.
"""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_lib import checkpoint, decode, metrics
from clipcap_lib.config import ENSEMBLE_WEIGHTS, ENSEMBLES, MODELS, Config, InputError, System, fingerprint
from clipcap_lib.data import data_fingerprint, image_batches, load_prepared
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.files import read_json, write_json
from clipcap_lib.prepare import evaluation_sets

BASELINES = {  # what every table is read against
    "human": "human, one caption",
    "constant": "best constant caption",
    "shuffled": "{of}, other images",
}


def members_of(system: str) -> tuple[str, ...]:
    """("model1",) for a model, three names for "1+2+3"."""
    return ENSEMBLES.get(system, (system,))


def boards(run: Path) -> list[str]:
    """The sets that are reported: boards first, then test; never validation."""
    return [name for name in evaluation_sets(Path(run) / "data") if name != "val"]


def planned(run: Path, config: Config) -> list[System]:
    """The models that the notebooks train on what was prepared: without COCO-CN there is no model4 to compare."""
    there = {key.split("/")[0] for key in read_json(Path(run) / "data" / "manifest.json")["images"]}
    chosen = [system for system in MODELS if system.name in config.models]
    if "coco-cn" not in there:
        chosen = [system for system in chosen if "coco-cn" in system.without]
    return [replace(system, without=tuple(c for c in system.without if c in there)) for system in chosen]


def systems(run: Path) -> list[str]:
    """The systems of the table that can be had: trained models in order, others by name, then ensembles of them."""
    planned_names = [system.name for system in MODELS]
    trained = [path.parent.name for path in sorted((Path(run) / "caption").glob("*/done.json"))]
    trained.sort(key=lambda name: planned_names.index(name) if name in planned_names else len(planned_names))
    return trained + [name for name, members in ENSEMBLES.items() if set(members) <= set(trained)]


def main_segmentation(run: Path) -> str:
    """The segmentation that tables show first: characters for drawn corpora, jieba, the field's habit, for real ones."""
    return "characters" if read_json(Path(run) / "data" / "manifest.json")["drawn"] else "jieba"


def load_system(run: Path, system: str, weights: Sequence[float] | None = None, rule: str = "probabilities",
                device: str = "cpu") -> decode.Stepper:
    """A trained model, or an ensemble with the original's weights unless others are given."""
    names = members_of(system)
    models = [checkpoint.load(Path(run) / "caption" / name / "best", device) for name in names]
    return models[0] if len(models) == 1 else Ensemble(models, weights or ENSEMBLE_WEIGHTS, rule, names)


def predict(run: Path, config: Config, system: str, name: str, weights: Sequence[float] | None = None,
            device: str = "cpu", report: Callable[[str], None] = print) -> dict[str, list[str]]:
    """Caption the prepared set `name` with `system` -> {file: [caption]}; from its file if nothing has changed."""
    run, members = Path(run), members_of(system)
    weights = list(weights or ENSEMBLE_WEIGHTS) if len(members) > 1 else [1.0]
    path = run / "predictions" / f"{system}-{name}.json"
    about = {"system": system, "set": name, "members": list(members), "weights": weights,
             "rule": config.ensemble_rule if len(members) > 1 else None, "beam_size": config.beam_size,
             "length_penalty": config.length_penalty, "max_length": config.max_length, "seeds": [], "checkpoints": [],
             "data": data_fingerprint(run / "data")}
    for member in members:
        origin = checkpoint.about(run / "caption" / member / "best")
        about["seeds"].append(origin["seed"])
        about["checkpoints"].append([origin["fingerprint"], origin["step"]])
    about["fingerprint"] = fingerprint(about)
    about_path = path.with_suffix(".about.json")
    if _unchanged(path, about["fingerprint"]):
        return read_json(path)
    stepper = load_system(run, system, weights, config.ensemble_rule, device)
    started, predictions = time.perf_counter(), {}
    tokenizer = (stepper.members[0] if len(members) > 1 else stepper).tokenizer
    for files, images in image_batches(load_prepared(run / "data", name)):
        said = decode.caption(stepper, tokenizer, images, config.beam_size, config.max_length,
                              length_penalty=config.length_penalty)
        predictions |= {file: [caption] for file, caption in zip(files, said, strict=True)}
    seconds = time.perf_counter() - started
    about["milliseconds_per_image"] = 1000 * seconds / len(predictions)
    about["parameters"] = sum(sum(m.parameter_counts().values()) for m in getattr(stepper, "members", [stepper]))
    about |= {"config": fingerprint(config), "commit": commit()}
    write_json(path, predictions)
    write_json(about_path, {**about, "predictions_sha256": sha256(path)})
    report(f"predict: {system} on {name}: {len(predictions)} images in {seconds:.1f} s -> {path.name}")
    return predictions


def shuffled(predictions: Mapping[str, list[str]], seed: int = 0) -> dict[str, list[str]]:
    """The control: every image gets the caption of another image, i.e. what the model says of a shuffled set."""
    files = sorted(predictions)
    order = np.random.default_rng(seed).permutation(len(files))
    after = {files[a]: files[b] for a, b in zip(order, np.roll(order, 1), strict=True)}  # one cycle: nobody keeps theirs
    return {file: predictions[after[file]] for file in files}


def references_of(run: Path, system: str, name: str) -> dict[str, list[str]]:
    """What a system is scored against on a set: all captions, but for "human" those that it does not say itself."""
    references = read_json(Path(run) / "data" / f"references-{name}.json")
    return metrics.one_against_the_others(references)[1] if system == "human" else references


def baselines(run: Path, name: str) -> list[str]:
    """Write the predictions of ceiling and floors on a set, where they have changed -> those that can be had.

    "human": the first caption of each image, to be scored against its others. "constant": the one training caption with
    the highest CIDEr on this set, chosen with the references in hand: what can be had without looking. "shuffled": the
    first trained model's captions, each given to another image.
    """
    run, found = Path(run), []
    references = references_of(run, "", name)
    manifest = read_json(run / "data" / "manifest.json")
    model = next((m for m in systems(run) if (run / "predictions" / f"{m}-{name}.json").is_file()), None)
    for system in BASELINES:
        about: dict[str, Any] = {"system": system, "set": name, "members": [], "weights": [], "seeds": [],
                                 "data": manifest["fingerprint"]}
        if (model is None if system == "shuffled" else system == "human" and min(map(len, references.values())) < 2):
            continue
        if system == "shuffled":
            predictions = shuffled(read_json(run / "predictions" / f"{model}-{name}.json"))
            about |= {"of": model, "members": [model]}
        path = run / "predictions" / f"{system}-{name}.json"
        about["fingerprint"] = fingerprint(about, predictions if system == "shuffled" else None)
        found.append(system)
        if _unchanged(path, about["fingerprint"]):
            continue
        if system == "human":
            predictions = metrics.one_against_the_others(references)[0]
        elif system == "constant":
            caption, _ = metrics.best_constant_caption(references, training_captions(run, manifest["fingerprint"]),
                                                       main_segmentation(run))
            predictions = {file: [caption] for file in references}
        write_json(path, predictions)
        write_json(path.with_suffix(".about.json"), {**about, "commit": commit(), "predictions_sha256": sha256(path)})
    return found


@lru_cache(maxsize=2)
def training_captions(run: Path, data: str) -> tuple[str, ...]:
    """The different captions of the training split. `data`: its fingerprint, so that another one is read anew."""
    return tuple(dict.fromkeys(c for row in load_prepared(run / "data", "train")["captions"][:] for c in row))


@lru_cache
def commit() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" where files differ; None outside of one."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).parent,
                              capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def predictions_of(run: Path, system: str, name: str) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """A prediction file and what is kept about it. Raises InputError if it is not what the system wrote."""
    path = Path(run) / "predictions" / f"{system}-{name}.json"
    predictions, about = metrics.load_captions(path), read_json(path.with_suffix(".about.json"))
    if not isinstance(about, dict) or about.get("predictions_sha256") != sha256(path):
        raise InputError(f"{path}: is not what {system} wrote; `leaderboard` without --verify predicts it again")
    return predictions, about


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unchanged(path: Path, mark: str) -> bool:
    """Whether a prediction file is there as it was written by what has this fingerprint."""
    about = path.with_suffix(".about.json")
    if not (path.is_file() and about.is_file()):
        return False
    kept = read_json(about)
    return (kept["fingerprint"], kept.get("predictions_sha256")) == (mark, sha256(path))
