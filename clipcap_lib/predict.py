"""Captions of many images to a file: read ahead, written as it goes, taken up again, shared out among processes.

    <output>                      {file: [caption]}, the original's res.json form, put in its place when all is done
    .<output>.<k>-of-<n>.jsonl    what process k of n has written so far: a line that names the work, then one an image

A killed run that is started again goes on after its last whole batch. Batches are the same either way, and so are the bytes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from clipcap_lib.config import InputError, fingerprint
from clipcap_lib.files import digest, write_atomically, writing
from clipcap_lib.images import ImageError, read_file, read_square

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHOWN = 10  # unreadable images that are named on the screen; all are in the JSON lines

Said = Sequence[tuple[str, float]]  # captions of an image with scores, best first


@dataclass(frozen=True)
class Images:
    """What is to be captioned: names that differ, and `read(number)`, which gives an image as `ClipCap.preprocess` takes it
    or raises ImageError.

    mark: as JSON, changes with the images: other ones of the same names are never taken for those of a run that was killed.
    passed_over: what else lies beside the images, in words, "" if nothing does. files: what is read, never written over.
    """

    names: Sequence[str]
    read: Callable[[int], Any]
    mark: Any = None
    passed_over: str = ""
    files: Sequence[Path] = ()


def in_folder(folder: Path, sizes: Sequence[int]) -> Images:
    """The image files of a folder, in order. sizes: pixels a side that the models read them at. Raises InputError."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder of images; give a folder, a list of paths or - with --images")
    paths, folders, others = [], 0, 0
    with os.scandir(folder) as entries:
        for one in entries:
            if one.name.lower().endswith(SUFFIXES) and not one.name.startswith("._") and not one.is_dir():
                paths.append(Path(one.path))
            elif not one.name.startswith("."):  # "._name" is what a Mac keeps beside a file on a foreign disk
                folders, others = folders + one.is_dir(), others + (not one.is_dir())
    said = [f"{folders} subfolder{'s' * (folders > 1)}"] if folders else []
    said += [f"{others} files that are no images by their names" if others > 1 else
             "1 file that is no image by its name"] if others else []
    if not paths:
        there = f", but {' and '.join(said)}" if said else ""
        raise InputError(f"{folder}: holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file{there}")
    return replace(in_list(sorted(paths), sizes, str(folder)), passed_over=", ".join(said))


