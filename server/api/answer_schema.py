"""JSON schemas of an answer: the subset of `response_format` json_schema that this service fills exactly.

A schema describes the answer, or an object with the answer as one property. A finite set of values becomes choices, and
the model scores them as it does all choices. A plain string is an open answer. Other properties of the object are
constants, or parts of the reply by their names in `hyper` (`PARTS`). Code writes the JSON, not the model, so it always
fits the schema. Any other schema is refused, and the error names the keyword.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from hyper_model.errors import PromptError
from hyper_model.trace import MAX_CHOICES, check_question
from server.api.types import QaReply
from server.errors import PLAIN_NAME, RequestError

PARAM = "response_format"
HINT = "docs/openai.md lists the supported schemas."
MAX_PROPERTIES = 64
ANSWER = "answer"

ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "$comment", "$schema", "$id"})
"""Keywords that limit no value."""

DEFINITIONS = ("$defs", "definitions")

Schema = Mapping[str, Any]
Shape = Any
"""Form of a value: `string`, `number`, a list with the form of its items, or the forms of an object's members."""

PARTS: Mapping[str, Shape] = {
    "confidence": "number",
    "termination": "string",
    "environment": ["string"],
    "environment_text": "string",
    "speakers": [{"id": "string", "description": "string", "quotes": ["string"]}],
    "transcript": "string",
    "description": "string",
    "planning": "string",
    "reasoning": "string",
    "summary": "string",
}
"""Parts of a reply that a property may ask for by name."""

Fill = Callable[[Any], Any]
"""Function from a part of the reply to the value of its property."""


@dataclass(frozen=True)
class AnswerSchema:
    """A supported schema of an answer.

    Attributes:
        choices: Texts of the answers that the schema allows; empty for an open answer.
        values: JSON value of each choice.
        properties: For each property of an object, a function from `Filled` to its value; None if the schema describes
            the answer alone.
        parts: Names of the used parts of the reply.
        needs_confidence: Whether a null `confidence` would not fit.
        is_described: Whether the schema contains descriptions, which the model does not read.
    """

    choices: tuple[str, ...]
    values: tuple[Any, ...]
    properties: Mapping[str, Callable[[Filled], Any]] | None
    parts: frozenset[str]
    needs_confidence: bool
    is_described: bool

    def content(self, reply: QaReply) -> str:
        """Write the answer of a reply as JSON of this schema."""
        filled = Filled(self._value(reply), parts_of(reply) if self.parts else {})
        if self.properties is None:
            return json.dumps(filled.answer, ensure_ascii=False)
        return json.dumps({name: fill(filled) for name, fill in self.properties.items()}, ensure_ascii=False)

    def _value(self, reply: QaReply) -> Any:
        answer = reply.answer
        return answer.text if not self.values or answer.choice_index is None else self.values[answer.choice_index]


@dataclass(frozen=True)
class Filled:
    """The values that properties are filled from: the answer, and the parts of the reply by name."""

    answer: Any
    parts: Mapping[str, Any]


def parts_of(reply: QaReply) -> dict[str, Any]:
    """Return the parts of a reply by name, see `PARTS`."""
    parts: dict[str, Any] = {"confidence": reply.answer.confidence, "termination": reply.termination}
    for group in (reply.perception, reply.reasoning):
        parts |= group.model_dump(mode="json") if group else {}
    return parts


def read_schema(schema: Schema) -> AnswerSchema:
    """Read a schema.

    Raises:
        RequestError: 400, if the service cannot fill the schema exactly; the message names property and keyword.
    """
    return _Reader(schema).read()


