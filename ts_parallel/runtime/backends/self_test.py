"""A backend's operations in 16 bits on small random tensors, beside the same in float64: does this machine compute
rightly?

Knows the contract of a backend, and none of its kinds. O output features, I input features, T tokens, K width, R rows,
V vocabulary; H, KV, D and E as in `AttentionSite`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from ts_parallel.partition.load import PackedRows
from ts_parallel.partition.program import AttentionSite, LinearLayer, RmsNorm
from ts_parallel.runtime.backends.base import Backend
from ts_parallel.step_plan import Chunk, StepPlan

_CPU = torch.device("cpu")
_OUTPUTS, _INPUTS = 200, 160  # neither fills its last panel or group
_TOKENS = (1, 40)  # one is read past the weight, many are multiplied from the cache
_EPSILON = 1e-5
_SITE = AttentionSite("attention", 6, 2, 64, 64, None, 0.125, None, False)
_BLOCK_SIZE, _NUM_BLOCKS = 16, 8
_BLOCKS = {"a": (5, 2, 7), "b": (1, 6)}
_LENGTHS = ({"a": 33, "b": 20}, {"a": 34, "b": 21})  # after each step
_LARGEST = {"int8": 127, "int4": 7}
_GROUP = {"int8": _INPUTS, "int4": 64}  # inputs that share a scale
_BITS_MORE = {torch.bfloat16: 0, torch.float16: 3}  # than bfloat16 has: so many powers of 2 less is allowed


@dataclass(frozen=True)
class Comparison:
    """One operation's numbers beside the reference's."""

    num_numbers: int
    num_wrong: int
    """Of them, those that lie further from the reference's than is allowed, or are no numbers."""
    share: float
    """The largest difference in parts of what is allowed there: 1 at most where none is wrong."""
    allowed: str
    """How far from the reference's number x one may lie."""


Operation = Callable[[], Comparison]


def operations(backend: Backend, dtype: torch.dtype = torch.bfloat16) -> dict[str, Operation]:
    """What can be compared of `backend` on the CPU in bfloat16 or float16, by name. Each makes its own numbers, always
    the same."""
    kinds: list[str | None] = [None, *sorted(backend.quantizations, reverse=True)]
    plain = str(dtype).removeprefix("torch.")
    linears = {f"linear {kind or plain}": partial(_linear, backend, dtype, kind) for kind in kinds}
    others = {"attention": _attention, "norm": _norm, "rotary": _rotary, "argmax": _argmax}
    return {**linears, **{name: partial(compare, backend, dtype) for name, compare in others.items()}}


def _compare(numbers: torch.Tensor, exact: torch.Tensor, part: int, least: float) -> Comparison:
    """Of one shape each, `exact` in float64, from which numbers in bfloat16 may lie as far as a `part` of it and
    `least`, and numbers of more bits less far."""
    part, least = part << _BITS_MORE[numbers.dtype], least / (1 << _BITS_MORE[numbers.dtype])
    return _compare_within(numbers, exact, exact.abs() / part + least, f"|x|/{part} + {least:.9f}".rstrip("0"))


def _compare_within(numbers: torch.Tensor, exact: torch.Tensor, allowed: torch.Tensor, text: str) -> Comparison:
    """Of one shape each; `exact` and `allowed` in float64."""
    assert numbers.shape == exact.shape == allowed.shape
    difference = (numbers.double() - exact).abs()
    is_wrong = ~(difference <= allowed)  # also where it is NaN
    share = torch.where(difference == 0, 0.0, difference / allowed).nan_to_num(torch.inf)
    return Comparison(numbers.numel(), int(is_wrong.sum()), float(share.max()), text)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


@torch.inference_mode()
def _linear(backend: Backend, dtype: torch.dtype, quantization: str | None) -> Comparison:
    generator = _generator()
    weight, bias = _weight(generator, dtype, quantization), _normal(generator, dtype, _OUTPUTS) / 8
    stored: torch.Tensor | PackedRows = weight
    if backend.weights is not None and backend.weights.takes(weight):
        stored = packed = backend.weights.allocate((_OUTPUTS, _INPUTS), dtype, quantization)
        packed.put(0, weight)
    linear = backend.make_linears(LinearLayer("weight", "bias"), {"weight": stored, "bias": bias})
    hidden = [_normal(generator, dtype, 1, num_tokens, _INPUTS) / 8 for num_tokens in _TOKENS]
    exact = torch.nn.functional.linear(torch.cat(hidden, 1).double(), weight.double(), bias.double())
    numbers = torch.cat([linear(own) for own in hidden], 1)
    return _compare(numbers, exact, 100, 1e-3)


