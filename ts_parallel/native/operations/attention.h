/* Attention over paged key and value memory, without a copy of it.
 *
 * A chunk is N new tokens of one sequence, whose length with them is L. H query heads share KV key/value heads, G each;
 * D and E numbers a head in keys and values. Softmax online over tiles of keys (Milakov and Gimelshein 2018; Dao et al.
 * 2022), in float32; the weights of the values are rounded to 16 bits.
 *
 * Memory is read as it is multiplied, and a head's part of a block lies together: of a block's tokens, so many as a
 * vector has lanes are a run, `keys[block][KV][run][D / 2][lane][2]` and `values[block][KV][run][lane / 2][E][2]`.
 */
#ifndef TS_PARALLEL_ATTENTION_H
#define TS_PARALLEL_ATTENTION_H

#include <stdlib.h>

#include "operations/elementwise.h"
#include "operations/linear.h"

#define MOST_LANES 16
#define RUNS 4 /* of a tile */
#define TILE (RUNS * MOST_LANES)
#define LOWEST -1e30f

struct site {
    int64_t num_heads, num_kv_heads, head_dim, value_dim;
    int64_t window; /* 0: all earlier tokens are seen */
    float scaling, softcap; /* softcap 0: none */
    const bits16 *sinks;      /* [H] or NULL */
    bits16 *keys, *values;
};

struct chunk {
    int64_t first_row; /* of its tokens among the step's */
    int64_t num_tokens;
    int64_t start; /* how many tokens were there before */
    int64_t first_block; /* where its blocks begin among the step's */
};

struct step {
    int64_t block_size, num_chunks, num_tokens;
    int64_t num_lanes; /* of a run: a power of two that divides the size of a block */
    const int64_t *blocks;
    const int64_t *slots; /* [T], where each token's key and value are written */
    struct chunk chunks[];
};

/* Numbers of a head lie together; strides count numbers. */
struct heads {
    bits16 *data;
    int64_t head_stride, token_stride;
};

struct attention_call {
    const struct site *site;
    const struct step *step;
    struct heads query, key, value, output;
    const bits16 *cosine, *sine; /* [T, D], by which queries and keys are to be turned, or NULL */
    bits16 *turned;              /* [T, H, D], room for the turned queries */
    const struct query_tile *tiles;
    int64_t num_tasks, num_threads;
    _Atomic int *lacks_memory; /* set by a task that has none */
};

struct query_tile {
    int64_t chunk, first, count; /* some of a chunk's tokens */
};

/* How many tokens of a block are a run. It must be even, for two values lie together. */
static inline int64_t lanes_of(int64_t block_size)
{
    int64_t num_lanes = MOST_LANES;
    while (block_size % num_lanes)
        num_lanes /= 2;
    return num_lanes;
}

static inline int64_t slot_of(const struct step *step, const struct chunk *chunk, int64_t position)
{
    return step->blocks[chunk->first_block + position / step->block_size] * step->block_size +
           position % step->block_size;
}

/* How many tokens of heads lie before a block's token number `offset`, with which a run begins. */
static inline int64_t place_of_run(const struct attention_call *call, int64_t block, int64_t kv_head, int64_t offset)
{
    return (block * call->site->num_kv_heads + kv_head) * call->step->block_size + offset;
}

/* The new keys and values go where the step says, turned like the queries if need be. Others may write their neighbours
 * meanwhile, so nothing but their own numbers is. */
