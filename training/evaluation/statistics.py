"""Compute confidence intervals and tests of figures: cluster bootstrap, paired bootstrap, McNemar's test.

A figure is a function of sums over items (right answers and items; wrong words and words). One bootstrap of whole
clusters is then one matrix product. All items of one voice, recording or clip are drawn together or not at all (Field
and Welsh 2007).

A bootstrap of few clusters underestimates the variance. Each draw's distance from the figure is therefore stretched, as
Student's t stretches a normal deviate (`_stretch`). With a single cluster, items are drawn instead; the interval then
holds for this voice or recording only. Every draw has a fixed seed.

Axes: N items, K sums of a figure, C clusters, B bootstrap draws. This module depends on no meaning of the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

NUM_DRAWS = 2_000
NUM_BINS = 10
"""Number of equal ranges of the confidence in a calibration error."""

SEED = 0

Statistic = Callable[[np.ndarray], np.ndarray]
"""A function from sums [..., K] to a figure [...]."""


@dataclass(frozen=True)
class Sums:
    """Each item's addends to the sums of a figure, and its cluster."""

    values_NK: np.ndarray  # noqa: N815  # the axis suffix
    clusters: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.values_NK.ndim != 2 or len(self.values_NK) != len(self.clusters):
            raise ValueError(f"{len(self.clusters)} clusters for sums of shape {self.values_NK.shape}")

    @property
    def drawn(self) -> tuple[str, ...]:
        """Return the drawing unit of each item: its cluster, or the item itself if there is only one cluster."""
        if len(set(self.clusters)) == 1:
            return tuple(map(str, range(len(self.clusters))))
        return self.clusters


@dataclass(frozen=True)
class ReliabilityBin:
    """The answers with a confidence in one tenth of 0 to 1: their mean confidence, share of right ones, and number."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Difference:
    """The difference of two systems on their common items.

    Attributes:
        value: The first system's figure minus the other's.
        interval: 95 %, from the same cluster draws for both.
        p_bootstrap: Twice the share of draws on the rarer side of 0, at least 1 over the number of draws.
        only_first, only_other: Items right in one system only; None unless the figure is a share of right items.
        p_mcnemar: Exact and two-sided on these items; it assumes independent items, unlike the bootstrap.
    """

    value: float
    interval: tuple[float, float]
    p_bootstrap: float
    num_items: int
    num_clusters: int
    only_first: int | None = None
    only_other: int | None = None
    p_mcnemar: float | None = None


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return the first of two sums over the second; 0 for a zero count."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)


def mean_average_precision(sums: np.ndarray) -> np.ndarray:
    """Return the mean average precision of named labels, over all labels true for any item.

    A system without ranked labels has two levels for each label: named and not. Let P and R be precision and recall of
    the first level, and p the share of items with this label. The average precision is the sum of precision times the
    gain in recall, with items of one level taken together: R P + (1 - R) p.

    Args:
        sums: [..., 1 + 3 L]: number of items, then per label the numbers of correctly named, named and true items.
    """
    num_items = np.maximum(sums[..., :1], 1e-12)
    parts = sums[..., 1:].reshape(*sums.shape[:-1], -1, 3)
    hits, named, true = parts[..., 0], parts[..., 1], parts[..., 2]
    recall = hits / np.maximum(true, 1e-12)
    average_precision = recall * hits / np.maximum(named, 1e-12) + (1 - recall) * true / num_items
    is_there = true > 0
    return (average_precision * is_there).sum(-1) / np.maximum(is_there.sum(-1), 1)


def reliability_row(confidence: float, is_right: bool) -> np.ndarray:
    """Return an answer's addends to the sums of `reliability`: [3 * NUM_BINS]."""
    row_BS = np.zeros((NUM_BINS, 3))
    row_BS[min(int(confidence * NUM_BINS), NUM_BINS - 1)] = confidence, is_right, 1.0
    return row_BS.reshape(-1)


def reliability(sums: np.ndarray) -> list[ReliabilityBin]:
    """Return the reliability curve of answers, without empty tenths, from the sums of their `reliability_row`."""
    return [
        ReliabilityBin(round(confidence / count, 4), round(num_right / count, 4), round(count))
        for confidence, num_right, count in sums.reshape(NUM_BINS, 3).tolist()
        if count
    ]


def expected_calibration_error(sums: np.ndarray) -> np.ndarray:
    """Return the mean distance between confidence and accuracy over tenths of the confidence (Naeini et al. 2015).

    Args:
        sums: [..., 3 * NUM_BINS]: per tenth, the sum of confidences, the number of right answers and of answers.
    """
    parts = sums.reshape(*sums.shape[:-1], NUM_BINS, 3)
    return np.abs(parts[..., 0] - parts[..., 1]).sum(-1) / np.maximum(parts[..., 2].sum(-1), 1e-12)


