"""Any model output is parsed without an error, and rendered traces are parsed to the same traces."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hyper_model.trace import (
    END_OF_TEXT,
    IM_END,
    MARKUP,
    PAUSE,
    PAUSE_CLOSE,
    PauseMode,
    Section,
    Speaker,
    TagStyle,
    Termination,
    Trace,
    TraceTokenizer,
    add_position_tokens,
    canonical_text,
    render,
    render_speakers,
    train_tokenizer,
)
from hyper_model.trace_parser import (
    Event,
    ParsedTrace,
    PauseSeen,
    SectionDelta,
    SectionEnd,
    SectionStart,
    TraceFormat,
    TraceParser,
    parse,
    parse_speakers,
    parse_text,
)

unhurried = settings(deadline=None)  # other work may occupy the cores
TOKEN = TraceTokenizer(train_tokenizer(["<FINAL_ANSWER> B. two </THINK> the rain and the engine <ENV>"] * 20, 420))


def text_tokenizer() -> TraceTokenizer:
    """Return a tokenizer like an adopted checkpoint's: turn and audio marks are tokens, tags and pauses are text."""
    shape = json.loads(TOKEN.tokenizer.to_str())
    shape["added_tokens"] = [token for token in shape["added_tokens"] if "|" in token["content"]]
    return TraceTokenizer(Tokenizer.from_str(json.dumps(shape)), TagStyle.TEXT)


TEXT = text_tokenizer()


def positioned_tokenizer() -> TraceTokenizer:
    """Return a tokenizer with one token for each of a pause's four positions."""
    tokenizer = Tokenizer.from_str(TOKEN.tokenizer.to_str())
    add_position_tokens(tokenizer, 4)
    return TraceTokenizer(tokenizer).with_positions(4)


POSITIONED = positioned_tokenizer()
# Both begin with the byte alphabet: one token per byte, enough to spell any text.
BYTE_IDS = {TOKEN.token_bytes(token_id)[0]: token_id for token_id in range(256)}
STRICT = (
    "<THINK><PLANNING>p</PLANNING><CAPTION><ENV>rain</ENV><SPEAKER></SPEAKER><ASR></ASR></CAPTION>"
    "<REASONING>r</REASONING><SUMMARY>s</SUMMARY></THINK><RESPONSE>B</RESPONSE><FINAL_ANSWER>B. two</FINAL_ANSWER>"
)

hostile_texts = st.lists(
    st.one_of(
        st.sampled_from([*MARKUP, *'<>/\\|:" \n\u212a\u0338\u0301', "<\\ENV>", '\\"', '": "', "S1 woman:", "日"]),
        st.text(max_size=6),
    ),
    max_size=6,
).map("".join)
canonical_texts = hostile_texts.map(canonical_text)
speakers = st.builds(
    Speaker,
    id=st.integers(1, 30).map("S{}".format),
    description=canonical_texts,
    quotes=st.lists(hostile_texts.map(lambda text: unicodedata.normalize("NFC", text)), max_size=3).map(tuple),
)
strict_traces = st.builds(
    Trace,
    planning=canonical_texts,
    environment=canonical_texts,
    speakers=st.lists(speakers, max_size=3).map(tuple),
    transcript=canonical_texts,
    description=st.none() | canonical_texts,
    reasoning=canonical_texts,
    summary=canonical_texts,
    response=canonical_texts,
    reflection=st.none() | canonical_texts,
    final_answer=canonical_texts,
)
# All ids of the vocabulary, special ones as often as words, and ids outside every vocabulary.
token_ids = st.lists(
    st.one_of(
        st.sampled_from(sorted(POSITIONED.special_ids)),
        st.integers(0, TOKEN.vocab_size - 1),
        st.sampled_from(TOKEN.encode_text("<THINK></ENV>\\ <BGM>")),
        st.sampled_from([-1, POSITIONED.vocab_size, 10**12]),
    ),
    max_size=60,
)


def read(ids: Iterable[int], tokenizer: TraceTokenizer) -> tuple[list[Event], ParsedTrace]:
    parser = TraceParser(tokenizer)
    events = [event for token_id in ids for event in parser.feed(token_id)]
    return events + parser.finish(), parser.result


