/* How the numbers of a weight's panels are stored, and read in 16 bits.
 *
 * A pair is two input features of a panel's 64 outputs, four vectors of 16 outputs with both of an output side by side.
 * PLAIN stores the vectors as they are multiplied, CODED the same bits in fewer, where they are bfloat16 (coded.h). INT8
 * stores a byte of each number, as instructions/ like to read it, in the order of coded.h. INT4 stores 32 times 16 bits: number
 * i of all four vectors from the lowest bits up, each 8 more than it means. Small integers are exact in 16 bits. The
 * scales of one or more pairs, one of each output, have 16 bits, are chosen before the integers, and multiplied by what
 * the integers sum to.
 */
#ifndef TS_PARALLEL_NUMBERS_H
#define TS_PARALLEL_NUMBERS_H

#include <math.h>
#include <stdlib.h>

#include "numbers/coded.h"

enum number_kind { PLAIN, INT8, INT4, CODED };

static inline int64_t bytes_of_pair(enum number_kind kind)
{
    return kind == CODED ? CODED_PAIR : 2 * PANEL * (int64_t)sizeof(bits16) >> kind;
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
    const bits16 *scales;             /* [groups of inputs, 64] of integers */
    int64_t pairs_a_group;
    bits16 *kept; /* where whoever reads codes or integers shall leave them PLAIN, or NULL */
    /* What comes into the cache while the numbers are multiplied, so much with each pair. */
    const uint8_t *ahead;
    int64_t bytes_ahead;
};

/* What is known while a panel's pairs are read one after another. */
struct decoder {
    struct tables tables;      /* what a code, a nibble or a byte means */
    const uint32_t *exception; /* the next one of a coded panel */
};

INLINE struct decoder make_decoder(const enum number_kind kind, const struct coded_panel *head)
{
    struct decoder decoder = {.exception = kind == CODED ? head->exceptions : NULL};
    switch (kind) {
    case PLAIN: break;
    case CODED: decoder.tables = coded_table(head->upper); break;
    case INT8: decoder.tables = int8_table(); break;
    case INT4: decoder.tables = int4_table(); break;
    }
    return decoder;
}

/* The weights of `parts` times 16 outputs, from part number `first` on, of pair number `pair`: a single part only where
 * they are PLAIN, else two or all four. */
INLINE void load_pair(const enum number_kind kind, const uint8_t *from, int64_t pair, const int first, const int parts,
                      struct decoder *decoder, operand weights[4])
{
    const struct tables *tables = &decoder->tables;
    if (kind == PLAIN)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            weights[part] = load_operand((const bits16 *)from + 32 * (first + part));
    else
#pragma GCC unroll 2
        for (int part = 0; part < parts; part += 2) {
            int half = (first + part) / 2;
            switch (kind) {
            case CODED: decode_coded(from, half, tables, weights + part); break;
            case INT8: decode_int8(from, half, tables, weights + part); break;
            default: decode_int4(from, half, tables, weights + part); break;
            }
        }
    if (kind == CODED && __builtin_expect(*decoder->exception >> 15 == pair + 1, 0)) {
        _Alignas(64) bits16 mended[2 * PANEL]; /* so that what is not mended stays in registers */
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            keep_operand(mended + 32 * (first + part), weights[part]);
        decoder->exception = put_exceptions(decoder->exception, (uint8_t *)mended);
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            weights[part] = load_operand(mended + 32 * (first + part));
    }
}

#define CALLERS_SCRATCH 2 /* what tasks of all threads read; the others are a task's own */

/* Memory of the calling thread, until its next call with this `place` (0 to 2), at a multiple of 64; NULL where there
 * is none. */
static inline void *scratch_of(size_t num_bytes, int place)
{
    static _Thread_local void *scratch[3];
    static _Thread_local size_t size[3];
    if (num_bytes > size[place]) {
        free(scratch[place]);
        scratch[place] = aligned_alloc(64, (num_bytes + 63) / 64 * 64);
        size[place] = scratch[place] ? num_bytes : 0;
    }
    return scratch[place];
}

/* The scale of `count` numbers, rounded to 16 bits, by which the largest is the integer `largest`; its inverse. Where few
 * bits are left of it, in float16 below 2^-14, no number may be off by more than half a scale: it is the next one then.
 * And what was finite has to stay so. */
INLINE float choose_scale(const bits16 *from, int64_t count, int largest, bits16 *scale)
{
    float most = number_of((bits16)largest_bits_of_row(from, count));
    store16(scale, 1, over(all(most), all((float)largest)));
    if (most > number_of(*scale) * ((float)largest + 0.5f))
        ++*scale;
    if (most < INFINITY && nearest_number(number_of(*scale) * (float)largest) == INFINITE)
        --*scale;
    float value = number_of(*scale);
    return value > 0 ? 1 / value : 0;
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
                        to[place / 64 * 64 + byte_of(place)] = byte_of_integer(integer);
                    else
                        *both = (uint8_t)(vector % 2 ? *both | (integer + 8) << 4 : integer + 8);
                }
}

/* The panels of `num_rows` rows of a weight that is integers already, which begin with a whole panel. */
static void place_rows(enum number_kind kind, uint8_t *to, const int8_t *from, int64_t num_rows, int64_t num_inputs,
                       int64_t stride)
{
    for (int64_t first = 0; first < num_rows; first += PANEL)
        for (int64_t at = 0, count; at < num_inputs; at += count, to += count / 2 * bytes_of_pair(kind)) {
            int8_t integers[PANEL][32] = {0};
            int64_t own = num_rows - first < PANEL ? num_rows - first : PANEL;
            count = num_inputs - at < 32 ? num_inputs - at : 32;
            for (int64_t row = 0; row < own; row++)
                memcpy(integers[row], from + (first + row) * stride + at, (size_t)count);
            place_integers(kind, integers, count / 2, to);
        }
}

/* The panels of `num_rows` rows of a weight, which begin with a whole panel, as integers with scales. */
static void quantize_rows(enum number_kind kind, uint8_t *to, bits16 *scales, int64_t inputs_a_group,
                          const bits16 *from, int64_t num_rows, int64_t num_inputs, int64_t stride)
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
                    choose_integers(from + (first + row) * stride + at, count, inverse[row], largest,
                                    integers[row]);
                place_integers(kind, integers, count / 2, to);
            }
        }
}
#endif
