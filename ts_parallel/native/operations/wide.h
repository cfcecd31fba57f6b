/* Products of a panel whose numbers are made float32 once, for many tokens where a vector has eight numbers.
 *
 * Sixteen registers hold the sums of six tokens for 16 outputs, that many weights and an input. So each number of a
 * panel would be made float32 again for every six tokens, by the ports that multiply. It is made once for all of them
 * instead, in pieces that stay in the first two caches beside the sums: [4 vectors of outputs, inputs of a piece, 16].
 * Included by linear.h where the instructions define WIDE_ROWS.
 */
#ifndef TS_PARALLEL_WIDE_H
#define TS_PARALLEL_WIDE_H

#include "numbers/numbers.h"

#define PAIRS_OF_A_PIECE 128

/* One of the weights that a task multiplies. */
struct wide_factor {
    struct decoder decoder;
    float *piece;      /* [4, 2 * pairs, 16] */
    floats (*sums)[4]; /* [tokens] */
};

/* A piece goes on behind what ended at `first`, and ends where a group of inputs does if they have scales. */
static inline int64_t pairs_of_piece(const struct panel *panel, int64_t first)
{
    int64_t left = panel->num_pairs - first, most = PAIRS_OF_A_PIECE;
    if (panel->scales)
        most = panel->pairs_a_group < most ? most / panel->pairs_a_group * panel->pairs_a_group : panel->pairs_a_group;
    return left < most ? left : most;
}

INLINE void widen_kind(const enum number_kind kind, const struct panel *panel, int64_t first, int64_t num_pairs,
                       struct wide_factor *factor)
{
    const uint8_t *from = panel->numbers + first * bytes_of_pair(kind);
    for (int64_t pair = 0; pair < num_pairs; pair++, from += bytes_of_pair(kind)) {
        operand weight[4];
        load_pair(kind, from, first + pair, 0, 4, &factor->decoder, weight);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            float *to = factor->piece + 32 * (part * num_pairs + pair);
            store_floats(to, weight[part].first);
            store_floats(to + 16, weight[part].second);
        }
    }
}

static void widen(const struct panel *panel, int64_t first, int64_t num_pairs, struct wide_factor *factor)
{
    switch (panel->kind) {
    case PLAIN: widen_kind(PLAIN, panel, first, num_pairs, factor); break;
#ifndef IN_FLOAT16
    case CODED: widen_kind(CODED, panel, first, num_pairs, factor); break;
#endif
    case INT8: widen_kind(INT8, panel, first, num_pairs, factor); break;
    default: widen_kind(INT4, panel, first, num_pairs, factor); break;
    }
}

/* What `rows` tokens add to their sums for 16 outputs, whose weights are `column` [2 * pairs, 16]. */
INLINE void multiply_rows(const int rows, const float *input, int64_t stride, const float *column, int64_t num_pairs,
                          const uint8_t *ahead, int64_t bytes_ahead, floats sums[][4])
{
    floats sum[WIDE_ROWS];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
        sum[row] = sums[row][0];
#pragma GCC unroll 2
    for (int64_t pair = 0; pair < num_pairs; pair++) {
        __builtin_prefetch(ahead + pair * bytes_ahead, 0, 2);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            floats weight = load_floats(column + 32 * pair + 16 * i);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++)
                sum[row] = one_times_plus(one_of(input + row * stride + 2 * pair + i), weight, sum[row]);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
        sums[row][0] = sum[row];
}

static void multiply_column(int rows, const float *input, int64_t stride, const float *column, int64_t num_pairs,
                            const uint8_t *ahead, int64_t bytes_ahead, floats sums[][4])
{
    switch (rows) {
    case 1: multiply_rows(1, input, stride, column, num_pairs, ahead, bytes_ahead, sums); break;
    case 2: multiply_rows(2, input, stride, column, num_pairs, ahead, bytes_ahead, sums); break;
    case 3: multiply_rows(3, input, stride, column, num_pairs, ahead, bytes_ahead, sums); break;
    case 4: multiply_rows(4, input, stride, column, num_pairs, ahead, bytes_ahead, sums); break;
    case 5: multiply_rows(5, input, stride, column, num_pairs, ahead, bytes_ahead, sums); break;
    default: multiply_rows(6, input, stride, column, num_pairs, ahead, bytes_ahead, sums); break;
    }
}

