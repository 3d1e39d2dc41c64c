"""Compute token weights and losses of Stage II (method, section 6) on tensors.

Axes: G rollouts of a group, N scored tokens of all rollouts. Forced tokens (pauses, spans, closing tags) are not among
the N, since the policy did not choose them. This module depends on no model, text, reward or engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

MIN_DEVIATION = 0.02
"""Rewards of a group with a smaller deviation count as equal.

Otherwise one transcript word more or less would give the same advantage as a right answer.
"""
MAX_LOG_RATIO = 20.0
"""Clamp for differences of log-probabilities before exponentiation."""


def advantages(rewards: Sequence[float], *, is_divided: bool) -> list[float]:
    """Return the advantage of each rollout: its reward minus the group mean, so their sum is 0.

    Args:
        is_divided: Divide by the group's standard deviation (GRPO, Shao et al. 2024). Dr. GRPO (Liu et al. 2025) does
            not divide, so that a group of nearly equal rewards weighs less than others.
    """
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    deviation = (sum(value * value for value in centred) / len(centred)) ** 0.5
    if deviation < MIN_DEVIATION:
        return [0.0] * len(rewards)
    return [value / deviation for value in centred] if is_divided else centred


def confidence_weights(lowest: Sequence[float | None], is_aborted: Sequence[bool]) -> list[float]:
    """Return the weight of each rollout of a group by its lowest group confidence (LGC).

    Values are standardised within the group to mean 1 and deviation 1/2 and clipped to 0.5 and 1.5. A rollout aborted
    by the gate weighs 0; one without a full window weighs as the mean. The weights are then scaled to mean 1 over the
    nonzero ones, so that the step size does not drift.
    """
    counted = [value for value, aborted in zip(lowest, is_aborted, strict=True) if value is not None and not aborted]
    mean = sum(counted) / len(counted) if counted else 0.0
    deviation = (sum((value - mean) ** 2 for value in counted) / len(counted)) ** 0.5 if counted else 0.0
    weights: list[float] = []
    for value, aborted in zip(lowest, is_aborted, strict=True):
        if aborted:
            weights.append(0.0)
        elif value is None or deviation < 1e-6:
            weights.append(1.0)
        else:
            weights.append(min(1.5, max(0.5, 1.0 + 0.5 * (value - mean) / deviation)))
    total, num = sum(weights), sum(weight > 0 for weight in weights)
    return [weight * num / total for weight in weights] if total else weights


@dataclass(frozen=True, eq=False)
class Tokens:
    """Known quantities of the N scored tokens before the policy's forward pass; none has a gradient.

    Attributes:
        advantages_N: Advantage of the token's rollout, weighted by confidence; 0 for excluded rollouts.
        weights_N: Weight of a token in the step's loss (`token_weights`).
        sampler_logprobs_N: Log-probability in the engine, over the tokens allowed at the position.
        old_logprobs_N: Log-probability in the trainer under the sampling weights; None means the current weights.
        reference_logprobs_N: Log-probability under the initial policy; None without a divergence term.
    """

    advantages_N: torch.Tensor  # noqa: N815  # the axis suffix
    weights_N: torch.Tensor  # noqa: N815
    sampler_logprobs_N: torch.Tensor  # noqa: N815
    old_logprobs_N: torch.Tensor | None = None  # noqa: N815
    reference_logprobs_N: torch.Tensor | None = None  # noqa: N815


@dataclass(frozen=True)
class Bounds:
    """Constants of the loss; see `GrpoRecipe`."""

    clip_low: float
    clip_high: float
    kl_weight: float
    max_importance: float


def token_weights(
    num_tokens: Sequence[int],
    loss: Literal["grpo", "dr_grpo", "dapo"],
    *,
    num_rollouts: float,
    total: float,
    limit: int,
) -> list[float]:
    """Return the loss weight of each token per rollout, so that the step's loss is a mean.

    Args:
        num_tokens: Scored tokens of these rollouts.
        num_rollouts, total: Rollouts and scored tokens of the whole step on all ranks.
        limit: Maximum number of tokens of a rollout.
    """
    if loss == "grpo":
        return [1.0 / (num_rollouts * max(1, num)) for num in num_tokens]
    if loss == "dr_grpo":
        return [1.0 / (num_rollouts * limit)] * len(num_tokens)
    return [1.0 / max(1.0, total)] * len(num_tokens)


def policy_loss(logprobs_N: torch.Tensor, tokens: Tokens, bounds: Bounds) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the share of the loss of these tokens, and figures for the log.

    The loss is the clipped surrogate of PPO with a higher upper bound (DAPO, Yu et al. 2025). The truncated importance
    ratio of trainer to sampler weights it. The k3 estimate of the divergence to the reference (Schulman 2020) is added.
    """
    old_N = logprobs_N.detach() if tokens.old_logprobs_N is None else tokens.old_logprobs_N
    ratio_N = torch.exp((logprobs_N - old_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped_N = ratio_N.clamp(1 - bounds.clip_low, 1 + bounds.clip_high)
    surrogate_N = torch.minimum(ratio_N * tokens.advantages_N, clipped_N * tokens.advantages_N)
    gap_N = old_N - tokens.sampler_logprobs_N
    importance_N = torch.exp(gap_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).clamp(max=bounds.max_importance)
    loss = -(importance_N * surrogate_N * tokens.weights_N).sum()
    figures = {
        "gap": float(gap_N.abs().mean()),
        "gap_max": float(gap_N.abs().max()),
        "importance_ess": float(importance_N.sum() ** 2 / (importance_N**2).sum() / len(importance_N)),
        "clipped": float((ratio_N != clipped_N).float().mean()),
    }
    if tokens.reference_logprobs_N is not None:
        difference_N = (tokens.reference_logprobs_N - logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl_N = torch.exp(difference_N) - difference_N - 1
        loss = loss + bounds.kl_weight * (kl_N * tokens.weights_N).sum()
        figures["kl"] = float(kl_N.detach().mean())
    return loss, figures


_LOWEST_TAU, _HIGHEST_TAU = 0.01, 1 - 1e-5


@dataclass
class TauTracker:
    """Controller of tau_pause for a constant pause rate while the policy becomes more confident.

    The update moves tau's logit, since a step must be small near both 0 and 1. Thresholds lie close to 1 for a gate at
    a section's first token, and near 0 for a gate at any token. The threshold is constant within a step, so no prompt's
    gate depends on its neighbours.

    Attributes:
        tau: The threshold of the next step.
        wanted: Pauses per rollout; 0 leaves the threshold unchanged.
        rate: Change of the logit per step, for each missing pause.
        lowest: Lower limit; a gate with an abort threshold cannot pause below it.
    """

    tau: float
    wanted: float
    rate: float = 0.3
    lowest: float = _LOWEST_TAU

    def update(self, pauses: float) -> None:
        """Move the threshold by a step's mean number of pauses per rollout."""
        if self.wanted:
            lowest = max(_LOWEST_TAU, self.lowest)
            clamped = min(_HIGHEST_TAU, max(lowest, self.tau))
            logit = math.log(clamped / (1 - clamped)) + self.rate * (self.wanted - pauses)
            self.tau = min(_HIGHEST_TAU, max(lowest, 1 / (1 + math.exp(-logit))))
