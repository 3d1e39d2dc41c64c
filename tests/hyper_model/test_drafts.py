"""Drafts are pure, bounded and harmless guesses, and they contain what a trace repeats."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper_model.drafts import MAX_NGRAM_DRAFT, DraftTable, draft_tokens
from hyper_model.trace import (
    PauseMode,
    Section,
    Speaker,
    Trace,
    TraceTokenizer,
    build_prompt,
    render,
    train_tokenizer,
)
from tests.builders import TOKENIZER_TEXTS

TOKENIZER = TraceTokenizer(train_tokenizer(TOKENIZER_TEXTS * 20, vocab_size=640))
TABLE = DraftTable(TOKENIZER, PauseMode.PARALLEL)
PAUSE_ID, CLOSE_ID = (TOKENIZER.encode_trace(tag)[0] for tag in ("<PAUSE>", "</PAUSE>"))
PROMPT = build_prompt(TOKENIZER, "What does the first speaker say?", ("the train leaves", "please close the window"))
QUOTES = ("please close the window", "the train leaves at nine", "who cannot come on Friday")
TRACE = Trace(
    planning="find what S1 says",
    environment="rain",
    speakers=(Speaker("S1", "woman", QUOTES[::2]), Speaker("S2", "man", QUOTES[1:2])),
    transcript=". ".join(QUOTES),
    reasoning=f"S1 says {QUOTES[0]}",
    summary=QUOTES[0],
    response=QUOTES[0],
    final_answer=QUOTES[0],
)
TRACE_IDS = TOKENIZER.encode_trace(render(TRACE))
ANY_IDS = st.lists(st.integers(0, TOKENIZER.vocab_size + 3), max_size=40)
TRACES = st.builds(
    Trace,
    *[st.none() | st.text(max_size=12)] * 2,
    st.lists(st.builds(Speaker, st.sampled_from(["S1", "S2"]), st.just("man"), st.tuples(st.text(max_size=9)))).map(
        tuple
    ),
    *[st.none() | st.text(max_size=12)] * 7,
)


def after(section: Section, *, is_close: bool = False) -> list[int]:
    """Return the trace up to a tag, this included."""
    return TRACE_IDS[: TRACE_IDS.index(TOKENIZER.tag_ids[section][is_close]) + 1]


def drafted(trace_ids: Sequence[int], max_tokens: int = 99, table: DraftTable = TABLE) -> str:
    return TOKENIZER.decode(draft_tokens(PROMPT, trace_ids, table, max_tokens))


def num_steps(trace_ids: Sequence[int], max_tokens: int) -> int:
    """Return the steps of an engine that checks one draft per step."""
    done = steps = 0
    while done < len(trace_ids):
        draft = draft_tokens(PROMPT, trace_ids[:done], TABLE, max_tokens)
        agreeing = [ours == theirs for ours, theirs in zip(draft, trace_ids[done:], strict=False)]
        done += [*agreeing, False].index(False) + 1
        steps += 1
    return steps


@given(prompt=ANY_IDS, trace=ANY_IDS | TRACES.map(lambda trace: TOKENIZER.encode_trace(render(trace))), data=st.data())
def test_a_draft_of_any_tokens_is_short_repeatable_and_free_of_pauses(
    prompt: list[int], trace: list[int], data: st.DataObject
) -> None:
    max_tokens = data.draw(st.integers(0, 12))
    cut = data.draw(st.integers(0, len(trace)))
    for mode in PauseMode:
        table = DraftTable(TOKENIZER, mode)
        draft = draft_tokens(prompt, trace[:cut], table, max_tokens)
        assert draft == draft_tokens(tuple(prompt), tuple(trace[:cut]), table, max_tokens)
        assert len(draft) <= max_tokens
        assert not {PAUSE_ID, CLOSE_ID, TOKENIZER.audio_id, TOKENIZER.im_end_id} & {*draft}


@given(trace=st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=60), data=st.data())
def test_a_shorter_limit_only_cuts_the_draft(trace: list[int], data: st.DataObject) -> None:
    limits = sorted(data.draw(st.tuples(st.integers(0, 12), st.integers(0, 12))))
    short, long = (draft_tokens(PROMPT, trace, TABLE, limit) for limit in limits)
    assert long[: len(short)] == short


def test_tags_that_must_follow_are_drafted() -> None:
    assert drafted(after(Section.THINK)) == "<PLANNING>"
    assert drafted(after(Section.PLANNING, is_close=True)) == "<CAPTION><ENV>"
    assert drafted(after(Section.ASR, is_close=True)) == "</CAPTION><REASONING>"


def test_the_tag_after_an_optional_section_is_drafted() -> None:
    think, caption = (TOKENIZER.tag_ids[section][0] for section in (Section.THINK, Section.CAPTION))
    assert drafted([think, caption, *TOKENIZER.tag_ids[Section.DESCRIPTION]]) == "</CAPTION><REASONING>"
    assert drafted([*TOKENIZER.tag_ids[Section.REFLECT]]) == "<FINAL_ANSWER>"


def test_the_fixed_beginning_of_a_speakers_line_is_drafted() -> None:
    speaker = after(Section.SPEAKER)
    assert drafted(after(Section.ENV, is_close=True)) == "<SPEAKER>S1"
    for written, expected in (
        ("", "S1"),
        ("S1", ""),
        ("S1 woman", ': "'),
        ('S1 woman: "who cannot come"\n', "S2"),
        ('S1 woman: "who cannot come"\nS2 man', ': "'),
    ):
        assert drafted([*speaker, *TOKENIZER.encode_text(written)]) == expected, written


def test_the_transcript_is_drafted_from_the_quotes_in_turns() -> None:
    assert drafted(after(Section.ASR)) == f"{TRACE.transcript}</ASR></CAPTION><REASONING>"


def test_a_transcript_in_another_order_is_drafted_from_its_own_words() -> None:
    spoken = [QUOTES[1], QUOTES[0], QUOTES[2]]
    written = TOKENIZER.encode_text(f"{spoken[0]}. {spoken[1][:6]}")
    assert drafted([*after(Section.ASR), *written]).startswith(f" close the window. {spoken[2]}</ASR>")


def test_words_after_says_are_drafted_from_the_quotes_of_that_speaker() -> None:
    written = TOKENIZER.encode_text("S2 says")
    assert drafted([*after(Section.REASONING), *written]).startswith(f" {QUOTES[1]}</REASONING><SUMMARY>{QUOTES[1]}")


@pytest.mark.parametrize("section", [Section.SUMMARY, Section.RESPONSE, Section.FINAL_ANSWER])
def test_the_answer_is_drafted_from_the_section_before(section: Section) -> None:
    assert drafted(after(section)).startswith(f"{QUOTES[0]}</{section}>")


def test_the_words_after_is_are_a_conclusion_too() -> None:
    reasoning = [*after(Section.REASONING), *TOKENIZER.encode_text("the background is rain")]
    tags = TOKENIZER.tag_ids
    assert drafted([*reasoning, tags[Section.REASONING][1], tags[Section.SUMMARY][0]], 9).startswith("rain</SUMMARY>")


def test_a_choice_is_completed_after_its_first_word() -> None:
    written = [*after(Section.REASONING), *TOKENIZER.encode_text("no idea"), TOKENIZER.tag_ids[Section.REASONING][1]]
    summary = [*written, TOKENIZER.tag_ids[Section.SUMMARY][0]]
    assert drafted(summary) == ""
    assert drafted([*summary, *TOKENIZER.encode_text("the")]).startswith(" train leaves</SUMMARY>")


def test_other_words_are_drafted_from_an_equal_place() -> None:
    tags = TOKENIZER.tag_ids
    seen = TOKENIZER.encode_text("keyboard music crowd alarm engine quiet dog barking")
    trace = [tags[Section.PLANNING][0], *seen, tags[Section.PLANNING][1], tags[Section.ENV][0], *seen[:5]]
    assert draft_tokens([], trace, TABLE, 99) == seen[5 : 5 + MAX_NGRAM_DRAFT]


def test_words_unlike_their_source_are_not_drafted_from_it() -> None:
    assert drafted([*after(Section.RESPONSE), *TOKENIZER.encode_text("rain")]) == ""


@pytest.mark.parametrize("mode", PauseMode)
def test_a_pause_changes_no_draft(mode: PauseMode) -> None:
    table = DraftTable(TOKENIZER, mode)
    span = [PAUSE_ID] * 3 if mode is PauseMode.PARALLEL else [PAUSE_ID, *TOKENIZER.encode_text("rain"), CLOSE_ID]
    for cut in range(len(TRACE_IDS)):
        for place in {0, cut // 2, cut}:
            paused = [*TRACE_IDS[:place], *span, *TRACE_IDS[place:cut]]
            assert drafted(paused, 8, table) == drafted(TRACE_IDS[:cut], 8, table)


def test_nothing_is_drafted_inside_a_sampled_pause() -> None:
    table = DraftTable(TOKENIZER, PauseMode.SAMPLED)
    assert drafted([*after(Section.ENV, is_close=True), PAUSE_ID], table=table) == ""


def test_over_two_fifths_of_the_steps_are_saved_on_a_trace_that_repeats_its_quotes() -> None:
    assert num_steps(TRACE_IDS, 8) < 0.6 * len(TRACE_IDS)


def test_the_start_of_a_trace_is_its_first_tag() -> None:
    assert TABLE.trace_start([*PROMPT, *TRACE_IDS]) == len(PROMPT)
    assert TABLE.trace_start(PROMPT) == len(PROMPT)
