"""Bytes of KV memory make blocks and tokens, and too few of them are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ts_parallel.errors import ConfigError, StartupError
from ts_parallel.runtime.kv_budget import bytes_beside_weights, count_blocks, room_on

CPU = torch.device("cpu")


ELEMENTS = (16, 24)  # a token's, on two ranks


@pytest.mark.parametrize(("num_bytes", "num_blocks"), [(96 * 8, 2), (96 * 12 - 1, 2), (96 * 12, 3)])
def test_only_whole_blocks_are_counted(num_bytes: int, num_blocks: int) -> None:
    assert count_blocks(ELEMENTS, torch.float32, 4, num_bytes, max_model_len=8) == num_blocks


def test_memory_too_small_for_one_request_is_refused_with_what_to_change() -> None:
    assert count_blocks(ELEMENTS, torch.float32, 4, 96 * 12, max_model_len=12) == 3
    assert count_blocks(ELEMENTS, torch.bfloat16, 4, 48 * 12, max_model_len=12) == 3
    with pytest.raises(ConfigError, match="1152 bytes holds 12 tokens of 96 bytes, fewer than max_model_len 13: raise"):
        count_blocks(ELEMENTS, torch.float32, 4, 96 * 12, max_model_len=13)


def test_part_of_the_smallest_gpu_is_what_the_heaviest_rank_leaves_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = [1000, 800]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(totals))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=totals[gpu]))
    assert bytes_beside_weights(0.5, (100, 150)) == 250
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization 0\.1 of 800 bytes is no more than the 150 bytes"):
        bytes_beside_weights(0.1, (100, 150))
    totals.clear()
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization 0\.5 needs a GPU: set kv_cache_memory"):
        bytes_beside_weights(0.5, (100, 150))


def test_device_without_room_is_told_with_its_figures_and_the_keys_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 1000))
    message = (
        "cuda:1 has no room for this rank's weights, KV cache and steps, 3 of its 1000 bytes are free: lower "
        "gpu_memory_utilization or kv_cache_memory, or max_num_batched_tokens, or raise tensor_parallel_size or "
        "pipeline_parallel_size (CUDA out of memory)"
    )
    with pytest.raises(StartupError) as raised, room_on(torch.device("cuda", 1)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    assert str(raised.value) == message
    with pytest.raises(ZeroDivisionError), room_on(CPU):
        raise ZeroDivisionError
