"""What holds for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ts_parallel.native import kernels_for


@pytest.fixture(autouse=True)
def _two_threads_in_kernels() -> Iterator[None]:
    """Whoever calls them without a topology has them share their work too."""
    own = [kernels for dtype in (torch.bfloat16, torch.float16) if (kernels := kernels_for(dtype))]
    before = [kernels.get_num_threads() for kernels in own]
    for kernels in own:
        kernels.set_num_threads(2)
    yield
    for kernels, number in zip(own, before, strict=True):
        kernels.set_num_threads(number)
