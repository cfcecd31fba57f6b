/* How the numbers of a weight's panels are stored, and read as bfloat16.
 *
 * A pair is two input features of a panel's 64 outputs, four vectors of 16 outputs with both of an output side by side.
 * BFLOAT16 stores the vectors as they are multiplied. INT8 stores 32 bytes of each vector: the first feature of its 16
 * outputs, then the second. INT4 stores 32 times 16 bits: number i of all four vectors from the lowest bits up, each 8
 * more than it means. Small integers are exact in bfloat16. The scales of one or more pairs, one of each output, are
 * bfloat16, chosen before the integers, and multiplied by what the integers sum to.
 */
#ifndef TS_PARALLEL_NUMBERS_H
#define TS_PARALLEL_NUMBERS_H

#include <stdlib.h>

#include "bf16.h"

#define PANEL 64

enum number_kind { BFLOAT16, INT8, INT4 };

static inline int64_t bytes_of_pair(enum number_kind kind)
{
    return 2 * PANEL * (int64_t)sizeof(bf16) >> kind;
}

/* The numbers of one panel. */
struct panel {
    const uint8_t *numbers;
    const bf16 *scales; /* [num_pairs / pairs_a_group, 64], or NULL */
    int64_t num_pairs;
    int64_t pairs_a_group;
    enum number_kind kind;
    bf16 *kept; /* where whoever reads integers shall leave them in bfloat16, or NULL */
};

/* What 16 bits with these 5 lowest mean in bfloat16: the fifth belongs to the next number. */
INLINE __m512i nibble_table(void)
{
    const __m512i meanings = _mm512_setr_epi32(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m256i values = narrow(_mm512_cvtepi32_ps(meanings));
    return _mm512_broadcast_i64x4(values);
}

/* The bfloat16 of 16 bytes. */
INLINE __m512i floats_of_bytes(const uint8_t *from)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)from);
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}

/* Four vectors of one pair. */
INLINE void load_pair(const enum number_kind kind, const uint8_t *from, __m512i table, __m512bh weight[4])
{
    __m512i nibbles = kind == INT4 ? _mm512_loadu_si512(from) : table;
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++)
        switch (kind) {
        case BFLOAT16: weight[part] = (__m512bh)_mm512_loadu_si512(from + 64 * part); break;
        case INT8: {
            /* A float of 8 bits is zero in its lower half, and its upper half is the bfloat16. */
            __m512i first = floats_of_bytes(from + 32 * part), second = floats_of_bytes(from + 32 * part + 16);
            weight[part] = (__m512bh)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second);
            break;
        }
        case INT4:
            weight[part] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 4 * part), table);
            break;
        }
}

/* Memory of the calling thread for a panel's numbers in bfloat16, until its next call with this `number` (0 or 1); NULL
 * where there is none. */
static inline bf16 *scratch_of(int64_t num_pairs, int number)
{
    static _Thread_local bf16 *scratch[2];
    static _Thread_local int64_t size[2];
    int64_t wanted = num_pairs * bytes_of_pair(BFLOAT16);
    if (wanted > size[number]) {
        free(scratch[number]);
        scratch[number] = aligned_alloc(64, (size_t)wanted);
        size[number] = scratch[number] ? wanted : 0;
    }
    return scratch[number];
}

/* The scale of `count` numbers, rounded to bfloat16, by which the largest is the integer `largest`; its inverse. */
INLINE float choose_scale(const bf16 *from, int64_t count, int largest, bf16 *scale)
{
    __m512i most = _mm512_setzero_si512(); /* without their signs, numbers are in the order of their bits */
    for (int64_t i = 0; i < count; i += 32) {
        __m512i bits = _mm512_maskz_loadu_epi16(first32(count - i), from + i);
        most = _mm512_max_epu16(most, _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)));
    }
    most = _mm512_max_epu32(_mm512_srli_epi32(most, 16), _mm512_and_si512(most, _mm512_set1_epi32(0xffff)));
    __m512 number = _mm512_castsi512_ps(_mm512_set1_epi32((int)(_mm512_reduce_max_epu32(most) << 16)));
    number = _mm512_div_ps(number, _mm512_set1_ps((float)largest));
    store16(scale, 1, number);
    float value = _mm512_cvtss_f32(rounded(number));
    return value > 0 ? 1 / value : 0;
}

/* The integers next to 32 numbers, of which those of the mask are there. */
INLINE void choose_integers(const bf16 *from, __mmask32 mask, float inverse, int largest, int8_t to[32])
{
    for (int half = 0; half < 2; half++) {
        __m512 number = _mm512_mul_ps(load16(from + 16 * half, (__mmask16)(mask >> 16 * half)),
                                      _mm512_set1_ps(inverse));
        __m512i integer = _mm512_min_epi32(_mm512_cvtps_epi32(number), _mm512_set1_epi32(largest));
        integer = _mm512_max_epi32(integer, _mm512_set1_epi32(-largest));
        _mm_storeu_si128((__m128i *)(to + 16 * half), _mm512_cvtepi32_epi8(integer));
    }
}

static inline void place_integers(enum number_kind kind, const int8_t integers[PANEL][32], int64_t num_pairs,
                                  uint8_t *to)
{
    for (int64_t pair = 0; pair < num_pairs; pair++, to += bytes_of_pair(kind))
        for (int vector = 0; vector < 4; vector++)
            for (int j = 0; j < 2; j++)
                for (int lane = 0; lane < 16; lane++) {
                    int integer = integers[16 * vector + lane][2 * pair + j];
                    uint8_t *both = &to[4 * lane + 2 * j + vector / 2];
                    if (kind == INT8)
                        to[32 * vector + 16 * j + lane] = (uint8_t)integer;
                    else
                        *both = (uint8_t)(vector % 2 ? *both | (integer + 8) << 4 : integer + 8);
                }
}

/* The panels of `num_rows` rows of a weight, which begin with a whole panel, as integers with scales. */
AVX512_BF16 static void quantize_rows(enum number_kind kind, uint8_t *to, bf16 *scales, int64_t inputs_a_group,
                                      const bf16 *from, int64_t num_rows, int64_t num_inputs, int64_t stride)
{
    const int largest = kind == INT8 ? 127 : 7;
    for (int64_t first = 0; first < num_rows; first += PANEL)
        for (int64_t begin = 0, end; begin < num_inputs; begin = end, scales += PANEL) {
            float inverse[PANEL] = {0};
            int8_t integers[PANEL][32] = {0};
            int64_t own = num_rows - first < PANEL ? num_rows - first : PANEL;
            end = begin + inputs_a_group < num_inputs ? begin + inputs_a_group : num_inputs;
            memset(scales, 0, PANEL * sizeof *scales);
            for (int64_t row = 0; row < own; row++)
                inverse[row] = choose_scale(from + (first + row) * stride + begin, end - begin, largest, scales + row);
            for (int64_t at = begin, count; at < end; at += count, to += count / 2 * bytes_of_pair(kind)) {
                count = end - at < 32 ? end - at : 32;
                for (int64_t row = 0; row < own; row++)
                    choose_integers(from + (first + row) * stride + at, first32(count), inverse[row], largest,
                                    integers[row]);
                place_integers(kind, integers, count / 2, to);
            }
        }
}
#endif
