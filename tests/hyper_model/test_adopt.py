from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import Qwen2AudioForConditionalGeneration

from hyper_model import weights
from hyper_model.adopt import adopt
from hyper_model.checkpoint import open_checkpoint
from hyper_model.cli import main
from hyper_model.errors import CheckpointError
from hyper_model.trace import AUDIO, CONTROL_TOKENS, SPECIAL_TOKENS, Section, TagStyle
from tests.builders import random_model, tiny_config, tiny_tokenizer, write_entry_points
from training.export import model_of_checkpoint

LATENT_SPAN = ("<IMPLICIT_THINK>", "</IMPLICIT_THINK>")


def stock_tokenizer(extra: Sequence[str] = ()) -> Tokenizer:
    """Return a tokenizer with Qwen2-Audio's control tokens, none of ours, and `extra`."""
    document = json.loads(tiny_tokenizer().to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in CONTROL_TOKENS]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra])
    return tokenizer


def write_source(
    directory: Path, *, extra_tokens: Sequence[str] = (), num_padding_rows: int = 40, max_shard_size: str = "10GB"
) -> Path:
    """Write a Qwen2-Audio in transformers' layout, with names refused by vLLM and a Trainer's other files."""
    tokenizer = stock_tokenizer(extra_tokens)
    config = tiny_config(tokenizer.get_vocab_size() + num_padding_rows)
    model = random_model(config | {"audio_token_index": tokenizer.token_to_id(AUDIO)})
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    (directory / "training_args.bin").write_bytes(pickle.dumps({"seed": 1}))
    (directory / "LICENSE").write_text("Apache-2.0")
    return directory


