"""The fields of a request that say what its answer must be: OpenAI's `response_format` and vLLM's ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from ts_parallel.errors import RequestError

FormKind = Literal["json", "regex", "choice", "grammar"]
FORM_KINDS: tuple[FormKind, ...] = get_args(FormKind)


class _FirstCounts(FailFast):
    """Of a list's wrong items: it has room for a million."""

    __hash__ = object.__hash__  # which a member of a union needs


FIRST_COUNTS = _FirstCounts()
Numbers = Annotated[list[int], FIRST_COUNTS]
Texts = Annotated[list[str], FIRST_COUNTS]
Objects = Annotated[list[dict[str, Any]], FIRST_COUNTS]


@dataclass(frozen=True)
class Form:
    """What an answer must be; `parameter` is the body's field that says so."""

    kind: FormKind
    value: Any
    """A JSON schema (an object or a boolean), an expression, a list of texts, or a grammar in Lark's syntax or GBNF."""
    parameter: str


class StrictModel(BaseModel):
    """A JSON object whose fields are known and of the right types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default_where_it_has_no_meaning_of_its_own(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = {name: own for name, own in cls.model_fields.items() if not own.is_required()}
        return {
            name: own
            for name, own in value.items()
            if own is not None or name not in fields or type(None) in get_args(fields[name].annotation)
        }


class JSONSchema(StrictModel):
    """OpenAI's `json_schema`; its name and description are for models that are told of them."""

    name: str | None = None
    description: str | None = None
    own: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """OpenAI's; `json_schema` is for the type of that name."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StructuredOutputs(StrictModel):
    """vLLM's; one of these."""

    json_: dict[str, Any] | str | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Texts | None = Field(default=None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None


def forms_of(
    response_format: ResponseFormat | None,
    structured_outputs: StructuredOutputs | None,
    guided: Mapping[FormKind, Any],
) -> list[Form]:
    """All that are asked for, wherever.

    Raises:
        RequestError: one is not said in full, or is no JSON where it has to be.
    """
    forms = [*_response_forms(response_format), *_structured_forms(structured_outputs)]
    return forms + [own for kind, value in guided.items() for own in _forms(kind, value, f"guided_{kind}")]


def _response_forms(wanted: ResponseFormat | None) -> list[Form]:
    name = "response_format"
    if wanted is None or wanted.type == "text":
        return []
    if wanted.type == "json_object":
        return [Form("json", {"type": "object"}, name)]
    if wanted.json_schema is None:
        raise RequestError("response_format of type 'json_schema' needs the field 'json_schema'", name)
    return [Form("json", wanted.json_schema.own, name)]


def _structured_forms(wanted: StructuredOutputs | None) -> list[Form]:
    if wanted is None:
        return []
    schema = {"type": "object"} if wanted.json_object and wanted.json_ is None else wanted.json_
    values = {"json": schema, "regex": wanted.regex, "choice": wanted.choice, "grammar": wanted.grammar}
    return [own for kind in FORM_KINDS for own in _forms(kind, values[kind], "structured_outputs")]


def _forms(kind: FormKind, value: Any, parameter: str) -> list[Form]:
    """None where it is not asked for, else one; a JSON schema may come as text."""
    if value is None:
        return []
    if kind == "json" and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{parameter}: the schema is not JSON: {error}", parameter) from None
    return [Form(kind, value, parameter)]
