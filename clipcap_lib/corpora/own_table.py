"""One's own data: a table of image files and captions, as CSV or as JSON lines.

    file,caption         file,caption,split         {"file": "a.jpg", "caption": "一只狗"}
    a.jpg,一只狗         a.jpg,一只狗,train         {"file": "b.png", "captions": ["一只猫", "猫"]}
    b.png,一只猫         b.png,一只猫,val

A row is one caption; an image may have several rows. `images,captions`, the original's column names, will do as well,
and so will `File,Caption`; other columns are passed over. Files are looked up in the image folder, and may lie in its
subfolders ("dogs/a.jpg").

`split` is train, val or test. Without it, a hash of the file name decides: see `split_of`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipcap_lib.config import InputError
from clipcap_lib.corpora import LeftOut, Reading, Record
from clipcap_lib.corpora.lines import NO_CAPTION, NO_IMAGE, UNSAFE_NAME, Captions, file_names, is_plain_name
from clipcap_lib.corpora.tables import read_csv, read_json_lines

CORPUS = "own-table"
COLUMNS = (("file", "caption"), ("images", "captions"))
SPLITS = ("train", "val", "test")
SAME_CAPTION = "caption is repeated for its image"
HELD_OUT_SHARE = 0.1  # of the images, in each of validation and test

Row = tuple[str, str, list[str | None], str | None]  # place, file, captions, split


def read(table: Path, images: Path | None = None) -> Reading:
    """Read a .csv or .jsonl table. `images`: the folder of its files (default: the table's own).

    Raises InputError naming the line that cannot be read, and where a split would be left without an image.
    """
    table, images = Path(table), Path(images or Path(table).parent)
    rows = _ROWS.get(table.suffix.lower())
    if rows is None:
        raise InputError(f"{table}: is neither .csv nor .jsonl; give a table with the columns file,caption")
    if not table.is_file():
        raise InputError(f"{table}: no such file; give a table with the columns file,caption")
    folder, left_out = _Folder(images), []
    found, splits = Captions(left_out), {}
    for place, file, captions, split in rows(table):
        name = folder.find(file)
        if name is None:
            left_out.append(LeftOut(f"{place}: {file!a}", folder.why_not(file), damaged=True))
            continue
        if splits.setdefault(name, split) != split:
            raise InputError(f"{place}: '{name}' is in the split {splits[name]} already; an image belongs to one split")
        known = set(found.of.get(name, {}).values())  # the same row twice is the same caption
        for caption in captions or [None]:
            caption = " ".join((caption or "").split())
            if caption in known:
                left_out.append(LeftOut(place, SAME_CAPTION))
            else:
                known |= {caption} - {""}
                found.add(place, name, len(found.of.get(name, ())), caption)
    records = []
    for name, split in splits.items():
        if not found.of[name]:
            left_out.append(LeftOut(found.first_place[name], NO_CAPTION, damaged=True))
            continue
        records.append(Record(images / name, name, CORPUS, split or split_of(name), tuple(found.of[name].values())))
    _check_splits(table, images, records, left_out, by_hash=None in splits.values())
    return Reading(records, left_out)


def split_of(file_name: str) -> str:
    """The split of an image by the SHA-256 of its name: 80 % train, 10 % val, 10 % test.

    It depends on nothing else, so that an image stays in its split when the table grows.
    """
    place = place_of(file_name)
    return "val" if place < HELD_OUT_SHARE else "test" if place < 2 * HELD_OUT_SHARE else "train"


def place_of(file_name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int(hashlib.sha256(file_name.encode()).hexdigest()[:8], 16) / 16 ** 8


def _check_splits(table: Path, images: Path, records: list[Record], left_out: list[LeftOut], by_hash: bool) -> None:
    if not records:
        raise InputError(f"{table}: no image of it can be used ({left_out[0].place}: {left_out[0].reason}); names are "
                         f"relative to {images}, with / between folders: mend them, or give another folder with --images")
    missing = [split for split in SPLITS if split not in {record.split for record in records}]
    if missing and by_hash:
        raise InputError(f"{table}: {len(records)} images are too few to be split by file name, none fell to "
                         f"{' and '.join(missing)}; say in a column split which are train, val and test")
    if missing:
        raise InputError(f"{table}: no image of the split {' and '.join(missing)}; training needs train, chooses its "
                         f"checkpoint on val, and test is reported: name some of each, or leave out the split")


def _csv_rows(path: Path) -> Iterator[Row]:
    for place, row in read_csv(path, *COLUMNS):
        file, caption = next(columns for columns in COLUMNS if set(columns) <= set(row))
        yield place, _file(place, row[file]), [row[caption]], _split(place, row.get("split"))


def _json_rows(path: Path) -> Iterator[Row]:
    split_given = None
    for place, item in read_json_lines(path):
        if "file" not in item or ("caption" in item) == ("captions" in item):
            raise InputError(f'{place}: expected {{"file": "...", "caption": "..."}} or "captions": ["...", "..."]')
        captions = [item["caption"]] if "caption" in item else item["captions"]
        if not isinstance(captions, list) or not all(caption is None or isinstance(caption, str) for caption in captions):
            raise InputError(f'{place}: captions are no text; expected "caption": "..." or "captions": ["...", "..."]')
        if split_given not in (None, "split" in item):
            raise InputError(f"{place}: {'has' if 'split' in item else 'lacks'} a split unlike the lines before it; give "
                             f"all lines one, or none")
        split_given = "split" in item
        if split_given and item["split"] is None:  # as pandas writes what is missing
            raise InputError(f"{place}: the split is null; expected {', '.join(SPLITS)}, or leave it out of all lines")
        yield place, _file(place, item["file"]), captions, _split(place, item["split"]) if split_given else None


_ROWS = {".csv": _csv_rows, ".jsonl": _json_rows, ".ndjson": _json_rows}


def _file(place: str, name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{place}: no file name; expected the name of an image in the folder --images")
    return name.strip().removeprefix("./")


def _split(place: str, split: Any) -> str | None:
    """None stays None: there is no column."""
    if split is not None and (not isinstance(split, str) or split.strip() not in SPLITS):
        raise InputError(f"{place}: the split is {str(split)[:40]!r}; expected {', '.join(SPLITS)}")
    return split if split is None else split.strip()


class _Folder:
    """The image folder: which of its files a name means. No name and no link leads out of it."""

    def __init__(self, root: Path):
        self.root, self.real = root, os.path.realpath(root)
        self.names = {"": file_names(root)}

    def find(self, name: str) -> str | None:
        """The file's path under the folder, parts joined by "/"; None if it is not there. ".jpg" may be left out."""
        if self.why_not(name) == UNSAFE_NAME:
            return None
        folder, _, file = name.rpartition("/")
        if folder not in self.names:
            path = self.root / folder
            inside = os.path.realpath(path).startswith(self.real + os.sep)
            self.names[folder] = file_names(path) if inside and os.path.isdir(path) else set()
        there = next((candidate for candidate in (file, f"{file}.jpg") if candidate in self.names[folder]), None)
        return there and (f"{folder}/{there}" if folder else there)

    @staticmethod
    def why_not(name: str) -> str:
        """Why a name was not found: because it is none, or because there is no such file."""
        return NO_IMAGE if all(is_plain_name(part) for part in name.split("/")) else UNSAFE_NAME
