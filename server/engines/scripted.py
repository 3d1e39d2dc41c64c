"""The scripted engine of a service, and its default checkpoint: a byte-level tokenizer without weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hyper_model.checkpoint import Checkpoint
from hyper_model.manifest import Manifest, PauseFields, Tag, TraceFields
from hyper_model.trace import SPECIAL_TOKENS, Section, TraceTokenizer, train_tokenizer
from server.engines.protocol import ScriptedEngine
from server.settings import Settings

NUM_BYTES = 256


def scripted_checkpoint() -> Checkpoint:
    """Build the checkpoint in memory; its path names no file."""
    # No training texts: one token per byte, and the special tokens.
    tokenizer = TraceTokenizer(train_tokenizer((), NUM_BYTES + len(SPECIAL_TOKENS)))
    assert tokenizer.pause_id is not None and tokenizer.pause_close_id is not None
    tags = {
        section: Tag(open=tag[0], close=tag[1], open_id=ids[0], close_id=ids[1])
        for section, tag, ids in ((section, section.tags, tokenizer.tag_ids[section]) for section in Section)
    }
    manifest = Manifest(
        name="scripted",
        trace=TraceFields(tags=tags),
        pause=PauseFields(open_id=tokenizer.pause_id, close_id=tokenizer.pause_close_id),
        base_model="none: the scripted engine measures and does not understand",
        # A question of 2000 characters and 26 choices of 500, at one token per byte, and room for the trace.
        max_model_len=32_768,
        files={},
    )
    return Checkpoint(Path(), manifest, tokenizer, hashlib.sha256(manifest.model_dump_json().encode()).hexdigest())


def build(settings: Settings, checkpoint: Checkpoint) -> ScriptedEngine:
    """Build the scripted engine of a service."""
    return ScriptedEngine(
        checkpoint.tokenizer,
        audio_tokens_per_s=checkpoint.manifest.audio.tokens_per_s,
        token_interval_s=settings.scripted_token_interval_s,
    )
