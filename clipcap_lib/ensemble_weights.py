"""The weights of an ensemble, searched on validation images and never on a board; kept in runs/<preset>/weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_lib import checkpoint, decode, metrics
from clipcap_lib.config import Config, InputError, fingerprint
from clipcap_lib.data import data_fingerprint, image_batches, load_prepared, spread
from clipcap_lib.ensemble import Ensemble
from clipcap_lib.files import read_json, write_json
from clipcap_lib.results import alike, scoring
from clipcap_lib.systems import main_segmentation


def weightings(members: int, steps: int = 4, samples: int = 0, seed: int = 0) -> list[list[float]]:
    """Weights that sum to one, for so many members: all multiples of 1 / steps, or `samples` of a flat Dirichlet.

    A grid holds every single member; for more than three of them, samples need far fewer points.
    """
    if steps < 1 or samples < 0:
        raise InputError(f"weights to search need steps of at least 1 or samples, not {steps} and {samples}")
    if samples:
        return np.random.default_rng(seed).dirichlet(np.ones(members), size=samples).tolist()
    return [[part / steps for part in grid] for grid in itertools.product(range(steps + 1), repeat=members)
            if sum(grid) == steps]


def search_weights(run: Path, config: Config, members: Sequence[str], steps: int = 4, images: int = 100,
                   samples: int = 0, seed: int = 0) -> Any:
    """CIDEr of every one of `weightings`, on so many validation images -> DataFrame, kept in a file with the captions.

    Segmentation is `main_segmentation`. Never run on a board: a board is for reporting.
    """
    import pandas as pd

    run, segmentation = Path(run), main_segmentation(run)
    origins = [checkpoint.about(run / "caption" / name / "best")["fingerprint"] for name in members]
    data = data_fingerprint(run / "data")
    mark = fingerprint(origins, [samples, seed] if samples else steps, ["spread", images], config.ensemble_rule,
                       config.beam_size, config.length_penalty, config.max_length, segmentation, data, scoring(run, "val"))
    path = run / "weights" / f"{'+'.join(members)}.json"
    if not path.is_file() or read_json(path)["fingerprint"] != mark:
        models = [checkpoint.load(run / "caption" / name / "best") for name in members]
        rows = spread(load_prepared(run / "data", "val"), images)
        files, points = rows["file_name"][:], []
        for weights in weightings(len(members), steps, samples, seed):
            ensemble = Ensemble(models, weights, config.ensemble_rule, members)
            said = [c for _, batch in image_batches(rows) for c in decode.caption(
                ensemble, models[0].tokenizer, batch, config.beam_size, config.max_length,
                length_penalty=config.length_penalty)]
            points.append({"weights": weights,
                           "captions": {file: [caption] for file, caption in zip(files, said, strict=True)}})
        for point in points:
            point["CIDEr"], signature = _validation_cider(run, point["captions"], segmentation)
        write_json(path, {"fingerprint": mark, "members": list(members), "segmentation": segmentation,
                          "signature": signature, "points": points})
    return pd.DataFrame([{**dict(zip(members, point["weights"], strict=True)), "CIDEr": point["CIDEr"]}
                         for point in read_json(path)["points"]])


def wrong_weights(run: Path) -> list[str]:
    """The weightings whose CIDEr is not that of the captions kept with them."""
    found = []
    for path in sorted((Path(run) / "weights").glob("*.json")):
        try:
            kept = read_json(path)
            found += [f"{path.stem}, weights {point['weights']} on validation images" for point in kept["points"]
                      if not alike(_validation_cider(run, point["captions"], kept["segmentation"])[0], point["CIDEr"])]
        except (KeyError, TypeError, InputError):  # of other references, or not what `search_weights` writes
            found.append(f"{path.stem}, weights on validation images")
    return found


def _validation_cider(run: Path, captions: Mapping[str, list[str]], segmentation: str) -> tuple[float, str]:
    references = metrics.load_captions(run / "data" / "references-val.json")
    scores = metrics.score(captions, {file: references[file] for file in captions}, segmentation, metrics=("CIDEr",))
    return scores.values["CIDEr"], scores.signature
