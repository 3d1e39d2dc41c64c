"""Checkpoints on disk: export and verified opening of a directory of model files.

    hyper.json                 the manifest (hyper_model.manifest), with the sha256 of every other file
    config.json, *.safetensors the model, under names accepted by vLLM and transformers (hyper_model.weights)
    tokenizer.json, tokenizer_config.json, preprocessor_config.json, chat_template.jinja, generation_config.json

`export` writes a checkpoint. `open_checkpoint` opens one, or raises an error of one line with the reason. Files with
executable code are refused, listed or not. Unlisted files are refused too, because libraries load files by name.

The module is independent of HTTP and engines. Neither importing it nor opening a checkpoint loads torch or
transformers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from hyper_model import int8, weights
from hyper_model.errors import CheckpointError
from hyper_model.files import replacing, sha256_of
from hyper_model.manifest import FORMAT_VERSION, MANIFEST_FILE, Manifest, make_manifest, parse_json, read_manifest
from hyper_model.trace import (
    AUDIO,
    END_OF_TEXT,
    IM_END,
    PAUSE,
    PAUSE_CLOSE,
    Section,
    TagStyle,
    TraceTokenizer,
    parse_tokenizer,
)

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "Qwen2AudioForConditionalGeneration"
_REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "NOTICE")
_UNLISTED_NAMES = ("README.md", *LICENCE_FILES, ".gitattributes", ".gitignore")
# The prompt of `trace.build_prompt`, for other servers of the directory. Without this template the processor falls back
# to Qwen's, with a system turn absent from our training data.
_CHAT_TEMPLATE = (
    "{% set clips = namespace(count=0) %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if 'audio' in part or 'audio_url' in part or part['type'] == 'audio' %}{% set clips.count = clips.count + 1 %}"
    "{{ 'Audio ' + clips.count|string + ': <|audio_bos|><|AUDIO|><|audio_eos|>\\n' }}"
    "{% elif 'text' in part %}{{ part['text']|trim + '\\n' }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        manifest_sha256: Identifies this exact checkpoint, because the manifest holds the sha256 of every other file.
    """

    path: Path
    manifest: Manifest
    tokenizer: TraceTokenizer
    manifest_sha256: str


class HasToDict(Protocol):
    """Interface of transformers' configuration objects, declared here to avoid importing them."""

    def to_dict(self) -> dict[str, Any]: ...


def open_checkpoint(directory: str | Path, *, verify: bool = True) -> Checkpoint:
    """Check a checkpoint completely and open it.

    Args:
        directory: The checkpoint's directory.
        verify: Whether to read every file and compare its sha256 (about a minute for a 7B model). All other checks
            always run.

    Raises:
        CheckpointError: If it cannot be served. The message is one line with the directory and the reason.
    """
    root = Path(directory)
    try:
        return _open(root, verify=verify)
    except CheckpointError as error:
        raise CheckpointError(f"{root}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read ({error.strerror or error})") from error


def _open(root: Path, *, verify: bool) -> Checkpoint:
    if not root.is_dir():
        raise CheckpointError("the directory does not exist")
    if not (root / MANIFEST_FILE).is_file():
        raise CheckpointError(f"no {MANIFEST_FILE}, so not a HyPeR checkpoint (`hyper checkpoint adopt` makes one)")
    raw = (root / MANIFEST_FILE).read_bytes()
    manifest = read_manifest(raw)
    _check_directory(root, manifest)
    if verify:
        for name, digest in manifest.files.items():
            if sha256_of(root / name) != digest:
                raise CheckpointError(f"{name} does not have the sha256 that {MANIFEST_FILE} lists: altered or damaged")
    config = _check_configs(root, manifest)
    weights.check_tensors(weights.read_entries(weights.weight_files(root)), config)
    tokenizer = _check_tokenizer(root, manifest, config)
    return Checkpoint(root, manifest, tokenizer, hashlib.sha256(raw).hexdigest())


def _check_directory(root: Path, manifest: Manifest) -> None:
    inside = root.resolve()
    for path in sorted(root.iterdir()):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise CheckpointError(f"{path.name} is a link that leaves the directory")
        if path.name not in (MANIFEST_FILE, *_UNLISTED_NAMES, *manifest.files):
            raise CheckpointError(
                f"{path.name} is not listed in {MANIFEST_FILE}; a library could pick it up by its name"
            )
    for name in (*_REQUIRED_FILES, *manifest.files):
        if not (root / name).is_file():
            raise CheckpointError(f"{name} is missing")
        if name not in manifest.files:
            raise CheckpointError(f"{name} is not listed in {MANIFEST_FILE}")
    listed = {name for name in manifest.files if name.endswith(".safetensors")}
    if listed != {path.name for path in weights.weight_files(root)}:
        raise CheckpointError("the safetensors files differ from the files of the weights")


