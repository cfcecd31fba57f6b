"""Triton kernels of what lies between a layer's products: norms with the addition before them, gated activations.

Each number is rounded where the model's own operations round it. K is a row's width, WIDTH the next power of two.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    hidden,
    added,
    weight,  # [K]
    total,  # of hidden and added, in rows without gaps, as is `output`
    output,
    hidden_outer,  # strides of `num_inner` rows, and of a row
    hidden_inner,
    added_row,
    num_inner,
    epsilon,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ADDS: tl.constexpr,
    IS_OFFSET: tl.constexpr,
):
    """A program has one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    is_own = at < K
    source = hidden + row // num_inner * hidden_outer + row % num_inner * hidden_inner
    own = tl.load(source + at, mask=is_own, other=0.0)
    if ADDS:
        more = tl.load(added + row * added_row + at, mask=is_own, other=0.0)
        own = (own.to(tl.float32) + more.to(tl.float32)).to(own.dtype)
        tl.store(total + row * K + at, own, mask=is_own)
    exact = own.to(tl.float32)
    scaled = exact * tl.rsqrt(tl.sum(exact * exact, 0) / K + epsilon)
    scale = tl.load(weight + at, mask=is_own, other=0.0).to(tl.float32)
    if IS_OFFSET:
        found = scaled * (1.0 + scale)
    else:
        found = scale * scaled.to(own.dtype).to(tl.float32)
    tl.store(output + row * K + at, found.to(own.dtype), mask=is_own)


@triton.jit
def _logistic(x):
    """1 / (1 + exp(-x)), without a power that overflows."""
    power = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, power, 1.0) / (1.0 + power)


@triton.jit
def gate(
    both,  # [T, 2 K], the gate's part first
    output,  # [T, K]
    both_row,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """A program has `WIDTH` numbers of one row: the activation of the gate's, times the other's."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_own = at < K
    own = tl.load(both + row * both_row + at, mask=is_own, other=0.0)
    other = tl.load(both + row * both_row + K + at, mask=is_own, other=0.0).to(tl.float32)
    x = own.to(tl.float32)
    if ACTIVATION == "silu":
        active = x * _logistic(x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(y)) / 2 is the logistic function of 2 y, which is exact far below zero too.
        active = x * _logistic(2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x))
    else:
        active = tl.where(x < 0.0, 0.0, x)  # which keeps NaN
    tl.store(output + row * K + at, (active.to(own.dtype).to(tl.float32) * other).to(own.dtype), mask=is_own)
