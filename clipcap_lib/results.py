"""Predictions -> scores, a row each. Every number of a table has a prediction file that it is recomputed from.

    runs/<preset>/predictions/<system>-<set>.json         {file: [caption]}, the original's res.json form
    runs/<preset>/predictions/<system>-<set>.about.json   which checkpoints, weights, rule, beam; how long it took
    runs/<preset>/scores/<system>-<set>.json              one row of the results: scores, intervals, signature, origin
    runs/<preset>/scores/<system>-<set>.csv               the scores of every image

A system is a trained model, an ensemble, or one of `BASELINES`: ceiling and floors are predictions like any other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clipcap_lib import captions, checkpoint, cider, decode, meteor, metrics, rouge
from clipcap_lib.captions import main_nouns
from clipcap_lib.config import ENSEMBLE_WEIGHTS, ENSEMBLES, MODELS, Config, InputError, System, fingerprint
from clipcap_lib.corpora import slots
from clipcap_lib.corpora.things import KINDS
from clipcap_lib.data import image_batches, load_prepared
from clipcap_lib.embeddings import embed_images, embed_texts
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.model import ClipCap
from clipcap_lib.prepare import evaluation_sets, read_json, write_json

BASELINES = {  # what every table is read against
    "human": "human, one caption",
    "constant": "best constant caption",
    "shuffled": "{of}, other images",
}
SEGMENTATIONS = ("characters", "jieba")


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
    """The systems of the table that can be had: trained models in order, then ensembles of trained models."""
    trained = [system.name for system in MODELS if (Path(run) / "caption" / system.name / "done.json").is_file()]
    return trained + [name for name, members in ENSEMBLES.items() if set(members) <= set(trained)]


def main_segmentation(run: Path) -> str:
    """The segmentation that tables show first: characters for drawn corpora, jieba, the field's habit, for real ones."""
    return "characters" if read_json(Path(run) / "data" / "manifest.json")["drawn"] else "jieba"


@lru_cache
def _commit() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" where files differ; None outside of one."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=Path(__file__).parent,
                              capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


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
             "max_length": config.max_length, "seeds": [], "checkpoints": [],
             "data": read_json(run / "data" / "manifest.json")["fingerprint"]}
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
        said = decode.caption(stepper, tokenizer, images, config.beam_size, config.max_length)
        predictions |= {file: [caption] for file, caption in zip(files, said, strict=True)}
    seconds = time.perf_counter() - started
    about["milliseconds_per_image"] = 1000 * seconds / len(predictions)
    about["parameters"] = sum(sum(m.parameter_counts().values()) for m in getattr(stepper, "members", [stepper]))
    about |= {"config": fingerprint(config), "commit": _commit()}
    write_json(path, predictions)
    write_json(about_path, {**about, "predictions_sha256": _sha256(path)})
    report(f"predict: {system} on {name}: {len(predictions)} images in {seconds:.1f} s -> {path.name}")
    return predictions


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unchanged(path: Path, mark: str) -> bool:
    """Whether a prediction file is there as it was written by what has this fingerprint."""
    about = path.with_suffix(".about.json")
    if not (path.is_file() and about.is_file()):
        return False
    kept = read_json(about)
    return (kept["fingerprint"], kept.get("predictions_sha256")) == (mark, _sha256(path))


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
            caption, _ = metrics.best_constant_caption(references, _training_captions(run, manifest["fingerprint"]),
                                                       main_segmentation(run))
            predictions = {file: [caption] for file in references}
        write_json(path, predictions)
        write_json(path.with_suffix(".about.json"), {**about, "commit": _commit(), "predictions_sha256": _sha256(path)})
    return found


@lru_cache(maxsize=2)
def _training_captions(run: Path, data: str) -> tuple[str, ...]:
    """The different captions of the training split. `data`: its fingerprint, so that another one is read anew."""
    return tuple(dict.fromkeys(c for row in load_prepared(run / "data", "train")["captions"][:] for c in row))


@lru_cache(maxsize=32)
def _prepared(path: Path, stamp: int, human: bool, segmentation: str) -> metrics.References:
    references = metrics.load_captions(path)
    return metrics.prepare_references(metrics.one_against_the_others(references)[1] if human else references, segmentation)


