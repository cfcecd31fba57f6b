"""What holds for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ts_parallel.native import HAS_KERNELS, kernels


@pytest.fixture(autouse=True)
def _two_threads_in_kernels() -> Iterator[None]:
    """Whoever calls them without a topology has them share their work too."""
    if not HAS_KERNELS:
        yield
        return
    before = kernels.get_num_threads()
    kernels.set_num_threads(2)
    yield
    kernels.set_num_threads(before)
