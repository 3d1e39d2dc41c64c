"""The unpadded Qwen2-Audio class in vLLM: lengths, refusals, and the same answers.

Most tests need vLLM's processor only; one starts an engine in its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

from hyper_model.audio import decode
from hyper_model.audio_encoder import LogMel, num_audio_tokens
from hyper_model.checkpoint import open_checkpoint
from hyper_model.engine_environment import prepare_environment, reason_not_to_compile
from hyper_model.trace import build_prompt
from tests.process import ROOT

CHECKPOINT = ROOT / "checkpoints/hyper-mini"
CLIPS = ("environment-only.wav", "one-voice-count.ogg", "two-voices-last.webm", "two-voices.m4a")


@pytest.fixture(scope="module")
def processor() -> Any:
    """vLLM's processor of the embedded checkpoint, found as in the engine."""
    prepare_environment()
    with warnings.catch_warnings():
        # torch and vLLM raise deprecation warnings at import.
        warnings.simplefilter("ignore")
        from vllm.config import ModelConfig
        from vllm.multimodal import MULTIMODAL_REGISTRY

        from hyper_model.vllm_plugin import register

        register()
        register()
        config = ModelConfig(str(CHECKPOINT), dtype="bfloat16", limit_mm_per_prompt={"audio": 4}, enable_mm_embeds=True)
        return MULTIMODAL_REGISTRY.create_processor(config)


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32) * 0.1


def process(processor: Any, clips: Any, prompt: Sequence[int] | None = None) -> Any:
    """Return vLLM's engine input for a prompt about some clips."""
    prompt = prompt or [1, *([processor.audio_token_id, 2] * len(clips))]
    return processor(prompt=list(prompt), mm_items=processor.info.parse_mm_data({"audio": clips}))


def test_vllm_finds_the_class_by_its_entry_point(processor: Any) -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    from hyper_model.vllm_plugin import UnpaddedAudioProcessor, UnpaddedQwen2Audio

    (point,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "hyper")
    assert point.value == "hyper_model.vllm_plugin:register"
    assert ModelRegistry.models["Qwen2AudioForConditionalGeneration"].load_model_cls() is UnpaddedQwen2Audio
    assert type(processor) is UnpaddedAudioProcessor


@pytest.mark.parametrize("num_samples", [321, 1_600, 15_681, 16_001, 80_000, 479_840, 480_000])
def test_a_clip_takes_its_own_mel_and_as_many_tokens_as_it_lasts(processor: Any, num_samples: int) -> None:
    samples_S = noise(num_samples)
    made = process(processor, [(samples_S, 16_000)])
    (item,) = made["mm_kwargs"]["audio"]
    assert set(item) == {"input_features"}
    mel_MW = item["input_features"].data
    assert torch.equal(mel_MW, LogMel(80)(samples_S).bfloat16())
    tokens = num_audio_tokens(num_samples)
    assert made["prompt_token_ids"] == [1, *[processor.audio_token_id] * tokens, 2]
    (place,) = made["mm_placeholders"]["audio"]
    assert (place.offset, place.length) == (1, tokens)


def test_clips_of_one_prompt_keep_their_own_lengths(processor: Any) -> None:
    clips = [(noise(num_samples), 16_000) for num_samples in (80_000, 16_000, 80_000)]
    made = process(processor, clips)
    assert [item["input_features"].data.shape[1] for item in made["mm_kwargs"]["audio"]] == [501, 101, 501]
    assert [place.length for place in made["mm_placeholders"]["audio"]] == [125, 25, 125]


