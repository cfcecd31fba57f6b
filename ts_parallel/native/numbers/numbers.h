/* How the numbers of a weight's panels are stored, and read as bfloat16.
 *
 * A pair is two input features of a panel's 64 outputs, four vectors of 16 outputs with both of an output side by side.
 * BFLOAT16 stores the vectors as they are multiplied, CODED the same bits in fewer (coded.h). INT8 stores a byte of each
 * number, its sign and its magnitude, in the order of coded.h. INT4 stores 32 times 16 bits: number i of all four
 * vectors from the lowest bits up, each 8 more than it means. Small integers are exact in bfloat16. The scales of one or
 * more pairs, one of each output, are bfloat16, chosen before the integers, and multiplied by what the integers sum to.
 */
#ifndef TS_PARALLEL_NUMBERS_H
#define TS_PARALLEL_NUMBERS_H

#include <stdlib.h>

#include "numbers/coded.h"

enum number_kind { BFLOAT16, INT8, INT4, CODED };

static inline int64_t bytes_of_pair(enum number_kind kind)
{
    return kind == CODED ? CODED_PAIR : 2 * PANEL * (int64_t)sizeof(bf16) >> kind;
}

static inline int64_t bytes_of_panel(enum number_kind kind, int64_t num_pairs)
{
    return kind == CODED ? bytes_of_coded_panel(num_pairs) : num_pairs * bytes_of_pair(kind);
}

/* The numbers of one panel. */
struct panel {
    enum number_kind kind;
    int64_t num_pairs;
    const uint8_t *numbers;
    const struct coded_panel *head; /* where they are codes */
    const bf16 *scales;             /* [groups of inputs, 64] of integers */
    int64_t pairs_a_group;
    bf16 *kept; /* where whoever reads codes or integers shall leave them in bfloat16, or NULL */
    /* What comes into the cache while the numbers are multiplied, so much with each pair. */
    const uint8_t *ahead;
    int64_t bytes_ahead;
};

/* What 16 bits with these 5 lowest mean in bfloat16: the fifth belongs to the next number. */
INLINE __m512i nibble_table(void)
{
    const __m512i meanings = _mm512_setr_epi32(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m256i values = narrow(_mm512_cvtepi32_ps(meanings));
    return _mm512_broadcast_i64x4(values);
}

/* The bytes of the bfloat16 of all magnitudes, 0 to 127: first the lower ones, then the upper ones. */
INLINE void magnitude_tables(__m512i tables[4])
{
    __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m128i bytes[2][8];
    for (int i = 0; i < 8; i++) {
        __m256i bits = narrow(_mm512_cvtepi32_ps(_mm512_add_epi32(number, _mm512_set1_epi32(16 * i))));
        bytes[0][i] = _mm256_cvtepi16_epi8(bits);
        bytes[1][i] = _mm256_cvtepi16_epi8(_mm256_srli_epi16(bits, 8));
    }
    memcpy(tables, bytes, sizeof bytes);
}

/* What is known while a panel's pairs are read one after another. */
struct decoder {
    __m512i table[4];          /* what a code, a nibble or a byte means */
    const uint32_t *exception; /* the next one of a coded panel */
};

INLINE struct decoder make_decoder(const enum number_kind kind, const struct coded_panel *head)
{
    struct decoder decoder = {.exception = kind == CODED ? head->exceptions : NULL};
    switch (kind) {
    case BFLOAT16: break;
    case CODED: decoder.table[0] = upper_bytes(head); break;
    case INT8: magnitude_tables(decoder.table); break;
    case INT4: decoder.table[0] = nibble_table(); break;
    }
    return decoder;
}

/* Four vectors of pair number `pair`. */
INLINE void load_pair(const enum number_kind kind, const uint8_t *from, int64_t pair, struct decoder *decoder,
                      __m512bh weight[4])
{
    const __m512i *table = decoder->table;
    switch (kind) {
    case BFLOAT16:
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++)
            weight[part] = (__m512bh)_mm512_loadu_si512(from + 64 * part);
        break;
    case CODED:
        load_coded(from, table[0], weight);
        if (__builtin_expect(*decoder->exception >> 15 == pair + 1, 0)) {
            __m512bh mended[4] = {weight[0], weight[1], weight[2], weight[3]}; /* so these stay in registers */
            decoder->exception = put_exceptions(decoder->exception, (uint8_t *)mended);
            memcpy(weight, mended, sizeof mended);
        }
        break;
    case INT8:
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i bytes = _mm512_loadu_si512(from + 64 * half);
            __m512i low = _mm512_permutex2var_epi8(table[0], bytes, table[1]);
            __m512i high = _mm512_permutex2var_epi8(table[2], bytes, table[3]);
            /* high | bytes & 0x80 */
            high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8((char)0x80), 0xf8);
            weight[2 * half] = (__m512bh)_mm512_unpacklo_epi8(low, high);
            weight[2 * half + 1] = (__m512bh)_mm512_unpackhi_epi8(low, high);
        }
        break;
    case INT4: {
        __m512i nibbles = _mm512_loadu_si512(from);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++)
            weight[part] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 4 * part), table[0]);
    }
    }
}

/* Memory of the calling thread, until its next call with this `number` (0 or 1), at a multiple of 64; NULL where there
 * is none. */
static inline void *scratch_of(size_t num_bytes, int number)
{
    static _Thread_local void *scratch[2];
    static _Thread_local size_t size[2];
    if (num_bytes > size[number]) {
        free(scratch[number]);
        scratch[number] = aligned_alloc(64, (num_bytes + 63) / 64 * 64);
        size[number] = scratch[number] ? num_bytes : 0;
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
                    int integer = integers[16 * vector + lane][2 * pair + j], place = 32 * vector + 2 * lane + j;
                    uint8_t *both = &to[4 * lane + 2 * j + vector / 2];
                    if (kind == INT8)
                        to[place / 64 * 64 + byte_of(place)] = (uint8_t)(integer < 0 ? 0x80 - integer : integer);
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
