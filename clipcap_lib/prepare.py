"""Raw corpora -> checked, sharded Parquet with embedded images, a vocabulary, and reference files. No torch here.

    runs/<preset>/data/
      .options                           what was asked for, see `prepare_again`
      manifest.json                      what is there, what was left out and what was found; written last
      findings.csv                       what the checks found, one a line: kind, corpus, split, place, detail
      <corpus>-<split>-<n>.parquet       Hugging Face datasets form: image, file_name, corpus, split, captions, translated,
                                         tags (a list, empty but for images of COCO-CN)
      tokenizer/                         character vocabulary of the training captions
      references-<set>.json              {file: [captions]} of every set that can be scored
      truth-<set>.json                   {file: scene} of drawn boards, for slot accuracy and for checking maps

Shards are written by several processes (`shards`), each beside its place and moved there; an interrupted run goes on where
it was. Training images that are copies of evaluation images are taken out, see `checks`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clipcap_lib import checks, shards
from clipcap_lib.checks import Finding
from clipcap_lib.config import Config, InputError, fingerprint
from clipcap_lib.config import data_root as chosen_root
from clipcap_lib.corpora import LeftOut, Reading, Record, miniature, own_table, read_corpora
from clipcap_lib.corpora.things import COLOURS, KINDS
from clipcap_lib.files import exclusive, read_json, write_atomically, write_json, writing
from clipcap_lib.images import JPEG_QUALITY
from clipcap_lib.tokenizer import build_tokenizer, read_vocabulary
from clipcap_lib.validator import LABELLED, CaptionLook, left_out_findings, look_through, other_captions

Groups = dict[tuple[str, str], list[Record]]  # (corpus, split) -> records
OPTIONS = ".options"
HELD_OUT = 0.05, 1000  # of the training images, where no corpus has a split for validation or test: this share, at most


def evaluation_sets(data: Path) -> list[str]:
    """The sets that can be scored, boards first: those with a references file under `data`."""
    order = ("board-a", "board-b", "test", "val")
    return [name for name in order if (Path(data) / f"references-{name}.json").is_file()]


def prepare(config: Config, output: Path, data_root: Path | None = None, corpora: Iterable[str] | None = None,
            vocabulary: Path | None = None, limit: Mapping[str, int] | None = None, skip_damaged: bool = False,
            processes: int | None = None, report: Callable[[str], None] = print, keep_leaks: bool = False,
            captions: Mapping[str, str] | None = None, table: Path | None = None, images: Path | None = None) -> Path:
    """Prepare the corpora under `data_root` into `output` and return it; at once if nothing has changed.

    Without `data_root` the miniature corpora are drawn beside `output`. Where no corpus has a split for validation, or
    nothing to report scores on, training images are held out (`HELD_OUT`). `corpora`: exactly these instead of all that
    are there. `vocabulary`: the original's vocab_cn.json instead of a vocabulary of the training captions. `limit`:
    most images a split, spread over the corpora (for --debug). Training images that are copies of evaluation images are
    left out unless `keep_leaks`. `captions`: {"flickr8k-cn": "zhb"}, see `corpora.caption_choices`. `table`: a .csv or
    .jsonl of one's own instead of any corpus, its files in the folder `images` (default: the table's). Raises InputError on
    input that cannot be used, and on damage (missing or unreadable images, empty captions) unless `skip_damaged` leaves it
    out and counts it.
    """
    request = _Request(data_root, corpora and list(corpora), captions, table, images, vocabulary, limit, skip_damaged,
                       keep_leaks)
    return _alone(config, Path(output), lambda: request, processes, report)


def prepare_again(config: Config, output: Path, data_root: Path | None = None,
                  report: Callable[[str], None] = print) -> Path:
    """Prepare into `output` with the options that it was last prepared with; at once if nothing has changed.

    So notebook 01 does not undo what `prepare` was asked for. Corpora are read from `data_root`, else from CLIPCAP_DATA,
    else from where they were read. Where nothing was prepared, without options. Raises InputError as `prepare` does, and
    for a root where a table of one's own was prepared.
    """
    def request() -> _Request:
        options = options_of(output) or {}
        if told := [f"{name} {value}" for name, value in options.items() if name != "data_root"]:
            report(f"prepare: as before, with {', '.join(told)}")
        if not options.get("table"):
            root = data_root or os.environ.get("CLIPCAP_DATA") or options.get("data_root")
            return _Request(**{**options, "data_root": chosen_root(config, root)})
        if data_root:
            raise InputError(f"{data_root}: {output} was prepared from {options['table']}; leave out the data root (DATA), "
                             "or run `python -m clipcap_lib prepare` with it first")
        return _Request(**options)

    return _alone(config, Path(output), request, None, report)


def options_of(data: Path) -> dict[str, Any] | None:
    """What `prepare` was given when it last began to write `data`, by the names of its parameters; None if it never did."""
    path = Path(data) / OPTIONS
    return dict(read_json(path)) if path.is_file() else None


def _alone(config: Config, output: Path, request: Callable[[], _Request], processes: int | None,
           report: Callable[[str], None]) -> Path:
    """Prepare what is asked for once no other process is at work here: it may change what was prepared last."""
    with exclusive(output.parent, report=report):
        asked = request()
        with shards.workers(processes or os.cpu_count() or 1,
                            not asked.drawn and not (output / "manifest.json").is_file()) as pool:
            return _prepare(config, output, asked, pool, report)


def check(config: Config, output: Path, data_root: Path | None = None, corpora: Iterable[str] | None = None,
          vocabulary: Path | None = None, limit: Mapping[str, int] | None = None, processes: int | None = None,
          report: Callable[[str], None] = print, captions: Mapping[str, str] | None = None, table: Path | None = None,
          images: Path | None = None) -> list[Finding]:
    """Only look: list in `output` (CSV, one a line) and report what `prepare` would find, leave out or remove.

    The captions that a corpus offers besides those that are read (machine-translated ones, say) are checked as well.
    Damage is a finding here. Raises InputError on input that cannot be used at all.
    """
    request = _Request(data_root, corpora and list(corpora), captions, table, images, limit=limit)
    with shards.workers(processes or os.cpu_count() or 1, not request.drawn) as pool:
        readings, groups, root = _read(Path(output).parent, request, report, "check")
        groups = {key: records for key, records in groups.items() if key[0] != LABELLED}
        look = CaptionLook(config, read_vocabulary(vocabulary) if vocabulary else None)
        parts = shards.process(groups, None, config.stored_size, pool, report, "check", meanwhile=lambda: look.look(groups))
    state = look_through(groups, parts, look, keep_leaks=False, fate="prepare removes it")
    findings = [*left_out_findings(readings), *state.findings, *([] if table else other_captions(root, readings))]
    with writing(output):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(output), lambda place: place.write_text(checks.findings_file(findings), encoding="utf-8"))
    counts = checks.count(findings)
    report(checks.table(counts) if counts else "check: nothing found")
    report(f"check: {len(findings)} findings in {sum(map(len, groups.values()))} images -> {output}")
    return findings


@dataclass(frozen=True)
class _Request:
    """What is asked for, see `prepare`."""

    data_root: Path | str | None = None
    corpora: list[str] | None = None
    captions: Mapping[str, str] | None = None
    table: Path | str | None = None
    images: Path | str | None = None
    vocabulary: Path | str | None = None
    limit: Mapping[str, int] | None = None
    skip_damaged: bool = False
    keep_leaks: bool = False

    def options(self) -> dict[str, Any]:
        """What was given, as JSON, wherever the process stands."""
        return {name: str(Path(value).absolute()) if isinstance(value, str | os.PathLike) else value
                for name, value in asdict(self).items() if value}

    @property
    def drawn(self) -> bool:
        return self.data_root is None and self.table is None


def _read(run: Path, source: _Request, report: Callable[[str], None],
          what: str = "prepare") -> tuple[dict[str, Reading], Groups, Path]:
    """Read (or draw, under `run`) the corpora -> readings, records by (corpus, split), the root that was read."""
    if source.table:
        readings = {own_table.CORPUS: own_table.read(source.table, source.images)}
        return readings, _groups(readings, source.limit), Path(source.table)
    if source.data_root is None:
        with exclusive(run, ".drawing.lock", report=report), writing(run / "corpora"):
            miniature.write_corpora(run / "corpora")
    root = Path(source.data_root or run / "corpora")
    readings = _held_out(read_corpora(root, source.corpora, source.captions), root, lambda line: report(f"{what}: {line}"))
    groups = _groups(readings, source.limit)
    if labelled := _labelled(root):
        groups[LABELLED, LABELLED] = labelled
    return readings, groups, root


def _prepare(config: Config, output: Path, request: _Request, pool: Executor, report: Callable[[str], None]) -> Path:
    started, keep_leaks, skip_damaged = time.perf_counter(), request.keep_leaks, request.skip_damaged
    readings, groups, root = _read(output.parent, request, report)
    left_out = [item for reading in readings.values() for item in reading.left_out]
    _refuse_damage(left_out, skip_damaged)
    _refuse_one_name_for_two(groups)
    if not any(split == "train" for _, split in groups):
        raise InputError(f"{root}: no training images in {', '.join(readings)}; check the split files"
                         f"{' and the choice of captions' if request.captions else ''}")
    vocabulary = read_vocabulary(Path(request.vocabulary)) if request.vocabulary else None
    wanted = {"stored_size": config.stored_size, "vocabulary_minimum": config.vocabulary_minimum,
              "jpeg_quality": JPEG_QUALITY, "vocabulary": vocabulary,
              "records": _records_digest(groups), **({"leaks": "kept"} if keep_leaks else {})}
    inputs = fingerprint(wanted)
    manifest_path = output / "manifest.json"
    before = read_json(manifest_path) if manifest_path.is_file() else {}
    if [before.get(key) for key in ("inputs", "checks")] == [inputs, checks.VERSION] and _is_whole(output, before):
        _refuse_damage([LeftOut(*item, damaged=True) for item in before.get("unreadable", ())], skip_damaged)
        with writing(output):
            write_json(output / OPTIONS, request.options())
        report(f"prepare: nothing has changed; {output.parent.name}/{output.name} is ready")
        return output

    with writing(output):
        write_json(output / OPTIONS, request.options())  # first: stopped by damage or a kill, it was still asked for
        _make_room(output, output / f".inputs-{inputs}-{checks.VERSION}")
    captions, findings = CaptionLook(config, vocabulary), []

    def meanwhile() -> None:
        captions.look(groups)
        findings.extend(left_out_findings(readings))
        build_tokenizer(captions.tokens)  # for its imports, which take seconds

    parts = shards.process(groups, output, config.stored_size, pool, report, meanwhile=meanwhile)
    broken = [LeftOut(place, reason, damaged=True) for part in parts.values() for place, reason, _ in part.left_out]
    _refuse_damage(broken, skip_damaged)  # without a manifest nothing is taken for whole; the shards can be used again
    state = look_through(groups, parts, captions, keep_leaks, "kept" if keep_leaks else "removed")
    left = {split for _, split in state.groups}
    if "train" not in left and state.removed:
        raise InputError(f"{root}: no image is left to train on, all of them are copies of evaluation images; check the "
                         "split files, or keep them with --keep-leaks")
    for split, purpose in (("train", "train on"), ("val", "choose checkpoints by"), ("test", "test on")):
        if split not in left and any(split == which for _, which in groups):
            place, reason, _ = next(parts[name].left_out[0] for name, rows in shards.cut(groups).items()
                                    if rows[0].split == split)
            raise InputError(f"{root}: no image is left to {purpose}, all of them cannot be read ({place}: {reason}); "
                             "download them again")
    content = {name: part.content for name, part in parts.items()}
    findings += state.findings
    with writing(output):
        for name, (records, numbers) in state.removed.items():
            content[name] = shards.without(output / name, parts[name], records, numbers)
        build_tokenizer(state.tokens).save_pretrained(output / "tokenizer")
        references = _write_references(state.groups, root, output)
        write_atomically(output / "findings.csv",
                         lambda place: place.write_text(checks.findings_file(findings), encoding="utf-8"))
    removed = sum(len(numbers) for _, numbers in state.removed.values())
    left_out += broken
    corpora_only = {f"{corpus}/{split}": records for (corpus, split), records in state.groups.items() if corpus != LABELLED}
    manifest = {
        "inputs": inputs, "checks": checks.VERSION, "fingerprint": fingerprint(inputs, dict(sorted(content.items()))),
        "drawn": request.drawn, "vocab_size": len(state.tokens),
        "images": {name: len(records) for name, records in corpora_only.items()},
        "captions": {name: sum(len(r.captions) for r in records) for name, records in corpora_only.items()},
        "caption_sets": {f"{corpus}/{split}": which for corpus, reading in readings.items()
                         for split, which in reading.captions.items()},
        "translated": {name: dict(Counter(r.translated for r in records for _ in r.captions))
                       for name, records in corpora_only.items()},
        "left_out": Counter(item.reason for item in left_out), "removed": removed, "findings": checks.count(findings),
        "left_out_places": [[item.place, item.reason] for item in left_out[:1000]],
        "unreadable": [[item.place, item.reason] for item in broken],
        "shards": dict(sorted(content.items())), "references": references,
        "seconds": round(time.perf_counter() - started, 1)}
    with writing(output):
        write_json(manifest_path, manifest)
    leaks = sum(finding.kind.startswith(checks.LEAK) for finding in findings)
    if leaks:
        report(f"prepare: {leaks} training images are copies of validation, test or board images: "
               + ("kept, as you asked; scores on those sets will flatter" if keep_leaks else
                  "removed from training (findings.csv lists them; --keep-leaks keeps them)"))
    total = sum(len(records) for records in state.groups.values())
    training = sum(len(r.captions) for (_, split), records in state.groups.items() if split == "train" for r in records)
    place = f"{output.parent.name}/{output.name}"
    report(f"prepare: {total} images, {training} training captions, {len(state.tokens)} tokens, {len(left_out)} left out, "
           f"{len(findings)} findings{f' (listed in {place}/findings.csv)' if findings else ''}, "
           f"in {time.perf_counter() - started:.0f} s -> {place}")
    return output


def _make_room(output: Path, mine: Path) -> None:
    """Take away what other settings left, and of ours what is not whole; first the manifest, which vouches for the rest."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "manifest.json").unlink(missing_ok=True)
    old = [*output.glob(".*.partial")]  # of a run that was killed
    if not mine.exists():  # shards of other settings must not be taken for ours
        old += [path for pattern in ("*.parquet", ".*.looks", ".*.digest", ".inputs-*", "*.json", "*.csv")
                for path in output.glob(pattern)]
        shutil.rmtree(output / "cache", ignore_errors=True)  # what others made of them
    for path in old:
        path.unlink(missing_ok=True)
    mine.touch()


