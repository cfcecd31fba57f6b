"""Tools of OpenAI's `v1/responses` as functions of a chat completion, and which of them a call is of.

A chat has functions alone. So a tool that takes a text is one with a single argument, one of a namespace has both
names in one, and the search for tools that a client runs is one as well: what it has found is offered from then on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ts_parallel.errors import RequestError

logger = logging.getLogger(__name__)

SEARCH: Final = "tool_search"
_LONGEST_NAME = 64  # of a chat's functions
# Tools that OpenAI's own servers run. A model that is not told of them answers without.
_HOSTED = (
    "code_interpreter computer_use_preview file_search image_generation local_shell mcp shell web_search "
    "web_search_preview"
).split()
_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
_QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
_said: set[str] = set()  # of which the log has told once


@dataclass(frozen=True)
class Tool:
    """What one function of the chat stands for."""

    kind: Literal["function", "custom", "tool_search"]
    name: str
    namespace: str | None = None


@dataclass(frozen=True)
class Tools:
    """What is offered in one turn."""

    functions: list[dict[str, Any]] = field(default_factory=list)
    """As a chat has them."""
    by_name: Mapping[str, Tool] = field(default_factory=dict)
    """By the names of those functions."""

    def called(self, name: str) -> Tool:
        return self.by_name.get(name, Tool("function", name))

    def choice(self, choice: Any) -> dict[str, Any]:
        """A `tool_choice` in chat's shape; where only some tools are allowed, those alone are offered.

        Raises:
            RequestError: it is of a kind that cannot be made.
        """
        if choice is None or isinstance(choice, str):
            return {} if choice is None else {"tool_choice": choice}
        kind = choice.get("type")
        if kind in ("function", "custom"):
            name = choice.get("name")
            if not isinstance(name, str):
                raise RequestError(f"tool_choice names no tool, got {name!r}", "tool_choice")
            name = next(iter(self._names_of([name])), name)
            return {"tool_choice": {"type": "function", "function": {"name": name}}}
        if kind == "allowed_tools":
            names = self._names_of([tool.get("name") for tool in objects(choice.get("tools"), "tool_choice")])
            allowed = [tool for tool in self.functions if tool["function"]["name"] in names]
            return {"tools": allowed, "tool_choice": choice.get("mode", "auto")}
        raise RequestError(f"tool_choice of type {kind!r} cannot be made here: name a function", "tool_choice")

    def _names_of(self, names: Sequence[Any]) -> list[str]:
        return [own for own, tool in self.by_name.items() if own in names or tool.name in names]


def chat_name(name: str, namespace: Any = None) -> str:
    """Of a tool, as a chat's function: the same from turn to turn, and no longer than those may be."""
    if not namespace:
        return name
    joined = f"{namespace}{'' if str(namespace).endswith('__') else '__'}{name}"
    if len(joined) <= _LONGEST_NAME:
        return joined
    return f"{joined[: _LONGEST_NAME - 9]}_{hashlib.sha256(joined.encode()).hexdigest()[:8]}"


def parse_tools(offered: Any, found: Sequence[dict[str, Any]] = ()) -> Tools:
    """
    Args:
        found: tools that a search has brought.

    Raises:
        RequestError: one of them is none.
    """
    tools = objects(offered, "tools")
    is_searched = any(tool.get("type") == SEARCH and tool.get("execution") == "client" for tool in tools)
    made: dict[str, tuple[dict[str, Any], Tool]] = {}
    for number, own in enumerate(tools):
        for function, tool in _functions(own, f"tools.{number}", None, is_searched):
            if tool.kind != SEARCH or is_searched:
                _add(made, function, tool, f"tools.{number}")
    for number, own in enumerate(found):
        for function, tool in _functions(own, f"input: found tool {number}", None, False):
            if function["name"] not in made:
                _add(made, function, tool, "input")
    functions = [{"type": "function", "function": function} for function, _ in made.values()]
    return Tools(functions, {name: tool for name, (_, tool) in made.items()})


def _add(made: dict[str, tuple[dict[str, Any], Tool]], function: dict[str, Any], tool: Tool, place: str) -> None:
    if function["name"] in made:
        raise RequestError(f"{place}: two tools are called {function['name']!r}", "tools")
    made[function["name"]] = function, tool


def _functions(
    own: dict[str, Any], place: str, namespace: str | None, hides: bool
) -> Iterator[tuple[dict[str, Any], Tool]]:
    """Those that one tool is.

    Args:
        hides: whether what is to be loaded later is left out, for the client searches for it.
    """
    kind, name = own.get("type"), own.get("name")
    if kind == "namespace" and namespace is None and isinstance(name, str) and isinstance(own.get("tools"), list):
        for number, tool in enumerate(objects(own["tools"], "tools")):
            yield from _functions(tool, f"{place}.tools.{number}", name, hides)
    elif kind == SEARCH:
        about = own.get("description") or "Finds tools by what they do"
        yield (
            {"name": SEARCH, "description": about, "parameters": own.get("parameters") or _QUERY},
            Tool(SEARCH, SEARCH),
        )
    elif kind in ("function", "custom"):
        if not isinstance(name, str):
            raise RequestError(f"{place}: a tool has a name, got {name!r}", "tools")
        if not (hides and own.get("defer_loading")):
            yield _function(own, chat_name(name, namespace)), Tool(kind, name, namespace)
    elif str(kind).startswith(tuple(_HOSTED)):
        _say_once(f"tools of type {kind!r} are left out: they run on OpenAI's servers alone")
    else:
        raise RequestError(
            f"{place}: a tool is of type function or custom, or a namespace with a name and tools, got {kind!r}",
            "tools",
        )


def _function(own: dict[str, Any], name: str) -> dict[str, Any]:
    if own["type"] == "function":
        more = {key: own[key] for key in ("description", "parameters", "strict") if own.get(key)}
        return {"name": name, "parameters": {"type": "object"}, **more}
    if (own.get("format") or {}).get("type", "text") != "text":
        _say_once("tools of type 'custom' get any text: nothing is held to their format")
    return {"name": name, "description": own.get("description") or "", "parameters": _TEXT}


def objects(value: Any, name: str) -> list[dict[str, Any]]:
    """
    Raises:
        RequestError: it is no list of objects.
    """
    if value is None and name != "input":
        return []
    if not isinstance(value, list) or not all(isinstance(own, dict) for own in value):
        raise RequestError(f"{name!r} must be a list of objects" + (" or a text" if name == "input" else ""), name)
    return value


def _say_once(text: str) -> None:
    if text not in _said and len(_said) < 100:
        _said.add(text)
        logger.warning(text)
