"""Stage I: its inputs, its learning, and exact resumption of an interrupted run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from hyper_model.audio_encoder import LogMel
from hyper_model.checkpoint import open_checkpoint
from hyper_model.errors import CheckpointError, HyperError
from hyper_model.manifest import GATED_SECTIONS
from hyper_model.trace import (
    PauseMode,
    Section,
    Termination,
    Trace,
    TraceTokenizer,
    add_position_tokens,
    build_prompt,
    render,
    train_tokenizer,
)
from hyper_model.trace_parser import TraceFormat, parse, parse_text
from tests.process import ROOT
from tests.training_data import TinyRun, tiny_run, write_clips
from training.data.encoder import HOP, ClipEncoder, num_audio_tokens
from training.data.examples import read_examples
from training.data.questions import draw_example
from training.data.sources.downloads import ENCODER_FILE, MissingDataError
from training.export import model_from_scratch, model_of_checkpoint
from training.policy import IGNORED, named_tensors
from training.recipes import RecipeError, SftRecipe, TraceStyle, debug, with_settings
from training.run_report import write_report
from training.sft.tokens import Spans, canonical_completion, encode_sequence, in_style
from training.sft.trainer import ClipSequences, ExampleSequences, read_clips
from training.trainer import (
    MasterAdamW,
    TrainingError,
    last_checkpoint,
    leave_run_dir,
    prepare_run_dir,
    read_log,
    read_recipe,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work folder with twelve scenes of random states of the right length, in the clips' own format."""
    return write_clips(tmp_path_factory.mktemp("work"))


@pytest.fixture
def start(work: Path) -> Callable[..., TinyRun]:
    """Start or resume a run of the debug recipe."""

    def begin(run_dir: Path, *, is_resumed: bool = False, **changes: Any) -> TinyRun:
        return tiny_run(dataclasses.replace(debug(), **changes), work, run_dir, is_resumed=is_resumed)

    return begin