def stored(directory: Path) -> dict[str, torch.Tensor]:
    files = weights.weight_files(directory)
    return {weights.canonical_name(name): value for file in files for name, value in load_file(file).items()}


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def test_a_stock_model_is_adopted_with_its_padding_rows_and_pauses_off(tmp_path: Path) -> None:
    source = write_source(tmp_path / "Qwen2 Audio 7B", num_padding_rows=40)
    bytes_before = {path.name: path.read_bytes() for path in source.iterdir()}
    adopted = adopt(source, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    manifest = checkpoint.manifest
    assert (manifest.name, manifest.base_model) == ("Qwen2-Audio-7B", "Qwen2 Audio 7B")
    assert (manifest.trace.tag_style, manifest.trace.answer_style) == (TagStyle.TEXT, "text")
    assert manifest.trace.tags[Section.FINAL_ANSWER].open == "<answer>"
    assert manifest.trace.tags[Section.FINAL_ANSWER].open_id is None
    assert (manifest.pause.mode, manifest.pause.max_pauses) == ("parallel", 0)
    assert adopted.added_tokens == ("<PAUSE>", "</PAUSE>")
    num_trained = stock_tokenizer().get_vocab_size()
    assert (manifest.pause.open_id, manifest.pause.close_id) == (num_trained, num_trained + 1)
    assert adopted.num_rows == adopted.num_rows_before == num_trained + 40

    before, after = stored(source), stored(tmp_path / "out")
    for name in before:
        if name in (weights.EMBEDDING, weights.LM_HEAD):
            mean = before[name][:num_trained].mean(dim=0)
            torch.testing.assert_close(after[name][num_trained : num_trained + 2], mean.expand(2, -1))
            kept = [row for row in range(adopted.num_rows) if row not in (num_trained, num_trained + 1)]
            assert torch.equal(after[name][kept], before[name][kept])
        else:
            assert torch.equal(after[name], before[name]), name
    assert {path.name: path.read_bytes() for path in source.iterdir()} == bytes_before
    assert not list((tmp_path / "out").glob("*.bin"))
    assert (tmp_path / "out" / "LICENSE").read_text() == "Apache-2.0"
    # A model must have its tags as tokens for training.
    with pytest.raises(CheckpointError, match="--tag-style token"):
        model_of_checkpoint(tmp_path / "out", dtype=torch.float32)


def test_an_embedding_without_room_grows_and_old_tokens_keep_their_logits(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", num_padding_rows=0)
    adopted = adopt(source, tmp_path / "out", tag_style=TagStyle.TOKEN)
    num_trained = stock_tokenizer().get_vocab_size()
    assert adopted.num_rows_before == num_trained
    assert adopted.num_rows == -(-(num_trained + 26) // 64) * 64
    ids = torch.tensor([[5, 80, 200, 7]])
    with torch.no_grad():
        old, new = (
            Qwen2AudioForConditionalGeneration.from_pretrained(path).eval()(input_ids=ids).logits
            for path in (source, tmp_path / "out")
        )
    torch.testing.assert_close(new[..., :num_trained], old)
    # An untrained token is as likely as the average one, so it cannot dominate the model.
    torch.testing.assert_close(
        new[..., num_trained:], old.mean(-1, keepdim=True).expand(-1, -1, new.shape[-1] - num_trained)
    )


def test_a_stock_model_can_be_given_our_tags_to_be_trained_on(tmp_path: Path) -> None:
    adopted = adopt(write_source(tmp_path / "source"), tmp_path / "out", tag_style=TagStyle.TOKEN, name="for-sft")
    manifest = adopted.checkpoint.manifest
    assert set(adopted.added_tokens) == set(SPECIAL_TOKENS) - set(CONTROL_TOKENS)
    assert (manifest.name, manifest.trace.tag_style, manifest.trace.answer_style) == ("for-sft", "token", "letter")
    assert set(manifest.trace.tags) == set(Section)
    assert manifest.pause.max_pauses == 0


def test_an_r1_model_in_shards_is_read_from_all_of_them(tmp_path: Path) -> None:
    source = write_source(tmp_path / "r1-aqa", max_shard_size="200KB")
    assert len(weights.weight_files(source)) > 3
    adopted = adopt(source, tmp_path / "out", max_shard_bytes=400_000)
    assert len(weights.weight_files(tmp_path / "out")) > 1
    assert stored(source).keys() == stored(tmp_path / "out").keys()
    assert adopted.tag_names == "r1"
    assert adopted.checkpoint.tokenizer.tags[Section.THINK] == ("<think>", "</think>")


def test_a_published_hyper_model_keeps_its_latent_span_and_its_spellings(tmp_path: Path) -> None:
    source = write_source(tmp_path / "hyper", extra_tokens=["<PAUSE>", *LATENT_SPAN])
    adopted = adopt(source, tmp_path / "out")
    manifest = open_checkpoint(tmp_path / "out").manifest
    assert adopted.added_tokens == ()
    assert (manifest.trace.tag_style, manifest.trace.answer_style) == (TagStyle.TEXT, "letter")
    assert manifest.trace.tags[Section.ENV].open == "<BGM>"
    assert (manifest.pause.mode, manifest.pause.open, manifest.pause.close) == ("sampled", *LATENT_SPAN)
    assert manifest.pause.open_id == stock_tokenizer(["<PAUSE>", *LATENT_SPAN]).token_to_id(LATENT_SPAN[0])
    # Its tags are text, so a gate has no section boundaries.
    assert manifest.pause.max_pauses == 0
    before, after = stored(source), stored(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_published_hyper_model_with_qwens_own_tokenizer_is_named_by_hand(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    manifest = adopt(source, tmp_path / "out", tag_names="hyper").checkpoint.manifest
    assert (manifest.trace.tags[Section.ENV].open, manifest.trace.answer_style) == ("<BGM>", "letter")
    assert manifest.pause.max_pauses == 0


def test_tags_that_the_tokenizer_has_stay_what_they_are(tmp_path: Path) -> None:
    tags = [token for token in SPECIAL_TOKENS if token not in CONTROL_TOKENS]
    source = write_source(tmp_path / "source", extra_tokens=[*reversed(tags)])
    adopted = adopt(source, tmp_path / "out")
    known = stock_tokenizer([*reversed(tags)])
    assert adopted.added_tokens == ()
    assert adopted.checkpoint.manifest.trace.tag_style is TagStyle.TOKEN
    assert adopted.checkpoint.tokenizer.tag_ids[Section.ENV] == (
        known.token_to_id("<ENV>"),
        known.token_to_id("</ENV>"),
    )
    assert (adopted.checkpoint.manifest.pause.mode, adopted.checkpoint.manifest.pause.max_pauses) == ("parallel", 3)


def test_a_model_with_tag_tokens_and_a_latent_span_pauses_by_sampling(tmp_path: Path) -> None:
    tags = [token for token in SPECIAL_TOKENS if token not in CONTROL_TOKENS]
    source = write_source(tmp_path / "source", extra_tokens=[*tags, *LATENT_SPAN])
    pause = adopt(source, tmp_path / "out").checkpoint.manifest.pause
    assert (pause.mode, pause.max_pauses, pause.open) == ("sampled", 3, LATENT_SPAN[0])


def test_a_tied_model_stays_tied(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    tensors = load_file(source / weights.SINGLE_FILE)
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, source / weights.SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"lack language_model\.lm_head\.weight"):
        adopt(source, tmp_path / "out")
    edit_json(source / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=True))
    adopt(source, tmp_path / "out")
    after = stored(tmp_path / "out")
    assert torch.equal(after[weights.LM_HEAD], after[weights.EMBEDDING])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_config_of_an_older_transformers_is_brought_up_to_date(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")

    def age(config: dict[str, Any]) -> None:
        del config["text_config"]["rope_parameters"], config["text_config"]["hidden_act"], config["dtype"]
        config["text_config"]["rope_theta"] = 12_345.0
        config["torch_dtype"] = "float32"

    edit_json(source / "config.json", age)
    adopt(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"]["rope_parameters"]["rope_theta"] == 12_345.0
    assert written["text_config"]["hidden_act"] == "silu"


def pickle_the_weights(source: Path) -> None:
    (source / weights.SINGLE_FILE).unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def point_the_index_elsewhere(source: Path) -> None:
    (source / weights.INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))


def drop_a_tensor(source: Path) -> None:
    tensors = load_file(source / weights.SINGLE_FILE)
    del tensors["audio_tower.conv1.weight"]
    save_file(tensors, source / weights.SINGLE_FILE)


def drop_the_audio_token(source: Path) -> None:
    def drop(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != AUDIO]

    edit_json(source / "tokenizer.json", drop)


def outgrow_the_embedding(source: Path) -> None:
    stock_tokenizer([f"<extra {number}>" for number in range(41)]).save(str(source / "tokenizer.json"))


def in_config(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda source: edit_json(source / "config.json", edit)


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (pickle_the_weights, r"pickles \(pytorch_model\.bin\)"),
    "no weights": (lambda source: (source / weights.SINGLE_FILE).unlink(), "no model.safetensors"),
    "index that leaves": (point_the_index_elsewhere, "not a safetensors file of this directory"),
    "missing tensor": (drop_a_tensor, "lack audio_tower.conv1.weight"),
    "remote code": (in_config(lambda c: c.update(auto_map={"AutoModel": "x.y"})), "asks to run code"),
    "remote tokenizer": (
        lambda source: edit_json(source / "tokenizer_config.json", lambda c: c.update(auto_map={"A": "x.y"})),
        "tokenizer_config.json asks to run code",
    ),
    "other architecture": (in_config(lambda c: c.update(architectures=["Qwen2_5OmniModel"])), "Qwen2_5OmniModel"),
    "quantised": (in_config(lambda c: c.update(quantization_config={"bits": 4})), "quantised"),
    "other front end": (
        lambda source: (source / "preprocessor_config.json").write_text('{"sampling_rate": 8000}'),
        "sampling_rate 8000",
    ),
    "no config": (lambda source: (source / "config.json").unlink(), "no config.json"),
    "no tokenizer": (lambda source: (source / "tokenizer.json").unlink(), "no tokenizer.json"),
    "no audio token": (drop_the_audio_token, r"lacks <\|AUDIO\|>"),
    "other audio token": (in_config(lambda c: c.update(audio_token_index=3)), "audio_token_index"),
    "too many tokens": (outgrow_the_embedding, "only 476 rows"),
    "adapter": (lambda source: (source / "adapter_config.json").write_text("{}"), "merge it"),
    "own checkpoint": (lambda source: (source / "hyper.json").write_text("{}"), "a HyPeR checkpoint already"),
    "destination taken": (
        lambda source: ((source.parent / "out").mkdir(), (source.parent / "out" / "x").touch()),
        "exists already",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_adopted_is_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    damage, reason = REFUSALS[case]
    source = write_source(tmp_path / "source")
    damage(source)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=reason) as refusal:
        adopt(source, tmp_path / "out")
    assert str(refusal.value).startswith(f"{source} cannot be adopted: ")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_command_says_what_it_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_entry_points(tmp_path, {"checkpoint": "hyper_model.commands:checkpoint"})
    monkeypatch.syspath_prepend(tmp_path)
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    options = ["--name", "mine", "--tag-style", "text", "--tag-names", "hyper", "--answer-style", "text"]
    with pytest.raises(SystemExit) as exit_info:
        main(["checkpoint", "adopt", str(source), str(out), *options])
    assert exit_info.value.code == 0
    said = capsys.readouterr().out
    assert "tags: text, spelled as hyper; choices by text" in said
    assert "tokens added: <PAUSE>, </PAUSE>" in said
    assert "pauses: off, because its tags are plain text" in said
    assert open_checkpoint(out).manifest.name == "mine"
    with pytest.raises(SystemExit) as exit_info:
        main(["checkpoint", "adopt", str(source), str(out)])
    assert exit_info.value.code == 78
    assert "exists already" in capsys.readouterr().err
