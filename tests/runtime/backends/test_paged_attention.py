"""Attention over scattered blocks, step by step, is plain softmax attention over whole sequences.

T tokens, H query heads, KV key/value heads, D and E the key and value head dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from paged_steps import plans_of

from ts_parallel.native import HAS_KERNELS, kernels_for
from ts_parallel.partition.model.attention_sites import AttentionSite
from ts_parallel.runtime.backends.choose import choose_backend
from ts_parallel.runtime.backends.native.attention import KernelAttention
from ts_parallel.runtime.backends.torch.norms import rotary
from ts_parallel.runtime.backends.torch.paged_attention import lay_out
from ts_parallel.step_plan import Chunk, StepPlan

CPU = torch.device("cpu")
BLOCK_SIZE = 4
NUM_BLOCKS = 160
LONGEST = 160
NAMES = "abc"


@dataclass(frozen=True)
class Shape:
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 8
    value_dim: int = 8
    window: int | None = None
    softcap: float | None = None
    scaling: float = 0.4
    has_sinks: bool = False

    def site(self) -> AttentionSite:
        return AttentionSite(
            "attention",
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.value_dim,
            self.window,
            self.scaling,
            self.softcap,
            self.has_sinks,
        )


SHAPES = {
    "one key head a query head": Shape(),
    "grouped heads": Shape(num_heads=6, num_kv_heads=2),
    "one key head for all": Shape(num_kv_heads=1),
    "window": Shape(num_kv_heads=2, window=5),
    "window of one": Shape(window=1),
    "window longer than all": Shape(window=LONGEST),
    "sinks": Shape(num_kv_heads=2, has_sinks=True),
    "sinks, window and softcap": Shape(num_kv_heads=2, window=5, softcap=1.5, has_sinks=True),
    "softcap": Shape(num_kv_heads=2, softcap=1.5),
    "window and softcap": Shape(num_kv_heads=2, window=5, softcap=1.5),
    "short values": Shape(num_kv_heads=2, value_dim=3),
    "long values": Shape(num_kv_heads=2, value_dim=12),
    "short values and softcap": Shape(num_kv_heads=2, value_dim=3, softcap=1.5),
}

# How many tokens of which sequences each step adds.
Steps = list[dict[str, int]]
SCHEDULES: dict[str, Steps] = {
    "whole prefill": [{"a": 11}],
    "whole prefills together": [{"a": 11, "b": 4, "c": 5}],
    "chunked prefill": [{"a": 4}, {"a": 5}, {"a": 3}],
    "decodes of mixed lengths": [{"a": 9, "b": 1, "c": 4}, *[{"a": 1, "b": 1, "c": 1}] * 4],
    "prefill beside decodes": [{"a": 9}, {"b": 6, "a": 1}, {"c": 1, "b": 3, "a": 1}, {"a": 1, "c": 7, "b": 1}],
    "long ones": [{"a": 130, "b": 70}, {"a": 1, "b": 59}, *[{"a": 1, "c": 1, "b": 1}] * 2],
    "decodes in another order each time": [{"a": 3, "b": 8}, {"b": 1, "a": 1}, {"a": 1, "b": 1}, {"b": 1}],
}


@dataclass(frozen=True)
class Tensors:
    """What the model hands over for one whole sequence."""

    query: torch.Tensor  # [H, T, D]
    key: torch.Tensor  # [KV, T, D]
    value: torch.Tensor  # [KV, T, E]
    sinks: torch.Tensor  # [H]

    @staticmethod
    def random(shape: Shape, generator: torch.Generator) -> Tensors:
        def normal(num_heads: int, dim: int) -> torch.Tensor:
            return torch.randn(num_heads, LONGEST, dim, generator=generator).bfloat16().float()

        return Tensors(
            normal(shape.num_heads, shape.head_dim),
            normal(shape.num_kv_heads, shape.head_dim),
            normal(shape.num_kv_heads, shape.value_dim),
            torch.arange(shape.num_heads) - 1.0,
        )


def dense(shape: Shape, tensors: Tensors, length: int) -> torch.Tensor:
    """Each head of each token by itself, over the whole sequence of `length` tokens: `[T, H, E]`."""
    output = torch.empty(length, shape.num_heads, shape.value_dim)
    for head in range(shape.num_heads):
        kv_head = head * shape.num_kv_heads // shape.num_heads
        for position in range(length):
            first = 0 if shape.window is None else max(0, position + 1 - shape.window)
            keys, values = (part[kv_head, first : position + 1] for part in (tensors.key, tensors.value))
            scores = keys @ tensors.query[head, position] * shape.scaling
            if shape.softcap is not None:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            if shape.has_sinks:
                scores = torch.cat([scores, tensors.sinks[head, None]])
            output[position, head] = scores.softmax(dim=0)[: len(values)] @ values
    return output


def plans(schedule: Steps, block_size: int = BLOCK_SIZE) -> list[StepPlan]:
    return plans_of(schedule, NUM_BLOCKS, block_size)


def make_attention(shapes: list[Shape], dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> Any:
    """That of the backend which a server would have here."""
    sites = [shape.site() for shape in shapes]
    return choose_backend(CPU, dtype).make_attention(sites, NUM_BLOCKS, block_size, dtype, CPU)


def paged(
    shapes: list[Shape],
    schedule: Steps,
    sequences: list[dict[str, Tensors]],
    dtype: torch.dtype,
    block_size: int = BLOCK_SIZE,
) -> list[dict[str, torch.Tensor]]:
    """Each site's output of each sequence, `[T, H, E]`, with as many tokens as the schedule adds."""
    attention = make_attention(shapes, dtype, block_size)
    assert isinstance(attention, KernelAttention) == (kernels_for(dtype) is not None and block_size % 2 == 0)
    for buffer in (*attention.memory.keys, *attention.memory.values):
        buffer.fill_(torch.inf)  # by earlier requests; one such slot that is read spoils the answer
    outputs = [{name: list[torch.Tensor]() for name in NAMES} for _ in shapes]
    for plan in plans(schedule, block_size):
        layout = attention.lay_out(plan)
        for site, shape in enumerate(shapes):
            sinks = next(iter(sequences[site].values())).sinks.to(dtype) if shape.has_sinks else None
            own = [(sequences[site][chunk.request_id], slice(chunk.start, chunk.end)) for chunk in plan.chunks]
            query, key, value = (
                torch.cat([getattr(tensors, part)[:, rows] for tensors, rows in own], dim=1).unsqueeze(0).to(dtype)
                for part in ("query", "key", "value")
            )
            output = attention(layout, query, key, value, site, sinks)
            assert output.shape == (1, plan.num_tokens, shape.num_heads, shape.value_dim)
            parts = torch.split(output[0], [len(chunk.token_ids) for chunk in plan.chunks])
            for chunk, part in zip(plan.chunks, parts, strict=True):
                outputs[site][chunk.request_id].append(part.float())
    return [{name: torch.cat(parts) for name, parts in of_site.items() if parts} for of_site in outputs]


