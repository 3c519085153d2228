"""Are the maps right? On drawn scenes it is known where every object stands, so that maps of object words can be checked.

Each word that rightly names an object gives two numbers: the share of its map's mass within the drawn box (or boxes), and
whether the map's highest point lies in it (the pointing game: Zhang et al. 2018, https://doi.org/10.1007/s11263-017-1059-x).
Both are read against the box's share of the image, which a map without any knowledge reaches, and against the same maps of
the same words from a model with random weights (Adebayo et al. 2018, https://arxiv.org/abs/1810.03292).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from clipcap_lib import checkpoint
from clipcap_lib.attention import METHODS, word_maps
from clipcap_lib.bootstrap import ratio_interval
from clipcap_lib.config import InputError, fingerprint
from clipcap_lib.corpora.scenes import object_words
from clipcap_lib.data import data_fingerprint, image_batches, load_prepared
from clipcap_lib.decode import caption
from clipcap_lib.files import read_json, write_json
from clipcap_lib.model import ClipCap

SIDE = 96  # pixels a side at which maps and boxes are laid over each other
Box = Sequence[float]  # x0, y0, x1, y1 as shares of width and height


def box_mask(boxes: Sequence[Box]) -> np.ndarray:
    """The pixels (SIDE, SIDE) of which at least the centre lies in one of the boxes."""
    centres = (np.arange(SIDE) + 0.5) / SIDE
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        mask |= ((centres >= y0) & (centres <= y1))[:, None] & ((centres >= x0) & (centres <= x1))[None]
    return mask


def mass_and_hit(weights: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """A map (h, w) over an image with a mask -> the share of its mass within the mask, and whether its peak lies there.

    Negative values count as nothing. A map without any mass, or with several highest points, is taken for what it is, a
    guess: its share is that of the mask, and its hit the share of its highest points that lie within.
    """
    cells = np.clip(np.asarray(weights, dtype=np.float32), 0, None)
    cells = cells / (cells.max() or 1.0)
    over = np.asarray(PIL.Image.fromarray(cells).resize((SIDE, SIDE), PIL.Image.Resampling.BILINEAR))
    if not over.sum() > 0:
        return float(mask.mean()), float(mask.mean())
    return float(over[mask].sum() / over.sum()), float(mask[over == over.max()].mean())


def true_boxes(scene: Mapping[str, Any], text: str, spans: Sequence[tuple[int, int]]) -> list[list[Box]]:
    """For each span of a caption, the boxes of the object that it names, or a part of it; [] where it names none."""
    named = [(first, end, [item["box"] for item in scene["objects"] if item["kind"] == kind])
             for kind, first, end in object_words(text)]
    return [[box for first, end, boxes in named if first < stop and start < end for box in boxes] for start, stop in spans]


def object_word_maps(models: Mapping[str, ClipCap], image: PIL.Image.Image, text: str, scene: Mapping[str, Any],
                     methods: Sequence[str] = METHODS) -> list[dict[str, Any]]:
    """Check the maps of one caption's object words under several models: a row for each word, model and method.

    text: the caption, written by the first model; scene: its truth. Words for objects that are not there are left out.
    """
    boxes: dict[str, list[Box]] = {}
    for item in scene["objects"]:
        boxes.setdefault(item["kind"], []).append(item["box"])
    words = [word for word in object_words(text) if word[0] in boxes]
    if not words:
        return []
    tokens = next(iter(models.values())).tokenizer.convert_tokens_to_ids(list(text))
    rows = []
    for name, model in models.items():
        found = word_maps(model, image, tokens, [(first, end) for _, first, end in words], methods)
        for method, maps in found.items():
            for (kind, first, end), weights in zip(words, maps, strict=True):
                mask = box_mask(boxes[kind])
                mass, hit = mass_and_hit(weights, mask)
                rows.append({"word": text[first:end], "kind": kind, "model": name, "method": method, "mass": mass,
                             "hit": hit, "box": float(mask.mean()), "nothing": not weights.max() > 0})
    return rows


def localisation(run: Path, folder: Path, name: str = "board-a", images: int = 200, seed: int = 0,
                 methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """Check the maps of the captioner `folder`/best on the first images of a drawn set -> what `summary` reads.

    Captions are the model's own, greedy. "random" is the same architecture with random weights from `seed`, asked about
    the same words. `images`: with at least one object named rightly. Kept in runs/<preset>/localisation. Raises InputError
    for a set whose truth is not known.
    """
    run, folder = Path(run), Path(folder)
    path = run / "data" / f"truth-{name}.json"
    if not path.is_file():
        raise InputError(f"{path}: no truth of drawn scenes for '{name}'; maps can be checked on the miniature boards only")
    origin = checkpoint.about(folder / "best")
    about = {"checkpoint": [origin["fingerprint"], origin["step"]], "set": name, "images": images, "seed": seed,
             "methods": list(methods), "data": data_fingerprint(run / "data"), "version": 2}
    kept = run / "localisation" / f"{folder.name}-{name}.json"
    if kept.is_file() and (found := read_json(kept))["fingerprint"] == fingerprint(about):
        return found
    model, truth = checkpoint.load(folder / "best"), read_json(path)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        models = {"trained": model, "random": ClipCap(model.config, model.tokenizer).eval()}
    rows: list[dict[str, Any]] = []
    looked_at: set[str] = set()
    for files, pictures in image_batches(load_prepared(run / "data", name)):
        if len(looked_at) == images:
            break
        for file, picture, text in zip(files, pictures, caption(model, model.tokenizer, pictures), strict=True):
            if len(looked_at) < images and (new := object_word_maps(models, picture, text, truth[file], methods)):
                rows += [{"file": file, **row} for row in new]
                looked_at.add(file)
    write_json(kept, {**about, "fingerprint": fingerprint(about), "images": len(looked_at), "rows": rows})
    return read_json(kept)


def summary(found: Mapping[str, Any]) -> Any:
    """The rows of `localisation` -> DataFrame, a row a method: shares averaged over images, with 95 % intervals.

    Columns: mass, box (a uniform map's mass), mass / box with its interval, mass of the random model, mass / random with its
    interval, hit and that of the random model, and nothing (maps without any mass), all shares from 0 to 1. Words of an
    image are averaged first; intervals are bootstrap intervals over images.
    """
    import pandas as pd

    by_image = pd.DataFrame(found["rows"]).groupby(["method", "model", "file"])[
        ["mass", "box", "hit", "nothing"]].mean()
    lines = {}
    for method in dict.fromkeys(row["method"] for row in found["rows"]):
        trained, control = (by_image.xs((method, model)) for model in ("trained", "random"))
        line = {"mass": trained.mass.mean(), "box": trained.box.mean(), "random mass": control.mass.mean(),
                "hit": trained.hit.mean(), "random hit": control.hit.mean(), "nothing": trained.nothing.mean()}
        for key, other in (("mass / box", trained.box), ("mass / random", control.mass)):
            line[key] = trained.mass.mean() / other.mean()
            line[f"{key}, low"], line[f"{key}, high"] = ratio_interval(trained.mass.to_numpy(), other.to_numpy())
        lines[method] = line
    return pd.DataFrame(lines).T
