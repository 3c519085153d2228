"""The look through all corpora at once: the vocabulary, what is wrong with captions, copies of images and which of them go.

`checks` says what a finding is; here they are gathered from what was read and from what the workers saw of the images.
"""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipcap_lib import checks, shards
from clipcap_lib.checks import Finding
from clipcap_lib.config import Config, InputError
from clipcap_lib.corpora import CORPORA, Reading, Record
from clipcap_lib.shards import Groups
from clipcap_lib.tokenizer import build_vocabulary

LABELLED = "labelled"  # stands for corpus and split of the labelled images beside drawn corpora


class CaptionLook:
    """The vocabulary of the training captions, and what is wrong with all captions."""

    def __init__(self, config: Config, vocabulary: list[str] | None):
        self.minimum, self.given = config.vocabulary_minimum, vocabulary
        self.tokens: list[str] = []
        self.findings: list[Finding] = []

    def look(self, groups: Groups) -> None:
        captions = [c for (_, split), records in groups.items() if split == "train" for r in records for c in r.captions]
        self.tokens = self.given or build_vocabulary(captions, self.minimum)
        corpora = (record for (corpus, _), records in groups.items() if corpus != LABELLED for record in records)
        self.findings = list(checks.check_captions(corpora, self.tokens if captions else ()))


@dataclass(frozen=True)
class State:
    """The corpora after the look through them."""

    groups: Groups  # without what is unreadable or removed
    removed: dict[str, tuple[Sequence[Record], set[int]]]  # shard -> its records, and the numbers of those to take out
    findings: list[Finding]
    tokens: list[str]


def look_through(groups: Groups, parts: Mapping[str, shards.Part], captions: CaptionLook, keep_leaks: bool,
                  fate: str) -> State:
    """Copies among the images, and what is wrong with the captions. Labelled images are no corpus: they are left alone.

    captions: after their look at all of the groups.
    """
    places = shards.cut(groups)
    compared = [name for name in places if not name.startswith(f"{LABELLED}-")]
    owners = [(name, int(number)) for name in compared for number in parts[name].kept]
    records = [places[name][number] for name, number in owners]
    copies = checks.find_copies(records, [digest for name in compared for digest in parts[name].digests],
                                np.concatenate([parts[name].thumbnails for name in compared])) if records else []
    removed: dict[str, set[int]] = defaultdict(set)
    for copy in copies if not keep_leaks else ():
        if copy.kind.startswith(checks.LEAK):
            name, number = owners[copy.image]
            removed[name].add(number)
    findings = [Finding(reason, rows[0].corpus, rows[0].split, place, detail) for name, rows in places.items()
                for place, reason, detail in parts[name].left_out]
    if removed or findings:  # without what is gone
        left: Groups = {key: [] for key in groups}
        for name, rows in places.items():
            left[rows[0].corpus, rows[0].split] += [rows[n] for n in parts[name].kept if n not in removed.get(name, ())]
        groups = {key: rows for key, rows in left.items() if rows}
        captions.look(groups)
    findings += [*checks.copy_findings(copies, records, fate), *captions.findings]
    return State(groups, {name: (places[name], numbers) for name, numbers in removed.items()}, findings, captions.tokens)


def left_out_findings(readings: Mapping[str, Reading]) -> list[Finding]:
    """What the readers left out, as findings."""
    return [finding for corpus, reading in readings.items()
            for finding in checks.check_left_out(corpus, reading.left_out, reading.records)]


def other_captions(root: Path, readings: Mapping[str, Reading]) -> list[Finding]:
    """Findings in the captions that a corpus offers besides those that were read, under "<corpus> (<captions>)".

    Captions that were not downloaded are none; what was found in the others' files already is not told again.
    """
    findings = []
    for corpus, reading in readings.items():
        module = importlib.import_module(f"clipcap_lib.corpora.{CORPORA[corpus]}")
        known = {(f.kind, f.detail or f.place) for f in checks.check_left_out(corpus, reading.left_out, reading.records)}
        for which in getattr(module, "CAPTIONS", ()):
            name = f"{corpus} ({which})"
            try:
                other = module.read(root / corpus, which)
            except InputError as error:
                if not re.search("no such file|neither release", str(error)):
                    findings.append(Finding("captions cannot be read", name, "", which, str(error)))
                continue
            if [r.captions for r in other.records] == [r.captions for r in reading.records]:
                continue
            findings += [f for f in checks.check_left_out(name, other.left_out, other.records)
                         if (f.kind, f.detail or f.place) not in known]
            findings += [f._replace(corpus=name) for f in checks.check_captions(other.records) if f.kind != checks.REPEATED]
    return findings
