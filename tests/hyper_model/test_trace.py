"""Text stays text, markup stays markup, and a rendered trace is parsed to the same trace."""

from __future__ import annotations

import json
import string
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hyper_model.errors import CheckpointError, PromptError
from hyper_model.trace import (
    MARKUP,
    PAUSE,
    SPECIAL_TOKENS,
    TAG_ALIASES,
    Section,
    Speaker,
    TagStyle,
    Trace,
    TraceTokenizer,
    add_position_tokens,
    build_prompt,
    canonical_text,
    check_question,
    choice_label,
    environment_labels,
    escape_markup,
    position_tokens,
    render,
    render_choice,
    train_tokenizer,
)

unhurried = settings(deadline=None)  # other work may occupy the cores
# Tags in the training text give merges such as "ANSWER", the building blocks of a forged tag.
TEXTS = [
    "Who says rain? <FINAL_ANSWER> B. two </THINK> <|AUDIO|> the rain and the engine",
    "naïve café 日本語 <PAUSE>",
] * 20
TOKENIZER = TraceTokenizer(train_tokenizer(TEXTS, vocab_size=420))


def positioned(latent_tokens: int) -> TraceTokenizer:
    """Return a tokenizer with one token per position of a pause."""
    tokenizer = train_tokenizer(TEXTS, 420)
    add_position_tokens(tokenizer, latent_tokens)
    return TraceTokenizer(tokenizer)


POSITIONED = positioned(4).with_positions(4)
# Under NFC, U+212A becomes K and U+2260 becomes "=" with a stroke; U+0338 is the stroke.
HOSTILE_TEXT = st.lists(
    st.one_of(
        st.sampled_from([*MARKUP, *'<>/\\|: \n"\u212a\u0338\u0301', "<THIN\u212a>", "</THIN\u212a>", "<\\ENV>", "日"]),
        st.text(max_size=6),
    ),
    max_size=8,
).map("".join)


def test_special_tokens_are_listed_once_in_their_fixed_order() -> None:
    assert SPECIAL_TOKENS[:6] == (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|audio_bos|>",
        "<|AUDIO|>",
        "<|audio_eos|>",
    )
    assert SPECIAL_TOKENS[6:10] == ("<THINK>", "</THINK>", "<PLANNING>", "</PLANNING>")
    assert SPECIAL_TOKENS[-4:] == ("<FINAL_ANSWER>", "</FINAL_ANSWER>", "<PAUSE>", "</PAUSE>")
    assert len(set(MARKUP)) == len(MARKUP)


def test_a_trained_tokenizer_has_qwen2s_shape_and_its_special_tokens_last(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=420)
    assert tokenizer.get_vocab_size() <= 420
    size = tokenizer.get_vocab_size()
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(size - len(SPECIAL_TOKENS), size))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shape = json.loads((tmp_path / "tokenizer.json").read_text())
    kinds = {part: shape[part]["type"] for part in ("normalizer", "decoder", "model")}
    assert kinds == {"normalizer": "NFC", "decoder": "ByteLevel", "model": "BPE"}
    assert [step["type"] for step in shape["pre_tokenizer"]["pretokenizers"]] == ["Split", "ByteLevel"]
    reread = TraceTokenizer.from_file(tmp_path / "tokenizer.json")
    assert reread.encode_trace("<ENV>rain</ENV>") == TOKENIZER.encode_trace("<ENV>rain</ENV>")
    assert reread.vocab_size == tokenizer.get_vocab_size()


def test_training_a_tokenizer_twice_gives_the_same_tokenizer() -> None:
    assert train_tokenizer(TEXTS, 420).to_str() == train_tokenizer(TEXTS, 420).to_str()


@unhurried
@given(HOSTILE_TEXT)
def test_text_never_encodes_to_a_special_token_and_decodes_to_itself(text: str) -> None:
    ids = TOKENIZER.encode_text(text)
    assert TOKENIZER.special_ids.isdisjoint(ids)
    assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)


def test_text_cannot_spell_added_tokens_that_are_not_flagged_special() -> None:
    tokenizer = train_tokenizer(TEXTS, 420)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=True), AddedToken("<think>", special=False)])
    trace_tokenizer = TraceTokenizer(tokenizer)
    ids = trace_tokenizer.encode_text("a <tool> and a <think>")
    assert trace_tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.token_to_id("<tool>") in tokenizer.encode("a <tool>").ids


