"""Records -> Parquet shards with embedded images, by several processes. Light: worker processes import it.

Beside each shard `.<shard>.looks` (numpy, nothing pickled) keeps what the checks need of its images. It is written after its
shard: where it is, the shard is whole, and an interrupted run does not write it again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipcap_lib import images
from clipcap_lib.config import InputError
from clipcap_lib.corpora import Record
from clipcap_lib.files import write_atomically, writing

SHARD_IMAGES = 500
ROW_GROUP = 100  # rows: what a reader that streams holds at a time
Groups = Mapping[tuple[str, str], Sequence[Record]]  # (corpus, split) -> records


@dataclass(frozen=True)
class Part:
    """What became of the records of a shard: N were kept, the others left out."""

    content: str  # hash of images, captions and tags
    kept: np.ndarray  # (N,) which of the records
    digests: list[str]  # of the N files
    thumbnails: np.ndarray  # (N, T, T)
    left_out: list[tuple[str, str, str]]  # image file, reason, detail


def schema() -> pa.Schema:
    """The Arrow schema of a shard, with the metadata by which `datasets` knows its features.

    Written out, and held to `datasets.Features` by a test: importing `datasets` takes longer than reading a corpus.
    """
    text = {"dtype": "string", "_type": "Value"}
    several = {"feature": text, "_type": "List"}
    features = {"image": {"_type": "Image"}, "file_name": text, "corpus": text, "split": text, "captions": several,
                "translated": text, "tags": several}
    types = {"Image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "Value": pa.string(),
             "List": pa.list_(pa.string())}
    return pa.schema({name: types[feature["_type"]] for name, feature in features.items()},
                     {"huggingface": json.dumps({"info": {"features": features}})})


def cut(groups: Groups) -> dict[str, Sequence[Record]]:
    """The records of each shard, by its name, in the order of the groups."""
    return {f"{corpus}-{split}-{start // SHARD_IMAGES:05d}.parquet": records[start:start + SHARD_IMAGES]
            for (corpus, split), records in groups.items() for start in range(0, len(records), SHARD_IMAGES)}


@contextmanager
def workers(processes: int, begin: bool = True) -> Iterator[Executor]:
    """Processes for `process`; for a single one, a thread of this process, as it would only wait for the other.

    begin: the first of them start at once, while the caller reads the corpora's lists.
    """
    if processes == 1:
        pool: Executor = ThreadPoolExecutor(1)
    else:  # spawned, not forked: a notebook's process has threads
        pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_begin_worker)
    try:
        for _ in range(min(processes, 2) if begin else 0):  # further ones start with their first shard
            pool.submit(int)
        yield pool
    finally:
        # waited for: a process that ends meanwhile closes the queue that tells its workers to end, and waits forever
        pool.shutdown(cancel_futures=True)


def process(groups: Groups, folder: Path | None, size: int, pool: Executor, report: Callable[[str], None],
            what: str = "prepare", meanwhile: Callable[[], object] = lambda: None) -> dict[str, Part]:
    """Read every image, and write the shards that are not in `folder` yet -> {shard: Part}, in the order of the groups.

    size: pixels a side of stored images. Without a folder images are read and looked at, and nothing is written.
    pool: of `workers`. `meanwhile` is called once, in a thread, while they work. Raises InputError if a worker dies or the
    disk is full.
    """
    parts = cut(groups)
    results = {name: part for name in parts if folder and (part := _load(folder / name))}
    missing = [name for name in parts if name not in results]
    started, done, total = time.perf_counter(), 0, sum(len(parts[name]) for name in missing)
    try:
        futures = {pool.submit(_work, folder and folder / name, parts[name], size): name for name in missing}
        with writing(folder or what), ThreadPoolExecutor(1) as aside:  # so that progress is told all the while
            rest = aside.submit(meanwhile)
            for future in as_completed(futures):
                name = futures[future]
                results[name] = future.result()
                done += len(parts[name])
                report(f"{what}: {done}/{total} images, {done / (time.perf_counter() - started):.0f} images/s")
    except BrokenProcessPool as error:
        raise InputError(f"{folder or what}: a process that read images was ended from outside, perhaps for want of memory; "
                         f"run the same command again, it goes on with what is missing") from error
    rest.result()
    return {name: results[name] for name in parts}


def _begin_worker() -> None:
    """End this worker when the process that started it is killed; it would wait for work forever. Ctrl-C is for that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    sys.meta_path.insert(0, _WithoutPandas())
    # images go when they are no longer used; looking for cycles among them takes a twentieth of the time and finds none
    gc.freeze()
    gc.disable()