def _check_configs(root: Path, manifest: Manifest) -> dict[str, Any]:
    documents = {
        name: parse_json((root / name).read_bytes(), name) for name in manifest.files if name.endswith(".json")
    }
    for name, document in documents.items():
        if name != "tokenizer.json":  # its vocabulary may contain the word
            refuse_code(document, name)
    config = documents["config.json"]
    require_architecture(config)
    stated, found = manifest.quantization, config.get("quantization_config")
    if found != (int8.CONFIG if stated else None):
        raise CheckpointError(
            f"config.json describes other quantised weights than {MANIFEST_FILE} ({stated or 'none'}); "
            "only the form of `hyper checkpoint quantize` is served"
        )
    positions = config["text_config"].get("max_position_embeddings", 0)
    if manifest.max_model_len > positions:
        raise CheckpointError(f"max_model_len {manifest.max_model_len} is above the model's {positions} positions")
    return config


def require_float_weights(checkpoint: Checkpoint) -> None:
    """Refuse a quantised checkpoint, for a conversion or training of its weights."""
    stated = checkpoint.manifest.quantization
    if stated is not None:
        raise CheckpointError(f"{checkpoint.path}: is quantised ({stated}); use the checkpoint with its float weights")


def refuse_code(document: object, name: str) -> None:
    """Refuse a parsed configuration with a reference to custom code, at any depth."""
    if isinstance(document, dict):
        items = cast("dict[str, object]", document)
        if "auto_map" in items or items.get("trust_remote_code"):
            raise CheckpointError(f"{name} asks to run code from the checkpoint (auto_map or trust_remote_code)")
        document = list(items.values())
    if isinstance(document, list):
        for value in cast("list[object]", document):
            refuse_code(value, name)


def require_architecture(config: Mapping[str, Any]) -> None:
    """Refuse a config.json of anything but a plain Qwen2-Audio."""
    named: list[str] = config.get("architectures") or []
    if named != [ARCHITECTURE] or config.get("model_type") != "qwen2_audio":
        raise CheckpointError(f"the architecture is {', '.join(named) or 'not named'}; only {ARCHITECTURE} is served")
    for part, model_type in (("text_config", "qwen2"), ("audio_config", "qwen2_audio_encoder")):
        section: object = config.get(part)
        if not isinstance(section, dict) or cast("dict[str, Any]", section).get("model_type", model_type) != model_type:
            raise CheckpointError(f"the {part} of config.json is not {model_type}")


