"""Who waits in shared memory believes only what was published whole, and sleeps where it takes long."""

from __future__ import annotations

import os
import struct
import time

import pytest
import torch

from ts_parallel.shared_memory import native

pytestmark = pytest.mark.skipif(native is None, reason="ts_parallel.native is not built")

ROOM = 2**12
OWNER = 8  # bytes from the begin of a counter: process id, rank, when the process began; then whether that is so
SENT = 0  # the counter of the one that sends


@pytest.fixture
def memory() -> torch.Tensor:
    return torch.zeros(native.ring_bytes(ROOM), dtype=torch.uint8)


def wait(memory: torch.Tensor) -> str:
    """What a receiver says after one second for nothing."""
    with pytest.raises(RuntimeError) as raised:
        native.await_message(memory.data_ptr(), ROOM, 1)
    return str(raised.value)


def test_sender_that_has_not_entered_yet_is_waited_for(memory: torch.Tensor) -> None:
    assert wait(memory) == "this rank has waited 1 s for rank 0 (process 0): no longer"


def test_sender_that_is_entering_is_not_taken_for_one_that_has_ended(memory: torch.Tensor) -> None:
    """Its process id is there, when that process began is not: without the latter it would be another one."""
    half = struct.pack("<iiQ", os.getpid(), 3, 0)
    memory[SENT + OWNER : SENT + OWNER + len(half)] = torch.frombuffer(bytearray(half), dtype=torch.uint8)
    assert "has waited 1 s" in wait(memory)


def test_sender_that_has_entered_is_named(memory: torch.Tensor) -> None:
    native.enter_ring(memory.data_ptr(), True, 3)
    assert wait(memory) == f"this rank has waited 1 s for rank 3 (process {os.getpid()}): no longer"


def test_who_waits_for_long_leaves_its_core_to_others(memory: torch.Tensor) -> None:
    began = time.thread_time()
    wait(memory)
    assert time.thread_time() - began < 0.2  # of a second
