/* The formats of 16 bits, bfloat16 and float16, number by number, and which of them the kernels are compiled for:
 * float16 where IN_FLOAT16 is defined. The same for vectors is in instructions/. */
#ifndef TS_PARALLEL_FORMATS_H
#define TS_PARALLEL_FORMATS_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bits16; /* a number in the kernels' format */

INLINE float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* To the nearest, of two as near to the even one, as torch rounds; NaN stays NaN. So for both formats. */
INLINE uint16_t narrow_bfloat16(float value)
{
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE float widen_bfloat16(uint16_t value)
{
    return float_of_bits((uint32_t)value << 16);
}

INLINE float widen_float16(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000) << 16, exponent = value & 0x7c00, rest = value & 0x3ff;
    if (exponent == 0x7c00)
        return float_of_bits(sign | 0x7f800000 | rest << 13);
    if (!exponent) /* rest times 2^-24, exactly */
        return float_of_bits(bits_of_float((float)rest * 0x1p-24f) | sign);
    return float_of_bits(sign | (((uint32_t)(exponent | rest) << 13) + (112u << 23)));
}

INLINE uint16_t narrow_float16(float value)
{
    uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000)
        return sign | 0x7e00;
    if (magnitude >= 0x477ff000) /* would be rounded to 65536 or is infinite */
        return sign | 0x7c00;
    if (magnitude < 0x38800000) /* less than 2^-14: adding 2^-1 rounds to multiples of 2^-24 */
        return sign | (uint16_t)(bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000);
    return sign | (uint16_t)((magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
}

/* Numbers without their signs are in the order of their bits; beyond INFINITE they are NaN. */
#ifdef IN_FLOAT16
#define INFINITE 0x7c00
INLINE float number_of(bits16 bits) { return widen_float16(bits); }
INLINE bits16 nearest_number(float value) { return narrow_float16(value); }
#else
#define INFINITE 0x7f80
INLINE float number_of(bits16 bits) { return widen_bfloat16(bits); }
INLINE bits16 nearest_number(float value) { return narrow_bfloat16(value); }
#endif
#endif
