from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from hyper_model import weights
from hyper_model.checkpoint import export, open_checkpoint
from hyper_model.cli import main
from hyper_model.compose import read_parts
from hyper_model.errors import CheckpointError
from hyper_model.manifest import MANIFEST_FILE
from hyper_model.trace import AUDIO, Section, build_prompt
from tests.builders import build_random_checkpoint, random_model, tiny_config, tiny_tokenizer, write_entry_points
from tests.process import ROOT

# transformers' own annotations are wrong for the results of these.
MODEL: Any = Qwen2AudioForConditionalGeneration
PROCESSOR: Any = Qwen2AudioProcessor
CLIP_S = (np.sin(np.arange(32_000) * 0.05) * 0.3).astype(np.float32)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_random_checkpoint(tmp_path_factory.mktemp("pristine") / "model", num_padding_rows=10).path


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    document = read_json(path)
    edit(document)
    path.write_text(json.dumps(document))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / weights.SINGLE_FILE)
    edit(tensors)
    save_file(tensors, directory / weights.SINGLE_FILE)


def reseal(directory: Path) -> None:
    """Write the sums of the directory's files, so that later checks see a change."""
    files = [path for path in directory.iterdir() if path.name != MANIFEST_FILE]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    edit_json(directory / MANIFEST_FILE, lambda manifest: manifest.update(files=sums))


def export_random(directory: Path, **changes: Any) -> Path:
    tokenizer = tiny_tokenizer()
    arguments: dict[str, Any] = {
        "config": tiny_config(tokenizer.get_vocab_size()),
        "tokenizer_json": tokenizer.to_str(),
        "manifest_fields": {"name": "test"},
        **changes,
    }
    arguments.setdefault("state_dict", random_model(arguments["config"]).state_dict())
    return export(directory, **arguments).path


def test_an_export_opens_and_lists_every_file(pristine: Path) -> None:
    checkpoint = open_checkpoint(pristine)
    assert {*checkpoint.manifest.files, MANIFEST_FILE} == {path.name for path in pristine.iterdir()}
    assert checkpoint.manifest_sha256 == hashlib.sha256((pristine / MANIFEST_FILE).read_bytes()).hexdigest()
    assert checkpoint.manifest.pause.open_id == checkpoint.tokenizer.pause_id
    tag = checkpoint.manifest.trace.tags[Section.ENV]
    assert (tag.open_id, tag.close_id) == checkpoint.tokenizer.tag_ids[Section.ENV]


def test_the_weights_are_as_readable_as_the_manifest(pristine: Path) -> None:
    assert {path.stat().st_mode for path in pristine.iterdir()} == {(pristine / MANIFEST_FILE).stat().st_mode}


def test_the_same_parts_make_the_same_checkpoint(tmp_path: Path) -> None:
    one, two = (build_random_checkpoint(tmp_path / name) for name in ("one", "two"))
    other = build_random_checkpoint(tmp_path / "other", seed=1)
    assert one.manifest_sha256 == two.manifest_sha256 != other.manifest_sha256


def test_transformers_loads_an_export_and_computes_the_same(pristine: Path) -> None:
    loaded, report = MODEL.from_pretrained(pristine, output_loading_info=True)
    assert not any(report.values()), report
    config = tiny_config(loaded.config.text_config.vocab_size)
    original = random_model(config | {"audio_token_index": loaded.config.audio_token_index})
    processor = PROCESSOR.from_pretrained(pristine)
    text = "<|audio_bos|><|AUDIO|><|audio_eos|>What is heard?"
    inputs = processor(text=text, audio=CLIP_S, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, original(**inputs).logits)
    assert loaded.generation_config.do_sample is False
    assert loaded.generation_config.eos_token_id[0] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_processor_loads_without_a_network_and_writes_our_prompt(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    processor = PROCESSOR.from_pretrained(pristine)
    assert processor.feature_extractor.feature_size == 80
    question = "What is heard, then?  Käfer 123\nA. one\nB. two"
    content = [{"type": "audio", "audio_url": "clip"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    tokenizer = open_checkpoint(pristine).tokenizer
    assert processor.tokenizer(prompt).input_ids == build_prompt(
        tokenizer, question.split("\n")[0], choices=("one", "two")
    )


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name,
        lambda name: "module._orig_mod." + name,
        weights.canonical_name,
        lambda name: weights.canonical_name(name).replace("language_model.model.", "language_model.model.model."),
    ],
    ids=["in memory", "wrapped", "hub", "saved from a config"],
)
def test_every_spelling_of_the_names_makes_the_same_weights(
    spell: Callable[[str], str], pristine: Path, tmp_path: Path
) -> None:
    model = random_model(tiny_config(tiny_tokenizer().get_vocab_size()))
    plain = export_random(tmp_path / "plain", state_dict=model.state_dict())
    spelled = export_random(
        tmp_path / "spelled", state_dict={spell(name): value for name, value in model.state_dict().items()}
    )
    assert open_checkpoint(plain).manifest_sha256 == open_checkpoint(spelled).manifest_sha256


def test_what_transformers_itself_saves_is_refused_and_its_tensors_export(pristine: Path, tmp_path: Path) -> None:
    model = random_model(tiny_config(tiny_tokenizer().get_vocab_size()))
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / weights.SINGLE_FILE)
    assert "language_model.model.model.norm.weight" in saved
    with pytest.raises(CheckpointError, match=r"vLLM wants it named language_model\.model\.embed_tokens\.weight"):
        weights.check_tensors(
            weights.read_entries(weights.weight_files(tmp_path / "saved")),
            read_json(tmp_path / "saved" / "config.json"),
        )
    export_random(tmp_path / "exported", state_dict=saved)


