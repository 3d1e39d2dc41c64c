"""Decoding of clips in restricted processes with a time limit.

One helper (`server.decoding.worker`) starts with the service, loads its libraries and locks itself down. Then it forks
one worker per clip, in a few milliseconds. Each clip has its own socket: it carries the bytes to the worker, and back
either an error's fields or figures and samples. Replies are validated like external input, because a clip may have
taken over its worker. Orders to start or kill a worker use the control socket, closed in workers.

The module is independent of HTTP and requests. Cancelling a caller kills its worker.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

import hyper_model
import server
from hyper_model.audio import FORMATS, SAMPLE_RATE_HZ, AudioLimits, Channel, Sink, Waveform, identify
from hyper_model.audio_limits import MAX_SOURCE_CHANNELS, MAX_SOURCE_RATE_HZ, refuse_damaged, refuse_late
from hyper_model.audio_warnings import AudioWarning, AudioWarningCode
from hyper_model.errors import (
    AudioCode,
    AudioError,
    AudioTooLargeError,
    HyperError,
    InvalidAudioError,
    UnsupportedAudioError,
)
from hyper_model.libav import CODECS
from server.decoding.worker import (
    BEGIN_AGAIN,
    CONTROL_FD_VARIABLE,
    END_OF_BLOCKS,
    MAX_BLOCK_BYTES,
    MAX_MESSAGE_BYTES,
    MEMORY_VARIABLE,
)
from server.errors import DecoderUnavailableError
from server.telemetry.labels import WorkerFailure

logger = logging.getLogger("hyper.server")

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
# A decoder checks the clock and reports a timeout itself; only an unresponsive one is killed, after this much longer.
GRACE_S = 1.0
SPARE_SAMPLES = 2 * SAMPLE_RATE_HZ
# Padding of a container behind a recording's last sample.
MAX_PADDING_SAMPLES = SAMPLE_RATE_HZ // 10
# A recording begins once per tried track and mix.
MAX_BEGINNINGS = 2 * 4096
MAX_TRACKS = 10_000
MAX_WARNINGS = 20
MAX_WARNING_S = 1e6

ERRORS: Mapping[str, type[AudioError]] = {
    kind.__name__: kind for kind in (UnsupportedAudioError, InvalidAudioError, AudioTooLargeError)
}
CODEC_NAMES = CODECS | set(FORMATS) | {"amr_nb", "amr_wb"}

Result = TypeVar("Result")

Words = Annotated[str, Field(max_length=400, pattern=r"^[ -~]*$")]
Code = Annotated[str, Field(max_length=40, pattern=r"^[a-z0-9_]+$")]


class WorkerReply(BaseModel):
    """Fields of every worker reply."""

    peak_kib: int = Field(ge=0, le=2**40)


class WorkerError(WorkerReply):
    """A worker's reply for a clip with an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    error: str
    # A metrics label: a compromised worker must not add new values.
    code: AudioCode
    message: Words
    limit: float | None
    actual: int | float | Code | None
    hint: Words | None


class WorkerFailed(WorkerReply):
    """A worker's reply for a clip with an unexpected exception in the decoder."""

    model_config = ConfigDict(extra="forbid", strict=True)

    failure: Literal["odd_file", "out_of_memory"]
    kind: str = Field(max_length=60, pattern=r"^[A-Za-z_]+$")


class WorkerWarning(BaseModel):
    """A worker's warning about its clip."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # A metrics label: a compromised worker must not add new values.
    code: AudioWarningCode
    message: Words
    seconds: float | None = Field(ge=0, le=MAX_WARNING_S)


class WorkerResult(WorkerReply):
    """A worker's reply before the samples."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    num_samples: int = Field(ge=0)
    codec: str
    sample_rate_hz: int = Field(ge=0, le=MAX_SOURCE_RATE_HZ)
    channels: int = Field(ge=0, le=MAX_SOURCE_CHANNELS)
    num_tracks: int = Field(ge=1, le=MAX_TRACKS)
    track: int = Field(ge=1, le=MAX_TRACKS)
    missing_s: float = Field(ge=0, le=MAX_WARNING_S)
    warnings: list[WorkerWarning] = Field(max_length=MAX_WARNINGS)


class WorkerDiedError(HyperError):
    """Error for a worker out of memory, crashed on its clip, or with an invalid reply."""


