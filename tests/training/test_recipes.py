"""Properties of recipes: `--set`, runs of earlier releases and the names of rewards."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from training.recipes import (
    RECIPES,
    REWARD_WEIGHTS,
    GrpoRecipe,
    LengthRange,
    Lora,
    RecipeError,
    SftRecipe,
    debug,
    mini_grpo,
    mini_sft,
    qwen2_audio_7b_sft,
    recipe_from_dict,
    with_settings,
)
from training.rl.rewards import GATED, PERCEPTION, REWARDS


def test_every_reward_has_a_default_weight() -> None:
    assert list(REWARDS) == list(REWARD_WEIGHTS)
    assert {*GATED, *PERCEPTION} <= set(REWARDS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_own_json(name: str) -> None:
    recipe: Any = RECIPES[name]()
    assert recipe_from_dict(type(recipe), json.loads(json.dumps(asdict(recipe)))) == recipe


def test_settings_change_what_they_name_and_nothing_else() -> None:
    changed = with_settings(mini_grpo(), ('weights={"fidelity": 0.0}', "num_steps=7", "dtype=float32"))
    assert changed.weights == {**REWARD_WEIGHTS, "fidelity": 0.0}
    assert (changed.num_steps, changed.dtype, changed.trace_length) == (7, "float32", LengthRange())
    decoder = with_settings(mini_sft(), ('decoder={"hidden_size": 64}',)).decoder
    before = mini_sft().decoder
    assert decoder is not None and before is not None
    assert (decoder.hidden_size, decoder.num_layers) == (64, before.num_layers)
    assert with_settings(mini_sft(), ("spelling=null", "speech_share=[0.5, 0.25]")).speech_share == (0.5, 0.25)
    lora = with_settings(qwen2_audio_7b_sft(), ('lora={"rank": 4, "alpha": 8, "targets": ["q_proj"]}', "fsdp="))
    assert lora.lora == Lora(4, 8, targets=("q_proj",)) and lora.fsdp == ""


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_step=1", "NAME must be one of seed, num_steps"),
        ("num_steps", "NAME must be one of"),
        ("num_steps=many", "'many' is not a JSON value"),
        ('num_steps="3"', 'num_steps: Input should be a valid integer, received "3"'),
        ("num_steps=3.5", "num_steps: Input should be a valid integer"),
        ("num_steps=true", "num_steps: Input should be a valid integer"),
        ("learning_rate=[1]", "learning_rate: Input should be a valid number"),
        ("dtype=float16", "dtype: Input should be 'float32' or 'bfloat16'"),
        ('weights={"fidelitee": 1.0}', "unknown reward fidelitee; the rewards are accuracy"),
        ('trace_length={"least": 1}', "trace_length.least: Unexpected"),
    ],
)
def test_a_setting_that_is_refused_is_named_with_its_value(setting: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        with_settings(mini_grpo(), (setting,))
    assert repr(setting) in str(caught.value) and message in str(caught.value)


def test_a_run_of_an_earlier_release_is_read_with_defaults() -> None:
    said = asdict(mini_grpo())
    said["weights"] = {**REWARD_WEIGHTS, "fidelity": 0.0, "min_tokens": 8, "max_tokens": 120, "ramp_tokens": 60}
    del said["weights"]["transcript"], said["trace_length"], said["scales_rewards"]
    recipe = recipe_from_dict(GrpoRecipe, json.loads(json.dumps(said)))
    assert recipe.weights == {**REWARD_WEIGHTS, "fidelity": 0.0}
    assert recipe.trace_length == LengthRange(8, 120, 60) and recipe.scales_rewards
    assert with_settings(mini_grpo(), ('weights={"min_tokens": 8}',)).trace_length == LengthRange(min_tokens=8)


def test_a_run_that_this_release_cannot_read_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"not a SftRecipe of this release: num_stages: Unexpected .*received 3"):
        recipe_from_dict(SftRecipe, asdict(debug()) | {"num_stages": 3})
