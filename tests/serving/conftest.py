"""What several tests of serving share."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest


@pytest.fixture
def sent_pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[int, str], dict[int, str]]]:
    """Takes the place of TorchServe's function that sends pieces: each message's pieces and jobs, by index."""
    messages: list[tuple[dict[int, str], dict[int, str]]] = []
    utils = ModuleType("ts.handler_utils.utils")
    utils.send_intermediate_predict_response = (  # type: ignore[attr-defined]
        lambda pieces, names, *_: messages.append((pieces, names))
    )
    for name in ("ts", "ts.handler_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "ts.handler_utils.utils", utils)
    return messages
