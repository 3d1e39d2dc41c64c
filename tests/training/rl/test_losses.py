"""Stage II's arithmetic, for any rewards and probabilities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.rl.losses import (
    Bounds,
    TauTracker,
    Tokens,
    advantages,
    confidence_weights,
    policy_loss,
    token_weights,
)

REWARDS = st.lists(st.floats(-2, 4), min_size=2, max_size=12)
BOUNDS = Bounds(clip_low=0.2, clip_high=0.28, kl_weight=0.1, max_importance=2.0)


def tokens(num: int, **fields: torch.Tensor) -> Tokens:
    known = {
        "advantages_N": torch.ones(num),
        "weights_N": torch.full((num,), 1 / num),
        "sampler_logprobs_N": torch.full((num,), -1.0),
    }
    return Tokens(**(known | fields))


@given(REWARDS, st.booleans())
def test_a_groups_advantages_sum_to_zero_and_keep_the_order_of_its_rewards(rewards: list[float], divided: bool) -> None:
    found = advantages(rewards, is_divided=divided)
    assert abs(sum(found)) < 1e-6 * len(found) * max(1.0, *map(abs, found))
    for (one, gain), (other, less) in itertools.pairwise(zip(rewards, found, strict=True)):
        assert (one - other) * (gain - less) >= 0


def test_a_group_of_equal_rewards_says_nothing() -> None:
    assert advantages([0.7, 0.7, 0.7], is_divided=True) == [0.0] * 3


@given(st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), min_size=1, max_size=12))
def test_confidence_weights_are_one_on_average_and_nothing_for_what_was_given_up(
    rows: list[tuple[float, bool]],
) -> None:
    found = confidence_weights([low for low, _ in rows], [aborted for _, aborted in rows])
    assert [weight == 0 for weight in found] == [aborted for _, aborted in rows]
    counted = [weight for weight in found if weight]
    assert not counted or sum(counted) / len(counted) == pytest.approx(1.0)
    assert all(weight <= 3.0 for weight in counted)


def test_a_surer_rollout_weighs_more_and_one_without_a_window_weighs_as_the_mean() -> None:
    low, none, high = confidence_weights([0.2, None, 0.9], [False] * 3)
    assert low < none < high
    assert none == pytest.approx(1.0)


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_the_weights_of_a_steps_tokens_sum_to_one(loss: str) -> None:
    counts = [3, 40, 7]
    found = token_weights(counts, loss, num_rollouts=3, total=50, limit=100)  # pyright: ignore[reportArgumentType]
    assert sum(weight * num for weight, num in zip(found, counts, strict=True)) == pytest.approx(1.0)


def test_dr_grpo_does_not_make_long_rollouts_cheap() -> None:
    short, long = token_weights([2, 90], "dr_grpo", num_rollouts=2, total=92, limit=100)
    assert short == long == 1 / 200


def test_on_its_own_samples_the_gradient_is_the_plain_policy_gradient() -> None:
    logprobs_N = torch.tensor([-0.5, -2.0], requires_grad=True)
    advantages_N = torch.tensor([1.0, -0.5])
    loss, found = policy_loss(
        logprobs_N, tokens(2, advantages_N=advantages_N, sampler_logprobs_N=logprobs_N.detach()), BOUNDS
    )
    loss.backward()
    assert torch.allclose(logprobs_N.grad, -advantages_N / 2)  # pyright: ignore[reportArgumentType]
    assert found["gap"] == 0 and found["clipped"] == 0 and found["importance_ess"] == pytest.approx(1.0)


@pytest.mark.parametrize(("advantage", "shift", "has_gradient"), [(1, 0.3, False), (1, 0.2, True), (-1, -0.3, False)])
def test_a_token_that_moved_far_enough_is_pushed_no_further(advantage: float, shift: float, has_gradient: bool) -> None:
    old_N = torch.tensor([-1.0])
    logprobs_N = (old_N + shift).requires_grad_()
    known = tokens(1, advantages_N=torch.tensor([float(advantage)]), old_logprobs_N=old_N, sampler_logprobs_N=old_N)
    loss, _ = policy_loss(logprobs_N, known, BOUNDS)
    loss.backward()
    assert bool(logprobs_N.grad.abs() > 0) == has_gradient  # pyright: ignore[reportOptionalMemberAccess]


def test_importance_is_cut_off_and_has_no_gradient() -> None:
    logprobs_N = torch.tensor([-0.1], requires_grad=True)
    loss, found = policy_loss(logprobs_N, tokens(1, sampler_logprobs_N=torch.tensor([-9.0])), BOUNDS)
    loss.backward()
    assert logprobs_N.grad.item() == pytest.approx(-2.0)  # pyright: ignore[reportOptionalMemberAccess]
    assert found["gap"] == pytest.approx(8.9)


def test_the_divergence_is_never_negative_and_pulls_towards_the_reference() -> None:
    logprobs_N = torch.tensor([-1.0], requires_grad=True)
    known = tokens(1, advantages_N=torch.zeros(1), reference_logprobs_N=torch.tensor([-0.5]))
    loss, found = policy_loss(logprobs_N, known, BOUNDS)
    loss.backward()
    assert found["kl"] == pytest.approx(math.exp(0.5) - 1.5)
    assert logprobs_N.grad.item() < 0  # pyright: ignore[reportOptionalMemberAccess]


def test_the_threshold_rises_while_there_are_too_few_pauses_and_stays_below_one() -> None:
    tracker = TauTracker(tau=0.9, wanted=1.0)
    seen = [tracker.tau]
    for _ in range(200):
        tracker.update(0.0)
        seen.append(tracker.tau)
    assert seen == sorted(seen) and seen[1] > 0.9 and seen[-1] < 1
    tracker.update(3.0)
    assert tracker.tau < seen[-1]
    for tau in (0.02, 0.25, 0.9966):
        near = TauTracker(tau=tau, wanted=1.0)
        near.update(0.5)
        # A step is small at both ends: relative to tau if it is low, relative to 1 - tau if it is high.
        assert 1.0 < near.tau / tau < 1.2 and 0.8 < (1 - near.tau) / (1 - tau) < 1.0
        for _ in range(200):
            near.update(5.0)
        assert 0 < near.tau < tau
    held = TauTracker(tau=0.2, wanted=1.0, lowest=0.05)
    for _ in range(200):
        held.update(5.0)
    assert held.tau == pytest.approx(0.05), "no lower than where the gate gives up"
    fixed = TauTracker(tau=0.9, wanted=0.0)
    fixed.update(3.0)
    assert fixed.tau == 0.9
