"""What lies around attention in the CUDA backend, run by Triton's interpreter, gives torch's numbers."""

from __future__ import annotations

import pytest
import torch

from ts_parallel.partition.program import GatedLinear, LinearLayer, LinearLayers, RmsNorm
from ts_parallel.runtime.backends.torch.backend import TorchBackend

pytest.importorskip("triton", reason="Triton is not installed")

from ts_parallel.runtime.backends.cuda.backend import CudaBackend
from ts_parallel.runtime.backends.cuda.norms import make_add_norm


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("is_offset", [False, True])
def test_norm_of_rows_and_of_heads_side_by_side_is_torchs(is_offset: bool, dtype: torch.dtype) -> None:
    weight, entry = random(20, dtype=dtype), RmsNorm("norm", 1e-6, is_offset)
    norm, plain = (kind().make_norm(entry, weight) for kind in (CudaBackend, TorchBackend))
    product = random(1, 5, 100, dtype=dtype)
    heads = product[..., :60].view(1, 5, 3, 20)  # as queries lie among keys and values
    inputs = (random(1, 5, 20, dtype=dtype), heads, heads.transpose(1, 2), random(0, 20, dtype=dtype))
    error = 1e-6 if dtype == torch.float32 else 2e-3
    for hidden in inputs:
        found = norm(hidden)
        assert found.shape == hidden.shape
        torch.testing.assert_close(found, plain(hidden), rtol=error, atol=error)


def test_norm_of_numbers_that_lie_apart_or_are_of_another_dtype_is_torchs_own() -> None:
    entry, weight = RmsNorm("norm", 1e-6, is_offset=False), random(8)
    norm, plain = (kind().make_norm(entry, weight) for kind in (CudaBackend, TorchBackend))
    for hidden in (random(8, 3).T, random(3, 8, dtype=torch.float16), random(8, 3, 2, 2).permute(1, 3, 2, 0)):
        assert torch.equal(norm(hidden), plain(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sum_is_rounded_before_its_norm_and_given_on(dtype: torch.dtype) -> None:
    entry, weight = RmsNorm("norm", 1e-6, is_offset=False), random(12, dtype=dtype)
    hidden, added = random(1, 4, 12, dtype=dtype), random(1, 4, 12, seed=1, dtype=dtype)
    total, normed = make_add_norm(entry, weight)(hidden, added)
    assert torch.equal(total, hidden + added)
    expected = TorchBackend().make_norm(entry, weight)(hidden + added)
    error = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(normed, expected, rtol=error, atol=error)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gated_linear_in_one_product_is_torchs(activation: str, has_bias: bool) -> None:
    tensors = {"gate": random(1100, 6), "up": random(1100, 6, seed=1), "bias": random(1100, seed=2)}
    bias = "bias" if has_bias else None
    entry = GatedLinear(LinearLayer("gate", bias), LinearLayer("up", None), activation)
    expected = TorchBackend().make_linears(entry, dict(tensors))
    hidden = 3 * random(1, 3, 6, seed=3)
    wanted = expected(hidden)
    found = CudaBackend().make_linears(entry, tensors)(hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_linears_of_one_input_are_one_product_over_the_memory_that_their_weights_had() -> None:
    tensors = {"q": random(6, 4), "k": random(3, 4, seed=1), "v": random(3, 4, seed=2), "b": random(3, seed=3)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    entry = LinearLayers((LinearLayer("q", None), LinearLayer("k", "b"), LinearLayer("v", None)))
    linears, hidden = CudaBackend().make_linears(entry, tensors), random(1, 5, 4, seed=4)
    wanted = TorchBackend().make_linears(entry, before)(hidden)
    for found, own in zip(linears(hidden), wanted, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensors[name], before[name]) for name in before)
    assert len({tensors[name].untyped_storage().data_ptr() for name in "qkv"}) == 1


def test_weights_of_two_dtypes_or_twice_the_same_stay_by_themselves() -> None:
    for tensors in (
        {"q": random(6, 4), "k": random(3, 4, dtype=torch.float64)},
        {"q": (shared := random(6, 4)), "k": shared},
    ):
        layers = (LinearLayer("q", None), LinearLayer("q" if tensors["q"] is tensors["k"] else "k", None))
        linears = CudaBackend().make_linears(LinearLayers(layers), tensors)
        if tensors["q"] is tensors["k"]:
            assert [part.shape for part in linears(random(2, 4))] == [(2, 6)] * 2
        assert tensors["q"].untyped_storage().nbytes() == 6 * 4 * 4