static void write_task(const void *argument, int64_t index)
{
    const struct attention_call *call = argument;
    const struct site *site = call->site;
    int64_t begin = index * ROWS_A_TASK, end = begin + ROWS_A_TASK, dim = site->head_dim;
    int64_t size = call->step->block_size, num_lanes = call->step->num_lanes;
    uint32_t turned[dim / 2];
    if (end > call->step->num_tokens)
        end = call->step->num_tokens;
    for (int64_t row = begin; row < end; row++) {
        const bits16 *cosine = call->cosine + row * dim, *sine = call->sine + row * dim;
        int64_t slot = call->step->slots[row], offset = slot % size, lane = offset % num_lanes;
        for (int64_t head = 0; head < site->num_kv_heads; head++) {
            int64_t run = place_of_run(call, slot / size, head, offset - lane);
            bits16 *key = site->keys + run * dim + 2 * lane;
            bits16 *value = site->values + (run + lane / 2 * 2) * site->value_dim + lane % 2;
            const bits16 *new_key = call->key.data + row * call->key.token_stride + head * call->key.head_stride;
            const bits16 *new_value = call->value.data + row * call->value.token_stride + head * call->value.head_stride;
            if (call->cosine)
                turn(new_key, cosine, sine, dim, (bits16 *)turned);
            else
                memcpy(turned, new_key, sizeof turned);
            for (int64_t pair = 0; pair < dim / 2; pair++)
                memcpy(key + pair * 2 * num_lanes, turned + pair, sizeof *turned);
            for (int64_t at = 0; at < site->value_dim; at++)
                value[2 * at] = new_value[at];
        }
        for (int64_t head = 0; call->cosine && head < site->num_heads; head++)
            turn(call->query.data + row * call->query.token_stride + head * call->query.head_stride, cosine, sine, dim,
                 call->turned + (row * site->num_heads + head) * dim);
    }
}

/* Some keys and values of one sequence. */
struct tile {
    int64_t first, count;
    const bits16 *keys[RUNS], *values[RUNS]; /* what lies behind `count` is of any other run */
};

static inline int64_t keys_of_tile(const struct attention_call *call)
{
    return RUNS * call->step->num_lanes;
}

/* Those at positions from `first` on, which begins a tile, and below `end`. */
static inline struct tile find_tile(const struct attention_call *call, const struct chunk *chunk, int64_t kv_head,
                                    int64_t first, int64_t end)
{
    const struct site *site = call->site;
    int64_t num_lanes = call->step->num_lanes, most = keys_of_tile(call), size = call->step->block_size;
    const int64_t *block = call->step->blocks + chunk->first_block + first / size;
    struct tile tile = {first, end - first < most ? end - first : most, {NULL}, {NULL}};
    for (int64_t i = 0, offset = first % size, run = 0; i < RUNS; i++, offset += num_lanes) {
        if (i * num_lanes < tile.count) {
            if (offset == size)
                block++, offset = 0;
            run = place_of_run(call, *block, kv_head, offset);
        }
        tile.keys[i] = site->keys + run * site->head_dim;
        tile.values[i] = site->values + run * site->value_dim;
    }
    return tile;
}

INLINE floats score_of(const struct site *site, floats product)
{
    floats score = times(product, all(site->scaling));
    if (site->softcap == 0)
        return score;
    floats twice = times(score, all(2 / site->softcap));
    floats tanh = subtract(all(1.0f), over(all(2.0f), add(all(1.0f), exp16(twice))));
    return times(all(site->softcap), tanh);
}

/* Softmax so far: the greatest score, and the sum of all weights relative to it. A sink is a score without a value. */
struct softmax {
    float greatest, sum;
};

INLINE struct softmax begin_softmax(const struct site *site, int64_t head)
{
    struct softmax begun = {LOWEST, 0};
    if (site->sinks)
        begun = (struct softmax){number_of(site->sinks[head]), 1};
    return begun;
}

/* Scores of a tile to weights rounded to 16 bits; returns by what the values summed so far must be multiplied. */
INLINE float weigh_tile(struct softmax *softmax, const floats scores[RUNS], const lanes seen[RUNS],
                        number weights[TILE])
{
    floats greatest = all(softmax->greatest);
    for (int i = 0; i < RUNS; i++)
        greatest = where(seen[i], greater(greatest, scores[i]), greatest);
    float top = greatest_of(greatest);
    floats sum = all(0), tops = all(top);
    for (int i = 0; i < RUNS; i++) {
        floats weight = where(seen[i], exp16(subtract(scores[i], tops)), all(0));
        sum = add(sum, weight);
        store_numbers(weights + MOST_LANES * i, weight);
    }
    float shrink[16];
    store_floats(shrink, exp16(all(softmax->greatest - top)));
    softmax->greatest = top;
    softmax->sum = softmax->sum * *shrink + sum_of(sum);
    return *shrink;
}

/* Which of a tile's positions, from `first` on, lie in `[low, high)`. */
INLINE void positions_seen(int64_t first, int64_t num_lanes, int64_t low, int64_t high, lanes seen[RUNS])
{
    uint64_t bits = ~0ULL;
    if (low > first)
        bits = low - first >= TILE ? 0 : bits << (low - first);
    if (high < first + TILE)
        bits = high <= first ? 0 : bits & (~0ULL >> (first + TILE - high));
    for (int i = 0; i < RUNS; i++)
        seen[i] = (lanes)(bits >> (num_lanes * i)) & first16(num_lanes);
}

