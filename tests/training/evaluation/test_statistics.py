"""Intervals and tests, by their properties and not by examples alone."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.evaluation.statistics import Sums, compare, figure, mcnemar, mean_average_precision, ratio, shares


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        outcomes = rng.random(120) < 0.7
        _, (low, high) = figure(shares(outcomes, [str(i) for i in range(120)]))
        covered += low <= 0.7 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_intervals_of_clustered_items_cover_too_and_item_wise_ones_would_not() -> None:
    rng = np.random.default_rng(1)
    covered = {"clusters": 0, "items": 0}
    for _ in range(100):
        # 30 voices of 20 items: a voice is understood almost always or hardly ever.
        rates = rng.choice([0.4, 1.0], size=30)
        outcomes = (rng.random((30, 20)) < rates[:, None]).reshape(-1)
        for kind, names in (
            ("clusters", [str(i // 20) for i in range(600)]),
            ("items", [str(i) for i in range(600)]),
        ):
            _, (low, high) = figure(shares(outcomes, names))
            covered[kind] += low <= 0.7 <= high
    assert covered["clusters"] >= 87
    assert covered["items"] <= 70


def test_intervals_draw_whole_clusters() -> None:
    values = [True] * 50 + [False] * 50
    _, one_each = figure(shares(values, [str(i) for i in range(100)]))
    _, two = figure(shares(values, ["a"] * 50 + ["b"] * 50))
    assert one_each[0] > 0.3 and one_each[1] < 0.7
    assert two == (0.0, 1.0)


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios() -> None:
    errors_and_words = np.array([[1.0, 1.0], [0.0, 9.0]])
    value, _ = figure(Sums(errors_and_words, ("a", "b")))
    assert value == pytest.approx(0.1)
    assert figure(Sums(np.zeros((0, 2)), ())) == (0.0, (0.0, 0.0))


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_two_sided_binomial_test(first: int, other: int) -> None:
    num = first + other
    probabilities = [comb(num, k) / 2**num for k in range(num + 1)]
    # By definition: all outcomes no likelier than the observed one.
    two_sided = sum(p for p in probabilities if p <= probabilities[first] * (1 + 1e-9))
    assert mcnemar(first, other) == pytest.approx(min(1.0, two_sided))
    assert mcnemar(first, other) == mcnemar(other, first)


def test_a_system_does_not_differ_from_itself() -> None:
    rng = np.random.default_rng(2)
    one = shares(rng.random(200) < 0.6, [str(i // 4) for i in range(200)])
    found = compare(one, one)
    assert (found.value, found.interval) == (0.0, (0.0, 0.0))
    assert found.p_bootstrap == found.p_mcnemar == 1.0
    assert found.only_first == found.only_other == 0


def test_pairing_finds_what_two_intervals_apart_would_hide() -> None:
    rng = np.random.default_rng(3)
    clusters = [str(i // 10) for i in range(400)]
    other = rng.random(400) < np.repeat(rng.random(40), 10)
    better = other | (rng.random(400) < 0.06)
    one_sums, other_sums = shares(better, clusters), shares(other, clusters)
    apart = figure(one_sums)[1], figure(other_sums)[1]
    assert apart[0][0] < apart[1][1], "the intervals overlap"
    found = compare(one_sums, other_sums)
    assert found.interval[0] > 0 and found.p_bootstrap < 0.01
    assert found.p_mcnemar is not None and found.p_mcnemar < 0.01
    assert found.only_other == 0 and found.only_first == int((better & ~other).sum())


def test_a_paired_test_of_nothing_errs_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    clusters = [str(i // 4) for i in range(160)]
    false_alarms = sum(
        compare(shares(rng.random(160) < 0.5, clusters), shares(rng.random(160) < 0.5, clusters)).p_bootstrap < 0.05
        for _ in range(200)
    )
    assert false_alarms / 200 <= 0.12


def test_eight_voices_are_no_more_sure_than_eight_can_be() -> None:
    rng = np.random.default_rng(5)
    clusters = [str(i // 50) for i in range(400)]
    false_alarms = covered = 0
    for _ in range(200):
        # Voices differ in difficulty, and in the difference between the two systems.
        rates_V = np.clip(rng.normal(0.8, 0.05, 8), 0, 1)
        one, other = (
            shares(rng.random(400) < np.repeat(np.clip(rates_V + rng.normal(0, 0.03, 8), 0, 1), 50), clusters)
            for _ in range(2)
        )
        false_alarms += compare(one, other).p_bootstrap < 0.05
        _, (low, high) = figure(one)
        covered += low <= 0.8 <= high
    # Without the widening: 0.10 and 0.90.
    assert false_alarms / 200 <= 0.075
    assert covered / 200 >= 0.93


def test_one_cluster_is_no_certainty() -> None:
    values = [True] * 28 + [False] * 2
    value, (low, high) = figure(shares(values, ["quiet"] * 30))
    assert low < value - 0.05 and high == 1.0
    found = compare(shares(values, ["quiet"] * 30), shares([True] * 29 + [False], ["quiet"] * 30))
    assert found.p_bootstrap > 0.1


def test_an_interval_stays_where_a_share_can_be() -> None:
    values = [True] * 19 + [False]
    _, (low, high) = figure(shares(values, [str(i // 10) for i in range(20)]))
    assert 0 <= low < high <= 1
    # The number of wrong words may exceed the number of words.
    _, (_, wer) = figure(Sums(np.array([[1.0, 2.0], [9.0, 2.0]]), ("a", "b")))
    assert wer > 1


def test_a_figure_that_is_no_share_has_no_mcnemar() -> None:
    one = Sums(np.array([[1.0, 5.0], [0.0, 4.0]]), ("a", "b"))
    assert compare(one, one).p_mcnemar is None


def test_only_the_same_items_are_compared() -> None:
    with pytest.raises(ValueError, match="same items"):
        compare(shares([True], ["a"]), shares([True], ["b"]))
    with pytest.raises(ValueError, match="no items"):
        compare(shares([], []), shares([], []))
    with pytest.raises(ValueError, match="clusters"):
        Sums(np.zeros((2, 2)), ("a",))


def test_average_precision_of_named_labels() -> None:
    def sums(*items: tuple[str, str]) -> np.ndarray:
        rows = [[1.0, *(x for label in "ab" for x in (n == t == label, n == label, t == label))] for n, t in items]
        return np.asarray(rows, np.float64).sum(0)

    assert mean_average_precision(sums(("a", "a"), ("b", "b"))) == 1.0
    # Naming nothing scores the share of items with the label, as any constant ranking does.
    assert mean_average_precision(sums(("-", "a"), ("-", "b"))) == pytest.approx(0.5)
    assert mean_average_precision(sums(("a", "a"), ("a", "b"))) == pytest.approx((0.5 + 0.5) / 2)
    # A label without any true item does not count.
    assert mean_average_precision(sums(("a", "a"), ("b", "a"))) == pytest.approx(0.5 * 1 + 0.5 * 1)
    assert ratio(np.array([0.0, 0.0])) == 0.0
