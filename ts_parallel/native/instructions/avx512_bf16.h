/* AVX-512 with BF16 and VBMI (Zen 4, Cooper Lake, Sapphire Rapids and later): two products of bfloat16 a lane at once,
 * added in float32, and tables of 64 bytes. */
#ifndef TS_PARALLEL_INSTRUCTIONS_H
#define TS_PARALLEL_INSTRUCTIONS_H

#include "instructions/avx512_floats.h"

/* How many rows of inputs are multiplied at once: 6 times 4 vectors of sums, 4 of weights and 1 of inputs are 29 of 32
 * registers. */
#define MOST_ROWS 6
#define PARTS_AT_ONCE(rows) 4 /* so many times 16 outputs */
#define KEEPING_ROWS 4        /* with more, what makes the numbers bfloat16 finds no registers */
/* So many read numbers as they are stored, for it takes longer to keep them. */
#define FEW_TOKENS 10

typedef __m512bh operand; /* a pair of inputs' weights for 16 outputs */
typedef bits16 number;      /* what inputs are read as */
typedef __m512bh both;    /* a pair of inputs */

INLINE __m256i narrow(floats value) { return (__m256i)_mm512_cvtneps_pbh(value); }
INLINE void store_numbers(number *to, floats value) { _mm256_storeu_si256((__m256i *)to, narrow(value)); }
INLINE operand load_operand(const bits16 *from) { return (__m512bh)_mm512_loadu_si512(from); }
INLINE operand load_some(const bits16 *from, lanes which) { return (__m512bh)_mm512_maskz_loadu_epi32(which, from); }
INLINE operand first_alone(operand both) { return (__m512bh)_mm512_maskz_mov_epi16(0x55555555, (__m512i)both); }
INLINE void keep_operand(bits16 *to, operand weights) { _mm512_store_si512(to, (__m512i)weights); }
INLINE floats dot(floats sum, operand weights, both inputs) { return _mm512_dpbf16_ps(sum, weights, inputs); }

INLINE both pair_of(const number *from)
{
    int32_t bits;
    memcpy(&bits, from, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

struct tables {
    __m512i table[4];
};

INLINE struct tables coded_table(const uint8_t upper[16])
{
    return (struct tables){{_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)upper))}};
}

/* What 16 bits with these 5 lowest mean in bfloat16: the fifth belongs to the next number. */
INLINE struct tables int4_table(void)
{
    const __m512i meanings = _mm512_setr_epi32(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (struct tables){{_mm512_broadcast_i64x4(narrow(_mm512_cvtepi32_ps(meanings)))}};
}

/* The bytes of the bfloat16 of all magnitudes, 0 to 127: first the lower ones, then the upper ones. */
INLINE struct tables int8_table(void)
{
    __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m128i bytes[2][8];
    struct tables tables;
    for (int i = 0; i < 8; i++) {
        __m256i bits = narrow(_mm512_cvtepi32_ps(_mm512_add_epi32(number, _mm512_set1_epi32(16 * i))));
        bytes[0][i] = _mm256_cvtepi16_epi8(bits);
        bytes[1][i] = _mm256_cvtepi16_epi8(_mm256_srli_epi16(bits, 8));
    }
    memcpy(tables.table, bytes, sizeof bytes);
    return tables;
}

/* A half of a pair: the weights of 32 outputs. */
INLINE void decode_coded(const uint8_t *from, int half, const struct tables *tables, operand weights[2])
{
    __m512i codes = _mm512_loadu_si512(from), low = _mm512_loadu_si512(from + 64 + 64 * half);
    __m512i high = _mm512_permutexvar_epi8(half ? _mm512_srli_epi16(codes, 4) : codes, tables->table[0]);
    weights[0] = (__m512bh)_mm512_unpacklo_epi8(low, high);
    weights[1] = (__m512bh)_mm512_unpackhi_epi8(low, high);
}

/* What a byte of INT8 is: sign and magnitude, and -128 where that would be -0. */
INLINE uint8_t byte_of_integer(int integer)
{
    return (uint8_t)(integer == -128 ? 0x80 : integer < 0 ? 0x80 - integer : integer);
}

INLINE int integer_of_byte(uint8_t byte)
{
    return byte == 0x80 ? -128 : byte > 0x80 ? 0x80 - byte : byte;
}

INLINE void decode_int8(const uint8_t *from, int half, const struct tables *tables, operand weights[2])
{
    const __m512i *table = tables->table;
    __m512i bytes = _mm512_loadu_si512(from + 64 * half);
    __m512i low = _mm512_permutex2var_epi8(table[0], bytes, table[1]);
    __m512i high = _mm512_permutex2var_epi8(table[2], bytes, table[3]);
    /* high | bytes & 0x80 */
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    high = _mm512_ternarylogic_epi32(high, bytes, sign, 0xf8);
    high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(bytes, sign), _mm512_set1_epi8((char)0xc3)); /* -128 */
    weights[0] = (__m512bh)_mm512_unpacklo_epi8(low, high);
    weights[1] = (__m512bh)_mm512_unpackhi_epi8(low, high);
}

INLINE void decode_int4(const uint8_t *from, int half, const struct tables *tables, operand weights[2])
{
    __m512i nibbles = _mm512_loadu_si512(from);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        weights[i] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 4 * (2 * half + i)),
                                                        tables->table[0]);
}
#endif
