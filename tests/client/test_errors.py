"""One exception class per error code of the service."""

from __future__ import annotations

import typing

import pytest

import hyper.errors
from hyper.errors import FAMILIES, class_of
from hyper_model.errors import AudioCode
from server.api.types import ErrorObject
from server.errors import ERRORS


def error_object(code: str, type_: str, param: str | None = None) -> ErrorObject:
    return ErrorObject(
        type=type_,
        code=code,
        message="message",
        param=param,
        request_id="req_1",
        retryable=False,
        limit=None,
        actual=None,
        hint=None,
    )


@pytest.mark.parametrize("code", ERRORS)
def test_every_code_of_the_service_has_its_class(code: str) -> None:
    kind = ERRORS[code]
    found = class_of(error_object(code, kind.type), kind.status)
    assert found.__name__.lower() == f"{code.removesuffix('_error').replace('_', '')}error"
    assert issubclass(found, FAMILIES[kind.type]) and found.__doc__


@pytest.mark.parametrize("code", typing.get_args(AudioCode))
def test_every_reason_against_a_clip_is_an_audio_error(code: str) -> None:
    for status in (400, 413, 415, 422):
        kind = class_of(error_object(code, "invalid_request_error", "file"), status)
        assert issubclass(kind, hyper.errors.AudioError)


def test_a_newer_code_raises_its_family() -> None:
    assert class_of(error_object("tired", "rate_limit_error"), 429) is hyper.errors.RateLimitError
    assert class_of(error_object("tired", "mood_error"), 418) is hyper.errors.ServiceError


def test_all_classes_are_public() -> None:
    classes = {
        name for name, each in vars(hyper.errors).items() if isinstance(each, type) and issubclass(each, Exception)
    }
    assert classes == set(hyper.errors.__all__)
    assert all(getattr(hyper, name) is getattr(hyper.errors, name) for name in classes)
