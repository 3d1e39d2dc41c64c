"""A checkpoint with new position tokens gives the same output as before, or is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import Qwen2AudioForConditionalGeneration

from hyper_model import weights
from hyper_model.checkpoint import open_checkpoint, update_pause
from hyper_model.commands import checkpoint as command
from hyper_model.errors import CheckpointError
from hyper_model.pause import GateSettings
from hyper_model.positions import give_positions
from hyper_model.trace import build_prompt, position_tokens
from tests.builders import build_random_checkpoint

PAUSE = {"latent_tokens": 4, "max_pauses": 2, "tau_pause": 0.7}


@pytest.fixture(scope="module", params=[0, 1, 10], ids=["no-padding", "little-padding", "padding"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its conversion; its embedding may already have rows for some of the new tokens."""
    folder = tmp_path_factory.mktemp("positions")
    build_random_checkpoint(folder / "before", num_padding_rows=request.param, manifest_fields={"pause": PAUSE})
    (folder / "before/README.md").write_text("# A model card")
    give_positions(folder / "before", folder / "after")
    return folder / "before", folder / "after"


def test_it_differs_in_the_tokens_of_its_spans_alone(pair: tuple[Path, Path]) -> None:
    before, after = (open_checkpoint(path) for path in pair)
    ids = after.manifest.pause.position_ids
    assert ids is not None and before.manifest.pause.position_ids is None
    assert [after.tokenizer.tokenizer.id_to_token(each) for each in ids] == ["<PAUSE>", *position_tokens(4)]
    said = [each.manifest.model_dump(exclude={"files"}) for each in (before, after)]
    said[1]["pause"].pop("position_ids")
    assert said[0] == said[1]
    settings = GateSettings.of(after.manifest, after.tokenizer)
    assert settings is not None and settings.span_ids == ids == after.tokenizer.position_ids
    assert (pair[1] / "README.md").read_text() == "# A model card"


def test_every_position_begins_as_the_pause_token_and_nothing_else_changes(pair: tuple[Path, Path]) -> None:
    before, after = (weights.StoredTensors(weights.read_entries(weights.weight_files(path))) for path in pair)
    ids = open_checkpoint(pair[1]).tokenizer.position_ids
    assert set(before) == set(after)
    for name in before:
        if name in (weights.EMBEDDING, weights.LM_HEAD):
            assert len(after[name]) == max(len(before[name]), ids[-1] + 1)
            assert torch.equal(after[name][: ids[1]], before[name][: ids[1]])
            assert all(torch.equal(after[name][each], before[name][ids[0]]) for each in ids)
        else:
            assert torch.equal(after[name], before[name])


def test_the_model_computes_what_it_did_behind_a_span(pair: tuple[Path, Path]) -> None:
    found: list[torch.Tensor] = []
    num_tokens = open_checkpoint(pair[0]).tokenizer.vocab_size
    for path in pair:
        opened = open_checkpoint(path)
        model = Qwen2AudioForConditionalGeneration.from_pretrained(path).eval()
        settings = GateSettings.of(opened.manifest, opened.tokenizer)
        assert settings is not None
        prompt = [each for each in build_prompt(opened.tokenizer, "What?") if each != opened.tokenizer.audio_id]
        ids = torch.tensor([[*prompt, *settings.span_ids, *opened.tokenizer.encode_text("rain")]])
        with torch.no_grad():
            found.append(model(input_ids=ids).logits[..., :num_tokens])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_the_command_makes_one_and_info_says_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = CliRunner().invoke(command, ["positions", str(pair[0]), str(tmp_path / "out")])
    assert made.exit_code == 0, made.output
    assert open_checkpoint(tmp_path / "out").manifest_sha256 == open_checkpoint(pair[1]).manifest_sha256
    said = [CliRunner().invoke(command, ["info", str(path)]).output for path in pair]
    assert ["each position with a token of its own" in each for each in said] == [False, True]
    as_json = CliRunner().invoke(command, ["info", "--json", str(pair[0])]).output
    assert "position_ids" not in as_json, "releases that know none read what has none"


def test_where_there_are_no_copies_to_replace_it_says_so(tmp_path: Path) -> None:
    build_random_checkpoint(tmp_path / "before", manifest_fields={"pause": PAUSE})
    give_positions(tmp_path / "before", tmp_path / "after")
    with pytest.raises(CheckpointError, match="a token of its own already"):
        give_positions(tmp_path / "after", tmp_path / "again")
    with pytest.raises(CheckpointError, match="exists already"):
        give_positions(tmp_path / "before", tmp_path / "after")
    with pytest.raises(CheckpointError, match="position_ids are 4, but latent_tokens is 3"):
        update_pause(tmp_path / "after", {"latent_tokens": 3})
    assert open_checkpoint(tmp_path / "after").manifest.pause.latent_tokens == 4
    update_pause(tmp_path / "after", {"tau_pause": 0.9})
    assert len(open_checkpoint(tmp_path / "after").tokenizer.position_ids) == 4
    update_pause(tmp_path / "before", {"mode": "sampled"})
    with pytest.raises(CheckpointError, match="pauses are sampled"):
        give_positions(tmp_path / "before", tmp_path / "again")
    assert not (tmp_path / "again").exists()
