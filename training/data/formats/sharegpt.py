"""LLaMA-Factory's sharegpt format."""

from __future__ import annotations

from typing import cast

from training.data.formats.data_format import DataFormat
from training.data.formats.instruction import read_instruction
from training.data.formats.rows import Row
from training.data.formats.types import Example

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def read(row: Row) -> Example:
    """Read LLaMA-Factory's sharegpt format, with one question per row.

    Source: `data/README.md` and `data/mllm_audio_demo.json` of github.com/hiyouga/LLaMA-Factory. Rows have `messages`
    of `role` and `content`, or `conversations` of `from` and `value`. A content is text, or a list of parts of type
    `text` and `audio`, as chat templates take it. An assistant's text without tags is the answer
    itself. System messages are ignored, since our prompts have none.
    """
    field = row.present("messages", "conversations")
    clips: list[str] = []
    said: dict[str, list[str]] = {"user": [], "assistant": [], "system": []}
    for message in row.optional_list(field) or []:
        if not isinstance(message, dict):
            raise row.error(field, "holds a message that is no object", message)
        parts = cast("dict[str, object]", message)
        role, text = parts.get("role", parts.get("from")), parts.get("content", parts.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise row.error(field, f"holds a role that is none of {', '.join(_ROLES)}", role)
        if isinstance(text, list):
            text = _joined(row, field, cast("list[object]", text), clips)
        if not isinstance(text, str):
            raise row.error(field, "holds a message whose content is not text or a list of parts", text)
        said[_ROLES[role]].append(text)
    for role in ("user", "assistant"):
        if len(said[role]) != 1:
            raise row.error(field, f"holds {len(said[role])} messages of the {role} where one is supported")
    audio = None
    if clips:
        stated = row.optional_list("audios") if isinstance(row.fields.get("audios"), list) else None
        if len(clips) > 1 or stated:
            raise row.error(field, f"holds {len(clips) + len(stated or [])} clips where one is supported", clips)
        audio = row.audio(field, row.clean(field, clips[0]))
    return read_instruction(row, field, row.clean(field, said["user"][0]), field, said["assistant"][0], audio)


def _joined(row: Row, field: str, parts: list[object], clips: list[str]) -> str:
    """Return the texts of a message's parts; collect the paths of its clips."""
    texts: list[str] = []
    for part in parts:
        fields = cast("dict[str, object]", part) if isinstance(part, dict) else {}
        kind = fields.get("type")
        if kind == "text" and isinstance(text := fields.get("text"), str):
            texts.append(text)
            continue
        paths = [path for name in ("audio", "audio_url", "path", "url") if isinstance(path := fields.get(name), str)]
        if kind not in ("audio", "audio_url") or len(paths) != 1:
            raise row.error(field, "holds a part that is neither text nor one audio path", part)
        clips.append(paths[0])
    return "\n".join(texts)


FORMAT = DataFormat("LLaMA-Factory's ShareGPT messages", read, ("messages", "conversations"), is_in_file_names=True)
