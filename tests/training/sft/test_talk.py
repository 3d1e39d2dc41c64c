"""Alignment of a pretrained decoder: its inputs, and the exact resumption of an interrupted run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hyper_model.checkpoint import open_checkpoint
from hyper_model.compose import parts_of_adapter, read_parts, untrained, write_parts
from hyper_model.trace import Section
from tests.gguf_file import compose_tiny
from tests.training_data import write_bank, write_sounds
from training.data.clips import BASE_ENCODER_WIDTH, Clip, scene_to_json
from training.data.reading import Reader
from training.data.scenes import SceneBuilder
from training.data.sources.voices import Bank
from training.data.text_scenes import SceneWriter
from training.export import ADAPTER, model_of_checkpoint
from training.policy import IGNORED
from training.recipes import Lora, SftRecipe, Spelling, Talk, debug
from training.sft.projector_ctc import load_speller, teach_spelling
from training.sft.talk import ClipsByIndex, TalkSequences
from training.sft.trainer import SftTrainer
from training.trainer import last_checkpoint, prepare_run_dir

NUM_CLIPS = 12


def recipe(**changes: Any) -> SftRecipe:
    """Return four steps of the alignment of a tiny decoder."""
    fields: dict[str, Any] = {
        "num_steps": 4,
        "save_every_steps": 2,
        "dtype": "bfloat16",
        "decoder": None,
        "spelling": None,
        "lora": Lora(rank=4, alpha=8, trains_projector=True),
        "pause_share": 0.5,
        "read_size": 1,
        "talk": Talk(num_clips=NUM_CLIPS, answer_share=0.5),
    }
    return dataclasses.replace(debug(), **(fields | changes))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base checkpoint as `made`, and a shard of talk with random states of the right length."""
    folder = tmp_path_factory.mktemp("talk")
    compose_tiny(untrained("tiny", 2), folder, width=BASE_ENCODER_WIDTH)
    builder = SceneBuilder(Bank(write_bank(folder / "bank")), write_sounds(folder / "sounds"), "train")
    torch.manual_seed(0)
    rows: list[str] = []
    with (folder / "talk-0000.bf16").open("wb") as states:
        for seed in range(NUM_CLIPS):
            scene = builder.draw_parts(seed).scene
            states_AD = torch.randn(60 + seed, BASE_ENCODER_WIDTH).bfloat16()
            states.write(states_AD.view(torch.int16).numpy().tobytes())
            rows.append(json.dumps({"num_tokens": len(states_AD), "scene": scene_to_json(scene)}))
    (folder / "talk-0000.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def _trainer(
    work: Path, run_dir: Path, chosen: SftRecipe, *, scenes: ClipsByIndex | None = None, is_resumed: bool = False
) -> Any:
    torch.manual_seed(chosen.seed)
    model = model_of_checkpoint(work / "made", dtype=torch.bfloat16, lora=chosen.lora)
    prepare_run_dir(run_dir, chosen, is_resumed=is_resumed)
    reader = Reader(SceneWriter(["the gray otter sleeps behind the engine"], frozenset()))
    sequences = TalkSequences(
        ClipsByIndex(work, "talk"), model.tokenizer, chosen, reader, scenes=scenes, stack=2, latent_tokens=4
    )
    return SftTrainer(model, chosen, run_dir, sequences)


class _StopError(Exception):
    """Substitute for the end of the process."""


def test_a_run_that_was_killed_goes_on_bit_for_bit(work: Path, tmp_path: Path) -> None:
    whole = _trainer(work, tmp_path / "whole", recipe())
    whole.train()
    broken = _trainer(work, tmp_path / "broken", recipe())
    draw = broken.make_step

    def stop(step: int) -> Any:
        if step == 3:
            raise _StopError
        return draw(step)

    broken.train_dataset.make = stop
    with pytest.raises(_StopError):
        broken.train()
    resumed = _trainer(work, tmp_path / "broken", recipe(), is_resumed=True)
    resumed.train(resume_from_checkpoint=str(last_checkpoint(tmp_path / "broken")))
    wanted, found = whole.run_model.policy.state_dict(), resumed.run_model.policy.state_dict()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    before = model_of_checkpoint(work / "made", dtype=torch.bfloat16).policy.state_dict()
    projector = "model.multi_modal_projector.linear.weight"
    trained = wanted["base_model.model.model.multi_modal_projector.modules_to_save.default.linear.weight"]
    assert not torch.equal(before[projector], trained)


