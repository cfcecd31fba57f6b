"""`v1/audio/transcriptions` and `v1/audio/translations`: forms with a file, which go on as they came.

Who is to hear one stands in a field of it. That is found without taking the form apart: its file is large.
"""

from __future__ import annotations

from email import message_from_bytes
from email.message import Message

from starlette.requests import Request
from starlette.responses import Response

from ts_parallel.errors import RequestError
from ts_parallel.gateway.passing import Passing

_FORM = "multipart/form-data"
_MOST_BYTES_OF_A_HEAD = 8192
_MOST_BYTES_OF_A_NAME = 1024


class Speech:
    """Routes that take a file of speech. What passes it on is lent."""

    def __init__(self, passing: Passing) -> None:
        self._passing = passing

    async def hear(self, request: Request) -> Response:
        """`POST /v1/audio/transcriptions` and its like: the own route of that name of a model of batch inference."""
        body, content_type = await request.body(), request.headers.get("content-type", "")
        model = text_of_form(body, content_type, "model")
        return await self._passing.pass_on(request, model, body, content_type, generates_text=False)


def text_of_form(body: bytes, content_type: str, name: str) -> str | None:
    """A field's text; None where the form has no such field.

    Raises:
        RequestError: the body is no form, or does not come to its end, or the field is no short text.
    """
    whole, mark = b"\r\n" + body, b"\r\n--" + _boundary(content_type)
    found, at = None, whole.find(mark)
    while at >= 0:
        begin = at + len(mark)
        if whole.startswith(b"--", begin):
            return found
        head, at = whole.find(b"\r\n\r\n", begin, begin + _MOST_BYTES_OF_A_HEAD), whole.find(mark, begin)
        if head < 0:
            break
        if at >= 0 and _name(whole[begin:head]) == name:
            found = _text(whole[head + 4 : at], name)
    raise RequestError("the body is no form that can be read: it does not come to the end of its last part")


def _boundary(content_type: str) -> bytes:
    head = Message()
    head["Content-Type"] = content_type
    boundary = head.get_boundary()
    if head.get_content_type() != _FORM or not boundary:
        raise RequestError(f"the body must be a form with a 'file' ({_FORM}), got {content_type or 'no type'!r}")
    return boundary.encode("latin-1", "replace")


def _name(head: bytes) -> str | None:
    """None of a file."""
    fields = message_from_bytes(head.lstrip())
    name = fields.get_param("name", header="content-disposition")
    return name if isinstance(name, str) and fields.get_filename() is None else None


def _text(value: bytes, name: str) -> str:
    if len(value) > _MOST_BYTES_OF_A_NAME:
        raise RequestError(f"{name!r} has {len(value)} bytes, at most {_MOST_BYTES_OF_A_NAME} are read", name)
    return value.decode("utf-8", "replace")