/* A block of tokens times a piece for 16 outputs; of integers, group by group, each sum times its scale. */
static void multiply_scaled(int rows, const float *input, int64_t stride, const struct panel *panel, int part,
                            int64_t first, int64_t num_pairs, const float *column, floats sums[][4])
{
    for (int64_t at = 0, count; at < num_pairs; at += count) {
        floats own[WIDE_ROWS][4];
        int64_t group = (first + at) / panel->pairs_a_group;
        floats scale = load16(panel->scales + group * PANEL + 16 * part, 0xffff);
        count = num_pairs - at < panel->pairs_a_group ? num_pairs - at : panel->pairs_a_group;
        for (int row = 0; row < rows; row++)
            own[row][0] = all(0);
        multiply_column(rows, input + 2 * at, stride, column + 32 * at, count, panel->numbers, 0, own);
        for (int row = 0; row < rows; row++)
            sums[row][0] = first + at ? times_plus(own[row][0], scale, sums[row][0]) : times(own[row][0], scale);
    }
}

/* All tokens of a task times the piece, while what lies behind it comes into the cache. */
static void multiply_piece(const struct panel *panel, const struct wide_factor *factor, int64_t first,
                           int64_t num_pairs, const float *input, int64_t stride, int64_t num_tokens)
{
    const int64_t size = bytes_of_pair(panel->kind), num_blocks = (num_tokens + WIDE_ROWS - 1) / WIDE_ROWS;
    const uint8_t *ahead = panel->numbers + (first + num_pairs) * size;
    const int64_t bytes_ahead = (size + 4 * num_blocks - 1) / (4 * num_blocks);
    for (int part = 0; part < 4; part++)
        for (int64_t token = 0, rows; token < num_tokens; token += rows) {
            const float *own = input + token * stride + 2 * first, *column = factor->piece + 32 * part * num_pairs;
            floats(*sums)[4] = (floats(*)[4]) & factor->sums[token][part];
            rows = rows_of_block(num_tokens - token, WIDE_ROWS);
            if (panel->scales)
                multiply_scaled((int)rows, own, stride, panel, part, first, num_pairs, column, sums);
            else
                multiply_column((int)rows, own, stride, column, num_pairs, ahead, bytes_ahead, sums);
            ahead += num_pairs * bytes_ahead;
        }
}

/* The sums of `num_tokens` tokens for all outputs of one or two panels, `[panels, tokens][4]`; NULL where there is no
 * memory for them. */
static floats (*multiply_wide(const struct panel *panels, int num_panels, const float *input, int64_t stride,
                              int64_t num_tokens))[4]
{
    int64_t num_pairs = panels->num_pairs, most = pairs_of_piece(panels, 0);
    for (int i = 1; i < num_panels; i++)
        most = pairs_of_piece(panels + i, 0) > most ? pairs_of_piece(panels + i, 0) : most;
    float *piece = scratch_of((size_t)(most * 2 * PANEL) * sizeof *piece, 0);
    floats(*sums)[4] = scratch_of((size_t)(num_panels * num_tokens) * sizeof *sums, 1);
    if (!piece || !sums)
        return NULL;
    memset(sums, 0, (size_t)(num_panels * num_tokens) * sizeof *sums);
    for (int i = 0; i < num_panels; i++) {
        struct wide_factor factor = {make_decoder(panels[i].kind, panels[i].head), piece, sums + i * num_tokens};
        for (int64_t first = 0, count; first < num_pairs; first += count) {
            count = pairs_of_piece(panels + i, first);
            widen(panels + i, first, count, &factor);
            multiply_piece(panels + i, &factor, first, count, input, stride, num_tokens);
        }
    }
    return sums;
}
#endif