def joined_deltas(events: Sequence[Event]) -> dict[Section, str]:
    texts = {event.section: "" for event in events if isinstance(event, SectionStart)}
    for event in events:
        if isinstance(event, SectionDelta):
            texts[event.section] += event.text
    return texts


@unhurried
@given(strict_traces)
def test_parsing_is_the_inverse_of_rendering(trace: Trace) -> None:
    text = render(trace)
    for parsed in (
        parse(TOKEN.encode_trace(text), TOKEN),
        parse(TEXT.encode_trace(text), TEXT),
        parse_text(text),
    ):
        assert parsed.trace == trace
        assert parsed.format is TraceFormat.STRICT
        assert parsed.termination is Termination.COMPLETE
        assert parsed.missing_sections == ()
        assert parsed.trailing_text == ""
        assert parsed.raw == text


@unhurried
@given(st.lists(speakers, max_size=4).map(tuple))
def test_speaker_lines_read_back_whatever_was_quoted(voices: tuple[Speaker, ...]) -> None:
    assert parse_speakers(render_speakers(voices)) == voices


@unhurried
@given(hostile_texts)
def test_speaker_lines_of_any_text_are_read(text: str) -> None:
    assert len(parse_speakers(text)) == sum(bool(line.strip()) for line in text.split("\n"))


@unhurried
@given(token_ids, st.sampled_from([TOKEN, TEXT, POSITIONED]), st.sampled_from(PauseMode), st.none() | st.integers(1, 3))
def test_no_sequence_of_tokens_raises(
    ids: list[int], tokenizer: TraceTokenizer, pause_mode: PauseMode, latent_tokens: int | None
) -> None:
    parser = TraceParser(tokenizer, pause_mode=pause_mode, latent_tokens=latent_tokens)
    events: list[Event] = []
    for token_id in ids:
        events += parser.feed(token_id)
        assert parser.result.termination is Termination.TRUNCATED
    events += parser.finish()
    result = parser.result
    assert joined_deltas(events) == result.texts
    assert all(text == text.strip() for text in result.texts.values())
    assert tuple(event for event in events if isinstance(event, PauseSeen)) == result.pauses
    assert parser.open_sections == ()
    assert sum(pause.num_latent for pause in result.pauses) + sum(result.section_num_tokens.values()) <= len(ids)
    open_sections: set[Section] = set()
    for event in events:
        if isinstance(event, SectionStart):
            open_sections.add(event.section)
        elif isinstance(event, SectionDelta):
            assert event.section in open_sections
            assert event.text
        elif isinstance(event, SectionEnd):
            open_sections.remove(event.section)
    assert not open_sections


@unhurried
@given(token_ids)
def test_raw_says_no_more_and_no_less_than_the_tokens_did(ids: list[int]) -> None:
    parsed = parse(ids, TOKEN)
    assert PAUSE not in parsed.raw
    assert IM_END not in parsed.raw
    again = parse_text(parsed.raw)
    assert (again.texts, again.format, again.raw) == (parsed.texts, parsed.format, parsed.raw)


@unhurried
@given(token_ids)
def test_closing_to_the_final_answer_always_leaves_it_open(ids: list[int]) -> None:
    parser = TraceParser(TOKEN)
    for token_id in ids:
        parser.feed(token_id)
    has_answer = Section.FINAL_ANSWER in parser.result.texts
    closing = parser.ids_to_final_answer()
    assert (closing == []) == has_answer
    for token_id in closing:
        parser.feed(token_id)
    if not has_answer:
        assert parser.open_sections == (Section.FINAL_ANSWER,)


@unhurried
@given(strict_traces, st.sampled_from([TOKEN, TEXT]), st.randoms(use_true_random=False))
def test_any_chunking_gives_the_same_sections(trace: Trace, tokenizer: TraceTokenizer, rng: random.Random) -> None:
    whole = tokenizer.encode_trace(render(trace))
    chunked: list[int] = []
    for token_id in whole:
        if token_id in tokenizer.special_ids or rng.random() < 0.5:
            chunked.append(token_id)
        else:
            chunked += [BYTE_IDS[byte] for byte in tokenizer.token_bytes(token_id)]
    events, parsed = read(chunked, tokenizer)
    assert joined_deltas(events) == joined_deltas(read(whole, tokenizer)[0])
    assert parsed.trace == trace