class _WithoutPandas:
    """pyarrow imports pandas to ask whether a list is a Series; that takes longer than all else a worker starts with."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("workers do without pandas")


def _work(path: Path | None, records: Sequence[Record], size: int) -> Part:
    """Read the records' images and, with a path, write the shard there and its looks beside it. Runs in a worker."""
    kept, stored, digests, thumbnails, left_out = [], [], [], [], []
    for number, record in enumerate(records):
        try:
            content = images.read_file(record.image)
            square = images.read_square(content, size)
        except images.ImageError as error:
            left_out.append((str(record.image), error.reason, error.detail))
            continue
        digest, thumbnail = images.look(content, square)
        kept.append(number)
        digests.append(digest)
        thumbnails.append(thumbnail)
        if path:
            stored.append({"bytes": images.jpeg(square), "path": record.file_name})
    rows = [records[number] for number in kept]
    part = Part(_content_hash([image["bytes"] for image in stored], rows), np.array(kept, dtype=np.int32), digests,
                np.stack(thumbnails) if rows else np.zeros((0, images.THUMBNAIL, images.THUMBNAIL), np.uint8), left_out)
    if path:
        columns = {name: [getattr(r, name) for r in rows] for name in ("file_name", "corpus", "split", "translated")}
        columns |= {name: [list(getattr(r, name)) for r in rows] for name in ("captions", "tags")} | {"image": stored}
        _write(path, pa.Table.from_pydict(columns, schema=schema()))
        _save(path, part)
    if not gc.isenabled():  # see `_begin_worker`
        gc.collect()  # all the same, once a shard
    return part


def _write(path: Path, table: pa.Table) -> None:
    # images are compressed already, and no two are the same: no dictionary of them
    write_atomically(path, lambda place: pq.write_table(table, place, row_group_size=ROW_GROUP,
                                                        use_dictionary=["corpus", "split", "translated"]))


def _content_hash(stored: Sequence[bytes], rows: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for image, row in zip(stored, rows, strict=False):
        digest.update(image)
        digest.update(repr((row.file_name, row.captions, row.tags)).encode())
    return digest.hexdigest()[:16]


def without(path: Path, part: Part, records: Sequence[Record], removed: Collection[int]) -> str:
    """Take records (by number in the shard's) out of a written shard -> the hash of what is left.

    The looks stay: killed here, the next run finds the same copies, and takes out what is still there.
    """
    rows = [records[n] for n in part.kept if n not in removed]
    names = {record.file_name for record in rows}
    table = pq.read_table(path)
    table = table.filter(pa.array([name in names for name in table["file_name"].to_pylist()]))
    _write(path, table)
    return _content_hash([image["bytes"].as_py() for image in table["image"]], rows)


def _looks(path: Path) -> Path:
    return path.with_name(f".{path.name}.looks")


def _save(path: Path, part: Part) -> None:
    def write(place: Path) -> None:
        with place.open("wb") as file:
            np.savez(file, content=part.content, kept=part.kept, digests=np.array(part.digests, dtype="U32"),
                     thumbnails=part.thumbnails, left_out=json.dumps(part.left_out))

    write_atomically(_looks(path), write)


def _load(path: Path) -> Part | None:
    """What became of a shard that was written before, or None: not written, or not whole."""
    if not (path.is_file() and _looks(path).is_file()):
        return None
    try:
        with np.load(_looks(path), allow_pickle=False) as found:
            return Part(str(found["content"]), found["kept"], found["digests"].tolist(), found["thumbnails"],
                        [tuple(item) for item in json.loads(str(found["left_out"]))])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
