"""How much one message to TorchServe's front end carries.

The front end refuses a text of more than `max_response_size` bytes, and takes the worker for dead then. It sets no
limit to the sum of a message's texts, but reads all of them anew with every few KiB that come: four texts of 8 MiB in
one message took it 20 s, one of 32 MiB took 2 s, and no other text passes meanwhile (TorchServe 0.12.0, two cores). So
a message is full with `BYTES_OF_A_MESSAGE`, and the next one carries the rest.
"""

from __future__ import annotations

BYTES_OF_A_MESSAGE = 1 << 20


class Room:
    """What is left of one message. Only what is taken last may be more than there is room for."""

    def __init__(self) -> None:
        self._num_left = BYTES_OF_A_MESSAGE

    @property
    def is_full(self) -> bool:
        return self._num_left <= 0

    def take(self, text: str) -> None:
        self._num_left -= num_bytes(text)


def num_bytes(text: str) -> int:
    """In UTF-8, as texts are sent."""
    return len(text) if text.isascii() else len(text.encode())


def cut(text: str, most: int) -> tuple[str, str]:
    """A text's beginning of at most so many bytes, between two letters, and what follows it."""
    if text.isascii():
        return text[:most], text[most:]
    head = text.encode()[:most].decode(errors="ignore")
    return head, text[len(head) :]