class DecoderPool:
    """Owner of the helper process: sends clips and receives samples.

    Attributes:
        layers: Active sandbox layers, strongest first: "bubblewrap", "uid", "landlock", "seccomp".
        peak_bytes: Largest memory use reported by a worker.
        on_death: Called with the reason for each worker without a reply and each lost helper.
    """

    def __init__(
        self,
        limits: AudioLimits,
        *,
        memory_bytes: int,
        on_death: Callable[[WorkerFailure], object] = bool,
        program: str = "server.decoding.worker",
    ) -> None:
        self.limits = limits
        self.memory_bytes = memory_bytes
        self.program = program
        self.layers: tuple[str, ...] = ()
        self.peak_bytes = 0
        self.on_death = on_death
        self.process: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None
        self.is_stopped = False
        self.jobs = itertools.count()
        self.starting = asyncio.Lock()

    @property
    def is_closed(self) -> bool:
        """Return whether the decoder can reach neither files nor the network; any one of these layers ensures it."""
        return bool({"bubblewrap", "landlock", "seccomp"} & set(self.layers))

    async def start(self) -> None:
        """Start the helper, inside bubblewrap if it is installed and works.

        Raises:
            DecoderUnavailableError: If it does not start.
        """
        bubblewrap = shutil.which("bwrap")
        for prefix, layers in (*(((bubblewrap_command(bubblewrap), ("bubblewrap",)),) if bubblewrap else ()), ([], ())):
            if (worker_layers := await self.launch(prefix)) is not None:
                self.layers = (*layers, *worker_layers)
                return
        raise DecoderUnavailableError("The decoder did not start; see the log.")

    async def launch(self, prefix: list[str]) -> list[str] | None:
        """Start the helper behind a command prefix and return its sandbox layers, or None after a failure."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            self.process = subprocess.Popen(
                [*prefix, python(), "-B", "-s", "-P", "-m", self.program],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # The decoder must not receive keys and proxies from our environment.
                env={
                    "PATH": os.defpath,
                    "LC_ALL": "C.UTF-8",
                    "PYTHONPATH": os.pathsep.join(import_paths()),
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "MALLOC_ARENA_MAX": "1",
                    CONTROL_FD_VARIABLE: str(theirs.fileno()),
                    MEMORY_VARIABLE: str(self.memory_bytes),
                },
                cwd="/",
                # Ctrl-C must reach only the service, to let its clips finish.
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                greeting = await asyncio.get_running_loop().sock_recv(ours, MAX_MESSAGE_BYTES)
        except (TimeoutError, ConnectionError):
            greeting = b""
        except BaseException:
            ours.close()
            raise
        if not greeting:
            ours.close()
            await self.end_process()
            return None
        self.control = ours
        return json.loads(greeting)["layers"]

    async def stop(self) -> None:
        """End the helper and every worker permanently."""
        self.is_stopped = True
        await self.end()

    async def end(self) -> None:
        """End the helper and thereby its workers."""
        if self.control is not None:
            self.control.close()
            self.control = None
        await self.end_process()

    async def end_process(self) -> None:
        """Wait for the helper to end; kill it after a timeout."""
        process, self.process = self.process, None
        if process is None:
            return
        try:
            await asyncio.to_thread(process.wait, STOP_TIMEOUT_S if process.poll() is None else 0)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    async def decode(self, data: bytes, *, track: int | None = None, channel: Channel = "mix") -> Waveform:
        """Decode one clip in its own worker; cancelling this kills the worker.

        Args:
            data: The whole file.
            track: Audio track to decode, from 1.
            channel: Channels to use.

        Raises:
            AudioError: As `hyper_model.audio.decode`.
            DecoderUnavailableError: If the helper is gone and cannot be restarted.
        """
        order = {"limits": dataclasses.asdict(self.limits), "track": track, "channel": channel}
        return await self.decode_as(order, data, self.limits, self.exchange)

    async def decode_blocks(
        self, data: bytes, sink: Sink, limits: AudioLimits, *, track: int | None = None, channel: Channel = "mix"
    ) -> tuple[Waveform, int]:
        """Decode a recording of any length in its own worker; the sink receives its samples block by block.

        Args:
            data: The whole file.
            sink: Receiver of the samples, on the event loop.
            limits: Limits of the recording, in place of a clip's.
            track: Audio track to decode, from 1.
            channel: Channels to use.

        Returns:
            The properties, as a Waveform without samples, and the number of samples; the rest is padding.

        Raises:
            AudioError: As `hyper_model.audio.decode_blocks`.
            DecoderUnavailableError: If the helper is gone and cannot be restarted.
        """

        async def exchange(connection: socket.socket, data: bytes) -> tuple[Waveform, int]:
            return await self.exchange_blocks(connection, data, sink, limits)

        order = {"limits": dataclasses.asdict(limits), "track": track, "channel": channel, "is_recording": True}
        return await self.decode_as(order, data, limits, exchange)

    async def decode_as(
        self,
        order: Mapping[str, object],
        data: bytes,
        limits: AudioLimits,
        exchange: Callable[[socket.socket, bytes], Awaitable[Result]],
    ) -> Result:
        """Decode a file by an order; if the whole helper is lost, once more."""
        identify(data, limits)
        process = self.process
        try:
            return await self.attempt(order, data, limits, exchange)
        except WorkerDiedError:
            if process is None or (process is self.process and process.poll() is None):
                refuse_damaged()
        # The whole helper is gone, so the clip is probably not the cause; try it once more.
        try:
            return await self.attempt(order, data, limits, exchange)
        except WorkerDiedError:
            refuse_damaged()

    async def attempt(
        self,
        order: Mapping[str, object],
        data: bytes,
        limits: AudioLimits,
        exchange: Callable[[socket.socket, bytes], Awaitable[Result]],
    ) -> Result:
        """Decode one clip in one worker.

        Raises:
            WorkerDiedError: If the worker ends without a reply, or with an invalid one.
        """
        job = next(self.jobs)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        is_answered = False
        with ours:
            with theirs:
                await self.order({"job": job, **order}, theirs.fileno())
            try:
                async with asyncio.timeout(limits.decode_timeout_s + GRACE_S):
                    result = await exchange(ours, data)
                is_answered = True
            except TimeoutError:
                self.on_death("late")
                refuse_late(limits.decode_timeout_s)
            except AudioError:
                is_answered = True
                raise
            except (OSError, EOFError, ValueError) as error:
                self.on_death("invalid_reply" if isinstance(error, ValueError) else "died")
                raise WorkerDiedError("The decoder died.") from None
            finally:
                if not is_answered:
                    self.kill(job)
        return result

    async def exchange(self, connection: socket.socket, data: bytes) -> Waveform:
        """Send a clip to its worker and read the reply."""
        await send_file(connection, data)
        result = await self.read_result(connection)
        if result.num_samples > self.limits.max_duration_s * SAMPLE_RATE_HZ + SPARE_SAMPLES:
            raise ValueError
        samples_S = np.empty(result.num_samples, np.float32)
        await receive(connection, samples_S.data.cast("B"))
        require_samples(samples_S)
        return waveform_of(result, samples_S)

    async def exchange_blocks(
        self, connection: socket.socket, data: bytes, sink: Sink, limits: AudioLimits
    ) -> tuple[Waveform, int]:
        """Send a recording to its worker, pass its blocks to the sink, and read the reply behind them."""
        await send_file(connection, data)
        max_samples = limits.max_duration_s * SAMPLE_RATE_HZ + SPARE_SAMPLES
        num_received = num_beginnings = 0
        while (num_bytes := int.from_bytes(await receive(connection, bytearray(4)))) != END_OF_BLOCKS:
            if num_bytes == BEGIN_AGAIN:
                num_received = 0
                num_beginnings += 1
                sink.begin()
            elif num_bytes % 4 or num_bytes > MAX_BLOCK_BYTES:
                raise ValueError
            else:
                samples_S = np.empty(num_bytes // 4, np.float32)
                await receive(connection, samples_S.data.cast("B"))
                require_samples(samples_S)
                num_received += len(samples_S)
                sink.write(samples_S)
            if num_received > max_samples or num_beginnings > MAX_BEGINNINGS:
                raise ValueError
        result = await self.read_result(connection)
        if not 0 <= num_received - result.num_samples <= MAX_PADDING_SAMPLES:
            raise ValueError
        return waveform_of(result, np.zeros(0, np.float32)), result.num_samples

    async def read_result(self, connection: socket.socket) -> WorkerResult:
        """Read the properties of a decoded clip.

        Raises:
            AudioError: The worker refuses the clip.
            ValueError: The reply is not valid.
        """
        num_header_bytes = int.from_bytes(await receive(connection, bytearray(4)))
        if num_header_bytes > MAX_MESSAGE_BYTES:
            raise ValueError
        header = json.loads(bytes(await receive(connection, bytearray(num_header_bytes))))
        if "failure" in header:
            failed = WorkerFailed.model_validate(header)
            self.record(failed)
            self.on_death(failed.failure)
            logger.warning("a decoder could not read an odd file: %s", failed.kind)
            refuse_damaged("The clip could not be decoded.")
        if "error" in header:
            worker_error = WorkerError.model_validate(header)
            self.record(worker_error)
            raise ERRORS.get(worker_error.error, InvalidAudioError)(
                worker_error.message,
                code=worker_error.code,
                limit=worker_error.limit,
                actual=worker_error.actual,
                hint=worker_error.hint,
            )
        result = WorkerResult.model_validate(header)
        self.record(result)
        if result.codec not in CODEC_NAMES:
            raise ValueError
        return result

    def record(self, reply: WorkerReply) -> None:
        """Update the peak memory."""
        self.peak_bytes = max(self.peak_bytes, reply.peak_kib * 1024)

    async def order(self, message: Mapping[str, object], descriptor: int) -> None:
        """Send an order to the helper, restarted if it is gone."""
        for _ in range(2):
            control = self.control
            if control is not None:
                try:
                    send(control, message, [descriptor])
                    return
                except BlockingIOError:
                    # A hundred orders are unread because the machine is busy; there is room a moment later.
                    await asyncio.sleep(0.01)
                    continue
                except OSError:
                    pass
            await self.restart(control)
        raise DecoderUnavailableError("The decoder is not running.")

    async def restart(self, gone: socket.socket | None) -> None:
        """Restart the helper, once for any number of callers."""
        async with self.starting:
            if self.is_stopped:
                raise DecoderUnavailableError("The service is shutting down.")
            if self.control is gone:
                self.on_death("helper")
                logger.error("the decoder is gone; starting it again")
                await self.end()
                await self.start()

    def kill(self, job: int) -> None:
        """Make the helper kill a worker without a reply."""
        if self.control is not None:
            try:
                send(self.control, {"kill": job}, [])
            except OSError:
                logger.warning("a decoder could not be killed; its processor time is limited")


def require_samples(samples_S: np.ndarray) -> None:
    """Refuse samples out of range.

    Raises:
        ValueError: A sample is outside [-1, 1], or no number.
    """
    # In this order both comparisons fail for NaN.
    if len(samples_S) and not (samples_S.min() >= -1.0 and samples_S.max() <= 1.0):
        raise ValueError


def waveform_of(result: WorkerResult, samples_S: np.ndarray) -> Waveform:
    """Return samples with the properties that their worker has reported."""
    return Waveform(
        samples_S,
        result.codec,
        result.sample_rate_hz,
        result.channels,
        num_tracks=result.num_tracks,
        track=result.track,
        missing_s=result.missing_s,
        warnings=tuple(AudioWarning(warning.code, warning.message, warning.seconds) for warning in result.warnings),
    )


async def send_file(connection: socket.socket, data: bytes) -> None:
    """Send a file to its worker."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, len(data).to_bytes(8))
    await loop.sock_sendall(connection, data)