def random_sequences(shapes: list[Shape]) -> list[dict[str, Tensors]]:
    generator = torch.Generator().manual_seed(0)
    return [{name: Tensors.random(shape, generator) for name in NAMES} for shape in shapes]


# What a sum in another order may differ by. In 16 bits the weights of the values are rounded too.
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.0025}


def check(shapes: list[Shape], schedule: Steps, dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> None:
    sequences, error = random_sequences(shapes), LARGEST_ERROR[dtype]
    for site, outputs in enumerate(paged(shapes, schedule, sequences, dtype, block_size)):
        assert outputs.keys() == {name for step in schedule for name in step}
        for name, output in outputs.items():
            expected = dense(shapes[site], sequences[site][name], len(output))
            torch.testing.assert_close(output, expected, rtol=error, atol=error)


all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@all_dtypes
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "long ones"])
@pytest.mark.parametrize("shape", SHAPES)
def test_paged_attention_is_dense_attention(shape: str, schedule: str, dtype: torch.dtype) -> None:
    check([SHAPES[shape]], SCHEDULES[schedule], dtype)


@all_dtypes
@pytest.mark.parametrize(
    "shape",
    [
        Shape(num_heads=6, num_kv_heads=2, head_dim=64, value_dim=64, scaling=0.1),
        Shape(num_heads=2, num_kv_heads=1, head_dim=80, value_dim=80, window=70, scaling=0.1),
        Shape(num_heads=4, num_kv_heads=4, head_dim=24, value_dim=16, softcap=2.0, has_sinks=True),
        Shape(num_heads=2, num_kv_heads=1, head_dim=128, value_dim=130, window=3, scaling=0.1),
    ],
)
def test_long_sequences_are_attended_to_tile_by_tile(shape: Shape, dtype: torch.dtype) -> None:
    check([shape], SCHEDULES["long ones"], dtype)


