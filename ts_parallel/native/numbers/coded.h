/* Weights in bfloat16 that take 12 bits each, and lose none.
 *
 * The lower byte of a bfloat16, its exponent's last bit and its mantissa, is as good as random. The upper one, its sign
 * and the rest of its exponent, is not: the exponents of a weight are few (DFloat11, Zhang et al. 2025). So 4 bits stand
 * for the upper byte: a sign, and one of the seven up to the panel's largest, or zero. Of smaller numbers, some 2^13 times
 * less than the largest, the upper bytes are listed: exceptions. As all codes have one length, they are read as fast as
 * memory gives them.
 *
 * A coded panel is its head with that list, then of each pair 64 bytes of two codes each and the 128 lower bytes, in the
 * order from which unpacking two vectors of bytes makes two of numbers: see `byte_of`. A panel with too many exceptions
 * lies elsewhere as it is, and only its head is read here: it takes 28 bits a number. Memory full of zeros is a panel of
 * zeros.
 */
#ifndef TS_PARALLEL_CODED_H
#define TS_PARALLEL_CODED_H

#include <stddef.h>

#include "numbers/floats.h"

#define PANEL 64
#define CODED_PAIR (3 * PANEL) /* bytes of 2 x 64 numbers */

struct coded_panel {
    _Alignas(64) uint8_t upper[16]; /* what each code stands for */
    const uint8_t *plain;           /* the panel where it is not coded, or NULL */
    uint32_t exceptions[];          /* pair by pair: 1 + its number << 15 | place in it << 8 | upper byte; at last 0 */
};

/* Room for one exception in 256 numbers, and what ends the list. */
static inline int64_t bytes_of_head(int64_t num_pairs)
{
    return ((int64_t)offsetof(struct coded_panel, exceptions) + (num_pairs / 2 + 1) * 4 + 63) / 64 * 64;
}

static inline int64_t bytes_of_coded_panel(int64_t num_pairs)
{
    return bytes_of_head(num_pairs) + num_pairs * CODED_PAIR;
}

/* The number at `place` of a pair [64 outputs, 2] is one of its first or second half, 0 or 1. Its code is the lower or
 * upper half of this byte, and its lower byte lies 64 or 128 behind. */
static inline int64_t byte_of(int64_t place)
{
    return place % 32 / 8 * 16 + place / 32 % 2 * 8 + place % 8;
}

static inline uint32_t place_of(int byte, int half)
{
    return (uint32_t)(half * 64 + byte % 16 / 8 * 32 + byte / 16 * 8 + byte % 8);
}

/* Put a pair's exceptions, the first of which is `next`, in their places. Returns the one behind them. */
__attribute__((noinline, cold)) static const uint32_t *put_exceptions(const uint32_t *next, uint8_t *numbers)
{
    for (uint32_t pair = *next >> 15; *next >> 15 == pair; next++) /* `pair` is not 0 */
        numbers[(*next >> 8 & 127) * 2 + 1] = (uint8_t)*next;
    return next;
}

/* Two numbers of a pair, the first at `place`; not so where they are exceptions. */
static inline void decode_two(const struct coded_panel *panel, const uint8_t *from, int64_t place, bits16 to[2])
{
    for (int64_t half = place / 64, i = 0; i < 2; i++) {
        const uint8_t *byte = from + byte_of(place + i);
        to[i] = (bits16)(panel->upper[*byte >> 4 * half & 15] << 8 | byte[64 + 64 * half]);
    }
}

/* Put right the two numbers at `place` of all pairs [num_pairs, 2]. */
static inline void decode_exceptions(const struct coded_panel *panel, int64_t place, bits16 *to)
{
    for (const uint32_t *next = panel->exceptions; *next; next++)
        if ((*next >> 8 & 127) / 2 == place / 2) {
            bits16 *number = to + ((*next >> 15) - 1) * 2 + (*next >> 8 & 1);
            *number = (bits16)((*next & 255) << 8 | (*number & 255));
        }
}

/* What the codes are to mean, where `largest` is the largest upper byte without a sign: 0 is zero, i is the byte i above
 * what this returns, and 8 + i the same with a sign. */
static inline int choose_codes(int largest, struct coded_panel *panel)
{
    int base = largest > 7 ? largest - 7 : 0;
    for (int code = 0; code < 8; code++) {
        panel->upper[code] = (uint8_t)(code ? base + code : 0);
        panel->upper[8 + code] = panel->upper[code] | 0x80;
    }
    return base;
}

#ifdef PACKS_PORTABLY
#include "numbers/portable_packing.h"
#endif
#endif
