"""`hyper ask`: output, exit codes, standard input, folders."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hyper.commands import ask
from hyper_model.proxies import proxy_for
from server import api_keys
from tests.client.replies import Canned, replying
from tests.paths import CLIPS
from tests.serving import Live, running, scripted, tone

COMMAND = (sys.executable, "-c", "from hyper.commands import ask; ask()")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "tone.wav"
    path.write_bytes(tone(2.0))
    return path


def run_ask(*arguments: str, **options: object) -> Result:
    return CliRunner().invoke(ask, arguments, **options)  # pyright: ignore[reportArgumentType]


def test_ask_prints_the_answer_and_what_it_stands_on(live: Live, clip: Path) -> None:
    result = run_ask(str(clip), "What is heard?", "--url", live.url)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "2.0 s of loud sound"
    assert any("background:" in line and "loud sound" in line for line in lines)


def test_ask_offers_choices(live: Live, clip: Path) -> None:
    result = run_ask(str(clip), "What is it?", "--choice", "a bell", "--choice", "a dog", "--url", live.url)
    assert result.output.splitlines()[0].split("  (")[0] in ("a bell", "a dog") and "%)" in result.output


def test_ask_prints_the_windows_of_a_recording(live: Live, tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    path.write_bytes(tone(50.0))
    refused = run_ask(str(path), "What is heard?", "--url", live.url)
    assert refused.exit_code == 1 and "long_audio=chunk" in refused.output
    lines = run_ask(str(path), "What is heard?", "--timeline", "--url", live.url).output.splitlines()
    windows = [line for line in lines if line.startswith("* ")]
    assert len(windows) == 3 and windows[0].startswith("* 0:00.0 to 0:") and windows[1].endswith("loud sound")
    assert any(line.startswith("  evidence:") for line in lines)
    streamed = run_ask(str(path), "What is it?", "--stream", "--long-audio", "chunk", "--url", live.url).output
    assert "window 3 of 3: done" in streamed
    part = run_ask(str(path), "What?", "--long-audio", "window", "--start", "45", "--json", "--url", live.url)
    assert json.loads(part.output)["audio"][0]["start_s"] == 45


def test_ask_prints_json(live: Live, clip: Path) -> None:
    reply = json.loads(run_ask(str(clip), "What is heard?", "--json", "--url", live.url).output)
    assert reply["answer"]["text"] == "2.0 s of loud sound"


def test_ask_streams(live: Live, clip: Path) -> None:
    result = run_ask(str(clip), "What is heard?", "--stream", "--url", live.url)
    assert "[PLANNING] Measure" in result.output and result.output.rstrip().endswith("2.0 s of loud sound")
    lines = run_ask(str(clip), "What is heard?", "--stream", "--json", "--url", live.url).output.splitlines()
    assert json.loads(lines[0])["event"] == "section.start" and json.loads(lines[-1])["event"] == "done"


def test_ask_says_why_there_is_no_answer(live: Live, clip: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no audio")
    result = run_ask(str(text), "What is heard?", "--url", live.url)
    assert result.exit_code == 1 and "error: " in result.output and "Traceback" not in result.output
    result = run_ask(str(clip), "What is heard?", "--choice", "only one", "--url", live.url)
    assert result.exit_code == 1 and "choices" in result.output
    result = run_ask(str(clip), "What is heard?", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1 and "hyper serve" in result.output
    assert run_ask(str(tmp_path / "none.wav"), "What?").exit_code == 2


@pytest.mark.parametrize(
    "url", ["http://[", "http://x:99999999", "http://127.0.0.1:99999", "nonsense", "http://x\0y", ""]
)
def test_ask_names_an_address_that_is_none(clip: Path, url: str) -> None:
    assert_one_line(run_ask(str(clip), "What is heard?", "--url", url), url.partition("\0")[0])


@pytest.mark.parametrize(
    "body",
    [b"<html>welcome</html>", b"[]", b"{}", b'{"object": "chat.completion"}', b'{"object": "audio.qa"}', b"\xff", b"1"],
)
@pytest.mark.parametrize("options", [(), ("--json",), ("--stream",), ("--stream", "--json")])
def test_ask_says_that_another_service_answers(clip: Path, body: bytes, options: tuple[str, ...]) -> None:
    if options == ("--json",) and b"audio.qa" in body:
        return
    for reply in (body, b"event: done\ndata: " + body + b"\n\n", b"event: error\ndata: " + body + b"\n\n"):
        if reply.startswith(b"event: done") and options:
            continue
        with replying(Canned(reply)) as sent:
            assert_one_line(run_ask(str(clip), "What is heard?", "--url", sent.url, *options), "hyper serve")


def assert_one_line(result: Result, named: str) -> None:
    """Check that a command ended with one line and this text in it."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result
    lines = result.output.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], result.output