POSITIONED = dataclasses.replace(debug().decoder, has_position_tokens=True)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("has_positions", [False, True], ids=["copies", "positions"])
def test_loss_falls_on_the_trace_alone_and_never_on_a_latent_token(
    work: Path, start: Callable[..., TinyRun], tmp_path: Path, has_positions: bool
) -> None:
    changes = {"decoder": POSITIONED} if has_positions else {}
    tokenizer = start(tmp_path / "run", **changes).trainer.run_model.tokenizer
    assert tokenizer.pause_id is not None
    span = list(tokenizer.position_ids) if has_positions else [tokenizer.pause_id] * 4
    assert len(span) == 4 and len(set(span)) == (4 if has_positions else 1)
    num_spans = 0
    for number, clip in enumerate(read_clips(work / "clips/train")):
        example = draw_example(clip.scene, random.Random(number))
        encoded = encode_sequence(
            tokenizer,
            example.question,
            example.choices,
            render(example.trace),
            spans=Spans(1.0, 4),
            rng=random.Random(number),
        )
        prompt = build_prompt(tokenizer, example.question, example.choices)
        assert encoded.token_ids[: len(prompt)] == prompt
        assert set(encoded.targets[: len(prompt) - 1]) == {IGNORED}
        targets = [target for target in encoded.targets if target != IGNORED]
        assert tokenizer.latent_ids.isdisjoint(targets)
        assert targets == [t for t in encoded.token_ids[len(prompt) :] if t not in tokenizer.latent_ids]
        latent = [t for t in encoded.token_ids if t in tokenizer.latent_ids]
        assert len(latent) % 4 == 0 and 4 <= len(latent) <= 12
        assert latent == span * (len(latent) // 4)
        num_spans += len(latent) // 4
        assert _sections_of_spans(tokenizer, encoded.token_ids[len(prompt) :]) <= {s.value for s in GATED_SECTIONS}
    assert num_spans > 12


def _sections_of_spans(tokenizer: TraceTokenizer, token_ids: list[int]) -> set[str]:
    opening = {ids[0]: section.value for section, ids in tokenizer.tag_ids.items()}
    closing = {ids[1] for ids in tokenizer.tag_ids.values()}
    held, found = list[str](), set[str]()
    for token_id in token_ids:
        if token_id in opening:
            held.append(opening[token_id])
        elif token_id in closing:
            held.pop()
        elif token_id in tokenizer.latent_ids:
            found.add(held[-1] if held else "outside")
    return found


def test_a_sampled_span_is_between_its_tags_and_none_of_it_is_a_target(
    work: Path, start: Callable[..., TinyRun], tmp_path: Path
) -> None:
    tokenizer = start(tmp_path / "run").trainer.run_model.tokenizer
    example = draw_example(read_clips(work / "clips/train")[0].scene, random.Random(0))
    text = render(example.trace)
    spans = Spans(1.0, 4, PauseMode.SAMPLED)
    encoded = encode_sequence(tokenizer, example.question, example.choices, text, spans=spans, rng=random.Random(1))
    prompt = build_prompt(tokenizer, example.question, example.choices)
    asked = set(prompt)
    targets = [target for target in encoded.targets if target != IGNORED]
    assert targets == [*tokenizer.encode_trace(text), tokenizer.im_end_id]
    opened = [place for place, token in enumerate(encoded.token_ids) if token == tokenizer.pause_id]
    assert 1 <= len(opened) <= 3 and encoded.token_ids.count(tokenizer.pause_close_id) == len(opened)
    for place in opened:
        assert encoded.token_ids[place + 5] == tokenizer.pause_close_id
        assert set(encoded.token_ids[place + 1 : place + 5]) <= asked - tokenizer.special_ids
        # The token before a span has no target; the closing tag predicts the next token.
        assert set(encoded.targets[place - 1 : place + 5]) == {IGNORED}
        assert encoded.targets[place + 5] == encoded.token_ids[place + 6]
    parsed = parse(encoded.token_ids[len(prompt) :], tokenizer, pause_mode=PauseMode.SAMPLED)
    assert parsed.trace == example.trace and [pause.num_latent for pause in parsed.pauses] == [4] * len(opened)


def test_misheard_words_stand_in_what_is_read_and_never_in_what_is_to_be_written(
    work: Path, start: Callable[..., TinyRun], tmp_path: Path
) -> None:
    tokenizer = start(tmp_path / "run").trainer.run_model.tokenizer
    num_wrong = num_said = 0
    for number, clip in enumerate(read_clips(work / "clips/train")):
        example = draw_example(clip.scene, random.Random(number))
        asked = (tokenizer, example.question, example.choices, render(example.trace))
        right, wrong = (
            encode_sequence(*asked, spans=Spans(0.0, 4), rng=random.Random(number), wrong_words=share)
            for share in (0.0, 0.3)
        )
        assert wrong.targets == right.targets
        changed = [
            place for place, pair in enumerate(zip(right.token_ids, wrong.token_ids, strict=True)) if len({*pair}) > 1
        ]
        opening = {ids[0] for ids in tokenizer.tag_ids.values()}
        heard = (Section.SPEAKER, Section.ASR)
        for place in changed:
            last = max(at for at in range(place) if right.token_ids[at] in opening)
            assert right.token_ids[last] in {tokenizer.tag_ids[section][0] for section in heard}
            assert right.token_ids[place] not in tokenizer.special_ids
            assert wrong.token_ids[place] not in tokenizer.special_ids
        num_wrong += len(changed)
        num_said += sum(len(tokenizer.encode_text(parse_text(asked[3]).texts[section])) for section in heard)
    assert 0.15 < num_wrong / num_said < 0.35


@pytest.mark.parametrize("style", ["explicit", "short", "direct"])
def test_a_style_keeps_its_part_of_the_trace_and_every_style_can_be_read(style: TraceStyle, work: Path) -> None:
    for number, clip in enumerate(read_clips(work / "clips/train")):
        whole = draw_example(clip.scene, random.Random(number)).trace
        read = parse_text(in_style(whole, style))
        assert read.format is (TraceFormat.STRICT if style == "explicit" else TraceFormat.WEAK)
        assert read.trace.final_answer == whole.final_answer and read.termination is Termination.COMPLETE
        if style == "explicit":
            assert read.trace == whole
        elif style == "short":
            assert set(read.texts) - {Section.REFLECT} == {
                *(Section.THINK, Section.PLANNING, Section.REASONING, Section.SUMMARY),
                *(Section.RESPONSE, Section.FINAL_ANSWER),
            }
            assert read.trace == dataclasses.replace(whole, environment=None, speakers=(), transcript=None)
        else:
            assert read.trace == Trace(response=whole.final_answer, final_answer=whole.final_answer)


def test_styles_of_a_data_sets_completion() -> None:
    text = "<think>It is a cow.</think><answer>cow</answer>"
    assert canonical_completion(text, "a cow", "direct") == "<THINK></THINK><FINAL_ANSWER>a cow</FINAL_ANSWER>"
    assert canonical_completion(text, "a cow", "short") == canonical_completion(text, "a cow")


def test_clips_are_drawn_in_the_recipes_style(work: Path, start: Callable[..., TinyRun], tmp_path: Path) -> None:
    clips = read_clips(work / "clips/train")
    tokenizer = start(tmp_path / "run").trainer.run_model.tokenizer
    # Cut after a transcript, if there is one; direct traces have none.
    recipe = dataclasses.replace(debug(), trace_style="direct", cut_share=(1.0, 1.0), pause_share=1.0)
    sequences = ClipSequences(clips[:6], clips[6:], tokenizer, recipe)
    for key in range(len(clips)):
        encoded, _ = sequences.draw(key, 0, random.Random(key))
        written = [target for target in encoded.targets if target != IGNORED]
        assert written[:2] == list(tokenizer.tag_ids[Section.THINK]) and written[-1] == tokenizer.im_end_id
        assert tokenizer.pause_id not in encoded.token_ids, "it has no section that may pause"


def test_the_unpadded_encoder_equals_transformers_padded_pass() -> None:
    torch.manual_seed(0)
    config = Qwen2AudioEncoderConfig(
        num_mel_bins=80, d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128
    )
    tower = Qwen2AudioEncoder(config).eval()
    encode = ClipEncoder(tower)
    for seconds in (0.1, 0.333, 2.0, 7.7):
        samples_S = torch.randn(int(seconds * 16_000)).mul(0.1).numpy()
        padded = WhisperFeatureExtractor(feature_size=80)(
            samples_S, sampling_rate=16_000, padding="max_length", return_attention_mask=True, return_tensors="pt"
        )
        num_states = (len(samples_S) // HOP - 1) // 2 + 1
        mask = torch.zeros(1, 1, 1_500, 1_500)
        mask[..., num_states:] = float("-inf")
        with torch.inference_mode():
            expected = tower(padded["input_features"], attention_mask=mask).last_hidden_state[0]
        states_AD = encode(samples_S)
        assert len(states_AD) == num_audio_tokens(len(samples_S))
        torch.testing.assert_close(states_AD, expected[: len(states_AD)], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "read_size"), [("bfloat16", 0), ("float32", 3)])
def test_training_resumes_bit_for_bit(
    start: Callable[..., TinyRun], tmp_path: Path, dtype: str, read_size: int
) -> None:
    whole = start(tmp_path / "whole", dtype=dtype, read_size=read_size)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    # As if the machine had crashed while the second checkpoint was written.
    (tmp_path / "broken/checkpoint-6/complete").unlink()
    broken = start(tmp_path / "broken", is_resumed=True, dtype=dtype, read_size=read_size)
    assert broken.checkpoint is not None and broken.checkpoint.name == "checkpoint-3"
    broken.train()
    for (name, one), other in zip(whole.state().items(), broken.state().values(), strict=True):
        assert torch.equal(one, other), name
    rows = [[(row["step"], row["loss"]) for row in read_log(run)] for run in (tmp_path / "whole", tmp_path / "broken")]
    assert rows[0] == rows[1] and [step for step, _ in rows[0]] == [1, 2, 3, 4, 5, 6]


def test_how_a_batch_is_cut_for_the_memory_changes_nothing(start: Callable[..., TinyRun], tmp_path: Path) -> None:
    losses = []
    for rows_at_once in (4, 1):
        name = tmp_path / str(rows_at_once)
        start(name, rows_at_once=rows_at_once, batch_size=4, dtype="float32", num_steps=3).train()
        losses.append([(row["loss"], row["grad_norm"]) for row in read_log(name)])
    assert losses[0] == [pytest.approx(pair, rel=1e-4) for pair in losses[1]]


def test_the_loss_falls_when_a_batch_is_repeated(start: Callable[..., TinyRun], tmp_path: Path) -> None:
    run = start(tmp_path / "run", num_steps=30, learning_rate=3e-3, save_every_steps=1000)
    batch = run.trainer.make_step(0)
    run.trainer.make_step = lambda step: batch
    run.trainer.train_dataset.make = run.trainer.make_step
    run.train()
    losses = [row["loss"] for row in read_log(tmp_path / "run")]
    assert losses[-1] < 0.6 * losses[0]


def test_a_run_is_reported_with_its_curves(start: Callable[..., TinyRun], tmp_path: Path) -> None:
    start(tmp_path / "run", num_steps=4).train()
    page = write_report(tmp_path / "run", outcome="Ended at step 4 of 4.").read_text()
    assert "Ended at step 4" in page and "| loss |" in page and '"name": "debug"' in page
    assert (tmp_path / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run/tensorboard").rglob("events*"))


def test_an_exported_run_opens_as_a_checkpoint(start: Callable[..., TinyRun], tmp_path: Path) -> None:
    run = start(tmp_path / "run", num_steps=2)
    run.train()
    run.trainer.run_model.export(tmp_path / "out", recipe=run.trainer.recipe, num_steps=2, dtype=torch.bfloat16)
    manifest = open_checkpoint(tmp_path / "out").manifest
    assert manifest.recipe is not None and json.loads(manifest.recipe)["trained_steps"] == 2


def test_a_run_with_a_token_for_each_position_exports_a_checkpoint_that_names_them(
    start: Callable[..., TinyRun], tmp_path: Path
) -> None:
    run = start(tmp_path / "run", num_steps=2, decoder=POSITIONED)
    before = run.trainer.run_model.core.get_input_embeddings().weight.detach().float().clone()
    run.train()
    made = run.trainer.run_model.export(tmp_path / "out", recipe=run.trainer.recipe, num_steps=2, dtype=torch.float32)
    opened = open_checkpoint(made.path)
    ids = opened.manifest.pause.position_ids
    assert ids is not None and len(set(ids)) == 4
    assert ids == opened.tokenizer.position_ids == run.trainer.run_model.tokenizer.position_ids
    after = named_tensors(run.trainer.run_model.policy)
    (embedding,) = (tensor.float() for name, tensor in after if name.endswith("embed_tokens.weight"))
    moved = [embedding[each] - before[each] for each in ids]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(moved, 2)), "each learns by itself"
    # Further training keeps them; the tokens of a plain run stay those of a plain run.
    again = model_of_checkpoint(made.path, dtype=torch.float32)
    assert again.tokenizer.position_ids == ids
    second = again.export(tmp_path / "again", recipe=debug(), num_steps=0, dtype=None)
    assert second.manifest.pause.position_ids == ids
    assert start(tmp_path / "plain").trainer.run_model.tokenizer.vocab_size == opened.tokenizer.vocab_size - 3


def test_positions_of_a_base_without_them_begin_as_its_pause_token(
    work: Path, start: Callable[..., TinyRun], tmp_path: Path
) -> None:
    run = start(tmp_path / "run").trainer.run_model
    base = run.export(tmp_path / "base", recipe=debug(), num_steps=0, dtype=torch.float32)
    file = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(base.path / "tokenizer.json"))
    add_position_tokens(tokenizer, 4)
    tokenizer.save(str(file))
    encoder = work / "assets" / ENCODER_FILE
    made = model_from_scratch(POSITIONED, file, encoder, dtype=torch.float32, base=base.path)
    before, after = ({name: t.float() for name, t in named_tensors(each.policy)} for each in (run, made))
    (name,) = (name for name in before if name.endswith("embed_tokens.weight"))
    pause_id, *others = made.tokenizer.position_ids
    assert len(others) == 3
    assert all(torch.equal(after[name][each], before[name][pause_id]) for each in (pause_id, *others))
    assert torch.equal(after[name][: len(before[name])], before[name])
    # A model with them is used unchanged.
    with torch.no_grad():
        made.core.get_input_embeddings().weight[others[0]] += 1.0  # pyright: ignore
    trained = made.export(tmp_path / "trained", recipe=debug(), num_steps=0, dtype=torch.float32)
    again = model_from_scratch(POSITIONED, file, encoder, dtype=torch.float32, base=trained.path)
    assert torch.equal(dict(named_tensors(again.policy))[name], dict(named_tensors(made.policy))[name])
    with pytest.raises(CheckpointError, match="no token <PAUSE_2>"):
        model_from_scratch(POSITIONED, base.path / "tokenizer.json", encoder, dtype=torch.float32)


