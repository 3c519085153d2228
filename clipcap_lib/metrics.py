"""Scores of Chinese captions that say how they were made, retrieval recall, and what training validates with.

All scores are x 100, as the field prints them. Segmentation decides the number: the same human captions have a CIDEr of
108 under jieba and of 180 by characters, so every result carries a signature, and results are compared only under one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np

from clipcap_lib import meteor, rouge
from clipcap_lib.bootstrap import (
    INTERVAL,
    Paired,
    bootstrap_intervals,
    mean_interval,
    null_p_values,
    paired_bootstrap,
    ratio_interval,
)
from clipcap_lib.captions import SEGMENTATIONS, Captions, checked_captions, load_captions, segment
from clipcap_lib.checks import is_segmented
from clipcap_lib.cider import CiderD, DocumentFrequency, cider_d, constant_cider_d, document_frequencies
from clipcap_lib.config import InputError
from clipcap_lib.retrieval import recall_at_k, retrieval_ranks
from clipcap_lib.tokenizer import SPECIAL_TOKENS

__all__ = [
    "INTERVAL", "METRICS", "SEGMENTATIONS", "CiderD", "DocumentFrequency", "Paired", "References", "Scores",
    "best_constant_caption", "bootstrap_intervals", "cider_d", "diversity", "document_frequencies",
    "load_captions", "mean_interval", "null_p_values", "one_against_the_others", "paired_bootstrap",
    "prepare_references", "ratio_interval", "recall_at_k", "retrieval_ranks", "score", "segment", "word_log_odds",
]

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")


# -- caption scores ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class References:
    """The references of a set, segmented once for any number of systems. What a metric needs of them is kept as well."""

    files: tuple[str, ...]
    tokens: list[list[list[str]]]  # images x captions x tokens, none empty
    segmentation: str
    left_out: int  # captions with nothing in them

    @cached_property
    def mark(self) -> str:
        """Changes with the images and with their captions."""
        return hashlib.sha256(repr((self.files, self.tokens)).encode("utf-8")).hexdigest()[:12]

    @cached_property
    def lines(self) -> list[list[str]]:
        """Captions as pycocoevalcap takes them: tokens between spaces."""
        return [[" ".join(tokens) for tokens in rows] for rows in self.tokens]

    @cached_property
    def bleu(self) -> list[tuple[list[int], dict]]:
        """Lengths and n-gram counts of each image's references, by pycocoevalcap."""
        from pycocoevalcap.bleu.bleu_scorer import cook_refs

        return [cook_refs(rows) for rows in self.lines]

    @cached_property
    def meteor(self) -> list[list[list[str]]]:
        return [[meteor.tokenize(tokens) for tokens in rows] for rows in self.tokens]

    @cached_property
    def rouge(self) -> list[list[tuple[dict[str, int], int]]]:
        return [[(rouge.places(tokens), len(tokens)) for tokens in rows] for rows in self.tokens]

    @cached_property
    def cider(self) -> CiderD:
        """CIDEr-D with the document frequencies of these references."""
        return CiderD(self.tokens)

    def signature(self) -> str:
        """How scores against these references are made, in the manner of sacreBLEU (Post, 2018)."""
        counts = sorted({len(rows) for rows in self.tokens})
        name = f"jieba-{version('jieba')}" if self.segmentation == "jieba" else self.segmentation
        per_image = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        return "|".join((
            f"seg:{name}", f"punct:{SEGMENTATIONS[self.segmentation]}", f"refs:{per_image}", "bleu:closest",
            "meteor:exact characters", "rouge:L-beta1.2", "cider:D-sigma6-df:refs", f"images:{len(self.tokens)}",
            f"pycocoevalcap:{version('pycocoevalcap')}", f"v:{version('clipcap-workbook')}"))


def prepare_references(references: Captions | str | Path, segmentation: str = "characters") -> References:
    """Check and segment references, a dictionary or a file. An empty one is left out and counted.

    Raises InputError for what is not `{file: [captions]}`, no images, or an image whose captions are all empty.
    """
    captions = load_captions(references) if isinstance(references, (str, Path)) else checked_captions(references,
                                                                                                      "references")
    if not captions:
        raise InputError("references: no images to score")
    tokens = [[row for row in segment(rows, segmentation) if row] for rows in captions.values()]
    for name, rows in zip(captions, tokens, strict=True):
        if not rows:
            raise InputError(f"references: '{name}' has only empty captions; an image needs one with words")
    return References(tuple(captions), tokens, segmentation, sum(map(len, captions.values())) - sum(map(len, tokens)))


