"""What the readers share: text files with errors that name file and line, image folders, and collecting captions.

Annotation files are downloads, and not to be trusted: a file name in them never leads out of the image folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from clipcap_lib.config import InputError
from clipcap_lib.corpora import LeftOut, Record

# Reasons for leaving something out: the same words for the same reason, so that they can be counted.
NO_SPLIT = "image is in no split"
NO_IMAGE = "image file is missing"
NO_CAPTION = "image has no caption"
EMPTY = "caption is empty"
NOT_TEXT = "caption is not valid text"
TWO_CAPTIONS = "line holds two captions"  # the end of the line between them is missing
REPEATED_CAPTION = "caption number is repeated"
REPEATED_IMAGE = "image is listed twice"
UNSAFE_NAME = "file name is no plain name"  # it has a folder in it, or characters that no name has


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` in the folder or in one of its subfolders, as archives unpack differently.

    Raises InputError naming the file and the remedy if there is none.
    """
    for name in names:
        for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            if path.is_file():
                return path
    raise InputError(f"{folder / names[0]}: no such file; complete the download in {folder}, or leave the corpus out")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; a byte order mark and the line ends of other systems are tolerated.

    Raises InputError naming the line that is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the download") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); convert the file, e.g. with "
                         f"`iconv -f GB18030 -t UTF-8`") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line that is not blank, with its place "name:number" for messages and counts.

    Raises InputError on a file without any: a download that failed must not pass for a corpus without images.
    """
    # not str.splitlines: it also splits at characters that may stand within a caption
    lines = read_text(path).split("\n")
    if not any(map(str.strip, lines)):
        raise InputError(f"{path}:1: the file is empty; download it again")
    name = str(path)
    for number, line in enumerate(lines, start=1):
        if line and not line.isspace():
            yield f"{name}:{number}", line


def is_plain_name(name: str) -> bool:
    """Whether a file name is nothing but a name: no folder, no drive, no control characters."""
    return name not in ("", ".", "..") and name.isprintable() and not _NO_NAME.search(name)


_NO_NAME = re.compile(r"[/\\:]")


def clean_id(name: str) -> str:
    """An image id as split lists and captions share it: without white space around it and without .jpg."""
    return name.strip().removesuffix(".jpg")


def read_splits(lists: dict[str, Path], left_out: list[LeftOut], pattern: str = r"\S+") -> dict[str, str]:
    """The split of each image id, in the order of the lists: {split: list file with one id a line} -> {id: split}.

    Raises InputError on a line that is no id (does not match `pattern`) and on an id in two splits.
    """
    splits: dict[str, str] = {}
    for split, path in lists.items():
        for place, line in read_lines(path):
            identity = clean_id(line)
            if not re.fullmatch(pattern, identity):
                raise InputError(f"{place}: '{identity[:60]}' is no image id; expected one id a line, without .jpg")
            if identity not in splits:
                splits[identity] = split
            elif splits[identity] == split:
                left_out.append(LeftOut(place, REPEATED_IMAGE))
            else:
                raise InputError(f"{place}: '{identity}' is in the {splits[identity]} split already; an image belongs "
                                 f"to one split, remove the line from one of the two lists")
    return splits


def file_names(folder: Path) -> set[str]:
    """The names of the files in an image folder, in one look. A link that leads out of the folder is no file of it.

    Raises InputError if there is no such folder.
    """
    try:
        with os.scandir(folder) as entries:
            names = set()
            root = None
            for entry in entries:
                if entry.is_symlink():
                    root = root or os.path.realpath(folder)
                    target = os.path.realpath(entry.path)
                    if os.path.dirname(target) != root or os.path.islink(target):  # a link still: it goes in a circle
                        continue
                if entry.is_file():
                    names.add(entry.name)
            return names
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no such folder; put the images of the corpus there") from error
    except NotADirectoryError as error:
        raise InputError(f"{folder}: is no folder; put the images of the corpus there") from error
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error


class Captions:
    """Captions as the lines of annotation files give them, by image id and number."""

    def __init__(self, left_out: list[LeftOut]):
        self.left_out = left_out
        self.of: dict[str, dict[int, str]] = {}
        self.first_place: dict[str, str] = {}

    def add(self, place: str, identity: str, number: int, caption: str | None, rest_of_line: bool = False) -> None:
        """Add a caption, or leave it out and count it: empty, no text, or a number that the image had before.

        rest_of_line: it goes to the end of a line, and so to the end of the next one where the end of the line is missing.
        """
        mine = self.of.get(identity)
        if mine is None:
            mine = self.of[identity] = {}
            self.first_place[identity] = place
        caption = (caption or "").strip(_WHITE)
        if not caption.isprintable():  # few hold anything else, and the closer look takes longer than all the rest
            caption = _BREAKS.sub(" ", caption)
        if not caption:
            self.left_out.append(LeftOut(place, EMPTY, damaged=True))
        elif not is_text(caption):
            self.left_out.append(LeftOut(place, NOT_TEXT, damaged=True))
        elif rest_of_line and holds_key(caption):
            self.left_out.append(LeftOut(place, TWO_CAPTIONS, damaged=True))
        elif number in mine:
            self.left_out.append(LeftOut(place, REPEATED_CAPTION, damaged=True))
        else:
            mine[number] = caption

    def add_file(self, path: Path, pattern: re.Pattern[str], expected: str,
                 mend: Callable[[str], str] = str) -> Captions:
        """Add the lines of a file. `pattern` has groups id, text and number; lines without a number are counted.

        `mend` is applied to each caption. Raises InputError naming the line that does not match; `expected` says what a
        line looks like.
        """
        for place, line in read_lines(path):
            match = pattern.fullmatch(line.strip(_WHITE))
            if not match:
                raise InputError(f"{place}: cannot make out image and caption in '{line.strip()[:60]}'; expected "
                                 f"{expected}")
            name, given, text = match.group("id", "number", "text")
            identity = clean_id(name)
            number = len(self.of.get(identity, ())) if given is None else int(given)
            self.add(place, identity, number, mend(text or ""), rest_of_line=True)
        return self

    def records(self, corpus: str, splits: Mapping[str, str], folders: Mapping[str, Path],
                translated: Mapping[str, str]) -> list[Record]:
        """The records of the images in `splits` (id -> split), in that order.

        `folders`: id prefix -> image folder, the first prefix that fits counts. `translated`: split -> one of
        TRANSLATED. Images without split, file or caption are left out and counted.
        """
        files: dict[Path, set[str]] = {}
        records = []
        for identity, split in splits.items():
            name = f"{identity}.jpg"
            if not is_plain_name(name):
                self.left_out.append(LeftOut(ascii(identity), UNSAFE_NAME, damaged=True))
                continue
            folder = next(folder for prefix, folder in folders.items() if identity.startswith(prefix))
            if folder not in files:
                files[folder] = file_names(folder)
            if name not in files[folder] and identity in files[folder] and not identity.endswith(".jpg"):
                name = identity  # listed in full: "1.JPG", "1.png"
            captions = self.of.get(identity)
            if name not in files[folder]:
                self.left_out.append(LeftOut(str(folder / name), NO_IMAGE, damaged=True))
            elif not captions:
                self.left_out.append(LeftOut(self.first_place.get(identity, name), NO_CAPTION, damaged=True))
            else:
                texts = tuple(captions[number] for number in sorted(captions))
                records.append(Record(folder / name, name, corpus, split, texts, translated[split]))
        self.left_out += [LeftOut(place, NO_SPLIT) for identity, place in self.first_place.items()
                          if identity not in splits]
        return records


# what str.strip takes away, and two characters of no width that it does not
_WHITE = "".join(character for character in map(chr, range(0x3001)) if character.isspace()) + "\u200b\ufeff"
_BREAKS = re.compile(r"[\t\n\r\f\v]+")  # within a caption a space says the same


def is_text(text: str) -> bool:
    """Whether a caption or tag holds nothing but characters."""
    return (text.isprintable() and "\ufffd" not in text) or not _NO_TEXT.search(text)


def holds_key(text: str) -> bool:
    """Whether something that begins a line stands within a caption or tag: the line's end before it is missing."""
    return bool(_DIGIT.search(text) and _SECOND_KEY.search(text))


# control characters, halves of characters (JSON can hold them, no UTF-8 file can), and the mark that a conversion leaves
# where it lost a character
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
_DIGIT = re.compile("[0-9]")
# what begins a line of some corpus; all of them hold a digit
_SECOND_KEY = re.compile(r"#zh[a-z]#[0-9]|COCO_(?:train|val)2014_[0-9]{6}|[0-9]{5,}(?:\.jpg)?\t|[0-9]{8,}(?:\.jpg)? ")
