"""Annotation files that are JSON or CSV, with errors that name file and line. Nothing that has run into another is taken.

A record whose end is missing runs into the next one. `json` and `csv` read the two as one, and say nothing.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clipcap_lib.config import InputError
from clipcap_lib.corpora.lines import read_lines, read_text


def read_json_list(path: Path) -> list[Any]:
    """The items of a JSON file that holds a list. Raises InputError naming the line where it is broken."""
    text = read_text(path)
    try:
        items = json.loads(text, object_pairs_hook=_object)
    except _KeyTwiceError as error:
        line = text.count("\n", 0, max(0, text.find(json.dumps(error.value)))) + 1
        raise InputError(f"{path}:{line}: {error}; the end of the first is missing, download the file again") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not readable as JSON ({error.msg}); the file may be cut off, "
                         f"download it again") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}:1: not readable as JSON ({error}); download it again") from error
    if not isinstance(items, list):
        raise InputError(f"{path}:1: holds a JSON {type(items).__name__}; expected a list of records")
    if not items:
        raise InputError(f"{path}:1: holds an empty list; download the file again")
    return items


class _KeyTwiceError(ValueError):
    """Two JSON objects that have run into one, the end between them being lost; `json` would keep the second alone."""

    def __init__(self, key: str, value: Any):
        super().__init__(f"an object has the key {key[:40]!a} twice")
        self.value = value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises _KeyTwiceError where a key stands twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _KeyTwiceError(key, value)
        found[key] = value
    return found


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one JSON object a line, with their places. Raises InputError naming the line."""
    for place, line in read_lines(path):
        try:
            item = json.loads(line, object_pairs_hook=_object)
        except (RecursionError, ValueError) as error:
            raise InputError(f"{place}: not readable as JSON ({error}); expected one object a line") from error
        if not isinstance(item, dict):
            raise InputError(f"{place}: is a JSON {type(item).__name__}; expected an object")
        yield place, item


def read_csv(path: Path, *required: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file under a header, with their places. `required`: one of these sets of columns must be there.
    Columns are read, and given, in small letters.

    Raises InputError naming the line where the header lacks a column, a row has more or fewer columns, or a quotation mark
    that was not closed swallows the rows below it.
    """
    text = read_text(path)
    expected = " or ".join(repr(",".join(columns)) for columns in required)
    if not text.strip():
        raise InputError(f"{path}: the file is empty; expected the columns {expected} and rows under them")
    # strict: a quotation mark that is never closed is an error, instead of swallowing the rest of the file; and one after
    # a space is a quotation mark too
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        given = [column.strip() for column in next(rows, [])]
        header = [column.lower() for column in given]
        if not any(all(header.count(column) == 1 for column in columns) for columns in required):
            raise InputError(f"{path}:1: columns are '{','.join(given)[:60]}'; expected {expected}")
        found, begin = False, rows.line_num + 1
        for row in rows:
            begin, first = rows.line_num + 1, begin
            if not any(cell.strip() for cell in row):
                continue
            for cell in row if rows.line_num > first else ():
                # closed by the mark of a later row: then whole rows stand in one cell
                if "\n" in cell and any(line.count(",") >= len(header) - 1 for line in cell.split("\n")):
                    more = cell.count("\n")
                    raise InputError(f"{path}:{first}: a cell in quotation marks holds what looks like {more} more rows; "
                                     f"close the mark where the caption ends, or put the caption on one line")
            if len(row) != len(header):
                raise InputError(f"{path}:{rows.line_num}: {len(row)} columns; expected {len(header)}, as the header has "
                                 f"(a caption with a comma stands in quotation marks)")
            found = True
            yield f"{path}:{rows.line_num}", dict(zip(header, row, strict=True))
        if not found:
            raise InputError(f"{path}:{rows.line_num}: no rows under the header; expected one a caption")
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not readable as CSV ({error}); check the quotation marks") from error
