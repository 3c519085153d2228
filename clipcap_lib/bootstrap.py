"""How sure a score is: bootstrap intervals over images and a paired test between two systems.

Images are drawn with replacement; corpus metrics (BLEU, METEOR) are recomputed from summed sufficient statistics, never
averaged over images. CIDEr's document frequencies stay those of the full set in every resample, so its intervals hold
for these references. The seed and the number of images fix the draws: two systems on one set meet the same resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from clipcap_lib.config import InputError

INTERVAL = "95 % bootstrap over images, 1,000 resamples; CIDEr keeps the document frequencies of the full set"
_DRAWS_AT_ONCE = 2**21  # keeps a block of weights at 16 MiB, however many images there are


class Resampled(Protocol):
    """What a set of scores offers to be resampled; `metrics.Scores` does.

    references: changes with the references; "" where they are not known.
    """

    files: tuple[str, ...]
    signature: str
    references: str
    statistics: np.ndarray  # (images, statistics)

    def corpus(self, sums: np.ndarray, images: int) -> dict[str, np.ndarray]:
        """Corpus metrics from statistics summed over that many images: (..., statistics) -> metric: (...)."""


@dataclass(frozen=True)
class Paired:
    """Outcome of a paired bootstrap test, in the metric's own unit (points)."""

    difference: float  # first system minus second, on the whole set
    low: float  # interval of the difference
    high: float
    p: float  # two-sided: how often chance alone gives a difference of this size


def bootstrap_intervals(scores: Resampled, resamples: int = 1000, seed: int = 0,
                        level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Percentile interval of each corpus metric, in its unit (points): metric -> (low, high).

    Raises InputError for a level outside (0, 1) or no resamples.
    """
    values = _resampled(scores, resamples, seed)
    return {metric: _interval(column, level) for metric, column in values.items()}


def paired_bootstrap(a: Resampled, b: Resampled, metric: str, resamples: int = 1000, seed: int = 0,
                     level: float = 0.95) -> Paired:
    """Compare two systems on the same images, both resampled together.

    p is the share of resamples whose difference lies as far from the observed one as that lies from zero, observed set
    included: the two-sided shifted bootstrap (Noreen 1989; as sacreBLEU's paired bootstrap). Equal systems have p = 1.
    Raises InputError where images, references, signature or metric of the two do not agree.
    """
    if a.files != b.files:
        other = sorted(set(a.files) ^ set(b.files))
        raise InputError(f"a paired test needs the same images in the same order; they differ in {len(other)} images"
                         + (f", '{other[0]}' first" if other else "") + "; score both against the same references")
    if a.signature != b.signature:
        raise InputError(f"scores with different signatures cannot be compared: '{a.signature}' and '{b.signature}'")
    if a.references and b.references and a.references != b.references:
        raise InputError("scores against different references cannot be compared; score both against the same ones")
    first, second = (_resampled(scores, resamples, seed) for scores in (a, b))
    if metric not in first or metric not in second:
        raise InputError(f"metric '{metric}' is not in both scores; choose one of {', '.join(sorted(first))}")
    images = len(a.files)
    observed = float(np.subtract(*(scores.corpus(scores.statistics.sum(axis=0), images)[metric] for scores in (a, b))))
    differences = first[metric] - second[metric]
    # systems that differ on few images tie often, and then rounding must not decide
    extreme = int(np.sum(np.abs(differences - observed) >= abs(observed) - 1e-9))
    return Paired(observed, *_interval(differences, level), p=(extreme + 1) / (resamples + 1))


def null_p_values(samples: Sequence[Resampled], metric: str, comparisons: int = 200, resamples: int = 1000,
                  seed: int = 0) -> np.ndarray:
    """p values of `paired_bootstrap` where there is nothing to find -> (comparisons,); they should be uniform.

    samples: scores of at least two samples of one system on the same images. Each comparison deals two different samples
    of every image to two would-be systems at random, so that neither is better: the samples' references may differ. Raises
    InputError for fewer than two samples, other images or another signature.
    """
    if len(samples) < 2 or len({(s.files, s.signature) for s in samples}) > 1:
        raise InputError(f"{len(samples)} samples: give at least two of the same images, with one signature")
    table = np.stack([s.statistics for s in samples])  # (samples, images, statistics)
    images, found = np.arange(table.shape[1]), []
    for number in range(comparisons):
        random = np.random.default_rng((seed, number))
        dealt = random.permuted(np.tile(np.arange(len(samples))[:, None], len(images)), axis=0)[:2]  # (2, images)
        a, b = (replace(samples[0], statistics=table[which, images]) for which in dealt)
        found.append(paired_bootstrap(a, b, metric, resamples, seed=number).p)
    return np.array(found)


def mean_interval(values: np.ndarray, resamples: int = 1000, seed: int = 0,
                  level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean of values (N,), in their unit. Raises InputError when empty."""
    values = np.asarray(values, dtype=float)
    return ratio_interval(values, np.ones_like(values), resamples, seed, level)


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, resamples: int = 1000, seed: int = 0,
                   level: float = 0.95) -> tuple[float, float]:
    """Percentile interval (low, high) of sum(numerators) / sum(denominators), both (N,): accuracies, F1 and the like.

    An image without a case counts as 0 / 0. Resamples without any case are left out. Raises InputError where lengths
    differ, a value is not finite, or no image has a case.
    """
    pairs = [np.asarray(values, dtype=float) for values in (numerators, denominators)]
    if pairs[0].ndim != 1 or pairs[0].shape != pairs[1].shape or not pairs[0].size:
        raise InputError(f"numerators {pairs[0].shape} and denominators {pairs[1].shape} must be two equal, "
                         "non-empty rows of numbers")
    statistics = np.stack(pairs, axis=1)
    if not np.isfinite(statistics).all() or not statistics[:, 1].any():
        raise InputError("numerators and denominators must be finite, and one denominator at least not zero")
    sums = np.concatenate([weights @ statistics for weights in _weights(len(statistics), resamples, seed)])
    sums = sums[sums[:, 1] != 0]
    return _interval(sums[:, 0] / sums[:, 1], level)


def _resampled(scores: Resampled, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Every corpus metric of every resample: metric -> (resamples,)."""
    images = len(scores.statistics)
    sums = [weights @ scores.statistics for weights in _weights(images, resamples, seed)]
    return scores.corpus(np.concatenate(sums), images)


def _weights(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn in each resample: blocks of (resamples in the block, images)."""
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, not {resamples}")
    generator = np.random.default_rng(seed)
    block = max(1, _DRAWS_AT_ONCE // images)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(0, images, (rows, images)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(float)


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise InputError(f"the level of an interval lies between 0 and 1, not {level}")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
