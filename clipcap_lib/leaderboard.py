"""Predictions -> scores -> the boards' table. Every number in a table has a prediction file that it is recomputed from.

    runs/<preset>/predictions/<system>-<set>.json         {file: [caption]}, the original's res.json form
    runs/<preset>/predictions/<system>-<set>.about.json   which checkpoints, weights, rule, beam; how long it took
    runs/<preset>/scores/<system>-<set>.json              one row of the results: scores, intervals, signature, origin
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_lib import checkpoint, decode, metrics
from clipcap_lib.config import ENSEMBLE_WEIGHTS, ENSEMBLES, MODELS, Config, InputError, System, fingerprint
from clipcap_lib.corpora.slots import slot_accuracy
from clipcap_lib.data import image_batches, load_prepared
from clipcap_lib.prepare import evaluation_sets, read_json, write_json

ORIGINAL = {  # published by the authors; the organiser's metric is not documented
    "model1": {"board-a": 30.02}, "model2": {"board-a": 28.54}, "model3": {"board-a": 28.52},
    "model4": {"board-b": 19.78}, "1+2+3": {"board-a": 30.72, "board-b": 20.19}, "1+2+4": {"board-b": 20.49},
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


def load_system(run: Path, system: str, weights: Sequence[float] | None = None, rule: str = "probabilities",
                device: str = "cpu") -> decode.Stepper:
    """A trained model, or an ensemble with the original's weights unless others are given."""
    models = [checkpoint.load(Path(run) / "caption" / name / "best", device) for name in members_of(system)]
    return models[0] if len(models) == 1 else decode.Ensemble(models, weights or ENSEMBLE_WEIGHTS, rule)


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
    if path.is_file() and about_path.is_file() and read_json(about_path)["fingerprint"] == about["fingerprint"]:
        return read_json(path)
    stepper = load_system(run, system, weights, config.ensemble_rule, device)
    started, predictions = time.perf_counter(), {}
    tokenizer = (stepper.members[0] if len(members) > 1 else stepper).tokenizer
    for files, images in image_batches(load_prepared(run / "data", name)):
        captions = decode.caption(stepper, tokenizer, images, config.beam_size, config.max_length)
        predictions |= {file: [caption] for file, caption in zip(files, captions, strict=True)}
    seconds = time.perf_counter() - started
    about["milliseconds_per_image"] = 1000 * seconds / len(predictions)
    about["parameters"] = sum(sum(m.parameter_counts().values()) for m in getattr(stepper, "members", [stepper]))
    write_json(path, predictions)
    write_json(about_path, about)
    report(f"predict: {system} on {name}: {len(predictions)} images in {seconds:.1f} s -> {path.name}")
    return predictions


def shuffled(predictions: Mapping[str, list[str]], seed: int = 0) -> dict[str, list[str]]:
    """The control: every image gets the caption of another image, i.e. what the model says of a shuffled set."""
    files = sorted(predictions)
    order = np.random.default_rng(seed).permutation(len(files))
    after = {files[a]: files[b] for a, b in zip(order, np.roll(order, 1), strict=True)}  # one cycle: nobody keeps theirs
    return {file: predictions[after[file]] for file in files}


