"""What a client was seen to do, as one line of JSON: each function that is marked is one deed, and says what came.

A program beside this one runs in whatever Python has its client, so it imports nothing of ts_parallel or its tests.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

MODEL = "demo"
GATEWAY = sys.argv[1] if len(sys.argv) > 1 else ""
"""Its URL, without `/v1`."""
BASE = f"{GATEWAY}/v1"
_DEEDS: list[Callable[[], Any]] = []


def deed(own: Callable[[], Any]) -> Callable[[], Any]:
    _DEEDS.append(own)
    return own


def tell(*packages: str) -> None:
    """Do everything, and print what came, or how it failed, by the functions' names."""
    saw: dict[str, Any] = {}
    for own in _DEEDS:
        try:
            saw[own.__name__] = own()
        except Exception:
            saw[own.__name__] = {"failed": traceback.format_exc()[-3000:]}
    print(json.dumps({"versions": {name: version(name) for name in packages}, "saw": saw}))