def scored(run: Path, system: str, name: str, segmentation: str, only: Sequence[str] | None = None) -> metrics.Scores:
    """The scores of a prediction file, image by image. only: some metrics (all by default)."""
    path = Path(run) / "data" / f"references-{name}.json"
    if not path.is_file():
        raise InputError(f"{path}: no such references; prepare a set that has captions")
    prepared = _prepared(path, path.stat().st_mtime_ns, system == "human", segmentation)
    return metrics.score(Path(run) / "predictions" / f"{system}-{name}.json", prepared, metrics=only)


def slot_details(run: Path, system: str, name: str) -> list[dict[str, Any]]:
    """What each caption says of its drawn scene and what of that is right, see `slots.score_image`; [] for real images."""
    truth = Path(run) / "data" / f"truth-{name}.json"
    if not truth.is_file():
        return []
    predictions = read_json(Path(run) / "predictions" / f"{system}-{name}.json")
    return slots.slot_accuracy(predictions, read_json(truth))["per_image"]


def concepts(run: Path, name: str) -> dict[str, str]:
    """What each image of a set is about, in a word: the drawn scene's first object, or the noun of most references."""
    data = Path(run) / "data"
    if (data / f"truth-{name}.json").is_file():
        return {file: KINDS[scene["objects"][0]["kind"]].chinese
                for file, scene in read_json(data / f"truth-{name}.json").items()}
    return main_nouns(read_json(data / f"references-{name}.json"))


def row(run: Path, system: str, name: str) -> dict[str, Any]:
    """Score a prediction file -> one row of the results, with everything needed to recompute it."""
    return _row(run, system, name)[0]


def _row(run: Path, system: str, name: str) -> tuple[dict[str, Any], dict[str, metrics.Scores]]:
    run = Path(run)
    path = run / "predictions" / f"{system}-{name}.json"
    predictions, about = metrics.load_captions(path), read_json(path.with_suffix(".about.json"))
    if about.get("predictions_sha256") != _sha256(path):
        raise InputError(f"{path}: is not what {system} wrote; `leaderboard` without --verify predicts it again")
    all_scores = {segmentation: scored(run, system, name, segmentation) for segmentation in SEGMENTATIONS}
    result: dict[str, Any] = {**about, "predictions": str(path.relative_to(run)), "images": len(predictions)}
    references = run / "data" / f"references-{name}.json"
    for segmentation, scores in all_scores.items():
        prepared = _prepared(references, references.stat().st_mtime_ns, system == "human", segmentation)
        control = metrics.score(shuffled(predictions), prepared, metrics=("CIDEr",))
        result[segmentation] = {"values": scores.values, "intervals": metrics.bootstrap_intervals(scores),
                                "interval": metrics.INTERVAL, "shuffled_CIDEr": control.values["CIDEr"],
                                "signature": scores.signature, "counted": scores.counted}
    truth_path = run / "data" / f"truth-{name}.json"
    if truth_path.is_file():
        truth = read_json(truth_path)
        for key, given in (("slots", predictions), ("shuffled_slots", shuffled(predictions))):
            found = slots.slot_accuracy(given, truth)
            result[key] = {k: v for k, v in found.items() if k != "per_image"}
    result["diversity"] = metrics.diversity(predictions, _training_captions(run, about["data"]))
    return json.loads(json.dumps(result)), all_scores


def score_system(run: Path, system: str, name: str) -> dict[str, Any]:
    """The row of a system on a set, from its file if neither its predictions nor the way of scoring have changed."""
    run = Path(run)
    path, predictions = run / "scores" / f"{system}-{name}.json", run / "predictions" / f"{system}-{name}.json"
    if path.is_file() and path.with_suffix(".csv").is_file() and predictions.is_file():
        kept, about = read_json(path), read_json(predictions.with_suffix(".about.json"))
        if (all(kept.get(key) == value for key, value in about.items()) and kept["version"] == _scoring(run, name)
                and kept["predictions_sha256"] == _sha256(predictions)):
            return kept
    result, all_scores = _row(run, system, name)
    result["version"] = _scoring(run, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".csv").write_text(_per_image(all_scores), encoding="utf-8")
    write_json(path, result)  # last: it says that the other is whole
    return result


def _per_image(all_scores: Mapping[str, metrics.Scores]) -> str:
    """The scores of every image as CSV: a column a metric and segmentation."""
    import pandas as pd

    frame = pd.concat({key: pd.DataFrame.from_dict(scores.per_image, orient="index")
                       for key, scores in all_scores.items()}, axis=1)
    frame.columns = [f"{metric} ({segmentation})" for segmentation, metric in frame.columns]
    return frame.rename_axis("file").to_csv()


