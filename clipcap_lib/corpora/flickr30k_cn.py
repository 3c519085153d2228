"""Flickr30k-CN, in either of the two releases in circulation. The photos are Flickr30k's: `flickr30k-images/<id>.jpg`.

The release of Renmin University (Lan, Li and Dong, 2017), segmented; machine-translated but for the test split:

    <folder>/flickr30kzhbbosontrain/ImageSets/flickr30kzhbbosontrain.txt                one id a line
    <folder>/flickr30kzhbbosontrain/TextData/seg.flickr30kzhbbosontrain.caption.txt     `<id>#zhb#<n> word word`
    <folder>/flickr30kzhbbosonval/...        likewise
    <folder>/flickr30kzhmbosontest/...       `<id>#zhm#<n> word:POS word:POS`, translated by people

Flickr30k-CNA, translated anew by people; whole sentences after a tab or a space, images listed by their captions:

    <folder>/flickr30k_cna_train.txt, flickr30k_cna_val.txt, and flickr30k_cn_test.txt or flickr30k_cna_test.txt,
    also in a subfolder each                                                            `<id><tab><caption>`,
                                                                                        or `<id>#<n><tab><caption>`
"""

from __future__ import annotations

import re
from pathlib import Path

from clipcap_lib.config import InputError
from clipcap_lib.corpora import LeftOut, Reading, Record, known_captions
from clipcap_lib.corpora.lines import Captions, find_file, read_splits

CORPUS = "flickr30k-cn"
RUC = {"train": ("flickr30kzhbbosontrain", "machine"), "val": ("flickr30kzhbbosonval", "machine"),
       "test": ("flickr30kzhmbosontest", "human")}
CNA = {"train": ("flickr30k_cna_train.txt",), "val": ("flickr30k_cna_val.txt",),
       "test": ("flickr30k_cn_test.txt", "flickr30k_cna_test.txt")}
_CNA_LINE = re.compile(r"(?P<id>[0-9]+(?:\.jpg)?)(?:#(?:zh[a-z]#)?(?P<number>[0-9]{1,4}))?(?:[ \t]+(?P<text>.*))?")
_PART_OF_SPEECH = re.compile(r":[A-Za-z]+[0-9]*$")


def read(folder: Path, captions: str | None = None) -> Reading:
    """Read the release that is there ("ruc" before "cna"), or the one named. Splits that are not there are none."""
    if captions is None:
        captions = "ruc" if any((folder / name).is_dir() for name, _ in RUC.values()) else "cna"
    return known_captions(CORPUS, CAPTIONS, captions)(folder)


def _read_ruc(folder: Path) -> Reading:
    left_out: list[LeftOut] = []
    parts = {split: part for split, part in RUC.items() if (folder / part[0]).is_dir()}
    if not parts:
        raise InputError(f"{folder / RUC['train'][0]}: no such folder; unpack the release there, or leave the "
                         f"corpus out")
    lists = {split: find_file(folder / name, f"ImageSets/{name}.txt") for split, (name, _) in parts.items()}
    splits = read_splits(lists, left_out)
    found = Captions(left_out)
    for split, (name, _) in parts.items():
        tag = "zhm" if split == "test" else "zhb"
        line = re.compile(rf"(?P<id>[^#]+)#{tag}#(?P<number>[0-9]{{1,4}})(?:[ \t]+(?P<text>.*))?")
        found.add_file(find_file(folder / name, f"TextData/seg.{name}.caption.txt"), line,
                       f"'<id>#{tag}#<n> word word ...'", lambda text, tagged=split == "test": join_words(text, tagged))
    images = {"": folder / "flickr30k-images"}
    return Reading(found.records(CORPUS, splits, images, {split: how for split, (_, how) in parts.items()}), left_out,
                   dict.fromkeys(parts, "ruc"))


def _read_cna(folder: Path) -> Reading:
    left_out: list[LeftOut] = []
    records: list[Record] = []
    there = {split: names for split, names in CNA.items()
             if any((folder / name).is_file() or any(folder.glob(f"*/{name}")) for name in names)}
    if not there:
        raise InputError(f"{folder}: holds neither release of Flickr30k-CN; expected {RUC['train'][0]}/ or "
                         f"{CNA['train'][0]} and their like there, or leave the corpus out")
    splits: dict[str, str] = {}  # there are no lists: a split is what its captions name
    for split, names in there.items():
        found = Captions(left_out).add_file(find_file(folder, *names), _CNA_LINE,
                                            "an id, a tab or space, and a caption")
        for identity, place in found.first_place.items():
            if splits.setdefault(identity, split) != split:
                raise InputError(f"{place}: '{identity}' is in the {splits[identity]} split already; an image belongs "
                                 f"to one split, remove its lines from one of the two files")
        mine = dict.fromkeys(found.first_place, split)
        records += found.records(CORPUS, mine, {"": folder / "flickr30k-images"}, {split: "human"})
    return Reading(records, left_out, dict.fromkeys(there, "cna"))


CAPTIONS = {"ruc": _read_ruc, "cna": _read_cna}  # the release is the choice: each has captions of its own


def join_words(text: str, tagged: bool = False) -> str:
    """Segmented words as a sentence; `tagged`: strip each word's part of speech. Latin words stay apart.

    >>> join_words("两个:m 穿:v T-shirt:n 的:u 人:n", tagged=True)
    '两个穿T-shirt的人'
    """
    words = [_PART_OF_SPEECH.sub("", word) if tagged else word for word in text.split()]
    sentence = ""
    for word in words:
        latin = sentence[-1:].isascii() and sentence[-1:].isalnum() and word[:1].isascii() and word[:1].isalnum()
        sentence += f" {word}" if latin else word
    return sentence
