"""Clients that people have, each with its own package and in a program of its own, `gateway/clients/programs/`.

Some of the packages ask for others than the tests do, or are large. Those are installed apart, as `HOW` says; the
variable `TS_PARALLEL_CLIENTS` may name another Python that has them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from places import ROOT

PROGRAMS = ROOT / "tests" / "gateway" / "clients" / "programs"
APART = Path(os.environ.get("TS_PARALLEL_CLIENTS") or ROOT / "build" / "clients" / "bin" / "python")
HOW = (
    "python -m venv build/clients && build/clients/bin/pip install --upgrade pip && "
    "build/clients/bin/pip install --group clients"
)
# What each would ask other hosts for.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
}


@cache
def python_with(package: str) -> str | None:
    """A Python that has a package: this one, or the one that clients have apart."""
    asks = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    for python in (sys.executable, str(APART)):
        if Path(python).exists() and subprocess.run([python, "-c", asks], capture_output=True).returncode == 0:
            return python
    return None


def seen(name: str, package: str, *arguments: str) -> dict[str, Any]:
    """What the program of a client says that it saw."""
    python = python_with(package)
    if python is None:
        pytest.skip(f"{package} is not installed: {HOW}")
    command = [python, str(PROGRAMS / f"{name}.py"), *arguments]
    with TemporaryDirectory() as own:  # what it keeps is not the user's
        outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment = {**outside, **OFFLINE, "HF_HOME": own}
        done = subprocess.run(command, cwd=own, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    failed = {deed: own["failed"] for deed, own in told["saw"].items() if isinstance(own, dict) and "failed" in own}
    assert not failed, "\n".join(f"{deed}: {trace}" for deed, trace in failed.items())
    saw: dict[str, Any] = told["saw"]
    return saw