@dataclass
class _Reader:
    """Reads one schema; `root` holds the definitions that its references name."""

    root: Schema
    parts: set[str] = field(default_factory=set[str])
    needs_confidence: bool = False
    is_described: bool = False

    def read(self) -> AnswerSchema:
        schema = self._resolve(self.root, "")
        if schema.get("type") != "object" or _value_keyword(schema):
            choices, values = self._answer(schema, "")
            return AnswerSchema(choices, values, None, frozenset(), False, self.is_described)
        members = {
            name: self._resolve(member, name) for name, member in self._members(schema, "", is_root=True).items()
        }
        answer = self._answer_name(members)
        choices, values = self._answer(members[answer], answer)
        fills: dict[str, Callable[[Filled], Any]] = {}
        for name, member in members.items():
            fills[name] = (lambda filled: filled.answer) if name == answer else self._other(member, name)
        return AnswerSchema(choices, values, fills, frozenset(self.parts), self.needs_confidence, self.is_described)

    def _answer_name(self, members: Mapping[str, Schema]) -> str:
        """Return the property of the answer: `answer`, the only property, or the only one that is no part."""
        if ANSWER in members:
            return ANSWER
        varying = [name for name, member in members.items() if not _is_constant(member)]
        found = varying if len(varying) == 1 else [name for name in varying if name not in PARTS]
        if len(found) == 1:
            return found[0]
        message = (
            f"The schema has {len(found)} properties for the answer; one question has one answer. Name one property "
            f"`answer`, and use only constants and parts of the reply beside it: {', '.join(PARTS)}."
        )
        raise RequestError(
            "unsupported_parameter", message, param=PARAM, limit=1, actual=len(found), hint=HINT + SEVERAL_HINT
        )

    def _answer(self, schema: Schema, place: str) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        """Return the choices of the answer with their values; none for an open answer."""
        values: Sequence[Any] = ()
        if keyword := _value_keyword(schema):
            self._check(schema, place, {"type", keyword})
            values = self._listed(schema, place, keyword)
            if None in values:
                raise unsupported(place, keyword, "null")
            self._check_type(schema, place, keyword, values)
        else:
            match schema.get("type"):
                case "string":
                    self._check(schema, place, {"type"})
                    return (), ()
                case "boolean":
                    self._check(schema, place, {"type"})
                    values = (True, False)
                case "integer":
                    values = self._integers(schema, place)
                case _:
                    names = [name for name in schema if name not in ANNOTATIONS and name not in DEFINITIONS]
                    # Combinations come without a type; they are the reason then.
                    keyword = "type" if "type" in schema or not names else names[0]
                    raise unsupported(
                        place, keyword, "an answer other than `string`, `boolean`, an `enum` or a bounded `integer`"
                    )
        choices = tuple(map(_choice_text, values))
        try:
            check_question("?", choices)
        except PromptError as error:
            message = f"The schema's values for the answer cannot be choices: {error.message}."
            raise RequestError("invalid_parameter", message, param=PARAM, hint=HINT) from None
        return choices, tuple(values)

    def _integers(self, schema: Schema, place: str) -> range:
        """Return the integers between the bounds of a schema."""
        self._check(schema, place, {"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})
        low = [self._bound(schema, place, "minimum", 0), self._bound(schema, place, "exclusiveMinimum", 1)]
        high = [self._bound(schema, place, "maximum", 0), self._bound(schema, place, "exclusiveMaximum", -1)]
        lows, highs = [each for each in low if each is not None], [each for each in high if each is not None]
        if not lows or not highs:
            raise unsupported(place, "type", "an integer without `minimum` and `maximum`")
        first, last = max(lows), min(highs)
        # The length of a range of huge integers overflows.
        if not 2 <= last - first + 1 <= MAX_CHOICES:
            raise unsupported(place, "maximum", f"a range of other than 2 to {MAX_CHOICES} integers")
        return range(first, last + 1)

    def _bound(self, schema: Schema, place: str, keyword: str, offset: int) -> int | None:
        value = schema.get(keyword)
        if value is None:
            return None
        if not _is_number(value) or value != int(value):
            raise unsupported(place, keyword, "a bound other than an integer")
        return int(value) + offset

    def _other(self, schema: Schema, name: str) -> Callable[[Filled], Any]:
        """Return the filler of a property beside the answer: a constant, or a part of the reply."""
        if _is_constant(schema):
            keyword = _value_keyword(schema)
            self._check(schema, name, {"type", keyword})
            (value,) = values = self._listed(schema, name, keyword)
            self._check_type(schema, name, keyword, values)
            return lambda _: value
        if name not in PARTS:
            raise unsupported(name, "properties", f"a property beside the answer other than {', '.join(PARTS)}")
        fill = self._part(schema, PARTS[name], name)
        self.parts.add(name)
        if name == "confidence":
            _, is_nullable = self._without_null(schema, name)
            self.needs_confidence = not is_nullable
        return lambda filled: fill(filled.parts.get(name))

    def _part(self, schema: Schema, shape: Shape, place: str) -> Fill:
        """Check that values of a form fit a schema; return a function that drops what the schema omits."""
        schema, is_nullable = self._without_null(self._resolve(schema, place), place)
        match shape:
            case [item_shape]:
                self._check(schema, place, {"type", "items"})
                self._require_type(schema, place, "array")
                fill = self._part(schema["items"], item_shape, f"{place}.items") if "items" in schema else _same
                return lambda items: [fill(item) for item in items or ()]
            case Mapping():
                shapes = cast("Mapping[str, Shape]", shape)
                members = self._members(schema, place)
                if extra := next((name for name in members if name not in shapes), None):
                    raise unsupported(f"{place}.{extra}", "properties", f"a member other than {', '.join(shapes)}")
                fills = {name: self._part(member, shapes[name], f"{place}.{name}") for name, member in members.items()}
                return lambda found: {name: fill(found[name]) for name, fill in fills.items()}
            case "number":
                self._check(schema, place, {"type", "minimum", "maximum"})
                self._require_type(schema, place, "number")
                # A confidence is between 0 and 1, so these bounds hold.
                if not (_is_number(schema.get("minimum", 0)) and schema.get("minimum", 0) <= 0):
                    raise unsupported(place, "minimum", "a bound above 0")
                if not (_is_number(schema.get("maximum", 1)) and schema.get("maximum", 1) >= 1):
                    raise unsupported(place, "maximum", "a bound below 1")
                return _same
            case _:
                self._check(schema, place, {"type"})
                self._require_type(schema, place, "string")
                # A section that the trace lacks is null, or empty text; `hyper.trace.missing_sections` names it.
                return _same if is_nullable else lambda text: text or ""

    def _members(self, schema: Schema, place: str, *, is_root: bool = False) -> dict[str, Schema]:
        """Return the schemas of an object's properties."""
        self._require_type(schema, place, "object")
        self._check(schema, place, {"type", "properties", "required", "additionalProperties"})
        members = schema.get("properties")
        if not isinstance(members, Mapping) or not members:
            raise unsupported(place, "properties", "an object without properties")
        found = cast("Mapping[str, Any]", members)
        if len(found) > MAX_PROPERTIES:
            message = f"The schema has too many properties; the limit is {MAX_PROPERTIES}."
            raise RequestError("invalid_parameter", message, param=PARAM, limit=MAX_PROPERTIES, actual=len(found))
        required: Any = schema.get("required", [])
        names = cast("list[Any]", required) if isinstance(required, list) else [None]
        if not all(isinstance(name, str) and name in found for name in names):
            raise unsupported(place, "required", "a name that `properties` lacks")
        if not isinstance(schema.get("additionalProperties", False), bool | Mapping):
            raise unsupported(place, "additionalProperties", "a value other than a boolean or a schema")
        for name, member in found.items():
            if not _is_text(name):
                raise RequestError("invalid_parameter", "The schema has a name of invalid Unicode.", param=PARAM)
            if not isinstance(member, Mapping):
                raise unsupported(name, "properties", "a property whose schema is no object")
        return dict(found)

    def _resolve(self, schema: Any, place: str) -> Schema:
        """Follow references to `$defs` and `definitions` of the schema."""
        seen: set[str] = set()
        while isinstance(schema, Mapping) and "$ref" in schema:
            found = cast("Schema", schema)
            self._check(found, place, {"$ref"})
            target: Any = found["$ref"]
            group, _, name = target[2:].partition("/") if isinstance(target, str) else ("", "", "")
            definitions: Any = self.root.get(group) if group in DEFINITIONS else None
            if name in seen or not isinstance(definitions, Mapping) or name not in definitions:
                raise unsupported(place, "$ref", "a reference other than to a definition in `$defs`")
            seen.add(name)
            schema = cast("Mapping[str, Any]", definitions)[name]
        if not isinstance(schema, Mapping):
            raise unsupported(place, "type", "a schema that is no object")
        return cast("Schema", schema)

    def _without_null(self, schema: Schema, place: str) -> tuple[Schema, bool]:
        """Return a schema without its alternative null, and whether it has one."""
        if isinstance(schema.get("type"), list):
            types = [name for name in cast("list[Any]", schema["type"]) if name != "null"]
            is_nullable = len(types) < len(schema["type"])
            return {**schema, "type": types[0] if len(types) == 1 else types}, is_nullable
        if "anyOf" not in schema:
            return schema, False
        self._check(schema, place, {"anyOf"})
        options: Any = schema["anyOf"]
        others = [each for each in cast("list[Any]", options) if each != {"type": "null"}] if options else []
        if not isinstance(options, list) or len(others) != 1 or len(others) == len(cast("list[Any]", options)):
            raise unsupported(place, "anyOf", "alternatives other than one schema and null")
        return self._resolve(others[0], place), True

    def _listed(self, schema: Schema, place: str, keyword: str) -> list[Any]:
        """Return the values of `enum` or `const`."""
        values: Any = [schema["const"]] if keyword == "const" else schema["enum"]
        if not isinstance(values, list) or not all(_is_scalar(value) for value in cast("list[Any]", values)):
            raise unsupported(place, keyword, "a value other than text, a number, true or false")
        return cast("list[Any]", values)

    def _check_type(self, schema: Schema, place: str, keyword: str, values: Sequence[Any]) -> None:
        """Refuse listed values of another type than the schema's."""
        types: Any = schema.get("type")
        if types is None:
            return
        names = cast("list[Any]", types) if isinstance(types, list) else [types]
        if not all(any(_has_type(value, name) for name in names) for value in values):
            raise unsupported(place, keyword, "a value of another type than `type`")

    def _require_type(self, schema: Schema, place: str, expected: str) -> None:
        if schema.get("type") != expected:
            raise unsupported(place, "type", f"a type other than `{expected}` here")

    def _check(self, schema: Schema, place: str, known: set[str]) -> None:
        """Refuse keywords that limit values in a way that the service cannot promise."""
        self.is_described |= "description" in schema
        for keyword in schema:
            if keyword not in known and keyword not in ANNOTATIONS and keyword not in DEFINITIONS:
                raise unsupported(place, keyword)


SEVERAL_HINT = " Ask several questions with `questions` of /v1/audio/qa."


def unsupported(place: str, keyword: str, fault: str = "") -> RequestError:
    """Return the error of a keyword that the service cannot fulfil.

    Args:
        place: Dotted name of the property; empty for the whole schema.
        keyword: The keyword; left out if it is no plain word.
        fault: The unsupported use of the keyword; empty if no use of it is supported.
    """
    where = f" of `{place}`" if PLAIN_NAME.fullmatch(place) else " of a property" if place else ""
    named = f"`{keyword}`" if PLAIN_NAME.fullmatch(keyword.removeprefix("$")) else "a keyword"
    message = f"The schema{where} uses {named}{f' for {fault}' if fault else ''}; the service cannot promise that."
    return RequestError("unsupported_parameter", message, param=PARAM, hint=HINT)


def _same(value: Any) -> Any:
    return value


def _value_keyword(schema: Schema) -> str:
    """Return the keyword that lists all values of a schema; empty without one."""
    return next((keyword for keyword in ("const", "enum") if keyword in schema), "")


def _is_constant(schema: Schema) -> bool:
    values: Any = schema.get("enum")
    return "const" in schema or (isinstance(values, list) and len(cast("list[Any]", values)) == 1)


def _choice_text(value: Any) -> str:
    """Return a value as a choice for the model; true and false are yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)


def _is_number(value: Any) -> bool:
    is_finite = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return is_finite and not isinstance(value, bool)


def _is_text(value: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _is_scalar(value: Any) -> bool:
    return _is_text(value) if isinstance(value, str) else value is None or isinstance(value, bool) or _is_number(value)


def _has_type(value: Any, name: Any) -> bool:
    match name:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return _is_number(value) and value == int(value)
        case _:
            return name == "number" and _is_number(value)
