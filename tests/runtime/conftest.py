"""What holds for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ts_parallel.native import kernels_for

_OF_16_BITS = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[each for each in _OF_16_BITS if kernels_for(each)] or _OF_16_BITS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each that there are kernels for; where there are none, who asks is skipped."""
    made: torch.dtype = request.param
    return made


@pytest.fixture(autouse=True)
def _two_threads_in_kernels() -> Iterator[None]:
    """Whoever calls them without a topology has them share their work too."""
    own = [kernels for each in _OF_16_BITS if (kernels := kernels_for(each))]
    before = [kernels.get_num_threads() for kernels in own]
    for kernels in own:
        kernels.set_num_threads(2)
    yield
    for kernels, number in zip(own, before, strict=True):
        kernels.set_num_threads(number)
