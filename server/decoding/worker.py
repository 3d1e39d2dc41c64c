"""The program inside the box: gives up the machine, then forks one worker a clip, which decodes it and ends.

Everything that decoding needs is loaded first; then files, sockets and programs are given up for good. A worker gets
one clip and one socket and cannot reach another's; it may not even fork. So what a hostile clip takes over ends with
it, and has seen nothing but itself. Started by `server.decoding.pool`, which says what passes between the two.
"""

from __future__ import annotations

import gc
import io
import json
import math
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hyper_model.audio import AudioLimits, decode
from hyper_model.errors import AudioError
from server.decoding import sandbox

MAX_MESSAGE_BYTES = 64 * 1024
CONTROL_FD_VARIABLE = "DECODER_CONTROL_FD"
MEMORY_VARIABLE = "DECODER_MEMORY_BYTES"
REAP_INTERVAL_MS = 100

Handler = Callable[[bytes, AudioLimits], tuple[dict[str, Any], memoryview]]


def decode_clip(data: bytes, limits: AudioLimits) -> tuple[dict[str, Any], memoryview]:
    """Decodes; returns what the clip is, and its samples."""
    try:
        waveform = decode(data, limits)
    except AudioError as error:
        return {
            "error": type(error).__name__,
            "code": error.code,
            "message": error.message,
            "limit": error.limit,
            "actual": error.actual,
            "hint": error.hint,
        }, memoryview(b"")
    about = {
        "num_samples": waveform.num_samples,
        "codec": waveform.codec,
        "sample_rate_hz": waveform.source_sample_rate_hz,
        "channels": waveform.source_channels,
    }
    return about, waveform.samples_S.data.cast("B")


def serve(handler: Handler) -> None:
    """Locks this process down and forks workers for the clips that come over the control socket, until it closes."""
    control = socket.socket(fileno=int(os.environ[CONTROL_FD_VARIABLE]))
    memory_bytes = int(os.environ[MEMORY_VARIABLE])
    warm_up()
    virtual_pages, resident_pages = (int(field) for field in Path("/proc/self/statm").read_text().split()[:2])
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    # What a worker shares with this process counts as its memory; what this process only maps does not.
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
    # A collection in a worker would touch, and so copy, every page that it shares with this process.
    gc.collect()
    gc.freeze()
    gc.disable()
    pids: dict[int, int] = {}
    orders = select.poll()
    orders.register(control, select.POLLIN)
    while True:
        has_order = orders.poll(REAP_INTERVAL_MS if pids else None)
        # Here and nowhere else, so that a process id that is known is never that of a stranger.
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
            work(handler, connection, limits, control, address_space_bytes)
        pids[order["job"]] = pid
        os.close(connection)
    for pid in list(pids.values()):
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def work(
    handler: Handler, connection: int, limits: AudioLimits, control: socket.socket, address_space_bytes: int
) -> None:
    """Handles one clip in a fresh worker, which never returns."""
    status = 1
    try:
        control.close()
        cpu_s = math.ceil(limits.decode_timeout_s) + 1
        sandbox.limit(sandbox.Bounds(address_space_bytes=address_space_bytes, cpu_s=cpu_s))
        sandbox.forbid_calls(sandbox.WORKER_CALLS.values())
        data = read_exactly(connection, int.from_bytes(read_exactly(connection, 8)))
        about, samples = handler(data, limits)
        about["peak_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        header = json.dumps(about).encode()
        write_all(connection, memoryview(len(header).to_bytes(4) + header))
        write_all(connection, samples)
        status = 0
    finally:
        # Whatever went wrong, nothing of this copy of the process may run on.
        os._exit(status)


def read_exactly(descriptor: int, num_bytes: int) -> bytes:
    """Reads that many bytes; the other side closing early ends the worker."""
    parts: list[bytes] = []
    while num_bytes:
        part = os.read(descriptor, min(num_bytes, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def write_all(descriptor: int, view: memoryview) -> None:
    """Writes all of it."""
    while view:
        view = view[os.write(descriptor, view) :]


def warm_up() -> None:
    """Decodes one clip by each way, so that everything they import is loaded before files are given up."""
    import numpy as np
    import soundfile  # pyright: ignore[reportMissingTypeStubs]

    samples_S = np.zeros(16_000, np.float32)
    for subtype in ("PCM_16", "IMA_ADPCM"):
        file = io.BytesIO()
        soundfile.write(file, samples_S, 8_000, format="WAV", subtype=subtype)  # pyright: ignore[reportUnknownMemberType]
        decode(file.getvalue())
    with suppress(AudioError):
        decode(b"fLaC" + bytes(80))
    with suppress(AudioError):
        decode(b"OggS" + bytes(80))


if __name__ == "__main__":
    serve(decode_clip)
