"""What holds for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ts_parallel.partition.prepared import CACHE_VARIABLE

# Files are dealt out to workers one by one. Those that take longest come first, so that no worker waits for the other.
_LONGEST = (
    "exactness/test_family_table.py",
    "exactness/test_tokens.py",
    "exactness/test_mixes.py",
    "serving/batch/test_batch_inference.py",
    "serving/torchserve/test_continuous_batching.py",
    "cli/test_cli.py",
)


@pytest.fixture(scope="session", autouse=True)
def _own_program_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that one test makes serve the next, in whichever worker, and the user's own cache neither helps nor
    grows."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "programs"
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ[CACHE_VARIABLE] = str(folder)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))  # which leaves the order of the others
