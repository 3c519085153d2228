"""Whether a result file could be handed in: every image of a board has one caption, and nothing else is there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

SHOWN = 5  # names given in a message


def problems(path: Path, names: Iterable[str]) -> list[str]:
    """What is wrong with the result file `path` for a board with images `names`: a message a kind, [] if nothing is."""
    try:
        pairs = json.loads(Path(path).read_bytes().decode("utf-8-sig"), object_pairs_hook=_Pairs)
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror or error})"]
    except UnicodeDecodeError as error:
        return [f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8"]
    except (ValueError, RecursionError) as error:
        return [f"{path}: not JSON ({error})"]
    if not isinstance(pairs, _Pairs):
        return [f"{path}: expected {{\"<file name>\": [\"<caption>\"]}}, found {_kind(pairs)}"]
    board, given = set(names), Counter(name for name, _ in pairs)
    kinds: dict[str, list[str]] = {}
    for name, value in pairs:
        wrong = _wrong(value)
        if wrong:
            kinds.setdefault(wrong, []).append(name)
    found = {"missing: images of the board without an entry": sorted(board - given.keys()),
             "unknown: entries of images that are not on the board": sorted(given.keys() - board),
             "duplicate: there more than once": sorted(name for name, count in given.items() if count > 1), **kinds}
    return [f"{path}: {len(which)} {what}: {_some(which)}" for what, which in found.items() if which]


class _Pairs(list):
    """A JSON object as it stands in the file: a name may be there twice."""


def _wrong(value: object) -> str | None:
    """What is wrong with an entry's value, as the rest of a message that begins with a count."""
    if value is None:
        return "null: the value is null instead of [\"<caption>\"]"
    if isinstance(value, _Pairs) or not isinstance(value, list):
        return f"wrong type: the value is {_kind(value)} instead of [\"<caption>\"]"
    if not value:
        return "empty: the list holds no caption"
    if None in value:
        return "null: the caption is null"
    if not all(isinstance(caption, str) for caption in value):
        return "wrong type: the list holds something else than text"
    if len(value) > 1:
        return "too many: the list holds more than one caption"
    if any("\ud800" <= character <= "\udfff" for character in value[0]):
        return "broken: the caption holds half of a surrogate pair"
    if not any(character.isprintable() and not character.isspace() for character in value[0]):
        return "empty: the caption is empty"
    return None


def _kind(value: object) -> str:
    kinds = {_Pairs: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(name.encode("utf-8", "backslashreplace").decode() for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
