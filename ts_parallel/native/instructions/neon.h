/* NEON of 64-bit ARM: products in float32 or, with BF16 (Neoverse N2 and V1, Graviton 3 and later), two of bfloat16 a
 * lane at once; sixteen numbers in four vectors. */
#ifndef TS_PARALLEL_INSTRUCTIONS_H
#define TS_PARALLEL_INSTRUCTIONS_H

#include <arm_neon.h>

#include "numbers/formats.h"

/* 4 times 4 vectors of sums, 8 of weights and 2 of inputs are 26 of 32 registers. */
#define MOST_ROWS 4
#define PARTS_AT_ONCE(rows) ((rows) > 2 ? 1 : 2) /* so many times 16 outputs */
#define KEEPING_ROWS 0
#define FEW_TOKENS 2

typedef uint16_t lanes; /* which of sixteen */
typedef struct {
    float32x4_t part[4];
} floats;
typedef struct {
    uint32x4_t part[4];
} words;
typedef struct {
    uint8x16_t part[4];
} bytes;
typedef float32x4_t one_float;

#define OF_PARTS(type, expression)                                                                                     \
    type result;                                                                                                       \
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) result.part[i] = expression;                                   \
    return result

INLINE floats all(float value) { OF_PARTS(floats, vdupq_n_f32(value)); }
INLINE floats load_floats(const float *from) { OF_PARTS(floats, vld1q_f32(from + 4 * i)); }
INLINE floats add(floats a, floats b) { OF_PARTS(floats, vaddq_f32(a.part[i], b.part[i])); }
INLINE floats subtract(floats a, floats b) { OF_PARTS(floats, vsubq_f32(a.part[i], b.part[i])); }
INLINE floats times(floats a, floats b) { OF_PARTS(floats, vmulq_f32(a.part[i], b.part[i])); }
INLINE floats over(floats a, floats b) { OF_PARTS(floats, vdivq_f32(a.part[i], b.part[i])); }
/* a b + c and c - a b, rounded once */
INLINE floats times_plus(floats a, floats b, floats c) { OF_PARTS(floats, vfmaq_f32(c.part[i], a.part[i], b.part[i])); }
INLINE floats minus_times(floats a, floats b, floats c)
{
    OF_PARTS(floats, vfmsq_f32(c.part[i], a.part[i], b.part[i]));
}
INLINE floats nearest(floats value) { OF_PARTS(floats, vrndnq_f32(value.part[i])); }

/* As x86 has them: the second where one is NaN. */
INLINE floats lesser(floats a, floats b)
{
    OF_PARTS(floats, vbslq_f32(vcltq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]));
}
INLINE floats greater(floats a, floats b)
{
    OF_PARTS(floats, vbslq_f32(vcgtq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]));
}

INLINE void store_floats(float *to, floats value)
{
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        vst1q_f32(to + 4 * i, value.part[i]);
}

/* In two steps, for a single factor would not reach 2^128 nor below 2^-126. */
INLINE floats times_power_of_2(floats value, floats power)
{
    floats result;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        int32x4_t whole = vcvtq_s32_f32(power.part[i]), part = vshrq_n_s32(whole, 1), rest = vsubq_s32(whole, part);
        float32x4_t one = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(part, vdupq_n_s32(127)), 23));
        float32x4_t other = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, vdupq_n_s32(127)), 23));
        result.part[i] = vmulq_f32(vmulq_f32(value.part[i], one), other);
    }
    return result;
}

INLINE lanes lanes_of_bits(words bits)
{
    const uint32x4_t bit = {1, 2, 4, 8};
    uint32_t which = 0;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        which |= vaddvq_u32(vandq_u32(bits.part[i], bit)) << 4 * i;
    return (lanes)which;
}

INLINE words bits_of_lanes(lanes which)
{
    const uint32x4_t bit = {1, 2, 4, 8};
    OF_PARTS(words, vtstq_u32(vdupq_n_u32((uint32_t)which >> 4 * i), bit));
}

