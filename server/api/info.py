"""`GET /v1/info`: description of this service and its limits."""

from __future__ import annotations

from typing import cast

from fastapi import APIRouter, Request

from hyper_model.audio import FORMATS
from hyper_model.manifest import AnswerKind, ConfidenceFields
from hyper_model.trace import MAX_CHOICE_CHARS, MAX_CHOICES, MAX_QUESTION_CHARS, Section
from server.api.openapi import ANYWHERE
from server.api.types import (
    AnswerKindInfo,
    CheckpointInfo,
    ComputeInfo,
    ConfidenceInfo,
    DecodingInfo,
    DraftMode,
    InfoReply,
    LimitsInfo,
    PauseInfo,
)
from server.service import Service
from server.telemetry.metrics import version

router = APIRouter(responses=ANYWHERE)


@router.get("/v1/info", summary="Checkpoint, limits and formats")
async def info(request: Request) -> InfoReply:
    """Describe the checkpoint, the limits, the formats and the pause settings."""
    service: Service = request.app.state.service
    settings, manifest, pause = service.settings, service.checkpoint.manifest, service.checkpoint.manifest.pause
    return InfoReply(
        version=version(),
        engine=settings.engine,
        drafts=cast("DraftMode", service.engine.about.get("drafts", "off")),
        checkpoint=CheckpointInfo(
            name=manifest.name,
            manifest_sha256=service.checkpoint.manifest_sha256,
            base_model=manifest.base_model,
            max_model_len=manifest.max_model_len,
        ),
        compute=ComputeInfo.model_validate(
            {
                "dtype": service.engine.about.get("dtype", "none"),
                "weights": manifest.quantization or "float",
                "compiled": service.engine.about.get("compiled", "none"),
            }
        ),
        formats=list(FORMATS),
        decoding=DecodingInfo(sandbox=list(service.decoder_pool.layers), memory_mib=settings.decode_memory_mib),
        sections=[section.value for section in Section],
        environment_labels=list(manifest.environment_labels),
        pause=PauseInfo(
            mode=pause.mode if service.answerer.gate else "off",
            latent_tokens=pause.latent_tokens,
            has_position_tokens=pause.position_ids is not None,
            max_pauses=service.answerer.max_pauses,
            tau_pause=pause.tau_pause,
            tau_abort=pause.tau_abort,
            window_tokens=pause.window_tokens,
            sections=list(pause.sections),
            is_calibrated=pause.calibration is not None,
        ),
        confidence=confidence_info(manifest.confidence),
        long_audio=["error", "window", "chunk"],
        limits=LimitsInfo(
            window_s=manifest.audio.window_s,
            sync_windows=settings.sync_windows,
            max_recording_s=settings.max_recording_s,
            min_audio_s=manifest.audio.min_duration_s,
            max_audio_s=settings.max_audio_s,
            max_audio_bytes=settings.max_audio_bytes,
            max_body_bytes=settings.max_body_bytes,
            max_file_bytes=settings.files_max_bytes,
            max_file_lifetime_s=settings.files_max_lifetime_s,
            max_question_chars=MAX_QUESTION_CHARS,
            max_questions=settings.max_questions,
            max_choices=MAX_CHOICES,
            max_choice_chars=MAX_CHOICE_CHARS,
            max_tokens=settings.max_tokens,
            max_timeout_ms=settings.max_timeout_ms,
            max_in_flight=settings.max_in_flight,
            max_queue_wait_s=settings.max_queue_wait_s,
        ),
    )


def confidence_info(fields: ConfidenceFields | None) -> ConfidenceInfo:
    """Describe the calibration of the confidence of answers."""
    if fields is None:
        return ConfidenceInfo(source=None)
    return ConfidenceInfo(source=fields.source, choices=_kind_info(fields.choices), open=_kind_info(fields.open))


def _kind_info(kind: AnswerKind | None) -> AnswerKindInfo | None:
    if kind is None:
        return None
    return AnswerKindInfo.model_validate(kind.model_dump(include=set(AnswerKindInfo.model_fields)))
