"""However a token is found, it is the one that sorting all of its row's tokens finds, whoever shares the step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from ts_parallel.native import HAS_KERNELS
from ts_parallel.runtime.backends.native import sampling as native
from ts_parallel.runtime.backends.torch import sampling
from ts_parallel.runtime.backends.torch.penalties import adjust
from ts_parallel.runtime.backends.torch.sampling import uniform
from ts_parallel.step_plan import Chunk, NoToken, SamplingParams, pack

Sampler = Callable[[torch.Tensor, Sequence[Chunk]], list[int]]
SAMPLERS = [
    pytest.param(sampling.sample, id="torch"),
    pytest.param(
        native.sample, id="native", marks=pytest.mark.skipif(not HAS_KERNELS, reason="the kernels are not for here")
    ),
]


def by_full_sort(logits: torch.Tensor, chunk: Chunk) -> int:
    """The token after `logits` `[V]`, as float64 and one sort have it."""
    own, params = logits.float()[None].clone(), chunk.sampling
    adjust(own, [chunk])
    if not params.temperature:
        return int(own[0].argmax())
    ordered, token_ids = own[0].double().sort(descending=True, stable=True)
    weights = (
        (ordered - ordered[0]) / params.temperature
    ).exp()  # of equal tokens, sums are whole: no rounding decides
    kept = weights > 0
    if params.top_k:
        kept[params.top_k :] = False
    if params.top_p < 1:
        share = torch.where(kept, weights, 0)
        before = torch.cat([torch.zeros(1), share.cumsum(dim=0)[:-1]])
        kept &= before < params.top_p * share.sum()
        kept[0] = True
    if params.min_p > 0:
        kept &= weights >= params.min_p
    if params.typical_p < 1:
        kept = typical(torch.where(kept, weights, 0), kept, params.typical_p)
    cumulated = torch.where(kept, weights, 0).cumsum(dim=0)
    target = cumulated[-1] * uniform(params.seed, chunk.end)
    chosen = int(torch.searchsorted(cumulated, target, right=True))
    return int(token_ids[min(chosen, int(kept.nonzero()[-1]))])


def typical(weights: torch.Tensor, kept: torch.Tensor, mass: float) -> torch.Tensor:
    probabilities = weights / weights.sum()
    surprise = -probabilities.log()
    expected = torch.where(kept, probabilities * surprise, 0).sum()
    order = torch.where(kept, (surprise - expected).abs(), math.inf).argsort(stable=True)
    own = probabilities[order]
    chosen = own.cumsum(dim=0) - own < mass
    chosen[0] = True
    result = torch.zeros_like(kept)
    result[order[chosen]] = True
    return result & kept


SHAPES: dict[str, Callable[[int, int], torch.Tensor]] = {
    "peaked": lambda rows, size: torch.randn(rows, size) * 4,
    "flat": lambda rows, size: torch.randn(rows, size) * 0.05,
    "a few numbers": lambda rows, size: torch.randint(-3, 4, (rows, size)).float() * 0.75,
    "all below zero": lambda rows, size: torch.randn(rows, size) - 40,
    "zeros of both signs": lambda rows, size: torch.randn(rows, size).clamp(-0.0, 1.0) * torch.randn(rows, size).sign(),
    "some impossible": lambda rows, size: torch.randn(rows, size).masked_fill(torch.rand(rows, size) < 0.6, -math.inf),
}


def random_chunk(rng: random.Random, size: int, *, is_typical: bool = False) -> Chunk:
    """Any request's, about half of whose fields change something."""

    def some(*values: float) -> float:
        return rng.choice(values)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(size) for _ in range(rng.randrange(most))] if rng.random() < 0.6 else []

    biases = [(token, some(-2.5, 0.1, 3.0, -100.0, -math.inf)) for token in tokens(6)]
    allowed = rng.randbytes(-(-size // 64) * 8) if rng.random() < 0.3 else b""
    params = SamplingParams(
        temperature=some(0.0, 0.01, 0.3, 1.0, 1.0, 2.5),
        top_p=some(1.0, 1.0, 0.05, 0.5, 0.9, 0.999),
        seed=rng.getrandbits(64),
        top_k=int(some(0, 0, 0, 1, 5, 40, 600)),
        min_p=some(0.0, 0.0, 0.0, 0.02, 0.3, 1.0),
        typical_p=some(0.2, 0.9) if is_typical else 1.0,
        repetition_penalty=some(1.0, 1.0, 1.3, 0.7),
        presence_penalty=some(0.0, 0.0, 0.6, -1.1),
        frequency_penalty=some(0.0, 0.0, 0.3, -0.2),
        logit_bias=tuple(biases + biases[:1]),
    )
    return Chunk("", (1,), rng.randrange(9999), (), True, params, pack(tokens(90)), pack(tokens(90)), (), allowed)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [7, 64, 1000, 5003])
def test_tokens_are_those_of_a_full_sort_and_of_the_row_alone(sampler: Sampler, shape: str, size: int) -> None:
    rng = random.Random(f"{shape}{size}")
    torch.manual_seed(size)
    for round_number in range(4):
        chunks = [random_chunk(rng, size, is_typical=number % 8 == 7) for number in range(24)]
        logits = SHAPES[shape](len(chunks), size).to((torch.bfloat16, torch.float16)[round_number % 2])
        together = sampler(logits, chunks)
        for row, (token, chunk) in enumerate(zip(together, chunks, strict=True)):
            assert sampler(logits[row : row + 1], [chunk]) == [token], chunk
            if token >= 0:
                assert token == by_full_sort(logits[row], chunk), chunk
            else:
                own = logits[row : row + 1].float()
                adjust(own, [chunk])
                assert token == NoToken.NOTHING_ALLOWED and bool((own == -math.inf).all())
        order = rng.sample(range(len(chunks)), 15)
        assert sampler(logits[order], [chunks[row] for row in order]) == [together[row] for row in order]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "params",
    [SamplingParams(1.0), SamplingParams(1.0, 0.9), SamplingParams(0.8, top_k=50), SamplingParams(2, min_p=0.1)],
)
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_many_seeds_draw_the_tokens_of_a_full_sort(sampler: Sampler, params: SamplingParams, scale: float) -> None:
    torch.manual_seed(1)
    logits = (torch.randn(1, 3000) * scale).bfloat16().expand(256, -1).contiguous()
    chunks = [
        Chunk("", (1,), 31 * seed, (), True, SamplingParams(**{**vars(params), "seed": seed})) for seed in range(256)
    ]
    assert sampler(logits, chunks) == [by_full_sort(logits[0], chunk) for chunk in chunks]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [1e5, -1e5, 3e38, -3e38])
