/* Attention over paged key and value memory, without a copy of it.
 *
 * A chunk is N new tokens of one sequence, whose length with them is L. H query heads share KV key/value heads, G each;
 * D and E numbers a head in keys and values. Softmax online over tiles of keys (Milakov and Gimelshein 2018; Dao et al.
 * 2022), in float32; the weights of the values are rounded to bfloat16.
 */
#ifndef TS_PARALLEL_ATTENTION_H
#define TS_PARALLEL_ATTENTION_H

#include <stdlib.h>

#include "elementwise.h"
#include "linear.h"
#include "packing.h"

#define TILE 64 /* keys at a time: as many as a panel is wide */
#define LOWEST -1e30f

struct site {
    int64_t num_heads, num_kv_heads, head_dim, value_dim;
    int64_t window; /* 0: all earlier tokens are seen */
    float scaling, softcap; /* softcap 0: none */
    const bf16 *sinks;      /* [H] or NULL */
    bf16 *keys, *values;    /* [slots, KV, D], [slots, KV, E] */
};

struct chunk {
    int64_t first_row; /* of its tokens among the step's */
    int64_t num_tokens;
    int64_t start; /* how many tokens were there before */
    int64_t first_block; /* where its blocks begin among the step's */
};

struct step {
    int64_t block_size, num_chunks, num_tokens;
    const int64_t *blocks;
    const int64_t *slots; /* [T], where each token's key and value are written */
    struct chunk chunks[];
};

/* Numbers of a head lie together; strides count numbers. */
struct heads {
    bf16 *data;
    int64_t head_stride, token_stride;
};

struct attention_call {
    const struct site *site;
    const struct step *step;
    struct heads query, key, value, output;
    const bf16 *cosine, *sine; /* [T, D], by which queries and keys are to be turned, or NULL */
    bf16 *turned;              /* [T, H, D], room for the turned queries */
    const struct query_tile *tiles;
};

struct query_tile {
    int64_t chunk, first, count; /* some of a chunk's tokens */
};

static inline int64_t slot_of(const struct step *step, const struct chunk *chunk, int64_t position)
{
    return step->blocks[chunk->first_block + position / step->block_size] * step->block_size +
           position % step->block_size;
}

/* The new keys and values go where the step says, turned like the queries if need be. */
AVX512_BF16 static void write_task(const void *argument, int64_t index)
{
    const struct attention_call *call = argument;
    const struct site *site = call->site;
    int64_t begin = index * ROWS_A_TASK, end = begin + ROWS_A_TASK, dim = site->head_dim;
    if (end > call->step->num_tokens)
        end = call->step->num_tokens;
    for (int64_t row = begin; row < end; row++) {
        int64_t slot = call->step->slots[row];
        bf16 *key = site->keys + slot * site->num_kv_heads * dim;
        bf16 *value = site->values + slot * site->num_kv_heads * site->value_dim;
        const bf16 *new_key = call->key.data + row * call->key.token_stride;
        const bf16 *new_value = call->value.data + row * call->value.token_stride;
        const bf16 *cosine = call->cosine + row * dim, *sine = call->sine + row * dim;
        for (int64_t head = 0; head < site->num_kv_heads; head++) {
            if (call->cosine)
                turn(new_key + head * call->key.head_stride, cosine, sine, dim, key + head * dim);
            else
                memcpy(key + head * dim, new_key + head * call->key.head_stride, (size_t)dim * sizeof *key);
            memcpy(value + head * site->value_dim, new_value + head * call->value.head_stride,
                   (size_t)site->value_dim * sizeof *value);
        }
        for (int64_t head = 0; call->cosine && head < site->num_heads; head++)
            turn(call->query.data + row * call->query.token_stride + head * call->query.head_stride, cosine, sine, dim,
                 call->turned + (row * site->num_heads + head) * dim);
    }
}

