/* Stored numbers (numbers/numbers.h) to operands, where tables have 16 bytes.
 *
 * What includes it has `words`, sixteen of 32 bits, and `bytes`, 64 of them, in the order of AVX-512's lanes of 16.
 */
#ifndef TS_PARALLEL_DECODING_H
#define TS_PARALLEL_DECODING_H

struct tables {
    uint8_t upper[16];
};

INLINE struct tables coded_table(const uint8_t upper[16])
{
    struct tables tables;
    memcpy(tables.upper, upper, sizeof tables.upper);
    return tables;
}

INLINE struct tables int4_table(void) { return (struct tables){{0}}; }
INLINE struct tables int8_table(void) { return (struct tables){{0}}; }

/* A half of a pair: the weights of 32 outputs. */
INLINE void decode_coded(const uint8_t *from, int half, const struct tables *tables, operand weights[2])
{
    bytes codes = load_bytes(from), low = load_bytes(from + 64 + 64 * half);
    bytes high = look_up_bytes(tables->upper, half ? upper_nibbles(codes) : lower_nibbles(codes));
    weights[0] = operand_of(interleave_lower(low, high));
    weights[1] = operand_of(interleave_upper(low, high));
}

/* What a byte of INT8 is: 128 more than it means. */
INLINE uint8_t byte_of_integer(int integer) { return (uint8_t)(integer + 128); }
INLINE int integer_of_byte(uint8_t byte) { return byte - 128; }

/* The lowest 8 of 32 bits. */
INLINE floats signed_float(words number)
{
    return subtract(floats_of_integers(mask_of(number, 0xff)), all(128));
}

INLINE void decode_int8(const uint8_t *from, int half, const struct tables *tables, operand weights[2])
{
    (void)tables;
    bytes numbers = load_bytes(from + 64 * half), none;
    memset(&none, 0, sizeof none);
    words pairs[2] = {interleave_lower(numbers, none), interleave_upper(numbers, none)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        weights[i] = operand_of_floats(signed_float(pairs[i]), signed_float(shift_right(pairs[i], 16)));
}

INLINE void decode_int4(const uint8_t *from, int half, const struct tables *tables, operand weights[2])
{
    (void)tables;
    words nibbles = load_words(from);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        words own = shift_right(nibbles, 4 * (2 * half + i));
        floats first = subtract(floats_of_integers(mask_of(own, 15)), all(8));
        floats second = subtract(floats_of_integers(mask_of(shift_right(own, 16), 15)), all(8));
        weights[i] = operand_of_floats(first, second);
    }
}
#endif
