"""Files that are either whole or not there, and folders that one process at a time works in."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clipcap_lib.config import InputError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the place and move there, so that a file is either whole or not there."""
    # with the process in its name: a worker that outlives a killed run by a moment does not write into the next one's file
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def digest(files: Iterable[Path]) -> str:
    """Sixteen hex digits that change with the content of any of the files, and with its name."""
    found = hashlib.sha256()
    for one in files:
        with one.open("rb") as file:
            found.update(one.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Where something is written to `path`: a full disk, above all, raises InputError naming it."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{path}: cannot be written, for a file stands where it needs a folder; give another place"
                         ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); make room or mend its permissions, and "
                         f"run the same command again: it goes on where it was") from error


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically, readable by people (UTF-8, indented)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, ensure_ascii=False, indent=1)
    write_atomically(path, lambda place: place.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises InputError naming it if it is not there or not readable."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; run the step that writes it first (see `python -m clipcap_lib -h`)"
                         ) from error
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error}); delete it and run the step that writes it again"
                         ) from error


@contextmanager
def exclusive(folder: Path, name: str = ".lock", shared: bool = False,
              report: Callable[[str], None] = print) -> Iterator[None]:
    """One process at a time in `folder`: a second one waits, and then finds the work done. Freed when a process dies.

    shared: any number at a time of those that ask so, while none has it to itself.
    """
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock = (Path(folder) / name).open("w")
    with lock as file:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            yield
            return
        kind, tries = fcntl.LOCK_SH if shared else fcntl.LOCK_EX, 20
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB if tries else kind)
                break
            except BlockingIOError:  # for a second nothing is said: the other may only be looking
                time.sleep(0.05)
                if not (tries := tries - 1):
                    report(f"{folder}: another process is at work here; waiting for it")
        yield
