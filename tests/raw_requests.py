"""Bytes over a socket that are no request, or not a whole one, or several; and what comes back for any bytes at all."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, BinaryIO


@dataclass(frozen=True)
class Bytes:
    """What a client sends before it is silent, or goes."""

    kind: str
    pieces: tuple[bytes, ...]
    num_answers: int = 1
    is_whole: bool = True
    """Whether an answer is due; to what is cut off none need come, only an end."""


@dataclass(frozen=True)
class Answer:
    status: int
    content_type: str
    body: bytes


class _Stream:
    """A connection whose answers are read one behind the other."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def makefile(self, *_: Any) -> _Stream:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def close(self) -> None:
        """Which one answer would do for the next."""


def exchange(host: str, port: int, sent: Bytes, seconds: float) -> list[Answer]:
    """All answers that come.

    Raises:
        TimeoutError: none came, and no end.
        OSError, HTTPException: the connection broke, or what came is no HTTP.
    """
    with socket.create_connection((host, port), timeout=seconds) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in sent.pieces:
                connection.sendall(piece)
            if not sent.is_whole:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has answered, or closed the connection, before all of it had come
        with connection.makefile("rb") as file:  # as long as it is open, so is the connection
            return _answers(file, sent)


def _answers(file: BinaryIO, sent: Bytes) -> list[Answer]:
    answers = list[Answer]()
    for _ in range(sent.num_answers):
        response = HTTPResponse(_Stream(file))  # type: ignore[arg-type]
        try:
            response.begin()
        except (HTTPException, ConnectionResetError):
            if answers or not sent.is_whole:
                break  # it has closed the connection, as it may behind an error
            raise
        body = response.read()
        answers.append(Answer(response.status, response.getheader("Content-Type", ""), body))
        if response.will_close:
            break
    return answers


def raw_cases(path: str, host: str) -> Iterator[Bytes]:
    """For a route of completions."""
    body = json.dumps({"model": "demo", "prompt": "x", "max_tokens": 1}).encode()
    plain = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head = f"{plain}Content-Length: {len(body)}\r\n"
    whole = head.encode() + b"\r\n" + body
    last = head.encode() + b"Connection: close\r\n\r\n" + body
    yield Bytes("byte by byte", tuple(bytes([own]) for own in last))
    yield Bytes("two in one piece", (whole + last,), 2)
    yield Bytes("eight in one piece", (whole * 7 + last,), 8)
    yield Bytes("two with a refusal first", (whole.replace(b'"x"', b"123") + last,), 2)
    for name, part in (("head", last[:40]), ("head without end", head.encode()), ("body", last[:-5])):
        yield Bytes(f"half of a {name}", (part,), is_whole=False)
    yield Bytes(
        "length too long", ((plain + f"Content-Length: {len(body) + 9}\r\n\r\n").encode() + body,), is_whole=False
    )
    short = (plain + f"Content-Length: {len(body) - 9}\r\nConnection: close\r\n\r\n").encode() + body
    yield Bytes("length too short", (short,))
    for value in ("-1", "x", "1e3", "99999999999999999999", "0x10", "+5", ""):
        content = f"{plain}Content-Length: {value}\r\nConnection: close\r\n\r\n".encode() + body
        yield Bytes(f"length {value!r}", (content,), is_whole=False)
    two = f"{head}Content-Length: 3\r\nConnection: close\r\n\r\n".encode() + body
    yield Bytes("two lengths", (two,), is_whole=False)
    chunked = (plain + "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n").encode()
    half = len(body) // 2
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(own), own) for own in (body[:half], body[half:]))
    yield Bytes("chunks", (chunked, pieces, b"0\r\n\r\n"))
    yield Bytes("chunks of a byte", (chunked, *(b"1\r\n%c\r\n" % own for own in body), b"0\r\n\r\n"))
    yield Bytes("chunks with a trailer", (chunked + pieces + b"0\r\nX-Last: 1\r\n\r\n",))
    yield Bytes("chunks without end", (chunked + pieces,), is_whole=False)
    yield Bytes("chunk of no size", (chunked + b"zz\r\nab\r\n0\r\n\r\n",), is_whole=False)
    yield Bytes("chunk of a huge size", (chunked + b"ffffffffffffffffff\r\nab\r\n",), is_whole=False)
    both = f"{head}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode() + pieces + b"0\r\n\r\n"
    yield Bytes("a length and chunks", (both,), is_whole=False)
    yield Bytes("no such encoding", (head.encode() + b"Transfer-Encoding: nothing\r\n\r\n" + body,), is_whole=False)
    for name, line in (
        ("no such method", f"FOO {path} HTTP/1.1"),
        ("HTTP/1.0", f"POST {path} HTTP/1.0"),
        ("HTTP/9.9", f"POST {path} HTTP/9.9"),
        ("whole URL", f"POST http://{host}{path} HTTP/1.1"),
        ("blank in the path", f"POST {path} x HTTP/1.1"),
        ("other bytes in the path", f"POST {path}\xff\x01 HTTP/1.1"),
        ("wrong escape", f"POST {path}%zz HTTP/1.1"),
        ("long path", f"POST {path}/{'a' * 9000} HTTP/1.1"),
    ):
        content = last.replace(f"POST {path} HTTP/1.1".encode(), line.encode("latin-1"), 1)
        yield Bytes(name, (content,), is_whole=False)
    yield Bytes("long header", (head.encode() + b"X-Long: " + b"a" * 70_000 + b"\r\n\r\n" + body,), is_whole=False)
    many = b"".join(b"X-%d: 1\r\n" % number for number in range(3000))
    yield Bytes("many headers", (head.encode() + many + b"\r\n" + body,), is_whole=False)
    yield Bytes("header without a name", (head.encode() + b": x\r\n\r\n" + body,), is_whole=False)
    yield Bytes("line ends of one byte", (last.replace(b"\r\n", b"\n"),), is_whole=False)
    yield Bytes("HTTP/2", (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",), is_whole=False)
    yield Bytes("TLS", (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,), is_whole=False)
    yield Bytes("noise", (bytes(range(256)) * 8,), is_whole=False)
    yield Bytes("nothing", (), is_whole=False)
