"""COCO-CN (li-xirong/coco-cn): Chinese sentences for 20,342 photos of MS-COCO, and an extension of 2020.

    <folder>/coco-cn-version1805v1.1/coco-cn_{train,val,test}.txt              one id a line
    <folder>/coco-cn-version1805v1.1/imageid.human-written-caption.txt         `<id>#<n><tab><sentence>`
    <folder>/coco-cn-version1805v1.1/imageid.manually-translated-caption.txt   likewise, test only
    <folder>/coco-cn_ext.icap2020.txt                                          likewise; optional
    <folder>/train2014/<id>.jpg, val2014/<id>.jpg                              the photos, by the id's own prefix

The files may also lie in the folder itself. The extension trains: its new images join the training split, its sentences
of training images join theirs, and those of validation and test images are left out, so that references stay as
published.
"""

from __future__ import annotations

import re
from pathlib import Path

from clipcap_lib.config import InputError
from clipcap_lib.corpora import LeftOut, Reading
from clipcap_lib.corpora.lines import Captions, find_file, read_splits

CORPUS = "coco-cn"
CAPTIONS = {"human-written": "none", "manually-translated": "human"}
EXTENSION = "coco-cn_ext.icap2020.txt"
HELD_OUT = "extension sentence of a validation or test image"
_ID = r"COCO_(?:train|val)2014_[0-9]+"
_LINE = re.compile(rf"(?P<id>{_ID}(?:\.jpg)?)#(?P<number>[0-9]{{1,4}})(?:\t(?P<text>.*))?")
_EXPECTED = "'COCO_train2014_<12 digits>#<n>', a tab, and a sentence"


def read(folder: Path, captions: str = "human-written", extension: bool = True) -> Reading:
    """Read the human-written sentences with the extension where it is there, or "manually-translated" (test only)."""
    if captions not in CAPTIONS:
        raise InputError(f"unknown captions '{captions}' of {CORPUS}; choose {', '.join(CAPTIONS)}")
    translated = captions == "manually-translated"
    left_out: list[LeftOut] = []
    lists = {split: find_file(folder, f"coco-cn_{split}.txt")
             for split in (("test",) if translated else ("train", "val", "test"))}
    splits = read_splits(lists, left_out, _ID)
    found = Captions(left_out).add_file(find_file(folder, f"imageid.{captions}-caption.txt"), _LINE, _EXPECTED)
    if extension and not translated:
        _extend(folder, splits, found)
    images = {f"COCO_{part}_": folder / part for part in ("train2014", "val2014")}
    return Reading(found.records(CORPUS, splits, images, dict.fromkeys(lists, CAPTIONS[captions])), left_out)


def _extend(folder: Path, splits: dict[str, str], found: Captions) -> None:
    """Add the sentences of the extension to the training split."""
    paths = [path for path in (folder / EXTENSION, *sorted(folder.glob(f"*/{EXTENSION}"))) if path.is_file()]
    if not paths:
        return
    more = Captions(found.left_out).add_file(paths[0], _LINE, _EXPECTED)
    for identity, sentences in more.of.items():
        place = more.first_place[identity]
        if splits.setdefault(identity, "train") != "train":
            found.left_out.append(LeftOut(place, HELD_OUT))
            continue
        first = max(found.of.get(identity, {-1: ""}), default=-1) + 1  # both files count from 0
        for offset, number in enumerate(sorted(sentences)):
            found.add(place, identity, first + offset, sentences[number])
