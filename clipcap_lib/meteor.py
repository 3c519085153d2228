"""METEOR for Chinese without Java: exact matches of characters, chunk penalty, statistics pooled over images.

The reference is `meteor-1.5.jar -l en -norm` (Denkowski and Lavie, 2014), the call every captioning scorer makes. It
splits Chinese text into characters, and none of its English stems, synonyms and paraphrases applies to them, so that
exact matches remain. English words inside a caption do meet those tables in the jar; here they match exactly or not. The
jar also rewrites curly quotes, ellipses and numbers with points or commas ("3.5", "1,000"): captions that hold such can
differ in the second digit, those of Flickr8k-CN's test split do not in the fourth.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter

import numpy as np

ALPHA, BETA, GAMMA = 0.85, 0.20, 0.60  # the jar's parameters for `-l en`
COLUMNS = ("candidate length", "reference length", "matches", "chunks")  # what is pooled over images
BEAM = 40  # partial alignments the jar's search keeps
_MATCH, _CHUNK = 1 << 80, 1 << 40  # steps of a path's rank; distances stay far below the smaller
_rank = itemgetter(0)

# The jar keeps runs of western letters and digits together and makes every other character a token of its own.
_TOKEN = re.compile(r"[0-9A-Za-zÀ-ÖØ-öø-žЀ-ӿ]+|\S")


def tokenize(words: Sequence[str]) -> list[str]:
    """The tokens the jar sees in a segmented caption: lower case, one for each Chinese character."""
    return _TOKEN.findall(" ".join(words).lower())


def pooled_score(statistics: np.ndarray) -> np.ndarray:
    """METEOR in [0, 1] from summed statistics. statistics (..., 4), columns as in `COLUMNS` -> (...).

    F = P R / (alpha P + (1 - alpha) R), score = F (1 - gamma (chunks / matches)^beta): Denkowski and Lavie (2014).
    """
    candidate_length, reference_length, matches, chunks = np.moveaxis(np.asarray(statistics, dtype=float), -1, 0)
    matched = np.where(matches > 0, matches, 1.0)
    precision, recall = matched / np.maximum(candidate_length, 1), matched / np.maximum(reference_length, 1)
    f_mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
    return np.where(matches > 0, f_mean * (1 - GAMMA * (chunks / matched) ** BETA), 0.0)


def image_statistics(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[int, int, int, int]:
    """Statistics (`COLUMNS`) of one candidate against the reference that scores best, the first of equals.

    candidate and references are token lists of `tokenize`. A perfect match in one chunk counts as no chunk.
    """
    counts, pairs = Counter(candidate), Counter(pairwise(candidate))
    bounds = []  # (minus the highest score possible, index, statistics that give it, whether it is reached)
    for index, reference in enumerate(references):
        found = Counter(reference)
        shared = [(count, found[token]) for token, count in counts.items() if token in found]
        matches = sum(map(min, shared))
        # Two matches join one chunk only where they are neighbours in both texts; where no token is repeated, they do.
        joined = sum((Counter(pairwise(reference)) & pairs).values())
        best_case = _statistics(candidate, reference, matches, max(matches - joined, min(matches, 1)))
        bounds.append((-_score(best_case), index, best_case, all(pair == (1, 1) for pair in shared)))
    best, best_score, best_index = (len(candidate), 0, 0, 0), -1.0, -1
    for bound, index, found, reached in sorted(bounds):
        if -bound < best_score:
            break
        if not reached:
            found = _statistics(candidate, references[index], *align(candidate, references[index]))
        value = _score(found)
        if value > best_score or (value == best_score and index < best_index):
            best, best_score, best_index = found, value, index
    return best


def align(candidate: Sequence[str], reference: Sequence[str]) -> tuple[int, int]:
    """(matches, chunks) of the jar's alignment: the most matches, then the fewest chunks, then the shortest distance.

    Exact but for captions that repeat many characters. There the jar's beam search misses the fewest chunks, and so
    must this: the same beam, the same order of ties, and the jar's habit of adding a match's distance to the path that
    goes without it instead of to the path that takes it.
    """
    places: dict[str, list[int]] = {}
    for place, token in enumerate(candidate):
        places.setdefault(token, []).append(place)
    counts = Counter(reference)
    # A path: its rank as one number, which sorts as (-matches, closed chunks, distance); bits of the candidate's places
    # already used; the place after the last match (-1: the token before is not matched).
    paths = [(0, 0, -1)]
    for current, token in enumerate(reference):
        paths.sort(key=_rank)
        options = places.get(token, ())
        certain = len(options) == 1 and counts[token] == 1
        following = []
        for rank, used, end in paths[:BEAM]:
            closed = rank if end == -1 else rank + _CHUNK
            for place in options:
                if not used >> place & 1:
                    distance = abs(current - place)
                    following.append(((rank if place == end else closed) - _MATCH + certain * distance,
                                      used | 1 << place, place + 1))
                    rank, closed = rank + distance, closed + distance
            if not certain:
                following.append((closed, used, -1))
        paths = following
    paths.sort(key=_rank)
    best = min(rank if end == -1 else rank + _CHUNK for rank, _, end in paths[:BEAM])
    return -(best // _MATCH), best % _MATCH // _CHUNK


def _statistics(candidate, reference, matches, chunks) -> tuple[int, int, int, int]:
    perfect = chunks == 1 and matches == len(candidate) == len(reference)
    return len(candidate), len(reference), matches, 0 if perfect else chunks


def _score(statistics: tuple[int, int, int, int]) -> float:
    candidate_length, reference_length, matches, chunks = statistics
    if not matches:
        return 0.0
    f_mean = 1 / ((1 - ALPHA) * candidate_length / matches + ALPHA * reference_length / matches)
    return f_mean * (1 - GAMMA * (chunks / matches) ** BETA)
