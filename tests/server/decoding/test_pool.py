"""The decoder sandbox: results equal those outside it, and a compromised decoder can do nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hyper_model.audio import AudioLimits, Waveform, decode, find_ffmpeg
from hyper_model.errors import AudioError, AudioTooLargeError, InvalidAudioError, UnsupportedAudioError
from server.decoding.pool import DecoderPool
from server.telemetry.labels import WorkerFailure
from tests import hostile_decoder
from tests.hostile_decoder import ATTEMPTS, ENDLESS, FATAL, LIES, NOT_STOPPED, ODD
from tests.paths import CLIPS as CLIP_FOLDER
from tests.serving import mp3, tone

CLIPS = sorted(path for path in CLIP_FOLDER.iterdir() if path.suffix != ".json")
MEMORY_BYTES = 256 * 2**20


@asynccontextmanager
async def boxed(
    program: str = "server.decoding.worker", **limits: Any
) -> AsyncGenerator[tuple[DecoderPool, list[WorkerFailure]]]:
    """Start a decoder pool, and record the reasons of dead workers."""
    deaths: list[WorkerFailure] = []
    box = DecoderPool(AudioLimits(**limits), memory_bytes=MEMORY_BYTES, on_death=deaths.append, program=program)
    await box.start()
    try:
        yield box, deaths
    finally:
        await box.stop()


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def order(name: str) -> bytes:
    """Return a "clip" for the hostile decoder."""
    return b"RIFF\0\0\0\0WAVE" + name.encode()


@pytest.fixture
def canary() -> Iterator[socket.socket]:
    """A forbidden file and a forbidden port."""
    path = Path("/tmp/hyper-canary")
    path.write_bytes(hostile_decoder.SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server
    assert path.read_bytes() == hostile_decoder.SECRET
    path.unlink()


def test_clips_sound_the_same_inside_the_box() -> None:
    async def work() -> None:
        async with boxed() as (box, deaths):
            assert box.is_closed and {"landlock", "seccomp"} <= set(box.layers)
            for path in CLIPS:
                inside, outside = await box.decode(path.read_bytes()), decode(path.read_bytes())
                assert inside.sha256 == outside.sha256
                assert (inside.codec, inside.source_sample_rate_hz, inside.source_channels) == (
                    outside.codec,
                    outside.source_sample_rate_hz,
                    outside.source_channels,
                )
            assert not deaths

    run(work)


def test_refusals_come_out_as_they_went_in() -> None:
    bad = [b"", b"text", mp3()[:200], tone(0.01), tone(3.0), b"OggS" + bytes(80), b"%PDF-1.7"]

    async def work() -> None:
        async with boxed(max_duration_s=2.0) as (box, deaths):
            for data in bad:
                with pytest.raises(AudioError) as outside:
                    decode(data, box.limits)
                with pytest.raises(AudioError) as inside:
                    await box.decode(data)
                assert type(inside.value) is type(outside.value)
                assert vars(inside.value) == vars(outside.value)
            assert not deaths

    run(work)


def test_a_clip_over_the_limit_or_no_clip_at_all_is_refused_without_a_worker() -> None:
    async def work() -> None:
        box = DecoderPool(AudioLimits(max_bytes=100), memory_bytes=MEMORY_BYTES)
        with pytest.raises(AudioTooLargeError):
            await box.decode(bytes(101))
        with pytest.raises(UnsupportedAudioError):
            await box.decode(b"#EXTM3U\nhttp://127.0.0.1/\n")

    run(work)


def test_a_decoder_that_was_taken_over_gets_nowhere(canary: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt is stopped by an error; none merely lacks an effect."""
    monkeypatch.setenv("HYPER_SECRET", "hyp_key")

    async def work() -> None:
        async with boxed("tests.hostile_decoder") as (box, deaths):
            stopped_by = {name: (await box.decode(order(name))).num_samples for name in ATTEMPTS}
            assert NOT_STOPPED not in stopped_by.values(), stopped_by
            assert set(stopped_by.values()) <= {errno.EPERM, errno.EACCES, errno.ENOMEM, errno.EMFILE}, stopped_by
            assert not deaths
            # Only root can inspect it: it is not dumpable.
            if os.geteuid() == 0:
                assert b"hyp_key" not in Path(f"/proc/{helper(box)}/environ").read_bytes()
                assert len(list(Path(f"/proc/{helper(box)}/fd").iterdir())) == 4

    run(work)
    with pytest.raises(BlockingIOError):
        canary.accept()
    assert not Path("/tmp/hyper-decoder-was-here").exists()


@pytest.mark.parametrize("name", ENDLESS)
def test_a_decoder_that_never_ends_is_killed_in_time(name: str) -> None:
    async def work() -> None:
        async with boxed("tests.hostile_decoder", decode_timeout_s=0.2) as (box, deaths):
            with pytest.raises(InvalidAudioError) as caught:
                await box.decode(order(name))
            assert caught.value.code == "decode_timeout"
            assert len(deaths) == 1
            await no_worker_is_left(box)

    run(work)


@pytest.mark.parametrize("name", [*FATAL, *LIES, "not numbers"])
def test_a_decoder_that_dies_or_lies_is_a_damaged_clip(name: str) -> None:
    async def work() -> None:
        async with boxed("tests.hostile_decoder") as (box, deaths):
            with pytest.raises(InvalidAudioError) as caught:
                await box.decode(order(name))
            assert caught.value.code == "damaged_audio" and "0x" not in str(vars(caught.value))
            assert len(deaths) == 1
            assert (await box.decode(order("execute"))).num_samples == errno.EPERM, "the next clip is served"
            await no_worker_is_left(box)

    run(work)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_that_no_decoder_expects_is_no_attack(name: str) -> None:
    async def work() -> None:
        async with boxed("tests.hostile_decoder") as (box, deaths):
            with pytest.raises(InvalidAudioError) as caught:
                await box.decode(order(name))
            assert caught.value.code == "damaged_audio"
            assert deaths == ["odd_file" if "import" in name else "out_of_memory"]

    run(work)