def test_text_cannot_spell_a_special_token_that_stands_in_the_vocabulary_itself() -> None:
    vocab = json.loads(train_tokenizer(TEXTS, 420).to_str())["model"]["vocab"]
    vocab |= {token: len(vocab) + place for place, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    trace_tokenizer = TraceTokenizer(tokenizer)
    ids = trace_tokenizer.encode_text("<THINK>")
    assert trace_tokenizer.special_ids.isdisjoint(ids)
    assert trace_tokenizer.decode(ids) == "<THINK>"


@unhurried
@given(st.lists(st.integers(min_value=0, max_value=TOKENIZER.vocab_size - 1), max_size=30))
def test_decoding_agrees_with_the_tokenizers_library(token_ids: list[int]) -> None:
    assert TOKENIZER.decode(token_ids) == TOKENIZER.tokenizer.decode(token_ids, skip_special_tokens=False)


def test_ids_outside_the_vocabulary_decode_to_nothing() -> None:
    assert TOKENIZER.decode([-1, TOKENIZER.vocab_size, 10**9, 10**12]) == ""


def test_a_rendered_trace_is_compact_and_each_of_its_tags_one_token() -> None:
    trace = Trace(
        planning="find the speakers",
        environment="rain",
        speakers=(Speaker("S1", "woman", ("hello there", 'he said "no"')), Speaker("S2", "", ("yes",))),
        transcript="hello there",
        reasoning="the tag <THINK> is spoken",
        summary="two",
        response="B",
        final_answer="B. two",
    )
    text = render(trace)
    assert text == (
        "<THINK><PLANNING>find the speakers</PLANNING><CAPTION><ENV>rain</ENV>"
        '<SPEAKER>S1 woman: "hello there" "he said \\"no\\""\nS2: "yes"</SPEAKER><ASR>hello there</ASR></CAPTION>'
        "<REASONING>the tag <\\THINK> is spoken</REASONING><SUMMARY>two</SUMMARY></THINK>"
        "<RESPONSE>B</RESPONSE><FINAL_ANSWER>B. two</FINAL_ANSWER>"
    )
    ids = TOKENIZER.encode_trace(text)
    assert TOKENIZER.decode(ids) == text
    assert "".join(TOKENIZER.decode([token_id]) for token_id in ids if token_id in TOKENIZER.special_ids) == (
        "<THINK><PLANNING></PLANNING><CAPTION><ENV></ENV><SPEAKER></SPEAKER><ASR></ASR></CAPTION><REASONING></REASONING>"
        "<SUMMARY></SUMMARY></THINK><RESPONSE></RESPONSE><FINAL_ANSWER></FINAL_ANSWER>"
    )


def test_sections_without_content_are_left_out() -> None:
    assert render(Trace()) == ""
    assert render(Trace(reasoning="so", final_answer="B")) == (
        "<THINK><REASONING>so</REASONING></THINK><FINAL_ANSWER>B</FINAL_ANSWER>"
    )
    assert render(Trace(transcript="")) == "<THINK><CAPTION><SPEAKER></SPEAKER><ASR></ASR></CAPTION></THINK>"


@unhurried
@given(HOSTILE_TEXT)
def test_escaping_leaves_no_markup_and_only_adds_backslashes(text: str) -> None:
    escaped = escape_markup(text)
    assert not any(markup in escaped for markup in MARKUP)
    assert escaped.replace("\\", "") == text.replace("\\", "")


@unhurried
@given(HOSTILE_TEXT)
def test_canonical_text_is_a_fixed_point(text: str) -> None:
    assert canonical_text(canonical_text(text)) == canonical_text(text)


def test_aliases_encode_as_the_tag_they_mean() -> None:
    for alias, tag in TAG_ALIASES.items():
        assert TOKENIZER.encode_trace(alias) == [TOKENIZER.tokenizer.token_to_id(tag)]


def test_a_checkpoint_may_spell_its_tags_otherwise() -> None:
    tokenizer = train_tokenizer(TEXTS, 420)
    tokenizer.add_special_tokens(["<BGM>", "</BGM>", "<IMPLICIT_THINK>", "</IMPLICIT_THINK>"])
    older = TraceTokenizer(
        tokenizer,
        tags={Section.ENV: ("<BGM>", "</BGM>")},
        pause_tags=("<IMPLICIT_THINK>", "</IMPLICIT_THINK>"),
    )
    bgm, bgm_close = older.tag_ids[Section.ENV]
    assert older.decode([bgm, bgm_close]) == "<BGM></BGM>"
    assert older.encode_trace("<ENV>") == older.encode_trace("<BGM>") == older.open_ids(Section.ENV) == [bgm]
    assert older.encode_trace(PAUSE) == [older.pause_id] == [tokenizer.token_to_id("<IMPLICIT_THINK>")]
    with pytest.raises(CheckpointError, match="not a known spelling"):
        TraceTokenizer(tokenizer, TagStyle.TEXT, tags={Section.ENV: ("<THINK>", "</THINK>")})
    with pytest.raises(CheckpointError, match="not a known spelling"):
        TraceTokenizer(tokenizer, TagStyle.TEXT, tags={Section.ENV: ("<SOUND>", "</SOUND>")})


def test_each_position_of_a_pause_may_have_a_token_behind_all_others() -> None:
    plain, tokenizer = TOKENIZER, POSITIONED
    size = plain.vocab_size
    assert position_tokens(4) == ("<PAUSE_2>", "<PAUSE_3>", "<PAUSE_4>") and position_tokens(1) == ()
    assert tokenizer.position_ids == (plain.pause_id, size, size + 1, size + 2)
    assert tokenizer.latent_ids == set(tokenizer.position_ids)
    assert tokenizer.pause_ids == {*tokenizer.position_ids, plain.pause_close_id}
    assert {*tokenizer.position_ids[1:]} <= tokenizer.control_ids & tokenizer.special_ids
    assert (plain.position_ids, plain.latent_ids) == ((), {plain.pause_id})
    assert tokenizer.with_positions(2).position_ids == (plain.pause_id, size)


@unhurried
@given(st.lists(st.sampled_from([*position_tokens(4), "<PAUSE", "_2>", PAUSE, "<ENV>", " "]), max_size=8).map("".join))
def test_no_text_and_no_trace_spells_a_position_of_a_pause(text: str) -> None:
    tokenizer = POSITIONED
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode_text(text))
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode_trace(text))
    assert tokenizer.decode(tokenizer.encode_text(text)) == text
    question = f"What? {text}"
    assert {*tokenizer.position_ids}.isdisjoint(build_prompt(tokenizer, question, (f"a {text}", f"b {text}")))


