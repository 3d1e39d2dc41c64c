"""vLLM plugin: a Qwen2-Audio class with the exact unpadded encoder of `audio_encoder`.

vLLM's own class pads every clip to 30 s and cuts longer clips silently. For a small checkpoint, padding takes most of
the time to the first token. This class replaces it under the same architecture name and so serves any Qwen2-Audio
checkpoint. Weights, prompts and `audio_embeds` inputs stay vLLM's own. vLLM finds `register` through the entry point
group `vllm.general_plugins`, loaded in each of its processes.

The module is independent of requests, traces and our checkpoints.

Axes as in `audio_encoder`: S samples, M mel bins, W mel frames, A audio tokens; H is the decoder's hidden width.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any, cast

import numpy as np
import torch
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.qwen2_audio import (
    Qwen2AudioDummyInputsBuilder,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioMultiModalProcessor,
    Qwen2AudioMultiModalProjector,
    Qwen2AudioProcessingInfo,
)
from vllm.model_executor.models.registry import ModelRegistry
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from hyper_model.audio_encoder import HOP, MAX_SAMPLES, WINDOW, LogMel, encode, num_states_of_mel
from hyper_model.audio_limits import SAMPLE_RATE_HZ
from hyper_model.audio_rows import audio_layers, audio_stack, row_width

ARCHITECTURE = "Qwen2AudioForConditionalGeneration"
PARENT_WATCH = "hyper-parent-watch"
_COMPLETES = "_completes_saved_graphs"


def register() -> None:
    """Replace vLLM's own class by this module's; further calls have no effect.

    A process started by vLLM also ends with its parent process. vLLM's EngineCore does not notice a killed parent, and
    would keep the memory of weights and cache forever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and not any(thread.name == PARENT_WATCH for thread in threading.enumerate()):
        # Not PR_SET_PDEATHSIG: that also fires when only the starting thread ends.
        threading.Thread(target=end_with, args=(parent.sentinel,), name=PARENT_WATCH, daemon=True).start()
    complete_saved_graphs()
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}:{UnpaddedQwen2Audio.__name__}")


def complete_saved_graphs() -> None:
    """Give a compiled graph loaded from disk the method that vLLM calls on it; further calls have no effect.

    vLLM calls `finalize_loading` on every loaded graph. Graphs of its CPU mode are plain functions without that method,
    so vLLM 0.32 would drop the saved graph and compile again at each start. A graph with the method is left alone.
    """
    load = cast("Any", torch.compiler.load_compiled_function)
    if getattr(load, _COMPLETES, False):
        return

    @functools.wraps(load)
    def load_complete(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        graph = loaded._artifacts.compiled_fn
        if not hasattr(graph, "finalize_loading"):
            graph.finalize_loading = _nothing_left_to_load
        return loaded

    setattr(load_complete, _COMPLETES, True)
    torch.compiler.load_compiled_function = load_complete


def _nothing_left_to_load(vllm_config: VllmConfig) -> None:
    """Load nothing: a plain function is complete."""


def end_with(sentinel: int) -> None:
    """Wait for the end of the sentinel's process, then kill this process."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


class UnpaddedAudioProcessor(Qwen2AudioMultiModalProcessor):
    """Processor for the mel [M, W] of each clip, without padding and without transformers' prompt text.

    Raises:
        ValueError: At construction, if the checkpoint's mel is not Whisper's. At a call, if a clip is longer than 30 s
            or shorter than one audio token (see `audio_encoder.num_states`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        extractor: Any = self.info.get_feature_extractor()
        expected = {
            "sampling_rate": SAMPLE_RATE_HZ,
            "n_fft": WINDOW,
            "hop_length": HOP,
            "n_samples": MAX_SAMPLES,
            "dither": 0.0,
        }
        found = {name: getattr(extractor, name) for name in expected}
        if found != expected:
            raise ValueError(f"the mel of this checkpoint is not Whisper's: {found}, expected {expected}")
        self.log_mel = LogMel(extractor.feature_size)
        # Stored, because each look-up rebuilds the tokenizer's attributes.
        self.audio_token_id: int = cast(Any, self.info.get_hf_processor()).audio_token_id

    def _get_hf_mm_text(self, mm_counts: Mapping[str, int]) -> str:
        # Unused: the prompt is already token ids.
        return ""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        clips = cast("Sequence[np.ndarray[tuple[int], np.dtype[np.float32]]]", hf_data["audio"])
        dtype = self.info.ctx.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        # In the model's dtype, like transformers' output: half the bytes on the way to the engine's process.
        return BatchFeature({"input_features": [self.log_mel(samples_S).to(dtype) for samples_S in clips]})

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        stack = audio_stack(self.info.get_hf_config())

        def audio_tokens(item_index: int) -> list[int]:
            return [self.audio_token_id] * _num_audio_tokens(out_mm_kwargs["audio"][item_index].get_data(), stack)

        return [PromptReplacement(modality="audio", target=[self.audio_token_id], replacement=audio_tokens)]


def _num_audio_tokens(item: Mapping[str, Any], stack: int) -> int:
    """Return the number of audio tokens of a processed clip, or of a clip given as embeddings.

    Args:
        stack: Rows of the tower that one audio token joins.
    """
    if "input_features" in item:
        return -(-(num_states_of_mel(item["input_features"].shape[1]) // 2) // stack)
    if "audio_num_tokens" in item:
        return int(item["audio_num_tokens"])
    return item["audio_embeds"].shape[0]


@MULTIMODAL_REGISTRY.register_processor(
    UnpaddedAudioProcessor, info=Qwen2AudioProcessingInfo, dummy_inputs=Qwen2AudioDummyInputsBuilder
)
class UnpaddedQwen2Audio(Qwen2AudioForConditionalGeneration):
    """Qwen2-Audio model with a tower run once per step, on all clips packed without padding.

    The projector reads `audio_stack` rows of the tower at once, and the states of `audio_layers` beside those of the
    last layer; config.json sets both.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.stack, self.layers = audio_stack(self.config), audio_layers(self.config)
        width = row_width(self.config)
        if width != self.config.audio_config.d_model:
            self.multi_modal_projector = Qwen2AudioMultiModalProjector(width, self.config.text_config.hidden_size)

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Return the embeddings [A, H] of each clip of a step.

        Args:
            **kwargs: `input_features`, a mel [M, W] per clip (a tensor if all have one length), or `audio_embeds` as in
                vLLM's class.
        """
        mels = cast("Sequence[torch.Tensor] | torch.Tensor | None", kwargs.get("input_features"))
        if mels is None:
            return super().embed_multimodal(**kwargs)
        states_AD, num_tokens = encode(self.audio_tower, list(mels), self.stack, self.layers)
        return self.multi_modal_projector(states_AD).split(num_tokens)
