"""Sandboxed decoder program: it gives up all privileges, then forks one worker per clip.

It first loads everything needed for decoding, then gives up files, sockets and programs permanently. A worker gets one
clip and one socket; it cannot reach another's, nor fork. So a hostile clip gains access only to its own worker, and the
worker ends with it. `server.decoding.pool` starts the program and documents the protocol.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import gc
import importlib
import io
import json
import math
import os
import pkgutil
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyper_model.audio import AudioLimits, Channel, Sink, Waveform, decode, decode_blocks
from hyper_model.errors import AudioError
from server.decoding import sandbox

MAX_MESSAGE_BYTES = 64 * 1024
# Lengths with a meaning, in place of a block's: the recording begins again, or its blocks are complete.
BEGIN_AGAIN, END_OF_BLOCKS = 2**32 - 1, 0
MAX_BLOCK_BYTES = 2**22
CONTROL_FD_VARIABLE = "DECODER_CONTROL_FD"
MEMORY_VARIABLE = "DECODER_MEMORY_BYTES"
REAP_INTERVAL_MS = 100
# Programs, and a module for the download of examples.
NOT_FOR_DECODING = ("av.__main__", "av.datasets")
# Text codecs of tags, loaded early because libraries need them to decode text.
ENCODINGS = (
    "utf-8",
    "ascii",
    "latin-1",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "cp1252",
    "idna",
    "unicode_escape",
)

Handler = Callable[[bytes, AudioLimits, int | None, Channel], tuple[dict[str, Any], memoryview]]
BlockHandler = Callable[[bytes, AudioLimits, int | None, Channel, Sink], dict[str, Any]]


def decode_clip(
    data: bytes, limits: AudioLimits, track: int | None, channel: Channel
) -> tuple[dict[str, Any], memoryview]:
    """Decode a clip; return its properties or its error, and its samples."""
    try:
        waveform = decode(data, limits, track=track, channel=channel)
    except AudioError as error:
        return describe_error(error), memoryview(b"")
    return describe(waveform, waveform.num_samples), waveform.samples_S.data.cast("B")


def decode_recording(
    data: bytes, limits: AudioLimits, track: int | None, channel: Channel, sink: Sink
) -> dict[str, Any]:
    """Decode a recording block by block; return its properties or its error."""
    try:
        return describe(*decode_blocks(data, sink, limits, track=track, channel=channel))
    except AudioError as error:
        return describe_error(error)


def describe_error(error: AudioError) -> dict[str, Any]:
    """Return an error as plain data."""
    return {
        "error": type(error).__name__,
        "code": error.code,
        "message": error.message,
        "limit": error.limit,
        "actual": error.actual,
        "hint": error.hint,
    }


def describe(waveform: Waveform, num_samples: int) -> dict[str, Any]:
    """Return the properties of a clip as plain data."""
    return {
        "num_samples": num_samples,
        "codec": waveform.codec,
        "sample_rate_hz": waveform.source_sample_rate_hz,
        "channels": waveform.source_channels,
        "num_tracks": waveform.num_tracks,
        "track": waveform.track,
        "missing_s": waveform.missing_s,
        "warnings": [dataclasses.asdict(warning) for warning in waveform.warnings],
    }


class BlockWriter:
    """Sink that writes each block to the worker's connection: its length in bytes, then its samples."""

    def __init__(self, connection: int) -> None:
        self.connection = connection

    def begin(self) -> None:
        """Announce that the recording begins again."""
        write_all(self.connection, memoryview(BEGIN_AGAIN.to_bytes(4)))

    def write(self, samples_S: NDArray[np.float32]) -> None:
        """Write samples in blocks of limited size."""
        view = np.ascontiguousarray(samples_S).data.cast("B")
        for start in range(0, len(view), MAX_BLOCK_BYTES):
            block = view[start : start + MAX_BLOCK_BYTES]
            write_all(self.connection, memoryview(len(block).to_bytes(4)))
            write_all(self.connection, block)


