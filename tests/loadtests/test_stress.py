"""The stress command: its figures, its stored results, and the sensitivity of its checks."""

from __future__ import annotations

import itertools
import json
import socket
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from loadtests import hostile
from loadtests.__main__ import main
from loadtests.scenarios import AIMS, Figure
from loadtests.stress import PARTS, Canary, Listener, StressRun, read_part, reading_is_noted, run
from tests.paths import CLIPS as ASSETS
from tests.serving import wait_for


def stress(*arguments: str) -> tuple[int, dict[str, float], str]:
    result = CliRunner().invoke(main, ["stress", "--quick", "--clips", str(ASSETS), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return result.exit_code, json.loads(lines[-1]) if lines else {}, result.output


def test_hostile_files_reach_nothing_and_what_was_found_is_kept(tmp_path: Path) -> None:
    arguments = ["--part", "files", "--files", "80", "--out", str(tmp_path)]
    code, figures, output = stress(*arguments)
    assert code == 0, output
    assert (figures["audio_5xx"], figures["decoder_outbound"], figures["foreign_reads"]) == (0, 0, 0)
    assert 20 < figures["decode_peak_mib"] <= 256 and figures["traps_sprung_unboxed"] >= 1
    kept = json.loads((tmp_path / "files.json").read_text())
    assert kept["figures"]["audio_5xx"] == {"value": 0, "of": 80, "aim": "<= 0"}
    assert sum(kept["details"]["statuses"].values()) == 80 and kept["details"]["decoder_state"]["Seccomp"] == "2"
    assert json.loads((tmp_path / "stress.json").read_text())["audio_5xx"]["of"] == 80
    again = stress(*arguments)
    assert again[:2] == (code, figures) and "files: kept from" in again[2]


def test_a_part_that_there_is_not_is_a_usage_error(tmp_path: Path) -> None:
    code, _, output = stress("--part", "nothing", "--out", str(tmp_path))
    assert code == 2 and "overload" in output
    assert all(f"\n  {name} " in CliRunner().invoke(main, ["stress", "--help"]).output for name in PARTS)


def test_a_missed_aim_and_a_part_without_a_result_show_in_the_exit_code(tmp_path: Path) -> None:
    setup = StressRun(tmp_path, ASSETS, 10, 10, 1, True, "scripted", say=lambda text: None)
    (tmp_path / "auth.json").write_text(
        json.dumps(
            {
                "asked": setup.asked_of("auth"),
                "figures": {"unauthenticated_reached": {"value": 2, "of": 9, "aim": "<= 0"}},
                "machine": {"time": "then"},
            }
        )
    )
    assert run(setup, ["auth"]) == ([Figure("unauthenticated_reached", 2, 9)], {})
    code, _, output = stress("--seed", "1", "--part", "auth", "--out", str(tmp_path))
    assert code == 1 and "MISSED" in output
    assert read_part(setup, "files") is None
    # A result with another seed does not belong to this run.
    other = StressRun(tmp_path, ASSETS, 10, 10, 2, True, "scripted", say=lambda text: None)
    assert read_part(other, "auth") is None


def test_every_aim_of_torture_is_known() -> None:
    promised = "audio_5xx decoder_outbound foreign_reads decode_peak_mib http_5xx unauthenticated_reached".split()
    assert set(promised) <= set(AIMS) and {"sandbox_overhead_ms", "rss_growth_mib_10k", "sigterm_lost"} <= set(AIMS)


def test_whoever_calls_is_counted() -> None:
    with Listener() as listener, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        socket.create_connection(("127.0.0.1", listener.port)).close()
        udp.sendto(b"x", ("127.0.0.1", listener.port))
        wait_for(lambda: listener.num_calls == 2)


def test_whoever_reads_the_canary_is_noticed(tmp_path: Path) -> None:
    canary = Canary(tmp_path)
    assert not canary.was_read()
    canary.path.read_bytes()
    assert canary.was_read() or not reading_is_noted(tmp_path)
    assert canary.is_in(httpx.Response(400, text=f"no clip: {canary.word}"))
    assert canary.is_in(httpx.Response(200, text='{"audio": [{"sample_rate_hz": 12345, "channels": 1}]}'))
    assert not canary.is_in(httpx.Response(200, text='{"audio": [{"sample_rate_hz": 16000}]}'))


def test_hostile_files_are_the_same_every_time_and_of_every_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"wav": hostile.wave(bytes(6_400)), "flac": hostile.flac_head(8_000, 1, 0) + bytes(400)}

    def some(num: int) -> list[tuple[str, bytes]]:
        return list(hostile.files(good, tmp_path, 9, tmp_path / "secret", num, 7, has_silences=False))

    found = some(2_000)
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.0)
    assert len(found) == 2_000 and found == some(2_000)
    names = [name for name, _ in found]
    assert len(set(names)) == len(names)
    for kind in (
        "hls as",
        "mp4 that refers",
        "not a number",
        "in gzip",
        "65535 channels",
        "flac, seed",
        "sdp as ogg, seed",
    ):
        assert any(kind in name for name in names), kind
    assert len(some(50)) == 50
    for name, data in itertools.islice(found, 400):
        assert len(data) <= 25 * 2**20, name
