/* AVX2 with FMA (Haswell, Zen and later), for float16 with F16C: products in float32, sixteen numbers in two vectors. */
#ifndef TS_PARALLEL_INSTRUCTIONS_H
#define TS_PARALLEL_INSTRUCTIONS_H

#include <immintrin.h>

#include "numbers/formats.h"

/* 4 times 2 vectors of sums, 4 of weights and 2 of inputs are 14 of 16 registers. */
#define MOST_ROWS 4
#define PARTS_AT_ONCE(rows) ((rows) > 2 ? 1 : 2) /* so many times 16 outputs */
#define KEEPING_ROWS 0
#define FEW_TOKENS 6
#define WIDE_ROWS 6 /* of operations/wide.h: 6 times 2 vectors of sums, 2 of weights and 1 of inputs */
#define TOKENS_BEFORE_WIDE 8

typedef uint16_t lanes; /* which of sixteen */
typedef struct {
    __m256 half[2];
} floats;
typedef struct {
    __m256i half[2];
} words;
typedef words bytes;
typedef __m256 one_float;

#define OF_HALVES(type, expression)                                                                                    \
    type result;                                                                                                       \
    _Pragma("GCC unroll 2") for (int i = 0; i < 2; i++) result.half[i] = expression;                                   \
    return result

INLINE floats all(float value) { OF_HALVES(floats, _mm256_set1_ps(value)); }
INLINE floats load_floats(const float *from) { OF_HALVES(floats, _mm256_loadu_ps(from + 8 * i)); }
INLINE floats add(floats a, floats b) { OF_HALVES(floats, _mm256_add_ps(a.half[i], b.half[i])); }
INLINE floats subtract(floats a, floats b) { OF_HALVES(floats, _mm256_sub_ps(a.half[i], b.half[i])); }
INLINE floats times(floats a, floats b) { OF_HALVES(floats, _mm256_mul_ps(a.half[i], b.half[i])); }
INLINE floats over(floats a, floats b) { OF_HALVES(floats, _mm256_div_ps(a.half[i], b.half[i])); }
/* a b + c and c - a b, rounded once */
INLINE floats times_plus(floats a, floats b, floats c)
{
    OF_HALVES(floats, _mm256_fmadd_ps(a.half[i], b.half[i], c.half[i]));
}
INLINE floats minus_times(floats a, floats b, floats c)
{
    OF_HALVES(floats, _mm256_fnmadd_ps(a.half[i], b.half[i], c.half[i]));
}
INLINE floats lesser(floats a, floats b) { OF_HALVES(floats, _mm256_min_ps(a.half[i], b.half[i])); }
INLINE floats greater(floats a, floats b) { OF_HALVES(floats, _mm256_max_ps(a.half[i], b.half[i])); }
INLINE floats nearest(floats value)
{
    OF_HALVES(floats, _mm256_round_ps(value.half[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

INLINE void store_floats(float *to, floats value)
{
    _mm256_storeu_ps(to, value.half[0]);
    _mm256_storeu_ps(to + 8, value.half[1]);
}

/* In two steps, for a single factor would not reach 2^128 nor below 2^-126. */
INLINE floats times_power_of_2(floats value, floats power)
{
    floats result;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        __m256i whole = _mm256_cvtps_epi32(power.half[i]), part = _mm256_srai_epi32(whole, 1);
        __m256i rest = _mm256_sub_epi32(whole, part);
        __m256 one = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(part, _mm256_set1_epi32(127)), 23));
        __m256 other = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, _mm256_set1_epi32(127)), 23));
        result.half[i] = _mm256_mul_ps(_mm256_mul_ps(value.half[i], one), other);
    }
    return result;
}

#define COMPARED(how)                                                                                                  \
    return (lanes)(_mm256_movemask_ps(_mm256_cmp_ps(a.half[0], b.half[0], how)) |                                      \
                   _mm256_movemask_ps(_mm256_cmp_ps(a.half[1], b.half[1], how)) << 8)
INLINE lanes is_at_least(floats a, floats b) { COMPARED(_CMP_GE_OQ); }
INLINE lanes is_greater(floats a, floats b) { COMPARED(_CMP_GT_OQ); }
INLINE lanes is_equal(floats a, floats b) { COMPARED(_CMP_EQ_OQ); }

/* All bits of the lanes that are meant. */
INLINE words bits_of_lanes(lanes which)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    OF_HALVES(words, _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(which >> 8 * i), bit), bit));
}

INLINE floats where(lanes which, floats a, floats b)
{
    words bits = bits_of_lanes(which);
    OF_HALVES(floats, _mm256_blendv_ps(b.half[i], a.half[i], _mm256_castsi256_ps(bits.half[i])));
}

