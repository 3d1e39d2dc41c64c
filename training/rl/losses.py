"""Stage II's arithmetic (method, section 6): what each rollout's tokens weigh, and the loss over them. Tensors only.

Axes: G rollouts of a group, N scored tokens of all rollouts. Forced tokens (pauses, spans, closing tags) are not among
the N: nobody chose them. Knows nothing of models, text, rewards or engines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

MIN_DEVIATION = 0.02
"""Below this the rewards of a group are taken for equal: a word more or less in a transcript must not become as large
an advantage as a right answer."""
MAX_LOG_RATIO = 20.0
"""Where differences of log-probabilities are cut off before they are exponentiated."""


def advantages(rewards: Sequence[float], *, is_divided: bool) -> list[float]:
    """Returns how much better each rollout of a group did than the group, in sum 0.

    Args:
        is_divided: By the group's standard deviation (GRPO, Shao et al. 2024); not so in Dr. GRPO (Liu et al. 2025),
            where a group of hardly different rewards must not weigh as much as others.
    """
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    deviation = (sum(each * each for each in centred) / len(centred)) ** 0.5
    if deviation < MIN_DEVIATION:
        return [0.0] * len(rewards)
    return [each / deviation for each in centred] if is_divided else centred


def confidence_weights(lowest: Sequence[float | None], is_aborted: Sequence[bool]) -> list[float]:
    """Returns what each rollout of a group weighs by its lowest group confidence (LGC).

    Standardised in the group to mean 1 and deviation 1/2, clipped to 0.5 and 1.5, and 0 for a rollout that the gate
    gave up. The weights of a group are scaled to the mean 1 over those that count, so that the step's size does not
    drift with them. A rollout without a full window weighs as the mean one.
    """
    counted = [value for value, aborted in zip(lowest, is_aborted, strict=True) if value is not None and not aborted]
    mean = sum(counted) / len(counted) if counted else 0.0
    deviation = (sum((value - mean) ** 2 for value in counted) / len(counted)) ** 0.5 if counted else 0.0
    found: list[float] = []
    for value, aborted in zip(lowest, is_aborted, strict=True):
        if aborted:
            found.append(0.0)
        elif value is None or deviation < 1e-6:
            found.append(1.0)
        else:
            found.append(min(1.5, max(0.5, 1.0 + 0.5 * (value - mean) / deviation)))
    total, num = sum(found), sum(weight > 0 for weight in found)
    return [weight * num / total for weight in found] if total else found


@dataclass(frozen=True, eq=False)
class Tokens:
    """Holds what is known of the N scored tokens before the policy is asked again; none of it has a gradient.

    Attributes:
        advantages_N: Of each token's rollout, weighed by its confidence; 0 for what is left out.
        weights_N: What a token is of the step's loss (`token_weights`).
        sampler_logprobs_N: As the engine sampled it, over the tokens that were allowed there.
        old_logprobs_N: By the weights that it was sampled with, as the trainer computes it; None: by those of now.
        reference_logprobs_N: By the policy at the beginning; None where no divergence is asked for.
    """

    advantages_N: torch.Tensor  # noqa: N815  # the axis suffix
    weights_N: torch.Tensor  # noqa: N815
    sampler_logprobs_N: torch.Tensor  # noqa: N815
    old_logprobs_N: torch.Tensor | None = None  # noqa: N815
    reference_logprobs_N: torch.Tensor | None = None  # noqa: N815


@dataclass(frozen=True)
class Bounds:
    """Holds the constants of the loss; see `GrpoRecipe`."""

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
    """Returns what each token of each rollout weighs, so that a step's weights are a mean.

    Args:
        num_tokens: Scored tokens of these rollouts.
        num_rollouts, total: Rollouts, and scored tokens, of the whole step on all ranks.
        limit: The most tokens that a rollout may have.
    """
    if loss == "grpo":
        return [1.0 / (num_rollouts * max(1, num)) for num in num_tokens]
    if loss == "dr_grpo":
        return [1.0 / (num_rollouts * limit)] * len(num_tokens)
    return [1.0 / max(1.0, total)] * len(num_tokens)


def policy_loss(logprobs_N: torch.Tensor, tokens: Tokens, bounds: Bounds) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns these tokens' share of the loss, and what is worth knowing about them.

    The clipped surrogate of PPO with a higher bound above than below (DAPO, Yu et al. 2025), weighed by the truncated
    importance of trainer against sampler, plus the k3 estimate of the divergence to the reference (Schulman 2020).
    """
    old_N = logprobs_N.detach() if tokens.old_logprobs_N is None else tokens.old_logprobs_N
    ratio_N = torch.exp((logprobs_N - old_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped_N = ratio_N.clamp(1 - bounds.clip_low, 1 + bounds.clip_high)
    surrogate_N = torch.minimum(ratio_N * tokens.advantages_N, clipped_N * tokens.advantages_N)
    gap_N = old_N - tokens.sampler_logprobs_N
    importance_N = torch.exp(gap_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).clamp(max=bounds.max_importance)
    loss = -(importance_N * surrogate_N * tokens.weights_N).sum()
    found = {
        "gap": float(gap_N.abs().mean()),
        "gap_max": float(gap_N.abs().max()),
        "importance_ess": float(importance_N.sum() ** 2 / (importance_N**2).sum() / len(importance_N)),
        "clipped": float((ratio_N != clipped_N).float().mean()),
    }
    if tokens.reference_logprobs_N is not None:
        difference_N = (tokens.reference_logprobs_N - logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl_N = torch.exp(difference_N) - difference_N - 1
        loss = loss + bounds.kl_weight * (kl_N * tokens.weights_N).sum()
        found["kl"] = float(kl_N.detach().mean())
    return loss, found


_LOWEST_TAU, _HIGHEST_TAU = 0.01, 1 - 1e-5


@dataclass
class TauTracker:
    """Moves tau_pause so that rollouts pause as often as wanted while the policy grows surer of itself.

    What is moved is tau's logit: thresholds lie close to 1 where a gate waits for a section's first token, and near 0
    where it waits for any token of a trace, and a step shall be small at both ends. It is frozen within a step, so no
    prompt's gate hangs on its neighbours.

    Attributes:
        tau: The threshold of the next step.
        wanted: Pauses a rollout; 0 leaves the threshold where it is.
        rate: How far a step moves the logit, for each pause too few.
        lowest: Where it ends: a gate that gives up at some threshold cannot pause below it.
    """

    tau: float
    wanted: float
    rate: float = 0.3
    lowest: float = _LOWEST_TAU

    def update(self, pauses: float) -> None:
        """Looks at how often the rollouts of a step paused, on average."""
        if self.wanted:
            lowest = max(_LOWEST_TAU, self.lowest)
            held = min(_HIGHEST_TAU, max(lowest, self.tau))
            logit = math.log(held / (1 - held)) + self.rate * (self.wanted - pauses)
            self.tau = min(_HIGHEST_TAU, max(lowest, 1 / (1 + math.exp(-logit))))
