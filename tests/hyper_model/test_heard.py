"""Known speakers and words are written into a trace, and a long clip is cut into pieces."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from hyper_model.answering import NOTHING_HEARD, Answering, Generate, Heard, Question, join_heard
from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.silence import cut_pieces
from hyper_model.trace import Section, Speaker, Termination, build_prompt
from server.engines.scripted import scripted_checkpoint

CHECKPOINT = scripted_checkpoint()
BEFORE = "<THINK><PLANNING>listen</PLANNING><CAPTION><ENV>rain</ENV><SPEAKER>"
INVENTED = 'S1 man: "no such words"</SPEAKER><ASR>no such words</ASR></CAPTION>'
BEHIND = "<REASONING>so</REASONING><SUMMARY>it</SUMMARY></THINK><RESPONSE>a</RESPONSE><FINAL_ANSWER>a</FINAL_ANSWER>"


def answer(heard: Heard | None, **fields: Any) -> tuple[Answering, list[Generate]]:
    """Drive the procedure with a model that invents words."""
    tokenizer = CHECKPOINT.tokenizer
    prompt = tuple(build_prompt(tokenizer, "Who?", ()))
    answering = Answering(Question(prompt, heard=heard, **fields), tokenizer, CHECKPOINT.manifest)
    steps: list[Generate] = []
    while isinstance(step := answering.next_step, Generate):
        steps.append(step)
        is_continued = len(step.prompt_token_ids) > len(prompt)
        text = "</CAPTION>" + BEHIND if is_continued else BEFORE + INVENTED + BEHIND
        for token_id in tokenizer.encode_trace(text):
            is_stop = token_id in step.stop_token_ids
            answering.receive_tokens((token_id,), "stop" if is_stop else None)
            if is_stop or answering.next_step is not step:
                break
    return answering, steps


def test_known_words_stand_in_the_trace_in_place_of_the_models() -> None:
    heard = Heard((Speaker("S1", "woman", ('she said "hi"',)),), "<ASR> is a tag. hi")
    answering, steps = answer(heard)
    result = answering.result
    trace = result.parsed.trace
    assert (trace.speakers, trace.transcript, trace.environment) == (heard.speakers, heard.transcript, "rain")
    assert result.parsed.termination is Termination.COMPLETE and result.text == "a"
    assert result.parsed.format.value == "strict" and len(steps) == 2
    assert steps[1].gate is None and steps[1].max_tokens < steps[0].max_tokens


def test_a_clip_without_words_gets_an_empty_transcript() -> None:
    trace = answer(NOTHING_HEARD)[0].result.parsed.trace
    assert (trace.speakers, trace.transcript) == ((), "")
    assert answer(None)[0].result.parsed.trace.transcript == "no such words"


def test_known_words_without_room_for_an_answer_are_left_out() -> None:
    heard = Heard((), "word " * 500)
    result = answer(heard, max_tokens=200)[0].result
    assert "word word" not in result.parsed.texts.get(Section.ASR, "")


def test_speakers_of_pieces_are_joined_by_their_descriptions() -> None:
    first = Heard((Speaker("S1", "woman", ("one",)), Speaker("S2", "man", ("two",))), "one. two")
    second = Heard((Speaker("S1", "man", ("three",)), Speaker("S2", "man", ("four",))), "three. four")
    joined = join_heard([first, Heard(), second])
    assert joined.transcript == "one. two. three. four"
    assert joined.speakers == (
        Speaker("S1", "woman", ("one",)),
        Speaker("S2", "man", ("two", "three")),
        Speaker("S3", "man", ("four",)),
    )


def test_lines_of_pieces_belong_to_the_speakers_of_the_whole_clip() -> None:
    first = Heard((Speaker("S1", "woman", ("the train leaves at nine",)),), "the train leaves at nine")
    second = Heard((Speaker("S1", "woman", ("my father is a pilot", "it will rain")),), "my father is a pilot")
    third = Heard((Speaker("S1", "man", ("nobody came",)),), "nobody came")
    people = (
        Speaker("S1", "woman", ("the train leaves it nine",)),
        Speaker("S2", "woman", ("my farther is a pilot", "something else")),
        Speaker("S3", "child", ("not in any piece",)),
    )
    assert join_heard([first, second, third], people).speakers == (
        Speaker("S1", "woman", ("the train leaves at nine", "it will rain")),
        Speaker("S2", "woman", ("my father is a pilot",)),
        Speaker("S3", "child", ()),
        Speaker("S4", "man", ("nobody came",)),
    )


def test_a_long_clip_is_cut_in_its_silences_and_a_short_one_is_not() -> None:
    rng = np.random.default_rng(0)
    sound_S = rng.normal(0, 0.1, 29 * SAMPLE_RATE_HZ).astype(np.float32)
    for start_s in (8.5, 17.2):
        sound_S[round(start_s * SAMPLE_RATE_HZ) : round((start_s + 0.5) * SAMPLE_RATE_HZ)] = 0
    pieces = cut_pieces(sound_S, 10.0)
    assert len(pieces) == 4
    for (_, end), middle_s in zip(pieces, (8.75, 17.45), strict=False):
        assert abs(end / SAMPLE_RATE_HZ - middle_s) < 0.1
    assert pieces[0][0] == 0 and pieces[-1][1] == len(sound_S)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(pieces))
    for num_samples in (0, 80_000, 160_000):
        assert cut_pieces(sound_S[:num_samples], 10.0) == [(0, num_samples)]
    assert cut_pieces(sound_S, None) == cut_pieces(sound_S, 30.0) == [(0, len(sound_S))]
    for single_pass_s in (2.0, 10.0, 20.0):
        for seconds in np.arange(single_pass_s + 0.1, 30, 0.7):
            pieces = cut_pieces(sound_S[: int(seconds * 16_000)], single_pass_s)
            lengths_s = [(end - start) / SAMPLE_RATE_HZ for start, end in pieces]
            assert len(pieces) > 1 and min(lengths_s) >= 0.3 * single_pass_s - 0.1, (seconds, lengths_s)
            assert max(lengths_s) <= 0.9 * single_pass_s + 0.1, (seconds, lengths_s)