def serve(handler: Handler, block_handler: BlockHandler = decode_recording) -> None:
    """Lock down this process and fork workers for the clips from the control socket, until it closes."""
    control = socket.socket(fileno=int(os.environ[CONTROL_FD_VARIABLE]))
    memory_bytes = int(os.environ[MEMORY_VARIABLE])
    warm_up()
    virtual_pages, resident_pages = (int(field) for field in Path("/proc/self/statm").read_text().split()[:2])
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    # Memory shared with this process counts as the worker's; memory only mapped here does not.
    address_space_bytes = virtual_pages * page_bytes + max(0, memory_bytes - resident_pages * page_bytes)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, sys.stderr.fileno())
    os.close(silence)
    layers = [
        *sandbox.become_nobody(),
        *sandbox.forbid_files_and_ports(),
        *sandbox.forbid_calls(sandbox.FORKER_CALLS.values()),
    ]
    control.send(json.dumps({"layers": layers}).encode())
    # A garbage collection in a worker would touch, and so copy, every shared page.
    gc.collect()
    gc.freeze()
    gc.disable()
    pids: dict[int, int] = {}
    orders = select.poll()
    orders.register(control, select.POLLIN)
    while True:
        has_order = orders.poll(REAP_INTERVAL_MS if pids else None)
        # Only here, so a known process id never belongs to another process.
        for job, pid in list(pids.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del pids[job]
        if not has_order:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
        if not message:
            break
        order = json.loads(message)
        if "kill" in order:
            if (pid := pids.get(order["kill"])) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            continue
        (connection,) = descriptors
        limits = AudioLimits(**order["limits"])
        pid = os.fork()
        if pid == 0:
            choice = (limits, order["track"], order["channel"])
            handle = functools.partial(_handle, handler, choice)
            if order.get("is_recording"):
                handle = functools.partial(_handle_blocks, block_handler, choice, connection)
            work(handle, connection, limits, control, address_space_bytes)
        pids[order["job"]] = pid
        os.close(connection)
    for pid in list(pids.values()):
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _handle(
    handler: Handler, choice: tuple[AudioLimits, int | None, Channel], data: bytes
) -> tuple[dict[str, Any], memoryview]:
    """Handle a clip, and turn an unexpected exception into a reply."""
    try:
        return handler(data, *choice)
    except MemoryError:
        return {"failure": "out_of_memory", "kind": "MemoryError"}, memoryview(b"")
    # Last resort: an unforeseen file gives a regular reply, unlike a crash of the process.
    except Exception as error:
        return {"failure": "odd_file", "kind": type(error).__name__}, memoryview(b"")


def _handle_blocks(
    handler: BlockHandler, choice: tuple[AudioLimits, int | None, Channel], connection: int, data: bytes
) -> tuple[dict[str, Any], memoryview]:
    """Handle a recording: its blocks leave the worker at once, and its properties at the end."""

    def handle(
        data: bytes, limits: AudioLimits, track: int | None, channel: Channel
    ) -> tuple[dict[str, Any], memoryview]:
        return handler(data, limits, track, channel, BlockWriter(connection)), memoryview(b"")

    about, nothing = _handle(handle, choice, data)
    write_all(connection, memoryview(END_OF_BLOCKS.to_bytes(4)))
    return about, nothing


def work(
    handle: Callable[[bytes], tuple[dict[str, Any], memoryview]],
    connection: int,
    limits: AudioLimits,
    control: socket.socket,
    address_space_bytes: int,
) -> None:
    """Handle one clip in a new worker; never return."""
    status = 1
    try:
        control.close()
        cpu_s = math.ceil(limits.decode_timeout_s) + 1
        sandbox.limit(sandbox.Bounds(address_space_bytes=address_space_bytes, cpu_s=cpu_s))
        sandbox.forbid_calls(sandbox.WORKER_CALLS.values())
        data = read_exactly(connection, int.from_bytes(read_exactly(connection, 8)))
        about, samples = handle(data)
        about["peak_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        header = json.dumps(about).encode()
        write_all(connection, memoryview(len(header).to_bytes(4) + header))
        write_all(connection, samples)
        status = 0
    finally:
        # After any failure, this copy of the process must not continue.
        os._exit(status)


def read_exactly(descriptor: int, num_bytes: int) -> bytes:
    """Read exactly this many bytes.

    Raises:
        EOFError: If the other side closes early.
    """
    parts: list[bytes] = []
    while num_bytes:
        part = os.read(descriptor, min(num_bytes, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def write_all(descriptor: int, view: memoryview) -> None:
    """Write all bytes of the view."""
    while view:
        view = view[os.write(descriptor, view) :]


def warm_up() -> None:
    """Load all modules and libraries for any file, because none can be opened later.

    PyAV imports its classes of streams and codecs at their first use. Decoding a clip with each library loads the rest.
    """
    import av
    import soundfile  # pyright: ignore[reportMissingTypeStubs]

    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name not in NOT_FOR_DECODING:
            importlib.import_module(module.name)
    for encoding in ENCODINGS:
        codecs.lookup(encoding)
    noise_SC = np.random.default_rng(0).uniform(-0.5, 0.5, (8_000, 2)).astype(np.float32)
    for subtype in ("PCM_16", "IMA_ADPCM"):
        file = io.BytesIO()
        soundfile.write(file, noise_SC, 8_000, format="WAV", subtype=subtype)  # pyright: ignore[reportUnknownMemberType]
        for channel in ("mix", "left"):
            decode(file.getvalue(), channel=channel)
    # Channels out of phase are decoded in another way.
    file = io.BytesIO()
    noise_SC[:, 1] = -noise_SC[:, 0]
    soundfile.write(file, noise_SC, 8_000, format="WAV", subtype="PCM_16")  # pyright: ignore[reportUnknownMemberType]
    decode(file.getvalue())
    for magic in (b"fLaC", b"OggS", b"\x1a\x45\xdf\xa3", b"caff", b"\0\0\0\x18ftyp", b"\xff\xfb\x90\x00", b"#!AMR\n"):
        with suppress(AudioError):
            decode(magic + bytes(80))


if __name__ == "__main__":
    serve(decode_clip)