def _is_whole(output: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether all the files that the manifest tells of are there."""
    files = [*manifest.get("shards", ()), *manifest.get("references", ()), "tokenizer/tokenizer.json", "findings.csv"]
    return all((output / name).is_file() for name in files)


def _held_out(readings: Mapping[str, Reading], root: Path, report: Callable[[str], None]) -> dict[str, Reading]:
    """The readings; where none of them has validation images, or a test split or board with captions, some of the training
    images are: which ones, their names decide.
    """
    there = {record.split for reading in readings.values() for record in reading.records}
    if (root / "truth").is_dir() and there & {"board-a", "board-b"}:
        there.add("test")  # a board that comes with captions does as well
    missing = [split for split in ("val", "test") if split not in there]
    training = [record for one in readings.values() for record in one.records if record.split == "train"]
    if not missing or len(training) <= len(missing):
        return dict(readings)
    count = max(1, min(int(HELD_OUT[0] * len(training)), HELD_OUT[1]))
    drawn = sorted(training, key=lambda record: (own_table.place_of(record.file_name), record.corpus, record.file_name))
    splits = {id(record): split for number, split in enumerate(missing)
              for record in drawn[number * count:(number + 1) * count]}
    for split in missing:
        report(f"nothing here has a {split} split; {count} of {len(training)} training images are held out as one")
    found = {}
    for corpus, one in readings.items():
        records = [replace(r, split=splits.get(id(r), r.split)) for r in one.records]
        sets = {r.split: one.captions["train"] for r in records if r.split in missing} if "train" in one.captions else {}
        found[corpus] = Reading(records, one.left_out, one.captions | sets)
    return found


def _refuse_damage(left_out: Sequence[LeftOut], skip_damaged: bool) -> None:
    """Raise InputError if something is damaged, unless that is to be left out."""
    damaged = [item for item in left_out if item.damaged]
    if damaged and not skip_damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise InputError(f"{damaged[0].place}: {damaged[0].reason}{more}; mend it, or leave out what is damaged with "
                         f"--skip-damaged")


def _refuse_one_name_for_two(groups: Groups) -> None:
    """Raise InputError if two corpora have an evaluation image of the same name: one's captions would be taken for both."""
    for split in {split for _, split in groups} - {"train", LABELLED}:
        first: dict[str, str] = {}
        for (corpus, which), records in groups.items():
            for record in records if which == split else ():
                if first.setdefault(record.file_name, corpus) != corpus:
                    raise InputError(f"{record.image}: the {split} images of {first[record.file_name]} and {corpus} share "
                                     f"this name, by which captions are scored; prepare one of the two, with --corpora")


def _labelled(data_root: Path) -> list[Record]:
    """The labelled images beside drawn corpora as records with two captions: what it is, then its colour."""
    paths = sorted((data_root / miniature.PORTRAITS).glob("*/*.jpg"))
    if other := [path for path in paths if path.parent.name not in KINDS or path.name.split()[0] not in COLOURS]:
        raise InputError(f"{other[0]}: does not say which kind and colour it shows, as <kind>/<colour> <kind> <number>.jpg; "
                         "if an older version drew these corpora, remove their folder, and they are drawn again")
    return [Record(path, path.name, LABELLED, LABELLED,
                   (KINDS[path.parent.name].chinese, f"{COLOURS[path.name.split()[0]]}色")) for path in paths]


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
    """Changes when any caption, tag, split, file name or image file (by size and time) changes."""
    digest = hashlib.sha256()
    for records in groups.values():
        for record in records:
            try:
                status = os.stat(record.image)
                stamp = status.st_size, status.st_mtime_ns
            except OSError:
                stamp = 0, 0
            digest.update(repr((record.file_name, record.corpus, record.split, record.captions, record.translated,
                                record.tags, stamp)).encode())
    return digest.hexdigest()


def _write_references(groups: Mapping[tuple[str, str], Sequence[Record]], data_root: Path, output: Path) -> list[str]:
    """References of every set that can be scored -> the files. The boards' are held by the organiser, here beside drawn
    corpora.
    """
    content: dict[str, Any] = {}
    for name in ("val", "test"):
        references = {r.file_name: list(r.captions) for (_, split), records in groups.items() if split == name
                      for r in records}
        if references:
            content[f"references-{name}.json"] = references
    for board in ("board-a", "board-b"):
        files = {r.file_name for (_, split), records in groups.items() if split == board for r in records}
        if files and (Path(data_root) / "truth").is_dir():
            held = miniature.load_board_references(Path(data_root), board)
            content[f"references-{board}.json"] = {f: c for f, c in held.items() if f in files}
            truth = miniature.load_truth(Path(data_root))
            content[f"truth-{board}.json"] = {f: scene for (_, f), scene in truth.items()
                                              if f in files and scene["split"] == board}
    for file, captions in content.items():
        write_json(output / file, captions)
    return list(content)
