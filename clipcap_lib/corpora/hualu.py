"""Hualu Cup 2021. Its data was not published; this is the layout that its participants' code shows.

    <folder>/train.csv                  columns images,captions: file name and one caption a row, several rows an image
    <folder>/train/<file name>          the training images
    <folder>/board-a/*.jpg, board-b/    the boards: images without captions

Any of the three may be missing. Board references, where there are any, are the organiser's and lie elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from clipcap_lib.config import InputError
from clipcap_lib.corpora import LeftOut, Reading, Record
from clipcap_lib.corpora.lines import Captions, clean_id, file_names, is_plain_name
from clipcap_lib.corpora.tables import read_csv

CORPUS = "hualu"
COLUMNS = ["images", "captions"]
BOARDS = ("board-a", "board-b")
NO_PHOTO = "file is no .jpg image"


def read(folder: Path) -> Reading:
    """Read the training rows and the board folders, whichever are there."""
    left_out: list[LeftOut] = []
    records: list[Record] = []
    table = folder / "train.csv"
    boards = [board for board in BOARDS if (folder / board).is_dir()]
    if table.is_file() or not boards:
        records += _read_table(table, folder / "train", left_out)
    for board in boards:
        files = file_names(folder / board)
        for name in sorted(os.listdir(folder / board)):
            # macOS puts a "._x.jpg" beside an x.jpg into its archives
            if (name in files and name.lower().endswith((".jpg", ".jpeg")) and is_plain_name(name)
                    and not name.startswith("._")):
                records.append(Record(folder / board / name, name, CORPUS, board, ()))
            else:
                left_out.append(LeftOut(f"{folder / board}: {name!a}", NO_PHOTO))
    return Reading(records, left_out)


def _read_table(path: Path, images: Path, left_out: list[LeftOut]) -> list[Record]:
    if not path.is_file():
        raise InputError(f"{path}: no such file, nor is there a folder board-a or board-b; put the table of training "
                         f"captions there, or leave the corpus out")
    found, splits = Captions(left_out), {}
    for place, row in read_csv(path, COLUMNS):
        identity = clean_id(row["images"])
        if not identity:
            raise InputError(f"{place}: no file name; expected '<file name>,<caption>'")
        splits[identity] = "train"
        found.add(place, identity, len(found.of.get(identity, ())), " ".join(row["captions"].split()))
    return found.records(CORPUS, splits, {"": images}, {"train": "none"})