def test_help_is_quick_and_describes_the_clip() -> None:
    assert "CLIP QUESTION" in run_ask("--help").output
    code = "import sys, hyper.commands; print(sorted({'pydantic', 'httpx', 'numpy', 'server'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize("from_", ["a pipe", "standard input"])
@pytest.mark.parametrize("options", [(), ("--stream",)])
def test_ask_takes_a_clip_from_a_pipe_and_from_standard_input(
    live: Live, clip: Path, from_: str, options: tuple[str, ...]
) -> None:
    source = f"<(cat {clip})" if from_ == "a pipe" else f"- < {clip}"
    name, _, redirection = source.partition(" < ")
    command = f"{shlex.join(COMMAND)} {name} 'What is heard?' --url {live.url} {' '.join(options)}"
    command += f" < {redirection}" if redirection else ""
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "2.0 s of loud sound" in ran.stdout, ran.stderr


def test_ask_names_an_empty_pipe_and_an_unreadable_file(live: Live, clip: Path, tmp_path: Path) -> None:
    for source, words in (("- < /dev/null", "standard input is empty"), ("<(true)", "is empty")):
        name, _, redirection = source.partition(" < ")
        command = f"{shlex.join(COMMAND)} {name} 'What?' --url {live.url}"
        command += f" < {redirection}" if redirection else ""
        ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert ran.returncode == 1 and words in ran.stderr and "Traceback" not in ran.stderr
    odd = tmp_path / 'été \u2028\n"x".wav'
    odd.write_bytes(clip.read_bytes())
    assert run_ask(str(odd), "What is heard?", "--url", live.url).exit_code == 0
    assert_one_line(run_ask(str(clip), "What \udcff?", "--url", live.url), "UTF-8")


@pytest.mark.parametrize(
    "proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:9", "nonsense://x", "http://a:b@[::1", "x y"]
)
@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTP_PROXY", "all_proxy", "http_proxy"])
def test_ask_bypasses_every_proxy_for_a_local_address(
    live: Live, clip: Path, monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str
) -> None:
    monkeypatch.setenv(variable, proxy)
    result = run_ask(str(clip), "What is heard?", "--url", live.url)
    assert result.exit_code == 0, result.output
    assert run_ask(str(clip), "?", "--url", live.url.replace("127.0.0.1", "localhost")).exit_code == 0
    for host in ("localhost.", "hyper.localhost", "127.9.9.9", "[::1]", "0.0.0.0"):
        assert proxy_for(f"http://{host}:8000") is None, host


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("socks5://user:secret@127.0.0.1:9", "socks5"),
        ("nonsense://x", "nonsense"),
        ("http://127.0.0.1:9", "127.0.0.1:9"),
        ("http://[::1", "not an address"),
        ("http://127.0.0.1:port", "not an address"),
    ],
)
def test_ask_names_a_proxy_that_cannot_be_used(
    clip: Path, monkeypatch: pytest.MonkeyPatch, proxy: str, words: str
) -> None:
    for variable in ("ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(variable, proxy)
        result = run_ask(str(clip), "What is heard?", "--url", "http://hyper.example:8000")
        assert_one_line(result, words)
        assert variable in result.output and "NO_PROXY=hyper.example" in result.output and "secret" not in result.output
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "\n", " "])
def test_an_address_may_end_as_other_programs_write_it(live: Live, clip: Path, end: str) -> None:
    assert run_ask(str(clip), "What?", env={"HYPER_URL": live.url + end}).exit_code == 0
    assert run_ask(str(clip), "What?", "--url", live.url + end).exit_code == 0


@pytest.mark.parametrize("key", ["hyp_1\n", " hyp_1", "hyp_1 \r\n", "\thyp_1"])
def test_white_space_around_a_key_is_no_part_of_it(clip: Path, key: str) -> None:
    with replying(Canned(b"{}")) as sent:
        run_ask(str(clip), "What?", "--url", sent.url, env={"HYPER_API_KEY": key})
        run_ask(str(clip), "What?", "--url", sent.url, "--key", key)
    assert [headers["authorization"] for headers in sent.headers] == ["Bearer hyp_1"] * 2


