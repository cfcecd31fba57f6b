"""What `serve` makes of a worker's lines while it serves: one that cannot start again ends it, others do not."""

from __future__ import annotations

import pytest

from ts_parallel.cli.server.torchserve import _follow_worker
from ts_parallel.errors import StartupError

STARTED = "2026-11-30 [INFO ] W-9000-demo_1.0-stdout MODEL_LOG - Torch worker started."
READY = "2026-11-30 [INFO ] W-9000-demo_1.0-stdout MODEL_LOG - ts_parallel is ready: demo on 2 ranks"
REFUSAL = "2026-11-30 [INFO ] W-9000-demo_1.0-stdout MODEL_LOG - ts_parallel cannot start: model.safetensors is cut off"


def test_worker_that_cannot_start_again_ends_the_server_with_its_reason() -> None:
    with pytest.raises(StartupError) as refused:
        _follow_worker([STARTED, REFUSAL], is_starting=False)
    assert str(refused.value) == "model.safetensors is cut off"


def test_start_may_be_told_in_one_look_and_the_refusal_in_the_next() -> None:
    assert _follow_worker([STARTED, STARTED, "loading"], is_starting=False)
    with pytest.raises(StartupError):
        _follow_worker([REFUSAL], is_starting=True)


def test_what_a_worker_prints_once_it_is_ready_is_no_refusal() -> None:
    """A client may have a hand in that."""
    assert not _follow_worker([STARTED, READY, REFUSAL], is_starting=False)
    assert not _follow_worker([REFUSAL], is_starting=False)
