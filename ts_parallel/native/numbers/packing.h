/* A weight's rows, as a checkpoint has them, to panels: 64 rows are one, in which pairs of columns follow each other. */
#ifndef TS_PARALLEL_PACKING_H
#define TS_PARALLEL_PACKING_H

#include "numbers/coded.h"

#define INFINITE 0x7f80 /* a bfloat16's bits; without a sign, NaN's are more */

/* 32 numbers of each of 16 rows, of which `num_rows` are there, to 16 pairs of 16 rows, a panel's width apart.
 * Returns `most`, or the numbers' bits without their signs where those are more. */
INLINE __m512i transpose_pairs(const bf16 *const rows[16], int64_t num_rows, int64_t column, __mmask32 columns,
                               bf16 *to, int64_t num_pairs, __m512i most)
{
    __m512i row[16], half[16];
    for (int i = 0; i < 16; i++) {
        row[i] = i < num_rows ? _mm512_maskz_loadu_epi16(columns, rows[i] + column) : _mm512_setzero_si512();
        most = _mm512_max_epu16(most, _mm512_and_si512(row[i], _mm512_set1_epi16(0x7fff)));
    }
    for (int i = 0; i < 8; i++) {
        half[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
        half[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        row[4 * i] = _mm512_unpacklo_epi64(half[4 * i], half[4 * i + 2]);
        row[4 * i + 1] = _mm512_unpackhi_epi64(half[4 * i], half[4 * i + 2]);
        row[4 * i + 2] = _mm512_unpacklo_epi64(half[4 * i + 1], half[4 * i + 3]);
        row[4 * i + 3] = _mm512_unpackhi_epi64(half[4 * i + 1], half[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        half[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
        half[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
        half[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
        half[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        row[i] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0x88);
        row[i + 8] = _mm512_shuffle_i32x4(half[i], half[i + 8], 0xdd);
        row[i + 4] = _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0x88);
        row[i + 12] = _mm512_shuffle_i32x4(half[i + 4], half[i + 12], 0xdd);
    }
    for (int64_t i = 0; i < num_pairs; i++)
        _mm512_storeu_si512(to + i * 2 * PANEL, row[i]);
    return most;
}

/* The panels of `num_rows` rows of a weight, which begin with a whole panel. Returns whether a number is NaN. */
AVX512_BF16 static int pack_rows(bf16 *to, const bf16 *from, int64_t num_rows, int64_t num_inputs, int64_t stride)
{
    __m512i most = _mm512_setzero_si512();
    for (int64_t first = 0; first < num_rows; first += PANEL, to += num_inputs * PANEL)
        for (int64_t part = 0; part < 4; part++) {
            const bf16 *rows[16];
            int64_t left = num_rows - first - part * 16;
            for (int i = 0; i < 16; i++)
                rows[i] = from + (first + part * 16 + i) * stride;
            for (int64_t column = 0; column < num_inputs; column += 32)
                most = transpose_pairs(rows, left, column, first32(num_inputs - column),
                                       to + column * PANEL + part * 32,
                                       num_inputs - column < 32 ? (num_inputs - column) / 2 : 16, most);
        }
    return _mm512_cmpgt_epu16_mask(most, _mm512_set1_epi16(INFINITE)) != 0;
}

/* The bits, without a sign, of the number that is furthest from zero. */
AVX512_BF16 static int largest_bits(const bf16 *from, int64_t num_rows, int64_t num_inputs, int64_t stride)
{
    __m512i most = _mm512_setzero_si512();
    for (int64_t row = 0; row < num_rows; row++, from += stride)
        for (int64_t column = 0; column < num_inputs; column += 32) {
            __m512i bits = _mm512_maskz_loadu_epi16(first32(num_inputs - column), from + column);
            most = _mm512_max_epu16(most, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
        }
    most = _mm512_max_epu32(_mm512_srli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0xffff)));
    return (int)_mm512_reduce_max_epu32(most);
}

/* Up to 64 rows to one coded panel. Returns 0 where too many numbers would be exceptions, or NaN is among them. */
AVX512_BF16 static int code_panel(uint8_t *to, const bf16 *from, int64_t num_rows, int64_t num_inputs, int64_t stride)
{
    struct coded_panel *panel = (struct coded_panel *)to;
    uint8_t *pair_to = to + bytes_of_head(num_inputs / 2);
    uint32_t *next = panel->exceptions, *last = (uint32_t *)pair_to - 1, pair_number = 1;
    int largest = largest_bits(from, num_rows, num_inputs, stride);
    if (largest > INFINITE)
        return 0;
    const __m512i base = _mm512_set1_epi8((char)choose_codes(largest >> 8, panel));
    panel->plain = NULL;
    for (int64_t column = 0; column < num_inputs; column += 32) {
        _Alignas(64) bf16 pairs[16][2 * PANEL];
        for (int64_t part = 0; part < 4; part++) {
            const bf16 *rows[16];
            for (int i = 0; i < 16; i++)
                rows[i] = from + (part * 16 + i) * stride;
            (void)transpose_pairs(rows, num_rows - part * 16, column, first32(num_inputs - column),
                                  pairs[0] + part * 32, 16, base);
        }
        for (int64_t pair = 0; pair < 16 && column + 2 * pair < num_inputs; pair++, pair_number++) {
            __mmask64 exceptions[2];
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
static inline int64_t code_rows(uint8_t *to, const bf16 *from, int64_t num_rows, int64_t num_inputs, int64_t stride)
{
    int64_t size = bytes_of_coded_panel(num_inputs / 2), num_coded = 0;
    for (int64_t left; (left = num_rows - num_coded * PANEL) > 0; num_coded++)
        if (!code_panel(to + num_coded * size, from + num_coded * PANEL * stride, left < PANEL ? left : PANEL,
                        num_inputs, stride))
            break;
    return num_coded;
}
#endif
