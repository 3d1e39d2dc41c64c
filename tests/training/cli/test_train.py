"""`hyper train` in use: refusals before the start, and results at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from hyper_model.checkpoint import open_checkpoint
from tests.paths import CLIPS
from tests.process import ROOT
from tests.training_data import write_clips, write_encoder
from training.cli.train import train, usable_examples
from training.data.sources.downloads import ENCODER_FILE
from training.recipes import RECIPES
from training.trainer import read_left_out, read_log

MINI = ROOT / "checkpoints/hyper-mini"
ROW = {"audio": "no-such-clip.wav", "question": "Who speaks?", "answer": "one", "choices": "one|two"}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(train, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = write_clips(tmp_path_factory.mktemp("work"))
    write_encoder(work / "assets" / ENCODER_FILE)
    return work


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.csv"
    file.write_text(f"{','.join(ROW)}\n{','.join(ROW.values())}\n")
    return file


def test_a_run_ends_with_a_checkpoint_that_has_a_card_and_a_name(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "my model"
    ran = run("debug", tmp_path / "run", "--work", work, "--export", out)
    assert ran.exit_code == 0, ran.output
    assert f"hyper checkpoint calibrate {out} --max-pauses 3" in ran.output
    manifest = open_checkpoint(out).manifest
    assert manifest.name == "my-model" and manifest.data_card == "README.md"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# my-model\n") and "recipe `debug`, after step 6 of 6." in card and "| loss |" in card
    assert (tmp_path / "run/report.md").exists() and len(read_log(tmp_path / "run")) == 6

    # Later calibrated thresholds survive the same command.
    said = json.loads((out / "hyper.json").read_text())
    said["name"] = "calibrated"
    (out / "hyper.json").write_text(json.dumps(said))
    again = run("debug", tmp_path / "run", "--work", work, "--export", out, "--overwrite", "--resume")
    assert again.exit_code == 0 and "is finished" in again.output
    assert open_checkpoint(out).manifest.name == "calibrated"
    # An export of another run, or of an earlier step, is overwritten on request.
    said["recipe"] = "{}"
    (out / "hyper.json").write_text(json.dumps(said))
    assert run("debug", tmp_path / "run", "--work", work, "--export", out, "--resume").exit_code != 0
    over = run("debug", tmp_path / "run", "--work", work, "--export", out, "--overwrite", "--resume")
    assert over.exit_code == 0 and open_checkpoint(out).manifest.name == "my-model"


def test_only_exporting_goes_by_the_run_and_leaves_it_as_it_is(work: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changed = ("--set", "num_steps=3", "--set", "dropout_states=0.1")
    assert run("debug", run_dir, "--work", work, *changed).exit_code == 0
    # As while the next one is written.
    (run_dir / "checkpoint-6").mkdir()
    ran = run("debug", run_dir, "--work", work, "--export-only", "--export", tmp_path / "out", "--name", "early")
    assert ran.exit_code == 0, ran.output
    manifest = open_checkpoint(tmp_path / "out").manifest
    assert manifest.name == "early" and json.loads(manifest.recipe or "")["dropout_states"] == 0.1
    assert (run_dir / "checkpoint-6").is_dir()
    for more, said in (
        (("--set", "num_steps=9"), "omit --set"),
        (("--base", MINI), "was started with origin.base"),
    ):
        refused = run("debug", run_dir, "--work", work, "--export-only", "--export", tmp_path / "other", *more)
        assert refused.exit_code != 0 and said in f"{refused.output} {refused.exception}"
    (run_dir / "report.md").unlink()
    reported = run("debug", run_dir, "--export-only")
    assert "At step 3 of 3." in reported.output and (run_dir / "report.md").exists()
    assert (
        "is a run of recipe debug" in run("mini_sft", run_dir, "--export-only", "--export", tmp_path / "other").output
    )


def test_what_cannot_be_trained_is_said_and_the_folder_stays_free(work: Path, rows: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for arguments, said in (
        (("qwen2_audio_7b_sft", "--base", MINI, "--data", rows), "--processes N or torchrun"),
        (("qwen2_audio_7b_grpo", "--base", MINI), "--set fsdp="),
        (("debug_grpo", "--base", MINI, "--data", rows), "1 of 1 clips are missing or unusable"),
        (("mini_finetune", "--base", MINI, "--data", rows), "no example with a gold completion"),
        (("mini_finetune", "--base", MINI), "set --data"),
        (("mini_grpo",), "set --base"),
        (("mini_grpo", "--base", MINI, "--set", "wanted_pause=1"), "NAME must be one of seed, num_steps"),
        (("debug", "--name", "my model"), "letters, digits"),
        (("debug", "--set", "name=other"), "NAME must be one of seed"),
        (("debug", "--set", 'lora={"rank": 4, "alpha": 8}'), "use lora with recipes that train a --base"),
        (("nonsense",), "is none of mini_sft"),
    ):
        recipe, *more = arguments
        ran = run(recipe, run_dir, "--work", work, *more)
        assert ran.exit_code != 0 and said in f"{ran.output} {ran.exception}", (arguments, ran.output, ran.exception)
        assert not list(run_dir.glob("*")), arguments
    # Its remains do not block a valid run.
    assert run("debug", run_dir, "--work", work, "--set", "num_steps=1").exit_code == 0


def test_bad_rows_are_left_out_by_name_and_the_run_records_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = (CLIPS / "one-voice-word.flac").read_bytes()
    (tmp_path / "good.flac").write_bytes(clip)
    (tmp_path / "cut.flac").write_bytes(clip[:20_000])
    row = {"question": "Who?", "answer": "Felix"}
    names = ["good.flac", "gone.flac", "cut.flac"]
    rows = [*({"file": name, **row} for name in names), {"file": "good.flac", "question": "", "answer": "x"}]
    rows.append({"file": "good.flac", "question": "Who?"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    recipe: Any = RECIPES["debug_grpo"]()
    with pytest.raises(click.ClickException, match=r"1 of 3 clips.*line 2: .*gone.flac is missing.*--skip-bad-rows"):
        usable_examples(file, None, recipe, run_dir, skips_bad_clips=False)
    usable = usable_examples(file, None, recipe, run_dir, skips_bad_clips=True)
    assert [example.audio.name for example in usable] == ["good.flac"]
    left_out = read_left_out(run_dir)
    assert sorted(int(place.rpartition(" ")[2]) for place in left_out) == [2, 3, 4, 5]
    assert "4 of 5 rows left out" in capsys.readouterr().err
