"""Measure a checkpoint in training: word error on held-out speech, and reading of given perception.

A model between alignment and traces cannot answer through the engine yet, so these measures run it without an engine.
Transcripts are decoded greedily after a forced beginning of the trace. Choices are scored by the likelihood of their
words after a given perception. The projector alone is measured by the likeliest token at each state.

The sets are excluded from training:

- `human`: recorded clips.
- `voices`: lines of the test split by the flite test voices.
- `talk`: clips of held-out lines, with noise and channels.
- `reading_questions.json`: hand-written questions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.audio_encoder import LogMel
from hyper_model.trace import Section, Speaker, Trace, TraceTokenizer, build_prompt, render
from training.data.reading import Reader, is_held_out, wordings
from training.data.sources.downloads import TEXTS_FOLDER
from training.data.sources.open_text import draw_text
from training.data.sources.voices import list_voices, speak
from training.data.talk import TalkBuilder
from training.data.text_scenes import SceneWriter
from training.evaluation.statistics import Sums, figure
from training.evaluation.suites.human import human_items
from training.policy import HyperPolicy, branch, pack
from training.text_metrics import edit_distance, words

SetName = Literal["human", "voices", "talk"]
SETS: tuple[SetName, ...] = ("human", "voices", "talk")
Control = Literal["given", "blank", "swapped"]

_QUESTIONS_FILE = Path(__file__).with_name("reading_questions.json")
_QUESTION = "What is said?"
_FLITE_TEST_VOICES = ("slt", "rms")
_LINES_PER_VOICE = 30
_NUM_TALK = 40
_NUM_TEXTS = 500
_NUM_DRAWN = 80
_MIN_TOKENS, _TOKENS_PER_S = 10, 6
"""Limit of a transcript: fast speech has five tokens per second, and a decoder that repeats itself has no end."""
_SILENCE_S = 0.2


@dataclass(frozen=True)
class SpokenItem:
    """A clip and its words.

    Attributes:
        cluster: Name of the voice or of the clip, the resampling unit of an interval.
    """

    samples_S: np.ndarray  # noqa: N815  # the axis suffix
    transcript: str
    cluster: str


@dataclass(frozen=True)
class ReadingItem:
    """A question about a given perception.

    Attributes:
        scene: Index of the scene, for intervals and for the controls.
    """

    trace: Trace
    question: str
    choices: tuple[str, ...]
    answer: str
    scene: int


@dataclass(frozen=True)
class Figure:
    """A figure with its interval of 95 %.

    Attributes:
        num_items: Words of the references for word error, questions for reading.
    """

    value: float
    interval: tuple[float, float]
    num_items: int

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] of {self.num_items}"


def spoken_items(name: SetName, assets: Path) -> Iterator[SpokenItem]:
    """Yield the clips of a set.

    Args:
        assets: Folder of the fetched texts, recordings and voices.
    """
    if name == "human":
        for item in human_items():
            yield SpokenItem(item.load(), item.truth.transcript or "", item.voice)
    elif name == "voices":
        voices = [voice for voice in list_voices() if voice.argument in _FLITE_TEST_VOICES]
        silence_S = np.zeros(round(_SILENCE_S * SAMPLE_RATE_HZ), np.float32)
        for voice in voices:
            rng = random.Random(f"alignment/{voice.name}")
            for _ in range(_LINES_PER_VOICE):
                text = draw_text(rng, "test", assets / TEXTS_FOLDER)
                samples_S = np.concatenate([silence_S, speak(text, voice, assets, 1.0), silence_S])
                yield SpokenItem(samples_S, text, f"{voice.name}/{text}")
    else:
        # No fast synthesizer has validation voices, so only the lines are held out.
        builder = TalkBuilder(assets, "train", text_split="test")
        for seed in range(_NUM_TALK):
            scene, samples_S = builder.draw(seed)
            yield SpokenItem(samples_S, scene.transcript, str(seed))


def reading_items() -> list[ReadingItem]:
    """Read the hand-written questions, each with its choices in a fixed random order."""
    rng = random.Random(5)
    items: list[ReadingItem] = []
    for number, scene in enumerate(json.loads(_QUESTIONS_FILE.read_text(encoding="utf-8"))["scenes"]):
        turns = scene["turns"]
        people = {turn["speaker"]: turn["who"] for turn in turns}
        speakers = tuple(
            Speaker(name, who, tuple(turn["text"] for turn in turns if turn["speaker"] == name))
            for name, who in people.items()
        )
        transcript = ". ".join(turn["text"] for turn in turns)
        trace = Trace(environment=scene["environment"], speakers=speakers, transcript=transcript)
        for row in scene["questions"]:
            choices = [row["answer"], *row["wrong"]]
            rng.shuffle(choices)
            items.append(ReadingItem(trace, row["question"], tuple(choices), row["answer"], number))
    return items


def drawn_items(assets: Path, *, held_out: bool) -> list[ReadingItem]:
    """Draw questions with choices about new scenes, in the trained wordings or in those left out of training.

    Both parts ask the same kinds: those with wordings that are left out.
    """
    kinds = {kind for kind, texts in wordings(held_out=True).items() if kind != "frames" and is_held_out(texts[0])}
    rng = random.Random("alignment/reading")
    texts = [draw_text(rng, "test", assets / TEXTS_FOLDER) for _ in range(_NUM_TEXTS)]
    reader = Reader(SceneWriter(texts, frozenset()), held_out=held_out)
    found: list[ReadingItem] = []
    while len(found) < _NUM_DRAWN:
        example = reader.draw(rng)
        if example.choices and example.kind in kinds:
            trace = replace(example.trace, response=None, final_answer=None)
            found.append(ReadingItem(trace, example.question, example.choices, example.answer, len(found)))
    return found


def controlled(items: Sequence[ReadingItem], control: Control) -> list[ReadingItem]:
    """Return the same questions without perception, or with another scene's; a reader must then be near chance."""
    if control == "given":
        return list(items)
    if control == "blank":
        return [replace(item, trace=Trace(environment="quiet", transcript="")) for item in items]
    others = [
        next(other for other in (*items[i:], *items) if other.scene != item.scene) for i, item in enumerate(items)
    ]
    return [replace(item, trace=other.trace) for item, other in zip(items, others, strict=True)]


