"""Predictions -> scores, a row each. Every number of a table has a prediction file that it is recomputed from.

    runs/<preset>/scores/<system>-<set>.json   one row of the results: scores, intervals, signature, origin
    runs/<preset>/scores/<system>-<set>.csv    the scores of every image
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clipcap_lib import bootstrap, captions, cider, meteor, metrics, rouge
from clipcap_lib.captions import main_nouns
from clipcap_lib.config import ENSEMBLES, MODELS, Config, InputError
from clipcap_lib.corpora import scenes, slots
from clipcap_lib.corpora.things import KINDS
from clipcap_lib.files import read_json, write_json
from clipcap_lib.systems import (
    BASELINES,
    baselines,
    boards,
    predict,
    predictions_of,
    sha256,
    shuffled,
    systems,
    training_captions,
)

SEGMENTATIONS = ("characters", "jieba")


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
    predictions, about = predictions_of(run, system, name)
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
            result[key] = {k: None if v != v else v for k, v in found.items() if k != "per_image"}  # JSON knows no NaN
    result["diversity"] = metrics.diversity(predictions, training_captions(run, about.get("data", "")))
    return json.loads(json.dumps(result)), all_scores


def score_system(run: Path, system: str, name: str) -> dict[str, Any]:
    """The row of a system on a set, from its file if neither its predictions nor the way of scoring have changed."""
    run = Path(run)
    path, predictions = run / "scores" / f"{system}-{name}.json", run / "predictions" / f"{system}-{name}.json"
    if path.is_file() and path.with_suffix(".csv").is_file() and predictions.is_file():
        kept, about = read_json(path), read_json(predictions.with_suffix(".about.json"))
        now = {**about, "version": scoring(run, name), "predictions_sha256": sha256(predictions)}
        if isinstance(kept, dict) and all(kept.get(key) == value for key, value in now.items()):
            return kept
    result, all_scores = _row(run, system, name)
    result["version"] = scoring(run, name)
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
    wrong = [key for key in sorted({*again, *kept} - {"version"}) if key not in kept or not alike(again.get(key), kept[key])]
    same = path.is_file() and same_csv(path.read_bytes(), _per_image(all_scores))
    return wrong if same else [*wrong, "scores of the images"]


def same_csv(content: bytes, expected: str) -> bool:
    """Whether a CSV file holds these cells, but for rounding."""
    return alike(_cells(content.decode("utf-8", "replace")), _cells(expected))


def _cells(text: str) -> list[list[Any]]:
    """CSV -> its rows, numbers as such."""
    def value(cell: str) -> Any:
        try:
            return float(cell)
        except ValueError:
            return cell

    return [[value(cell) for cell in row] for row in csv.reader(io.StringIO(text))]


def alike(a: Any, b: Any) -> bool:
    """Whether two values of JSON are the same but for rounding: other numbers of threads sum in another order.

    No number may be written as null or, in older files, NaN.
    """
    a, b = (math.nan if value is None else value for value in (a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))
    return a == b


def scoring(run: Path, name: str) -> str:
    """Changes with whatever decides a row beside the predictions: the code of the scorer, its libraries, the references."""
    rooms = [Path(module.__file__).read_bytes()
             for module in (bootstrap, captions, cider, meteor, metrics, rouge, scenes, slots)]
    libraries = [version(one).encode() for one in ("jieba", "pycocoevalcap", "clipcap-workbook")]
    references = (Path(run) / "data" / f"references-{name}.json").read_bytes()
    return hashlib.sha256(b"\0".join([*rooms, *libraries, references])).hexdigest()[:12]


def rows(run: Path) -> list[dict[str, Any]]:
    """All rows that were scored, in the order of the table: models, others by name, ensembles, ceiling and floors."""
    last = [*ENSEMBLES, *BASELINES]
    order = [system.name for system in MODELS]
    found = []
    for path in sorted((Path(run) / "scores").glob("*.json")):
        found.append(one := read_json(path))
        if not isinstance(one, dict) or not {"system", "set", "predictions", *SEGMENTATIONS} <= one.keys():
            raise InputError(f"{path}: no row of results; delete it, and `leaderboard` without --verify scores it again")
    order += [*sorted({one["system"] for one in found} - {*order, *last}), *last]
    return sorted(found, key=lambda one: (order.index(one["system"]), one["set"]))


def compare(run: Path, a: str, b: str, name: str, segmentation: str = "characters",
            metric: str = "CIDEr") -> metrics.Paired:
    """Paired bootstrap of a metric between two systems on one set: a minus b, with interval and p value."""
    return metrics.paired_bootstrap(*(scored(run, system, name, segmentation, (metric,)) for system in (a, b)), metric)


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
