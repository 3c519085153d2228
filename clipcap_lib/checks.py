"""What is wrong with the corpora: a finding a line. Captions, what readers left out, and copies of images.

A perceptual hash only proposes copies, a comparison of thumbnails confirms them: of drawn scenes, which share their
backgrounds, a hash alone takes some for copies that are none. `prepare --check` reports; `prepare` removes leaks as well.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipcap_lib.corpora import LeftOut, Record
from clipcap_lib.corpora.lines import NO_SPLIT
from clipcap_lib.images import THUMBNAIL
from clipcap_lib.tokenizer import normalise_caption

VERSION = 1  # raised with every change of what is found or removed, so that older prepared data is checked again
ABSURDLY_LONG = 100  # characters: the original's context; of the corpora held, the longest caption has 28

NO_PHOTO = "entry has no photo"
TAGGED = "part-of-speech tags in caption"
SEGMENTED = "segmentation spaces in caption"
WORDLESS = "caption without words"
LONG = "caption is absurdly long"
UNKNOWN = "characters outside the vocabulary"
REPEATED = "training caption is repeated"
LEAK = "leak"  # begins the kinds whose training side goes
COPIES = {  # (same file?, relation) -> kind
    (True, "leak"): f"{LEAK}: training image is the same file as an evaluation image",
    (False, "leak"): f"{LEAK}: training image is a near copy of an evaluation image",
    (True, "train"): "training image is the same file as another",
    (False, "train"): "training image is a near copy of another",
    (True, "evaluation"): "evaluation image is the same file as another",
    (False, "evaluation"): "evaluation image is a near copy of another",
}

# Root mean square differences of thumbnails, in grey levels of 255. Copies that were planted (re-encoded at qualities
# 30 to 95, resized by 0.5 to 2, squashed) differ by 1.6 at most on the drawn corpora and by 1.0 on Flickr8k-CN, at most
# 0.07 of the thumbnail's own contrast. Of images that are no copies, the nearest two differ by 5.2 among the 4,080 drawn
# ones and by 12.2 among the 8,091 photos.
NEAR = 3.0
NEAR_OF_CONTRAST = 0.15
FLAT = 1.0  # contrast below which a thumbnail shows nothing: blank images are copies only if the file is the same
BANDS = 8  # bytes of a hash; of two hashes that differ in fewer bits, one byte is the same. Planted copies: 6 bits at most


class Finding(NamedTuple):
    """Something worth knowing about a corpus: what kind, and where."""

    kind: str
    corpus: str
    split: str  # "" where it belongs to none
    place: str  # "file:line", or "<image>#<number>" of a caption, or the image
    detail: str = ""


class Copy(NamedTuple):
    """An image and another that shows the same; the first is the one to be told of."""

    image: int  # numbers in the list of records
    other: int
    kind: str  # of COPIES
    distance: float  # grey levels, root mean square; 0 for the same file


# -- captions ----------------------------------------------------------------------------------------------------------

_TAG = re.compile(r"[\u3400-\u9fff][:/_][a-z]{1,3}[0-9]?(?![A-Za-z0-9])")  # 男人:n  男人/n  男人_nr1
_SUSPECT = re.compile(r"[:/_\s]")
_GAP = re.compile(r"(?<=[\u3400-\u9fff，。])[ \t\u3000]+(?=[\u3400-\u9fff，。])")


def is_tagged(caption: str) -> bool:
    """Whether a part of speech hangs on a Chinese word, as in `男人:n`."""
    return bool(_TAG.search(caption))


def is_segmented(caption: str) -> bool:
    """Whether white space parts Chinese characters into words of four on average or fewer; one slip in a sentence may be."""
    gaps = len(_GAP.findall(caption))
    return gaps > 0 and 4 * (gaps + 1) >= sum(not c.isspace() for c in caption)


def check_captions(records: Iterable[Record], known: Iterable[str] = ()) -> Iterator[Finding]:
    """Findings in captions. `known`: the vocabulary's characters; without any, none is taken to be outside."""
    known, first = set(known), {}
    for record in records:
        for number, caption in enumerate(record.captions):
            place, text = f"{record.file_name}#{number}", normalise_caption(caption)
            found = []
            if _SUSPECT.search(caption):  # few have any of these, and the closer look takes longer
                found += [(kind, caption) for kind, holds in ((TAGGED, is_tagged), (SEGMENTED, is_segmented))
                          if holds(caption)]
            if not any(map(str.isalnum, text)):
                found.append((WORDLESS, caption))
            if len(text) > ABSURDLY_LONG:
                found.append((LONG, f"{len(text)} characters: {text[:30]}…"))
            if known and (unknown := set(text) - known):
                found.append((UNKNOWN, "".join(sorted(unknown))))
            if record.split == "train":
                if caption in first:
                    found.append((REPEATED, f"{caption} (first: {first[caption]})"))
                else:
                    first[caption] = place
            for kind, detail in found:
                yield Finding(kind, record.corpus, record.split, place, detail)