def word_error(items: Sequence[SpokenItem], found: Sequence[str]) -> Figure:
    """Return the word error rate of transcripts."""
    pairs = [(words(item.transcript), words(text)) for item, text in zip(items, found, strict=True)]
    values = np.array([[edit_distance(*pair), len(pair[0])] for pair in pairs], float)
    value, interval = figure(Sums(values, tuple(item.cluster for item in items)))
    return Figure(value, interval, round(values[:, 1].sum()))


def accuracy(items: Sequence[ReadingItem], chosen: Sequence[str]) -> Figure:
    """Return the share of right choices."""
    values = np.array([[choice == item.answer, 1] for item, choice in zip(items, chosen, strict=True)], float)
    value, interval = figure(Sums(values, tuple(str(item.scene) for item in items)))
    return Figure(value, interval, len(items))


class AlignmentProbe:
    """Runner of a policy on the items of this module.

    Args:
        core: The policy in eval mode, with or without adapters.
    """

    def __init__(self, core: HyperPolicy, tokenizer: TraceTokenizer) -> None:
        self.core, self.tokenizer = core, tokenizer
        self.log_mel = LogMel(core.model.audio_tower.config.num_mel_bins)

    @torch.inference_mode()
    def states(self, samples_S: np.ndarray) -> torch.Tensor:
        """Return the projector's input for a clip: [A, stack * D]."""
        return self.core.encode([self.log_mel(samples_S).to(self.core.dtype)])[0]

    @torch.inference_mode()
    def transcribe(self, samples_S: np.ndarray) -> str:
        """Decode the transcript of a clip greedily."""
        model: Any = self.core.model
        embed = self.core.get_input_embeddings()
        prompt = build_prompt(self.tokenizer, _QUESTION)
        begun = render(Trace(transcript="x")).split("x")[0]
        ids = [*prompt, *self.tokenizer.encode_trace(begun)]
        at = prompt.index(self.tokenizer.audio_id)
        projected_AH = model.multi_modal_projector(self.states(samples_S))
        embedded_TH: Any = embed(torch.tensor(ids))  # pyright: ignore[reportCallIssue]
        inputs_TH = torch.cat([embedded_TH[:at], projected_AH.to(embedded_TH.dtype), embedded_TH[at + 1 :]])
        stop = self.tokenizer.close_ids(Section.ASR)[0]
        written: list[int] = []
        cache = None
        limit = _MIN_TOKENS + round(_TOKENS_PER_S * len(samples_S) / SAMPLE_RATE_HZ)
        while len(written) < limit:
            output = model.language_model(inputs_embeds=inputs_TH[None], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            token_id = int(self.core.lm_head(output.last_hidden_state[0, -1]).argmax())
            if token_id == stop or token_id in self.tokenizer.stop_ids:
                break
            written.append(token_id)
            inputs_TH = embed(torch.tensor([token_id]))  # pyright: ignore[reportCallIssue]
        return self.tokenizer.decode(token_id for token_id in written if token_id not in self.tokenizer.special_ids)

    @torch.inference_mode()
    def choose(self, item: ReadingItem) -> str:
        """Return the choice with the likeliest words in RESPONSE, after the given perception."""
        prompt = build_prompt(self.tokenizer, item.question, item.choices)
        response = self.tokenizer.encode_trace(f"{render(item.trace)}{Section.RESPONSE.tags[0]}")
        closing = self.tokenizer.close_ids(Section.RESPONSE)
        written = [[*self.tokenizer.encode_text(choice), *closing] for choice in item.choices]
        row = branch(
            [*prompt, *response], [(ids, ids) for ids in written], prompt.index(self.tokenizer.audio_id), clip=0
        )
        width = self.core.model.multi_modal_projector.linear.in_features  # pyright: ignore[reportAttributeAccessIssue]
        dtype = self.core.lm_head.weight.dtype
        silence = torch.zeros(1, width, dtype=dtype)
        batch = pack([row], [silence], pad_id=self.tokenizer.end_of_text_id, is_encoded=True, stack=self.core.stack)
        logprobs = self.core(**batch).logprobs_N.split([len(ids) for ids in written])
        return item.choices[int(torch.stack([logprobs_of_choice.sum() for logprobs_of_choice in logprobs]).argmax())]


def spell(core: HyperPolicy, tokenizer: TraceTokenizer, probe: AlignmentProbe, file: Path) -> Any:
    """Return a function from samples to the text of the projector alone.

    Args:
        file: The file saved by `projector_ctc.teach_spelling`.
    """
    from training.sft.projector_ctc import load_speller

    speller = load_speller(core, load_file(file))
    return lambda samples_S: speller.transcribe_states(probe.states(samples_S).float(), tokenizer)