def _check_tokenizer(root: Path, manifest: Manifest, config: Mapping[str, Any]) -> TraceTokenizer:
    fields, pause = manifest.trace, manifest.pause
    if fields.tag_style is TagStyle.TOKEN:
        for section in Section:
            if section not in fields.tags:
                raise CheckpointError(f"{MANIFEST_FILE} does not list the tags of {section.value}")
    elif not {Section.FINAL_ANSWER, Section.RESPONSE} & set(fields.tags):
        raise CheckpointError(f"{MANIFEST_FILE} lists no answer tag")
    spellings = {section: (tag.open, tag.close) for section, tag in fields.tags.items()}
    text = (root / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = make_tokenizer(text, fields.tag_style, spellings, (pause.open, pause.close), pause.position_ids or ())
    written = {AUDIO: config.get("audio_token_index"), pause.open: pause.open_id, pause.close: pause.close_id}
    if fields.tag_style is TagStyle.TOKEN:
        for tag in fields.tags.values():
            written |= {tag.open: tag.open_id, tag.close: tag.close_id}
    for token, token_id in written.items():
        found = tokenizer.tokenizer.token_to_id(token)
        if found is None:
            raise CheckpointError(f"the tokenizer lacks {token}")
        if found != token_id:
            raise CheckpointError(f"{token} is token {found} in the tokenizer, but {token_id} in {MANIFEST_FILE}")
    if num_token_ids(tokenizer) > config["text_config"]["vocab_size"]:
        raise CheckpointError("the tokenizer has more tokens than the embedding has rows")
    return tokenizer


def make_tokenizer(
    text: str,
    tag_style: TagStyle,
    spellings: Mapping[Section, tuple[str, str]],
    pause_spelling: tuple[str, str],
    position_ids: Sequence[int] = (),
) -> TraceTokenizer:
    """Build the trace tokenizer from the text of a tokenizer.json and a manifest's tags and pauses."""
    tokenizer = parse_tokenizer(text.encode("utf-8"))
    return TraceTokenizer(tokenizer, tag_style, tags=spellings, pause_tags=pause_spelling, position_ids=position_ids)


def num_token_ids(tokenizer: TraceTokenizer) -> int:
    """Return the number of embedding rows needed: the highest id plus one (ids may have gaps)."""
    return max(tokenizer.tokenizer.get_vocab(with_added_tokens=True).values()) + 1


class _ModelTensors(Mapping[str, "torch.Tensor"]):
    """View of a state dict under canonical names, tensor by tensor; a missing head is the embedding."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        self._state_dict = state_dict
        self._sources = weights.canonical_names(list(state_dict))
        if weights.EMBEDDING not in self._sources:
            raise CheckpointError(f"the weights lack {weights.EMBEDDING}")
        self._sources.setdefault(weights.LM_HEAD, self._sources[weights.EMBEDDING])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._state_dict[self._sources[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def is_tied(self) -> bool:
        import torch

        if self._sources[weights.LM_HEAD] == self._sources[weights.EMBEDDING]:
            return True
        head, embedding = self[weights.LM_HEAD], self[weights.EMBEDDING]
        return head.dtype == embedding.dtype and torch.equal(head, embedding)


def export(
    directory: str | Path,
    *,
    state_dict: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | HasToDict,
    tokenizer_json: str | Path,
    manifest_fields: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = weights.DEFAULT_SHARD_BYTES,
) -> Checkpoint:
    """Write a checkpoint for `open_checkpoint`, transformers and vLLM, atomically.

    Args:
        directory: The new directory; must be missing or empty unless `overwrite` is set.
        state_dict: The tensors, under any of transformers' names. It may be lazy: at most one shard is in memory.
        config: A Qwen2AudioConfig or its dict. Vocabulary size, special token ids, tying and dtype are derived from the
            weights and the tokenizer.
        tokenizer_json: The text of a tokenizer.json, or its path.
        manifest_fields: `name`, and all other manifest fields, or fields of `trace`, `pause` and `audio`, with
            non-default values. Token ids, `max_model_len` and `files` are filled in.
        dtype: The dtype of the written weights; None keeps theirs.
        overwrite: Whether to replace an existing directory.
        max_shard_bytes: Approximate size of a weight file.

    Raises:
        CheckpointError: If the parts do not form a checkpoint. No partial directory remains.
    """
    target = Path(directory)
    if not overwrite and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; choose another directory or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Write beside the target: the rename then stays on one file system. mkdtemp would ignore the caller's umask.
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        text = tokenizer_json.read_text(encoding="utf-8") if isinstance(tokenizer_json, Path) else tokenizer_json
        fields = copy.deepcopy(dict(manifest_fields))
        tokenizer = _fill_tags(fields, text)
        tensors = _ModelTensors(state_dict)
        model = _model_config(config, tokenizer, tensors, dtype)
        fields.setdefault("max_model_len", model["text_config"]["max_position_embeddings"])
        weights.write_tensors(partial, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes)
        (partial / "tokenizer.json").write_text(text, encoding="utf-8")
        (partial / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
        _write_json(partial / "config.json", model)
        for name, document in _companion_files(model, tokenizer, fields["max_model_len"]).items():
            _write_json(partial / name, document)
        fields["files"] = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        manifest = make_manifest({"format_version": FORMAT_VERSION, **fields})
        (partial / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        checkpoint = _open(partial, verify=False)  # the sums were computed from these files just now
        _replace(partial, target)
    except CheckpointError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Checkpoint(target, manifest, checkpoint.tokenizer, checkpoint.manifest_sha256)


def update_pause(directory: str | Path, fields: Mapping[str, Any]) -> Checkpoint:
    """Change gate settings in a checkpoint's manifest and leave all other files untouched.

    Args:
        directory: An exported checkpoint.
        fields: Fields of the manifest's `pause` group, such as `{"tau_pause": 0.6}`.

    Raises:
        CheckpointError: If the checkpoint cannot be opened or the fields are invalid. The old manifest is then kept.
    """
    checkpoint = open_checkpoint(directory, verify=False)
    return update_manifest(directory, {"pause": checkpoint.manifest.pause.model_dump(mode="json") | dict(fields)})


def update_manifest(directory: str | Path, fields: Mapping[str, Any]) -> Checkpoint:
    """Change whole fields of a checkpoint's manifest and leave all other files untouched.

    Args:
        directory: An exported checkpoint.
        fields: Fields of the manifest, in JSON form.

    Raises:
        CheckpointError: As in `update_pause`.
    """
    checkpoint = open_checkpoint(directory, verify=False)
    manifest = make_manifest(checkpoint.manifest.model_dump(mode="json") | dict(fields))
    path = checkpoint.path.resolve() / MANIFEST_FILE
    # Write beside the checkpoint, because a stray file inside it would be refused. The rename is atomic.
    partial = path.parent.with_name(f".{path.parent.name}.{uuid.uuid4().hex}.json")

    def write(document: bytes) -> None:
        try:
            with replacing(path, partial):
                partial.write_bytes(document)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error

    before = path.read_bytes()
    write(f"{manifest.model_dump_json(indent=2)}\n".encode())
    try:
        return open_checkpoint(directory, verify=False)
    except CheckpointError:
        write(before)
        raise


def _fill_tags(fields: dict[str, Any], tokenizer_text: str) -> TraceTokenizer:
    """Complete the `trace` and `pause` groups with spellings and ids from the tokenizer."""
    group: dict[str, Any] = fields.setdefault("trace", {})
    pause: dict[str, Any] = fields.setdefault("pause", {})
    tag_style = TagStyle(group.setdefault("tag_style", TagStyle.TOKEN))
    spelled: dict[str, Any] = group.get("tags") or {
        s.value: dict(zip(("open", "close"), s.tags, strict=True)) for s in Section
    }
    spellings = {Section(name): (tag["open"], tag["close"]) for name, tag in spelled.items()}
    pause_spelling = (pause.setdefault("open", PAUSE), pause.setdefault("close", PAUSE_CLOSE))
    tokenizer = make_tokenizer(tokenizer_text, tag_style, spellings, pause_spelling)
    if tokenizer.pause_id is None or tokenizer.pause_close_id is None:
        raise CheckpointError(f"the tokenizer lacks {pause['open']} or {pause['close']}")
    pause |= {"open_id": tokenizer.pause_id, "close_id": tokenizer.pause_close_id}
    group["tags"] = {
        section.value: {"open": opening, "close": closing}
        | dict(zip(("open_id", "close_id"), tokenizer.tag_ids.get(section, (None, None)), strict=True))
        for section, (opening, closing) in spellings.items()
    }
    return tokenizer


def _model_config(
    config: Mapping[str, Any] | HasToDict,
    tokenizer: TraceTokenizer,
    tensors: _ModelTensors,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    from transformers import Qwen2AudioConfig

    source = copy.deepcopy(dict(config) if isinstance(config, Mapping) else config.to_dict())
    source["architectures"] = source.get("architectures") or [ARCHITECTURE]
    source.setdefault("model_type", "qwen2_audio")
    refuse_code(source, "config.json")
    require_architecture(source)
    # Through the class: it converts names of older releases (rope_theta, torch_dtype) to current ones.
    model: dict[str, Any] = Qwen2AudioConfig.from_dict(source).to_diff_dict()  # pyright: ignore[reportUnknownMemberType]
    embedding = tensors[weights.EMBEDDING]
    dtype_name = str(dtype or embedding.dtype).removeprefix("torch.")
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.im_end_id, "pad_token_id": tokenizer.end_of_text_id}
    # Derived from the weights, never copied from the source. transformers ignores the flag for this architecture, and
    # vLLM copies the top-level flag over the decoder's.
    tied = {"tie_word_embeddings": tensors.is_tied}
    model["text_config"] |= {"vocab_size": embedding.shape[0], "dtype": dtype_name} | ids | tied
    model["audio_config"]["dtype"] = dtype_name
    model.pop("_name_or_path", None)
    return model | {"audio_token_index": tokenizer.audio_id, "dtype": dtype_name} | tied


def _companion_files(
    model: Mapping[str, Any], tokenizer: TraceTokenizer, max_model_len: int
) -> dict[str, dict[str, Any]]:
    """Return the small files expected by transformers and vLLM beside the weights."""
    return {
        "generation_config.json": {
            # Both libraries take sampling defaults from here; a base model's top_k or penalties must not leak in.
            "do_sample": False,
            "eos_token_id": [tokenizer.im_end_id, tokenizer.end_of_text_id],
            "pad_token_id": tokenizer.end_of_text_id,
        },
        "tokenizer_config.json": {
            # Not Qwen2Tokenizer: transformers 5 rebuilds it with Qwen's own splitting. This class uses tokenizer.json
            # unchanged.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Qwen2AudioProcessor",
            "model_max_length": max_model_len,
            "eos_token": IM_END,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "processor_class": "Qwen2AudioProcessor",
            "feature_size": model["audio_config"]["num_mel_bins"],
            "sampling_rate": 16_000,
            "hop_length": 160,
            "n_fft": 400,
            "chunk_length": 30,
            "n_samples": 480_000,
            "nb_max_frames": 3_000,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
        },
    }


def _replace(partial: Path, target: Path) -> None:
    """Move a finished directory into place; set an existing one aside first, intact until then."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f"{partial.name}.old")
    target.rename(old)
    partial.rename(target)
    shutil.rmtree(old)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