@all_dtypes
@pytest.mark.parametrize("block_size", [2, 5, 6, 8, 16, 24, 48])
@pytest.mark.parametrize("window", [None, 21])
def test_blocks_of_any_size_are_attended_to(block_size: int, window: int | None, dtype: torch.dtype) -> None:
    shape = Shape(num_heads=6, num_kv_heads=2, head_dim=16, value_dim=20, window=window)
    check([shape], SCHEDULES["long ones"], dtype, block_size)


@pytest.mark.skipif(not HAS_KERNELS, reason="the processor lacks what the kernels need")
@pytest.mark.parametrize("shape", ["grouped heads", "sinks, window and softcap"])
def test_kernels_give_the_same_bits_however_a_sequence_is_cut(shape: str, dtype: torch.dtype) -> None:
    schedules: list[Steps] = [[{"a": 100}], [{"a": 1}] * 100, [{"a": 7}, {"a": 60, "b": 3}, {"b": 1, "a": 33}]]
    sequences = random_sequences([SHAPES[shape]])
    first, *others = (paged([SHAPES[shape]], each, sequences, dtype, 16)[0]["a"] for each in schedules)
    assert all(torch.equal(first, other) for other in others)


@all_dtypes
def test_attention_turns_queries_and_keys_as_rotary_does(dtype: torch.dtype) -> None:
    shape, (plan, *_) = Shape(num_kv_heads=2), plans([{"a": 11, "b": 4, "c": 1}])
    generator = torch.Generator().manual_seed(0)
    query, key, value, cosine, sine = (
        torch.randn(1, heads, 16, 8, generator=generator).to(dtype) for heads in (4, 2, 2, 1, 1)
    )
    answers = []
    for is_turned_before in (True, False):
        attention = make_attention([shape], dtype)
        layout = attention.lay_out(plan)
        if is_turned_before:
            turned = (rotary(query, cosine, sine), rotary(key, cosine, sine))
            answers.append((attention(layout, *turned, value, 0), attention.memory.keys[0]))
        else:
            answers.append((attention(layout, query, key, value, 0, None, cosine, sine), attention.memory.keys[0]))
    (first, first_keys), (second, second_keys) = answers
    assert torch.equal(first, second) and torch.equal(first_keys, second_keys)


@all_dtypes
def test_attention_calls_of_one_step_do_not_share_their_memory(dtype: torch.dtype) -> None:
    shapes = [Shape(), Shape(num_kv_heads=1, window=3), Shape(num_heads=2, num_kv_heads=2, value_dim=3), Shape()]
    check(shapes, SCHEDULES["prefill beside decodes"], dtype)


@all_dtypes
def test_longest_sequence_of_whole_blocks_is_attended_to_its_end(dtype: torch.dtype) -> None:
    check([Shape(num_kv_heads=2)], [{"a": LONGEST - 1}, {"a": 1}], dtype)


def test_layout_packs_the_chunks_one_after_another() -> None:
    plan = StepPlan(
        (
            Chunk("a", (11, 12, 13), 3, (5, 2), is_sampled=False),
            Chunk("b", (21,), 4, (0, 7), is_sampled=True),
            Chunk("c", (31, 32), 0, (1,), is_sampled=True),
        )
    )
    layout = lay_out(plan, BLOCK_SIZE, CPU)
    assert layout.token_ids.tolist() == [[11, 12, 13, 21, 31, 32]]
    assert layout.positions.tolist() == [[3, 4, 5, 4, 0, 1]]
    assert layout.slots.tolist() == [23, 8, 9, 28, 4, 5]
    assert layout.sampled_rows.tolist() == [3, 5]
    assert layout.decode is not None and layout.decode.rows.tolist() == [3]
    assert [prefill.rows for prefill in layout.prefills] == [slice(0, 3), slice(4, 6)]


