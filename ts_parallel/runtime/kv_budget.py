"""How many tokens of keys and values fit in how many bytes. Knows sizes; the memory itself is the backend's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ts_parallel.errors import ConfigError, StartupError


def bytes_beside_weights(utilization: float, bytes_of_ranks: Sequence[int]) -> int:
    """Bytes of KV memory of each rank where weights and KV memory together take `utilization` of a GPU.

    All ranks must come to the same number without a word: so it is that of this host's smallest GPU, and of the rank
    with the most bytes of weights.

    Raises:
        ConfigError: there is no GPU, or no room beside the weights.
    """
    totals = [torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count())]
    if not totals:
        raise ConfigError(f"gpu_memory_utilization {utilization} needs a GPU: set kv_cache_memory instead")
    room = int(min(totals) * utilization) - max(bytes_of_ranks)
    if room <= 0:
        raise ConfigError(
            f"gpu_memory_utilization {utilization} of {min(totals)} bytes is no more than the {max(bytes_of_ranks)} "
            "bytes of weights: raise it, or tensor_parallel_size or pipeline_parallel_size"
        )
    return room


@contextmanager
def room_on(device: torch.device) -> Iterator[None]:
    """Load a rank's weights and make its KV memory here.

    Raises:
        StartupError: they do not fit on the device, beside what others have there.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise StartupError(
            f"{device} has no room for this rank's weights, KV cache and steps, {free} of its {total} bytes are free: "
            "lower gpu_memory_utilization or kv_cache_memory, or max_num_batched_tokens, or raise tensor_parallel_size "
            f"or pipeline_parallel_size ({str(error).partition('. ')[0]})"
        ) from error


def count_blocks(
    kv_elements_of_ranks: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
    num_bytes: int,
    max_model_len: int,
) -> int:
    """How many blocks fit in `num_bytes` of each rank: as many as on the rank where a token takes most.

    Args:
        kv_elements_of_ranks: how many numbers a token's keys and values are on each rank.

    Raises:
        ConfigError: not even one request of `max_model_len` tokens would fit.
    """
    per_token = max(kv_elements_of_ranks) * dtype.itemsize
    num_blocks = num_bytes // (per_token * block_size)
    if num_blocks * block_size < max_model_len:
        raise ConfigError(
            f"KV memory of {num_bytes} bytes holds {num_blocks * block_size} tokens of {per_token} bytes, fewer "
            f"than max_model_len {max_model_len}: raise kv_cache_memory (or "
            "gpu_memory_utilization) or lower max_model_len"
        )
    return num_blocks