/* Where the keys and values of `count` tokens from `position` on lie. */
static inline void find_rows(const struct attention_call *call, const struct chunk *chunk, int64_t kv_head,
                             int64_t position, int64_t count, const bf16 *keys[TILE], const bf16 *values[TILE])
{
    const struct site *site = call->site;
    for (int64_t i = 0; i < count; i++) {
        int64_t row = slot_of(call->step, chunk, position + i) * site->num_kv_heads + kv_head;
        keys[i] = site->keys + row * site->head_dim;
        values[i] = site->values + row * site->value_dim;
    }
}

/* Neighbouring lanes of 4 numbers added: those of `a`, then those of `b`. */
INLINE __m512 sum_lanes(__m512 a, __m512 b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* Sums of each of 16 vectors. */
INLINE __m512 sum_each(const __m512 of[16])
{
    __m512 pair[8], quad[4];
    for (int i = 0; i < 8; i++)
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(of[2 * i], of[2 * i + 1]),
                                _mm512_unpackhi_ps(of[2 * i], of[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 low = sum_lanes(quad[0], quad[1]), high = sum_lanes(quad[2], quad[3]);
    return sum_lanes(low, high);
}

/* `both[2e] = a[e]`, `both[2e + 1] = b[e]` of 32 numbers each. */
INLINE void interleave(__m512i a, __m512i b, __m512i *low, __m512i *high)
{
    __m512i first = _mm512_unpacklo_epi16(a, b), second = _mm512_unpackhi_epi16(a, b);
    const __m512i to_low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i to_high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    *low = _mm512_permutex2var_epi64(first, to_low, second);
    *high = _mm512_permutex2var_epi64(first, to_high, second);
}

INLINE __m512 score_of(const struct site *site, __m512 product)
{
    __m512 score = _mm512_mul_ps(product, _mm512_set1_ps(site->scaling));
    if (site->softcap == 0)
        return score;
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 twice = _mm512_mul_ps(score, _mm512_set1_ps(2 / site->softcap));
    __m512 tanh = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(one, exp16(twice))));
    return _mm512_mul_ps(_mm512_set1_ps(site->softcap), tanh);
}

static inline float sink_of(const struct site *site, int64_t head)
{
    uint32_t bits = (uint32_t)site->sinks[head] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Softmax so far: the greatest score, and the sum of all weights relative to it. A sink is a score without a value. */
struct softmax {
    float greatest, sum;
};

INLINE struct softmax begin_softmax(const struct site *site, int64_t head)
{
    struct softmax begun = {LOWEST, 0};
    if (site->sinks)
        begun = (struct softmax){sink_of(site, head), 1};
    return begun;
}

/* Scores of a tile to weights in bfloat16; returns by what the values summed so far must be multiplied. */
INLINE float weigh_tile(struct softmax *softmax, const __m512 scores[4], const __mmask16 seen[4], bf16 weights[TILE])
{
    __m512 greatest = _mm512_set1_ps(softmax->greatest);
    for (int i = 0; i < 4; i++)
        greatest = _mm512_mask_max_ps(greatest, seen[i], greatest, scores[i]);
    float top = _mm512_reduce_max_ps(greatest);
    __m512 sum = _mm512_setzero_ps(), tops = _mm512_set1_ps(top);
    for (int i = 0; i < 4; i++) {
        __m512 weight = _mm512_maskz_mov_ps(seen[i], exp16(_mm512_sub_ps(scores[i], tops)));
        sum = _mm512_add_ps(sum, weight);
        _mm256_storeu_si256((__m256i *)(weights + 16 * i), narrow(weight));
    }
    float shrink = _mm512_cvtss_f32(exp16(_mm512_set1_ps(softmax->greatest - top)));
    softmax->greatest = top;
    softmax->sum = softmax->sum * shrink + _mm512_reduce_add_ps(sum);
    return shrink;
}

/* The tile's keys and values: which of 64 positions from `first` on lie in `[low, high)`. */
INLINE void positions_seen(int64_t first, int64_t low, int64_t high, __mmask16 seen[4])
{
    uint64_t bits = ~0ULL;
    if (low > first)
        bits = low - first >= 64 ? 0 : bits << (low - first);
    if (high < first + TILE)
        bits = high <= first ? 0 : bits & (~0ULL >> (first + TILE - high));
    for (int i = 0; i < 4; i++)
        seen[i] = (__mmask16)(bits >> (16 * i));
}

INLINE int64_t first_seen(const struct site *site, int64_t position)
{
    int64_t first = site->window ? position - site->window + 1 : 0;
    return first > 0 ? first : 0;
}

/* Scores of one query against the tile's keys. */
INLINE void score_tile(const struct site *site, const int vectors, const bf16 *query, const bf16 *const keys[TILE],
                       int64_t count, __m512 scores[4])
{
    for (int part = 0; part < 4 && part * 16 < count; part++) {
        __m512 sums[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            sums[i] = _mm512_setzero_ps();
            const bf16 *key = keys[part * 16 + i];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) {
                __mmask32 mask = first32(site->head_dim - 32 * v);
                sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_maskz_loadu_epi16(mask, query + 32 * v),
                                           (__m512bh)_mm512_maskz_loadu_epi16(mask, key + 32 * v));
            }
        }
        scores[part] = score_of(site, sum_each(sums));
    }
}

