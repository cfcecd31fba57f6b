"""What a request says of tools: which there are, which may or must be called, and how many at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ts_parallel.errors import RequestError
from ts_parallel.serving.exchange import echo

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_MOST_TOOLS = 128  # as OpenAI has it
_CHOICES = ("auto", "none", "required")


@dataclass(frozen=True)
class Function:
    """One that may be called."""

    name: str
    schema: Mapping[str, Any]
    """Of its arguments, an object."""
    is_strict: bool


@dataclass(frozen=True)
class Offer:
    """The tools of one request, and what the model may do with them."""

    tools: tuple[dict[str, Any], ...]
    """As the request has them, for the chat template."""
    functions: tuple[Function, ...]
    must_call: bool
    is_named: bool
    """Whether it must be one certain function, once."""
    may_be_many: bool


def offer_of(
    tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None, parallel: bool | None
) -> Offer | None:
    """What is offered; None where nothing may be called.

    Raises:
        RequestError: a tool is none, or the choice is none of these tools.
    """
    if tools and len(tools) > _MOST_TOOLS:
        raise RequestError(f"{len(tools)} tools, at most {_MOST_TOOLS} can be offered", "tools")
    functions = [_function(number, tool) for number, tool in enumerate(tools or [])]
    names = [own.name for own in functions]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(f"tools: two functions are called {twice!r}", "tools")
    mode, wanted = _chosen(choice or "auto")
    if mode != "none" and (mode == "required" or wanted is not None) and not functions:
        raise RequestError(f"tool_choice is {echo(choice)}, which needs tools", "tool_choice")
    for name in wanted or ():
        if name not in names:
            raise RequestError(f"tool_choice: {name!r} is none of the tools: {', '.join(names)}", "tool_choice")
    if mode == "none" or not functions:
        return None
    kept = [at for at, name in enumerate(names) if wanted is None or name in wanted]
    return Offer(
        tuple((tools or [])[at] for at in kept),
        tuple(functions[at] for at in kept),
        must_call=mode != "auto",
        is_named=mode == "named",
        may_be_many=parallel is not False and mode != "named",
    )


def _function(number: int, tool: dict[str, Any]) -> Function:
    place = f"tools.{number}"
    if tool.get("type") != "function":
        raise RequestError(
            f"{place}: only tools of type 'function' can be called, got {echo(tool.get('type'))}", "tools"
        )
    own = tool.get("function")
    if not isinstance(own, dict):
        raise RequestError(f"{place}: 'function' is no object, got {echo(own)}", "tools")
    name = own.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{place}: a function's name has 1 to 64 letters of a-z, A-Z, 0-9, _, . and -, got {echo(name)}", "tools"
        )
    schema = own.get("parameters")
    if schema is not None and not isinstance(schema, dict):
        raise RequestError(f"{place}: the parameters of {name!r} are no JSON schema, got {echo(schema)}", "tools")
    if schema and schema.get("type", "object") != "object":
        raise RequestError(f"{place}: the parameters of {name!r} are no object, got {echo(schema['type'])}", "tools")
    strict = own.get("strict")
    if strict not in (None, True, False):
        raise RequestError(f"{place}: 'strict' of {name!r} is neither true nor false, got {echo(strict)}", "tools")
    none = {"type": "object", "properties": {}, "additionalProperties": False}
    return Function(name, none if schema is None else {"type": "object", **schema}, bool(strict))


Mode = Literal["auto", "none", "required", "named"]


def _chosen(choice: str | dict[str, Any]) -> tuple[Mode, list[str] | None]:
    """What is to be done, and with which functions; None: with any."""
    if isinstance(choice, str):
        if choice not in _CHOICES:
            known = ", ".join(_CHOICES)
            raise RequestError(f"tool_choice is {echo(choice)}, not one of {known} or a function", "tool_choice")
        return choice, None  # type: ignore[return-value]
    if choice.get("type") == "function":
        return "named", [_name_in(choice)]
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        mode = allowed.get("mode") if isinstance(allowed, dict) else None
        if mode in ("auto", "required") and isinstance(tools, list) and tools:
            return mode, [_name_in(own) for own in tools]
    raise RequestError(f"tool_choice names no function, got {echo(choice)}", "tool_choice")


def _name_in(choice: Any) -> str:
    own = choice.get("function") if isinstance(choice, dict) else None
    name = own.get("name") if isinstance(own, dict) else None
    if not isinstance(name, str):
        raise RequestError(f"tool_choice names no function, got {echo(choice)}", "tool_choice")
    return name