#define COMPARED(how)                                                                                                  \
    words bits;                                                                                                        \
    for (int i = 0; i < 4; i++)                                                                                        \
        bits.part[i] = how(a.part[i], b.part[i]);                                                                      \
    return lanes_of_bits(bits)
INLINE lanes is_at_least(floats a, floats b) { COMPARED(vcgeq_f32); }
INLINE lanes is_greater(floats a, floats b) { COMPARED(vcgtq_f32); }
INLINE lanes is_equal(floats a, floats b) { COMPARED(vceqq_f32); }

INLINE floats where(lanes which, floats a, floats b)
{
    words bits = bits_of_lanes(which);
    OF_PARTS(floats, vbslq_f32(bits.part[i], a.part[i], b.part[i]));
}

INLINE float sum_of(floats value)
{
    return vaddvq_f32(vaddq_f32(vaddq_f32(value.part[0], value.part[1]), vaddq_f32(value.part[2], value.part[3])));
}

INLINE float greatest_of(floats value)
{
    float32x4_t one = vmaxnmq_f32(value.part[0], value.part[1]), other = vmaxnmq_f32(value.part[2], value.part[3]);
    return vmaxnmvq_f32(vmaxnmq_f32(one, other));
}

INLINE words load_words(const void *from)
{
    OF_PARTS(words, vreinterpretq_u32_u8(vld1q_u8((const uint8_t *)from + 16 * i)));
}
INLINE words shift_left(words value, int count)
{
    OF_PARTS(words, vshlq_u32(value.part[i], vdupq_n_s32(count)));
}
INLINE words shift_right(words value, int count)
{
    OF_PARTS(words, vshlq_u32(value.part[i], vdupq_n_s32(-count)));
}
INLINE words mask_of(words value, uint32_t mask) { OF_PARTS(words, vandq_u32(value.part[i], vdupq_n_u32(mask))); }
INLINE words either(words a, words b) { OF_PARTS(words, vorrq_u32(a.part[i], b.part[i])); }
INLINE floats floats_of_bits(words bits) { OF_PARTS(floats, vreinterpretq_f32_u32(bits.part[i])); }
INLINE words bits_of_floats(floats value) { OF_PARTS(words, vreinterpretq_u32_f32(value.part[i])); }
INLINE floats floats_of_integers(words value)
{
    OF_PARTS(floats, vcvtq_f32_s32(vreinterpretq_s32_u32(value.part[i])));
}
INLINE bytes load_bytes(const uint8_t *from) { OF_PARTS(bytes, vld1q_u8(from + 16 * i)); }
INLINE bytes lower_nibbles(bytes value) { OF_PARTS(bytes, vandq_u8(value.part[i], vdupq_n_u8(15))); }
INLINE bytes upper_nibbles(bytes value) { OF_PARTS(bytes, vshrq_n_u8(value.part[i], 4)); }
INLINE words interleave_lower(bytes low, bytes high)
{
    OF_PARTS(words, vreinterpretq_u32_u8(vzip1q_u8(low.part[i], high.part[i])));
}
INLINE words interleave_upper(bytes low, bytes high)
{
    OF_PARTS(words, vreinterpretq_u32_u8(vzip2q_u8(low.part[i], high.part[i])));
}
INLINE bytes look_up_bytes(const uint8_t table[16], bytes places)
{
    OF_PARTS(bytes, vqtbl1q_u8(vld1q_u8(table), places.part[i]));
}
INLINE one_float one_of(const float *from) { return vld1q_dup_f32(from); }
INLINE floats one_times_plus(one_float a, floats b, floats c)
{
    OF_PARTS(floats, vfmaq_f32(c.part[i], b.part[i], a));
}

INLINE void store_words(void *to, words value)
{
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        vst1q_u8((uint8_t *)to + 16 * i, vreinterpretq_u8_u32(value.part[i]));
}

