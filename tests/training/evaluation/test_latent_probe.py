"""The probe reads the model's own states, at the places of the pauses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hyper_model.checkpoint import Checkpoint, open_checkpoint
from hyper_model.positions import give_positions
from hyper_model.trace import Section, build_prompt
from tests.builders import answer_result, build_random_checkpoint
from training.evaluation.latent_probe import Prober, probe, spans_of
from training.rl.rollout import Completion, Prompt


@pytest.fixture(scope="module", params=["copies", "positions"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("probe")
    build_random_checkpoint(folder / "random", manifest_fields={"pause": {"latent_tokens": 4, "max_pauses": 3}})
    is_plain = request.param == "copies"
    return open_checkpoint(folder / "random") if is_plain else give_positions(folder / "random", folder / "positions")


@pytest.fixture(scope="module")
def prompt(checkpoint: Checkpoint) -> Prompt:
    samples = np.sin(np.arange(16_000) / 9).astype(np.float32)
    return Prompt(build_prompt(checkpoint.tokenizer, "What?"), samples, ())


def completion(checkpoint: Checkpoint, num_pauses: int, *, has_answer: bool = True) -> Completion:
    tokenizer = checkpoint.tokenizer
    assert tokenizer.pause_id is not None
    span = tokenizer.position_ids or (tokenizer.pause_id,) * 4
    ids = [*tokenizer.open_ids(Section.THINK), *tokenizer.encode_text("rain")]
    for number in range(num_pauses):
        ids += span
        # The second and the third follow each other directly.
        ids += tokenizer.encode_text("rain") if number == 0 else []
    ids += tokenizer.close_ids(Section.THINK)
    if has_answer:
        answer = tokenizer.encode_text("rain")
        ids += [*tokenizer.open_ids(Section.FINAL_ANSWER), *answer, *tokenizer.close_ids(Section.FINAL_ANSWER)]
    return Completion(answer_result(checkpoint, ids))


def test_spans_are_found_and_two_in_a_row_are_told_apart(checkpoint: Checkpoint) -> None:
    ids = completion(checkpoint, 3).result.token_ids
    spans = spans_of(checkpoint, ids)
    assert len(spans) == 3 and all(last - first == 3 for first, last in spans)
    assert spans[2][0] == spans[1][1] + 1
    latent_ids = checkpoint.tokenizer.latent_ids
    assert all(ids[place] in latent_ids for first, last in spans for place in range(first, last + 1))
    assert spans_of(checkpoint, completion(checkpoint, 0).result.token_ids) == []


def test_states_are_those_of_the_whole_model(checkpoint: Checkpoint, prompt: Prompt) -> None:
    ids = completion(checkpoint, 2).result.token_ids
    prober = Prober(checkpoint)
    states = prober.states(prompt, ids)
    assert states.shape == (len(ids), 64)
    # Causal: later tokens do not change earlier states.
    assert torch.allclose(prober.states(prompt, ids[:-3]), states[:-3], atol=1e-5)
    other = Prompt(prompt.token_ids, -0.3 * prompt.samples_S[::-1].copy(), ())
    assert not torch.allclose(prober.states(other, ids), states, atol=1e-3), "the clip is heard"


def test_the_table_counts_pauses_and_leaves_out_what_gives_no_answer(checkpoint: Checkpoint, prompt: Prompt) -> None:
    completions = [completion(checkpoint, n) for n in (0, 1, 3)] + [completion(checkpoint, 1, has_answer=False)]
    table = probe(checkpoint, [prompt] * 4, completions, ["a", "b", "c", "d"], use_tqdm=False)
    assert (table["num_completions"], table["num_without_answer"]) == (3, 1)
    first, second, third = table["pauses"]
    assert [row["num_spans"] for row in (first, second, third)] == [2, 1, 1]
    assert (first["trigger_rate"], second["trigger_rate"]) == (0.6667, 0.3333)
    for row in (first, second, third):
        assert -1 <= row["cosine_to_answer"] <= 1 and -1 <= row["cosine_before"] <= 1 and row["displacement"] > 0


def test_a_checkpoint_that_never_pauses_has_an_empty_table(checkpoint: Checkpoint, prompt: Prompt) -> None:
    table = probe(checkpoint, [prompt], [completion(checkpoint, 0)], ["a"], use_tqdm=False)
    assert [row["num_spans"] for row in table["pauses"]] == [0, 0, 0]
    assert "cosine_to_answer" not in table["pauses"][0] and table["pauses"][0]["trigger_rate"] == 0.0
