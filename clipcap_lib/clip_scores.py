"""What CLIP checkpoints tell of a set: whether captions fit their images, and how well image and text find each other."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clipcap_lib import checkpoint, metrics
from clipcap_lib.config import InputError, fingerprint
from clipcap_lib.data import data_fingerprint, load_prepared
from clipcap_lib.embeddings import embed_images, embed_texts, retrieval_of_set
from clipcap_lib.files import read_json, write_json
from clipcap_lib.model import ClipCap
from clipcap_lib.systems import predictions_of


def judged(run: Path, system: str, name: str, judge: Path) -> dict[str, Any]:
    """CLIP-zh of a system's captions on a set, by the encoders of checkpoint `judge`/best: no references needed.

    Returns score, interval, signature, images and per_image, {file: score}. Raises InputError if the judge is the system,
    has a part in it, or went on from the same checkpoint: a captioner that grew from a CLIP has learned to please it. Two
    CLIPs whose encoders share a warm-up may judge each other's captioners.
    """
    run, judge = Path(run), Path(judge)
    (predictions, origin), ancestors = predictions_of(run, system, name), _lineage(judge)
    for member in origin["members"]:
        if ancestors & _lineage(run / "caption" / member) or checkpoint.about(judge / "best")["fingerprint"] in _ancestry(
                run, run / "caption" / member):
            raise InputError(f"{judge}: {member} was trained from the same checkpoint, or is it; a model is not judged by "
                             f"its own encoder. Give a CLIP that it has no part in")
    about = checkpoint.about(judge / "best")
    model, files, images = _judging(judge, about["fingerprint"], about["step"], run / "data", name)
    texts = embed_texts(model, [predictions[file][0] for file in files])
    values = clip_score(images.cpu().numpy(), texts.cpu().numpy())
    return {"score": float(values.mean()), "interval": metrics.mean_interval(values), "images": len(files),
            "signature": f"CLIP-zh|w:1|prompt:none|judge:{judge.name}-{about['fingerprint']}@{about['step']}|"
                         f"images:{len(files)}",
            "per_image": dict(zip(files, values.tolist(), strict=True))}


def clip_score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Reference-free agreement of each image with its caption: unit-norm embeddings (N, D) and (N, D) -> (N,), x 100.

    The cosine, where it is positive, after Hessel et al. (2021), but neither their English prompt nor their factor 2.5,
    which suit another encoder: hence its own name here, CLIP-zh. Numbers of two judges do not compare.
    """
    images, texts = np.asarray(images, dtype=float), np.asarray(texts, dtype=float)
    if images.ndim != 2 or images.shape != texts.shape:
        raise InputError(f"embeddings {images.shape} and {texts.shape} must be two tables of one shape (N, D)")
    return 100 * np.clip((images * texts).sum(axis=1), 0, None)


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
    run, folder = Path(run), Path(folder)
    origin = checkpoint.about(folder / "best")
    about = {"checkpoint": [origin["fingerprint"], origin["step"]], "set": name, "captions_per_image": captions_per_image,
             "data": data_fingerprint(run / "data")}
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