def test_trained_parts_compose_to_what_was_trained(work: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer = _trainer(work, tmp_path / "run", recipe(num_steps=2))
    trainer.train()
    adapter = load_file(tmp_path / "run/checkpoint-2" / ADAPTER / "adapter_model.safetensors")
    write_parts(tmp_path / "parts", parts_of_adapter(adapter), name="tiny", audio_stack=2, lora_scale=2.0)
    made = compose_tiny(read_parts(tmp_path / "parts"), tmp_path, width=BASE_ENCODER_WIDTH)
    exported = trainer.run_model.export(tmp_path / "export", recipe=recipe(), num_steps=2, dtype=torch.bfloat16)
    found, wanted = (
        model_of_checkpoint(path, dtype=torch.float32).policy.state_dict() for path in (made.path, exported.path)
    )
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=2e-2), name
    again = _trainer(work, tmp_path / "again", recipe()).run_model
    again.load_parts(read_parts(tmp_path / "parts"))
    trained = trainer.run_model.policy.state_dict()
    for name, tensor in again.policy.state_dict().items():
        assert torch.allclose(trained[name].float(), tensor.float(), atol=1e-3), name
    assert open_checkpoint(exported.path).manifest.audio.tokens_per_s == 12.5


def test_a_step_follows_from_its_number_alone(work: Path, tmp_path: Path) -> None:
    first, second = (_trainer(work, tmp_path / name, recipe()) for name in ("one", "two"))
    drawn = [first.make_step(step) for step in range(4)]
    for step in reversed(range(4)):
        for (encoded, states_AD), (other, other_AD) in zip(drawn[step], second.make_step(step), strict=True):
            assert encoded == other
            assert torch.equal(states_AD, other_AD)


def test_a_transcript_ends_behind_asr_or_goes_on_to_an_answer(work: Path, tmp_path: Path) -> None:
    trainer = _trainer(work, tmp_path / "run", recipe(pause_share=0.0))
    tokenizer = trainer.run_model.tokenizer
    asr_end = tokenizer.close_ids(Section.ASR)[0]
    ends = set()
    for step in range(8):
        for encoded, states_AD in trainer.make_step(step):
            is_read = len(states_AD) == 1
            assert states_AD.shape[1] == 2 * BASE_ENCODER_WIDTH
            if not is_read:
                ends.add("cut" if encoded.token_ids[-1] == asr_end else "answered")
                assert encoded.targets.count(asr_end) == 1
    assert ends == {"cut", "answered"}


def test_ctc_leaves_a_pretrained_embedding_as_it_is_and_scales_the_projector_to_it(work: Path, tmp_path: Path) -> None:
    model = model_of_checkpoint(work / "made", dtype=torch.float32, lora=recipe().lora)
    core: Any = model.core
    before = core.get_input_embeddings().weight.detach().clone()
    clips = [
        Clip(scene, work / "talk-0000.bf16", 0, 700)
        for scene in (ClipsByIndex(work, "talk")[i][0] for i in range(NUM_CLIPS))
    ]
    spelling = Spelling(num_steps=3, batch_size=4, learning_rate=1e-3, freezes_embedding=True, dropout_states=0.1)
    file = tmp_path / "spelling.safetensors"
    teach_spelling(core, model.tokenizer, clips, spelling, file, seed=0)
    assert torch.equal(before, core.get_input_embeddings().weight)
    projector = core.model.multi_modal_projector.modules_to_save["default"].linear
    states_AD = clips[0].states(BASE_ENCODER_WIDTH).float().reshape(350, -1)
    rms = float(projector(states_AD).detach().square().mean().sqrt())
    assert rms == pytest.approx(float(before.square().mean().sqrt()), rel=0.2)
    from safetensors.torch import load_file

    assert isinstance(load_speller(core, load_file(file)).transcribe_states(states_AD, model.tokenizer), str)


