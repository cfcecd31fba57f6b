"""What holds for every test."""

from __future__ import annotations

import os

import pytest

from ts_parallel.partition.prepared import CACHE_VARIABLE


@pytest.fixture(scope="session", autouse=True)
def _own_program_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that one test makes serve the next, and the user's own cache neither helps nor grows."""
    os.environ[CACHE_VARIABLE] = str(tmp_path_factory.mktemp("programs"))
