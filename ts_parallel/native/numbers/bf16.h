/* Vectors of bfloat16 and float32: conversions that round as torch does, and exp. */
#ifndef TS_PARALLEL_BF16_H
#define TS_PARALLEL_BF16_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,fma,avx2")))
#define INLINE AVX512_BF16 static inline __attribute__((always_inline))

typedef uint16_t bf16;

INLINE __mmask16 first16(int64_t count)
{
    return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
}

INLINE __mmask32 first32(int64_t count)
{
    return count >= 32 ? 0xffffffffu : (__mmask32)((1u << count) - 1);
}

INLINE __m512 widen(__m256i bits)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

INLINE __m512 load16(const bf16 *from, __mmask16 mask)
{
    return widen(_mm256_maskz_loadu_epi16(mask, from));
}

INLINE __m256i narrow(__m512 value)
{
    return (__m256i)_mm512_cvtneps_pbh(value);
}

INLINE void store16(bf16 *to, __mmask16 mask, __m512 value)
{
    _mm256_mask_storeu_epi16(to, mask, narrow(value));
}

/* What a bfloat16 tensor would hold of `value`. */
INLINE __m512 rounded(__m512 value)
{
    return widen(narrow(value));
}

/* e^value within 2 units in the last place; zero below -87. Cody and Waite's reduction, Cephes' polynomial. */
INLINE __m512 exp16(__m512 value)
{
    const __m512 lowest = _mm512_set1_ps(-87.3f);
    __mmask16 is_normal = _mm512_cmp_ps_mask(value, lowest, _CMP_GE_OQ);
    value = _mm512_min_ps(value, _mm512_set1_ps(88.3f));
    __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(value, _mm512_set1_ps(1.44269504f)), 8);
    __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), value);
    rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.9875691500e-4f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3981999507e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(8.3334519073e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(4.1665795894e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.6666665459e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.0000001201e-1f));
    sum = _mm512_fmadd_ps(sum, _mm512_mul_ps(rest, rest), _mm512_add_ps(rest, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_scalef_ps(is_normal, sum, power);
}
#endif