def differences(run: Path, kept: Mapping[str, Any]) -> list[str]:
    """What of a row its prediction file does not give: names of its entries, "scores of the images" among them."""
    again, all_scores = _row(run, kept["system"], kept["set"])
    path = Path(run) / "scores" / f"{kept['system']}-{kept['set']}.csv"
    wrong = [key for key in sorted({*again, *kept} - {"version"}) if key not in kept or again.get(key) != kept[key]]
    same = path.is_file() and path.read_text(encoding="utf-8") == _per_image(all_scores)
    return wrong if same else [*wrong, "scores of the images"]


def _scoring(run: Path, name: str) -> str:
    """Changes with whatever decides a score beside the predictions: the code of the scorer and the references."""
    rooms = [Path(module.__file__).read_bytes() for module in (captions, cider, meteor, metrics, rouge, slots)]
    references = (Path(run) / "data" / f"references-{name}.json").read_bytes()
    return hashlib.sha256(b"".join([*rooms, references])).hexdigest()[:12]


def rows(run: Path) -> list[dict[str, Any]]:
    """All rows that were scored, in the order of the table."""
    order = [*(system.name for system in MODELS), *ENSEMBLES, *BASELINES]
    found = [read_json(path) for path in sorted((Path(run) / "scores").glob("*.json"))]
    return sorted(found, key=lambda r: (order.index(r["system"]) if r["system"] in order else 99, r["set"]))


def compare(run: Path, a: str, b: str, name: str, segmentation: str = "characters",
            metric: str = "CIDEr") -> metrics.Paired:
    """Paired bootstrap of a metric between two systems on one set: a minus b, with interval and p value."""
    return metrics.paired_bootstrap(*(scored(run, system, name, segmentation, (metric,)) for system in (a, b)), metric)


def judged(run: Path, system: str, name: str, judge: Path) -> dict[str, Any]:
    """CLIP-zh of a system's captions on a set, by the encoders of checkpoint `judge`/best: no references needed.

    Returns score, interval, signature, images and per_image, {file: score}. Raises InputError if the judge is the system,
    has a part in it, or went on from the same checkpoint: a captioner that grew from a CLIP has learned to please it. Two
    CLIPs whose encoders share a warm-up may judge each other's captioners.
    """
    run, judge = Path(run), Path(judge)
    path, ancestors = run / "predictions" / f"{system}-{name}.json", _lineage(judge)
    for member in read_json(path.with_suffix(".about.json"))["members"]:
        if ancestors & _lineage(run / "caption" / member) or checkpoint.about(judge / "best")["fingerprint"] in _ancestry(
                run, run / "caption" / member):
            raise InputError(f"{judge}: {member} was trained from the same checkpoint, or is it; a model is not judged by "
                             f"its own encoder. Give a CLIP that it has no part in")
    predictions, about = read_json(path), checkpoint.about(judge / "best")
    model, files, images = _judging(judge, about["fingerprint"], about["step"], run / "data", name)
    texts = embed_texts(model, [predictions[file][0] for file in files])
    values = metrics.clip_score(images.cpu().numpy(), texts.cpu().numpy())
    return {"score": float(values.mean()), "interval": metrics.mean_interval(values), "images": len(files),
            "signature": f"CLIP-zh|w:1|prompt:none|judge:{judge.name}-{about['fingerprint']}@{about['step']}|"
                         f"images:{len(files)}",
            "per_image": dict(zip(files, values.tolist(), strict=True))}


@lru_cache(maxsize=1)
def _judging(judge: Path, mark: str, step: int, data: Path, name: str) -> tuple[ClipCap, list[str], Tensor]:
    """A judge, and a set's files with its embeddings of their images: seven systems are judged on the same ones."""
    model, rows = checkpoint.load(judge / "best"), load_prepared(data, name)
    return model, rows["file_name"][:], embed_images(model, rows)


def _ancestry(run: Path, folder: Path) -> set[str]:
    """The fingerprints of all checkpoints of the run that had a part in this one, however far back."""
    known = {about["fingerprint"]: about for about in map(checkpoint.about, run.glob("*/*/best"))}
    found, waiting = set(), _lineage(folder)
    while waiting:
        one = waiting.pop()
        found.add(one)
        waiting |= {start for start, _ in known.get(one, {"starts": []})["starts"]} - found
    return found


def _lineage(folder: Path) -> set[str]:
    """The fingerprints of a checkpoint and of those that it went on from."""
    about = checkpoint.about(Path(folder) / "best")
    return {about["fingerprint"], *(start for start, _ in about["starts"])}