def in_list(paths: Iterable[Path | str], sizes: Sequence[int], source: str) -> Images:
    """The files at these paths, each once. Results are by file name: InputError if two paths end in the same one."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        name = os.fsencode(path.name).decode("utf-8", "backslashreplace")  # a name of a file can be any bytes, JSON cannot
        if (first := found.setdefault(name, path)) != path and first.resolve() != path.resolve():
            raise InputError(f"{source}: {found[name]} and {path} have the same name, by which results are kept; "
                             "rename one, or caption them apart")
    if not found:
        raise InputError(f"{source}: names no image; give one path a line")
    files = list(found.values())
    return Images(list(found), lambda number: _squares(files[number], sizes), [_which(f) for f in files], files=files)


def _squares(path: Path, sizes: Sequence[int]) -> Image.Image | dict[int, Image.Image]:
    """An image file as a model of that size reads it; of several sizes, each as if it were the only one."""
    content = read_file(path)
    found = {size: read_square(content, size) for size in sizes}
    return found if len(found) > 1 else found[sizes[0]]


def listed(content: bytes, folder: Path, sizes: Sequence[int], source: str) -> Images:
    """One path a line in UTF-8, relative to `folder`; empty lines do not count. Raises InputError on anything else, unless
    it is the bytes of a path that is there.
    """
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    odd = [line for line in lines if any("\udc80" <= one <= "\udcff" for one in line)]
    if "\0" in text or (odd and not any((folder / line).exists() for line in odd)):  # an image, or text in GBK
        raise InputError(f"{source}: not a list of paths in UTF-8, one a line; give a folder, a text file or -")
    return in_list([folder / line for line in lines], sizes, source)


def prepared(rows: Any, mark: Any) -> Images:
    """The rows of a prepared split. mark: see `Images`."""
    return Images(rows["file_name"][:], lambda number: rows[number]["image"], mark)


def _which(path: Path) -> list[Any]:
    """Changes when another file, or other content, comes to lie at a path."""
    where = str(path.absolute()).encode("utf-8", "backslashreplace").decode()
    try:
        found = path.stat()
    except (OSError, ValueError):
        return [where]
    return [where, found.st_size, found.st_mtime_ns]


def predict(say: Callable[[list[Any], list[int]], Sequence[Said]], images: Images, output: Path,
            about: Mapping[str, Any], batch_size: int = 32, strict: bool = False, lines: Path | None = None,
            process: int = 0, processes: int = 1, wait: Callable[[], object] = lambda: None,
            progress: Callable[[Any], None] | None = None) -> Counter[str]:
    """Caption `images` and write `output` -> how many were captioned and left out.

    say: images, as they were read, and their numbers among all -> for each its captions with scores. about: what decides the
    captions (models, options), as JSON: a run of something else is never taken up. Batches are shared out among `processes`,
    which run the same call; `wait` returns when all are there. Images that cannot be read are left out and counted, or with
    `strict` raise InputError. lines: a JSON lines file as well, of all captions and scores and of what was left out.
    """
    # what a link points to is replaced, not the link
    output, lines = (path and (Path(path).resolve() if Path(path).is_symlink() else Path(path)) for path in (output, lines))
    progress = progress or Progress(len(images.names), output.name)
    for path in filter(None, (output, lines)):
        if path.exists() and not path.is_file():  # a device, too: the result is moved into its place
            raise InputError(f"{path}: is {'a folder' if path.is_dir() else 'no file'}; give the file that is to be written")
        if path.exists() and any(file.exists() and path.samefile(file) for file in images.files):
            raise InputError(f"{path}: is one of the files that are read; give another one to be written")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    if lines and lines.resolve() == output.resolve():
        raise InputError(f"{output}: the JSON lines cannot be the same file as the captions; give them another name")
    mark = fingerprint(dict(about), list(images.names), images.mark, batch_size, processes, strict)
    parts = [output.with_name(f".{output.name}.{k}-of-{processes}.jsonl") for k in range(processes)]
    starts = range(process * batch_size, len(images.names), processes * batch_size)
    part = _Part(parts[process], mark, [min(batch_size, len(images.names) - start) for start in starts])
    left_out = 0
    if images.passed_over and process == 0:
        progress(f"passed over: {images.passed_over}")
    if before := sum(part.sizes[:part.done]):
        progress(f"{output.name}: goes on behind {before} images that are done")
        if isinstance(progress, Progress):
            progress.before = before
    try:
        for start, batch in _read_ahead(images, starts[part.done:], batch_size):
            read = [(one, start + place) for place, one in enumerate(batch) if not isinstance(one, ImageError)]
            names = images.names[start:start + batch_size]
            for name, one in zip(names, batch, strict=True):
                if isinstance(one, ImageError):
                    left_out += 1
                    if strict:
                        raise InputError(f"{name}: {one}; restore it, take it out, or leave out --strict")
                    if left_out <= SHOWN:
                        progress(f"left out: {name}: {one}" + " (more are not named)" * (left_out == SHOWN))
            said = iter(say(*map(list, zip(*read, strict=True))) if read else [])
            rows = [_row(name, one if isinstance(one, ImageError) else next(said))
                    for name, one in zip(names, batch, strict=True)]
            with writing(part.path):
                part.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            progress(len(rows))
        with writing(part.path):
            part.write("")
    finally:
        part.close()
    wait()
    counted: Counter[str] = Counter()
    if process == 0:
        counted = _join(parts, mark, output, lines, len(images.names), batch_size)
    wait()
    return counted


def _row(name: str, found: Said | ImageError) -> dict[str, Any]:
    if isinstance(found, ImageError):
        return {"file": name, "error": str(found)}
    return {"file": name, "captions": [text for text, _ in found], "scores": [score for _, score in found]}


class Progress:
    """Images done and a rate, on one line of stderr that is written over, or every ten seconds where nobody looks."""

    def __init__(self, total: int, name: str):
        self.total, self.name, self.done, self.began = total, name, 0, time.perf_counter()
        self.before = 0  # images that were done when it began, in a run that goes on
        self.written, self.there = self.began, sys.stderr.isatty()

    def __call__(self, what: int | str) -> None:
        now = time.perf_counter()
        if isinstance(what, str):
            print(("\r\x1b[K" if self.there else "") + what, file=sys.stderr, flush=True)
            return
        self.done += what
        if now - self.written > (0.2 if self.there else 10):
            self.written = now
            rate = self.done / (now - self.began)
            text = f"{self.name}: {self.before + self.done} of {self.total} images, {rate:.1f} a second"
            print("\r\x1b[K" + text if self.there else text, end="" if self.there else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Make room for what is said in the end."""
        if self.there:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class _Part:
    """What one process has written: cut after its last whole batch when opened again. `done`: batches that are there."""

    def __init__(self, path: Path, mark: str, sizes: Sequence[int]):
        self.path, self.sizes, self.done, self.file = path, sizes, 0, None
        self.head, self.keep = json.dumps({"fingerprint": mark}) + "\n", 0
        if not path.is_file():
            return
        with path.open("rb") as file:
            if file.readline() != self.head.encode():
                return  # of another run: written over
            self.keep, count = file.tell(), 0
            for line in file:
                count += line.endswith(b"\n")
                if self.done < len(sizes) and count == sizes[self.done]:
                    self.keep, count, self.done = file.tell(), 0, self.done + 1

    def write(self, text: str) -> None:
        """Add to the file, which is opened only now: a run that fails at once leaves nothing behind."""
        if self.file is None:
            self.file = self.path.open("r+" if self.keep else "w", encoding="utf-8", newline="\n")
            if self.keep:
                self.file.seek(self.keep)
                self.file.truncate()
            else:
                self.file.write(self.head)
        self.file.write(text)
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _read_ahead(images: Images, starts: range, batch_size: int) -> Iterator[tuple[int, list[Any]]]:
    """Batches of images, and of the ImageErrors of those that cannot be read; the next is read while one is worked on."""
    def read(number: int) -> Any:
        try:
            return images.read(number)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        def begin(start: int) -> list[Future[Any]]:
            return [pool.submit(read, number) for number in range(start, min(start + batch_size, len(images.names)))]

        coming = begin(starts[0]) if starts else []
        for place, start in enumerate(starts):
            batch, coming = coming, begin(starts[place + 1]) if place + 1 < len(starts) else []
            yield start, [one.result() for one in batch]