# -- what readers left out ---------------------------------------------------------------------------------------------

def check_left_out(corpus: str, left_out: Iterable[LeftOut], records: Sequence[Record]) -> Iterator[Finding]:
    """What a reader left out as findings. Of an image in no split it is also said if its photo is not there."""
    folders = {record.image.parent for record in records}
    for item in left_out:
        name, detail = _image_of(item.place) if item.reason == NO_SPLIT else "", ""
        if name and folders and not any((folder / n).is_file() for folder in folders for n in (name, f"{name}.jpg")):
            yield Finding(NO_PHOTO, corpus, "", item.place, name)
        else:
            yield Finding(item.reason, corpus, "", item.place, name or detail)


def _image_of(place: str) -> str:
    """The image that an annotation line names: what stands before a '#', a tab or a space; "" if there is no such line."""
    path, _, number = place.rpartition(":")
    if not number.isdecimal() or not Path(path).is_file():
        return ""
    state = Path(path).stat()
    lines = _lines(path, state.st_mtime_ns, state.st_size)
    line = lines[int(number) - 1] if 0 < int(number) <= len(lines) else ""
    name = re.split(r"[#\t ]", line.strip("\ufeff "), maxsplit=1)[0]
    return name if name and "/" not in name and "\\" not in name and name.isprintable() else ""


@lru_cache(maxsize=4)
def _lines(path: str, *_: int) -> list[str]:  # the other two say that it is still the same file
    return Path(path).read_text(encoding="utf-8").split("\n")


# -- copies of images --------------------------------------------------------------------------------------------------

def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Thumbnails (N, T, T) -> 64 bits each, (N, 8) uint8: which of the lowest frequencies lie above their median.

    The pHash of imagehash, of all thumbnails in two products; N calls of that package would take longer than the copies
    are worth, and it needs scipy and PyWavelets.
    """
    place = np.arange(THUMBNAIL)
    cosines = np.cos(np.pi * (2 * place[None] + 1) * place[:, None] / (2 * THUMBNAIL)).astype(np.float32)  # DCT-II
    frequencies = (cosines @ thumbnails.astype(np.float32) @ cosines.T)[:, :9, :9].reshape(len(thumbnails), 81)
    lowest = frequencies[:, 1:65]  # without the mean brightness
    return np.packbits(lowest > np.median(lowest, axis=1, keepdims=True), axis=1)


def near_pairs(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j of thumbnails (N, T, T) that show the same, (pairs, 2) in order, and their distances in grey levels.

    Only those are compared whose hashes share a byte: buckets, instead of all pairs.
    """
    contrasts = thumbnails.std(axis=(1, 2))
    shown = np.flatnonzero(contrasts >= FLAT)
    hashes = perceptual_hashes(thumbnails[shown])
    whole = hashes.view(np.uint64).ravel()
    pairs, distances = [np.zeros((0, 2), np.int64)], [np.zeros(0)]
    for band in range(BANDS):
        order = np.argsort(hashes[:, band], kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(hashes[order, band])) + 1):
            for start in range(0, len(bucket), 1024):  # in blocks: a bucket of many like images must fit in memory
                rows = bucket[start:start + 1024]
                alike = (np.bitwise_count(whole[rows, None] ^ whole[None, bucket]) < BANDS) & (rows[:, None] < bucket)
                for earlier in range(band):  # those were met there
                    alike &= hashes[rows, None, earlier] != hashes[None, bucket, earlier]
                a, b = np.nonzero(alike)
                for part in range(0, len(a), 2**14):
                    i, j = shown[rows[a[part:part + 2**14]]], shown[bucket[b[part:part + 2**14]]]
                    distance = _distances(thumbnails[i], thumbnails[j])
                    near = (distance <= NEAR) & (distance <= NEAR_OF_CONTRAST * np.minimum(contrasts[i], contrasts[j]))
                    pairs.append(np.stack([i, j], axis=1)[near])
                    distances.append(distance[near])
    every, distance = np.concatenate(pairs), np.concatenate(distances)
    order = np.lexsort((every[:, 1], every[:, 0]))
    return every[order], distance[order]