/* One new token of one sequence, for the query heads of one key/value head. */
AVX512_BF16 static void attend_one(const struct attention_call *call, const struct chunk *chunk, int64_t kv_head)
{
    const struct site *site = call->site;
    int64_t group = site->num_heads / site->num_kv_heads, position = chunk->start;
    int64_t low = first_seen(site, position), vectors = (site->head_dim + 31) / 32;
    int64_t parts = (site->value_dim + 31) / 32;
    float sums[group][parts * 32];
    struct softmax softmax[group];
    memset(sums, 0, sizeof sums);
    for (int64_t g = 0; g < group; g++)
        softmax[g] = begin_softmax(site, kv_head * group + g);
    for (int64_t first = low / TILE * TILE; first <= position; first += TILE) {
        const bf16 *keys[TILE], *values[TILE];
        int64_t count = position + 1 - first < TILE ? position + 1 - first : TILE;
        find_rows(call, chunk, kv_head, first, count, keys, values);
        for (int64_t i = count; i < TILE; i++)
            keys[i] = keys[0], values[i] = values[0];
        __mmask16 seen[4];
        positions_seen(first, low, position + 1, seen);
        for (int64_t g = 0; g < group; g++) {
            const bf16 *query = call->query.data + chunk->first_row * call->query.token_stride +
                                (kv_head * group + g) * call->query.head_stride;
            __m512 scores[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            switch (vectors) {
            case 2: score_tile(site, 2, query, keys, count, scores); break;
            case 4: score_tile(site, 4, query, keys, count, scores); break;
            default: score_tile(site, (int)vectors, query, keys, count, scores); break;
            }
            bf16 weights[TILE];
            float shrink = weigh_tile(&softmax[g], scores, seen, weights);
            for (int64_t part = 0; part < parts; part++) {
                __mmask32 mask = first32(site->value_dim - 32 * part);
                __m512 above = _mm512_mul_ps(_mm512_loadu_ps(sums[g] + 32 * part), _mm512_set1_ps(shrink));
                __m512 below = _mm512_mul_ps(_mm512_loadu_ps(sums[g] + 32 * part + 16), _mm512_set1_ps(shrink));
                for (int64_t i = 0; i < count; i += 2) {
                    __m512i even, odd;
                    interleave(_mm512_maskz_loadu_epi16(mask, values[i] + 32 * part),
                               _mm512_maskz_loadu_epi16(mask, values[i + 1] + 32 * part), &even, &odd);
                    int32_t both;
                    memcpy(&both, weights + i, sizeof both);
                    __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
                    above = _mm512_dpbf16_ps(above, weight, (__m512bh)even);
                    below = _mm512_dpbf16_ps(below, weight, (__m512bh)odd);
                }
                _mm512_storeu_ps(sums[g] + 32 * part, above);
                _mm512_storeu_ps(sums[g] + 32 * part + 16, below);
            }
        }
    }
    for (int64_t g = 0; g < group; g++) {
        bf16 *output = call->output.data + chunk->first_row * call->output.token_stride +
                       (kv_head * group + g) * call->output.head_stride;
        for (int64_t at = 0; at < site->value_dim; at += 16)
            store16(output + at, first16(site->value_dim - at),
                    _mm512_div_ps(_mm512_loadu_ps(sums[g] + at), _mm512_set1_ps(softmax[g].sum)));
    }
}

/* The panels of a tile's keys (pairs of D, a column for each key) and values (pairs of keys, 64 of E a panel). */
INLINE void pack_tile(const struct site *site, const bf16 *const keys[TILE], const bf16 *const values[TILE],
                      int64_t count, bf16 *key_panel, bf16 *value_panels)
{
    for (int64_t part = 0; part < 4; part++)
        for (int64_t column = 0; column < site->head_dim; column += 32)
            (void)transpose_pairs(keys + part * 16, count - part * 16, column, first32(site->head_dim - column),
                                  key_panel + column * PANEL + part * 32,
                                  site->head_dim - column < 32 ? (site->head_dim - column) / 2 : 16,
                                  _mm512_setzero_si512());
    for (int64_t column = 0; column < site->value_dim; column += 32) {
        bf16 *to = value_panels + column / PANEL * PANEL * TILE + column % PANEL * 2;
        __mmask32 mask = first32(site->value_dim - column);
        for (int64_t i = 0; i < TILE; i += 2) {
            __m512i low, high;
            __m512i a = i < count ? _mm512_maskz_loadu_epi16(mask, values[i] + column) : _mm512_setzero_si512();
            __m512i b = i + 1 < count ? _mm512_maskz_loadu_epi16(mask, values[i + 1] + column) : _mm512_setzero_si512();
            interleave(a, b, &low, &high);
            _mm512_storeu_si512(to + i * PANEL, low);
            _mm512_storeu_si512(to + i * PANEL + 32, high);
        }
    }
}

/* Some new tokens of one sequence, for the query heads of one key/value head. */
AVX512_BF16 static void attend_some(const struct attention_call *call, const struct query_tile *tile, int64_t kv_head)
{
    const struct site *site = call->site;
    const struct chunk *chunk = &call->step->chunks[tile->chunk];
    int64_t group = site->num_heads / site->num_kv_heads, num_rows = group * tile->count;
    int64_t num_panels = (site->value_dim + PANEL - 1) / PANEL, width = num_panels * PANEL;
    int64_t begin = chunk->start + tile->first, end = begin + tile->count;
    size_t key_size = (size_t)(site->head_dim * PANEL) * sizeof(bf16);
    size_t value_size = (size_t)(width * TILE) * sizeof(bf16);
    size_t sums_size = (size_t)(num_rows * width) * sizeof(float);
    size_t size = key_size + value_size + sums_size + (size_t)num_rows * sizeof(struct softmax);
    char *memory = aligned_alloc(64, (size + 63) / 64 * 64);
    if (!memory)
        abort(); /* some 100 KB: whoever lacks them cannot go on anyway */
    bf16 *key_panel = (bf16 *)memory, *value_panels = (bf16 *)(memory + key_size);
    float *sums = (float *)(memory + key_size + value_size);
    struct softmax *softmax = (struct softmax *)(memory + key_size + value_size + sums_size);
    memset(value_panels, 0, value_size);
    memset(sums, 0, sums_size);
    for (int64_t row = 0; row < num_rows; row++)
        softmax[row] = begin_softmax(site, kv_head * group + row / tile->count);
    for (int64_t first = first_seen(site, begin) / TILE * TILE; first < end; first += TILE) {
        const bf16 *keys[TILE], *values[TILE];
        int64_t count = end - first < TILE ? end - first : TILE;
        find_rows(call, chunk, kv_head, first, count, keys, values);
        pack_tile(site, keys, values, count, key_panel, value_panels);
        for (int64_t g = 0; g < group; g++)
            for (int64_t token = 0, rows; token < tile->count; token += rows) {
                rows = rows_of_block(tile->count - token);
                if (first >= begin + token + rows)
                    continue; /* all of these keys lie ahead */
                const bf16 *query = call->query.data +
                                    (chunk->first_row + tile->first + token) * call->query.token_stride +
                                    (kv_head * group + g) * call->query.head_stride;
                __m512 products[MOST_ROWS][4];
                bf16 weights[MOST_ROWS][TILE];
                float shrink[MOST_ROWS];
                multiply_rows((int)rows, query, call->query.token_stride, key_panel, site->head_dim / 2, products);
                for (int64_t row = 0; row < rows; row++) {
                    int64_t position = begin + token + row;
                    __mmask16 seen[4];
                    positions_seen(first, first_seen(site, position), position + 1, seen);
                    for (int i = 0; i < 4; i++)
                        products[row][i] = score_of(site, products[row][i]);
                    struct softmax *own = &softmax[g * tile->count + token + row];
                    shrink[row] = weigh_tile(own, products[row], seen, weights[row]);
                }
                for (int64_t panel = 0; panel < num_panels; panel++) {
                    multiply_rows((int)rows, weights[0], TILE, value_panels + panel * PANEL * TILE, TILE / 2, products);
                    for (int64_t row = 0; row < rows; row++)
                        for (int i = 0; i < 4; i++) {
                            float *sum = sums + (g * tile->count + token + row) * width + panel * PANEL + 16 * i;
                            _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(shrink[row]),
                                                                  products[row][i]));
                        }
                }
            }
    }
    for (int64_t row = 0; row < num_rows; row++) {
        bf16 *output = call->output.data +
                       (chunk->first_row + tile->first + row % tile->count) * call->output.token_stride +
                       (kv_head * group + row / tile->count) * call->output.head_stride;
        for (int64_t at = 0; at < site->value_dim; at += 16)
            store16(output + at, first16(site->value_dim - at),
                    _mm512_div_ps(_mm512_loadu_ps(sums + row * width + at), _mm512_set1_ps(softmax[row].sum)));
    }
    free(memory);
}

