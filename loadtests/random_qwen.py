"""Write a Qwen2-Audio with random weights in transformers' layout: the real shapes, names and vocabulary.

    python -m loadtests.random_qwen DIRECTORY --layers 2

It is a process of its own, so torch and the weights leave memory before the service starts. One shard is in memory at
a time. Names and shapes come from transformers' model, so they also check ours in `hyper checkpoint adopt`.

Random weights write random tokens, and a gate works in sections only. So three rows of the output head are planted:
every completion begins with the opening tags of THINK, CAPTION and ENV. All later tokens are random.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from hyper_model.trace import CONTROL_TOKENS, Section
from loadtests.qwen_shapes import SCALES, Shapes

DISTRIBUTION, VERSION = "dashscope", "2.0.2"
"""The package with Qwen's vocabulary (Apache-2.0)."""
RANKS_FILE = "dashscope/resources/qwen.tiktoken"
# Qwen2-Audio's order of its control tokens, behind the ranks.
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
assert set(QWEN_TOKENS) == set(CONTROL_TOKENS)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TAGS = tuple(tag for section in Section for tag in section.tags)
PLANTED = ("\n", *(section.tags[0] for section in (Section.THINK, Section.CAPTION, Section.ENV)))
"""Each of these tokens is followed by the next; the prompt ends on the first."""
SHARD_BYTES = 2**30
WIDTH_STD, EMBEDDING_STD = 0.02, 1.0
SEED = 20_261_130


def ranks_file() -> Path:
    """Return the file of Qwen's vocabulary.

    Raises:
        click.ClickException: The package is not installed.
    """
    wanted = f"{DISTRIBUTION}=={VERSION}"
    try:
        found = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise click.ClickException(
            f"Qwen's vocabulary is in the package {wanted}, which is not installed: pip install --no-deps {wanted}"
        ) from None
    if found.version != VERSION:
        raise click.ClickException(f"{DISTRIBUTION} {found.version} is installed; {wanted} is wanted")
    return Path(str(found.locate_file(RANKS_FILE)))


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read a vocabulary in tiktoken's form: one token in base64 and its rank per line."""
    pairs = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the merge that makes each token of several bytes, in the order of the ranks."""
    merges: list[tuple[bytes, bytes]] = []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            # As the encoder does: merge the neighbours of the lowest rank, below the token's own.
            found = [(ranks.get(a + b, rank), place) for place, (a, b) in enumerate(itertools.pairwise(parts))]
            lowest, place = min(found)
            if lowest >= rank:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def build_tokenizer(ranks: Mapping[bytes, int]) -> Tokenizer:
    """Build Qwen2-Audio's tokenizer with our tags as tokens, as after Stage I; pauses are left to `adopt`.

    The published tokenizer has further tokens (times, languages, tasks) between its control tokens and row 156,032.
    They are not in the package, so their rows count as padding here.
    """
    alphabet = _byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = [(spelled(left), spelled(right)) for left, right in merges_of(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in (*QWEN_TOKENS, *TAGS)]
    tokenizer.add_special_tokens(added)
    return tokenizer


def _byte_letters() -> dict[int, str]:
    """Return the letter of each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def build_config(shapes: Shapes, layers: int, tokenizer: Tokenizer) -> Qwen2AudioConfig:
    """Return the configuration of a Qwen2-Audio with these widths and this number of decoder layers."""
    return Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": shapes.num_mel_bins,
            "max_source_positions": shapes.num_positions,
            "d_model": shapes.audio_width,
            "encoder_layers": shapes.audio_layers,
            "encoder_attention_heads": shapes.audio_heads,
            "encoder_ffn_dim": shapes.audio_ffn,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": shapes.vocab_size or tokenizer.get_vocab_size(),
            "hidden_size": shapes.hidden_size,
            "intermediate_size": shapes.intermediate_size,
            "num_hidden_layers": layers,
            "num_attention_heads": shapes.num_heads,
            "num_key_value_heads": shapes.num_heads,
            "max_position_embeddings": 8_192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        audio_token_index=tokenizer.get_vocab()["<|AUDIO|>"],
        architectures=["Qwen2AudioForConditionalGeneration"],
        dtype="bfloat16",
    )


class RandomTensors:
    """The tensors of a model, each made from its own seed when it is wanted."""

    def __init__(self, config: Qwen2AudioConfig, planted_ids: list[int]) -> None:
        with torch.device("meta"):
            model = Qwen2AudioForConditionalGeneration(config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
        text: Any = config.text_config
        self.num_layers: int = text.num_hidden_layers
        self.planted_ids = planted_ids

    @property
    def num_bytes(self) -> int:
        """Return the size of all tensors in bfloat16."""
        return 2 * sum(math.prod(shape) for shape in self.shapes.values())

    def make(self, name: str) -> torch.Tensor:
        """Make one tensor in bfloat16."""
        generator = torch.Generator().manual_seed(SEED + 1 + sorted(self.shapes).index(name))
        tensor = torch.empty(self.shapes[name], dtype=torch.bfloat16)
        if tensor.dim() == 1:
            return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        std = WIDTH_STD
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            # As GPT-2 does: otherwise the sum over the layers outgrows the embedding.
            std /= math.sqrt(2 * self.num_layers)
        is_embedding = name.endswith("embed_tokens.weight")
        tensor.normal_(std=EMBEDDING_STD if is_embedding else std, generator=generator)
        rows = torch.empty(len(PLANTED), tensor.shape[1], dtype=torch.bfloat16)
        rows.normal_(std=EMBEDDING_STD, generator=torch.Generator().manual_seed(SEED))
        if is_embedding:
            tensor[self.planted_ids] = rows
        if name.endswith("lm_head.weight"):
            # The row of a token points to the embedding of the token before it. A longer row would win elsewhere too.
            tensor[self.planted_ids[1:]] = rows[:-1] * (40 / tensor.shape[1])
        return tensor

    def write(self, directory: Path) -> None:
        """Write all tensors as shards with an index."""
        shards: list[list[str]] = [[]]
        size = 0
        for name in sorted(self.shapes):
            num_bytes = 2 * math.prod(self.shapes[name])
            if shards[-1] and size + num_bytes > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += num_bytes
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file({name: self.make(name) for name in names}, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--layers", type=click.IntRange(1), default=32, show_default=True, help="Decoder layers.")
@click.option("--scale", type=click.Choice(list(SCALES)), default="full", show_default=True, help="Widths.")
@click.option(
    "--vocabulary",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"Vocabulary in tiktoken's form.  [default: Qwen's, in {DISTRIBUTION}=={VERSION}]",
)
def main(directory: Path, layers: int, scale: str, vocabulary: Path | None) -> None:
    """Write a random Qwen2-Audio to DIRECTORY."""
    tokenizer = build_tokenizer(read_ranks(vocabulary or ranks_file()))
    (newline_id,) = tokenizer.encode("\n").ids
    planted_ids = [newline_id, *(tokenizer.token_to_id(tag) for tag in PLANTED[1:])]
    config = build_config(SCALES[scale], layers, tokenizer)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config.save_pretrained(directory)
    RandomTensors(config, planted_ids).write(directory)


if __name__ == "__main__":
    main()