def _distances(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Root mean square differences (N,) in grey levels."""
    return np.sqrt(np.square(ones.astype(np.float32) - others.astype(np.float32)).mean(axis=(1, 2))).astype(float)


def find_copies(records: Sequence[Record], digests: Sequence[str], thumbnails: np.ndarray) -> list[Copy]:
    """Images that show what another shows, one Copy an image at most: a leak before anything else, the same file first.

    digests and thumbnails (N, T, T) are those of `images.look`. Of two training images, or two of evaluation, the later
    one is told of.
    """
    files: dict[str, list[int]] = defaultdict(list)
    for number, digest in enumerate(digests):
        files[digest].append(number)
    clusters = list(files.values())  # the same file is looked at once
    thumbnails = thumbnails[[cluster[0] for cluster in clusters]]
    pairs, apart = near_pairs(thumbnails)
    sides = np.concatenate([pairs, pairs[:, ::-1]])
    order = np.argsort(sides[:, 0], kind="stable")
    sides, apart = sides[order], np.concatenate([apart, apart])[order]
    bounds = np.searchsorted(sides[:, 0], np.arange(len(clusters) + 1))
    # of each cluster the first training image, and the first of evaluation: enough to say what each member is
    is_training = [record.split == "train" for record in records]
    firsts = {side: np.array([next((k for k in cluster if is_training[k] == side), len(records)) for cluster in clusters])
              for side in (True, False)}
    copies = []
    for index, cluster in enumerate(clusters):
        where = slice(bounds[index], bounds[index + 1])
        if len(cluster) == 1 and where.start == where.stop:
            continue
        groups, distances = np.append(index, sides[where, 1]), np.append(0.0, apart[where])
        for number in cluster:
            kinds = [("leak", False), ("train", True)] if is_training[number] else [("evaluation", False)]
            for relation, side in kinds:
                others = firsts[side][groups]
                fits = np.flatnonzero(others < (len(records) if relation == "leak" else number))
                if len(fits):
                    best = fits[np.lexsort((others[fits], distances[fits], fits > 0))[0]]
                    copies.append(Copy(number, int(others[best]), COPIES[bool(best == 0), relation], float(distances[best])))
                    break
    return sorted(copies)


def copy_findings(copies: Iterable[Copy], records: Sequence[Record], fate: str) -> Iterator[Finding]:
    """The copies as findings; `fate` says what becomes of leaks."""
    for copy in copies:
        mine, other = records[copy.image], records[copy.other]
        detail = f"{other.corpus}/{other.split} {other.file_name}, {copy.distance:.1f} grey levels apart"
        yield Finding(copy.kind, mine.corpus, mine.split, mine.file_name,
                      detail + (f"; {fate}" if copy.kind.startswith(LEAK) else ""))


# -- the report --------------------------------------------------------------------------------------------------------

def count(findings: Iterable[Finding]) -> dict[str, dict[str, int]]:
    """{kind: {corpus: number}}, the leaks first, then the rarest kinds: what is common is seldom wrong."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for finding in findings:
        counts[finding.kind][finding.corpus] += 1
    ordered = sorted(counts, key=lambda kind: (not kind.startswith(LEAK), sum(counts[kind].values()), kind))
    return {kind: dict(counts[kind]) for kind in ordered}


def table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """The counts as lines of text, a kind a line and a corpus a column."""
    corpora = list(dict.fromkeys(corpus for row in counts.values() for corpus in row))
    width = max((len(kind) for kind in counts), default=0)
    lines = [" ".join(["".ljust(width), *(f"{corpus:>{max(12, len(corpus))}}" for corpus in corpora)])]
    lines += [" ".join([kind.ljust(width), *(f"{row.get(corpus, 0):>{max(12, len(corpus))},}" for corpus in corpora)])
              for kind, row in counts.items()]
    return "\n".join(lines)


def findings_file(findings: Iterable[Finding]) -> str:
    """The findings as CSV: columns kind, corpus, split, place, detail; one a line, whatever was in the corpus."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(Finding._fields)
    writer.writerows([" ".join(value.split()) for value in finding] for finding in findings)
    return buffer.getvalue()
