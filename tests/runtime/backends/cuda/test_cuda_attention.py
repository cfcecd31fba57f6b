"""The Triton kernels' attention is torch's, number by number, whatever a site is like and however a step is made up.

T tokens, H query heads, KV key/value heads, D and E the key and value head dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from paged_steps import plans_of

from ts_parallel.partition.program import AttentionSite
from ts_parallel.runtime.backends.kv_memory import KVMemory
from ts_parallel.runtime.backends.torch.paged_attention import PagedAttention
from ts_parallel.step_plan import Chunk, StepPlan

pytest.importorskip("triton", reason="Triton is not installed")

from ts_parallel.runtime.backends.cuda.attention import CudaAttention
from ts_parallel.runtime.backends.cuda.step_numbers import STEP_SIZES, StepWriter

CPU = torch.device("cpu")
NUM_BLOCKS = 64
NAMES = "abc"


@dataclass(frozen=True)
class Shape:
    num_heads: int = 4
    num_kv_heads: int = 2
    dim: int = 8
    value_dim: int = 8
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    def site(self) -> AttentionSite:
        return AttentionSite(
            *("attention", self.num_heads, self.num_kv_heads, self.dim, self.value_dim),
            *(self.window, 0.4, self.softcap, self.has_sinks),
        )


SHAPES = {
    "one key head a query head": Shape(num_kv_heads=4),
    "grouped heads, of no power of two": Shape(num_heads=6),
    "one key head for more heads than a tile has": Shape(num_heads=18, num_kv_heads=1, dim=4, value_dim=4),
    "window": Shape(window=5),
    "window of one": Shape(window=1),
    "sinks": Shape(has_sinks=True),
    "softcap": Shape(softcap=1.5),
    "window, softcap and sinks": Shape(window=5, softcap=1.5, has_sinks=True),
    "wide heads": Shape(num_heads=2, num_kv_heads=1, dim=80, value_dim=80),
    "short values": Shape(dim=24, value_dim=6),
    "long values": Shape(value_dim=36, softcap=1.5),
}

Steps = list[dict[str, int]]
# How many tokens of which sequences each step adds.
SCHEDULES: dict[str, Steps] = {
    "prompts together, then tokens of mixed lengths": [{"a": 19, "b": 1, "c": 34}, *[{"c": 1, "a": 1, "b": 1}] * 2],
    "a prompt in parts beside tokens": [{"a": 9}, {"b": 17, "a": 1}, {"c": 1, "b": 18, "a": 1}, {"b": 1, "a": 1}],
    "longer than what is looked at together": [{"a": 70, "b": 30}, {"a": 1, "b": 40}, {"b": 1, "a": 1}],
}


def plans(schedule: Steps, block_size: int) -> list[StepPlan]:
    return plans_of(schedule, NUM_BLOCKS, block_size)


def heads_of(shape: Shape, num_tokens: int, dtype: torch.dtype, seed: int) -> tuple[list[torch.Tensor], ...]:
    """Queries, keys and values as one product of three linears leaves them, and the angles' cosine and sine."""
    generator = torch.Generator().manual_seed(seed)
    widths = [shape.num_heads * shape.dim, shape.num_kv_heads * shape.dim, shape.num_kv_heads * shape.value_dim]
    product = torch.randn(1, num_tokens, sum(widths), generator=generator).to(dtype).split(widths, -1)
    dims = (shape.dim, shape.dim, shape.value_dim)
    heads = [part.view(1, num_tokens, -1, dim).transpose(1, 2) for part, dim in zip(product, dims, strict=True)]
    angles = [torch.randn(1, 1, num_tokens, shape.dim, generator=generator).to(dtype) for _ in range(2)]
    return heads, angles