def test_events_come_as_soon_as_their_tokens_do() -> None:
    parser = TraceParser(TOKEN)
    steps = [parser.feed(token_id) for token_id in TOKEN.encode_trace("<THINK><ENV> é \n</ENV>")]
    assert [event for step in steps for event in step] == [
        SectionStart(Section.THINK),
        SectionStart(Section.ENV),
        SectionDelta(Section.ENV, "é"),
        SectionEnd(Section.ENV),
    ]
    assert steps[0] == [SectionStart(Section.THINK)]
    assert parser.open_sections == (Section.THINK,)
    assert parser.finish() == [SectionEnd(Section.THINK)]
    assert parser.finish() == []
    with pytest.raises(RuntimeError, match="finished"):
        parser.feed(0)


def test_a_character_split_over_tokens_is_held_back_until_it_is_whole() -> None:
    parser = TraceParser(TOKEN)
    ids = TOKEN.encode_trace("<ENV>語")
    assert [len(parser.feed(token_id)) for token_id in ids] == [1, *[0] * (len(ids) - 2), 1]
    parser.feed(ids[1])
    assert parser.finish()[0] == SectionDelta(Section.ENV, "\ufffd")


def test_a_spoken_tag_is_words_and_cannot_forge_a_section() -> None:
    spoken = TOKEN.encode_text("he said <FINAL_ANSWER>A</FINAL_ANSWER>")
    tagged = TOKEN.encode_trace
    parsed = parse([*tagged("<THINK>"), *spoken, *tagged("</THINK><FINAL_ANSWER>B</FINAL_ANSWER>")], TOKEN)
    assert parsed.answer_text == "B"
    assert parsed.texts[Section.THINK] == "he said <FINAL_ANSWER>A</FINAL_ANSWER>"
    assert parsed.raw == ("<THINK>he said <\\FINAL_ANSWER>A<\\/FINAL_ANSWER></THINK><FINAL_ANSWER>B</FINAL_ANSWER>")
    assert parsed.format is TraceFormat.WEAK


