"""The five corpora of the original system: original formats in, records out.

A reader is a module of this package with one public function::

    read(folder: Path) -> Reading

It raises `InputError`, naming file and line, on what it cannot read, and lists in `Reading.left_out` what it understood
but left out, and why. Which corpora lie under a data root is decided by folder name: see `CORPORA`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from clipcap_lib.config import InputError

CORPORA = {  # folder name under the data root -> module of this package
    "flickr8k-cn": "flickr8k_cn",
    "flickr30k-cn": "flickr30k_cn",
    "aic-icc": "aic_icc",
    "hualu": "hualu",
    "coco-cn": "coco_cn",
}
SPLITS = ("train", "val", "test", "board-a", "board-b")
TRANSLATED = ("none", "human", "machine")  # how a caption came to be Chinese; "none": written in Chinese


@dataclass(frozen=True)
class Record:
    """One image with its captions, as the corpus gives them (order kept, surrounding white space removed)."""

    image: Path  # the image file; readers do not open it
    file_name: str  # its name in predictions and results, e.g. "667626_18933d713e.jpg"
    corpus: str  # a key of CORPORA
    split: str  # one of SPLITS
    captions: tuple[str, ...]  # may be empty on the boards only
    translated: str = "none"  # one of TRANSLATED


@dataclass(frozen=True)
class LeftOut:
    """Something a reader left out: where it stood, and why."""

    place: str  # "flickr8kzhc.caption.txt:1042" or a file name
    reason: str  # a short phrase, the same words for the same reason, so that reasons can be counted
    damaged: bool = False  # whether something is broken (as against: in no split), which `prepare` stops at


@dataclass(frozen=True)
class Reading:
    """What a reader found: records in a fixed order, and what it left out."""

    records: list[Record]
    left_out: list[LeftOut] = field(default_factory=list)


def read_corpora(data_root: Path, names: Iterable[str] | None = None) -> dict[str, Reading]:
    """Read the corpora whose folders lie under `data_root`: all that are there, or exactly `names`.

    Raises InputError if the root holds none of them, or lacks one that was asked for.
    """
    data_root = Path(data_root)
    if not data_root.is_dir():
        raise InputError(f"{data_root}: no such folder; give the folder that holds {', '.join(CORPORA)} as --data-root")
    for name in names or ():
        if name not in CORPORA:
            raise InputError(f"unknown corpus '{name}'; known are {', '.join(CORPORA)}")
        if not (data_root / name).is_dir():
            raise InputError(f"{data_root / name}: the corpus '{name}' was asked for and is not there; "
                             f"put its download in that folder or leave it out of --corpora")
    wanted = [name for name in CORPORA if (name in names if names else (data_root / name).is_dir())]
    if not wanted:
        raise InputError(f"{data_root}: holds no corpus; expected at least one of the folders {', '.join(CORPORA)}")
    return {name: importlib.import_module(f"{__name__}.{CORPORA[name]}").read(data_root / name) for name in wanted}