def test_the_expected_tensors_are_those_of_the_model_itself() -> None:
    config = tiny_config(100)
    state = random_model(config).state_dict()
    assert weights.expected_shapes(config) == {
        weights.canonical_name(name): tuple(value.shape) for name, value in state.items()
    }


def test_a_missing_head_is_written_and_said_to_be_tied(tmp_path: Path) -> None:
    state = random_model(tiny_config(tiny_tokenizer().get_vocab_size())).state_dict()
    del state["lm_head.weight"]
    path = export_random(tmp_path / "tied", state_dict=state)
    tensors, config = load_file(path / weights.SINGLE_FILE), read_json(path / "config.json")
    assert torch.equal(tensors[weights.LM_HEAD], tensors[weights.EMBEDDING])
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is True
    _, report = MODEL.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report


def test_a_head_trained_away_from_the_embedding_is_not_said_to_be_tied(tmp_path: Path) -> None:
    config = tiny_config(tiny_tokenizer().get_vocab_size(), tie_word_embeddings=True)
    written = read_json(export_random(tmp_path / "untied", config=config) / "config.json")
    assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is False


def test_shards_hold_what_one_file_holds(pristine: Path, tmp_path: Path) -> None:
    sharded = build_random_checkpoint(tmp_path / "sharded", num_padding_rows=10, max_shard_bytes=300_000).path
    files = weights.weight_files(sharded)
    assert len(files) > 2
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    whole = load_file(pristine / weights.SINGLE_FILE)
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    _, report = MODEL.from_pretrained(sharded, output_loading_info=True)
    assert not any(report.values()), report


def test_weights_are_converted_on_request(tmp_path: Path) -> None:
    path = build_random_checkpoint(tmp_path / "half", dtype=torch.bfloat16).path
    assert {entry.dtype for entry in weights.read_entries(weights.weight_files(path)).values()} == {"BF16"}
    assert read_json(path / "config.json")["dtype"] == "bfloat16"


def test_a_manifest_can_be_exported_again(pristine: Path, tmp_path: Path) -> None:
    first = open_checkpoint(pristine)
    again = export_random(
        tmp_path / "again",
        state_dict=load_file(pristine / weights.SINGLE_FILE),
        config=read_json(pristine / "config.json"),
        tokenizer_json=pristine / "tokenizer.json",
        manifest_fields=first.manifest.model_dump(mode="json"),
    )
    assert open_checkpoint(again).manifest_sha256 == first.manifest_sha256


