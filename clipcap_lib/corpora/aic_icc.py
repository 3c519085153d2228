"""AIC-ICC (AI Challenger 2017, image Chinese captioning): five captions an image, written in Chinese.

    <folder>/caption_train_annotations_20170902.json           beside caption_train_images_20170902/
    <folder>/caption_validation_annotations_20170910.json      beside caption_validation_images_20170910/

A file is a list of `{"url": ..., "image_id": "<40 hex digits>.jpg", "caption": ["...", ... five]}`. Either file will
do; they may lie in a subfolder, as the archives unpack.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipcap_lib.config import InputError
from clipcap_lib.corpora import LeftOut, Reading, Record
from clipcap_lib.corpora.lines import REPEATED_IMAGE, Captions, clean_id, find_file
from clipcap_lib.corpora.tables import read_json_list

CORPUS = "aic-icc"
PARTS = {"train": ("caption_train_annotations_20170902.json", "caption_train_images_20170902"),
         "val": ("caption_validation_annotations_20170910.json", "caption_validation_images_20170910")}


def read(folder: Path) -> Reading:
    """Read the training and the validation part, or the one that is there."""
    left_out: list[LeftOut] = []
    records: list[Record] = []
    there = {split: part for split, part in PARTS.items()
             if any(any(folder.glob(f"{place}{name}")) for place in ("", "*/") for name in part)}
    for split, (table, images) in (there or PARTS).items():
        path = find_file(folder, table)
        found = Captions(left_out)
        splits: dict[str, str] = {}
        for number, item in enumerate(read_json_list(path), start=1):
            place = f"{path}: record {number}"
            name, captions = _checked(place, item)
            if clean_id(name) in splits:
                left_out.append(LeftOut(place, REPEATED_IMAGE, damaged=True))
                continue
            splits[clean_id(name)] = split
            for index, caption in enumerate(captions):
                found.add(place, clean_id(name), index, caption)
        records += found.records(CORPUS, splits, {"": path.parent / images}, {split: "none"})
    return Reading(records, left_out)


def _checked(place: str, item: Any) -> tuple[str, list[str | None]]:
    """Image name and captions of a record. Raises InputError where it has another shape than the published one."""
    if not isinstance(item, dict):
        raise InputError(f"{place}: is a JSON {type(item).__name__}; expected an object with image_id and caption")
    for key in ("image_id", "caption"):
        if key not in item:
            raise InputError(f"{place}: has no '{key}'; expected an object with image_id and caption")
    name, captions = item["image_id"], item["caption"]
    if not isinstance(name, str):
        raise InputError(f"{place}: image_id is a JSON {type(name).__name__}; expected a file name")
    captions = [] if captions is None else captions
    if not isinstance(captions, list) or not all(caption is None or isinstance(caption, str) for caption in captions):
        raise InputError(f"{place}: caption is not a list of sentences; expected [\"...\", \"...\"]")
    return name, captions