@dataclass(frozen=True)
class Scores:
    """The scores of one system on one set of images, x 100."""

    values: dict[str, float]  # metric -> corpus score
    per_image: dict[str, dict[str, float]]  # file name -> metric -> score of this image alone (BLEU: of the sentence)
    signature: str  # how they were made; scores with another signature are other metrics
    images: int
    counted: dict[str, int]  # what was not as it should be, and was scored all the same
    files: tuple[str, ...] = field(repr=False, default=())
    columns: tuple[str, ...] = field(repr=False, default=())  # names of the statistics
    statistics: np.ndarray = field(repr=False, compare=False, default=None)  # (images, statistics), sums give `corpus`
    references: str = field(repr=False, default="")  # `References.mark`

    def corpus(self, sums: np.ndarray, images: int) -> dict[str, np.ndarray]:
        """Corpus metrics from statistics summed over that many images, for resampling.

        sums (..., statistics) -> metric: (...), x 100. BLEU as pycocoevalcap computes it, from pooled counts; METEOR
        from pooled statistics; ROUGE-L and CIDEr are means over images.
        """
        at = {name: sums[..., index] for index, name in enumerate(self.columns)}
        result = {}
        if "BLEU candidate length" in at:
            tiny, small = 1e-15, 1e-9  # pycocoevalcap's guards against division by zero
            ratio = (at["BLEU candidate length"] + tiny) / (at["BLEU reference length"] + small)
            brevity = np.where(ratio < 1, np.exp(np.minimum(0.0, 1 - 1 / ratio)), 1.0)
            product = 1.0
            for n in range(1, 5):
                product = product * (at[f"BLEU correct {n}"] + tiny) / (at[f"BLEU guess {n}"] + small)
                result[f"BLEU-{n}"] = 100 * brevity * product ** (1 / n)
        if "METEOR matches" in at:
            result["METEOR"] = 100 * meteor.pooled_score(
                np.stack([at[f"METEOR {name}"] for name in meteor.COLUMNS], axis=-1))
        result.update({name: 100 * at[name] / images for name in ("ROUGE-L", "CIDEr") if name in at})
        return {name: result[name] for name in self.values}


