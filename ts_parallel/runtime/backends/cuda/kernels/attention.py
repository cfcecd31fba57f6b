"""Triton kernels of paged attention: turn and write, prompts by tiles, single tokens by splits of their keys.

A block of keys lies as `[KV, block_size, D]`, one of values as `[KV, block_size, E]`. A chunk is four int64 numbers:
the first of its tokens among the step's, their count, the position of the first, and where its blocks begin in
`block_ids`.
Softmax is taken over the keys as they come (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867).

M rows of a program (tokens × heads of one key/value head), N keys looked at together; G, D, E as in `paged_attention`.
Names in capitals are known when a kernel is compiled; WIDTH is a head dim up to the next power of two.
"""

# Triton reads annotations as types of its own, so the kernels' arguments have none.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _turned(source, cosine, sine, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The `WIDTH` numbers of a head, turned as `rotary` does it: each product is rounded, then their sum."""
    at = tl.arange(0, WIDTH)
    is_own = at < DIM
    straight = tl.load(source + at, mask=is_own, other=0.0)
    across = tl.load(source + tl.where(at < DIM // 2, at + DIM // 2, at - DIM // 2), mask=is_own, other=0.0)
    across = tl.where(at < DIM // 2, -across.to(tl.float32), across.to(tl.float32))
    first = straight.to(tl.float32) * tl.load(cosine + at, mask=is_own, other=0.0).to(tl.float32)
    second = across * tl.load(sine + at, mask=is_own, other=0.0).to(tl.float32)
    rounded = first.to(straight.dtype).to(tl.float32) + second.to(straight.dtype).to(tl.float32)
    return rounded.to(straight.dtype)


@triton.jit
def turn_and_write(
    query,
    key,
    value,
    cosine,
    sine,
    turned,  # [T, H, D]
    keys,
    values,
    slots,  # [T], negative where nothing is to be written
    query_token,  # strides
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    angle_token,
    num_heads,
    num_kv_heads,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Of one token a program turns a query head, or turns a key head and writes it and its value into their slot."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, WIDTH)
    if head < num_kv_heads:
        slot = tl.load(slots + token)
        if slot >= 0:
            place = (slot // BLOCK_SIZE * num_kv_heads + head) * BLOCK_SIZE + slot % BLOCK_SIZE
            source = key + token * key_token + head * key_head
            if TURNS:
                own = _turned(source, cosine + token * angle_token, sine + token * angle_token, DIM, WIDTH)
            else:
                own = tl.load(source + at, mask=at < DIM, other=0.0)
            tl.store(keys + place * DIM + at, own, mask=at < DIM)
            along = tl.arange(0, VALUE_WIDTH)
            source = value + token * value_token + head * value_head
            tl.store(
                values + place * VALUE_DIM + along,
                tl.load(source + along, mask=along < VALUE_DIM, other=0.0),
                mask=along < VALUE_DIM,
            )
    elif TURNS:
        head -= num_kv_heads
        source = query + token * query_token + head * query_head
        own = _turned(source, cosine + token * angle_token, sine + token * angle_token, DIM, WIDTH)
        tl.store(turned + (token * num_heads + head) * DIM + at, own, mask=at < DIM)


@triton.jit
def _look(
    queries,  # [M, WIDTH]
    sums,  # [M, VALUE_WIDTH], of values by their weights
    greatest,  # [M], of the scores up to now
    total,  # [M], of the weights
    keys,
    values,
    block_ids,  # the chunk's own
    first,
    end,
    positions,  # [M]
    kv_head,
    num_kv_heads,
    scaling,
    softcap,
    NUM_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """The same three after the keys from `first` on, none from `end` on."""
    places = first + tl.arange(0, NUM_KEYS)
    is_key = places < end
    blocks = tl.load(block_ids + places // BLOCK_SIZE, mask=is_key, other=0)
    rows = (blocks * num_kv_heads + kv_head) * BLOCK_SIZE + places % BLOCK_SIZE
    at, along = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    # What is masked here is of others, and may be NaN.
    of_key = tl.load(keys + rows[None, :] * DIM + at[:, None], mask=is_key[None, :] & (at < DIM)[:, None], other=0.0)
    is_own = is_key[:, None] & (along < VALUE_DIM)[None, :]
    of_value = tl.load(values + rows[:, None] * VALUE_DIM + along[None, :], mask=is_own, other=0.0)
    scores = _product(queries, of_key, WIDENS) * scaling
    if HAS_SOFTCAP:
        power = tl.exp(-2.0 * tl.abs(scores / softcap))
        tangent = (1.0 - power) / (1.0 + power)
        scores = softcap * tl.where(scores < 0, -tangent, tangent)
    distance = positions[:, None] - places[None, :]
    is_seen = is_key[None, :] & (distance >= 0)
    if WINDOW > 0:
        is_seen = is_seen & (distance < WINDOW)
    scores = tl.where(is_seen, scores, float("-inf"))
    highest = tl.maximum(greatest, tl.max(scores, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(scores - base[:, None])
    shrink = tl.exp(greatest - base)
    sums = sums * shrink[:, None] + _product(weights.to(of_value.dtype), of_value, WIDENS)
    return sums, highest, total * shrink + tl.sum(weights, 1)


@triton.jit
def _product(first, second, WIDENS: tl.constexpr):
    """Their matrix product in float32; Triton's interpreter has no bfloat16 to multiply, so there it is widened."""
    if WIDENS:
        first, second = first.to(tl.float32), second.to(tl.float32)
    return tl.dot(first, second, input_precision="ieee")


@triton.jit
def _first_key(position, WINDOW: tl.constexpr):
    """The first key that a query at `position` sees."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    return first


@triton.jit
def attend_tiles(
    query,
    output,  # [T, H, E]
    keys,
    values,
    sinks,  # [H]
    chunks,
    tiles,  # two numbers each: the chunk's, and the first of its tokens
    block_ids,
    query_token,
    query_head,
    num_kv_heads,
    scaling,
    softcap,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """A program has `TOKENS` tokens of one chunk, and `HEADS` of the heads that read one key/value head."""
    tile, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk = chunks + 4 * tl.load(tiles + 2 * tile)
    begin = tl.load(tiles + 2 * tile + 1).to(tl.int32)
    row, count = tl.load(chunk), tl.load(chunk + 1).to(tl.int32)
    start, own_blocks = tl.load(chunk + 2).to(tl.int32), block_ids + tl.load(chunk + 3)
    numbers = tl.arange(0, TOKENS * HEADS)
    tokens, in_group = begin + numbers // HEADS, tl.program_id(2) * HEADS + numbers % HEADS
    is_row, heads = (tokens < count) & (in_group < GROUP), kv_head * GROUP + in_group
    at = tl.arange(0, WIDTH)
    places = (row + tokens)[:, None] * query_token + heads[:, None] * query_head + at[None, :]
    queries = tl.load(query + places, mask=is_row[:, None] & (at < DIM)[None, :], other=0.0)
    greatest = tl.full((TOKENS * HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS * HEADS,), tl.float32)
    if HAS_SINKS:
        greatest = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32)
        total += 1.0
    sums = tl.zeros((TOKENS * HEADS, VALUE_WIDTH), tl.float32)
    end = start + tl.minimum(begin + TOKENS, count)
    for first in range(_first_key(start + begin, WINDOW) // NUM_KEYS * NUM_KEYS, end, NUM_KEYS):
        sums, greatest, total = _look(
            queries, sums, greatest, total, keys, values, own_blocks, first, end, start + tokens, kv_head,
            num_kv_heads, scaling, softcap, NUM_KEYS, BLOCK_SIZE, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, WINDOW,
            HAS_SOFTCAP, WIDENS,
        )  # fmt: skip
    along = tl.arange(0, VALUE_WIDTH)
    targets = ((row + tokens) * (num_kv_heads * GROUP) + heads)[:, None] * VALUE_DIM + along[None, :]
    found = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(output + targets, found.to(output.dtype.element_ty), mask=is_row[:, None] & (along < VALUE_DIM)[None, :])


@triton.jit
def attend_splits(
    query,
    sums_of_splits,  # [splits, B, H, E], float32
    weights_of_splits,  # [2, splits, B, H], float32: greatest scores, and sums of weights
    keys,
    values,
    chunks,
    decodes,  # [B], the chunks' numbers
    block_ids,
    query_token,
    query_head,
    num_kv_heads,
    scaling,
    softcap,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """A program has the only token of one chunk, the heads that read one key/value head, and a part of its keys."""
    number, kv_head = tl.program_id(0).to(tl.int64), (tl.program_id(1) % num_kv_heads).to(tl.int64)
    split = tl.program_id(2)
    chunk = chunks + 4 * tl.load(decodes + number)
    row, position = tl.load(chunk), tl.load(chunk + 2).to(tl.int32)  # -1 of a chunk that only fills the step
    own_blocks = block_ids + tl.load(chunk + 3)
    in_group = tl.program_id(1) // num_kv_heads * HEADS + tl.arange(0, HEADS)
    heads, is_row, at = kv_head * GROUP + in_group, in_group < GROUP, tl.arange(0, WIDTH)
    places = row * query_token + heads[:, None] * query_head + at[None, :]
    queries = tl.load(query + places, mask=is_row[:, None] & (at < DIM)[None, :], other=0.0)
    greatest = tl.full((HEADS,), float("-inf"), tl.float32)
    total, sums = tl.zeros((HEADS,), tl.float32), tl.zeros((HEADS, VALUE_WIDTH), tl.float32)
    positions = tl.zeros((HEADS,), tl.int32) + position
    start = _first_key(position, WINDOW) // NUM_KEYS * NUM_KEYS
    of_split = tl.cdiv(tl.cdiv(position + 1 - start, SPLITS), NUM_KEYS) * NUM_KEYS
    begin = start + split * of_split
    end = tl.minimum(begin + of_split, position + 1)
    for first in range(begin, end, NUM_KEYS):
        sums, greatest, total = _look(
            queries, sums, greatest, total, keys, values, own_blocks, first, end, positions, kv_head,
            num_kv_heads, scaling, softcap, NUM_KEYS, BLOCK_SIZE, DIM, WIDTH, VALUE_DIM, VALUE_WIDTH, WINDOW,
            HAS_SOFTCAP, WIDENS,
        )  # fmt: skip
    num_decodes, along = tl.num_programs(0), tl.arange(0, VALUE_WIDTH)
    targets = (split * num_decodes + number) * (num_kv_heads * GROUP) + heads
    tl.store(weights_of_splits + targets, greatest, mask=is_row)
    behind = SPLITS * num_decodes * (num_kv_heads * GROUP)
    tl.store(weights_of_splits + behind + targets, total, mask=is_row)
    is_own = is_row[:, None] & (along < VALUE_DIM)[None, :]
    tl.store(sums_of_splits + targets[:, None] * VALUE_DIM + along[None, :], sums, mask=is_own)


@triton.jit
def join_splits(
    sums_of_splits,
    weights_of_splits,
    output,  # [T, H, E]
    sinks,
    chunks,
    decodes,
    SPLITS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """A program joins what `attend_splits` has left of one head of one token."""
    number, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_decodes, num_heads = tl.num_programs(0), tl.num_programs(1)
    row = tl.load(chunks + 4 * tl.load(decodes + number))
    places = (tl.arange(0, SPLITS) * num_decodes + number) * num_heads + head
    greatest = tl.load(weights_of_splits + places)
    totals = tl.load(weights_of_splits + SPLITS * num_decodes * num_heads + places)
    highest = tl.max(greatest, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        highest = tl.maximum(highest, sink)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    shrink = tl.exp(greatest - base)
    total = tl.sum(totals * shrink, 0)
    if HAS_SINKS:
        total += tl.exp(sink - base)
    along = tl.arange(0, VALUE_WIDTH)
    is_own = (along < VALUE_DIM)[None, :]
    sums = tl.load(sums_of_splits + places[:, None] * VALUE_DIM + along[None, :], mask=is_own, other=0.0)
    found = tl.sum(sums * shrink[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    place = (row * num_heads + head) * VALUE_DIM + along
    tl.store(output + place, found.to(output.dtype.element_ty), mask=along < VALUE_DIM)
