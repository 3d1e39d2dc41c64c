"""Conversion of Qwen2-Audio models (stock, R1-AQA, published HyPeR) to HyPeR checkpoints.

The conversion renames the weights for vLLM, adds missing tokens with their own embedding rows, and writes a manifest.
It does not train. A model without a trained `<PAUSE>`, or with tags as plain text, is adopted with pauses off.

It reads only the config, the tokenizer and the safetensors of the source, one tensor at a time. It never opens pickles
or code, and copies no file but licence texts. The module is independent of training and serving.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hyper_model import weights
from hyper_model.checkpoint import LICENCE_FILES, Checkpoint, export, refuse_code, require_architecture
from hyper_model.errors import CheckpointError
from hyper_model.manifest import MANIFEST_FILE, name_of, parse_json
from hyper_model.trace import AUDIO, CONTROL_TOKENS, PAUSE, PAUSE_CLOSE, Section, TagStyle, parse_tokenizer

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

TagNames = Literal["hyper", "r1"]
AnswerStyle = Literal["letter", "text"]
# Section spellings of each kind of model. Published HyPeR code asks for <BGM>; R1-AQA has these two sections only.
_SPELLINGS: Mapping[TagNames, Mapping[Section, tuple[str, str]]] = {
    "hyper": {section: section.tags for section in Section} | {Section.ENV: ("<BGM>", "</BGM>")},
    "r1": {Section.THINK: ("<think>", "</think>"), Section.FINAL_ANSWER: ("<answer>", "</answer>")},
}
_LATENT_SPAN = ("<IMPLICIT_THINK>", "</IMPLICIT_THINK>")
_HYPER_MARKS = frozenset(
    {
        *(tag for section in Section for tag in section.tags),
        PAUSE,
        PAUSE_CLOSE,
        *_LATENT_SPAN,
        *_SPELLINGS["hyper"][Section.ENV],
    }
)
_SETTINGS_FILES = (
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
# The features of Whisper's front end, on which the encoder was trained. Other values would give wrong states.
_FEATURES = {"sampling_rate": 16_000, "hop_length": 160, "n_fft": 400, "chunk_length": 30}
_MAX_MODEL_LEN = 8192
_ROWS_AT_ONCE = 8_192
_ROW_MULTIPLE = 64  # matrix kernels prefer round sizes; vLLM pads to 64 anyway


@dataclass(frozen=True)
class Adoption:
    """Result of `adopt`: the checkpoint and the choices made.

    Attributes:
        added_tokens: Tokens added to the tokenizer.
        num_rows_before, num_rows: Rows of the embedding. They are equal when the new tokens fit into its padding rows.
        tag_names: Tag spellings listed in the manifest.
    """

    checkpoint: Checkpoint
    added_tokens: tuple[str, ...]
    num_rows_before: int
    num_rows: int
    tag_names: TagNames


def adopt(
    source: str | Path,
    destination: str | Path,
    *,
    name: str | None = None,
    tag_style: TagStyle | None = None,
    tag_names: TagNames | None = None,
    answer_style: AnswerStyle | None = None,
    base_model: str | None = None,
    max_shard_bytes: int = weights.DEFAULT_SHARD_BYTES,
) -> Adoption:
    """Write a checkpoint at `destination` from a transformers directory of a Qwen2-Audio model.

    Options left at None are derived from the source's tokenizer:
      - tag_style: "token" if all 24 tags are tokens, else "text". Pass "token" to add the tags before fine-tuning.
      - tag_names: "hyper" if the style is "token" or the tokenizer has any tag, `<PAUSE>` or `<IMPLICIT_THINK>`.
        Otherwise "r1" (`<think>`, `<answer>`). Pass "hyper" for a published HyPeR model with Qwen's own tokenizer.
      - answer_style: "letter" for "hyper", "text" for "r1".
      - pauses: sampled `<IMPLICIT_THINK>` spans if the tokenizer has them, else `<PAUSE>` spans. `<PAUSE>` is added if
        missing. Pauses are off for added tokens. They are also off for plain-text tags, because the gate tracks
        sections by tag tokens.

    Args:
        source: The model's directory. Links, as in a hub cache, are followed.
        destination: The new directory; must be missing or empty.
        name: The checkpoint's name; defaults to the name of the source directory.
        tag_style: The way the model writes its tags.
        tag_names: The spellings of its tags.
        answer_style: The form of its answer to choices.
        base_model: The base model named in the manifest; defaults to the name of the source directory.
        max_shard_bytes: Size of a weight file, and roughly the memory used to write it.

    Raises:
        CheckpointError: If the source is not a plain Qwen2-Audio in safetensors, or the destination is not empty.
    """
    root = Path(source)
    try:
        return _adopt(
            root,
            Path(destination),
            name=name or name_of(root),
            tag_style=tag_style,
            tag_names=tag_names,
            answer_style=answer_style,
            base_model=base_model or root.resolve().name,
            max_shard_bytes=max_shard_bytes,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{root} cannot be adopted: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{root} cannot be adopted: {error.strerror or error}") from error


def _adopt(
    root: Path,
    destination: Path,
    *,
    name: str,
    tag_style: TagStyle | None,
    tag_names: TagNames | None,
    answer_style: AnswerStyle | None,
    base_model: str,
    max_shard_bytes: int,
) -> Adoption:
    config = _read_config(root)
    entries = weights.read_entries(weights.weight_files(root))
    is_tied = bool(config["text_config"].get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    _check_source_tensors(entries, config, is_tied=is_tied)
    tokenizer = _read_tokenizer(root, config)
    known_tokens = {token.content for token in tokenizer.get_added_tokens_decoder().values()}

    style = tag_style or (
        TagStyle.TOKEN if all(set(section.tags) <= known_tokens for section in Section) else TagStyle.TEXT
    )
    names: TagNames = tag_names or ("hyper" if style is TagStyle.TOKEN or known_tokens & _HYPER_MARKS else "r1")
    spellings = {section: section.tags for section in Section} if style is TagStyle.TOKEN else _SPELLINGS[names]
    pause = _pause_fields(known_tokens, style)

    num_trained = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    num_rows_before: int = config["text_config"]["vocab_size"]
    if num_trained > num_rows_before:
        raise CheckpointError(f"its tokenizer has {num_trained} tokens but its embedding only {num_rows_before} rows")
    special_tokens = [pause["open"], pause["close"]]
    if style is TagStyle.TOKEN:
        special_tokens += [tag for tags in spellings.values() for tag in tags]
    added = _add_tokens(tokenizer, special_tokens)
    num_needed = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    num_rows = num_rows_before if num_needed <= num_rows_before else -(-num_needed // _ROW_MULTIPLE) * _ROW_MULTIPLE

    checkpoint = export(
        destination,
        state_dict=_GrownTensors(entries, num_trained=num_trained, num_used=num_needed, num_rows=num_rows),
        config=config,
        tokenizer_json=tokenizer.to_str(),
        manifest_fields={
            "name": name,
            "base_model": base_model,
            "recipe": f"adopted; tokens added: {', '.join(added) or 'none'}",
            "max_model_len": min(config["text_config"]["max_position_embeddings"], _MAX_MODEL_LEN),
            "trace": {
                "tag_style": style.value,
                "tags": {section.value: {"open": tags[0], "close": tags[1]} for section, tags in spellings.items()},
                "answer_style": answer_style or ("letter" if names == "hyper" else "text"),
            },
            "pause": pause,
        },
        max_shard_bytes=max_shard_bytes,
    )
    for licence in LICENCE_FILES:
        if (root / licence).is_file():
            shutil.copyfile(root / licence, destination / licence)
    return Adoption(checkpoint, added, num_rows_before, num_rows, names)


def _read_config(root: Path) -> dict[str, Any]:
    from transformers import Qwen2AudioConfig

    if not root.is_dir():
        raise CheckpointError("there is no such directory")
    if (root / MANIFEST_FILE).exists():
        raise CheckpointError(f"it has a {MANIFEST_FILE} and so is a HyPeR checkpoint already")
    if (root / "adapter_config.json").exists():
        raise CheckpointError("it is an adapter (adapter_config.json); merge it into its base model first")
    if not (root / "config.json").is_file():
        raise CheckpointError("it has no config.json")
    config = parse_json((root / "config.json").read_bytes(), "config.json")
    refuse_code(config, "config.json")
    for name in _SETTINGS_FILES:
        if (root / name).is_file():
            settings = parse_json((root / name).read_bytes(), name)
            refuse_code(settings, name)
            for field, value in _FEATURES.items() if name == "preprocessor_config.json" else ():
                if settings.get(field, value) != value:
                    raise CheckpointError(f"{name} has {field} {settings[field]}; only {value} is served")
    require_architecture(config)
    if config.get("quantization_config"):
        raise CheckpointError("quantised weights cannot be converted; use the model with its float weights")
    # Fill in the class defaults omitted by published configs, such as the width of the decoder.
    return Qwen2AudioConfig.from_dict(config).to_dict()  # pyright: ignore[reportUnknownMemberType]


def _check_source_tensors(
    entries: Mapping[str, weights.TensorEntry], config: Mapping[str, Any], *, is_tied: bool
) -> None:
    """Refuse an unusable source before anything is written, because writing a 7B model takes minutes."""
    tensors = {canonical: entries[name] for canonical, name in weights.canonical_names(list(entries)).items()}
    if is_tied and weights.EMBEDDING in tensors:
        tensors.setdefault(weights.LM_HEAD, tensors[weights.EMBEDDING])
    weights.check_tensors(tensors, config)


def _read_tokenizer(root: Path, config: Mapping[str, Any]) -> Tokenizer:
    path = root / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError("it has no tokenizer.json; load and save its tokenizer with transformers once")
    tokenizer = parse_tokenizer(path.read_bytes())
    for token in CONTROL_TOKENS:
        if tokenizer.token_to_id(token) is None:
            raise CheckpointError(f"its tokenizer lacks {token}")
    if tokenizer.token_to_id(AUDIO) != config["audio_token_index"]:
        raise CheckpointError(f"{AUDIO} is not the token that config.json names as audio_token_index")
    return tokenizer


def _pause_fields(known_tokens: set[str], style: TagStyle) -> dict[str, Any]:
    has_span = set(_LATENT_SPAN) <= known_tokens
    open_tag, close_tag = _LATENT_SPAN if has_span else (PAUSE, PAUSE_CLOSE)
    # A new token's embedding row is a mean of other rows, so pauses need training first. Plain-text tags have no gate
    # (see `GateSettings.of`).
    can_pause = style is TagStyle.TOKEN and open_tag in known_tokens
    budget = {} if can_pause else {"max_pauses": 0}
    return {"mode": "sampled" if has_span else "parallel", "open": open_tag, "close": close_tag} | budget


def _add_tokens(tokenizer: Tokenizer, wanted: list[str]) -> tuple[str, ...]:
    """Make all wanted tokens special, keep existing ids, and return the added ones."""
    from tokenizers import AddedToken

    ids_before = {token: tokenizer.token_to_id(token) for token in wanted}
    tokens = [AddedToken(token, special=True, normalized=False) for token in wanted]
    tokenizer.add_special_tokens(tokens)  # pyright: ignore[reportUnknownMemberType]
    for token, token_id in ids_before.items():
        if token_id is not None and tokenizer.token_to_id(token) != token_id:
            raise CheckpointError(f"{token} cannot be made a special token of this tokenizer")
    return tuple(token for token, token_id in ids_before.items() if token_id is None)


class _GrownTensors(Mapping[str, "torch.Tensor"]):
    """Lazy mapping of a source's tensors, with embedding and head grown to the new tokens.

    A new row is the mean of all trained rows (Hewitt 2021). A random row could take most of the probability; a mean row
    cannot. Former padding rows used by new tokens are overwritten likewise. All other rows are kept.
    """

    def __init__(
        self,
        entries: Mapping[str, weights.TensorEntry],
        *,
        num_trained: int,
        num_used: int,
        num_rows: int,
    ) -> None:
        self._stored = weights.StoredTensors(entries)
        self._sources = weights.canonical_names(list(entries))
        self._num_trained, self._num_used, self._num_rows = num_trained, num_used, num_rows

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._stored[self._sources[name]]
        return self._grow(tensor) if name in (weights.EMBEDDING, weights.LM_HEAD) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def _grow(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        mean = _mean_row(tensor[: self._num_trained])
        num_old = tensor.shape[0]
        if self._num_rows > num_old:
            tensor = torch.cat([tensor, mean.expand(self._num_rows - num_old, -1)])
        tensor[self._num_trained : self._num_used] = mean
        return tensor


def _mean_row(rows: torch.Tensor) -> torch.Tensor:
    """Return the mean of all rows, summed in float32 by pieces: a float32 copy of 7B's embedding takes 2.4 GiB."""
    import torch

    total = torch.zeros(rows.shape[1])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        total += rows[start : start + _ROWS_AT_ONCE].sum(dim=0, dtype=torch.float32)
    return (total / len(rows)).to(rows.dtype)
