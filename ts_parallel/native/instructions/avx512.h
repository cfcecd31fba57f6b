/* AVX-512 F, BW, DQ and VL without BF16 (Skylake-SP, Cascade Lake, Ice Lake): products in float32. */
#ifndef TS_PARALLEL_INSTRUCTIONS_H
#define TS_PARALLEL_INSTRUCTIONS_H

#include "instructions/avx512_floats.h"

/* 6 times 2 vectors of sums, 4 of weights and those of inputs, which come from memory, are in 32 registers. */
#define MOST_ROWS 6
#define PARTS_AT_ONCE(rows) ((rows) > 3 ? 2 : 4) /* so many times 16 outputs */
#define KEEPING_ROWS 0
#define FEW_TOKENS 6

typedef __m512i words, bytes;
typedef __m512 one_float;

#ifdef IN_FLOAT16
INLINE __m256i narrow(floats value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT); }

/* The lower and the upper 16 bits of each. */
INLINE void widen_pairs(words pairs, floats *lower, floats *upper)
{
    const __m512i even_then_odd = _mm512_setr_epi32(
        0x020000, 0x060004, 0x0a0008, 0x0e000c, 0x120010, 0x160014, 0x1a0018, 0x1e001c, 0x030001, 0x070005, 0x0b0009,
        0x0f000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d);
    __m512i parted = _mm512_permutexvar_epi16(even_then_odd, pairs);
    *lower = widen(_mm512_castsi512_si256(parted));
    *upper = widen(_mm512_extracti64x4_epi64(parted, 1));
}
#else
/* To the nearest, of two as near to the even one; NaN stays NaN. */
INLINE __m256i narrow(floats value)
{
    __m512i bits = _mm512_castps_si512(value), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
#endif

INLINE words load_words(const void *from) { return _mm512_loadu_si512(from); }
INLINE words load_some_words(const void *from, lanes which) { return _mm512_maskz_loadu_epi32(which, from); }
INLINE void store_words(void *to, words value) { _mm512_storeu_si512(to, value); }
INLINE words shift_left(words value, int count) { return _mm512_slli_epi32(value, (unsigned)count); }
INLINE words shift_right(words value, int count) { return _mm512_srli_epi32(value, (unsigned)count); }
INLINE words mask_of(words value, uint32_t mask) { return _mm512_and_si512(value, _mm512_set1_epi32((int)mask)); }
INLINE words either(words a, words b) { return _mm512_or_si512(a, b); }
INLINE floats floats_of_bits(words bits) { return _mm512_castsi512_ps(bits); }
INLINE words bits_of_floats(floats value) { return _mm512_castps_si512(value); }
INLINE floats floats_of_integers(words value) { return _mm512_cvtepi32_ps(value); }
INLINE bytes load_bytes(const uint8_t *from) { return _mm512_loadu_si512(from); }
INLINE bytes lower_nibbles(bytes value) { return _mm512_and_si512(value, _mm512_set1_epi8(15)); }
INLINE bytes upper_nibbles(bytes value) { return lower_nibbles(_mm512_srli_epi16(value, 4)); }
INLINE words interleave_lower(bytes low, bytes high) { return _mm512_unpacklo_epi8(low, high); }
INLINE words interleave_upper(bytes low, bytes high) { return _mm512_unpackhi_epi8(low, high); }
INLINE one_float one_of(const float *from) { return _mm512_set1_ps(*from); }
INLINE floats one_times_plus(one_float a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }

INLINE bytes look_up_bytes(const uint8_t table[16], bytes places)
{
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), places);
}

#include "instructions/float_operands.h"
#include "instructions/decoding.h"
#endif