def test_the_decoder_of_a_recipe_is_changed_setting_by_setting() -> None:
    changed = with_settings(debug(), ('decoder={"has_position_tokens": true}',))
    assert changed == dataclasses.replace(debug(), decoder=POSITIONED)
    with pytest.raises(RecipeError, match="has_positions"):
        with_settings(debug(), ('decoder={"has_positions": true}',))


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(work: Path, tmp_path: Path) -> None:
    """A limit on file sizes fails like a full disk, in torch and in safetensors."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "hyper_model.cli", "train", "debug", str(run_dir), "--work", str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    (run_dir / "checkpoint-6/complete").unlink()
    # The optimizer's file is the last and largest and exceeds the limit; the model's does not.
    limit = (run_dir / "checkpoint-3/optimizer.pt").stat().st_size - 10_000
    done = subprocess.run(
        [*command, "--resume"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert "step 6 cannot be saved" in done.stderr and "checkpoint-3 is whole" in done.stderr, done.stderr[-2000:]
    assert last_checkpoint(run_dir) == run_dir / "checkpoint-3"


def test_a_run_that_is_over_is_resumed_without_a_step(work: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "hyper_model.cli", "train", "debug", str(run_dir), "--work", str(work)]
    command += ["--set", "log_every_steps=100"]
    for more in ([], ["--resume", "--export", str(tmp_path / "out")]):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
    last = last_checkpoint(run_dir)
    assert last is not None and last.name == "checkpoint-6"
    assert json.loads(open_checkpoint(tmp_path / "out").manifest.recipe or "")["trained_steps"] == 6
    # Nothing was logged, and the report states it instead of failing.
    assert read_log(run_dir) == [] and (run_dir / "report.md").exists()


def test_a_loss_that_is_no_number_ends_the_run(start: Callable[..., TinyRun], tmp_path: Path) -> None:
    run = start(tmp_path / "run", dtype="float32")
    with torch.no_grad():
        run.trainer.run_model.core.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss is nan"):
        run.train()


def test_a_run_is_not_begun_twice_nor_gone_on_with_by_another_recipe(tmp_path: Path) -> None:
    recipe = debug()
    # A run without output may restart with other settings. A second start beside a running one is refused.
    prepare_run_dir(tmp_path / "run", dataclasses.replace(recipe, seed=2), is_resumed=False, origin={"base": "other"})
    with pytest.raises(TrainingError, match="--resume"):
        prepare_run_dir(tmp_path / "run", recipe, is_resumed=False)
    assert prepare_run_dir(tmp_path / "run", dataclasses.replace(recipe, seed=3), is_resumed=True) is None
    leave_run_dir(tmp_path / "run")
    assert prepare_run_dir(tmp_path / "run", recipe, is_resumed=False) is None
    assert read_recipe(tmp_path / "run")["seed"] == 0
    (tmp_path / "run/log.jsonl").write_text("{}\n")
    leave_run_dir(tmp_path / "run")
    with pytest.raises(TrainingError, match="--resume"):
        prepare_run_dir(tmp_path / "run", recipe, is_resumed=False)
    with pytest.raises(TrainingError, match=r"learning_rate 0\.001, now 1\.0; seed 0, now 1\."):
        prepare_run_dir(tmp_path / "run", dataclasses.replace(recipe, seed=1, learning_rate=1.0), is_resumed=True)
    # As if started by a release with one decoder setting less.
    file = tmp_path / "run/recipe.json"
    said = json.loads(file.read_text())
    del said["decoder"]["has_position_tokens"]
    file.write_text(json.dumps(said))
    assert prepare_run_dir(tmp_path / "run", recipe, is_resumed=True) is None
    with pytest.raises(TrainingError, match=r"decoder\.has_position_tokens false, now true"):
        prepare_run_dir(tmp_path / "run", dataclasses.replace(recipe, decoder=POSITIONED), is_resumed=True)
    with pytest.raises(TrainingError, match=r"started with origin\."):
        prepare_run_dir(tmp_path / "run", recipe, is_resumed=True, origin={"base": "another"})
    # A setting newer than the run had its default then.
    file = tmp_path / "run/recipe.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "trace_style"}))
    prepare_run_dir(tmp_path / "run", recipe, is_resumed=True)
    with pytest.raises(TrainingError, match='trace_style "explicit", now "short"'):
        prepare_run_dir(tmp_path / "run", dataclasses.replace(recipe, trace_style="short"), is_resumed=True)
    with pytest.raises(TrainingError, match="no run to resume"):
        prepare_run_dir(tmp_path / "other", recipe, is_resumed=True)


def test_no_clips_is_said_with_what_to_do(work: Path, start: Callable[..., TinyRun], tmp_path: Path) -> None:
    tokenizer = start(tmp_path / "run").trainer.run_model.tokenizer
    with pytest.raises(MissingDataError, match="make scenes"):
        ClipSequences([], [], tokenizer, debug())


def test_both_kinds_of_clips_are_mixed_as_the_recipe_says(
    work: Path, start: Callable[..., TinyRun], tmp_path: Path
) -> None:
    clips = read_clips(work / "clips/train")
    recipe = dataclasses.replace(debug(), speech_share=(1.0, 0.0), num_steps=80, batch_size=4)
    tokenizer = start(tmp_path / "run").trainer.run_model.tokenizer
    sequences = ClipSequences(clips[:6], clips[6:], tokenizer, recipe)
    shares = [sum(key >= 6 for key, _ in sequences.lengths(step)) / 4 for step in range(80)]
    assert sum(shares[:8]) / 8 == 1.0 and sum(shares[72:]) / 8 < 0.2 and 0.3 < sum(shares) / 80 < 0.7
    again = ClipSequences(clips[:6], clips[6:], tokenizer, recipe)
    assert [again.lengths(step) for step in (77, 3)] == [sequences.lengths(step) for step in (77, 3)]


def test_a_cut_trace_ends_behind_the_transcript_and_teaches_no_end(
    work: Path, start: Callable[..., TinyRun], tmp_path: Path
) -> None:
    clips = read_clips(work / "clips/train")
    recipe = dataclasses.replace(debug(), cut_share=(1.0, 0.0), num_steps=80)
    tokenizer = start(tmp_path / "run").trainer.run_model.tokenizer
    sequences = ClipSequences(clips[:6], clips[6:], tokenizer, recipe)
    closes_words = tokenizer.tag_ids[Section.ASR][1]

    def last(key: int, step: int) -> int:
        encoded, _ = sequences.draw(key, step, random.Random(key))
        return next(target for target in reversed(encoded.targets) if target != IGNORED)

    assert {last(key, 0) for key in range(6, len(clips))} == {closes_words}
    assert {last(key, 80) for key in range(6, len(clips))} == {tokenizer.im_end_id}
    assert {last(key, 0) for key in range(6)} == {tokenizer.im_end_id}, "scenes are whole"


def test_a_run_begins_from_a_decoder_with_another_vocabulary(
    work: Path, start: Callable[..., TinyRun], tmp_path: Path
) -> None:
    run = start(tmp_path / "run").trainer.run_model
    base = run.export(tmp_path / "base", recipe=debug(), num_steps=0, dtype=torch.float32)
    file = tmp_path / "tokenizer.json"
    train_tokenizer(["what an odd trousseau that is, says the choir"] * 3, 500).save(str(file))
    decoder = debug().decoder
    assert decoder is not None
    encoder = work / "assets" / ENCODER_FILE
    other = model_from_scratch(decoder, file, encoder, dtype=torch.float32, base=base.path)
    before, after = ({name: t.float() for name, t in named_tensors(each.policy)} for each in (run, other))
    same = {name for name in before if not name.startswith("audio_tower") and before[name].shape == after[name].shape}
    assert len(same) == len([name for name in before if not name.startswith("audio_tower")]) - 2
    assert all(torch.equal(before[name], after[name]) for name in same)
    table = "language_model.model.embed_tokens.weight"
    ends = (base.tokenizer.im_end_id, other.tokenizer.im_end_id)
    assert torch.equal(before[table][ends[0]], after[table][ends[1]])
    word = other.tokenizer.tokenizer.token_to_id("Ġtrousseau")
    pieces = base.tokenizer.encode_text(" trousseau")
    assert len(pieces) > 1 and torch.allclose(after[table][word], before[table][pieces].mean(0))
    with pytest.raises(CheckpointError, match="not of the recipe's decoder"):
        model_from_scratch(
            dataclasses.replace(decoder, ffn_size=64), file, encoder, dtype=torch.float32, base=base.path
        )


def test_a_row_that_the_checkpoint_cannot_hold_ends_the_run_by_its_name() -> None:
    checkpoint = open_checkpoint(ROOT / "checkpoints/hyper-mini", verify=False)
    row = next(iter(read_examples(ROOT / "tests/assets/clips/truth.json")))
    row = dataclasses.replace(row, completion="<THINK></THINK><FINAL_ANSWER>two</FINAL_ANSWER>")

    def draw(max_model_len: int) -> int:
        sequences = ExampleSequences(
            [row],
            checkpoint.tokenizer,
            debug(),
            4,
            PauseMode.PARALLEL,
            answers_by_letter=False,
            max_model_len=max_model_len,
            log_mel=LogMel(80),
        )
        encoded, mel = sequences.draw(0, 0, random.Random(0))
        return len(encoded.token_ids) - 1 + num_audio_tokens(mel.shape[-1] * HOP)

    num_tokens = draw(2048)
    assert draw(num_tokens) == num_tokens
    with pytest.raises(HyperError, match=rf"truth\.json.*take {num_tokens} tokens.*takes {num_tokens - 1}$"):
        draw(num_tokens - 1)


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([{"params": [parameter], "weight_decay": 0.0}], lr=1e-4)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter[0].item() == pytest.approx(0.99, abs=4e-3)
    other = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    again = MasterAdamW([{"params": [other], "weight_decay": 0.0}], lr=1e-4)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(other, parameter) and torch.equal(again.masters[0], optimizer.masters[0])


def test_two_ranks_take_the_steps_of_one(work: Path, tmp_path: Path) -> None:
    """Run through the command, which starts both ranks."""
    command = [sys.executable, "-m", "hyper_model.cli", "train", "debug"]
    options = ["--work", str(work), "--set", "batch_size=4", "--set", "dtype=float32"]
    for ranks in (1, 2):
        done = subprocess.run(
            [*command, str(tmp_path / str(ranks)), *options, "--processes", str(ranks)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_log(tmp_path / ranks) for ranks in ("1", "2"))
    assert [row["loss"] for row in one] == [pytest.approx(row["loss"], rel=1e-4) for row in two]
    assert (tmp_path / "2/report.md").exists()


def test_a_killed_rank_ends_the_run_and_leaves_the_last_checkpoint(work: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "hyper_model.cli", "train", "debug", str(run_dir), "--work", str(work)]
    command += ["--processes", "2", "--set", "num_steps=100000", "--set", "save_every_steps=20"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline_s = time.monotonic() + 120
        while last_checkpoint(run_dir) is None:
            assert time.monotonic() < deadline_s and process.poll() is None
            time.sleep(0.2)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, said = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "failed with exit code -9" in said.replace("\n", " ") and "--resume" in said
    saved = last_checkpoint(run_dir)
    assert saved is not None
    open_checkpoint(saved / "model")


def test_recipes_are_complete_and_named_as_their_functions() -> None:
    from training.recipes import RECIPES, GrpoRecipe

    for name, make in RECIPES.items():
        recipe = make()
        assert recipe.name == name and isinstance(recipe, SftRecipe | GrpoRecipe)
        assert json.loads(json.dumps(dataclasses.asdict(recipe)))["name"] == name
