"""Says how sure a figure is, and whether two systems differ: cluster bootstrap, paired bootstrap, McNemar's test.

A figure is a function of sums over items (right answers and items; wrong words and words), so that one resampling of
whole clusters is one product of a matrix: what one voice, recording or clip makes is drawn together, or not at all
(Field and Welsh 2007). A handful of clusters, drawn anew, differ less than other clusters would: each draw's distance
from the figure is stretched as Student's t stretches a normal deviate (`_stretch`). Where there is one cluster, items
are drawn, which speaks of this voice or recording and of no other. Every draw has a fixed seed.

Axes: N items, K sums that a figure is made of, C clusters, B bootstrap draws. Knows nothing of what the figures mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

NUM_DRAWS = 2_000
SEED = 0

Statistic = Callable[[np.ndarray], np.ndarray]
"""Turns sums [..., K] into a figure [...]."""


@dataclass(frozen=True)
class Sums:
    """Holds what each item adds to a figure's sums, and the cluster that the item belongs to."""

    values_NK: np.ndarray  # noqa: N815  # the axis suffix
    clusters: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.values_NK.ndim != 2 or len(self.values_NK) != len(self.clusters):
            raise ValueError(f"{len(self.clusters)} clusters for sums of shape {self.values_NK.shape}")

    @property
    def drawn(self) -> tuple[str, ...]:
        """Names what each item is drawn with: its cluster; where there is but one, nothing else."""
        if len(set(self.clusters)) == 1:
            return tuple(map(str, range(len(self.clusters))))
        return self.clusters


@dataclass(frozen=True)
class Difference:
    """Holds how two systems differ on the items that both answered.

    Attributes:
        value: The first one's figure less the other's.
        interval: 95 %, by drawing the same clusters for both.
        p_bootstrap: Twice the share of draws on the rarer side of 0, at least 1 in the number of draws.
        only_first, only_other: Items that one alone got right; None where the figure is no share of right items.
        p_mcnemar: Exact, two-sided, on those; it takes items for independent, which the bootstrap does not.
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
    """Returns the first of two sums over the second; 0 where nothing was counted."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-12)


def mean_average_precision(sums: np.ndarray) -> np.ndarray:
    """Returns the mean average precision of named labels, over the labels that are true of any item.

    A system that names labels and does not rank them has two levels for each: named and not. With precision P and
    recall R of the first level, and a share p of items of which the label is true, its average precision (the sum of
    precision times the gain in recall, items of one level taken together) is R P + (1 - R) p.

    Args:
        sums: [..., 1 + 3 L]: items, then for each label items that name it rightly, that name it, of which it is true.
    """
    num_items = np.maximum(sums[..., :1], 1e-12)
    parts = sums[..., 1:].reshape(*sums.shape[:-1], -1, 3)
    hits, named, true = parts[..., 0], parts[..., 1], parts[..., 2]
    recall = hits / np.maximum(true, 1e-12)
    average_precision = recall * hits / np.maximum(named, 1e-12) + (1 - recall) * true / num_items
    is_there = true > 0
    return (average_precision * is_there).sum(-1) / np.maximum(is_there.sum(-1), 1)


def shares(outcomes: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> Sums:
    """Returns the sums of a mean: each item adds its outcome, and itself."""
    values = np.asarray(outcomes, np.float64).reshape(-1)
    return Sums(np.stack([values, np.ones_like(values)], axis=1), tuple(clusters))


def figure(sums: Sums, statistic: Statistic = ratio) -> tuple[float, tuple[float, float]]:
    """Returns a figure and its 95 % interval (stretched bootstrap); 0 and (0, 0) where there are no items."""
    if not len(sums.values_NK):
        return 0.0, (0.0, 0.0)
    value = float(statistic(sums.values_NK.sum(0)))
    low, high = _percentiles(_stretch(value, statistic(_draws(sums)), sums))
    # What cannot be below 0, or above 1, is not beyond that in another sample either.
    if (sums.values_NK >= 0).all():
        low = max(low, 0.0)
    return value, (low, min(high, 1.0) if _is_share(sums, statistic) else high)


def compare(one: Sums, other: Sums, statistic: Statistic = ratio) -> Difference:
    """Compares two systems on the same items in the same order.

    Raises:
        ValueError: The items are not the same, or there are none.
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
    """Returns the exact two-sided p of McNemar's test (1947): a binomial test of the items on which two disagree."""
    num = only_first + only_other
    return float(binomtest(only_first, num).pvalue) if num else 1.0


def _draws(sums: Sums) -> np.ndarray:
    """Returns the sums of every draw [B, K]: as many clusters as there are, drawn with replacement."""
    names = {name: place for place, name in enumerate(dict.fromkeys(sums.drawn))}
    totals_CK = np.zeros((len(names), sums.values_NK.shape[1]))
    np.add.at(totals_CK, [names[name] for name in sums.drawn], sums.values_NK)
    rng = np.random.default_rng(SEED)
    counts_BC = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=NUM_DRAWS)
    return counts_BC @ totals_CK


def _is_share(sums: Sums, statistic: Statistic) -> bool:
    """Tells whether a figure is between 0 and 1 by its nature."""
    values_NK = sums.values_NK
    return bool((values_NK >= 0).all() and (statistic is not ratio or (values_NK[:, 0] <= values_NK[:, 1]).all()))


def _stretch(value: float, draws_B: np.ndarray, sums: Sums) -> np.ndarray:
    """Returns draws as far from the figure as those of as few clusters have to be.

    Resampling C clusters has the variance of C - 1 over C of what it stands for, and takes their spread for known: with
    eight, a test at 5 % of two equal systems errs in 10 % of the cases. A normal deviate over the root of a chi-square
    of C - 1 degrees over its degrees is t-distributed (Student 1908), so that is what each distance is divided by.
    """
    num = len(set(sums.drawn))
    if num < 2:
        return draws_B
    chi_square_B = np.random.default_rng(SEED + 1).chisquare(num - 1, size=len(draws_B))
    return value + (draws_B - value) * np.sqrt(num / chi_square_B)


def _percentiles(draws_B: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws_B, (2.5, 97.5))
    return float(low), float(high)