def test_the_number_of_tokens_is_that_of_vllms_own_class(processor: Any) -> None:
    """Test the borders of frames, states and tokens."""
    from vllm.model_executor.models.qwen2_audio import (
        Qwen2AudioDummyInputsBuilder,
        Qwen2AudioMultiModalProcessor,
        Qwen2AudioProcessingInfo,
    )

    info = Qwen2AudioProcessingInfo(processor.info.ctx)
    stock = Qwen2AudioMultiModalProcessor(info, Qwen2AudioDummyInputsBuilder(info))
    for num_samples in (321, 640, 641, 960, 961, 1_120, 1_121, 16_000, 16_001, 15_999, 479_999, 480_000):
        prompt = [1, processor.audio_token_id, 2]
        ours, theirs = (process(some, [(noise(num_samples), 16_000)], prompt) for some in (processor, stock))
        assert ours["prompt_token_ids"] == theirs["prompt_token_ids"], num_samples


def test_too_long_a_clip_is_refused_where_vllms_own_class_cuts_it(processor: Any) -> None:
    with pytest.raises(ValueError, match=r"at most 480000 samples \(30 s at 16000 Hz\), this one has 480001"):
        process(processor, [(noise(480_001), 16_000)])


def test_too_short_a_clip_is_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match=r"at least 321 samples .* this one has 320"):
        process(processor, [(noise(320), 16_000)])


def test_memory_is_planned_for_the_longest_clip(processor: Any) -> None:
    made = processor.get_dummy_mm_inputs({"audio": 1})
    assert made["mm_kwargs"]["audio"][0]["input_features"].data.shape == (80, 3_000)
    assert made["mm_placeholders"]["audio"][0].length == 750
    assert processor.info.get_mm_max_tokens_per_item(2048, {"audio": 1}) == {"audio": 750}


def test_clips_that_come_as_embeddings_pass_through(processor: Any) -> None:
    made = process(processor, [torch.zeros(7, 320), torch.zeros(3, 320)])
    assert [item["audio_embeds"].data.shape[0] for item in made["mm_kwargs"]["audio"]] == [7, 3]
    assert [place.length for place in made["mm_placeholders"]["audio"]] == [7, 3]


def test_a_checkpoint_with_another_mel_is_refused(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.info.get_feature_extractor(), "hop_length", 80)
    with pytest.raises(ValueError, match="hop_length"):
        type(processor)(processor.info, processor.dummy_inputs)


ASK = """
import json, sys
import numpy as np

def main():
    from hyper_model.engine_environment import prepare_environment
    prepare_environment()
    from vllm import LLM, SamplingParams
    import hyper_model.vllm_plugin as plugin

    job = json.loads(open(sys.argv[1]).read())
    llm = LLM(job["checkpoint"], dtype="float32", enforce_eager=True, max_model_len=2048, max_num_seqs=8,
              limit_mm_per_prompt={"audio": 1}, generation_config="vllm", enable_mm_embeds=True)
    calls, encode = [], plugin.encode

    def counting(tower, mels, *shape):
        calls.append(len(mels))
        return encode(tower, mels, *shape)

    plugin.encode = counting
    clips = [np.load(path) for path in job["clips"]]
    params = SamplingParams(temperature=0.0, max_tokens=200, stop_token_ids=[job["stop"]], detokenize=False)
    ask = lambda audio: llm.generate(
        [{"prompt_token_ids": job["prompt"], "multi_modal_data": {"audio": one}} for one in audio], params
    )
    replies = ask([(clip, 16000) for clip in clips])
    embeds = llm.apply_model(lambda model: model.embed_multimodal(
        input_features=[plugin.LogMel(80)(clip) for clip in clips]))[0]
    again = ask([[rows.detach()] for rows in embeds])
    classes = llm.apply_model(lambda model: f"{type(model).__module__}.{type(model).__name__}")
    print("RESULT" + json.dumps({
        "classes": classes, "calls": calls,
        "prompts": [list(reply.prompt_token_ids) for reply in replies],
        "answers": [list(reply.outputs[0].token_ids) for reply in replies],
        "answers_to_embeddings": [list(reply.outputs[0].token_ids) for reply in again],
    }))

if __name__ == "__main__":
    main()
"""


