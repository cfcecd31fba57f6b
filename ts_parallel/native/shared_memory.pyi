"""Ranks of one host talk through memory that all of them have mapped; `shared_memory.c` says how.

Addresses and sizes are bytes, `patience` whole seconds. What waits raises RuntimeError where the rank that it waits for
has ended, or has kept it waiting for longer than `patience`; the team or ring is then of no more use.
"""

from typing import Any

FLOAT32: int
BFLOAT16: int
FLOAT16: int
SUMS_BY: str
"""Which of the processor's instructions make the sums."""

def team_bytes(size: int) -> int:
    """What a team of so many ranks needs, zero at first and at a multiple of 128."""

def enter_team(team: int, place: int, rank: int) -> None:
    """Tell the others which process holds a place of the team. `rank` is the number by which errors name it."""

def make_team(team: int, place: int, size: int, patience: int) -> Any:
    """The same team for `kernels.run_stack`, whose sums of bfloat16 are those of `all_reduce`."""

def all_reduce(team: int, place: int, size: int, data: int, num_elements: int, type: int, patience: int) -> None:
    """Sum over the team, in place: in float32, in the order of the places, so that all get the same bits.

    Raises:
        ValueError: `type` is none of the three.
    """

def gather(team: int, place: int, part: int, num_rows: int, whole: int, patience: int, widths: tuple[int, ...]) -> None:
    """Put every place's `[num_rows, widths[place]]` side by side into `whole`; 0 where this one only gives."""

def ring_bytes(num_bytes: int) -> int:
    """What a ring for so many bytes needs, zero at first and at a multiple of 128.

    Raises:
        ValueError: `num_bytes` is no power of two, or less than 1024.
    """

def enter_ring(ring: int, is_sender: bool, rank: int) -> None:
    """Tell the other end which process this end is."""

def send(ring: int, ring_size: int, data: int, num_bytes: int, patience: int) -> bool:
    """Whether the message is in the ring now; else it is only announced there, and has to go by another way.

    Waits only where as many messages are announced as an eighth of the ring has room for, 64 bytes each.
    """

def await_message(ring: int, ring_size: int, patience: int) -> tuple[int, bool]:
    """The next message's length, and whether it is in the ring; it stays the next until it is taken."""

def take(ring: int, ring_size: int, data: int) -> None:
    """The message that was awaited; `data` has room for all of it if it is in the ring."""
