"""Requests that no client means to send: bodies drawn along a description of routes, and what else may be odd of them.

Most of a body is right by the description, so that what is wrong is met deep inside; now and then anything stands
anywhere. How a body becomes bytes, and under which headers, is drawn as well.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

JSON = "application/json"


@dataclass(frozen=True)
class Request:
    """One, as it goes over the wire."""

    kind: str
    """What is odd about it."""
    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def __str__(self) -> str:
        return f"{self.kind}: {self.method} {self.path} {dict(self.headers)} {self.body[:200]!r}"

    def wire(self, host: str) -> bytes:
        head = [f"{self.method} {self.path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(self.body)}"]
        head += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1", "replace") + self.body


_ODD_TEXTS = (
    "",
    "\x00",
    "\ud800",
    "é\u0301\u202e",
    "🙂" * 9,
    "</s><s>",
    "{{ 7 * 7 }}",
    "../../etc/passwd",
    "\u2028",
    "a" * 5000,
    "9" * 4000,
)
_ODD_NUMBERS = (0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.1, -0.0, 1e308, 5e-324, 1.0)
_NOT_FINITE = (float("nan"), float("inf"), float("-inf"))

texts = st.one_of(st.text(max_size=12), st.sampled_from(_ODD_TEXTS), st.sampled_from(["x", "What is a list?", "def "]))
numbers = st.one_of(st.sampled_from(_ODD_NUMBERS), st.integers(-3, 40), st.floats(), st.sampled_from(_NOT_FINITE))
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)
ids = st.lists(st.integers(-1, 600), max_size=6)

_functions = st.fixed_dictionaries(
    {"name": texts | st.just("find")}, optional={"parameters": st.just({"type": "object"}) | anything, "strict": leaves}
)
_tools = st.fixed_dictionaries(
    {"type": st.sampled_from(["function", "custom", "namespace", "tool_search", "web_search"]) | leaves},
    optional={"function": _functions | anything, "name": texts, "input_schema": anything, "tools": anything},
)
_parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "input_text", "thinking", "image", "tool_use", "tool_result"]) | leaves},
    optional={
        "text": texts | leaves,
        "content": anything,
        "input": anything,
        "source": anything,
        "tool_use_id": leaves,
    },
)
_messages = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool", "developer"]) | leaves,
        "content": texts | st.lists(_parts | anything, max_size=3) | leaves,
    },
    optional={
        "tool_calls": st.lists(anything, max_size=2) | anything,
        "name": leaves,
        "type": texts,
        "output": anything,
    },
)
_conversations = st.lists(_messages | anything, max_size=4) | st.just([{"role": "user", "content": "hi"}])
_tensors = st.fixed_dictionaries(
    {"name": st.just("text_input") | leaves, "shape": ids | anything, "datatype": st.just("BYTES") | leaves},
    optional={"data": st.lists(texts, max_size=3) | anything},
)
_schemas = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "object", "properties": {"a": {"type": "string"}}},
        {"$ref": "#"},
        {"$ref": "file:///etc/passwd"},
        {"type": "string", "pattern": "(a+)+$"},
        {"enum": [1, "x", None]},
        {"anyOf": []},
    ]
)
# What a field may be beside what its schema says, which for some is next to nothing.
_FIELDS: Mapping[str, SearchStrategy[Any]] = {
    "messages": _conversations,
    "input": texts | ids | _conversations | st.lists(texts, max_size=3),
    "inputs": st.lists(_tensors | anything, max_size=3),
    "outputs": st.lists(anything, max_size=2),
    "parameters": st.dictionaries(st.sampled_from(["max_tokens", "temperature", "stream", "n"]), leaves),
    "tools": st.lists(_tools | anything, max_size=3),
    "tool_choice": st.sampled_from(["auto", "none", "required"]) | st.fixed_dictionaries({"type": leaves | texts}),
    "guided_json": _schemas | st.builds(json.dumps, _schemas) | anything,
    "guided_regex": st.sampled_from(["a|b", "(a+)+$", "[", "\\d{1,99999}", "(?=x)"]) | texts,
    "guided_grammar": st.sampled_from(['start: "a"', 'root ::= "a" | root', "start: start", "start"]) | texts,
    "response_format": st.fixed_dictionaries(
        {"type": st.just("json_schema")}, optional={"json_schema": st.builds(lambda own: {"schema": own}, _schemas)}
    ),
    "model": st.just("demo") | st.just(None) | leaves,
    "stream": st.booleans(),
    "stop": st.lists(texts, max_size=3) | texts,
}


def values(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> SearchStrategy[Any]:
    """What a schema allows."""
    if "$ref" in schema:
        return values(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return st.one_of([values(own, schemas) for own in schema[several]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if isinstance(kind, list):
        return st.one_of([values({**schema, "type": own}, schemas) for own in kind])
    if kind == "object":
        return objects(schema, schemas)
    if kind == "array":
        return st.lists(values(schema.get("items", {}), schemas), min_size=schema.get("minItems", 0), max_size=4)
    if kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum", -5))
        most = min(schema.get("maximum", schema.get("exclusiveMaximum", 600)), 2**40)
        whole: SearchStrategy[Any] = st.integers(-(-int(least) // 1), int(most))
        return whole if kind == "integer" else st.floats(float(least), float(most)) | whole
    plain = {"string": texts, "boolean": st.booleans(), "null": st.none()}
    return plain.get(str(kind), anything)


def objects(
    schema: Mapping[str, Any],
    schemas: Mapping[str, Any],
    known: Mapping[str, SearchStrategy[Any]] = _FIELDS,
) -> SearchStrategy[dict[str, Any]]:
    """
    Args:
        known: what fields may be beside what the schema says.
    """
    fields: Mapping[str, Any] = schema.get("properties", {})
    if not fields:
        return st.dictionaries(texts, anything, max_size=3)
    required = list(schema.get("required", ()))

    @st.composite
    def make(draw: st.DrawFn) -> dict[str, Any]:
        names = [name for name in required if draw(st.integers(0, 19))]  # now and then one is missing
        names += draw(st.lists(st.sampled_from(list(fields)), max_size=4, unique=True))
        made: dict[str, Any] = {}
        for name in dict.fromkeys(names):
            way = draw(st.integers(0, 9))
            right = values(fields[name], schemas)
            made[name] = draw(anything if way == 0 else known.get(name, right) if way < 6 else right)
        if not draw(st.integers(0, 9)):
            made[draw(texts)] = draw(anything)
        return made

    return make()


def bounded(body: Any) -> Any:
    """The same, so that where it is right it is soon answered, and its own time is not what ends it."""
    if not isinstance(body, dict):
        return body
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(name), (int, float)) and body[name] > 8:
            body[name] = 3
    if "max_tokens" not in body and ("prompt" in body or "messages" in body):
        body["max_tokens"] = 2
    if isinstance(body.get("timeout"), (int, float)) and body["timeout"] > 0:
        body["timeout"] = 600.0
    return body


_WAYS: tuple[str, ...] = ("utf-8-sig", "utf-16", "utf-32", "utf-16-le")


@st.composite
def written(draw: st.DrawFn, body: Any) -> tuple[str, bytes]:
    """A body as bytes, most of the time as it should be, and what is odd about that."""
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    plain = text.encode("utf-8", "surrogatepass")
    way = draw(st.integers(0, 24))
    if way < len(_WAYS):
        return _WAYS[way], text.encode(_WAYS[way], "surrogatepass")
    if way == 4:
        return "cut off", plain[: draw(st.integers(0, len(plain)))]
    if way == 5:
        at = draw(st.integers(0, len(plain)))
        return "a byte more", plain[:at] + draw(st.binary(min_size=1, max_size=3)) + plain[at:]
    if way == 6:
        return "text twice", plain * 2
    if way == 7:
        levels = draw(st.sampled_from([150, 199, 201, 900, 5000, 100_000]))
        return "deep", plain[:-1] + b', "x": ' + b"[" * levels + b"]" * levels + b"}"
    if way == 8:
        number = draw(
            st.sampled_from([b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"0x10", b"01", b"1." + b"0" * 999])
        )
        return "number", plain[:-1] + b', "top_k": ' + number + b"}"
    if way == 9:
        return "key twice", plain[:-1] + b', "prompt": "y", "prompt": 5}'
    if way == 10:
        return "cut character", text.encode("utf-8", "replace")[:-1] + b', "user": "\xf0\x9f"}'
    return "fields", plain


_TYPES = (
    "application/json; charset=utf-8",
    "application/json; charset=utf-16",
    "application/json; charset=nothing",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "multipart/form-data",
    "application/octet-stream",
    "application/xml",
    "json",
    ";;;",
    "",
)
_ODD_HEADERS: tuple[tuple[str, str], ...] = (
    ("Content-Encoding", "gzip"),
    ("Content-Encoding", "deflate"),
    ("Content-Encoding", "br"),
    ("Content-Encoding", "nothing"),
    ("Accept", "text/html"),
    ("Accept-Encoding", "gzip, br"),
    ("Authorization", "Bearer \xff"),
    ("X-Request-Id", "a" * 300),
    ("X-Request-Id", "é\x7f"),
    ("X-Client-May-Leave", "perhaps"),
    ("Expect", "100-continue"),
    ("Cookie", "a" * 4000),
    ("Upgrade", "websocket"),
    ("Range", "bytes=0-1"),
    ("url_path", "v1/completions"),
)


@st.composite
def requests(draw: st.DrawFn, base: str, document: Mapping[str, Any]) -> Request:
    """One to some route of a description, below `base`."""
    path, methods = draw(st.sampled_from(sorted(document["paths"].items())))
    method, operation = draw(st.sampled_from(sorted(methods.items())))
    filled = path
    for parameter in operation.get("parameters", ()):
        value = draw(st.sampled_from(["demo", "none", "%2e%2e%2f", "%00", "a%20b", "x" * 300]))
        filled = filled.replace(f"{{{parameter['name']}}}", value)
    if not draw(st.integers(0, 29)):
        filled += draw(st.sampled_from(["/", "/x", "?a=b", "%2f", "//"]))
    contents = operation.get("requestBody", {}).get("content", {})
    if method == "get" or not contents:
        return Request("no body", method.upper(), f"{base}{filled}", draw(_header_lists))
    schema = next(iter(contents.values()))["schema"]
    schemas = document["components"]["schemas"]
    body = bounded(draw(anything if not draw(st.integers(0, 19)) else values(schema, schemas)))
    kind, content = draw(written(body))
    headers = dict(draw(_header_lists))
    right = next(iter(contents))
    if right.startswith("multipart/"):
        content, right = _form(body, content), "multipart/form-data; boundary=xyz"
    if not draw(st.integers(0, 7)):
        right = draw(st.sampled_from(_TYPES))
        kind = f"{kind} as {right!r}"
    if headers.get("Content-Encoding") == "gzip" and draw(st.booleans()):
        kind, content = f"{kind}, zipped", gzip.compress(content)
    for name in headers:
        kind += f" with {name}"
    named = draw(st.sampled_from(["POST"] * 19 + ["PUT", "PATCH", "GET", "DELETE", "OPTIONS"]))
    return Request(kind, named, f"{base}{filled}", (("Content-Type", right), *headers.items()), content)


_header_lists = st.one_of(
    st.just(()), st.just(()), st.just(()), st.lists(st.sampled_from(_ODD_HEADERS), max_size=2).map(tuple)
)


def _form(body: Any, content: bytes) -> bytes:
    """A form with the body's fields, and the content as a file."""
    fields = {name: str(value) for name, value in body.items()} if isinstance(body, dict) else {}
    parts = [
        f'--xyz\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    head = '--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    return "".join([*parts, head]).encode("utf-8", "replace") + content + b"\r\n--xyz--\r\n"


def drawn(base: str, document: Mapping[str, Any], count: int, number: int) -> list[Request]:
    """So many, the same for each `number`."""
    found: list[Request] = []

    @seed(number)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @given(requests(base, document))
    def draw(request: Request) -> None:
        found.append(request)

    draw()
    return found[:count]