@pytest.mark.parametrize(
    ("redirection", "words"),
    [
        ("<&-", "standard input is closed"),
        ("< /dev/null", "standard input is empty"),
        ("< {clip} > /dev/full", "output cannot be written"),
    ],
)
def test_the_true_side_of_a_failed_pipe_is_named(live: Live, clip: Path, redirection: str, words: str) -> None:
    command = f"{shlex.join(COMMAND)} - 'What?' --url {live.url} {redirection.format(clip=clip)}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and words in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


def test_a_reader_that_leaves_ends_the_command_without_a_message(live: Live, clip: Path) -> None:
    for options in ("--stream", "--json"):
        command = f"{shlex.join(COMMAND)} {clip} 'What?' --url {live.url} {options} | true"
        ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert ran.stderr == "", ran.stderr


def test_a_pipe_without_an_end_is_refused(live: Live, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyper.commands.MAX_PIPE_BYTES", 2**20)
    assert_one_line(run_ask("/dev/zero", "What?", "--url", live.url), "does not end within 1 MiB")


def test_a_link_to_nothing_in_a_folder_is_a_line_with_the_error(live: Live, clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "a.wav").write_bytes(clip.read_bytes())
    (folder / "b.wav").symlink_to("/nowhere/b.wav")
    (folder / "c.wav").symlink_to("c.wav")
    result = run_ask(str(folder), "What?", "--url", live.url)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["clip"] for line in lines] == ["a.wav", "b.wav", "c.wav"] and result.exit_code == 1
    assert [line["error"]["code"] for line in lines[1:]] == ["unreadable_file"] * 2


def test_the_key_comes_from_either_variable(clip: Path) -> None:
    for name in ("HYPER_API_KEY", "HYPER_KEY"):
        with replying(Canned(b"{}")) as sent:
            run_ask(str(clip), "What is heard?", "--url", sent.url, env={name: "hyp_1"})
        assert sent.headers[0]["authorization"] == "Bearer hyp_1"


def test_a_folder_gives_one_line_per_clip_in_the_order_of_the_paths(live: Live, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b/two.wav", "a.wav", "c ü.wav", ".hidden/x.wav", ".DS_Store"):
        (tmp_path / name).write_bytes(tone(1.0))
    result = run_ask(str(tmp_path), "Which?", "--choice", "yes", "--choice", "no", "--url", live.url)
    assert result.exit_code == 0 and result.stderr == ""
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["clip"] for row in rows] == ["a.wav", "b/two.wav", "c ü.wav"]
    assert all(row["reply"]["answer"]["text"] in ("yes", "no") for row in rows)


def test_a_clip_without_an_answer_is_a_line_with_the_error(live: Live, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(tone(1.0))
    (tmp_path / "b.txt").write_text("notes")
    result = run_ask(str(tmp_path), "What is heard?", "--url", live.url, "--parallel", "1")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1 and result.stderr == "error: 1 of 2 clips have no answer.\n"
    assert [sorted(row) for row in rows] == [["clip", "reply"], ["clip", "error"]]
    assert rows[1]["error"]["code"] == "unsupported_audio" and rows[1]["error"]["param"] == "file"


def test_a_folder_needs_files_and_a_service(tmp_path: Path, live: Live) -> None:
    assert_one_line(run_ask(str(tmp_path), "What?", "--url", live.url), "has no files")
    (tmp_path / "a.wav").write_bytes(tone(1.0))
    assert run_ask(str(tmp_path), "What?", "--stream", "--url", live.url).exit_code == 2
    (tmp_path / "keys").mkdir()
    path = tmp_path / "keys" / "keys.json"
    api_keys.add(path, name="anna", scopes=("ask",), expires=None)
    with running(scripted(key_file=path)) as guarded:
        assert_one_line(run_ask(str(tmp_path), "What?", "--url", guarded.url, "--key", "hyp_wrong"), "API key")


def test_a_terminal_shows_the_progress_of_a_folder(live: Live, tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.wav").write_bytes(tone(1.0))
    terminal, child = pty.openpty()
    command = [*COMMAND, str(tmp_path), "What is heard?", "--url", live.url]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=child, text=True, check=True)
    os.close(child)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert "clips" in shown and "3/3" in shown
    assert len(done.stdout.splitlines()) == 3


def test_real_clips_of_every_format_are_read(live: Live) -> None:
    result = run_ask(str(CLIPS), "What is heard?", "--url", live.url)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    refused = [row["clip"] for row in rows if "error" in row]
    assert refused == ["truth.json"] and len(rows) == len(list(CLIPS.iterdir()))