def shares(outcomes: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> Sums:
    """Return the sums of a mean: each item's outcome and a count of 1."""
    values = np.asarray(outcomes, np.float64).reshape(-1)
    return Sums(np.stack([values, np.ones_like(values)], axis=1), tuple(clusters))


def figure(sums: Sums, statistic: Statistic = ratio) -> tuple[float, tuple[float, float]]:
    """Return a figure and its 95 % interval (stretched bootstrap); 0 and (0, 0) without items."""
    if not len(sums.values_NK):
        return 0.0, (0.0, 0.0)
    value = float(statistic(sums.values_NK.sum(0)))
    low, high = _percentiles(_stretch(value, statistic(_draws(sums)), sums))
    # A figure bounded by 0 or 1 has the same bounds in another sample.
    if (sums.values_NK >= 0).all():
        low = max(low, 0.0)
    return value, (low, min(high, 1.0) if _is_share(sums, statistic) else high)


def compare(one: Sums, other: Sums, statistic: Statistic = ratio) -> Difference:
    """Compare two systems on the same items in the same order.

    Raises:
        ValueError: The items differ, or there are none.
    """
    if one.clusters != other.clusters:
        raise ValueError("two systems are compared on the same items only")
    if not one.clusters:
        raise ValueError("there are no items to compare on")
    value = float(statistic(one.values_NK.sum(0)) - statistic(other.values_NK.sum(0)))
    # The same seed draws the same clusters for both.
    draws = _stretch(value, statistic(_draws(one)) - statistic(_draws(other)), one)
    if _is_share(one, statistic) and _is_share(other, statistic):
        draws = np.clip(draws, -1.0, 1.0)
    p_bootstrap = 2 * min(float((draws <= 0).mean()), float((draws >= 0).mean()))
    found = Difference(
        value,
        _percentiles(draws),
        min(1.0, max(p_bootstrap, 1 / NUM_DRAWS)),
        num_items=len(one.clusters),
        num_clusters=len(set(one.clusters)),
    )
    right, other_right = one.values_NK[:, 0], other.values_NK[:, 0]
    is_share = statistic is ratio and all(
        set(np.unique(each.values_NK[:, 0])) <= {0.0, 1.0} and bool((each.values_NK[:, 1] == 1).all())
        for each in (one, other)
    )
    if not is_share:
        return found
    only_first, only_other = int((right > other_right).sum()), int((right < other_right).sum())
    return Difference(
        found.value,
        found.interval,
        found.p_bootstrap,
        found.num_items,
        found.num_clusters,
        only_first,
        only_other,
        mcnemar(only_first, only_other),
    )


def mcnemar(only_first: int, only_other: int) -> float:
    """Return the exact two-sided p of McNemar's test (1947), a binomial test on the items with different outcomes."""
    num = only_first + only_other
    return float(binomtest(only_first, num).pvalue) if num else 1.0


def _draws(sums: Sums) -> np.ndarray:
    """Return the sums of every draw [B, K], each with C clusters drawn with replacement."""
    names = {name: place for place, name in enumerate(dict.fromkeys(sums.drawn))}
    totals_CK = np.zeros((len(names), sums.values_NK.shape[1]))
    np.add.at(totals_CK, [names[name] for name in sums.drawn], sums.values_NK)
    rng = np.random.default_rng(SEED)
    counts_BC = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=NUM_DRAWS)
    return counts_BC @ totals_CK


def _is_share(sums: Sums, statistic: Statistic) -> bool:
    """Return True if the figure lies between 0 and 1 by definition."""
    values_NK = sums.values_NK
    return bool((values_NK >= 0).all() and (statistic is not ratio or (values_NK[:, 0] <= values_NK[:, 1]).all()))


def _stretch(value: float, draws_B: np.ndarray, sums: Sums) -> np.ndarray:
    """Stretch the draws' distances from the figure, to correct for few clusters.

    Resampling C clusters has a variance too low by (C - 1) / C, and ignores the uncertainty of the estimated spread.
    With eight clusters, a 5 % test of two equal systems errs in 10 % of cases. A normal deviate divided by the root of
    chi-square over its C - 1 degrees of freedom is t-distributed (Student 1908). Each distance is therefore divided by
    this root.
    """
    num = len(set(sums.drawn))
    if num < 2:
        return draws_B
    chi_square_B = np.random.default_rng(SEED + 1).chisquare(num - 1, size=len(draws_B))
    return value + (draws_B - value) * np.sqrt(num / chi_square_B)


def _percentiles(draws_B: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws_B, (2.5, 97.5))
    return float(low), float(high)
