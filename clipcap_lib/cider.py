"""CIDEr-D in numpy, with document frequencies that are given: what validation and training on scores need.

A mini-batch scored with its own frequencies means nothing (one image: always 0), so they are counted once, on a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clipcap_lib.config import InputError

SIGMA = 6.0  # of the length penalty, in tokens
_TOKEN_BITS = 16  # four tokens of this size make one 64-bit n-gram


@dataclass(frozen=True)
class DocumentFrequency:
    """In how many images' references each n-gram (n = 1 to 4) occurs."""

    token_ids: dict[str, int]  # from 1: 0 fills n-grams shorter than four
    ngrams: np.ndarray  # (N,) uint64, sorted: four token ids, first token in the highest bits
    counts: np.ndarray  # (N,) images whose references hold the n-gram
    images: int


def document_frequencies(references_tokens: Sequence[Sequence[Sequence[str]]]) -> DocumentFrequency:
    """Document frequencies of segmented references: images x captions x tokens. Raises InputError when empty."""
    if not any(caption for captions in references_tokens for caption in captions):
        raise InputError("document frequencies need at least one image with a reference that is not empty")
    token_ids: dict[str, int] = {}
    parts = []
    for start in range(0, len(references_tokens), 10_000):  # a block at a time: corpora have millions of n-grams
        rows = references_tokens[start:start + 10_000]
        text, ngram, _ = _ngrams([caption for captions in rows for caption in captions], token_ids)
        image_of_text = np.repeat(np.arange(len(rows)), [len(captions) for captions in rows])
        _, ngram, _ = _grouped(image_of_text[text], ngram)
        found, counts = np.unique(ngram, return_counts=True)
        parts.append((found, counts))
    ngrams, inverse = np.unique(np.concatenate([found for found, _ in parts]), return_inverse=True)
    counts = np.bincount(inverse, np.concatenate([counts for _, counts in parts]), minlength=len(ngrams))
    return DocumentFrequency(token_ids, ngrams, counts, len(references_tokens))


