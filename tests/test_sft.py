"""What holds of Stage I: what it is shown, that it learns, and that a broken run goes on as if it had not been."""

from __future__ import annotations

import dataclasses
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
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from hyper_model.audio_encoder import LogMel
from hyper_model.checkpoint import open_checkpoint
from hyper_model.errors import CheckpointError, HyperError
from hyper_model.manifest import GATED_SECTIONS
from hyper_model.trace import Section, TraceTokenizer, build_prompt, render, train_tokenizer
from tests.process import ROOT
from tests.training_data import TinyRun, tiny_run, write_bank, write_encoder, write_sounds
from training.assets import ENCODER_FILE, MissingDataError
from training.clips import scene_to_json
from training.encoder import HOP, ClipEncoder, num_audio_tokens
from training.examples import read_examples
from training.export import model_from_scratch
from training.policy import IGNORED, named_tensors
from training.questions import draw_example
from training.recipes import SftRecipe, debug
from training.run_report import write_report
from training.scenes import SceneBuilder
from training.sft import ENCODER_WIDTH, ClipSequences, ExampleSequences, read_clips
from training.tokens import Spans, encode_sequence
from training.trainer import MasterAdamW, TrainingError, last_checkpoint, prepare_run_dir, read_log
from training.voices import Bank


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with twelve scenes of random states of the right length, in the clips' own format."""
    folder = tmp_path_factory.mktemp("work")
    builder = SceneBuilder(Bank(write_bank(folder / "bank")), write_sounds(folder / "assets/sounds"), "train")
    write_encoder(folder / "assets" / ENCODER_FILE)
    out = folder / "clips/train"
    out.mkdir(parents=True)
    torch.manual_seed(0)
    rows: list[str] = []
    with (out / "scene-0000.bf16").open("wb") as states:
        for seed in range(12):
            scene, samples_S = builder.draw(seed)
            states_AD = torch.randn(num_audio_tokens(len(samples_S)), ENCODER_WIDTH, dtype=torch.bfloat16)
            states.write(states_AD.view(torch.int16).numpy().tobytes())
            rows.append(json.dumps({"num_tokens": len(states_AD), "scene": scene_to_json(scene)}))
    (out / "scene-0000.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def start(work: Path) -> Callable[..., TinyRun]:
    """Begins or goes on with a run of the debug recipe."""

    def begin(run_dir: Path, *, is_resumed: bool = False, **changes: Any) -> TinyRun:
        return tiny_run(dataclasses.replace(debug(), **changes), work, run_dir, is_resumed=is_resumed)

    return begin


def test_loss_falls_on_the_trace_alone_and_never_on_a_latent_token(work: Path, start: Callable[..., TinyRun]) -> None:
    tokenizer = start(work / "tokenizer-run").trainer.run_model.tokenizer
    assert tokenizer.pause_id is not None
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
        assert tokenizer.pause_id not in targets
        assert targets == [t for t in encoded.token_ids[len(prompt) :] if t != tokenizer.pause_id]
        num_latent = encoded.token_ids.count(tokenizer.pause_id)
        assert num_latent % 4 == 0 and 4 <= num_latent <= 12
        num_spans += num_latent // 4
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
        elif token_id == tokenizer.pause_id:
            found.add(held[-1] if held else "outside")
    return found


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_resumes_bit_for_bit(start: Callable[..., TinyRun], tmp_path: Path, dtype: str) -> None:
    whole = start(tmp_path / "whole", dtype=dtype)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    # As if the machine had gone down while the second checkpoint was written.
    (tmp_path / "broken/checkpoint-6/complete").unlink()
    broken = start(tmp_path / "broken", is_resumed=True, dtype=dtype)
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


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(work: Path, tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does, in torch and in safetensors."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "hyper_model.cli", "train", "debug", str(run_dir), "--work", str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    (run_dir / "checkpoint-6/complete").unlink()
    # The optimizer's file is the last and largest that does not fit; the model's still does.
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
    # Nothing was logged, and the report says so instead of failing.
    assert read_log(run_dir) == [] and (run_dir / "report.md").exists()


def test_a_loss_that_is_no_number_ends_the_run(start: Callable[..., TinyRun], tmp_path: Path) -> None:
    run = start(tmp_path / "run", dtype="float32")
    with torch.no_grad():
        run.trainer.run_model.core.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss is nan"):
        run.train()


def test_a_run_is_not_begun_twice_nor_gone_on_with_by_another_recipe(tmp_path: Path) -> None:
    recipe = debug()
    assert prepare_run_dir(tmp_path / "run", recipe, is_resumed=False) is None
    with pytest.raises(TrainingError, match="--resume"):
        prepare_run_dir(tmp_path / "run", recipe, is_resumed=False)
    with pytest.raises(TrainingError, match="learning_rate, seed differ"):
        prepare_run_dir(tmp_path / "run", dataclasses.replace(recipe, seed=1, learning_rate=1.0), is_resumed=True)
    with pytest.raises(TrainingError, match="origin differ"):
        prepare_run_dir(tmp_path / "run", recipe, is_resumed=True, origin={"base": "another"})
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
    """Through the command, which starts both ranks by itself."""
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
    assert "ended with exit code -9" in said.replace("\n", " ") and "--resume" in said
    saved = last_checkpoint(run_dir)
    assert saved is not None
    open_checkpoint(saved / "model")


def test_recipes_are_complete_and_named_as_their_functions() -> None:
    from training.recipes import RECIPES, GrpoRecipe

    for name, make in RECIPES.items():
        recipe = make()
        assert recipe.name == name and isinstance(recipe, SftRecipe | GrpoRecipe)
        assert json.loads(json.dumps(dataclasses.asdict(recipe)))["name"] == name
