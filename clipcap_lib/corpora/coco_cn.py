"""COCO-CN (li-xirong/coco-cn): Chinese sentences for 20,341 photos of MS-COCO, and an extension of 2020.

    <folder>/coco-cn-version1805v1.1/coco-cn_{train,val,test}.txt              one id a line
    <folder>/coco-cn-version1805v1.1/imageid.human-written-caption.txt         `<id>#<n><tab><sentence>`
    <folder>/coco-cn-version1805v1.1/imageid.manually-translated-caption.txt   likewise, test only
    <folder>/coco-cn-version1805v1.1/imageid.machine-translated-caption.bosonseg.txt
                                                                               `<id>#<n> word:POS word:POS`, all splits
    <folder>/coco-cn-version1805v1.1/imageid.human-written-tags.txt            `<id> tag tag ...`; optional
    <folder>/coco-cn_ext.icap2020.txt                                          as the captions; optional
    <folder>/train2014/<id>.jpg, val2014/<id>.jpg                              the photos, by the id's own prefix

The files may also lie in the folder itself. The extension trains: its new images join the training split, its sentences
of training images join theirs, and those of validation and test images are left out, so that references stay as
published. Tags are what annotators named in the picture; they go into the prepared data, and no one trains on them here.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from clipcap_lib.config import InputError
from clipcap_lib.corpora import LeftOut, Reading, known_captions
from clipcap_lib.corpora.flickr30k_cn import join_words
from clipcap_lib.corpora.lines import Captions, clean_id, find_file, holds_key, is_text, read_lines, read_splits

CORPUS = "coco-cn"
CAPTIONS = {  # how they came to be Chinese, their file, and which splits they cover
    "human-written": ("none", "imageid.human-written-caption.txt", ("train", "val", "test")),
    "manually-translated": ("human", "imageid.manually-translated-caption.txt", ("test",)),
    "machine-translated": ("machine", "imageid.machine-translated-caption.bosonseg.txt", ("train", "val", "test"))}
EXTENSION = "coco-cn_ext.icap2020.txt"
HELD_OUT = "extension sentence of a validation or test image"
TAGS = "imageid.human-written-tags.txt"
REPEATED_TAGS = "tags of the image are repeated"
NO_TAGS = "image has an empty list of tags"
BAD_TAGS = "tags are not valid text"
_ID = r"COCO_(?:train|val)2014_[0-9]+"
_LINE = re.compile(rf"(?P<id>{_ID}(?:\.jpg)?)#(?P<number>[0-9]{{1,4}})(?:\t(?P<text>.*))?")
# segmented, and the number may follow the name of the translation: "<id>#zhb#0 word:POS"
_SEGMENTED_LINE = re.compile(rf"(?P<id>{_ID}(?:\.jpg)?)#(?:zh[A-Za-z]*#)?(?P<number>[0-9]{{1,4}})(?:[ \t]+(?P<text>.*))?")
_TAG_LINE = re.compile(rf"(?P<id>{_ID}(?:\.jpg)?)(?:[ \t]+(?P<tags>.*))?")
_EXPECTED = "'COCO_train2014_<12 digits>#<n>', a tab, and a sentence"
_TAGGED = re.compile(r"\S+:[A-Za-z]+[0-9]*(?:\s+\S+:[A-Za-z]+[0-9]*)*")  # every word has its part of speech


def read(folder: Path, captions: str = "human-written", extension: bool = True) -> Reading:
    """Read the human-written sentences with the extension where it is there, or one of the translations instead."""
    how, name, covered = known_captions(CORPUS, CAPTIONS, captions)
    left_out: list[LeftOut] = []
    lists = {split: find_file(folder, f"coco-cn_{split}.txt") for split in covered}
    splits = read_splits(lists, left_out, _ID)
    found, path = Captions(left_out), find_file(folder, name)
    if captions == "machine-translated":
        found.add_file(path, _SEGMENTED_LINE, "'COCO_train2014_<12 digits>#<n> word:POS ...'",
                       lambda text: join_words(text, tagged=bool(_TAGGED.fullmatch(text.strip()))))
    else:
        found.add_file(path, _LINE, _EXPECTED)
    if extension and captions == "human-written":
        _extend(folder, splits, found)
    images = {f"COCO_{part}_": folder / part for part in ("train2014", "val2014")}
    records = found.records(CORPUS, splits, images, dict.fromkeys(lists, how))
    tags = _read_tags(folder, left_out)
    return Reading([replace(r, tags=tags.get(clean_id(r.file_name), ())) for r in records], left_out,
                   dict.fromkeys(lists, captions))


def _optional(folder: Path, name: str) -> Path | None:
    """The file of that name, if it came with the download."""
    return next((path for path in (folder / name, *sorted(folder.glob(f"*/{name}"))) if path.is_file()), None)


def _read_tags(folder: Path, left_out: list[LeftOut]) -> dict[str, tuple[str, ...]]:
    """The different tags of each image, in their order. Raises InputError naming a line that begins with no image id."""
    tags: dict[str, tuple[str, ...]] = {}
    path = _optional(folder, TAGS)
    for place, line in read_lines(path) if path else ():
        match = _TAG_LINE.fullmatch(line.strip())
        if not match:
            raise InputError(f"{place}: cannot make out image and tags in '{line.strip()[:60]}'; expected "
                             f"'COCO_train2014_<12 digits> tag tag ...'")
        identity, words = clean_id(match["id"]), (match["tags"] or "").split()
        if identity in tags:
            left_out.append(LeftOut(place, REPEATED_TAGS))
        elif not words:
            left_out.append(LeftOut(place, NO_TAGS))
        elif not is_text(match["tags"]) or holds_key(match["tags"]):
            left_out.append(LeftOut(place, BAD_TAGS))
        else:
            tags[identity] = tuple(dict.fromkeys(words))
    return tags


def _extend(folder: Path, splits: dict[str, str], found: Captions) -> None:
    """Add the sentences of the extension to the training split."""
    path = _optional(folder, EXTENSION)
    if path is None:
        return
    more = Captions(found.left_out).add_file(path, _LINE, _EXPECTED)
    for identity, sentences in more.of.items():
        place = more.first_place[identity]
        if splits.setdefault(identity, "train") != "train":
            found.left_out.append(LeftOut(place, HELD_OUT))
            continue
        first = max(found.of.get(identity, {-1: ""}), default=-1) + 1  # both files count from 0
        for offset, number in enumerate(sorted(sentences)):
            found.add(place, identity, first + offset, sentences[number])