def test_decodes_are_padded_with_their_own_last_slot() -> None:
    """In the blocks and behind them; blocks beyond a chunk's end are nobody's business."""
    chunks = (
        Chunk("a", (1,), 8, (5, 2, 3), is_sampled=True),
        Chunk("b", (2, 3), 0, (9,), is_sampled=True),
        Chunk("c", (4,), 1, (7, 6), is_sampled=True),
    )
    layout = lay_out(StepPlan(chunks), BLOCK_SIZE, CPU)
    assert layout.decode is not None and layout.decode.rows.tolist() == [0, 3]
    first, second = layout.decode.slots.view(2, 9).tolist()
    assert first == [20, 21, 22, 23, 8, 9, 10, 11, 12]
    assert second == [28, 29, *[29] * 7]
    assert layout.decode.mask.of(None).sum(dim=1).tolist() == [9, 2]


def test_rows_of_a_prompt_that_is_scored_come_before_the_sampled_one() -> None:
    plan = StepPlan(
        (
            Chunk("a", (11, 12, 13), 3, (5, 2), is_sampled=False, next_ids=(12, 13, 14)),
            Chunk("b", (21,), 4, (0, 7), is_sampled=True),
            Chunk("c", (31, 32), 0, (1,), is_sampled=True, next_ids=(32,)),
        )
    )
    assert lay_out(plan, BLOCK_SIZE, CPU).sampled_rows.tolist() == [0, 1, 2, 3, 4, 5]


def test_step_that_samples_nothing_has_no_sampled_rows() -> None:
    layout = lay_out(StepPlan((Chunk("a", (1, 2), 0, (0,), is_sampled=False),)), BLOCK_SIZE, CPU)
    assert layout.sampled_rows.shape == (0,)
    assert layout.sampled_rows.dtype == torch.int64
    assert layout.decode is None


@all_dtypes
def test_heads_whose_numbers_lie_apart_are_attended_to_as_those_side_by_side(dtype: torch.dtype) -> None:
    """With the same bits by the kernels; torch itself may multiply them in another order."""
    shape, (plan, *_) = Shape(num_kv_heads=2), plans([{"a": 11, "b": 4, "c": 1}])
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(1, count, 16, 8, generator=generator).to(dtype) for count in (4, 2, 2)]
    apart = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in heads]
    answers, error = [], LARGEST_ERROR[dtype]
    for query, key, value in (heads, apart):
        attention = make_attention([shape], dtype)
        layout = attention.lay_out(plan)
        answers.append(attention(layout, query, key, value, 0))
        if isinstance(attention, KernelAttention):
            error = 0.0
    torch.testing.assert_close(*answers, rtol=error, atol=error)


@all_dtypes
@pytest.mark.parametrize("shape", ["one key head a query head", "softcap", "window"])
def test_keys_and_values_of_others_are_never_read_be_they_nan(shape: str, dtype: torch.dtype) -> None:
    """A slot that is masked is multiplied by 0, and 0 × NaN is NaN."""
    own = SHAPES[shape]
    site = own.site()
    attention: Any = choose_backend(CPU, dtype).make_attention([site], 6, BLOCK_SIZE, dtype, CPU)
    for part in (*attention.memory.keys, *attention.memory.values):
        part.fill_(float("nan"))

    def heads(num_heads: int, num_tokens: int, dim: int) -> torch.Tensor:
        return torch.randn(1, num_heads, num_tokens, dim, dtype=dtype)

    for tokens, start in ((5, 0), (1, 5)):
        plan = StepPlan(
            (
                Chunk("a", (1,) * tokens, start, (5, 2), is_sampled=True),
                Chunk("b", (1,), 0 if start == 0 else 1, (4,), is_sampled=True),
            )
        )
        total = plan.num_tokens
        output = attention(
            attention.lay_out(plan),
            heads(own.num_heads, total, own.head_dim),
            heads(own.num_kv_heads, total, own.head_dim),
            heads(own.num_kv_heads, total, own.value_dim),
            0,
        )
        assert bool(output.isfinite().all())