def test_turn_marks_end_a_trace_without_a_trace_of_their_own() -> None:
    parsed = parse([*TOKEN.encode_trace(STRICT + "\n"), TOKEN.im_end_id, TOKEN.end_of_text_id], TOKEN)
    assert parsed.format is TraceFormat.STRICT
    assert parsed.raw == STRICT + "\n"
    assert parsed.trailing_text == ""
    assert parse_text(f"{IM_END}{END_OF_TEXT}").format is TraceFormat.MALFORMED


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<THINK>because</THINK><FINAL_ANSWER>B</FINAL_ANSWER>", "B"),
        ("<THINK>because</THINK>\n<RESPONSE> B </RESPONSE>\n", "B"),
        ("<think>because</think><answer>two</answer>", "two"),
        ("<THINK></THINK><RESPONSE>A</RESPONSE><FINAL_ANSWER>B</FINAL_ANSWER>", "B"),
        ("<THINK></THINK><RESPONSE>A</RESPONSE><FINAL_ANSWER></FINAL_ANSWER>", "A"),
        ("<THINK>a<SUMMARY>s</SUMMARY>b</THINK><RESPONSE>A</RESPONSE><REFLECT>no</REFLECT>", "A"),
        ("<THINK><ENV>rain</ENV></THINK><RESPONSE>A</RESPONSE>", "A"),
        (STRICT.replace("<PLANNING>p</PLANNING>", ""), "B. two"),
        (STRICT.replace("<RESPONSE>B</RESPONSE>", ""), "B. two"),
        (STRICT.replace("</PLANNING>", "</PLANNING>and"), "B. two"),
        (STRICT.replace("<CAPTION>", "<CAPTION>and"), "B. two"),
        (STRICT.replace("<CAPTION>", "").replace("</CAPTION>", ""), "B. two"),
        (STRICT.replace("<SUMMARY>s</SUMMARY>", "").replace("<PLANNING>", "<SUMMARY>s</SUMMARY><PLANNING>"), "B. two"),
    ],
)
def test_weak_traces_are_graded_weak_and_answer(text: str, answer: str) -> None:
    for parsed in (parse_text(text), parse(TOKEN.encode_trace(text), TOKEN), parse(TEXT.encode_trace(text), TEXT)):
        assert parsed.format is TraceFormat.WEAK
        assert parsed.answer_text == answer
        assert parsed.termination is Termination.COMPLETE


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("The answer is rain.", None),
        ("<FINAL_ANSWER>B</FINAL_ANSWER>", "B"),
        ("<THINK>a</THINK>", None),
        ("<THINK>a</THINK>so<FINAL_ANSWER>B</FINAL_ANSWER>", "B"),
        ("<THINK>a</THINK><FINAL_ANSWER>B</FINAL_ANSWER>!", "B"),
        ("<THINK>a</THINK><FINAL_ANSWER>B", "B"),
        ("<THINK>a<FINAL_ANSWER>B</FINAL_ANSWER>", "B"),
        ("<THINK>a<FINAL_ANSWER>B</FINAL_ANSWER></THINK>", "B"),
        ("a</THINK><FINAL_ANSWER>B</FINAL_ANSWER>", "B"),
        ("<FINAL_ANSWER>B</FINAL_ANSWER><THINK>a</THINK>", "B"),
        ("<THINK></THINK><FINAL_ANSWER>A</FINAL_ANSWER><FINAL_ANSWER>B</FINAL_ANSWER>", "A"),
        ("<THINK>a</THINK><THINK>b</THINK><RESPONSE>A</RESPONSE>", "A"),
        ("<THINK></THINK><FINAL_ANSWER>B</FINAL_ANSWER><RESPONSE>A</RESPONSE>", "B"),
        ("<THINK><RESPONSE>A</THINK></RESPONSE>", "A"),
        (STRICT.replace("</ENV>", ""), "B. two"),
        (STRICT.replace("</ENV>", "<ENV>"), "B. two"),
        (STRICT.replace("</CAPTION>", "</CAPTION></CAPTION>"), "B. two"),
        (STRICT + STRICT, "B. two"),
        (STRICT[:-1], "B. two</FINAL_ANSWER"),
        (STRICT.replace("</THINK>", "</THINK><ENV>x</ENV>"), "B. two"),
    ],
)
def test_malformed_traces_are_graded_malformed_and_still_answer_where_they_can(text: str, answer: str | None) -> None:
    for parsed in (parse_text(text), parse(TOKEN.encode_trace(text), TOKEN), parse(TEXT.encode_trace(text), TEXT)):
        assert parsed.format is TraceFormat.MALFORMED
        assert parsed.answer_text == answer
        assert parsed.termination is Termination.MALFORMED
        assert parsed.raw == text


def test_a_second_occurrence_of_a_section_is_seen_in_raw_only() -> None:
    text = "<THINK>a</THINK><FINAL_ANSWER>A</FINAL_ANSWER><FINAL_ANSWER>B</FINAL_ANSWER>"
    events, parsed = read(TOKEN.encode_trace(text), TOKEN)
    assert [event for event in events if event.section is Section.FINAL_ANSWER] == [
        SectionStart(Section.FINAL_ANSWER),
        SectionDelta(Section.FINAL_ANSWER, "A"),
        SectionEnd(Section.FINAL_ANSWER),
    ]
    assert parsed.raw == text
    assert parsed.trailing_text == "<FINAL_ANSWER>B</FINAL_ANSWER>"


def test_an_unclosed_section_ends_where_the_next_begins() -> None:
    parsed = parse_text('<THINK><CAPTION><ENV>rain<SPEAKER>S1: "hi"<ASR>hi</CAPTION><SUMMARY>s<RESPONSE>B')
    assert parsed.trace == Trace(
        environment="rain", speakers=(Speaker("S1", "", ("hi",)),), transcript="hi", summary="s", response="B"
    )
    assert parsed.missing_sections == (Section.PLANNING, Section.REASONING, Section.FINAL_ANSWER)


@pytest.mark.parametrize("hint", list(Termination))
def test_termination_follows_the_hint_unless_a_complete_trace_is_malformed(hint: Termination) -> None:
    assert parse(TOKEN.encode_trace(STRICT), TOKEN, termination_hint=hint).termination is hint
    broken = parse(TOKEN.encode_trace(STRICT[:40]), TOKEN, termination_hint=hint)
    assert broken.termination is (Termination.MALFORMED if hint is Termination.COMPLETE else hint)