def row(run: Path, system: str, name: str) -> dict[str, Any]:
    """Score a prediction file -> one row of the results, with everything needed to recompute it."""
    run = Path(run)
    path = run / "predictions" / f"{system}-{name}.json"
    predictions, about = read_json(path), read_json(path.with_suffix(".about.json"))
    references = read_json(run / "data" / f"references-{name}.json")
    result: dict[str, Any] = {**about, "predictions": str(path.relative_to(run)),
                              "predictions_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                              "images": len(references)}
    for segmentation in SEGMENTATIONS:
        scores = metrics.score(predictions, references, segmentation)
        control = metrics.score(shuffled(predictions), references, segmentation, metrics=("CIDEr",))
        result[segmentation] = {"values": scores.values, "intervals": metrics.bootstrap_intervals(scores),
                                "shuffled_CIDEr": control.values["CIDEr"], "signature": scores.signature}
    truth_path = run / "data" / f"truth-{name}.json"
    if truth_path.is_file():
        truth = read_json(truth_path)
        for key, captions in (("slots", predictions), ("shuffled_slots", shuffled(predictions))):
            found = slot_accuracy(captions, truth)
            result[key] = {k: v for k, v in found.items() if k != "per_image"}
    result["diversity"] = metrics.diversity(predictions)
    return json.loads(json.dumps(result))


def score_system(run: Path, system: str, name: str) -> dict[str, Any]:
    """The row of a system on a set, from its file if its predictions have not changed."""
    run = Path(run)
    path, predictions = run / "scores" / f"{system}-{name}.json", run / "predictions" / f"{system}-{name}.json"
    if path.is_file() and predictions.is_file():
        kept = read_json(path)
        if kept["predictions_sha256"] == hashlib.sha256(predictions.read_bytes()).hexdigest():
            return kept
    result = row(run, system, name)
    write_json(path, result)
    return result


def rows(run: Path) -> list[dict[str, Any]]:
    """All rows that were scored, in the order of the table."""
    order = [*(system.name for system in MODELS), *ENSEMBLES]
    found = [read_json(path) for path in sorted((Path(run) / "scores").glob("*.json"))]
    return sorted(found, key=lambda r: (order.index(r["system"]) if r["system"] in order else 99, r["set"]))


def compare(run: Path, a: str, b: str, name: str, segmentation: str = "characters") -> metrics.Paired:
    """Paired bootstrap of CIDEr between two systems on one set: a minus b, with interval and p value."""
    references = read_json(Path(run) / "data" / f"references-{name}.json")
    scores = [metrics.score(read_json(Path(run) / "predictions" / f"{system}-{name}.json"), references, segmentation,
                            metrics=("CIDEr",)) for system in (a, b)]
    return metrics.paired_bootstrap(*scores, "CIDEr")


def table(run: Path, segmentation: str = "characters", metric: str = "CIDEr") -> Any:
    """The boards' table as a DataFrame: one line a system; score and interval on each set, beside the original's."""
    import pandas as pd

    found = rows(run)
    if not found:
        raise InputError(f"{run}: no scores yet; run notebook 05, or `python -m clipcap_lib leaderboard`")
    sets = [name for name in evaluation_sets(Path(run) / "data") if any(r["set"] == name for r in found)]
    lines = []
    for system in dict.fromkeys(r["system"] for r in found):
        line: dict[str, Any] = {"system": system}
        for name in sets:
            result = next((r for r in found if r["system"] == system and r["set"] == name), None)
            values = result[segmentation] if result else None
            line[f"{name} {metric}"] = values["values"][metric] if values else float("nan")
            line[f"{name} low"], line[f"{name} high"] = values["intervals"][metric] if values else (float("nan"),) * 2
        for name in ("board-a", "board-b"):
            line[f"original {name}"] = ORIGINAL.get(system, {}).get(name, float("nan"))
        lines.append(line)
    return pd.DataFrame(lines).set_index("system")


def formatted(frame: Any) -> Any:
    """The table as text: "71.3 [65.0, 77.1]", and "-" where there is no number."""
    import pandas as pd

    def number(value: float) -> str:
        return "-" if pd.isna(value) else f"{value:.2f}"

    columns: dict[str, list[str]] = {}
    for column in frame.columns:
        if column.startswith("original"):
            columns[column] = [number(v) for v in frame[column]]
        elif not column.endswith((" low", " high")):
            name = column.rsplit(" ", 1)[0]
            columns[column] = ["-" if pd.isna(v) else f"{v:.1f} [{low:.1f}, {high:.1f}]" for v, low, high in zip(
                frame[column], frame[f"{name} low"], frame[f"{name} high"], strict=True)]
    return pd.DataFrame(columns, index=frame.index)


def markdown(frame: Any) -> str:
    """A formatted table as Markdown."""
    text = frame.reset_index()
    lines = ["| " + " | ".join(text.columns) + " |", "|" + "---|" * len(text.columns)]
    return "\n".join(lines + ["| " + " | ".join(map(str, values)) + " |" for values in text.to_numpy()]) + "\n"


def export(run: Path, folder: Path, segmentation: str = "characters") -> list[Path]:
    """Write the boards' table as CSV (all digits) and Markdown (with its signatures) -> the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frame = table(run, segmentation)
    frame.to_csv(folder / "leaderboard.csv")
    signatures = sorted({r[segmentation]["signature"] for r in rows(run)})
    text = (f"{markdown(formatted(frame))}\nOurs: CIDEr x 100 with 95 % bootstrap intervals over images, "
            f"signature {'; '.join(f'`{s}`' for s in signatures)}.\nOriginal: as its authors published it; the "
            f"organiser's metric is not documented, so the two cannot be compared number by number.\n")
    (folder / "leaderboard.md").write_text(text, encoding="utf-8")
    return [folder / "leaderboard.csv", folder / "leaderboard.md"]


def verify(run: Path) -> list[str]:
    """Recompute every row from its prediction file -> what does not match (empty: all is well)."""
    problems = []
    for kept in rows(run):
        name = f"{kept['system']} on {kept['set']}"
        if not (Path(run) / kept["predictions"]).is_file():
            problems.append(f"{name}: its prediction file {kept['predictions']} is not there")
            continue
        again = row(run, kept["system"], kept["set"])
        problems += [f"{name}: {key} is not what its prediction file gives" for key in again if again[key] != kept[key]]
    return problems


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
    """CIDEr (characters) of every weighting on a grid of the simplex, on validation images -> DataFrame, kept in a file.

    Weights are multiples of 1 / steps that sum to one. Never run on a board: a board is for reporting.
    """
    import pandas as pd

    run = Path(run)
    models = [checkpoint.load(run / "caption" / name / "best") for name in members]
    origins = [checkpoint.about(run / "caption" / name / "best")["fingerprint"] for name in members]
    mark = fingerprint(origins, steps, images, config.ensemble_rule)
    path = run / "weights" / f"{'+'.join(members)}.json"
    if path.is_file() and (kept := read_json(path))["fingerprint"] == mark:
        return pd.DataFrame(kept["points"])
    rows = load_prepared(run / "data", "val")
    rows = rows.select(range(min(images, len(rows))))
    references = dict(zip(rows["file_name"][:], rows["captions"][:], strict=True))
    points = []
    for grid in itertools.product(range(steps + 1), repeat=len(members)):
        if sum(grid) != steps:
            continue
        ensemble = decode.Ensemble(models, grid, config.ensemble_rule)
        captions = [c for _, batch in image_batches(rows) for c in decode.caption(
            ensemble, models[0].tokenizer, batch, config.beam_size, config.max_length)]
        scores = metrics.score({file: [c] for file, c in zip(references, captions, strict=True)}, references,
                               "characters", metrics=("CIDEr",))
        points.append({**{name: part / steps for name, part in zip(members, grid, strict=True)},
                       "CIDEr": scores.values["CIDEr"]})
    write_json(path, {"fingerprint": mark, "points": points})
    return pd.DataFrame(points)


def evaluate(run: Path, config: Config, names: Iterable[str] | None = None, sets: Iterable[str] | None = None,
             device: str = "cpu", report: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Predict and score every system on every set (validation excepted) -> the rows."""
    for name in sets or boards(run):
        for system in names or systems(run):
            predict(run, config, system, name, device=device, report=report)
            score_system(run, system, name)
    return rows(run)