class CiderD:
    """CIDEr-D against references that are prepared once, for many candidates: `CiderD(references)(candidates)`.

    references: images x captions x tokens. On pycocoevalcap's scale, the factor 10 of the paper included: a corpus CIDEr
    of 108 points is a mean of 1.08 here, and 10 is the most. Vedantam et al. (2015) with clipping and the Gaussian length
    penalty, sigma 6; equal to pycocoevalcap where the frequencies are those of the references, the default. Frequencies
    must come from a whole set or split, never from a mini-batch. An n-gram they do not know counts as found in one image.
    Raises InputError where an image has no reference.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[str]]], document_frequency: DocumentFrequency | None = None):
        if not all(references):
            raise InputError("CIDEr-D needs references of every image")
        self.images, self.frequency = len(references), document_frequency or document_frequencies(references)
        self.token_ids = dict(self.frequency.token_ids)
        flat = [caption for captions in references for caption in captions]
        # the image of each reference
        self.owner = np.repeat(np.arange(len(references)), [len(captions) for captions in references])
        self.text, ngram, self.weight, self.order, self.norm, self.length = _tf_idf(flat, self.token_ids, self.frequency)
        self.dense, inverse = np.unique(ngram, return_inverse=True)
        self.key = self.owner[self.text] * len(self.dense) + inverse  # of an image and an n-gram

    def __call__(self, candidates: Sequence[Sequence[str]]) -> np.ndarray:
        """One token list an image (C lists) -> (C,). Raises InputError where counts differ."""
        if len(candidates) != self.images:
            raise InputError(f"{len(candidates)} candidates need as many lists of references, not {self.images}")
        if not len(self.dense):  # no images, or none with a token to share
            return np.zeros(self.images)
        token_ids = dict(self.token_ids)  # a copy: tokens new in this call get numbers of this call only
        text, ngram, weight, _, norm, length = _tf_idf(candidates, token_ids, self.frequency)
        place = np.minimum(np.searchsorted(self.dense, ngram), len(self.dense) - 1)
        known = self.dense[place] == ngram
        key, weight = text[known] * len(self.dense) + place[known], weight[known]
        place = np.minimum(np.searchsorted(key, self.key), max(len(key) - 1, 0))
        shared = key[place] == self.key if len(key) else np.zeros(len(self.key), dtype=bool)
        products = np.minimum(weight[place[shared]], self.weight[shared]) * self.weight[shared]
        similarity = np.bincount(self.text[shared] * 4 + self.order[shared], products, minlength=4 * len(self.owner))
        similarity = similarity.astype(float).reshape(-1, 4)  # where nothing is shared, bincount counts in whole numbers
        norms = norm[self.owner] * self.norm
        similarity = np.divide(similarity, norms, out=np.zeros_like(similarity), where=norms > 0)
        penalty = np.exp(-((length[self.owner] - self.length) ** 2) / (2 * SIGMA**2))
        totals = np.bincount(self.owner, similarity.mean(axis=1) * penalty, minlength=self.images)
        return 10 * totals / np.bincount(self.owner, minlength=self.images)


def cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]],
            document_frequency: DocumentFrequency) -> np.ndarray:
    """CIDEr-D of C token lists against C lists of token lists with given document frequencies -> (C,). See `CiderD`."""
    return CiderD(references, document_frequency)(candidates)


def constant_cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]],
                     document_frequency: DocumentFrequency) -> np.ndarray:
    """Mean CIDEr-D over all images of each candidate said of every image: C token lists -> (C,), scale of `cider_d`.

    For each n-gram of a candidate only the references that hold it are visited: thousands of candidates take seconds.
    """
    token_ids = dict(document_frequency.token_ids)
    flat = [caption for captions in references for caption in captions]
    counts = np.array([len(captions) for captions in references])
    share = np.repeat(1 / (4 * counts * len(references)), counts)  # of each reference in the mean
    text_r, ngram_r, weight_r, order_r, norm_r, length_r = _tf_idf(flat, token_ids, document_frequency)
    by = np.argsort(ngram_r, kind="stable")
    text_r, ngram_r, weight_r = text_r[by], ngram_r[by], weight_r[by]
    scaled_r = weight_r * share[text_r] / np.maximum(norm_r[text_r, order_r[by]], 1e-300)
    values = []
    for start in range(0, len(candidates), 100):
        rows = candidates[start:start + 100]
        text, ngram, weight, order, norm, length = _tf_idf(rows, token_ids, document_frequency)
        first = np.searchsorted(ngram_r, ngram)
        found = np.searchsorted(ngram_r, ngram, side="right") - first
        mine = np.repeat(np.arange(len(ngram)), found)  # the candidate's n-gram of each visit
        theirs = np.arange(len(mine)) + np.repeat(first - np.cumsum(found) + found, found)  # the reference's
        penalty = np.exp(-((length[text[mine]] - length_r[text_r[theirs]]) ** 2) / (2 * SIGMA**2))
        products = np.minimum(weight[mine], weight_r[theirs]) * scaled_r[theirs] * penalty
        products /= np.maximum(norm[text[mine], order[mine]], 1e-300)
        values.append(10 * np.bincount(text[mine], products, minlength=len(rows)))
    return np.concatenate(values) if values else np.zeros(0)


def _ngrams(texts: Sequence[Sequence[str]], token_ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every n-gram of every text, n = 1 to 4: its text (M,), its number (M,) uint64, n - 1 (M,). Adds new tokens."""
    lengths = np.array([len(tokens) for tokens in texts], dtype=np.int64)
    ids = np.array([token_ids.setdefault(token, len(token_ids) + 1) for tokens in texts for token in tokens],
                   dtype=np.uint64)
    if len(token_ids) >= 2**_TOKEN_BITS:
        raise InputError(f"CIDEr-D counts at most {2**_TOKEN_BITS - 1:,} different tokens, not {len(token_ids):,}; "
                         "segment by characters")
    text = np.repeat(np.arange(len(texts)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(ids))  # tokens from here to the end of the text
    ngram, found = np.zeros(len(ids), dtype=np.uint64), []
    for n in range(4):
        ngram = ngram[: len(ids) - n] if n else ngram
        ngram = ngram | ids[n:] << np.uint64(_TOKEN_BITS * (3 - n))
        whole = left[: len(ngram)] > n
        found.append((text[: len(ngram)][whole], ngram[whole], np.full(int(whole.sum()), n)))
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def _grouped(text: np.ndarray, ngram: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sorted by text, then n-gram, each pair once: text, n-gram, how often, and the others of its first occurrence."""
    by = np.lexsort((ngram, text))
    text, ngram = text[by], ngram[by]
    first = np.flatnonzero(np.r_[True, (text[1:] != text[:-1]) | (ngram[1:] != ngram[:-1])][: len(text)])
    return text[first], ngram[first], np.diff(np.r_[first, len(text)]), *(other[by][first] for other in others)


def _tf_idf(texts: Sequence[Sequence[str]], token_ids: dict[str, int], frequency: DocumentFrequency):
    """Weights of every n-gram of every text, their norms (T, 4) for each n, and lengths (T,)."""
    text, ngram, count, order = _grouped(*_ngrams(texts, token_ids))
    place = np.minimum(np.searchsorted(frequency.ngrams, ngram), len(frequency.ngrams) - 1)
    known = np.where(frequency.ngrams[place] == ngram, frequency.counts[place], 1.0)
    weight = count * (np.log(float(frequency.images)) - np.log(np.maximum(known, 1.0)))
    norm = np.sqrt(np.bincount(text * 4 + order, weight**2, minlength=4 * len(texts)).reshape(-1, 4))
    # pycocoevalcap measures a text by its bigrams, one fewer than its tokens.
    length = np.array([max(len(tokens) - 1, 0) for tokens in texts], dtype=float)
    return text, ngram, weight, order, norm, length