def test_the_first_pass_over_the_clips_is_in_order_and_a_lacking_clip_is_named(work: Path, tmp_path: Path) -> None:
    sequences = _trainer(work, tmp_path / "run", recipe(batch_size=1)).sequences
    size = 8
    assert [key for window in range(NUM_CLIPS // size) for key in sequences._hold(window)] == list(range(size))
    later = [key for window in range(1, 4) for key in sequences._hold(window)]
    assert later[:4] == list(range(size, NUM_CLIPS))
    # A later pass is shuffled; one window has an index once.
    assert set(later[4:]) == set(range(NUM_CLIPS)) and later[4:] != sorted(later[4:])
    with pytest.raises(KeyError, match="holds clip 500"):
        ClipsByIndex(work, "talk")[500]


def test_a_cut_transcript_teaches_no_form_of_a_trace(work: Path, tmp_path: Path) -> None:
    talk = Talk(num_clips=NUM_CLIPS, answer_share=0.0, foreign_share=0.5)
    trainer = _trainer(work, tmp_path / "run", recipe(pause_share=0.0, read_size=0, talk=talk))
    tokenizer = trainer.run_model.tokenizer
    for step in range(4):
        for encoded, _ in trainer.make_step(step):
            wanted = [target for target in encoded.targets if target != IGNORED]
            assert wanted[-1] == tokenizer.close_ids(Section.ASR)[0]
            assert not set(wanted[:-1]) & set(tokenizer.special_ids)


def test_scenes_have_whole_traces_and_their_share(work: Path, tmp_path: Path) -> None:
    for suffix in ("bf16", "jsonl"):
        (work / f"base-scene-0000.{suffix}").write_bytes((work / f"talk-0000.{suffix}").read_bytes())
    talk = Talk(num_clips=NUM_CLIPS, answer_share=0.0, num_scenes=NUM_CLIPS, scene_share=0.5)
    weights = {"ENV": 10.0}
    chosen = recipe(pause_share=0.0, read_size=0, talk=talk, section_weights=weights, wrong_words=0.0)
    trainer = _trainer(work, tmp_path / "run", chosen, scenes=ClipsByIndex(work, "base-scene"))
    tokenizer = trainer.run_model.tokenizer
    env = set(tokenizer.close_ids(Section.ENV))
    num_whole = 0
    for step in range(8):
        for encoded, _ in trainer.make_step(step):
            targets = [target for target in encoded.targets if target != IGNORED]
            assert encoded.weights is not None and len(encoded.weights) == len(targets)
            if targets[-1] == tokenizer.im_end_id:
                num_whole += 1
                heavy = [target for target, weight in zip(targets, encoded.weights, strict=True) if weight == 10.0]
                # The closing tag belongs to its section.
                assert env & set(heavy) and encoded.weight > len(targets)
    assert num_whole == 8
    trainer.train()


def test_parts_without_early_layers_fit_a_base_with_them(work: Path, tmp_path: Path) -> None:
    made = compose_tiny(untrained("wide", 2, (1,)), tmp_path, width=BASE_ENCODER_WIDTH // 2)
    model = model_of_checkpoint(made.path, dtype=torch.float32, lora=recipe().lora)
    core: Any = model.core
    linear = core.model.multi_modal_projector.modules_to_save["default"].linear
    assert linear.in_features == 2 * BASE_ENCODER_WIDTH
    half = BASE_ENCODER_WIDTH // 2
    narrow = {
        "multi_modal_projector.linear.weight": torch.randn(linear.out_features, 2 * half),
        "multi_modal_projector.linear.bias": torch.zeros(linear.out_features),
    }
    write_parts(tmp_path / "narrow", narrow, name="narrow", audio_stack=2, lora_scale=1.0)
    model.load_parts(read_parts(tmp_path / "narrow"))
    states_AD = torch.randn(3, 2, 2, half)
    with torch.no_grad():
        projected_AH = linear(states_AD.flatten(1))
    # Each row is the last layer's states, then those of the first layer.
    wanted_AH = states_AD[:, :, 0].flatten(1) @ narrow["multi_modal_projector.linear.weight"].T
    assert torch.allclose(projected_AH, wanted_AH, atol=1e-4)


def test_the_projector_learns_to_name_sounds(work: Path, tmp_path: Path) -> None:
    model = model_of_checkpoint(work / "made", dtype=torch.bfloat16, lora=recipe().lora)
    scene = ClipsByIndex(work, "talk")[0][0]
    torch.manual_seed(0)
    sounds = {name: torch.randn(BASE_ENCODER_WIDTH) for name in ("rain", "music")}
    clips: list[Clip] = []
    with (tmp_path / "talk-0000.bf16").open("wb") as file:
        for name, direction_D in 20 * list(sounds.items()):
            states_AD = (torch.randn(40, BASE_ENCODER_WIDTH) + direction_D).bfloat16()
            clips.append(
                Clip(dataclasses.replace(scene, environment=name), tmp_path / "talk-0000.bf16", file.tell(), 40)
            )
            file.write(states_AD.view(torch.int16).numpy().tobytes())
    spelling = Spelling(num_steps=40, batch_size=16, learning_rate=1e-2, freezes_embedding=True, sound_weight=5.0)
    file = tmp_path / "spelling.safetensors"
    found = teach_spelling(model.core, model.tokenizer, clips, spelling, file, seed=0, keeps_scale=True)
    assert found is not None and found.num_clips == 4 and found.sound_accuracy == 1.0
