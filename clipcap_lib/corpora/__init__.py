"""The five corpora of the original system, and tables of one's own: original formats in, records out.

A reader is a module of this package with one public function::

    read(folder: Path) -> Reading        or, where a corpus has several sets of captions:
    read(folder: Path, captions: str) -> Reading, and CAPTIONS, whose keys are the sets in the publisher's own names

It raises `InputError`, naming file and line, on what it cannot read, and lists in `Reading.left_out` what it understood
but left out, and why. Which corpora lie under a data root is decided by folder name: see `CORPORA`. A user's own table
is no corpus of a data root; `own_table` reads it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

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
    tags: tuple[str, ...] = ()  # what annotators named in the picture, in COCO-CN


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
    captions: dict[str, str] = field(default_factory=dict)  # split -> set of captions, where the corpus has several


T = TypeVar("T")


def read_corpora(data_root: Path, names: Iterable[str] | None = None,
                 captions: Mapping[str, str] | None = None) -> dict[str, Reading]:
    """Read the corpora whose folders lie under `data_root`: all that are there, or exactly `names`.

    `captions`: which of its sets of captions a corpus is read with, as `caption_choices` gives it. Raises InputError if
    the root holds none of them, lacks one that was asked for, or a choice of captions cannot be met.
    """
    data_root, names, captions = Path(data_root), list(names or ()), captions or {}
    if not data_root.is_dir():
        raise InputError(f"{data_root}: no such folder; give the folder that holds {', '.join(CORPORA)} as --data-root")
    for name in (*names, *(key.split("/")[0] for key in captions)):
        if name not in CORPORA:
            raise InputError(f"unknown corpus '{name}'; known are {', '.join(CORPORA)}")
        if not (data_root / name).is_dir():
            raise InputError(f"{data_root / name}: the corpus '{name}' was asked for and is not there; "
                             f"put its download in that folder or leave it out of --corpora and --captions")
    wanted = [name for name in CORPORA if (name in names if names else (data_root / name).is_dir())]
    if not wanted:
        raise InputError(f"{data_root}: holds no corpus; expected at least one of the folders {', '.join(CORPORA)}")
    if unread := [key for key in captions if key.split("/")[0] not in wanted]:
        raise InputError(f"--captions: '{unread[0]}' is of a corpus that is not read; add it to --corpora, or leave the "
                         "choice out")
    return {name: _read(name, data_root / name, captions) for name in wanted}


def caption_choices(texts: Iterable[str]) -> dict[str, str]:
    """["flickr8k-cn=zhb", "flickr8k-cn/test=zhm"] -> {"flickr8k-cn": "zhb", "flickr8k-cn/test": "zhm"}.

    A corpus is read with the set of captions named for it; a choice for one of its splits goes before that. Raises
    InputError on what is spelt otherwise, or on two choices for the same.
    """
    chosen: dict[str, str] = {}
    for text in texts:
        key, equals, which = text.partition("=")
        corpus, slash, split = key.partition("/")
        if not (equals and which and corpus) or (slash and split not in SPLITS):
            raise InputError(f"--captions: '{text}' is no choice of captions; expected <corpus>=<captions> or "
                             f"<corpus>/<split>=<captions>, such as flickr8k-cn=zhb flickr8k-cn/test=zhm")
        if key in chosen:
            raise InputError(f"--captions: '{key}' is chosen twice; give one set of captions for it")
        chosen[key] = which
    return chosen


def known_captions(corpus: str, sets: Mapping[str, T], which: str) -> T:
    """What `sets` holds under that name. Raises InputError naming the sets there are."""
    if which not in sets:
        raise InputError(f"unknown captions '{which}' of {corpus}; choose {', '.join(sets)}")
    return sets[which]


def _read(name: str, folder: Path, captions: Mapping[str, str]) -> Reading:
    """One corpus, with the captions chosen for it and for its splits."""
    module = importlib.import_module(f"{__name__}.{CORPORA[name]}")
    chosen = {key.partition("/")[2]: which for key, which in captions.items() if key.split("/")[0] == name}
    if chosen and not hasattr(module, "CAPTIONS"):
        raise InputError(f"--captions: {name} has one set of captions only; leave the choice out")
    reading = module.read(folder, chosen[""]) if "" in chosen else module.read(folder)
    for split, which in chosen.items():
        if split:
            reading = _with_split(reading, module.read(folder, which), name, split, which)
    return reading


def _with_split(reading: Reading, other: Reading, name: str, split: str, which: str) -> Reading:
    """`reading`, with one split as `other` has it."""
    taken, kept = ([r for r in records if (r.split == split) == mine]
                   for records, mine in ((other.records, True), (reading.records, False)))
    if not taken:
        raise InputError(f"--captions: the captions '{which}' of {name} cover no image of the {split} split; choose others")
    if both := {r.file_name for r in taken} & {r.file_name for r in kept}:
        raise InputError(f"--captions: '{min(both)}' is in the {split} split of '{which}' and in another one of the other "
                         f"captions of {name}; choose one set for all of its splits")
    left_out = dict.fromkeys([*reading.left_out, *other.left_out])  # both readings name what is wrong with the lists
    return Reading([*kept, *taken], list(left_out), {**reading.captions, split: which})
