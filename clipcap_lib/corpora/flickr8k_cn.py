"""Flickr8k-CN (li-xirong/flickr8kcn): 8,000 photos in three splits, five captions each.

    <folder>/data/flickr8ktrain.txt, flickr8kval.txt, flickr8ktest.txt   one id a line
    <folder>/data/flickr8kzhc.caption.txt                                written in Chinese
    <folder>/data/flickr8kzhb.caption.txt, flickr8kzhg.caption.txt       machine-translated, by Baidu and by Google
    <folder>/data/flickr8kzhmtest.captions.txt                           translated by people, test only
    <folder>/Flicker8k_Dataset/<id>.jpg                                  (sic)

A caption line: `667626_18933d713e.jpg#zhc#0 一个穿着泳装的女人躺在海水里。`
"""

from __future__ import annotations

import re
from pathlib import Path

from clipcap_lib.corpora import LeftOut, Reading, known_captions
from clipcap_lib.corpora.lines import Captions, find_file, read_splits

CORPUS = "flickr8k-cn"
CAPTIONS = {"zhc": ("flickr8kzhc.caption.txt", "none"), "zhb": ("flickr8kzhb.caption.txt", "machine"),
            "zhg": ("flickr8kzhg.caption.txt", "machine"), "zhm": ("flickr8kzhmtest.captions.txt", "human")}


def read(folder: Path, captions: str = "zhc") -> Reading:
    """Read the corpus with its human-written captions ("zhc"), or "zhb", "zhg" or "zhm" (test only) instead."""
    name, translated = known_captions(CORPUS, CAPTIONS, captions)
    left_out: list[LeftOut] = []
    lists = {split: find_file(folder, f"data/flickr8k{split}.txt", f"flickr8k{split}.txt")
             for split in (("test",) if captions == "zhm" else ("train", "val", "test"))}
    splits = read_splits(lists, left_out)
    line = re.compile(rf"(?P<id>[^#]+)#{captions}#(?P<number>[0-9]{{1,4}})(?:[ \t]+(?P<text>.*))?")
    found = Captions(left_out).add_file(find_file(folder, f"data/{name}", name), line,
                                        f"'<file>#{captions}#<n> <caption>'")
    images = {"": folder / "Flicker8k_Dataset"}
    return Reading(found.records(CORPUS, splits, images, dict.fromkeys(lists, translated)), left_out,
                   dict.fromkeys(lists, captions))
