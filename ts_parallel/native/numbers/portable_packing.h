/* The ways of a weight into its panels in plain C, once for each weight: the compiler knows what vectors there are. */
#ifndef TS_PARALLEL_PORTABLE_PACKING_H
#define TS_PARALLEL_PORTABLE_PACKING_H

#include <math.h>

#include "numbers/coded.h"

/* The bits, without a sign, of the number that is furthest from zero. */
INLINE uint32_t largest_bits_of_row(const bits16 *from, int64_t count)
{
    uint16_t most = 0; /* without their signs, numbers are in the order of their bits */
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits = from[i] & 0x7fff;
        most = bits > most ? bits : most;
    }
    return most;
}

/* The integers next to `count` numbers, at most 32, times `inverse`. */
INLINE void choose_integers(const bits16 *from, int64_t count, float inverse, int largest, int8_t to[32])
{
    for (int64_t i = 0; i < 32; i++) {
        float number = nearbyintf(i < count ? number_of(from[i]) * inverse : 0);
        to[i] = (int8_t)(number > (float)largest ? largest : number < (float)-largest ? -largest : (int)number);
    }
}

/* `count` numbers, at most 32, of each of 16 rows, of which `num_rows` are there, to `num_pairs` pairs of 16 rows, a
 * panel's width apart. */
INLINE void transpose_pairs(const bits16 *const rows[16], int64_t num_rows, int64_t count, bits16 *to, int64_t width,
                            int64_t num_pairs)
{
    for (int i = 0; i < 16; i++)
        for (int64_t pair = 0; pair < num_pairs; pair++) {
            uint32_t numbers = 0;
            if (i < num_rows && 2 * pair < count)
                memcpy(&numbers, rows[i] + 2 * pair, sizeof numbers);
            memcpy(to + pair * width + 2 * i, &numbers, sizeof numbers);
        }
}

/* The codes and lower bytes of one pair, `numbers` [64, 2], as numbers/coded.h has them; of each half, which bytes
 * belong to exceptions. `base` is the upper byte of code 0. */
INLINE void code_pair(const bits16 *numbers, int base, uint8_t *to, uint64_t exceptions[2])
{
    for (int half = 0; half < 2; half++) {
        exceptions[half] = 0;
        for (int byte = 0; byte < 64; byte++) {
            uint32_t place = place_of(byte, half);
            int size = numbers[place] >> 8 & 0x7f, code = size > base ? size - base : 0;
            exceptions[half] |= (uint64_t)(!code && size) << byte;
            code |= numbers[place] >> 12 & 8;
            to[byte] = (uint8_t)(half ? to[byte] | code << 4 : code);
            to[64 + 64 * half + byte] = (uint8_t)numbers[place];
        }
    }
}
#endif
