"""What somebody types, or a program writes, as messages of one line or several."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ts_parallel.errors import ConfigError

_QUOTES = '"""'
_FIRST, _NEXT = "> ", ". "  # what asks a person for a line


def messages() -> Iterator[str]:
    """Those of standard input up to its end. A line that ends in a backslash goes on with the next one, and what stands
    between three quotation marks is one message, however many lines it has.

    Raises:
        ConfigError: it is no text.
    """
    while True:
        try:
            text = _message()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input is no text: {error}") from None
        if text.strip():
            yield text


def _message() -> str:
    line = _line(_FIRST)
    if line.lstrip().startswith(_QUOTES):
        return _quoted(line.lstrip().removeprefix(_QUOTES))
    lines = []
    while _goes_on(line):
        lines.append(line[:-1])
        line = _next_line("")
    return "\n".join([*lines, line])


def _goes_on(line: str) -> bool:
    """Two backslashes are two letters."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _quoted(line: str) -> str:
    lines = [line]
    while not lines[-1].rstrip().endswith(_QUOTES):
        lines.append(_next_line(_QUOTES))
    return "\n".join(lines).rstrip().removesuffix(_QUOTES).strip("\n")


def _next_line(at_the_end: str) -> str:
    """The input's end is the message's too."""
    try:
        return _line(_NEXT)
    except EOFError:
        return at_the_end


def _line(mark: str) -> str:
    return input(mark if sys.stdin.isatty() else "")