def test_number_that_has_no_16_bits_is_drawn_as_any_other(sampler: Sampler, dtype: torch.dtype, bias: float) -> None:
    """One that float16 would have for infinite, be it the best that may come or the worst."""
    torch.manual_seed(4)
    logits = torch.randn(40, 30).to(dtype)
    logits[20:] = -math.inf
    for temperature in (0.0, 1.0, 1e4, 1e38):
        params = [
            SamplingParams(temperature, seed=row, logit_bias=((3, bias), (5, bias * 0.9999), (row % 30, 2.5)))
            for row in range(40)
        ]
        for row in range(20, 40):
            logits[row, [3, 5]] = 0.5
        chunks = [Chunk("", (1,), 7, (), True, own) for own in params]
        tokens = sampler(logits, chunks)
        assert tokens == [by_full_sort(own, chunk) for own, chunk in zip(logits, chunks, strict=True)]


def test_few_tokens_are_enough_or_all_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortlists of any length, down to one that holds nothing but a part of the tokens that share the greatest."""
    rng = random.Random(5)
    torch.manual_seed(5)
    for few in (1, 2, 8, 33):
        monkeypatch.setattr(sampling, "_FEW", few)
        for shape in SHAPES.values():
            chunks = [random_chunk(rng, 200, is_typical=number % 8 == 7) for number in range(40)]
            logits = shape(len(chunks), 200)
            tokens = sampling.sample(logits, chunks)
            wanted = [by_full_sort(own, chunk) for own, chunk in zip(logits, chunks, strict=True)]
            assert [token for token in tokens if token >= 0] == [
                own for own, token in zip(wanted, tokens, strict=True) if token >= 0
            ]


def test_rows_whose_few_most_likely_tokens_hold_all_that_may_come_are_not_sorted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(3)
    logits = torch.randn(8, 4000) * 6
    chunks = [Chunk("", (1,), row, (), True, SamplingParams(1.0, 0.9, top_k=row % 3 * 20)) for row in range(8)]
    wanted = [by_full_sort(own, chunk) for own, chunk in zip(logits, chunks, strict=True)]
    lengths = []
    choose_of = sampling.choose_of
    monkeypatch.setattr(sampling, "choose_of", lambda *given: lengths.append(given[0].shape) or choose_of(*given))
    assert sampling.sample(logits, chunks) == wanted
    assert lengths == [(8, sampling._FEW)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equal_logits_are_drawn_in_the_order_of_their_ids_and_by_the_seeds_own_number(sampler: Sampler) -> None:
    logits = torch.zeros(64, 4096).bfloat16()
    chunks = [
        Chunk("", (1,), 5**row, (), True, SamplingParams(1.0, seed=2**64 - 1 - 3**row % 2**64)) for row in range(26)
    ]
    chunks += [Chunk("", (1,), row, (), True, SamplingParams(1.0, 0.5, seed=row)) for row in range(38)]
    numbers = [uniform(chunk.sampling.seed, chunk.end) for chunk in chunks]
    wanted = [int(number * 4096 * chunk.sampling.top_p) for number, chunk in zip(numbers, chunks, strict=True)]
    assert sampler(logits, chunks) == wanted


def plain(**fields: float) -> Chunk:
    return Chunk("", (1,), 3, (), True, SamplingParams(**fields))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("place", [0, 31, 63, 98])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_with_a_nan_has_no_token_and_its_neighbours_have_theirs(
    sampler: Sampler, place: int, temperature: float
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 99).bfloat16()
    chunks = [plain(temperature=temperature)] * 3 + [plain(temperature=1.0, top_k=4)]
    before = sampler(logits, chunks)
    for spoilt, is_negative in ((0, False), (1, True), (3, False)):
        spoiled = logits.clone()
        spoiled[spoilt, place] = -torch.tensor(math.nan) if is_negative else math.nan
        wanted = [NoToken.NOT_A_NUMBER if row == spoilt else token for row, token in enumerate(before)]
        assert sampler(spoiled, chunks) == wanted


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_where_nothing_is_allowed_has_no_token(sampler: Sampler, temperature: float) -> None:
    logits = torch.zeros(4, 70).bfloat16()
    logits[1] = -math.inf
    params = SamplingParams(temperature, logit_bias=tuple((token, -math.inf) for token in range(70)))
    masked = Chunk(
        "", (1,), 3, (), True, SamplingParams(temperature), allowed=bytes(8) + (1 << 5).to_bytes(8, "little")
    )
    chunks = [
        plain(temperature=temperature),
        plain(temperature=temperature),
        Chunk("", (1,), 3, (), True, params),
        masked,
    ]
    first, *others = sampler(logits, chunks)
    assert first >= 0 and others == [NoToken.NOTHING_ALLOWED, NoToken.NOTHING_ALLOWED, 69]
    assert sampler(logits[:2], chunks[:2]) == [first, NoToken.NOTHING_ALLOWED]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bias_that_meets_infinity_has_no_token(sampler: Sampler) -> None:
    logits = torch.zeros(2, 40).bfloat16()
    logits[0, 3] = math.inf
    params = SamplingParams(1.0, logit_bias=((3, -math.inf),))
    tokens = sampler(logits, [Chunk("", (1,), 3, (), True, params)] * 2)
    assert tokens[0] == NoToken.NOT_A_NUMBER and tokens[1] >= 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tokens_that_the_head_has_not_are_passed_over(sampler: Sampler) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]]).bfloat16()
    params = SamplingParams(repetition_penalty=3.0, presence_penalty=0.5, logit_bias=((3, 9.0),))
    assert sampler(logits, [Chunk("", (1,), 3, (), True, params, pack((7, 3)), pack((1, 900)))]) == [2]


def test_log_probabilities_are_counted_where_there_is_no_token() -> None:
    """So that the other chunks' numbers are found."""
    logits = torch.zeros(2, 5)
    logits[0, 2] = math.nan
    chunks = [Chunk("", (1,), 3, (), True, SamplingParams(num_logprobs=2))] * 2
    numbers = sampling.choose(logits, chunks)
    assert numbers[:2] == [NoToken.NOT_A_NUMBER, 0] and len(numbers) == 2 * (1 + 5)