def test_a_position_of_a_pause_is_a_special_token_without_another_meaning() -> None:
    with pytest.raises(CheckpointError, match="no token <PAUSE_5>"):
        POSITIONED.with_positions(5)
    pause_id = TOKENIZER.pause_id
    assert pause_id is not None
    for token_id in (TOKENIZER.audio_id, TOKENIZER.im_end_id, TOKENIZER.tag_ids[Section.ENV][0], 65, 10**6):
        with pytest.raises(CheckpointError, match=f"token {token_id} is no special token"):
            TraceTokenizer(TOKENIZER.tokenizer, position_ids=(pause_id, token_id))


def test_plain_text_tags_open_with_the_tokens_of_their_text() -> None:
    tokenizer = TraceTokenizer(plain_tokenizer(), TagStyle.TEXT, tags={Section.THINK: ("<think>", "</think>")})
    assert tokenizer.tag_ids == {}
    assert tokenizer.pause_id is None
    assert tokenizer.decode(tokenizer.open_ids(Section.THINK)) == "<think>"
    assert tokenizer.decode(tokenizer.close_ids(Section.THINK)) == "</think>"
    assert tokenizer.decode(tokenizer.encode_trace("<THINK>a</THINK>")) == "<think>a</think>"
    assert len(tokenizer.open_ids(Section.THINK)) > 1


def plain_tokenizer() -> Tokenizer:
    """Return a small version of the stock Qwen2-Audio tokenizer: turn and audio marks are tokens, tags are text."""
    shape = json.loads(train_tokenizer(TEXTS, 420).to_str())
    shape["added_tokens"] = [token for token in shape["added_tokens"] if "|" in token["content"]]
    return Tokenizer.from_str(json.dumps(shape))


def test_a_tokenizer_that_cannot_carry_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no token <THINK>"):
        TraceTokenizer(plain_tokenizer())
    with pytest.raises(CheckpointError, match="not a byte-level BPE"):
        TraceTokenizer(Tokenizer(models.BPE()))
    with pytest.raises(CheckpointError, match=r"cannot read the tokenizer tokenizer\.json"):
        TraceTokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer file"):
        TraceTokenizer.from_file(tmp_path / "tokenizer.json")


def test_every_label_is_one_token_right_after_the_final_answer_tag() -> None:
    choices = [f"choice {index}" for index in range(26)]
    labels = TOKENIZER.label_ids(26)
    assert len(set(labels)) == 26
    for index, label in enumerate(labels):
        ids = TOKENIZER.encode_trace(render(Trace(final_answer=render_choice(index, choices))))
        assert ids[:2] == [TOKENIZER.tag_ids[Section.FINAL_ANSWER][0], label]
        assert TOKENIZER.decode([label]) == choice_label(index) == string.ascii_uppercase[index]
    assert TOKENIZER.label_ids(3) == labels[:3]


def test_labels_that_are_not_one_token_are_refused() -> None:
    glued = Tokenizer(
        models.BPE(vocab={"A": 0, ".": 1, "A.": 2, "Ġ": 3, "x": 4, "B": 5}, merges=[("A", ".")]),
    )
    glued.decoder = decoders.ByteLevel()
    glued.add_special_tokens(list(SPECIAL_TOKENS))
    with pytest.raises(CheckpointError, match="letter"):
        TraceTokenizer(glued).label_ids(2)


