/* Plain C, for any processor: slow, and what the others are compared with, number by number. */
#ifndef TS_PARALLEL_INSTRUCTIONS_H
#define TS_PARALLEL_INSTRUCTIONS_H

#include <math.h>

#include "numbers/formats.h"

#define MOST_ROWS 4
#define PARTS_AT_ONCE(rows) ((rows) > 2 ? 1 : 2) /* so many times 16 outputs */
#define KEEPING_ROWS 0
#define FEW_TOKENS 2

typedef uint16_t lanes; /* which of sixteen */
typedef struct {
    float lane[16];
} floats;
typedef struct {
    uint32_t lane[16];
} words;
typedef struct {
    uint8_t byte[64];
} bytes;
typedef float one_float;

#define OF_LANES(type, expression)                                                                                     \
    type result;                                                                                                       \
    for (int i = 0; i < 16; i++)                                                                                       \
        result.lane[i] = expression;                                                                                   \
    return result

INLINE floats all(float value) { OF_LANES(floats, value); }
INLINE floats load_floats(const float *from) { OF_LANES(floats, from[i]); }
INLINE void store_floats(float *to, floats value) { memcpy(to, &value, sizeof value); }
INLINE floats add(floats a, floats b) { OF_LANES(floats, a.lane[i] + b.lane[i]); }
INLINE floats subtract(floats a, floats b) { OF_LANES(floats, a.lane[i] - b.lane[i]); }
INLINE floats times(floats a, floats b) { OF_LANES(floats, a.lane[i] * b.lane[i]); }
INLINE floats over(floats a, floats b) { OF_LANES(floats, a.lane[i] / b.lane[i]); }
INLINE floats times_plus(floats a, floats b, floats c) { OF_LANES(floats, a.lane[i] * b.lane[i] + c.lane[i]); }
INLINE floats minus_times(floats a, floats b, floats c) { OF_LANES(floats, c.lane[i] - a.lane[i] * b.lane[i]); }
INLINE floats lesser(floats a, floats b) { OF_LANES(floats, a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
INLINE floats greater(floats a, floats b) { OF_LANES(floats, a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
INLINE floats nearest(floats value) { OF_LANES(floats, nearbyintf(value.lane[i])); }
INLINE floats times_power_of_2(floats value, floats power) { OF_LANES(floats, ldexpf(value.lane[i], (int)power.lane[i])); }

#define COMPARED(how)                                                                                                  \
    lanes which = 0;                                                                                                   \
    for (int i = 0; i < 16; i++)                                                                                       \
        which |= (lanes)((a.lane[i] how b.lane[i]) << i);                                                              \
    return which
INLINE lanes is_at_least(floats a, floats b) { COMPARED(>=); }
INLINE lanes is_greater(floats a, floats b) { COMPARED(>); }
INLINE lanes is_equal(floats a, floats b) { COMPARED(==); }

INLINE floats where(lanes which, floats a, floats b) { OF_LANES(floats, which >> i & 1 ? a.lane[i] : b.lane[i]); }

INLINE float sum_of(floats value)
{
    for (int count = 8; count; count /= 2)
        for (int i = 0; i < count; i++)
            value.lane[i] += value.lane[i + count];
    return value.lane[0];
}

INLINE float greatest_of(floats value)
{
    for (int i = 1; i < 16; i++)
        value.lane[0] = value.lane[i] > value.lane[0] ? value.lane[i] : value.lane[0];
    return value.lane[0];
}

INLINE floats rounded(floats value) { OF_LANES(floats, number_of(nearest_number(value.lane[i]))); }

/* Of the first numbers, which alone may be read, as many as there are in `which`. */
INLINE floats load16(const bits16 *from, lanes which)
{
    OF_LANES(floats, which >> i & 1 ? number_of(from[i]) : 0);
}

INLINE void store16(bits16 *to, lanes which, floats value)
{
    for (int i = 0; i < 16; i++)
        if (which >> i & 1)
            to[i] = nearest_number(value.lane[i]);
}

INLINE words load_words(const void *from)
{
    words result;
    memcpy(&result, from, sizeof result);
    return result;
}

INLINE words load_some_words(const void *from, lanes which)
{
    words result = {{0}};
    memcpy(&result, from, (size_t)__builtin_popcount(which) * sizeof *result.lane);
    return result;
}

INLINE void store_words(void *to, words value) { memcpy(to, &value, sizeof value); }
INLINE words shift_left(words value, int count) { OF_LANES(words, value.lane[i] << count); }
INLINE words shift_right(words value, int count) { OF_LANES(words, value.lane[i] >> count); }
INLINE words mask_of(words value, uint32_t mask) { OF_LANES(words, value.lane[i] & mask); }
INLINE words either(words a, words b) { OF_LANES(words, a.lane[i] | b.lane[i]); }
INLINE floats floats_of_bits(words bits) { OF_LANES(floats, float_of_bits(bits.lane[i])); }
INLINE words bits_of_floats(floats value) { OF_LANES(words, bits_of_float(value.lane[i])); }
INLINE floats floats_of_integers(words value) { OF_LANES(floats, (float)(int32_t)value.lane[i]); }
INLINE one_float one_of(const float *from) { return *from; }
INLINE floats one_times_plus(one_float a, floats b, floats c) { OF_LANES(floats, a * b.lane[i] + c.lane[i]); }

#define OF_BYTES(expression)                                                                                           \
    bytes result;                                                                                                      \
    for (int i = 0; i < 64; i++)                                                                                       \
        result.byte[i] = (uint8_t)(expression);                                                                        \
    return result

INLINE bytes load_bytes(const uint8_t *from) { OF_BYTES(from[i]); }
INLINE bytes lower_nibbles(bytes value) { OF_BYTES(value.byte[i] & 15); }
INLINE bytes upper_nibbles(bytes value) { OF_BYTES(value.byte[i] >> 4); }
INLINE bytes look_up_bytes(const uint8_t table[16], bytes places) { OF_BYTES(table[places.byte[i]]); }

/* The first or second 8 bytes of each 16, of both in turn. */
INLINE words interleaved(bytes low, bytes high, int from)
{
    words result;
    uint8_t mixed[64];
    for (int i = 0; i < 32; i++) {
        mixed[2 * i] = low.byte[i / 8 * 16 + from + i % 8];
        mixed[2 * i + 1] = high.byte[i / 8 * 16 + from + i % 8];
    }
    memcpy(&result, mixed, sizeof result);
    return result;
}

INLINE words interleave_lower(bytes low, bytes high) { return interleaved(low, high, 0); }
INLINE words interleave_upper(bytes low, bytes high) { return interleaved(low, high, 8); }

#ifdef IN_FLOAT16
/* The lower and the upper 16 bits of each. */
INLINE void widen_pairs(words pairs, floats *lower, floats *upper)
{
    for (int i = 0; i < 16; i++) {
        lower->lane[i] = number_of((bits16)pairs.lane[i]);
        upper->lane[i] = number_of((bits16)(pairs.lane[i] >> 16));
    }
}
#endif

#include "instructions/float_operands.h"
#include "instructions/decoding.h"
#define PACKS_PORTABLY
#endif