def retrieval(run: Path, folder: Path, name: str, captions_per_image: int = 1) -> dict[str, Any]:
    """Recall both ways of the checkpoint `folder`/best among the images of set `name` and their captions, with chance.

    Texts are the first `captions_per_image` references of each image. Kept in runs/<preset>/retrieval.
    """
    from clipcap_lib.train import retrieval_of_set

    run, folder = Path(run), Path(folder)
    origin = checkpoint.about(folder / "best")
    about = {"checkpoint": [origin["fingerprint"], origin["step"]], "set": name, "captions_per_image": captions_per_image}
    path = run / "retrieval" / f"{folder.parent.name}-{folder.name}-{name}.json"
    if path.is_file() and (kept := read_json(path))["fingerprint"] == fingerprint(about):
        return kept
    references = read_json(run / "data" / f"references-{name}.json")
    recalls = retrieval_of_set(checkpoint.load(folder / "best"), load_prepared(run / "data", name), references,
                               captions_per_image)
    chance = {f"R@{k}": 100 * k / len(references) for k in (1, 5, 10)}
    write_json(path, {**about, "fingerprint": fingerprint(about), "images": len(references), "recalls": recalls,
                      "chance": chance})
    return read_json(path)


def search_weights(run: Path, config: Config, members: Sequence[str], steps: int = 4, images: int = 100) -> Any:
    """CIDEr of every weighting on a grid of the simplex, on validation images -> DataFrame, kept in a file with captions.

    Weights are multiples of 1 / steps that sum to one; segmentation is `main_segmentation`. Never run on a board: a board is
    for reporting.
    """
    import pandas as pd

    run, segmentation = Path(run), main_segmentation(run)
    origins = [checkpoint.about(run / "caption" / name / "best")["fingerprint"] for name in members]
    mark = fingerprint(origins, steps, images, config.ensemble_rule, config.beam_size, config.max_length, segmentation,
                       read_json(run / "data" / "manifest.json")["fingerprint"], _scoring(run, "val"))
    path = run / "weights" / f"{'+'.join(members)}.json"
    if not path.is_file() or read_json(path)["fingerprint"] != mark:
        models = [checkpoint.load(run / "caption" / name / "best") for name in members]
        rows = load_prepared(run / "data", "val")
        rows = rows.select(range(min(images, len(rows))))
        files, points = rows["file_name"][:], []
        for grid in itertools.product(range(steps + 1), repeat=len(members)):
            if sum(grid) != steps:
                continue
            ensemble = Ensemble(models, grid, config.ensemble_rule, members)
            said = [c for _, batch in image_batches(rows) for c in decode.caption(
                ensemble, models[0].tokenizer, batch, config.beam_size, config.max_length)]
            points.append({"weights": [part / steps for part in grid],
                           "captions": {file: [caption] for file, caption in zip(files, said, strict=True)}})
        for point in points:
            point["CIDEr"], signature = _validation_cider(run, point["captions"], segmentation)
        write_json(path, {"fingerprint": mark, "members": list(members), "segmentation": segmentation,
                          "signature": signature, "points": points})
    return pd.DataFrame([{**dict(zip(members, point["weights"], strict=True)), "CIDEr": point["CIDEr"]}
                         for point in read_json(path)["points"]])


def _validation_cider(run: Path, captions: Mapping[str, list[str]], segmentation: str) -> tuple[float, str]:
    references = metrics.load_captions(run / "data" / "references-val.json")
    scores = metrics.score(captions, {file: references[file] for file in captions}, segmentation, metrics=("CIDEr",))
    return scores.values["CIDEr"], scores.signature


def wrong_weights(run: Path) -> list[str]:
    """The weightings whose CIDEr is not that of the captions kept with them."""
    files = sorted((Path(run) / "weights").glob("*.json"))
    return [f"{path.stem}, weights {point['weights']} on validation images" for path in files
            for kept in [read_json(path)] for point in kept["points"]
            if _validation_cider(run, point["captions"], kept["segmentation"])[0] != point["CIDEr"]]


def evaluate(run: Path, config: Config, names: Iterable[str] | None = None, sets: Iterable[str] | None = None,
             device: str = "cpu", report: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Predict and score every system on every set (validation excepted), ceiling and floors included -> the rows."""
    for name in sets or boards(run):
        for system in names or systems(run):
            predict(run, config, system, name, device=device, report=report)
            score_system(run, system, name)
        for system in baselines(run, name):
            score_system(run, system, name)
    return rows(run)
