"""Raw corpora -> checked, sharded Parquet with embedded images, a vocabulary, and reference files. No torch here.

    runs/<preset>/data/
      manifest.json                      what is there and what was left out; written last
      <corpus>-<split>-<n>.parquet       Hugging Face datasets form: image, file_name, corpus, split, captions, translated
      tokenizer/                         character vocabulary of the training captions
      references-<set>.json              {file: [captions]} of every set that can be scored
      truth-<set>.json                   {file: scene} of drawn boards, for slot accuracy and for checking maps

Shards are written by several processes, each beside its place and moved there; an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from clipcap_lib.config import Config, InputError, fingerprint
from clipcap_lib.corpora import LeftOut, Reading, Record, miniature, own_table, read_corpora
from clipcap_lib.corpora.things import KINDS
from clipcap_lib.tokenizer import build_tokenizer, build_vocabulary, read_vocabulary

SHARD_IMAGES = 500
JPEG_QUALITY = 92
UNREADABLE = "image cannot be read"
Image.MAX_IMAGE_PIXELS = 60_000_000  # a photo of a corpus is far smaller; anything larger is left out


def prepared_image(path: Path, size: int) -> bytes:
    """Decode, turn upright, make RGB, squash to size x size and encode: the bytes of a JPEG.

    Raises OSError (or a PIL error) on what is no readable image, ValueError on an absurdly large one.
    """
    with Image.open(path) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError("image is absurdly large")
        image.draft("RGB", (2 * size, 2 * size))  # lets the JPEG decoder skip detail that is thrown away below
        upright = ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _schema() -> pa.Schema:
    """The Arrow schema of a shard, with the metadata by which `datasets` knows its features."""
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    return Features({"image": ImageFeature(), "file_name": text, "corpus": text, "split": text,
                     "captions": List(text), "translated": text}).arrow_schema


def _write_shard(path: Path, records: Sequence[Record], size: int) -> tuple[str, list[tuple[str, str]]]:
    """Write one shard -> (hash of its content, what was left out). Runs in a worker process."""
    rows, left_out = [], []
    for record in records:
        try:
            image = prepared_image(record.image, size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            left_out.append((str(record.image), UNREADABLE))
            continue
        rows.append({"image": {"bytes": image, "path": record.file_name}, "file_name": record.file_name,
                     "corpus": record.corpus, "split": record.split, "captions": list(record.captions),
                     "translated": record.translated})
    _replace(path, lambda place: pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), place,
                                                row_group_size=100))
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row["image"]["bytes"] + json.dumps([row["file_name"], row["captions"]]).encode())
    return digest.hexdigest()[:16], left_out


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the place and move there, so that a file is either whole or not there."""
    beside = path.with_name(f".{path.name}.partial")
    write(beside)
    os.replace(beside, path)


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically, readable by people (UTF-8, indented)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda place: place.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8"))


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
def exclusive(folder: Path, report: Callable[[str], None] = print) -> Iterator[None]:
    """One process at a time in `folder`: a second one waits, and then finds the work done. Freed when a process dies."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / ".lock").open("w") as file:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"{folder}: another process is at work here; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def evaluation_sets(data: Path) -> list[str]:
    """The sets that can be scored, boards first: those with a references file under `data`."""
    order = ("board-a", "board-b", "test", "val")
    return [name for name in order if (Path(data) / f"references-{name}.json").is_file()]


def prepare(config: Config, output: Path, data_root: Path | None = None, corpora: Iterable[str] | None = None,
            vocabulary: Path | None = None, limit: Mapping[str, int] | None = None, skip_damaged: bool = False,
            processes: int | None = None, report: Callable[[str], None] = print,
            captions: Mapping[str, str] | None = None, table: Path | None = None, images: Path | None = None) -> Path:
    """Prepare the corpora under `data_root` into `output` and return it; at once if nothing has changed.

    Without `data_root` the miniature corpora are drawn beside `output`. `corpora`: exactly these instead of all that
    are there. `vocabulary`: the original's vocab_cn.json instead of a vocabulary of the training captions. `limit`:
    most images a split, spread over the corpora (for --debug). `captions`: {"flickr8k-cn": "zhb"}, see
    `corpora.caption_choices`. `table`: a .csv or .jsonl of one's own instead of any corpus, with its files in the folder
    `images` (default: the table's). Raises InputError on input that cannot be used, and on
    damage (missing or unreadable images, empty captions) unless `skip_damaged` leaves it out and counts it.
    """
    with exclusive(Path(output).parent, report):
        return _prepare(config, Path(output), data_root, corpora, vocabulary, limit, skip_damaged, processes, report,
                        captions, table, images)


def _prepare(config: Config, output: Path, data_root: Path | None, corpora: Iterable[str] | None,
             vocabulary: Path | None, limit: Mapping[str, int] | None, skip_damaged: bool, processes: int | None,
             report: Callable[[str], None], captions: Mapping[str, str] | None, table: Path | None,
             images: Path | None) -> Path:
    started = time.perf_counter()
    drawn = data_root is None and table is None
    if drawn:
        data_root = miniature.write_corpora(output.parent / "corpora")
    readings = ({own_table.CORPUS: own_table.read(table, images)} if table
                else read_corpora(Path(data_root), corpora, captions))
    left_out = [item for reading in readings.values() for item in reading.left_out]
    _refuse_damage(left_out, skip_damaged)
    groups = _groups(readings, limit)
    if not table and (labelled := _labelled(Path(data_root))):
        groups["labelled", "labelled"] = labelled
    if not any(split == "train" for _, split in groups):
        raise InputError(f"{data_root}: no training images in {', '.join(readings)}; check the split files"
                         f"{' and the choice of captions' if captions else ''}")
    wanted = {"stored_size": config.stored_size, "vocabulary_minimum": config.vocabulary_minimum,
              "jpeg_quality": JPEG_QUALITY, "vocabulary": read_vocabulary(vocabulary) if vocabulary else None,
              "records": _records_digest(groups)}
    inputs = fingerprint(wanted)
    manifest_path = output / "manifest.json"
    if manifest_path.is_file() and read_json(manifest_path)["inputs"] == inputs:
        report(f"prepare: nothing has changed; {output.parent.name}/{output.name} is ready")
        return output

    output.mkdir(parents=True, exist_ok=True)
    if not (output / f".inputs-{inputs}").exists():  # shards of other settings must not be taken for ours
        for old in [*output.glob("*.parquet"), *output.glob(".*.digest"), *output.glob(".inputs-*"),
                    *output.glob("*.json")]:
            old.unlink()
        (output / f".inputs-{inputs}").touch()
    shards, unreadable = _write_shards(groups, output, config.stored_size, processes or os.cpu_count() or 1, report)
    left_out += (broken := [LeftOut(place, reason, damaged=True) for place, reason in unreadable])
    try:
        _refuse_damage(broken, skip_damaged)
    except InputError:
        shutil.rmtree(output)
        raise
    gone = {place for place, _ in unreadable}
    groups = {key: [r for r in records if str(r.image) not in gone] for key, records in groups.items()}

    train = [caption for (_, split), records in groups.items() if split == "train"
             for record in records for caption in record.captions]
    tokens = wanted["vocabulary"] or build_vocabulary(train, config.vocabulary_minimum)
    build_tokenizer(tokens).save_pretrained(output / "tokenizer")
    _write_references(groups, data_root, output)
    write_json(manifest_path, {
        "inputs": inputs, "fingerprint": fingerprint(inputs, shards), "drawn": drawn, "vocab_size": len(tokens),
        "images": {f"{corpus}/{split}": len(records) for (corpus, split), records in groups.items()
                   if corpus != "labelled"},
        "captions": {f"{corpus}/{split}": sum(len(r.captions) for r in records)
                     for (corpus, split), records in groups.items() if corpus != "labelled"},
        "caption_sets": {f"{corpus}/{split}": which for corpus, reading in readings.items()
                         for split, which in reading.captions.items()},
        "translated": {f"{corpus}/{split}": dict(Counter(r.translated for r in records for _ in r.captions))
                       for (corpus, split), records in groups.items() if corpus != "labelled"},
        "left_out": Counter(item.reason for item in left_out),
        "left_out_places": [[item.place, item.reason] for item in left_out[:1000]],
        "shards": shards, "seconds": round(time.perf_counter() - started, 1)})
    total = sum(len(records) for records in groups.values())
    report(f"prepare: {total} images, {len(train)} training captions, {len(tokens)} tokens, {len(left_out)} left out, "
           f"in {time.perf_counter() - started:.0f} s -> {output.parent.name}/{output.name}")
    return output


def _refuse_damage(left_out: Sequence[LeftOut], skip_damaged: bool) -> None:
    """Raise InputError if something is damaged, unless that is to be left out."""
    damaged = [item for item in left_out if item.damaged]
    if damaged and not skip_damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise InputError(f"{damaged[0].place}: {damaged[0].reason}{more}; mend it, or leave out what is damaged with "
                         f"--skip-damaged")


def _labelled(data_root: Path) -> list[Record]:
    """The labelled images beside drawn corpora, a folder a class, as records whose one caption names the class."""
    return [Record(path, path.name, "labelled", "labelled", (KINDS[path.parent.name].chinese,))
            for path in sorted((data_root / miniature.PORTRAITS).glob("*/*.jpg"))]


def _groups(readings: Mapping[str, Reading], limit: Mapping[str, int] | None) -> dict[tuple[str, str], list[Record]]:
    """Records by (corpus, split); with a limit, an equal share of each corpus."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for corpus, reading in readings.items():
        for record in reading.records:
            groups[corpus, record.split].append(record)
    if limit:
        for (corpus, split), records in groups.items():
            share = -(-limit.get(split, len(records)) // sum(s == split for _, s in groups))
            groups[corpus, split] = records[:share]
    return dict(groups)


def _records_digest(groups: Mapping[tuple[str, str], Sequence[Record]]) -> str:
    """Changes when any caption, split, file name or image file (by size and time) changes."""
    digest = hashlib.sha256()
    for records in groups.values():
        for record in records:
            try:
                status = record.image.stat()
                stamp = [status.st_size, status.st_mtime_ns]
            except OSError:
                stamp = [0, 0]
            digest.update(json.dumps([record.file_name, record.corpus, record.split, record.captions,
                                      record.translated, stamp]).encode())
    return digest.hexdigest()


def _write_shards(groups: Mapping[tuple[str, str], Sequence[Record]], output: Path, size: int, processes: int,
                  report: Callable[[str], None]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Write all shards that are not there yet -> ({shard: content hash}, what was left out)."""
    parts = {f"{corpus}-{split}-{start // SHARD_IMAGES:05d}.parquet": records[start:start + SHARD_IMAGES]
             for (corpus, split), records in groups.items() for start in range(0, len(records), SHARD_IMAGES)}
    results: dict[str, tuple[str, list]] = {}
    for name in parts:
        digest = output / f".{name}.digest"  # written after its shard: the shard is whole
        if digest.is_file() and (output / name).is_file():
            results[name] = tuple(json.loads(digest.read_text()))
    missing = [name for name in parts if name not in results]
    started, done, total = time.perf_counter(), 0, sum(len(parts[name]) for name in missing)
    # spawned, not forked: a notebook's process has threads
    with ProcessPoolExecutor(min(processes, max(1, len(missing))), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_write_shard, output / name, parts[name], size): name for name in missing}
        for future in as_completed(futures):
            name = futures[future]
            results[name] = future.result()
            write_json(output / f".{name}.digest", results[name])
            done += len(parts[name])
            report(f"prepare: {done}/{total} images, {done / (time.perf_counter() - started):.0f} images/s")
    ordered = {name: results[name] for name in sorted(parts)}
    return {name: digest for name, (digest, _) in ordered.items()}, [tuple(i) for _, o in ordered.values() for i in o]


def _write_references(groups: Mapping[tuple[str, str], Sequence[Record]], data_root: Path, output: Path) -> None:
    """References of every set that can be scored. The boards' are held by the organiser, here beside drawn corpora."""
    for name in ("val", "test"):
        references = {r.file_name: list(r.captions) for (_, split), records in groups.items() if split == name
                      for r in records}
        if references:
            write_json(output / f"references-{name}.json", references)
    for board in ("board-a", "board-b"):
        files = {r.file_name for (_, split), records in groups.items() if split == board for r in records}
        if files and (Path(data_root) / "truth").is_dir():
            held = miniature.load_board_references(Path(data_root), board)
            write_json(output / f"references-{board}.json", {f: c for f, c in held.items() if f in files})
            truth = miniature.load_truth(Path(data_root))
            write_json(output / f"truth-{board}.json",
                       {f: scene for (_, f), scene in truth.items() if f in files and scene["split"] == board})