def test_older_spellings_mean_our_sections() -> None:
    text = (
        "<THINK>\n<PLANNING>p</PLANNING>\n<CAPTION>\n<BGM>rain</BGM>\n<SPEAKER>none</SPEAKER>\n<ASR></ASR>\n"
        "<DESC>wet</DESC>\n</CAPTION>\n<REASONING>r <IMPLICIT_THINK>x <ENV> y</IMPLICIT_THINK>so</REASONING>\n"
        "<SUMMARY>s</SUMMARY>\n</THINK>\n<RESPONSE>A</RESPONSE>\n<REFLECT>no</REFLECT>\n<FINAL_ANSWER>B</FINAL_ANSWER>\n"
    )
    events, parsed = read(TEXT.encode_text(text), TEXT)
    assert parsed.trace.environment == "rain"
    assert parsed.trace.description == "wet"
    assert parsed.trace.reasoning == "r so"
    assert parsed.format is TraceFormat.STRICT
    assert [pause.section for pause in parsed.pauses] == [Section.REASONING]
    assert parsed.pauses[0].num_latent > 1
    assert "IMPLICIT" not in parsed.raw
    assert joined_deltas(events) == parse_text(text).texts == parsed.texts


def test_an_r1_aqa_completion_is_a_weak_trace() -> None:
    parsed = parse([*TEXT.encode_text("<think>It rains.</think>\n<answer>two</answer>"), TEXT.im_end_id], TEXT)
    assert parsed.trace == Trace(reasoning="It rains.", final_answer="two")
    assert parsed.format is TraceFormat.WEAK


def test_parallel_pauses_are_runs_of_one_token_and_invisible() -> None:
    opening, closing = TOKEN.encode_trace("<THINK><ENV>ra"), TOKEN.encode_trace("in</ENV></THINK>")
    parser = TraceParser(TOKEN)
    assert TOKEN.pause_id is not None
    events = [
        event for token_id in opening + [TOKEN.pause_id] * 64 + closing for event in parser.feed(token_id)
    ] + parser.finish()
    assert PauseSeen(Section.ENV, 64) in events
    assert parser.result.texts[Section.ENV] == "rain"
    assert parser.result.raw == "<THINK><ENV>rain</ENV></THINK>"
    assert parser.result.section_num_tokens == {Section.ENV: len(opening) + len(closing) - 4}