def test_vllm_answers_as_transformers_does_with_padding(tmp_path: Path) -> None:
    """Whole greedy traces in float32 have the same token ids; the clips of a step reach the tower in one call."""
    tokenizer = open_checkpoint(CHECKPOINT).tokenizer
    (stop,) = tokenizer.stop_ids[:1]
    clips = [decode((ROOT / "tests/assets/clips" / name).read_bytes()).samples_S for name in CLIPS]
    for index, samples_S in enumerate(clips):
        np.save(tmp_path / f"{index}.npy", samples_S)
    job = {
        "checkpoint": str(CHECKPOINT),
        "clips": [str(tmp_path / f"{index}.npy") for index in range(len(clips))],
        "prompt": build_prompt(tokenizer, "What is in the background?"),
        "stop": stop,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    (tmp_path / "ask.py").write_text(ASK)
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "ask.py"), str(tmp_path / "job.json")],
        # apply_model takes a function, and vLLM pickles it only with this permission.
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, ran.stdout[-2000:] + ran.stderr[-4000:]
    result = json.loads(lines[0].removeprefix("RESULT"))
    assert result["classes"] == ["hyper_model.vllm_plugin.UnpaddedQwen2Audio"]
    assert result["calls"] == [len(clips), len(clips)]

    model: Any = Qwen2AudioForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    extract = WhisperFeatureExtractor(feature_size=80)
    for samples_S, prompt, answer in zip(clips, result["prompts"], result["answers"], strict=True):
        features = extract(samples_S, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
        ids = torch.tensor([prompt])
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=features["input_features"],
            feature_attention_mask=features["attention_mask"],
            do_sample=False,
            max_new_tokens=200,
            eos_token_id=stop,
        )
        assert whole[0, len(prompt) :].tolist() == answer
        assert answer[-1] == stop
    assert result["answers_to_embeddings"] == result["answers"]


COMPILE = """
import json, sys

def main():
    from hyper_model.engine_environment import prepare_environment
    prepare_environment(is_compiled=True)
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter

    llm = LLM(sys.argv[1], dtype="float32", max_model_len=256, max_num_seqs=2, max_num_batched_tokens=256,
              limit_mm_per_prompt={"audio": 1}, generation_config="vllm")
    (reply,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(temperature=0.0, max_tokens=16,
                            ignore_eos=True, detokenize=False))
    counts = [compilation_counter.num_aot_compiles, compilation_counter.num_aot_artifacts_loaded]
    print("RESULT" + json.dumps([counts, list(reply.outputs[0].token_ids)]))

if __name__ == "__main__":
    main()
"""


def test_a_second_start_loads_the_compiled_graph_and_writes_the_same_tokens(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    if (reason := reason_not_to_compile()) is not None and "TORCH" not in reason:
        pytest.skip(reason)
    (tmp_path / "compile.py").write_text(COMPILE)
    env = {k: v for k, v in os.environ.items() if k != "TORCH_COMPILE_DISABLE"}
    results: list[Any] = []
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, str(tmp_path / "compile.py"), str(random_checkpoint)],
            env=env | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CACHE_ROOT": str(tmp_path / "cache")},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT")]
        assert lines, ran.stdout[-2000:] + ran.stderr[-4000:]
        results.append(json.loads(lines[0].removeprefix("RESULT")))
    assert [counts for counts, _ in results] == [[1, 0], [0, 1]]
    assert results[0][1] == results[1][1]
    assert len(results[0][1]) == 16


def test_a_graph_with_its_own_last_step_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from hyper_model.vllm_plugin import complete_saved_graphs

    def plain() -> None: ...

    def whole() -> None: ...

    whole.finalize_loading = print  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(
        torch.compiler,
        "load_compiled_function",
        lambda graph: SimpleNamespace(_artifacts=SimpleNamespace(compiled_fn=graph)),
    )
    complete_saved_graphs()
    load: Any = torch.compiler.load_compiled_function
    complete_saved_graphs()
    assert load is torch.compiler.load_compiled_function
    assert load(whole)._artifacts.compiled_fn.finalize_loading is print
    assert load(plain)._artifacts.compiled_fn.finalize_loading(None) is None