def test_a_caller_that_leaves_takes_its_worker_along() -> None:
    async def work() -> None:
        async with boxed("tests.hostile_decoder") as (box, deaths):
            tasks = [asyncio.create_task(box.decode(order("loop"))) for _ in range(4)]
            await asyncio.sleep(0.3)
            assert len(workers(box)) == 4
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await no_worker_is_left(box)
            assert not deaths

    run(work)


def test_a_helper_that_is_gone_is_started_again() -> None:
    async def work() -> None:
        async with boxed() as (box, _):
            assert box.process is not None
            box.process.send_signal(signal.SIGKILL)
            box.process.wait()
            clips: list[Waveform] = await asyncio.gather(*(box.decode(tone()) for _ in range(4)))
            assert {clip.duration_s for clip in clips} == {1.0}

    run(work)


def test_workers_end_with_the_box() -> None:
    async def work() -> None:
        async with boxed("tests.hostile_decoder") as (box, _):
            task = asyncio.create_task(box.decode(order("sleep")))
            await asyncio.sleep(0.3)
            (pid,) = workers(box)
            await box.stop()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0.1)
            assert not Path(f"/proc/{pid}").exists()

    run(work)


def test_descriptors_do_not_pile_up() -> None:
    async def work() -> None:
        async with boxed() as (box, _):
            await box.decode(tone())
            before = len(os.listdir("/proc/self/fd"))
            for data in [tone(), mp3()[:300], tone(0.01)] * 10:
                await asyncio.gather(box.decode(data), return_exceptions=True)
            assert len(os.listdir("/proc/self/fd")) == before
            await no_worker_is_left(box)

    run(work)


START_ELSEWHERE = """
import asyncio
from hyper_model.audio import AudioLimits
from server.decoding.pool import DecoderPool

async def work():
    box = DecoderPool(AudioLimits(), memory_bytes=2**28)
    await box.start()
    print(*box.layers)
    await box.stop()

asyncio.run(work())
"""


def test_bubblewrap_is_used_wherever_the_service_is_started(tmp_path: Path) -> None:
    """An editable install is found by a hook, so outside the checkout no folder of `sys.path` contains our packages."""
    if (
        not shutil.which("bwrap")
        or subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]).returncode
    ):
        pytest.skip("needs bubblewrap that may make namespaces")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", START_ELSEWHERE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout.split()[:1] == ["bubblewrap"], ran.stderr
    assert not ran.stderr


def children(pid: int) -> list[int]:
    """Return a process's children, including zombies."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def helper(box: DecoderPool) -> int:
    """Return the helper's process id; bubblewrap, if installed, is two processes above it."""
    assert box.process is not None
    pid = box.process.pid
    while "bubblewrap" in box.layers and b"bwrap" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
        (pid,) = children(pid)
    return pid


def workers(box: DecoderPool) -> list[int]:
    """Return the helper's workers."""
    return children(helper(box))


async def no_worker_is_left(box: DecoderPool) -> None:
    """Wait until the last worker is gone."""
    for _ in range(100):
        if not workers(box):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"still there: {workers(box)}")


LONG_CLIPS = {
    "25 MB of wav": ("r=44100:cl=stereo", 148, "wav", "pcm_s16le"),
    "ten minutes of flac": ("r=48000:cl=mono", 599, "flac", "flac"),
    "ten minutes of m4a": ("r=8000:cl=mono", 599, "ipod", "aac"),
    "a bomb of flac": ("r=192000:cl=7.1", 100, "flac", "flac"),
}


def test_the_box_costs_little_time_and_memory(tmp_path: Path) -> None:
    """Print the figures; the bounds are for a busy machine."""

    async def work() -> None:
        async with boxed() as (box, deaths):
            overheads_ms: list[float] = []
            for path in CLIPS:
                data = path.read_bytes()
                for _ in range(5):
                    started_s = time.perf_counter()
                    decode(data)
                    middle_s = time.perf_counter()
                    await box.decode(data)
                    overheads_ms.append(1000 * (time.perf_counter() - middle_s - (middle_s - started_s)))
            peaks_mib: dict[str, float] = {}
            for name, (source, seconds, container, codec) in LONG_CLIPS.items():
                file = tmp_path / name.replace(" ", "-")
                arguments = ["-f", "lavfi", "-i", f"anullsrc={source}", "-t", str(seconds), "-c:a", codec]
                command = [find_ffmpeg(), "-v", "error", *arguments, "-f", container, str(file)]
                subprocess.run(command, check=True)
                box.peak_bytes = 0
                (outcome,) = await asyncio.gather(box.decode(file.read_bytes()), return_exceptions=True)
                peaks_mib[name] = box.peak_bytes / 2**20
                if name.startswith("a bomb"):
                    assert isinstance(outcome, AudioTooLargeError)
                else:
                    assert isinstance(outcome, Waveform) and outcome.duration_s > seconds - 1
            assert not deaths
            overhead_ms = statistics.median(overheads_ms)
            print(f"\nsandbox {'+'.join(box.layers)}")
            print(f"sandbox_overhead_ms p50 {overhead_ms:.1f} of {len(overheads_ms)} decodes")
            print("decode_peak_mib " + ", ".join(f"{name} {peak:.0f}" for name, peak in peaks_mib.items()))
            assert overhead_ms < 100
            assert all(20 < peak <= MEMORY_BYTES / 2**20 for peak in peaks_mib.values()), peaks_mib

    run(work)
