"""What tests of this folder are given."""

from __future__ import annotations

import pytest
import torch

from ts_parallel.native import kernels_for

# Where there are no kernels, the tests that ask are skipped.
_OF_KERNELS = [dtype for dtype in (torch.bfloat16, torch.float16) if kernels_for(dtype)] or [torch.bfloat16]


@pytest.fixture(params=_OF_KERNELS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each that there are kernels for."""
    made: torch.dtype = request.param
    return made
