"""KV memory is as large as was counted, and a key or value lies in the slot it was written to."""

from __future__ import annotations

import torch

from ts_parallel.partition.program import AttentionSite
from ts_parallel.runtime.backends.kv_memory import KVMemory
from ts_parallel.runtime.kv_budget import count_blocks

CPU = torch.device("cpu")


def site(num_kv_heads: int, head_dim: int, value_dim: int) -> AttentionSite:
    return AttentionSite("attention", 4, num_kv_heads, head_dim, value_dim, None, 1.0, None, False)


SITES = (site(2, 3, 5), site(1, 4, 4))  # 16 and 8 elements a token


def test_memory_is_as_large_as_was_counted() -> None:
    num_blocks = count_blocks([16 + 8], torch.float32, 4, 10_000, max_model_len=8)
    memory = KVMemory(SITES, num_blocks, 4, torch.float32, CPU)
    allocated = sum(buffer.nbytes for buffer in (*memory.keys, *memory.values))
    assert 10_000 - 96 * 4 < allocated <= 10_000


def test_each_site_has_its_own_shape() -> None:
    memory = KVMemory(SITES, num_blocks=3, block_size=4, dtype=torch.bfloat16, device=CPU)
    assert [tuple(keys.shape) for keys in memory.keys] == [(12, 2, 3), (12, 1, 4)]
    assert [tuple(values.shape) for values in memory.values] == [(12, 2, 5), (12, 1, 4)]
    assert {buffer.dtype for buffer in (*memory.keys, *memory.values)} == {torch.bfloat16}


def test_new_memory_is_all_zeros() -> None:
    memory = KVMemory(SITES, num_blocks=3, block_size=4, dtype=torch.float32, device=CPU)
    assert not any(buffer.any() for buffer in (*memory.keys, *memory.values))


def test_tokens_lie_in_their_slots_and_nowhere_else() -> None:
    memory = KVMemory(SITES, num_blocks=3, block_size=4, dtype=torch.float32, device=CPU)
    key, value = torch.rand(3, 2, 3) + 1, torch.rand(3, 2, 5) + 1
    slots = torch.tensor([9, 0, 4])
    memory.write(0, slots, key, value)
    assert torch.equal(memory.keys[0][slots], key)
    assert torch.equal(memory.values[0][slots], value)
    others = [slot for slot in range(12) if slot not in (9, 0, 4)]
    assert not memory.keys[0][others].any() and not memory.values[0][others].any()
    assert not memory.keys[1].any() and not memory.values[1].any()