AVX512_BF16 static void attention_task(const void *argument, int64_t index)
{
    const struct attention_call *call = argument;
    int64_t kv_head = index % call->site->num_kv_heads, number = index / call->site->num_kv_heads;
    const struct query_tile *tile = &call->tiles[number];
    if (call->step->chunks[tile->chunk].num_tokens == 1)
        attend_one(call, &call->step->chunks[tile->chunk], kv_head);
    else
        attend_some(call, tile, kv_head);
}

/* Returns 0 where there is no memory. */
static inline int attention_run(struct attention_call *call, int num_threads)
{
    const struct step *step = call->step;
    const struct site *site = call->site;
    int64_t tokens = 192 / (site->num_heads / site->num_kv_heads) / MOST_ROWS * MOST_ROWS, num_tiles = 0;
    if (tokens < MOST_ROWS)
        tokens = MOST_ROWS;
    for (int64_t i = 0; i < step->num_chunks; i++)
        num_tiles += (step->chunks[i].num_tokens + tokens - 1) / tokens;
    struct query_tile *tiles = malloc((size_t)num_tiles * sizeof *tiles);
    bf16 *turned = call->cosine
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
    pool_run(attention_task, call, num_tiles * site->num_kv_heads, num_threads);
    free(tiles);
    free(turned);
    return 1;
}
#endif