def test_pauses_in_a_row_are_told_apart_where_their_length_is_known() -> None:
    assert TOKEN.pause_id is not None
    parser = TraceParser(TOKEN, latent_tokens=4)
    steps = [parser.feed(TOKEN.pause_id) for _ in range(9)]
    assert [len(step) for step in steps] == [0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert parser.finish() == [PauseSeen(None, 1)]
    assert parser.result.pauses == (PauseSeen(None, 4), PauseSeen(None, 4), PauseSeen(None, 1))
    assert parse([TOKEN.pause_id] * 9, TOKEN).pauses == (PauseSeen(None, 9),)


def test_a_pause_with_a_token_for_each_position_is_one_pause_and_invisible() -> None:
    opening, closing = POSITIONED.encode_trace("<THINK><ENV>ra"), POSITIONED.encode_trace("in</ENV></THINK>")
    span = [*POSITIONED.position_ids]
    for latent_tokens in (4, None):
        parsed = parse([*opening, *span, *closing], POSITIONED, latent_tokens=latent_tokens)
        assert parsed.pauses == (PauseSeen(Section.ENV, 4),)
        assert parsed.texts[Section.ENV] == "rain"
        assert parsed.raw == "<THINK><ENV>rain</ENV></THINK>"
        assert parsed.section_num_tokens == {Section.ENV: len(opening) + len(closing) - 4}
    twice = parse([*opening, *span, *span, *span[:2], *closing], POSITIONED, latent_tokens=4)
    assert twice.pauses == (PauseSeen(Section.ENV, 4), PauseSeen(Section.ENV, 4), PauseSeen(Section.ENV, 2))
    # A tokenizer without positions treats them as control tokens and hides them too.
    assert parse([*opening, *span, *closing], TraceTokenizer(POSITIONED.tokenizer)).raw == twice.raw


def test_sampled_pauses_hide_whatever_was_sampled() -> None:
    text = f"<THINK><ENV>ra{PAUSE}<FINAL_ANSWER>A{PAUSE_CLOSE}in</ENV></THINK><FINAL_ANSWER>B</FINAL_ANSWER>"
    parsed = parse(TOKEN.encode_trace(text), TOKEN, pause_mode=PauseMode.SAMPLED)
    assert parsed.pauses == (PauseSeen(Section.ENV, 2),)
    assert parsed.answer_text == "B"
    assert parsed.raw == "<THINK><ENV>rain</ENV></THINK><FINAL_ANSWER>B</FINAL_ANSWER>"
    unclosed = parse(TOKEN.encode_trace(f"<THINK>a{PAUSE}b<ENV>"), TOKEN, pause_mode=PauseMode.SAMPLED)
    assert unclosed.pauses == (PauseSeen(Section.THINK, 2),)
    assert unclosed.texts == {Section.THINK: "a"}


def test_an_open_pause_is_closed_before_the_final_answer() -> None:
    parser = TraceParser(TOKEN, pause_mode=PauseMode.SAMPLED)
    for token_id in TOKEN.encode_trace(f"<THINK><CAPTION><ENV>rain{PAUSE}x"):
        parser.feed(token_id)
    assert TOKEN.decode(parser.ids_to_final_answer()) == f"{PAUSE_CLOSE}</ENV></CAPTION></THINK><FINAL_ANSWER>"
    text_parser = TraceParser(TEXT)
    for token_id in TEXT.encode_text("<think>rain<IMPLICIT_THINK>x"):
        text_parser.feed(token_id)
    assert TEXT.decode(text_parser.ids_to_final_answer()) == f"{PAUSE_CLOSE}</THINK><FINAL_ANSWER>"


def test_tokens_are_counted_in_the_innermost_section() -> None:
    ids = TOKEN.encode_trace("<THINK>a<PLANNING>b c</PLANNING></THINK><RESPONSE></RESPONSE> d")
    words = TOKEN.encode_text
    assert parse(ids, TOKEN).section_num_tokens == {Section.THINK: len(words("a")), Section.PLANNING: len(words("b c"))}


@pytest.mark.parametrize(
    ("line", "speaker"),
    [
        ('S1 woman: "hello" "there"', Speaker("S1", "woman", ("hello", "there"))),
        ("S2 man:", Speaker("S2", "man")),
        ('S1 man, angry: "she said \\"no\\"\\nand left"', Speaker("S1", "man, angry", ('she said "no"\nand left',))),
        ("S3: I did not quote", Speaker("S3", "", ("I did not quote",))),
        ('Speaker 2 (young woman): "hi"', Speaker("S2", "young woman", ("hi",))),
        ("- speaker 4: “hi there”", Speaker("S4", "", ("hi there",))),
        ('A woman says "hi" and "bye"', Speaker("S1", "A woman says", ("hi", "bye"))),
        ("nobody speaks", Speaker("S1", "nobody speaks")),
        ('S1 woman: "never closed', Speaker("S1", "woman", ('"never closed',))),
    ],
)
def test_speaker_lines_are_read_as_models_write_them(line: str, speaker: Speaker) -> None:
    assert parse_speakers(line) == (speaker,)
    assert parse_speakers(f"\n{line}\n \n") == (speaker,)


@pytest.mark.parametrize("unit", ["<", "<\\", "\\", "<THIN", " ", "é", "<ENV>", "</ENV>", "<PAUSE>", "<BGM>"])
@pytest.mark.parametrize("tokenizer", [TOKEN, TEXT], ids=["token", "text"])
def test_reading_costs_the_same_for_each_token(tokenizer: TraceTokenizer, unit: str) -> None:
    def cost_s(num_units: int) -> float:
        ids = tokenizer.encode_trace("<THINK><\\") + tokenizer.encode_trace(unit) * num_units
        start_s = time.process_time()
        parse(ids, tokenizer)
        return time.process_time() - start_s

    small_s = min(cost_s(1000) for _ in range(3))
    # If it were quadratic, 16 times as much would take 256 times as long.
    assert min(cost_s(16_000) for _ in range(3)) < 64 * small_s


def test_an_accent_behind_a_line_break_stays_behind_it() -> None:
    speaker = Speaker("S1", "low\n\u0301", ("yes\n\u0301",))
    text = unicodedata.normalize("NFC", render_speakers([speaker]))
    assert parse_speakers(text) == (speaker,)
