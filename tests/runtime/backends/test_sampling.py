"""A token depends on its logits, its request's parameters and its position, and is drawn as often as it should be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from ts_parallel.runtime.backends.torch import sampling
from ts_parallel.runtime.backends.torch.sampling import uniform
from ts_parallel.step_plan import Chunk, SamplingParams, pack

PROBABILITIES = [0.4, 0.05, 0.3, 0.05, 0.2]
LOGITS = torch.tensor(PROBABILITIES).log()
NUM_DRAWS = 2000


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """The token of each row at its position, in requests that are alike but for these."""
    rows = zip(params, positions, strict=True)
    return sampling.sample(logits, [Chunk("", (1,), position - 1, (), True, own) for own, position in rows])


def draw(params: SamplingParams, num_draws: int = NUM_DRAWS, logits: torch.Tensor = LOGITS) -> list[int]:
    """The token at each of many positions, all of the same logits."""
    return sample(logits.expand(num_draws, -1), [params] * num_draws, range(num_draws))


def chi_square(tokens: list[int], probabilities: list[float]) -> float:
    """Pearson's distance between what was drawn and what should have been; about the number of tokens if that is so."""
    counts = Counter(tokens)
    expected = [len(tokens) * probability for probability in probabilities]
    return sum((counts[token] - mean) ** 2 / mean for token, mean in enumerate(expected) if mean)


def at_temperature(temperature: float) -> list[float]:
    weights = [probability ** (1 / temperature) for probability in PROBABILITIES]
    return [weight / sum(weights) for weight in weights]


def test_temperature_0_takes_the_most_likely_whatever_the_rest_says() -> None:
    params = SamplingParams(temperature=0.0, top_p=0.1, seed=3)
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [-3.0, -2.0, -1.0]])
    assert sample(logits, [params] * 3, [0, 1, 2]) == [1, 0, 2]


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 5), [], []) == []


# For 4 degrees of freedom a right distribution exceeds 23.5 once in 10,000; the draws are the same at each run.
@pytest.mark.parametrize(("temperature", "seed"), [(0.5, 0), (1.0, 1), (2.0, 2**64 - 1)])
def test_tokens_are_as_frequent_as_they_are_probable(temperature: float, seed: int) -> None:
    tokens = draw(SamplingParams(temperature, seed=seed))
    assert chi_square(tokens, at_temperature(temperature)) < 23.5
    for wrong in {0.5, 1.0, 2.0} - {temperature}:
        assert chi_square(tokens, at_temperature(wrong)) > 100


def test_tokens_of_many_seeds_at_one_position_are_as_frequent_as_they_are_probable() -> None:
    params = [SamplingParams(1.0, seed=seed) for seed in range(NUM_DRAWS)]
    tokens = sample(LOGITS.expand(NUM_DRAWS, -1), params, [7] * NUM_DRAWS)
    assert chi_square(tokens, PROBABILITIES) < 23.5


def test_one_position_says_nothing_of_the_next() -> None:
    """Pairs of neighbours are as frequent as two independent draws; for 24 degrees of freedom 62 is once in 30,000."""
    tokens = draw(SamplingParams(1.0, seed=5))
    pairs = [first * 5 + second for first, second in zip(tokens[::2], tokens[1::2], strict=True)]
    assert chi_square(pairs, [first * second for first in PROBABILITIES for second in PROBABILITIES]) < 62


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {0}), (0.39, {0}), (0.41, {0, 2}), (0.69, {0, 2}), (0.71, {0, 2, 4}), (0.89, {0, 2, 4})]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    tokens = draw(SamplingParams(1.0, top_p=top_p, seed=1), 500)
    assert set(tokens) == kept
    total = sum(PROBABILITIES[token] for token in kept)
    wanted = [probability / total * (token in kept) for token, probability in enumerate(PROBABILITIES)]
    assert chi_square(tokens, wanted) < 23.5


def test_top_p_1_keeps_even_the_least_likely() -> None:
    logits = torch.tensor([0.999, 0.001]).log()
    assert set(draw(SamplingParams(1.0, top_p=1.0), logits=logits)) == {0, 1}
    assert set(draw(SamplingParams(1.0, top_p=0.998), 500, logits)) == {0}


def test_nucleus_is_measured_after_temperature() -> None:
    assert set(draw(SamplingParams(0.5, top_p=0.5), 500)) == {0}  # 0.4² of 0.295 is 0.54
    assert set(draw(SamplingParams(1.0, top_p=0.5), 500)) == {0, 2}


def test_seed_decides_the_tokens() -> None:
    assert draw(SamplingParams(1.0, seed=1), 50) == draw(SamplingParams(1.0, seed=1), 50)
    assert draw(SamplingParams(1.0, seed=1), 50) != draw(SamplingParams(1.0, seed=2), 50)
    assert draw(SamplingParams(1.0, seed=0), 50) != draw(SamplingParams(1.0, seed=2**63), 50)


def test_token_is_the_same_whoever_shares_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 50, generator=generator)
    params = [SamplingParams(0.5 * (row % 3), 1.0 - 0.1 * (row % 2), seed=row) for row in range(12)]
    positions = [3 * row + 1 for row in range(12)]
    together = sample(logits, params, positions)
    alone = [sample(logits[row : row + 1], [params[row]], [positions[row]])[0] for row in range(12)]
    backwards = sample(logits.flip(0), params[::-1], positions[::-1])[::-1]
    assert together == alone == backwards
    assert together != logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_few_bits_are_drawn_from_without_further_loss(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    params = [SamplingParams(0.7, 0.95, seed) for seed in range(50)]
    positions = list(range(50))
    assert sample(logits.expand(50, -1), params, positions) == sample(logits.double().expand(50, -1), params, positions)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    assert set(draw(SamplingParams(1.0), 200, logits)) == {0, 2}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-310, 5e-324])
def test_any_temperature_however_low_has_a_token(temperature: float) -> None:
    for params in (SamplingParams(temperature), SamplingParams(temperature, 0.9, 1, 3, 0.1, 0.5)):
        assert set(draw(params, 50)) == {0}
    assert set(draw(SamplingParams(temperature), 200, torch.tensor([1.0, 3.0, 3.0]))) == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_beside_an_infinite_logit_nothing_counts(temperature: float) -> None:
    for params in (SamplingParams(temperature), SamplingParams(temperature, 0.9, 1, 3, 0.1, 0.5)):
        assert set(draw(params, 20, torch.full((5,), math.inf))) == {0}
    assert set(draw(SamplingParams(temperature), 20, torch.tensor([0.0, math.inf, -math.inf]))) == {1}


def test_lowest_repetition_penalty_that_overflows_leaves_a_token() -> None:
    params = SamplingParams(1.0, repetition_penalty=1e-40)
    assert sampling.sample(LOGITS[None].abs(), [Chunk("", (1,), 0, (), True, params, prompt_ids=pack((2,)))]) == [2]


def test_random_numbers_are_spread_evenly_and_below_1() -> None:
    numbers = [uniform(9, position) for position in range(NUM_DRAWS)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == NUM_DRAWS
    assert chi_square([int(number * 5) for number in numbers], [0.2] * 5) < 23.5