INLINE float sum_of(floats value)
{
    __m256 eight = _mm256_add_ps(value.half[0], value.half[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float greatest_of(floats value)
{
    __m256 eight = _mm256_max_ps(value.half[0], value.half[1]);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE words load_words(const void *from) { OF_HALVES(words, _mm256_loadu_si256((const __m256i *)from + i)); }
INLINE words shift_left(words value, int count) { OF_HALVES(words, _mm256_slli_epi32(value.half[i], count)); }
INLINE words shift_right(words value, int count) { OF_HALVES(words, _mm256_srli_epi32(value.half[i], count)); }
INLINE words mask_of(words value, uint32_t mask)
{
    OF_HALVES(words, _mm256_and_si256(value.half[i], _mm256_set1_epi32((int)mask)));
}
INLINE words either(words a, words b) { OF_HALVES(words, _mm256_or_si256(a.half[i], b.half[i])); }
INLINE floats floats_of_bits(words bits) { OF_HALVES(floats, _mm256_castsi256_ps(bits.half[i])); }
INLINE words bits_of_floats(floats value) { OF_HALVES(words, _mm256_castps_si256(value.half[i])); }
INLINE floats floats_of_integers(words value) { OF_HALVES(floats, _mm256_cvtepi32_ps(value.half[i])); }
INLINE bytes load_bytes(const uint8_t *from) { return load_words(from); }
INLINE bytes lower_nibbles(bytes value) { return mask_of(value, 0x0f0f0f0f); }
INLINE bytes upper_nibbles(bytes value) { return lower_nibbles(shift_right(value, 4)); }
INLINE words interleave_lower(bytes low, bytes high)
{
    OF_HALVES(words, _mm256_unpacklo_epi8(low.half[i], high.half[i]));
}
INLINE words interleave_upper(bytes low, bytes high)
{
    OF_HALVES(words, _mm256_unpackhi_epi8(low.half[i], high.half[i]));
}
INLINE one_float one_of(const float *from) { return _mm256_broadcast_ss(from); }
INLINE floats one_times_plus(one_float a, floats b, floats c)
{
    OF_HALVES(floats, _mm256_fmadd_ps(a, b.half[i], c.half[i]));
}

INLINE words load_some_words(const void *from, lanes which)
{
    words bits = bits_of_lanes(which);
    OF_HALVES(words, _mm256_maskload_epi32((const int *)from + 8 * i, bits.half[i]));
}

INLINE void store_words(void *to, words value)
{
    _mm256_storeu_si256((__m256i *)to, value.half[0]);
    _mm256_storeu_si256((__m256i *)to + 1, value.half[1]);
}

INLINE bytes look_up_bytes(const uint8_t table[16], bytes places)
{
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    OF_HALVES(bytes, _mm256_shuffle_epi8(both, places.half[i]));
}

#ifdef IN_FLOAT16
INLINE __m256 widen8(__m128i bits) { return _mm256_cvtph_ps(bits); }
INLINE __m128i narrow8(__m256 value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }
INLINE floats rounded(floats value) { OF_HALVES(floats, widen8(narrow8(value.half[i]))); }
INLINE __m256i narrow(floats value) { return _mm256_set_m128i(narrow8(value.half[1]), narrow8(value.half[0])); }

/* The lower and the upper 16 bits of each. */
INLINE void widen_pairs(words pairs, floats *lower, floats *upper)
{
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        __m256i parted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(pairs.half[i], order), 0xd8);
        lower->half[i] = widen8(_mm256_castsi256_si128(parted));
        upper->half[i] = widen8(_mm256_extracti128_si256(parted, 1));
    }
}
#else
INLINE __m256 widen8(__m128i bits)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* The upper 16 bits are the nearest bfloat16, of two as near the even one; NaN stays NaN. */
INLINE __m256i nearest_bf16(__m256 value)
{
    __m256i bits = _mm256_castps_si256(value), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
    __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    __m256 nan = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)));
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(up), nan, is_nan));
}

INLINE floats rounded(floats value)
{
    OF_HALVES(floats, _mm256_castsi256_ps(_mm256_and_si256(nearest_bf16(value.half[i]),
                                                           _mm256_set1_epi32((int)0xffff0000u))));
}

INLINE __m256i narrow(floats value)
{
    __m256i low = _mm256_srli_epi32(nearest_bf16(value.half[0]), 16);
    __m256i high = _mm256_srli_epi32(nearest_bf16(value.half[1]), 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}
#endif

/* Of the first numbers, which alone may be read, as many as there are in `which`. */
INLINE floats load16(const bits16 *from, lanes which)
{
    _Alignas(32) bits16 some[16] = {0};
    if (__builtin_expect(which != 0xffff, 0)) {
        memcpy(some, from, (size_t)__builtin_popcount(which) * sizeof *some);
        from = some;
    }
    OF_HALVES(floats, widen8(_mm_loadu_si128((const __m128i *)from + i)));
}

INLINE void store16(bits16 *to, lanes which, floats value)
{
    __m256i bits = narrow(value);
    if (__builtin_expect(which == 0xffff, 1))
        _mm256_storeu_si256((__m256i *)to, bits);
    else
        memcpy(to, &bits, (size_t)__builtin_popcount(which) * sizeof *to);
}

#include "instructions/float_operands.h"
#include "instructions/decoding.h"
#define PACKS_PORTABLY
#endif
