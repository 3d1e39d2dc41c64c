"""The error tree: catching, reading and pickling errors."""

import pickle

import pytest

from hyper_model import errors
from hyper_model.errors import (
    AudioError,
    AudioTooLargeError,
    AudioTooLongError,
    CheckpointError,
    HyperError,
    InvalidAudioError,
    PromptError,
    UnsupportedAudioError,
)

AUDIO_ERRORS = [UnsupportedAudioError, InvalidAudioError, AudioTooLargeError, AudioTooLongError]


def test_every_error_is_a_hyper_error():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, HyperError) for kind in kinds)


@pytest.mark.parametrize("kind", AUDIO_ERRORS)
def test_audio_errors_survive_pickling_with_every_field(kind):
    error = kind("The clip is too much.", code="empty_audio", limit=30.0, actual="ogg", hint="Send less.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert str(copy) == "The clip is too much." and copy.args == error.args


@pytest.mark.parametrize(
    "error", [PromptError("Empty.", param="question"), CheckpointError("Gone."), HyperError("No.")]
)
def test_other_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and vars(copy) == vars(error) and str(copy) == str(error)


def test_each_audio_error_has_its_own_code():
    codes = {kind("x").code for kind in AUDIO_ERRORS}
    assert len(codes) == len(AUDIO_ERRORS)
    assert AudioTooLargeError("x", code="audio_duration_too_large").code == "audio_duration_too_large"


def test_fields_left_out_are_none():
    error = AudioError("x")
    assert (error.limit, error.actual, error.hint) == (None, None, None)
    assert PromptError("x").param is None
