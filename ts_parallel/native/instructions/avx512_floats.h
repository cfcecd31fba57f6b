/* Sixteen float32, and the ways of a weight into its panels, where a vector has 512 bits: AVX-512 F, BW, DQ and VL.
 * `narrow`, how float32 is rounded to 16 bits, is the including header's. */
#ifndef TS_PARALLEL_AVX512_FLOATS_H
#define TS_PARALLEL_AVX512_FLOATS_H

#include <immintrin.h>

#include "numbers/formats.h"

typedef __m512 floats;
typedef __mmask16 lanes; /* which of sixteen */

INLINE __m256i narrow(floats value);

INLINE floats all(float value) { return _mm512_set1_ps(value); }
INLINE floats load_floats(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store_floats(float *to, floats value) { _mm512_storeu_ps(to, value); }
INLINE floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
INLINE floats subtract(floats a, floats b) { return _mm512_sub_ps(a, b); }
INLINE floats times(floats a, floats b) { return _mm512_mul_ps(a, b); }
INLINE floats over(floats a, floats b) { return _mm512_div_ps(a, b); }
/* a b + c and c - a b, rounded once */
INLINE floats times_plus(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats minus_times(floats a, floats b, floats c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE floats lesser(floats a, floats b) { return _mm512_min_ps(a, b); }
INLINE floats greater(floats a, floats b) { return _mm512_max_ps(a, b); }
INLINE floats nearest(floats value) { return _mm512_roundscale_ps(value, 8); }
INLINE floats times_power_of_2(floats value, floats power) { return _mm512_scalef_ps(value, power); }
INLINE lanes is_at_least(floats a, floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
INLINE lanes is_greater(floats a, floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE lanes is_equal(floats a, floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INLINE floats where(lanes which, floats a, floats b) { return _mm512_mask_mov_ps(b, which, a); }
INLINE float sum_of(floats value) { return _mm512_reduce_add_ps(value); }
INLINE float greatest_of(floats value) { return _mm512_reduce_max_ps(value); }

INLINE floats widen(__m256i bits)
{
#ifdef IN_FLOAT16
    return _mm512_cvtph_ps(bits);
#else
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#endif
}

INLINE floats load16(const bits16 *from, lanes which) { return widen(_mm256_maskz_loadu_epi16(which, from)); }
INLINE void store16(bits16 *to, lanes which, floats value) { _mm256_mask_storeu_epi16(to, which, narrow(value)); }
INLINE floats rounded(floats value) { return widen(narrow(value)); }

INLINE __mmask32 first32(int64_t count)
{
    return count >= 32 ? 0xffffffffu : (__mmask32)((1u << count) - 1);
}

/* The bits, without a sign, of the number that is furthest from zero. */
INLINE uint32_t largest_bits_of_row(const bits16 *from, int64_t count)
{
    __m512i most = _mm512_setzero_si512(); /* without their signs, numbers are in the order of their bits */
    for (int64_t i = 0; i < count; i += 32) {
        __m512i bits = _mm512_maskz_loadu_epi16(first32(count - i), from + i);
        most = _mm512_max_epu16(most, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
    }
    most = _mm512_max_epu32(_mm512_srli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0xffff)));
    return _mm512_reduce_max_epu32(most);
}

/* The integers next to `count` numbers, at most 32, times `inverse`. */
INLINE void choose_integers(const bits16 *from, int64_t count, float inverse, int largest, int8_t to[32])
{
    for (int half = 0; half < 2; half++) {
        floats number = times(load16(from + 16 * half, (lanes)(first32(count) >> 16 * half)), all(inverse));
        __m512i integer = _mm512_min_epi32(_mm512_cvtps_epi32(number), _mm512_set1_epi32(largest));
        integer = _mm512_max_epi32(integer, _mm512_set1_epi32(-largest));
        _mm_storeu_si128((__m128i *)(to + 16 * half), _mm512_cvtepi32_epi8(integer));
    }
}

/* `count` numbers, at most 32, of each of 16 rows, of which `num_rows` are there, to `num_pairs` pairs of 16 rows, a
 * panel's width apart. */
INLINE void transpose_pairs(const bits16 *const rows[16], int64_t num_rows, int64_t count, bits16 *to, int64_t width,
                            int64_t num_pairs)
{
    __m512i row[16], half[16];
    for (int i = 0; i < 16; i++)
        row[i] = i < num_rows ? _mm512_maskz_loadu_epi16(first32(count), rows[i]) : _mm512_setzero_si512();
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
        _mm512_storeu_si512(to + i * width, row[i]);
}

/* The codes and lower bytes of one pair, `numbers` [64, 2], as numbers/coded.h has them; of each half, which bytes
 * belong to exceptions. `base` is the upper byte of code 0. */
INLINE void code_pair(const bits16 *numbers, int base, uint8_t *to, uint64_t exceptions[2])
{
    const __m512i lower = _mm512_set1_epi16(0xff), magnitude = _mm512_set1_epi8(0x7f), eight = _mm512_set1_epi8(8);
    __m512i codes[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m512i first = _mm512_loadu_si512(numbers + 64 * half), second = _mm512_loadu_si512(numbers + 64 * half + 32);
        __m512i low = _mm512_packus_epi16(_mm512_and_si512(first, lower), _mm512_and_si512(second, lower));
        __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
        __m512i size = _mm512_and_si512(high, magnitude), code = _mm512_subs_epu8(size, _mm512_set1_epi8((char)base));
        exceptions[half] = _mm512_testn_epi8_mask(code, code) & _mm512_test_epi8_mask(size, size);
        codes[half] = _mm512_or_si512(code, _mm512_and_si512(_mm512_srli_epi16(high, 4), eight));
        _mm512_storeu_si512(to + 64 + 64 * half, low);
    }
    _mm512_storeu_si512(to, _mm512_or_si512(codes[0], _mm512_slli_epi16(codes[1], 4)));
}
#endif