def score(predictions: Captions | str | Path, references: Captions | str | Path | References,
          segmentation: str | None = None, metrics: Iterable[str] | None = None) -> Scores:
    """Score one caption an image against all captions of it: `{file: [captions]}` dictionaries or files of that form.

    BLEU (closest reference length) is pycocoevalcap's on segmented text; ROUGE-L (beta 1.2) and CIDEr (CIDEr-D: clipped,
    sigma 6, document frequencies of these references) are `rouge_l` and `CiderD`, equal to pycocoevalcap's; METEOR is
    `clipcap_lib.meteor`. segmentation: "jieba" or "characters" (the default), or that of `prepare_references`, which saves
    most of the time of every further system. metrics: some of `METRICS`, all by default. Exactly the images of
    `references` are scored. A prediction with nothing in it scores 0 and is counted; an empty reference is left out and
    counted; counted are predictions with spaces or special tokens as well. Raises InputError naming the file and the image
    for a missing or unknown prediction, more than one, or an image without references.
    """
    source = str(predictions) if isinstance(predictions, (str, Path)) else "predictions"
    predictions = (load_captions(predictions) if isinstance(predictions, (str, Path))
                   else checked_captions(predictions, "predictions"))
    if not isinstance(references, References):
        references = prepare_references(references, segmentation or "characters")
    elif segmentation not in (None, references.segmentation):
        raise InputError(f"the references were prepared by {references.segmentation}, not by {segmentation}")
    chosen = METRICS if metrics is None else (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not chosen or not set(chosen) <= set(METRICS):
        unknown = ", ".join(sorted(set(chosen) - set(METRICS)))
        raise InputError(f"unknown metric '{unknown}'; choose from {', '.join(METRICS)}")
    _matching(predictions, references.files, source)
    files = references.files
    said = [predictions[name][0] for name in files]
    candidates = segment(said, references.segmentation)
    odd = {  # traces of a decoder, which cost score: jieba cuts at spaces, and special tokens are read as words
        "predictions with spaces between Chinese characters": sum(map(is_segmented, said)),
        "predictions with [SEP] or another special token": sum(any(token in text for token in SPECIAL_TOKENS)
                                                                for text in said)}
    lines = [" ".join(row) for row in candidates]
    corpus: dict[str, float] = {}
    images: dict[str, np.ndarray] = {}  # metric -> (images,)
    statistics: dict[str, np.ndarray] = {}  # statistic -> (images,)
    if any(name.startswith("BLEU") for name in chosen):
        _bleu(lines, references, corpus, images, statistics)
    if "METEOR" in chosen:
        table = np.array([meteor.image_statistics(meteor.tokenize(row), rows)
                          for row, rows in zip(candidates, references.meteor, strict=True)], dtype=float)
        corpus["METEOR"], images["METEOR"] = float(meteor.pooled_score(table.sum(axis=0))), meteor.pooled_score(table)
        statistics.update({f"METEOR {name}": table[:, i] for i, name in enumerate(meteor.COLUMNS)})
    if "ROUGE-L" in chosen:
        images["ROUGE-L"] = np.array([rouge.rouge_l(row, rows)
                                      for row, rows in zip(candidates, references.rouge, strict=True)])
    if "CIDEr" in chosen:
        images["CIDEr"] = references.cider(candidates)
    for name in {"ROUGE-L", "CIDEr"} & set(images):
        corpus[name], statistics[name] = float(np.mean(images[name])), images[name]
    return Scores(
        values={name: 100 * corpus[name] for name in chosen},
        per_image={file: {name: float(100 * images[name][i]) for name in chosen} for i, file in enumerate(files)},
        signature=references.signature(), images=len(files),
        counted={"empty predictions": sum(not row for row in candidates),
                 "empty references left out": references.left_out,
                 **{what: count for what, count in odd.items() if count}},  # kept results without any know no such entry
        files=files, columns=tuple(statistics), statistics=np.stack(list(statistics.values()), axis=1),
        references=references.mark)


def _matching(predictions: Captions, files: Sequence[str], source: str) -> None:
    if predictions and files and not set(predictions) & set(files):
        raise InputError(f"{source}: none of its images is among the references, '{next(iter(predictions))}' first: "
                         f"another set, or names without .jpg? The references have images such as '{files[0]}'")
    if missing := [name for name in files if name not in predictions]:
        raise InputError(f"{source}: {len(missing)} of {len(files)} images have no prediction, "
                         f"'{missing[0]}' first; predict them all, or score against fewer references")
    if unknown := sorted(set(predictions) - set(files)):
        raise InputError(f"{source}: {len(unknown)} images have no references, '{unknown[0]}' first; "
                         "leave them out, or give their references")
    for name, row in predictions.items():
        if len(row) != 1:
            raise InputError(f"{source}: '{name}' has {len(row)} captions; give one an image")


def _bleu(lines: list[str], references: References, corpus: dict, images: dict, statistics: dict) -> None:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer, cook_test

    scorer = BleuScorer(n=4)
    scorer.crefs = references.bleu  # what `cook_append` would count again for every system
    scorer.ctest = [cook_test(line, counts) for line, counts in zip(lines, references.bleu, strict=True)]
    values, rows = scorer.compute_score(option="closest", verbose=0)
    for n in range(4):
        corpus[f"BLEU-{n + 1}"], images[f"BLEU-{n + 1}"] = values[n], np.array(rows[n])
        for what in ("guess", "correct"):
            statistics[f"BLEU {what} {n + 1}"] = np.array([entry[what][n] for entry in scorer.ctest], dtype=float)
    lengths = np.array([entry["testlen"] for entry in scorer.ctest], dtype=float)
    statistics["BLEU candidate length"] = lengths
    statistics["BLEU reference length"] = np.array(
        [min((abs(r - length), r) for r in entry["reflen"])[1]
         for entry, length in zip(scorer.ctest, lengths, strict=True)], dtype=float)


def one_against_the_others(references: Captions, number: int = 0) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The human ceiling: caption `number` of each image as a prediction, and its other captions as references.

    Raises InputError naming an image with fewer than two captions, or without that one.
    """
    for name, row in (references := checked_captions(references, "references")).items():
        if len(row) < 2 or not 0 <= number < len(row):
            raise InputError(f"references: '{name}' has {len(row)} captions; one stands for the system and is scored "
                             f"against the others")
    return ({name: [row[number]] for name, row in references.items()},
            {name: [*row[:number], *row[number + 1:]] for name, row in references.items()})


# -- variety, floors ---------------------------------------------------------------------------------------------------

def diversity(predictions: Captions, training_captions: Iterable[str] | None = None) -> dict[str, float]:
    """How varied the captions are, by characters without punctuation.

    "captions" and "distinct captions" (counts), "distinct-1" and "distinct-2" (different n-grams over all n-grams, in
    percent; Li et al. 2016), "vocabulary" (different characters), "mean length" (characters), and, where training
    captions are given, "novel" (percent of captions that are none of them). Raises InputError without captions.
    """
    captions = [caption for row in checked_captions(predictions, "predictions").values() for caption in row]
    if not captions:
        raise InputError("predictions: no captions")
    tokens = segment(captions, "characters")
    result = {"captions": float(len(captions)), "distinct captions": float(len({tuple(row) for row in tokens}))}
    for n in (1, 2):
        ngrams = [tuple(row[i:i + n]) for row in tokens for i in range(len(row) - n + 1)]
        result[f"distinct-{n}"] = 100 * len(set(ngrams)) / max(len(ngrams), 1)
    result["vocabulary"] = float(len({character for row in tokens for character in row}))
    result["mean length"] = float(np.mean([len(row) for row in tokens]))
    if training_captions is not None:
        known = {tuple(row) for row in segment(list(training_captions), "characters")}
        result["novel"] = 100 * float(np.mean([tuple(row) not in known for row in tokens]))
    return result


def best_constant_caption(references: Captions, candidates: Iterable[str],
                          segmentation: str = "characters") -> tuple[str, float]:
    """The one caption that scores the best CIDEr (x 100) when said of every image: a floor. First of equals wins.

    candidates: the training captions, say. Raises InputError where there are none, or an image without references.
    """
    rows = [segment(captions, segmentation) for captions in checked_captions(references, "references").values()]
    rows = [[tokens for tokens in captions if tokens] for captions in rows]
    frequency = document_frequencies(rows)
    captions = list(dict.fromkeys(candidates))
    if not captions:
        raise InputError("no candidate captions to choose from")
    values = constant_cider_d(segment(captions, segmentation), rows, frequency)
    best = int(np.argmax(values))
    return captions[best], 100 * float(values[best])


def word_log_odds(captions: Sequence[str], others: Sequence[str], prior: float = 0.5):
    """How much more often jieba words occur in `captions` than in `others` -> DataFrame, most distinctive first.

    Columns word, log_odds (natural log-odds ratio of saying the word), low, high (95 %), count, count_others. Counts get
    a flat Dirichlet prior; variance as in Monroe et al. (2008), equations 15 and 20.
    """
    import pandas as pd

    ours, theirs = (Counter(word for words in segment(c, "jieba") for word in words) for c in (captions, others))
    words = sorted(ours.keys() | theirs.keys())
    a, b = (np.array([counts[word] for word in words]) + prior for counts in (ours, theirs))
    log_odds = np.log(a / (a.sum() - a)) - np.log(b / (b.sum() - b))
    deviation = np.sqrt(1 / a + 1 / b)
    frame = pd.DataFrame({"word": words, "log_odds": log_odds, "low": log_odds - 1.96 * deviation,
                          "high": log_odds + 1.96 * deviation, "count": a - prior, "count_others": b - prior})
    order = np.argsort(-log_odds / deviation, kind="stable")  # by z: a word seen once proves nothing
    return frame.iloc[order].reset_index(drop=True)