def _join(parts: Sequence[Path], mark: str, output: Path, lines: Path | None, total: int, batch_size: int) -> Counter[str]:
    """Take the batches of all processes in turn, and write the result files, a row at a time."""
    counted: Counter[str] = Counter(captioned=0, left_out=0)
    files = [part.open(encoding="utf-8") for part in parts]
    try:
        if any(json.loads(file.readline()) != {"fingerprint": mark} for file in files):
            raise InputError(f"{output}: another run writes to the same file; give this one another --output")

        def rows() -> Iterator[tuple[str, dict[str, Any]]]:
            for number in range(total):
                line = files[number // batch_size % len(files)].readline()
                row = json.loads(line)
                yield line, {**row, "captions": row.get("captions", [])[:1]}

        def write(captions: Path, everything: Path) -> None:
            with captions.open("w", encoding="utf-8", newline="\n") as result, (
                    everything.open("w", encoding="utf-8", newline="\n")) as details:
                result.write("{")
                for line, row in rows():
                    details.write(line)
                    if "error" in row:
                        counted["left_out"] += 1
                        continue
                    name, said = (json.dumps(row[key], ensure_ascii=False) for key in ("file", "captions"))
                    result.write(("," if counted["captioned"] else "") + f"\n {name}: {said}")
                    counted["captioned"] += 1
                result.write("\n}")

        with writing(output):
            if lines:
                write_atomically(lines, lambda place: write_atomically(output, lambda result: write(result, place)))
            else:
                write_atomically(output, lambda result: write(result, Path(os.devnull)))
    finally:
        for file in files:
            file.close()
    for one in list(output.parent.iterdir()):  # those of other numbers of processes, too
        if re.fullmatch(re.escape(f".{output.name}.") + r"\d+-of-\d+\.jsonl", one.name):
            one.unlink(missing_ok=True)
    return counted


def identity(folder: Path) -> str:
    """Changes with the weights, the shapes or the vocabulary of a checkpoint."""
    return digest(Path(folder) / name for name in ("config.json", "tokenizer.json", "model.safetensors"))