def test_a_taken_name_is_kept_unless_told_otherwise(copy: Path) -> None:
    before = open_checkpoint(copy).manifest_sha256
    with pytest.raises(CheckpointError, match="exists already"):
        export_random(copy)
    assert open_checkpoint(copy).manifest_sha256 == before
    export_random(copy, overwrite=True)
    assert open_checkpoint(copy).manifest.name == "test"
    assert [path.name for path in copy.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state_dict": {"base_model.model.lm_head.weight": torch.zeros(1)}}, "contain an adapter"),
        ({"state_dict": {"vision_tower.weight": torch.zeros(1)}}, "not part of a Qwen2-Audio model"),
        ({"state_dict": {"lm_head.weight": torch.zeros(1)}}, "lack language_model.model.embed_tokens.weight"),
        ({"manifest_fields": {"name": "no/slash"}}, "not valid at name"),
        ({"manifest_fields": {"name": "a", "pauses": 3}}, "not valid at pauses"),
        ({"manifest_fields": {"name": "a", "pause": {"tau_pause": 0.1, "tau_abort": 0.2}}}, "tau_abort"),
        ({"manifest_fields": {"name": "a", "max_model_len": 4096}}, "above the model's 2048 positions"),
        ({"tokenizer_json": "{}"}, "not a tokenizer file"),
        ({"config": tiny_config(600) | {"auto_map": {"AutoModel": "model.Model"}}}, "asks to run code"),
        ({"config": tiny_config(600) | {"architectures": ["LlamaForCausalLM"]}}, "LlamaForCausalLM"),
    ],
)
def test_an_export_that_cannot_be_served_leaves_nothing_behind(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    state = random_model(tiny_config(tiny_tokenizer().get_vocab_size())).state_dict()
    with pytest.raises(CheckpointError, match=reason):
        export_random(tmp_path / "model", **({"state_dict": state} | changes))
    assert list(tmp_path.iterdir()) == []


def test_an_export_refuses_two_values_for_one_tensor_and_numbers_that_are_none(tmp_path: Path) -> None:
    state = random_model(tiny_config(tiny_tokenizer().get_vocab_size())).state_dict()
    twice = state | {"language_model.lm_head.weight": state["lm_head.weight"]}
    with pytest.raises(CheckpointError, match="twice"):
        export_random(tmp_path / "twice", state_dict=twice)
    with pytest.raises(CheckpointError, match="not finite"):
        export_random(tmp_path / "nan", state_dict=state | {"lm_head.weight": state["lm_head.weight"] * torch.nan})


def hide_behind_link(directory: Path) -> None:
    outside = directory.parent / "outside.json"
    (directory / "generation_config.json").rename(outside)
    (directory / "generation_config.json").symlink_to(outside)


def truncate_weights(directory: Path) -> None:
    path = directory / weights.SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(directory: Path) -> None:
    path = directory / weights.SINGLE_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rename_tensors(directory: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("language_model.model.")]:
            tensors[name.replace("language_model.model.", "language_model.model.model.")] = tensors.pop(name)

    edit_tensors(directory, rename)


def drop_a_tag_token(directory: Path) -> None:
    def drop(tokenizer: dict[str, Any]) -> None:
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<ENV>"]

    edit_json(directory / "tokenizer.json", drop)


def swap_two_tag_tokens(directory: Path) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        tokens = {token["content"]: token for token in tokenizer["added_tokens"]}
        tokens["<ENV>"]["content"], tokens["<ASR>"]["content"] = "<ASR>", "<ENV>"

    edit_json(directory / "tokenizer.json", swap)


def outgrow_the_embedding(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra {number}>" for number in range(11)])
    tokenizer.save(str(directory / "tokenizer.json"))


def in_manifest(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / MANIFEST_FILE, edit)


def in_config(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", edit)


def in_positions(*others: int, **fields: Any) -> Callable[[Path], None]:
    """Return an edit with one token per position of a pause of two, the pause token first."""

    def edit(manifest: dict[str, Any]) -> None:
        pause = manifest["pause"]
        pause.update({"latent_tokens": 2, "position_ids": [pause["open_id"], *others]} | fields)

    return in_manifest(edit)


def add_file(name: str, content: bytes = b"{}") -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


# Change to a whole checkpoint, whether its sums are updated, and the expected refusal.
REFUSALS: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "no directory": (shutil.rmtree, False, "the directory does not exist"),
    "no manifest": (lambda path: (path / MANIFEST_FILE).unlink(), False, "no hyper.json"),
    "manifest no JSON": (add_file(MANIFEST_FILE, b"\x80"), False, "hyper.json is not JSON"),
    "newer format": (
        in_manifest(lambda m: m.update(format_version=2)),
        False,
        "format_version 2; this release reads 1",
    ),
    "other schema": (in_manifest(lambda m: m["trace"].update(schema_version=9)), False, "schema version 9"),
    "unknown field": (in_manifest(lambda m: m.update(colour="red")), False, "not valid at colour"),
    "altered weights": (flip_a_bit, False, "model.safetensors does not have the sha256"),
    "altered config": (in_config(lambda c: c.update(note=1)), False, "config.json does not have the sha256"),
    "missing weights": (lambda path: (path / weights.SINGLE_FILE).unlink(), False, "model.safetensors is missing"),
    "missing file": (lambda path: (path / "chat_template.jinja").unlink(), False, "chat_template.jinja is missing"),
    "not listed": (in_manifest(lambda m: m["files"].pop("config.json")), False, "config.json is not listed"),
    "unlisted pickle": (add_file("training_args.bin", pickle.dumps({})), False, "training_args.bin is not listed"),
    "unlisted adapter": (add_file("adapter_config.json"), False, "adapter_config.json is not listed"),
    "unlisted weights": (add_file("more.safetensors"), False, "more.safetensors is not listed"),
    "unlisted directory": (lambda path: (path / "code").mkdir(), False, "code is not listed"),
    "listed pickle": (add_file("optimizer.pt", pickle.dumps({})), True, "optimizer.pt is of a kind"),
    "listed code": (add_file("modeling.py", b""), True, "modeling.py is of a kind"),
    "listed spare weights": (add_file("more.safetensors"), True, "differ from the files of the weights"),
    "pickle named safetensors": (add_file(weights.SINGLE_FILE, pickle.dumps({})), True, "not a whole safetensors"),
    "cut weights": (truncate_weights, True, "not a whole safetensors"),
    "path out": (in_manifest(lambda m: m["files"].update({"../x.json": "0" * 64})), False, "not a plain file name"),
    "link out": (hide_behind_link, False, "generation_config.json is a link that leaves"),
    "auto_map": (in_config(lambda c: c["text_config"].update(auto_map={"AutoConfig": "x.y"})), True, "run code"),
    "trust_remote_code": (
        lambda path: edit_json(path / "tokenizer_config.json", lambda c: c.update(trust_remote_code=True)),
        True,
        "tokenizer_config.json asks to run code",
    ),
    "other architecture": (in_config(lambda c: c.update(architectures=["Qwen2ForCausalLM"])), True, "Qwen2ForCausalLM"),
    "quantised": (in_config(lambda c: c.update(quantization_config={"bits": 4})), True, "quantised"),
    "fewer positions": (in_config(lambda c: c["text_config"].update(max_position_embeddings=9)), True, "9 positions"),
    "other heads": (in_config(lambda c: c["text_config"].update(head_dim=64)), True, "heads of 64"),
    "names vLLM refuses": (rename_tensors, True, "vLLM wants it named language_model.model."),
    "lacks a head": (
        lambda path: edit_tensors(path, lambda tensors: tensors.pop(weights.LM_HEAD)),
        True,
        "the weights lack language_model.lm_head.weight",
    ),
    "wrong shape": (
        lambda path: edit_tensors(path, lambda tensors: tensors.update({weights.LM_HEAD: torch.zeros(2, 2)})),
        True,
        r"lm_head.weight has shape \(2, 2\)",
    ),
    "tag missing in tokenizer": (drop_a_tag_token, True, "<ENV>"),
    "tag with another id": (swap_two_tag_tokens, True, "<ENV> is token"),
    "tag missing in manifest": (in_manifest(lambda m: m["trace"]["tags"].pop("ENV")), False, "tags of ENV"),
    "pause with another id": (in_manifest(lambda m: m["pause"].update(open_id=1)), False, "<PAUSE> is token"),
    "too few positions": (in_positions(), False, "position_ids are 1, but latent_tokens is 2"),
    "too many positions": (in_positions(65, 66), False, "position_ids are 3, but latent_tokens is 2"),
    "a position twice": (in_positions(65, 65, latent_tokens=3), False, "has an id twice"),
    "positions without the pause": (in_positions(position_ids=[65, 66]), False, "begin with open_id"),
    "positions with the end": (
        in_manifest(
            lambda m: m["pause"].update(
                latent_tokens=2, position_ids=[m["pause"][end] for end in ("open_id", "close_id")]
            )
        ),
        False,
        "close_id is none of them",
    ),
    "positions of sampled pauses": (in_positions(65, mode="sampled"), False, "of parallel pauses alone"),
    "a position that is a word": (in_positions(65), False, "token 65 is no special token"),
    "a position that is no token": (in_positions(10**6), False, "token 1000000 is no special token"),
    "a position that is a clip's": (
        in_positions(tiny_tokenizer().token_to_id(AUDIO) or 0),
        False,
        "is no special token",
    ),
    "audio with another id": (in_config(lambda c: c.update(audio_token_index=1)), True, r"<\|AUDIO\|> is token"),
    "more tokens than rows": (outgrow_the_embedding, True, "more tokens than the embedding has rows"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_damaged_checkpoint_is_refused_with_its_reason_and_code_78(
    case: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, sealed, reason = REFUSALS[case]
    damage(copy)
    if sealed:
        reseal(copy)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(copy)
    write_entry_points(tmp_path, {"checkpoint": "hyper_model.commands:checkpoint"})
    monkeypatch.syspath_prepend(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(["checkpoint", "verify", str(copy)])
    assert exit_info.value.code == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hyper: {copy}: ")


def test_only_sums_are_left_out_without_verify(copy: Path) -> None:
    flip_a_bit(copy)
    open_checkpoint(copy, verify=False)
    truncate_weights(copy)
    with pytest.raises(CheckpointError, match="not a whole safetensors"):
        open_checkpoint(copy, verify=False)


def test_papers_may_lie_beside_the_listed_files(copy: Path) -> None:
    (copy / "README.md").write_text("# A model card")
    (copy / "LICENSE").write_text("Apache-2.0")
    open_checkpoint(copy)


def test_opening_loads_neither_torch_nor_transformers(pristine: Path) -> None:
    code = (
        "import sys; from hyper_model.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1]);"
        "print([name for name in ('torch', 'transformers', 'vllm', 'fastapi') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(pristine)], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


VLLM_SCRIPT = """
import json, sys
import numpy as np

def main():
    from vllm import LLM, SamplingParams
    engine = LLM(sys.argv[1], enforce_eager=True, dtype="float32", max_model_len=2048, max_num_seqs=2,
                 limit_mm_per_prompt={"audio": 1})
    clip = np.load(sys.argv[2])
    prompt = {"prompt_token_ids": json.loads(sys.argv[3]), "multi_modal_data": {"audio": [(clip, 16000)]}}
    (reply,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True))
    logprobs = [next(iter(step.values())).logprob for step in reply.outputs[0].logprobs]
    print("RESULT" + json.dumps([list(reply.prompt_token_ids), list(reply.outputs[0].token_ids), logprobs]))

if __name__ == "__main__":
    main()
"""


def test_vllm_loads_an_export_and_answers_as_transformers_does(tmp_path: Path) -> None:
    # The rarest outputs of export: shards, unused rows, and a head equal to the embedding.
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer.get_vocab_size() + 10)
    state = random_model(config, seed=3).state_dict()
    del state["lm_head.weight"]
    path = export_random(tmp_path / "model", config=config, state_dict=state, max_shard_bytes=300_000)
    prompt = build_prompt(open_checkpoint(path).tokenizer, "What is heard?", choices=("one", "two"))
    (tmp_path / "ask.py").write_text(VLLM_SCRIPT)
    np.save(tmp_path / "clip.npy", CLIP_S)
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "ask.py"), str(path), str(tmp_path / "clip.npy"), json.dumps(prompt)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, ran.stdout[-2000:] + ran.stderr[-4000:]
    prompt_ids, token_ids, logprobs = json.loads(lines[0].removeprefix("RESULT"))
    assert len(prompt_ids) == len(prompt) - 1 + 50  # 25 tokens per second, two seconds

    model = MODEL.from_pretrained(path).eval()
    extract = PROCESSOR.from_pretrained(path).feature_extractor
    features = extract(CLIP_S, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    ids = torch.tensor([prompt_ids + token_ids])
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=features["input_features"],
            feature_attention_mask=features["attention_mask"],
        ).logits[0, len(prompt_ids) - 1 : -1]
    assert logits.argmax(-1).tolist() == token_ids
    expected = logits.log_softmax(-1)[range(len(token_ids)), token_ids]
    torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("folder", sorted((ROOT / "checkpoints").iterdir()), ids=lambda folder: folder.name)
def test_the_checkpoints_of_this_repository_are_whole_small_and_named_as_their_folders(folder: Path) -> None:
    # A folder holds a whole checkpoint or the trained parts of one.
    whole = (folder / "hyper.json").is_file()
    name = open_checkpoint(folder).manifest.name if whole else read_parts(folder).fields.name
    assert name == folder.name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 70_000_000
