"""The turns of a conversation, and the commands that change them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

Message = dict[str, str]

_A_SLIP = 0.8  # how alike a word and a command are, from 0 to 1

COMMANDS: Mapping[str, str] = {
    "/clear": "forgets all turns",
    "/system": "with a text behind it: that stands before all turns from now on; alone: nothing does",
    "/retry": "asks the last question again, in place of its answer",
    "/help": "lists these",
    "/quit": "ends, as the end of input does",
}


class Conversation:
    """Owns the turns so far, and what stands before them."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[Message] = []
        self._question: str | None = None
        self._is_answered = False

    def ask(self, question: str) -> list[Message]:
        """All messages up to a new question. It leaves no trace in later ones unless it is answered."""
        self._question, self._is_answered = question, False
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, *self._turns, {"role": "user", "content": question}]

    def answer(self, text: str) -> None:
        """To the question that was asked last."""
        if text and self._question is not None:
            self._turns += [{"role": "user", "content": self._question}, {"role": "assistant", "content": text}]
            self._is_answered = True

    def take_back(self) -> str | None:
        """The question that was asked last, as if it had not been; None where there is none."""
        if self._is_answered:
            del self._turns[-2:]
            self._is_answered = False
        return self._question

    def clear(self) -> None:
        self._turns, self._question, self._is_answered = [], None, False


def command_of(message: str) -> tuple[str, str] | None:
    """A command and what stands behind it; None of a message, which may begin with a slash as paths do.

    Raises:
        ValueError: it can only have been meant as a command, and is none.
    """
    if not message.startswith("/"):
        return None
    word, *rest = message.split(maxsplit=1)
    if word in COMMANDS:
        return word, "".join(rest).strip()
    if word == message.strip() or difflib.get_close_matches(word, COMMANDS, 1, _A_SLIP):
        raise ValueError(f"no command {word!r}: /help lists those there are")
    return None


def help_text() -> str:
    lines = [f"{name:<9}{meaning}" for name, meaning in COMMANDS.items()]
    more = 'A line that ends in \\ goes on; """ begins and ends a message of several lines; Ctrl-C ends an answer.'
    return "\n".join([*lines, more])