INLINE words load_some_words(const void *from, lanes which)
{
    uint32_t some[16] = {0};
    if (which == 0xffff)
        return load_words(from);
    memcpy(some, from, (size_t)__builtin_popcount(which) * sizeof *some);
    return load_words(some);
}

#ifdef IN_FLOAT16
INLINE float32x4_t widen4(uint16x4_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
INLINE uint16x4_t narrow4(float32x4_t value) { return vreinterpret_u16_f16(vcvt_f16_f32(value)); }
INLINE floats rounded(floats value) { OF_PARTS(floats, widen4(narrow4(value.part[i]))); }

/* The lower and the upper 16 bits of each. */
INLINE void widen_pairs(words pairs, floats *lower, floats *upper)
{
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        lower->part[i] = widen4(vmovn_u32(pairs.part[i]));
        upper->part[i] = widen4(vshrn_n_u32(pairs.part[i], 16));
    }
}
#else
INLINE float32x4_t widen4(uint16x4_t bits) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }

/* The upper 16 bits are the nearest bfloat16, of two as near the even one; NaN stays NaN. */
INLINE uint32x4_t nearest_bf16(float32x4_t value)
{
    uint32x4_t bits = vreinterpretq_u32_f32(value), last = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), last);
    return vbslq_u32(vceqq_f32(value, value), up, vorrq_u32(bits, vdupq_n_u32(0x400000)));
}

INLINE floats rounded(floats value)
{
    OF_PARTS(floats, vreinterpretq_f32_u32(vandq_u32(nearest_bf16(value.part[i]), vdupq_n_u32(0xffff0000u))));
}

INLINE uint16x4_t narrow4(float32x4_t value) { return vshrn_n_u32(nearest_bf16(value), 16); }
#endif

/* Of the first numbers, which alone may be read, as many as there are in `which`. */
INLINE floats load16(const bits16 *from, lanes which)
{
    bits16 some[16] = {0};
    if (which != 0xffff) {
        memcpy(some, from, (size_t)__builtin_popcount(which) * sizeof *some);
        from = some;
    }
    OF_PARTS(floats, widen4(vld1_u16(from + 4 * i)));
}

INLINE void store_all16(bits16 *to, floats value)
{
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        vst1_u16(to + 4 * i, narrow4(value.part[i]));
}

INLINE void store16(bits16 *to, lanes which, floats value)
{
    bits16 some[16];
    if (which == 0xffff) {
        store_all16(to, value);
        return;
    }
    store_all16(some, value);
    memcpy(to, some, (size_t)__builtin_popcount(which) * sizeof *to);
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
typedef words operand;   /* a pair of inputs' weights for 16 outputs */
typedef bits16 number;     /* what inputs are read as */
typedef uint32x4_t both; /* a pair of inputs */

INLINE operand operand_of(words pairs) { return pairs; }
INLINE operand load_operand(const bits16 *from) { return load_words(from); }
INLINE operand load_some(const bits16 *from, lanes which) { return load_some_words(from, which); }
INLINE operand first_alone(operand pairs) { return mask_of(pairs, 0xffff); }
INLINE void keep_operand(bits16 *to, operand weights) { store_words(to, weights); }
INLINE void store_numbers(number *to, floats value) { store_all16(to, value); }
INLINE both pair_of(const number *from) { return vld1q_dup_u32((const uint32_t *)(const void *)from); }

/* Of small integers, which bfloat16 holds exactly. */
INLINE operand operand_of_floats(floats first, floats second)
{
    return either(shift_right(bits_of_floats(first), 16), mask_of(bits_of_floats(second), 0xffff0000u));
}

INLINE floats dot(floats sum, operand weights, both inputs)
{
    OF_PARTS(floats, vbfdotq_f32(sum.part[i], vreinterpretq_bf16_u32(weights.part[i]), vreinterpretq_bf16_u32(inputs)));
}
#else
#include "instructions/float_operands.h"
#endif
#include "instructions/decoding.h"
#define PACKS_PORTABLY
#endif
