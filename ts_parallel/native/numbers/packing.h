/* A weight's rows, as a checkpoint has them, to panels: 64 rows are one, in which pairs of columns follow each other. */
#ifndef TS_PARALLEL_PACKING_H
#define TS_PARALLEL_PACKING_H

#include "numbers/coded.h"

/* Pairs of up to 32 columns of up to 64 rows, `stride` apart: [num_pairs, 64, 2]. */
static inline void transpose_columns(const bits16 *from, int64_t num_rows, int64_t count, int64_t stride, bits16 *to,
                                     int64_t num_pairs)
{
    for (int64_t part = 0; part < 4; part++) {
        const bits16 *rows[16];
        for (int i = 0; i < 16; i++)
            rows[i] = from + (part * 16 + i) * stride;
        transpose_pairs(rows, num_rows - part * 16, count, to + part * 32, 2 * PANEL, num_pairs);
    }
}

/* The bits, without a sign, of the number that is furthest from zero. */
static inline uint32_t largest_bits(const bits16 *from, int64_t num_rows, int64_t num_inputs, int64_t stride)
{
    uint32_t most = 0;
    for (int64_t row = 0; row < num_rows; row++, from += stride) {
        uint32_t own = largest_bits_of_row(from, num_inputs);
        most = own > most ? own : most;
    }
    return most;
}

/* Vectors of 16 pairs as `load_operand` reads them. */
static inline void arrange_pairs(bits16 *vectors, int64_t num_vectors)
{
#ifdef IN_FLOAT16
    for (int64_t i = 0; i < num_vectors; i++, vectors += 32) {
        bits16 pairs[32];
        memcpy(pairs, vectors, sizeof pairs);
        for (int lane = 0; lane < 16; lane++) {
            vectors[lane] = pairs[2 * lane];
            vectors[16 + lane] = pairs[2 * lane + 1];
        }
    }
#else
    (void)vectors, (void)num_vectors;
#endif
}

/* The panels of `num_rows` rows of a weight, which begin with a whole panel. Returns whether a number is NaN. */
static inline int pack_rows(bits16 *to, const bits16 *from, int64_t num_rows, int64_t num_inputs, int64_t stride)
{
    for (int64_t first = 0; first < num_rows; first += PANEL)
        for (int64_t column = 0, count; column < num_inputs; column += count, to += count * PANEL) {
            count = num_inputs - column < 32 ? num_inputs - column : 32;
            transpose_columns(from + first * stride + column, num_rows - first, count, stride, to, count / 2);
            arrange_pairs(to, 4 * (count / 2));
        }
    return largest_bits(from, num_rows, num_inputs, stride) > INFINITE;
}

/* Up to 64 rows to one coded panel. Returns 0 where too many numbers would be exceptions, or NaN is among them. */
static inline int code_panel(uint8_t *to, const bits16 *from, int64_t num_rows, int64_t num_inputs, int64_t stride)
{
    struct coded_panel *panel = (struct coded_panel *)to;
    uint8_t *pair_to = to + bytes_of_head(num_inputs / 2);
    uint32_t *next = panel->exceptions, *last = (uint32_t *)pair_to - 1, pair_number = 1;
    uint32_t largest = largest_bits(from, num_rows, num_inputs, stride);
    if (largest > INFINITE)
        return 0;
    int base = choose_codes((int)(largest >> 8), panel);
    panel->plain = NULL;
    for (int64_t column = 0; column < num_inputs; column += 32) {
        _Alignas(64) bits16 pairs[16][2 * PANEL];
        int64_t count = num_inputs - column < 32 ? num_inputs - column : 32;
        transpose_columns(from + column, num_rows, count, stride, pairs[0], 16);
        for (int64_t pair = 0; pair < count / 2; pair++, pair_number++) {
            uint64_t exceptions[2];
            code_pair(pairs[pair], base, pair_to, exceptions);
            pair_to += CODED_PAIR;
            for (int half = 0; half < 2; half++)
                for (; exceptions[half]; exceptions[half] &= exceptions[half] - 1) {
                    uint32_t place = place_of(__builtin_ctzll(exceptions[half]), half);
                    if (next == last)
                        return 0;
                    *next++ = pair_number << 15 | place << 8 | pairs[pair][place] >> 8;
                }
        }
    }
    *next = 0;
    return 1;
}

/* Rows that begin with a whole panel to coded ones, up to one that cannot be. Returns how many there are. */
static inline int64_t code_rows(uint8_t *to, const bits16 *from, int64_t num_rows, int64_t num_inputs, int64_t stride)
{
    int64_t size = bytes_of_coded_panel(num_inputs / 2), num_coded = 0;
    for (int64_t left; (left = num_rows - num_coded * PANEL) > 0; num_coded++)
        if (!code_panel(to + num_coded * size, from + num_coded * PANEL * stride, left < PANEL ? left : PANEL,
                        num_inputs, stride))
            break;
    return num_coded;
}
#endif