def run(attention: Any, shapes: Sequence[Shape], steps: Sequence[StepPlan], dtype: torch.dtype) -> list[torch.Tensor]:
    """Each step's output of each site, of its own tokens."""
    outputs = []
    for number, plan in enumerate(steps):
        layout = attention.lay_out(plan)
        num_tokens = layout.token_ids.shape[1]
        for site, shape in enumerate(shapes):
            heads, angles = heads_of(shape, plan.num_tokens, dtype, seed=10 * number + site)
            filling = num_tokens - plan.num_tokens
            heads = [torch.nn.functional.pad(part, (0, 0, 0, filling), value=torch.nan) for part in heads]
            angles = [torch.nn.functional.pad(part, (0, 0, 0, filling), value=torch.nan) for part in angles]
            sinks = torch.arange(shape.num_heads).to(dtype) - 1 if shape.has_sinks else None
            output = attention(layout, *heads, site, sinks, *angles)
            assert output.shape == (1, num_tokens, shape.num_heads, shape.value_dim)
            outputs.append(output[0, : plan.num_tokens].float())
    return outputs


def check(shapes: Sequence[Shape], schedule: Steps, dtype: torch.dtype, block_size: int, num_processors: int) -> None:
    steps, answers, memories = plans(schedule, block_size), [], []
    for kind in ("torch", "cuda"):
        memory = KVMemory([shape.site() for shape in shapes], NUM_BLOCKS, block_size, dtype, CPU)
        for buffer in (*memory.keys, *memory.values):
            buffer.fill_(torch.nan)  # by earlier requests; one such slot that is read spoils the answer
        sites = [shape.site() for shape in shapes]
        attention: Any = (
            PagedAttention(sites, memory, block_size)
            if kind == "torch"
            else CudaAttention(sites, memory, block_size, num_processors)
        )
        answers.append(run(attention, shapes, steps, dtype))
        memories.append(memory)
    # Triton's interpreter cuts bfloat16 off, where a GPU rounds.
    error = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-2}[dtype]
    for expected, found in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=error, atol=error)
    for site in range(len(shapes)):  # what was written are the same numbers, in another order
        for part in ("keys", "values"):
            first, second = (getattr(memory, part)[site].flatten().float().sort().values for memory in memories)
            rounding = 3 * 2**-7 if dtype == torch.bfloat16 else 0.0  # two products and their sum are cut off
            torch.testing.assert_close(first, second, rtol=rounding, atol=8 * rounding, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_of_any_site_is_torchs(shape: str) -> None:
    schedule = SCHEDULES["a prompt in parts beside tokens"]
    check([SHAPES[shape]], schedule, torch.float32, block_size=16, num_processors=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_attention_of_any_step_is_torchs(schedule: str) -> None:
    check([Shape(num_kv_heads=1, window=40)], SCHEDULES[schedule], torch.float32, block_size=16, num_processors=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", ["grouped heads, of no power of two", "window, softcap and sinks", "short values"])
def test_attention_in_16_bits_is_torchs(shape: str, dtype: torch.dtype) -> None:
    check([SHAPES[shape]], SCHEDULES["a prompt in parts beside tokens"], dtype, block_size=16, num_processors=1)


@pytest.mark.parametrize("num_processors", [4, 20])
@pytest.mark.parametrize("shape", ["window", "window, softcap and sinks", "short values"])
def test_keys_of_one_token_may_be_split_among_programs(shape: str, num_processors: int) -> None:
    schedule = SCHEDULES["longer than what is looked at together"]
    check([SHAPES[shape]], schedule, torch.float32, block_size=16, num_processors=num_processors)


@pytest.mark.parametrize("block_size", [2, 5, 24])
def test_blocks_of_any_size_are_attended_to(block_size: int) -> None:
    schedule: Steps = [{"a": 19, "b": 7}, {"b": 12, "a": 1}, {"a": 1, "b": 1}]
    check([Shape(window=21)], schedule, torch.float32, block_size, num_processors=8)


def test_attention_calls_of_one_step_do_not_share_their_memory() -> None:
    shapes = [Shape(), Shape(num_kv_heads=1, window=3), Shape(num_heads=2, value_dim=3), Shape()]
    check(shapes, SCHEDULES["a prompt in parts beside tokens"], torch.float32, block_size=4, num_processors=1)


def test_queries_and_keys_that_are_turned_elsewhere_are_taken_as_they_are() -> None:
    """Angles of another shape or dtype are torch's to apply; without any, nothing is turned."""
    shape, (plan, *_) = Shape(), plans([{"a": 11, "b": 4, "c": 1}], 4)
    heads, angles = heads_of(shape, 16, torch.float32, seed=0)
    kinds = [[], angles, [part.expand(1, 4, -1, -1)[:, :1] for part in angles], [part[0] for part in angles]]
    for own in kinds:
        answers = []
        for kind in (PagedAttention, CudaAttention):
            attention: Any = kind([shape.site()], KVMemory([shape.site()], NUM_BLOCKS, 4, torch.float32, CPU), 4)
            answers.append(attention(attention.lay_out(plan), *heads, 0, None, *own))
        torch.testing.assert_close(answers[1], answers[0], rtol=2e-6, atol=2e-6)


def test_steps_of_one_token_each_are_filled_up_to_a_size_that_writes_nothing() -> None:
    writer = StepWriter(NUM_BLOCKS, 4, 16, CPU)
    chunks = tuple(Chunk(name, (7,), 5, (3, number), is_sampled=True) for number, name in enumerate("abc"))
    step = writer.write(StepPlan(chunks))
    assert step.size == 4 and step.token_ids.tolist() == [[7, 7, 7, 0]]
    assert step.slots.tolist() == [1, 5, 9, -1]
    assert step.sampled_rows.tolist() == step.decodes.tolist() == [0, 1, 2, 3]
    assert step.chunks.view(4, 4)[3].tolist() == [3, 1, -1, 0]
    again = writer.filling(4)
    assert [part.data_ptr() for part in (again.token_ids, again.slots, again.chunks, again.block_ids)] == [
        part.data_ptr() for part in (step.token_ids, step.slots, step.chunks, step.block_ids)
    ]


def test_steps_of_any_other_kind_are_run_as_they_come() -> None:
    writer = StepWriter(NUM_BLOCKS, 4, 16, CPU)
    kinds = [
        [Chunk("a", (1,), 3, (5,), is_sampled=True), Chunk("b", (1, 2), 0, (6,), is_sampled=True)],
        [Chunk("a", (1,), 3, (5,), is_sampled=False)],
        [Chunk("a", (1,), 3, (5,), is_sampled=True, next_ids=(2,))],
        [Chunk("a", (1,), 3, (5,), is_sampled=True)] * (STEP_SIZES[-1] + 1),
        [Chunk("a", (1,), 3, tuple(range(64)) * 60, is_sampled=True)] * 2,  # more shared blocks than there is room for
    ]
    for chunks in kinds:
        plan = StepPlan(tuple(chunks))
        step = writer.write(plan)
        assert step.size is None
        assert step.slots[0] == 5 * 4 + 3 or chunks[0].block_ids[0] == 0
        assert len(step.block_ids) == sum(len(chunk.block_ids) for chunk in chunks)


def test_tiles_of_prompts_cover_each_of_their_tokens_once() -> None:
    writer = StepWriter(NUM_BLOCKS, 4, 16, CPU)
    chunks = [
        Chunk(name, (1,) * count, 0, tuple(range(10)), is_sampled=True)
        for name, count in (("a", 17), ("b", 1), ("c", 32), ("d", 2))
    ]
    step = writer.write(StepPlan(tuple(chunks)))
    assert step.tiles.view(-1, 2).tolist() == [[0, 0], [0, 16], [2, 0], [2, 16], [3, 0]]
    assert step.decodes.tolist() == [1]
