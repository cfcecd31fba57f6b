/* Weights of 16 bits multiplied as float32, where the processor multiplies nothing else as fast.
 *
 * What includes it has `words`, sixteen of 32 bits, and for float16 `widen_pairs`.
 */
#ifndef TS_PARALLEL_FLOAT_OPERANDS_H
#define TS_PARALLEL_FLOAT_OPERANDS_H

/* A pair of inputs' weights for 16 outputs. */
typedef struct {
    floats first, second;
} operand;

typedef float number; /* what inputs are read as */

/* A pair of inputs. */
typedef struct {
    one_float first, second; /* the same number in every lane of a register */
} both;

#ifdef IN_FLOAT16
INLINE operand operand_of(words pairs)
{
    operand weights;
    widen_pairs(pairs, &weights.first, &weights.second);
    return weights;
}

/* In panels the firsts of 16 pairs lie before the seconds: to sort them takes longer than to multiply them. */
INLINE operand load_operand(const bits16 *from) { return (operand){load16(from, 0xffff), load16(from + 16, 0xffff)}; }

INLINE void keep_operand(bits16 *to, operand weights)
{
    store16(to, 0xffff, weights.first);
    store16(to + 16, 0xffff, weights.second);
}
#else
INLINE operand operand_of(words pairs)
{
    return (operand){floats_of_bits(shift_left(pairs, 16)), floats_of_bits(mask_of(pairs, 0xffff0000u))};
}

INLINE operand load_operand(const bits16 *from) { return operand_of(load_words(from)); }

INLINE void keep_operand(bits16 *to, operand weights)
{
    words first = shift_right(bits_of_floats(weights.first), 16);
    store_words(to, either(first, mask_of(bits_of_floats(weights.second), 0xffff0000u)));
}
#endif

INLINE operand operand_of_floats(floats first, floats second) { return (operand){first, second}; }
INLINE operand load_some(const bits16 *from, lanes which) { return operand_of(load_some_words(from, which)); }
INLINE operand first_alone(operand both) { return (operand){both.first, all(0)}; }
INLINE both pair_of(const number *from) { return (both){one_of(from), one_of(from + 1)}; }
INLINE void store_numbers(number *to, floats value) { store_floats(to, rounded(value)); }

INLINE floats dot(floats sum, operand weights, both inputs)
{
    return one_times_plus(inputs.second, weights.second, one_times_plus(inputs.first, weights.first, sum));
}

#endif
