"""Recordings leave the decoder block by block: the same samples as a clip's, in the memory of one block."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hyper_model.audio import SAMPLE_RATE_HZ, AudioLimits, Waveform, decode, decode_blocks
from hyper_model.errors import AudioError, AudioTooLargeError, InvalidAudioError
from tests.hostile_decoder import BLOCK_LIES
from tests.paths import CLIPS as CLIP_FOLDER
from tests.server.decoding.test_pool import MEMORY_BYTES, boxed, order, run
from tests.serving import tone
from tests.test_field_cases import OTHER, SILENCE, VOICE, tracks

CLIPS = sorted(path for path in CLIP_FOLDER.iterdir() if path.suffix != ".json")
HOUR = AudioLimits(max_duration_s=3600, decode_timeout_s=60, max_source_samples=6 * 2**26)
LONG = AudioLimits(max_duration_s=600)


class Gathered:
    """Sink with all blocks in memory."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self.num_beginnings = 0

    def begin(self) -> None:
        self.blocks = []
        self.num_beginnings += 1

    def write(self, samples_S: np.ndarray) -> None:
        self.blocks.append(samples_S)

    @property
    def samples_S(self) -> np.ndarray:  # noqa: N802
        return np.concatenate(self.blocks)


class Counted(Gathered):
    """Sink that only counts."""

    num_samples = 0

    def write(self, samples_S: np.ndarray) -> None:
        self.num_samples += len(samples_S)


def flac(duration_s: int, sample_rate_hz: int = SAMPLE_RATE_HZ, channels: int = 1, level: float = 0.2) -> bytes:
    """Write minutes of a tone with pauses."""
    times_S = np.arange(sample_rate_hz * 60) / sample_rate_hz
    minute_S = level * np.sin(2765 * times_S) * (np.sin(1.3 * times_S) > 0)
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", sample_rate_hz, channels, format="FLAC") as writer:
        for _ in range(duration_s // 60):
            writer.write(np.stack([minute_S] * channels, 1))
    return file.getvalue()


def same_as_a_clip(data: bytes) -> tuple[Waveform, Gathered]:
    whole, sink = decode(data, LONG), Gathered()
    about, num_samples = decode_blocks(data, sink, LONG)
    assert num_samples == whole.num_samples
    assert np.array_equal(sink.samples_S[:num_samples], whole.samples_S)
    assert (about.codec, about.track, about.warnings) == (whole.codec, whole.track, whole.warnings)
    return about, sink


@pytest.mark.parametrize("path", CLIPS, ids=[path.name for path in CLIPS])
def test_blocks_are_the_samples_of_the_clip(path: Path) -> None:
    same_as_a_clip(path.read_bytes())


def test_channels_that_cancel_begin_again_with_a_better_mix() -> None:
    samples_S = np.random.default_rng(0).normal(0, 0.1, 3 * SAMPLE_RATE_HZ)
    file = io.BytesIO()
    soundfile.write(file, np.stack([samples_S, -samples_S], 1), SAMPLE_RATE_HZ, format="WAV")
    about, sink = same_as_a_clip(file.getvalue())
    assert [warning.code for warning in about.warnings] == ["channels_out_of_phase"]
    assert sink.num_beginnings == 2


def test_a_track_tried_in_vain_leaves_no_samples() -> None:
    _, sink = same_as_a_clip(tracks("mp4", SILENCE, VOICE))
    assert sink.num_beginnings == 2
    # Both are silent: the first is the one, and it is decoded again.
    about, sink = same_as_a_clip(tracks("mp4", SILENCE, SILENCE))
    assert about.track == 1
    _, sink = same_as_a_clip(tracks("mp4", VOICE, OTHER))
    assert sink.num_beginnings == 1


def test_an_hour_is_decoded_in_the_memory_of_one_block() -> None:
    async def work() -> None:
        async with boxed() as (box, deaths):
            for data in (flac(3600), flac(600, 48_000, 2)):
                sink = Counted()
                about, num_samples = await box.decode_blocks(data, sink, HOUR)
                assert sink.num_samples == num_samples
                assert about.codec == "flac"
            assert 0 < box.peak_bytes < MEMORY_BYTES / 2
            assert not deaths

    run(work)


def test_a_recording_of_three_hours_is_refused_with_the_limit() -> None:
    async def work() -> None:
        async with boxed() as (box, _):
            with pytest.raises(AudioTooLargeError) as refused:
                await box.decode_blocks(flac(3 * 3600, level=0.0), Counted(), HOUR)
            assert (refused.value.code, refused.value.limit) == ("audio_duration_too_large", 3600)

    run(work)


def test_refusals_are_those_of_a_clip() -> None:
    cut_off = tone(40)
    file = io.BytesIO()
    soundfile.write(file, np.where(np.arange(640_000) == 320_000, np.nan, 0.1), 16_000, format="WAV", subtype="FLOAT")
    bad = [b"text", tone(0.01), (CLIP_FOLDER / "three-voices.flac").read_bytes()[:-2000], tone(700), cut_off[:-500]]

    async def work() -> None:
        async with boxed() as (box, _):
            for data in bad:
                try:
                    whole: object = decode(data, LONG).num_samples
                except AudioError as error:
                    whole = vars(error)
                try:
                    about: object = (await box.decode_blocks(data, Gathered(), LONG))[1]
                except AudioError as error:
                    about = vars(error)
                assert about == whole
            with pytest.raises(InvalidAudioError, match="not numbers"):
                await box.decode_blocks(file.getvalue(), Gathered(), LONG)

    run(work)


@pytest.mark.parametrize("lie", [*BLOCK_LIES, "too many samples", "a codec of its own", "crash", "run_out_of_memory"])
def test_a_decoder_that_lies_in_blocks_is_a_damaged_recording(lie: str) -> None:
    async def work() -> None:
        async with boxed("tests.hostile_decoder") as (box, deaths):
            with pytest.raises(InvalidAudioError) as refused:
                await box.decode_blocks(order(lie), Counted(), LONG)
            assert refused.value.code == "damaged_audio"
            assert len(deaths) == 1

    run(work)


def test_a_cancelled_recording_kills_its_worker_and_the_next_is_decoded() -> None:
    async def work() -> None:
        async with boxed() as (box, _):
            task = asyncio.create_task(box.decode_blocks(flac(600, level=0.0), Counted(), LONG))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert (await box.decode_blocks(tone(2), Gathered(), LONG))[1] == 2 * SAMPLE_RATE_HZ

    run(work)