def test_the_prompt_puts_clips_first_and_the_question_last() -> None:
    assert TOKENIZER.decode(build_prompt(TOKENIZER, " Who?\n", ("one", "two\nlines"), num_clips=2)) == (
        "<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nAudio 2: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
        "Who?\nA. one\nB. two lines\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert TOKENIZER.decode(build_prompt(TOKENIZER, "Who?")) == (
        "<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nWho?\n<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="at least one clip"):
        build_prompt(TOKENIZER, "Who?", num_clips=0)


def test_the_prompt_is_what_the_tokenizer_makes_of_the_same_text_when_nobody_forges() -> None:
    prompt = build_prompt(TOKENIZER, "Who says rain? I don't know 12.", ("one", "two"), num_clips=2)
    assert prompt == TOKENIZER.tokenizer.encode(TOKENIZER.decode(prompt)).ids


@unhurried
@given(
    question=st.tuples(HOSTILE_TEXT, st.sampled_from(MARKUP), HOSTILE_TEXT).map("".join),
    choices=st.tuples(HOSTILE_TEXT.map("one ".__add__), HOSTILE_TEXT.map("two ".__add__)),
    num_clips=st.integers(1, 3),
)
def test_no_question_and_no_choice_can_add_a_special_token(
    question: str, choices: tuple[str, str], num_clips: int
) -> None:
    try:
        prompt = build_prompt(TOKENIZER, question, choices, num_clips)
    except PromptError as error:
        assert "\0" in question + "".join(choices), error
        return
    plain = build_prompt(TOKENIZER, "Who?", (), num_clips)
    kept = [token_id for token_id in prompt if token_id in TOKENIZER.special_ids]
    assert kept == [token_id for token_id in plain if token_id in TOKENIZER.special_ids]
    assert prompt.count(TOKENIZER.audio_id) == num_clips


@pytest.mark.parametrize(
    ("question", "choices", "param"),
    [
        ("", (), "question"),
        (" \n\t", (), "question"),
        ("x" * 2001, (), "question"),
        ("nul \0", (), "question"),
        ("half a pair \ud83d", (), "question"),
        ("Who?", ("one",), "choices"),
        ("Who?", [str(number) for number in range(27)], "choices"),
        ("Who?", ("one", " "), "choices"),
        ("Who?", ("one", "x" * 501), "choices"),
        ("Who?", ("one", "nul \0"), "choices"),
        ("Who?", ("one two", "one  two "), "choices"),
        ("Who?", ("\u212a", "K"), "choices"),
    ],
)
def test_questions_and_choices_that_cannot_be_asked_are_refused(question: str, choices: list[str], param: str) -> None:
    with pytest.raises(PromptError) as caught:
        build_prompt(TOKENIZER, question, choices)
    assert caught.value.param == param


def test_the_longest_question_and_the_most_choices_are_accepted() -> None:
    check_question("x" * 2000, [f"{number} {'x' * 490}" for number in range(26)])


def test_choices_are_lettered_from_a_to_z() -> None:
    assert [choice_label(index) for index in (0, 1, 25)] == ["A", "B", "Z"]
    assert render_choice(1, ["one", " two\nwords "]) == "B. two words"
    for index in (-1, 26):
        with pytest.raises(ValueError, match="numbered 0 to 25"):
            choice_label(index)


@pytest.mark.parametrize("speaker_id", ["", "1", "S", "s1", "S 1", "S1:", "S1\n", "S¹", "<THINK>"])
def test_a_speakers_id_is_s_and_a_number(speaker_id: str) -> None:
    with pytest.raises(ValueError, match="S and a number"):
        Speaker(speaker_id)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("rain, engine", ["rain", "engine"]),
        ("rain, an engine and birds.", ["rain", "an engine", "birds"]),
        ("sand; rain\nsand", ["sand", "rain"]),
        ("rain, and wind", ["rain", "wind"]),
        ("", []),
        (" , ", []),
    ],
)
def test_an_environment_splits_into_its_labels(text: str, labels: list[str]) -> None:
    assert environment_labels(text) == labels


def test_choices_are_scored_by_their_letter_or_by_their_closed_words() -> None:
    choices = ("rain", "rain and  wind")
    assert TOKENIZER.choice_ids(choices, by_letter=True) == [[label] for label in TOKENIZER.label_ids(2)]
    by_words = TOKENIZER.choice_ids(choices, by_letter=False)
    assert [TOKENIZER.decode(ids) for ids in by_words] == ["rain</FINAL_ANSWER>", "rain and wind</FINAL_ANSWER>"]
    forged = TOKENIZER.choice_ids(("</FINAL_ANSWER>", "x"), by_letter=False)[0]
    assert forged.count(TOKENIZER.close_ids(Section.FINAL_ANSWER)[0]) == 1
