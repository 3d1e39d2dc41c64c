"""Simulation of a decoder under an attacker's control, behind the real decoder's sandbox.

The "clip" is a WAV header and the name of an attempt. In the reply the codec field is valid. The number of samples is
the errno of the blocked attempt, or 0 after a success.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np

from hyper_model.audio import AudioLimits, Channel, Sink
from server.decoding.worker import serve

NOT_STOPPED = 0
SECRET = b"HYPER-CANARY"


def open_a_file() -> None:
    os.close(os.open("/etc/passwd", os.O_RDONLY))


def open_what_the_test_hid() -> None:
    os.close(os.open("/tmp/hyper-canary", os.O_RDONLY))


def open_itself() -> None:
    os.close(os.open("/proc/self/maps", os.O_RDONLY))


def list_a_folder() -> None:
    os.listdir("/")


def write_a_file() -> None:
    os.close(os.open("/tmp/hyper-decoder-was-here", os.O_WRONLY | os.O_CREAT, 0o600))


def remove_a_file() -> None:
    os.unlink("/tmp/hyper-canary")


def make_memory_file() -> None:
    os.memfd_create("x")


def connect() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect(("127.0.0.1", int(os.environ.get("CANARY_PORT", "9"))))


def send_a_datagram() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))


def connect_to_a_local_socket() -> None:
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect("\0hyper")


def execute() -> None:
    os.execv("/bin/sh", ["sh", "-c", "true"])


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def start_a_thread() -> None:
    import _thread

    try:
        _thread.start_new_thread(int, ())
    except RuntimeError as error:
        raise PermissionError(errno.EPERM, "no thread") from error


def signal_the_parent() -> None:
    os.kill(os.getppid(), signal.SIGTERM)


def signal_everybody() -> None:
    os.kill(-1, 0)


def trace_the_parent() -> None:
    call("ptrace", 16, 1, 0, 0)


def leave_by_namespaces() -> None:
    call("unshare", 0x10000000)


def mount() -> None:
    call("mount", b"none", b"/tmp", b"tmpfs", 0, 0)


def become_root() -> None:
    call("setuid", 0)


def raise_a_limit() -> None:
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except ValueError as error:
        raise PermissionError(errno.EPERM, "not allowed") from error


def allocate() -> None:
    try:
        held = [mmap.mmap(-1, 2**24) for _ in range(256)]
    except OSError as error:
        raise PermissionError(errno.ENOMEM, "no memory") from error
    raise AssertionError(len(held))


def call(name: str, *arguments: Any) -> None:
    """Call the C library and raise its error."""
    if getattr(LIBC, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def loop() -> NoReturn:
    while True:
        pass


def sleep() -> NoReturn:
    while True:
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        LIBC.usleep(1_000_000)


def raise_an_import_error() -> NoReturn:
    raise ImportError("a module that was not loaded in time")


def run_out_of_memory() -> NoReturn:
    raise MemoryError


def crash() -> None:
    ctypes.string_at(8)


def end() -> NoReturn:
    os._exit(0)


LIBC = ctypes.CDLL(None, use_errno=True)
ATTEMPTS: Mapping[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        open_a_file,
        open_what_the_test_hid,
        open_itself,
        list_a_folder,
        write_a_file,
        remove_a_file,
        make_memory_file,
        connect,
        send_a_datagram,
        connect_to_a_local_socket,
        execute,
        fork,
        start_a_thread,
        signal_the_parent,
        signal_everybody,
        trace_the_parent,
        leave_by_namespaces,
        mount,
        become_root,
        raise_a_limit,
        allocate,
    )
}
ENDLESS: Mapping[str, Callable[[], None]] = {each.__name__: each for each in (loop, sleep)}
FATAL: Mapping[str, Callable[[], None]] = {each.__name__: each for each in (crash, end)}
REST: Mapping[str, Any] = {"num_tracks": 1, "track": 1, "missing_s": 0.0, "warnings": []}
ODD: Mapping[str, Callable[[], None]] = {each.__name__: each for each in (raise_an_import_error, run_out_of_memory)}
LIES: Mapping[str, dict[str, Any]] = {
    "too many samples": {"num_samples": 10**9, "codec": "mp3", "sample_rate_hz": 1, "channels": 1, **REST},
    "fewer than none": {"num_samples": -1, "codec": "mp3", "sample_rate_hz": 1, "channels": 1, **REST},
    "a codec of its own": {"num_samples": 0, "codec": "0x5642aa", "sample_rate_hz": 1, "channels": 1, **REST},
    "more fields": {"num_samples": 0, "codec": "mp3", "sample_rate_hz": 1, "channels": 1, **REST, "path": "/srv"},
    "other types": {"num_samples": "0", "codec": "mp3", "sample_rate_hz": 1, "channels": 1, **REST},
    "a warning of its own": {
        **{"num_samples": 0, "codec": "mp3", "sample_rate_hz": 1, "channels": 1},
        **REST,
        "warnings": [{"code": "evil", "message": "a", "seconds": None}],
    },
    "warnings without end": {
        **{"num_samples": 0, "codec": "mp3", "sample_rate_hz": 1, "channels": 1},
        **REST,
        "warnings": [{"code": "junk_skipped", "message": "a", "seconds": None}] * 1000,
    },
    "a failure of its own": {"failure": "evil", "kind": "Error"},
    "words with line breaks": {
        "error": "InvalidAudioError",
        "code": "x",
        "message": "a\nb",
        "limit": None,
        "actual": None,
        "hint": None,
    },
    "a long story": {
        "error": "InvalidAudioError",
        "code": "x",
        "message": "a" * 5000,
        "limit": None,
        "actual": None,
        "hint": None,
    },
}


def play(data: bytes, limits: AudioLimits, track: int | None, channel: Channel) -> tuple[dict[str, Any], memoryview]:
    """Make the attempt named by the clip."""
    name = data[12:].decode()
    stopped_by = NOT_STOPPED
    if name in LIES:
        return LIES[name], memoryview(b"")
    if name == "not numbers":
        return {"num_samples": 1, "codec": "mp3", "sample_rate_hz": 1, "channels": 1, **REST}, memoryview(
            b"\x00\x00\xc0\x7f"
        )
    try:
        {**ATTEMPTS, **ENDLESS, **FATAL, **ODD}[name]()
    except OSError as error:
        stopped_by = error.errno or errno.EPERM
    about = {"num_samples": stopped_by, "codec": "mp3", "sample_rate_hz": 8_000, "channels": 1, **REST}
    return about, memoryview(bytes(4 * stopped_by))


def play_blocks(data: bytes, limits: AudioLimits, track: int | None, channel: Channel, sink: Sink) -> dict[str, Any]:
    """Make the attempt named by the recording, in blocks."""
    name = data[12:].decode()
    second_S = np.zeros(16_000, np.float32)
    about = {"num_samples": 16_000, "codec": "mp3", "sample_rate_hz": 8_000, "channels": 1, **REST}
    sink.begin()
    match name:
        case "no numbers in a block":
            sink.write(second_S * np.float32(np.nan))
        case "louder than full scale":
            sink.write(second_S + 2)
        case "blocks without end":
            for _ in range(4_000):
                sink.write(second_S)
        case "beginnings without end":
            for _ in range(10_000):
                sink.begin()
        case "more samples than blocks":
            sink.write(second_S[:8_000])
        case "fewer samples than blocks":
            sink.write(np.zeros(160_000, np.float32))
        case _:
            sink.write(second_S)
            return play(data, limits, track, channel)[0]
    return about


BLOCK_LIES = (
    "no numbers in a block",
    "louder than full scale",
    "blocks without end",
    "beginnings without end",
    "more samples than blocks",
    "fewer samples than blocks",
)


if __name__ == "__main__":
    serve(play, play_blocks)