static inline int64_t first_seen(const struct site *site, int64_t position)
{
    int64_t first = site->window ? position - site->window + 1 : 0;
    return first > 0 ? first : 0;
}

/* Products of some queries, `stride` apart, with `parts` runs of the tile's keys. The `next` tile's come into the cache
 * meanwhile, for they lie too far apart for the processor to foresee them. */
INLINE void multiply_runs(const int rows, const int part, const int parts, const number *query, int64_t stride,
                          const struct tile *tile, const struct tile *next, int64_t num_lanes, int64_t num_pairs,
                          floats products[][RUNS])
{
    const lanes mask = first16(num_lanes);
    floats sum[MOST_ROWS][RUNS];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            sum[row][i] = all(0);
    for (int64_t pair = 0; pair < num_pairs; pair++) {
        operand key[RUNS];
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            key[i] = load_some(tile->keys[part + i] + pair * 2 * num_lanes, mask);
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            __builtin_prefetch(next->keys[part + i] + pair * 2 * num_lanes, 0, 2);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            both pairs = pair_of(query + row * stride + 2 * pair);
#pragma GCC unroll 4
            for (int i = 0; i < parts; i++)
                sum[row][i] = dot(sum[row][i], key[i], pairs);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            products[row][part + i] = sum[row][i];
}

/* Adds two values, weighed, to `parts` times 16 sums of some queries; or the first alone. */
INLINE void add_two(const int rows, const int parts, const bits16 *from, const lanes columns[4], const int is_alone,
                    const number *weights, floats sum[][4])
{
    operand value[4];
#pragma GCC unroll 4
    for (int i = 0; i < parts; i++) {
        operand two = load_some(from + 32 * i, columns[i]);
        value[i] = is_alone ? first_alone(two) : two;
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        both weight = pair_of(weights + row * TILE);
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            sum[row][i] = dot(sum[row][i], value[i], weight);
    }
}

/* Adds the tile's values, weighed, to `parts` times 16 sums of some queries, which are multiplied by `shrink` before.
 * Beside a last value without another lies one that is somebody else's, and may be infinite. */
INLINE void add_values(const int rows, const int parts, const number *weights, const float *shrink,
                       const struct tile *tile, const struct tile *next, int64_t num_lanes, int64_t value_dim,
                       int64_t column, float *sums, int64_t width)
{
    floats sum[MOST_ROWS][4];
    lanes columns[4];
    for (int i = 0; i < parts; i++)
        columns[i] = value_dim - column > 16 * i ? first16(value_dim - column - 16 * i) : 0;
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            sum[row][i] = times(load_floats(sums + row * width + 16 * i), all(shrink[row]));
    for (int64_t run = 0, left = tile->count; left > 0; run++, left -= num_lanes) {
        const bits16 *from = tile->values[run] + 2 * column, *ahead = next->values[run] + 2 * column;
        const number *weight = weights + MOST_LANES * run;
        int64_t lane = 0, own = left < num_lanes ? left : num_lanes;
        for (; lane + 1 < own; lane += 2) {
#pragma GCC unroll 4
            for (int i = 0; i < parts; i++)
                __builtin_prefetch(ahead + lane * value_dim + 32 * i, 0, 2);
            add_two(rows, parts, from + lane * value_dim, columns, 0, weight + lane, sum);
        }
        if (lane < own)
            add_two(rows, parts, from + lane * value_dim, columns, 1, weight + lane, sum);
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            store_floats(sums + row * width + 16 * i, sum[row][i]);
}

/* Queries of one key/value head that are multiplied together: heads of one token, or tokens of one head. */
struct queries {
    const number *data;
    int64_t stride, position; /* of the first one */
    int64_t tokens_a_row;     /* 0 or 1 */
    struct softmax *softmax;
    float *sums; /* [rows, width] */
    int64_t width;
};

INLINE void attend_rows(const int rows, const struct attention_call *call, const struct queries *queries,
                        const struct tile *tile, const struct tile *next)
{
    const struct site *site = call->site;
    const int parts = PARTS_AT_ONCE(rows);
    int64_t num_lanes = call->step->num_lanes;
    floats scores[MOST_ROWS][RUNS];
    number weights[MOST_ROWS][TILE];
    float shrink[MOST_ROWS];
#pragma GCC unroll 4
    for (int part = 0; part < RUNS; part += parts)
        multiply_runs(rows, part, parts, queries->data, queries->stride, tile, next, num_lanes, site->head_dim / 2,
                      scores);
    for (int row = 0; row < rows; row++) {
        int64_t position = queries->position + row * queries->tokens_a_row;
        lanes seen[RUNS];
        positions_seen(tile->first, num_lanes, first_seen(site, position), position + 1, seen);
        for (int i = 0; i < RUNS; i++)
            scores[row][i] = score_of(site, scores[row][i]);
        shrink[row] = weigh_tile(&queries->softmax[row], scores[row], seen, weights[row]);
    }
    for (int64_t column = 0; column < site->value_dim; column += 16 * parts)
        add_values(rows, parts, weights[0], shrink, tile, next, num_lanes, site->value_dim, column,
                   queries->sums + column, queries->width);
}

static void attend_tile(int64_t rows, const struct attention_call *call, const struct queries *queries,
                                    const struct tile *tile, const struct tile *next)
{
    switch (rows) {
    case 1: attend_rows(1, call, queries, tile, next); break;
    case 2: attend_rows(2, call, queries, tile, next); break;
    case 3: attend_rows(3, call, queries, tile, next); break;
#if MOST_ROWS > 4
    case 4: attend_rows(4, call, queries, tile, next); break;
    case 5: attend_rows(5, call, queries, tile, next); break;
#endif
    default: attend_rows(MOST_ROWS, call, queries, tile, next); break;
    }
}

static inline int64_t first_tile(const struct attention_call *call, int64_t position)
{
    return first_seen(call->site, position) / keys_of_tile(call) * keys_of_tile(call);
}

/* What task `index` reads first. */
static inline struct tile find_first_tile(const struct attention_call *call, int64_t index)
{
    const struct query_tile *own = &call->tiles[index / call->site->num_kv_heads];
    const struct chunk *chunk = &call->step->chunks[own->chunk];
    int64_t begin = chunk->start + own->first;
    return find_tile(call, chunk, index % call->site->num_kv_heads, first_tile(call, begin), begin + own->count);
}

static inline size_t bytes_of_query(const struct site *site)
{
    return sizeof(number) == sizeof(bits16) ? 0 : (size_t)(site->head_dim + 15) * sizeof(number);
}

/* The queries `[tokens, heads]` as the processor multiplies them, in `room` `[heads, tokens]` if they are not so yet. */
static inline const number *convert_queries(const struct heads *query, int64_t head_dim, int64_t num_tokens,
                                            int64_t num_heads, number *room)
{
    if (sizeof(number) == sizeof(bits16))
        return (const number *)query->data;
    number *to = room;
    for (int64_t head = 0; head < num_heads; head++)
        for (int64_t token = 0; token < num_tokens; token++, to += head_dim)
            for (int64_t at = 0; at < head_dim; at += 16) /* what is behind the last is overwritten or not read */
                store_numbers(to + at, load16(query->data + head * query->head_stride + token * query->token_stride + at,
                                              first16(head_dim - at)));
    return room;
}

/* Some new tokens of one sequence, for the query heads of one key/value head. */
static void attention_task(const void *argument, int64_t index)
{
    const struct attention_call *call = argument;
    const struct site *site = call->site;
    const struct query_tile *own = &call->tiles[index / site->num_kv_heads];
    const struct chunk *chunk = &call->step->chunks[own->chunk];
    int64_t kv_head = index % site->num_kv_heads, group = site->num_heads / site->num_kv_heads;
    int64_t num_rows = group * own->count, width = (site->value_dim + 63) / 64 * 64;
    int64_t begin = chunk->start + own->first, end = begin + own->count;
    /* Rows are the tokens of one head after the other; of a single token its heads, which may go together. */
    int64_t num_series = own->count > 1 ? group : 1, series = num_rows / num_series;
    size_t sums_size = (size_t)(num_rows * width) * sizeof(float);
    size_t softmax_size = (size_t)num_rows * sizeof(struct softmax);
    size_t size = sums_size + softmax_size + (size_t)num_rows * bytes_of_query(site);
    char *memory = scratch_of(size, 0);
    if (!memory) {
        atomic_store_explicit(call->lacks_memory, 1, memory_order_relaxed);
        return;
    }
    float *sums = (float *)memory;
    struct softmax *softmax = (struct softmax *)(memory + sums_size);
    struct heads query = call->query;
    query.data += (chunk->first_row + own->first) * query.token_stride + kv_head * group * query.head_stride;
    int64_t stride = own->count > 1 ? query.token_stride : query.head_stride, series_stride = query.head_stride;
    const number *rows_of_queries = convert_queries(&query, site->head_dim, own->count, group,
                                                    (number *)(memory + sums_size + softmax_size));
    if (sizeof(number) != sizeof(bits16)) {
        stride = site->head_dim;
        series_stride = series * stride;
    }
    memset(sums, 0, sums_size);
    for (int64_t row = 0; row < num_rows; row++)
        softmax[row] = begin_softmax(site, kv_head * group + row / own->count);
    struct tile tile = find_first_tile(call, index), next;
    for (int64_t first = tile.first, later; first < end; first = later, tile = next) {
        later = first + keys_of_tile(call);
        if (later < end)
            next = find_tile(call, chunk, kv_head, later, end);
        else if (index + call->num_threads < call->num_tasks)
            next = find_first_tile(call, index + call->num_threads);
        else
            next = tile;
        for (int64_t part = 0; part < num_series; part++)
            for (int64_t row = 0, rows; row < series; row += rows) {
                struct queries queries = {rows_of_queries + part * series_stride + row * stride, stride, begin, 0,
                                          softmax + part * series + row, sums + (part * series + row) * width, width};
                rows = rows_of_block(series - row, MOST_ROWS);
                if (own->count > 1) {
                    queries.position += row;
                    queries.tokens_a_row = 1;
                    if (tile.first >= queries.position + rows)
                        continue; /* all of these keys lie ahead */
                }
                attend_tile(rows, call, &queries, &tile, &next);
            }
    }
    for (int64_t row = 0; row < num_rows; row++) {
        bits16 *output = call->output.data +
                       (chunk->first_row + own->first + row % own->count) * call->output.token_stride +
                       (kv_head * group + row / own->count) * call->output.head_stride;
        for (int64_t at = 0; at < site->value_dim; at += 16)
            store16(output + at, first16(site->value_dim - at),
                    over(load_floats(sums + row * width + at), all(softmax[row].sum)));
    }
}

/* Returns 0 where there is no memory. */
static inline int attention_run(struct attention_call *call, int num_threads)
{
    const struct step *step = call->step;
    const struct site *site = call->site;
    _Atomic int lacks_memory = 0;
    int64_t tokens = 192 / (site->num_heads / site->num_kv_heads) / MOST_ROWS * MOST_ROWS, num_tiles = 0;
    if (tokens < MOST_ROWS)
        tokens = MOST_ROWS;
    for (int64_t i = 0; i < step->num_chunks; i++)
        num_tiles += (step->chunks[i].num_tokens + tokens - 1) / tokens;
    struct query_tile *tiles = malloc((size_t)num_tiles * sizeof *tiles);
    bits16 *turned = call->cosine
                       ? malloc((size_t)(step->num_tokens * site->num_heads * site->head_dim) * sizeof *turned)
                       : NULL;
    if (!tiles || (call->cosine && !turned)) {
        free(tiles);
        free(turned);
        return 0;
    }
    int64_t number = 0;
    for (int64_t i = 0; i < step->num_chunks; i++)
        for (int64_t first = 0, left; (left = step->chunks[i].num_tokens - first) > 0; first += tokens)
            tiles[number++] = (struct query_tile){i, first, left < tokens ? left : tokens};
    call->tiles = tiles;
    call->turned = turned;
    pool_run(write_task, call, (step->num_tokens + ROWS_A_TASK - 1) / ROWS_A_TASK, num_threads);
    if (turned)
        call->query = (struct heads){turned, site->head_dim, site->num_heads * site->head_dim};
    call->num_tasks = num_tiles * site->num_kv_heads;
    call->num_threads = num_threads;
    call->lacks_memory = &lacks_memory;
    pool_run(attention_task, call, call->num_tasks, num_threads);
    free(tiles);
    free(turned);
    return !atomic_load_explicit(&lacks_memory, memory_order_relaxed);
}
#endif
