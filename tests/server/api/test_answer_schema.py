"""JSON schemas of answers: the supported ones are filled exactly, all others are refused by keyword."""

from __future__ import annotations

import base64
import json
from enum import Enum
from typing import Any, Literal

import jsonschema
import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from pydantic import BaseModel, Field

from hyper_model.audio import SAMPLE_RATE_HZ
from server.api.answer_schema import PARTS, read_schema
from server.api.types import QaReply
from server.errors import RequestError
from tests.serving import Live, assert_error, tone, wav


@pytest.fixture(scope="module")
def reply(live: Live) -> QaReply:
    """A reply about a second of tone, with scored choices."""
    return QaReply.model_validate(live.ask(choices=["a bell", "a dog"]).json())


@pytest.fixture(scope="module")
def client(live: Live) -> Any:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def messages(clip: bytes | None = None) -> list[Any]:
    audio = {"data": base64.b64encode(clip or tone()).decode(), "format": "wav"}
    content = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}]


def json_schema(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def an_object(**properties: Any) -> dict[str, Any]:
    names = list(properties)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


TEXT = {"type": "string"}
TEXT_OR_NULL = {"anyOf": [TEXT, {"type": "null"}]}
LIST = {"type": "array", "items": TEXT}


class Sound(Enum):
    BELL = "a bell"
    DOG = "a dog"


class Speaker(BaseModel):
    id: str
    quotes: list[str]


class Heard(BaseModel):
    """All kinds of properties, in an order of their own."""

    kind: Literal["sound"]
    reasoning: str
    answer: Sound
    confidence: float = Field(ge=0, le=1)
    environment: list[str]
    speakers: list[Speaker]
    transcript: str | None = None


def test_the_client_parses_an_answer_with_parts_of_the_reply(client: OpenAI) -> None:
    completion: Any = client.chat.completions.parse(model="hyper", messages=messages(), response_format=Heard)
    found, hyper = completion.choices[0].message.parsed, completion.hyper
    assert isinstance(found, Heard) and found.kind == "sound"
    assert found.answer.value == hyper["answer"]["choice"]
    assert found.confidence == hyper["answer"]["confidence"]
    assert found.reasoning == hyper["reasoning"]["reasoning"]
    assert found.environment == hyper["perception"]["environment"] == ["loud sound"]
    assert list(json.loads(completion.choices[0].message.content)) == list(Heard.model_fields)
    assert "schema_description_ignored" in {warning["code"] for warning in hyper["warnings"]}


def test_a_stream_sends_the_same_json(client: OpenAI) -> None:
    whole = client.chat.completions.parse(model="hyper", messages=messages(), response_format=Heard, logprobs=True)
    with client.chat.completions.stream(
        model="hyper", messages=messages(), response_format=Heard, logprobs=True
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed
    assert whole.choices[0].logprobs and final.choices[0].logprobs == whole.choices[0].logprobs


class Open(BaseModel):
    summary: str


class Yes(BaseModel):
    is_loud: bool


class Number(BaseModel):
    count: int = Field(gt=0, lt=5)


@pytest.mark.parametrize("kind", [Open, Yes, Number])
def test_the_only_property_is_the_answer(client: OpenAI, kind: type[BaseModel]) -> None:
    completion: Any = client.chat.completions.parse(model="hyper", messages=messages(), response_format=kind)
    (value,) = completion.choices[0].message.parsed.model_dump().values()
    answer = completion.hyper["answer"]
    match value:
        case bool():
            assert (value, len(answer["scores"])) == (answer["choice"] == "yes", 2)
        case int():
            assert (value, len(answer["scores"])) == (int(answer["choice"]), 4)
        case _:
            assert value == answer["text"] and answer["scores"] is None


def test_choices_of_the_service_fill_a_text(client: OpenAI) -> None:
    completion: Any = client.chat.completions.create(
        model="hyper",
        messages=messages(),
        response_format=json_schema(an_object(answer=TEXT, confidence={"type": "number"})),
        extra_body={"hyper": {"choices": ["a bell", "a dog"]}},
    )
    answer = completion.hyper["answer"]
    expected = {"answer": answer["choice"], "confidence": answer["confidence"]}
    assert json.loads(completion.choices[0].message.content) == expected


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_answer_about_a_recording_fits_too(client: OpenAI, is_stream: bool) -> None:
    schema = an_object(answer={"enum": ["a bell", "a dog"]})
    found: Any = client.chat.completions.create(
        model="hyper",
        messages=messages(wav(np.tile([0.1, -0.1], 20 * SAMPLE_RATE_HZ))),
        response_format=json_schema(schema),
        stream=is_stream,
        extra_body={"hyper": {"long_audio": "chunk"}},
    )
    content = found.choices[0].message.content if not is_stream else deltas(found)
    jsonschema.validate(json.loads(content), schema)


def deltas(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


WITH_NUMBER = an_object(answer=TEXT, confidence={"type": "number"})


@pytest.mark.parametrize(
    ("schema", "options", "named"),
    [
        ({"type": "object"}, {}, "properties"),
        (an_object(answer={"type": "string", "maxLength": 5}), {}, "`answer` uses `maxLength`"),
        (an_object(answer={"type": "string", "pattern": "^a"}), {}, "`answer` uses `pattern`"),
        (an_object(answer={"type": "number"}), {}, "`answer` uses `type`"),
        (an_object(answer={"type": "integer", "minimum": 0}), {}, "`answer` uses `type`"),
        (an_object(answer={"type": "integer", "minimum": 0, "maximum": 10**300}), {}, "`answer` uses `maximum`"),
        (an_object(answer=LIST), {}, "`answer` uses `type`"),
        (an_object(answer=TEXT_OR_NULL), {}, "`answer` uses `anyOf`"),
        (an_object(answer={"enum": ["a", None]}), {}, "`answer` uses `enum` for null"),
        (an_object(answer={"enum": ["a", 1], "type": "string"}), {}, "`answer` uses `enum`"),
        (an_object(answer={"enum": ["1", 1]}), {}, "two choices are equal"),
        (an_object(answer={"enum": [*map(str, range(27))]}), {}, "27 choices"),
        (an_object(answer={"const": "a"}), {}, "1 choices"),
        (an_object(answer={"$ref": "#/$defs/missing"}), {}, "`answer` uses `$ref`"),
        ({**an_object(a={"$ref": "#/$defs/b"}), "$defs": {"b": {"$ref": "#/$defs/b"}}}, {}, "`$ref`"),
        (an_object(answer=TEXT, rain={"type": "boolean"}), {}, "`rain` uses `properties`"),
        (an_object(dog={"type": "boolean"}, rain={"type": "boolean"}), {}, "2 properties for the answer"),
        (an_object(answer=TEXT, speakers={"type": "array", "items": an_object(age=TEXT)}), {}, "`speakers.items.age`"),
        (an_object(answer=TEXT, environment={**LIST, "minItems": 1}), {}, "`environment` uses `minItems`"),
        (an_object(answer=TEXT, transcript={"type": "integer"}), {}, "`transcript` uses `type`"),
        (an_object(answer={"enum": ["a", "b"]}, confidence={"type": "number", "minimum": 0.5}), {}, "`minimum`"),
        (an_object(answer=TEXT) | {"minProperties": 2}, {}, "uses `minProperties`"),
        (an_object(answer=TEXT) | {"required": ["b"]}, {}, "uses `required`"),
        (WITH_NUMBER, {}, "An open answer has no `confidence`"),
        (an_object(answer={"type": "boolean"}), {"choices": ["a", "b"]}, "both list the choices"),
        (an_object(answer=TEXT, transcript=TEXT), {"long_audio": "chunk"}, "only the answer and constants"),
    ],
)
def test_a_schema_that_cannot_be_promised_is_refused_by_keyword(
    client: OpenAI, schema: Any, options: Any, named: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="hyper", messages=messages(), response_format=json_schema(schema), extra_body={"hyper": options}
        )
    assert caught.value.param == "response_format" and named in caught.value.message


@pytest.mark.parametrize("name", ["kind", "\ud800"])
@pytest.mark.parametrize("value", [1e999, "\ud800", 10**400])
def test_values_outside_json_and_unicode_are_refused(live: Live, name: str, value: Any) -> None:
    schema = json_schema(an_object(**{"answer": TEXT, name: {"const": value, "type": "string"}}))
    body = json.dumps({"model": "hyper", "messages": messages(), "response_format": schema})
    body = body.replace("Infinity", "1e999")
    found = live.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert_error(found, 400, found.json()["error"]["code"], "response_format")


SCALARS = st.text(min_size=1, max_size=8).filter(lambda text: bool(text.strip())) | st.integers() | st.booleans()
ANSWERS = st.one_of(
    st.just(TEXT),
    st.just({"type": "boolean"}),
    st.lists(SCALARS, min_size=2, max_size=26).map(lambda values: {"enum": values}),
    st.builds(
        lambda low, num: {"type": "integer", "minimum": low, "exclusiveMaximum": low + num},
        st.integers(),
        st.integers(2, 26),
    ),
)
PART_SCHEMAS: dict[str, list[Any]] = {
    **{name: [TEXT, TEXT_OR_NULL, {"type": ["null", "string"]}] for name, shape in PARTS.items() if shape == "string"},
    "confidence": [{"type": "number"}, {"anyOf": [{"type": "null"}, {"type": "number", "maximum": 1}]}],
    "environment": [LIST, {"type": "array"}],
    "speakers": [{"type": "array", "items": an_object(quotes=LIST)}],
}


@st.composite
def objects(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(list(PARTS)), unique=True))
    properties = {name: draw(st.sampled_from(PART_SCHEMAS[name])) for name in names}
    properties |= draw(st.dictionaries(st.sampled_from("xyz"), SCALARS.map(lambda value: {"const": value})))
    properties["answer"] = draw(ANSWERS)
    return an_object(**{name: properties[name] for name in draw(st.permutations(list(properties)))})


@given(schema=ANSWERS | objects())
def test_what_is_accepted_is_filled_exactly(reply: QaReply, schema: dict[str, Any]) -> None:
    try:
        found = read_schema(schema)
    except RequestError as error:
        # Values that are no usable choices, such as two that look alike.
        assert error.param == "response_format" and "choices" in error.message
        return
    for index in range(len(found.choices) or 1):
        answer = reply.answer.model_copy(update={"choice_index": index})
        value = json.loads(found.content(reply.model_copy(update={"answer": answer})))
        jsonschema.validate(value, schema)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3) | st.just("#/$defs/a"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "type properties required enum const $ref $defs anyOf items answer a minimum maximum "
                "additionalProperties description".split()
            ),
            inner | st.sampled_from(["object", "string", "integer", "array"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(schema=st.dictionaries(st.sampled_from(["type", "properties", "enum", "$ref", "$defs", "anyOf"]), JSON))
def test_any_json_is_read_or_refused(schema: dict[str, Any]) -> None:
    try:
        read_schema(schema)
    except RequestError as error:
        assert error.status == 400