def _weight(generator: torch.Generator, dtype: torch.dtype, quantization: str | None) -> torch.Tensor:
    """`[O, I]`; of integers those that they stand for without loss: a power of two times each, and in every
    group one as large as they get."""
    if quantization is None:
        return _normal(generator, dtype, _OUTPUTS, _INPUTS) / 8
    largest = _LARGEST[quantization]
    integers = torch.randint(-largest, largest + 1, (_OUTPUTS, _INPUTS), generator=generator)
    integers[:, :: _GROUP[quantization]] = largest
    exponents = torch.randint(-3, 0, (_OUTPUTS, 1), generator=generator)
    return (integers * 2.0**exponents / (largest + 1)).to(dtype)


@torch.inference_mode()
def _norm(backend: Backend, dtype: torch.dtype) -> Comparison:
    generator = _generator()
    hidden, weight = _normal(generator, dtype, 1, 40, 768) * 3, _normal(generator, dtype, 768)
    norm = backend.make_norm(RmsNorm("weight", _EPSILON, is_offset=False), weight)
    plain = hidden.double()
    exact = weight.double() * plain * torch.rsqrt(plain.pow(2).mean(-1, keepdim=True) + _EPSILON)
    return _compare(norm(hidden), exact, 100, 1e-6)


@torch.inference_mode()
def _rotary(backend: Backend, dtype: torch.dtype) -> Comparison:
    generator = _generator()
    hidden = _normal(generator, dtype, 1, 19, 3, 64).transpose(1, 2)
    angles = torch.rand(1, 1, 19, 32, generator=generator) * 6.3
    cosine, sine = (torch.cat([part, part], -1).to(dtype) for part in (angles.cos(), angles.sin()))
    first, second = hidden[..., :32].double(), hidden[..., 32:].double()
    kept = hidden.double() * cosine.double()
    turned = torch.cat([-second, first], -1) * sine.double()
    part = 100 << _BITS_MORE[dtype]
    allowed = (kept.abs() + turned.abs()) / part + 1e-6
    return _compare_within(backend.rotary(hidden, cosine, sine), kept + turned, allowed, f"1/{part} of its terms")


@torch.inference_mode()
def _attention(backend: Backend, dtype: torch.dtype) -> Comparison:
    """Two sequences over scattered blocks: a step of both prompts, then one of a token each."""
    generator, longest = _generator(), max(_LENGTHS[-1].values())
    heads = (_SITE.num_heads, _SITE.num_kv_heads, _SITE.num_kv_heads)
    tensors = {
        name: [_normal(generator, dtype, 1, count, longest, _SITE.head_dim) for count in heads] for name in _BLOCKS
    }
    exact = {
        name: _dense(*(tensor[0, :, : _LENGTHS[-1][name]].double() for tensor in tensors[name])) for name in tensors
    }
    attention = backend.make_attention([_SITE], _NUM_BLOCKS, _BLOCK_SIZE, dtype, _CPU)
    numbers, wanted = [], []
    for plan in _plans():
        rows = [(chunk.request_id, slice(chunk.start, chunk.end)) for chunk in plan.chunks]
        query, key, value = (torch.cat([tensors[name][part][:, :, own] for name, own in rows], 2) for part in range(3))
        numbers.append(attention(attention.lay_out(plan), query, key, value, 0)[0])
        wanted += [exact[name][own] for name, own in rows]
    found = torch.cat(wanted)
    return _compare(torch.cat(numbers), found, 50, 0.02)


def _plans() -> Iterator[StepPlan]:
    for before, after in pairwise(({name: 0 for name in _BLOCKS}, *_LENGTHS)):
        yield StepPlan(
            tuple(
                Chunk(name, tuple(range(before[name], end)), before[name], _BLOCKS[name], is_sampled=True)
                for name, end in after.items()
            )
        )


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """query `[H, T, D]`, key `[KV, T, D]`, value `[KV, T, E]` → `[T, H, E]`."""
    key, value = (part.repeat_interleave(_SITE.num_heads // _SITE.num_kv_heads, 0) for part in (key, value))
    scores = query @ key.transpose(1, 2) * _SITE.scaling
    is_later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(is_later, -torch.inf).softmax(-1) @ value).transpose(0, 1)


@torch.inference_mode()
def _argmax(backend: Backend, dtype: torch.dtype) -> Comparison:
    """The first of each row's greatest logits `[R, V]`, of which there are two."""
    logits = _normal(_generator(), dtype, 7, 1003)
    first = torch.arange(7) * 150
    for row, column in enumerate(first.tolist()):
        logits[row, [column, 1000]] = 9.0
    chunks = [Chunk(str(row), (0,), 0, (row,), is_sampled=True) for row in range(len(logits))]
    numbers = torch.tensor(backend.choose(logits, chunks))
    return _compare_within(numbers, first.double(), torch.zeros(7, dtype=torch.float64), "nothing")