def send(control: socket.socket, message: Mapping[str, object], descriptors: list[int]) -> None:
    """Send one order with its descriptors."""
    socket.send_fds(control, [json.dumps(message).encode()], descriptors)


async def receive(connection: socket.socket, buffer: bytearray | memoryview) -> bytearray | memoryview:
    """Fill a buffer.

    Raises:
        EOFError: If the worker ends first.
    """
    loop = asyncio.get_running_loop()
    view = memoryview(buffer)
    while view:
        num_bytes = await loop.sock_recv_into(connection, view)
        if not num_bytes:
            raise EOFError
        view = view[num_bytes:]
    return buffer


def python() -> str:
    """Return this interpreter's path without links in its folders, because links may leave the bound folders."""
    folder, name = os.path.split(sys.executable)
    return os.path.join(os.path.realpath(folder), name)


def import_paths() -> list[str]:
    """Return this process's import paths, without links."""
    return [os.path.realpath(path) for path in sys.path if os.path.isabs(path)]


def bubblewrap_command(bubblewrap: str) -> list[str]:
    """Return a command prefix with separate namespaces and a file system of only the helper's libraries."""
    places = {"/usr", sys.prefix, sys.base_prefix, os.path.dirname(sys.executable), *import_paths()}
    places |= {os.path.dirname(os.path.realpath(sys.executable))}
    # An editable install finds our packages by a hook, not by a folder of sys.path.
    places |= {*hyper_model.__path__, *server.__path__}
    binds: list[str] = []
    for place in sorted(map(os.path.realpath, places), key=len):
        binds += ["--ro-bind-try", place, place]
    for place in ("/lib", "/lib64"):
        if os.path.islink(place):
            binds += ["--symlink", os.readlink(place), place]
        else:
            binds += ["--ro-bind-try", place, place]
    return [
        *(bubblewrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *("--uid", "65534", "--gid", "65534", *binds, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"),
        *("--proc", "/proc", "--dev", "/dev", "--chdir", "/"),
    ]
