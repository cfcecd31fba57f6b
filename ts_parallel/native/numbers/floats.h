/* Vectors of 16 bits and of float32 whatever the processor: what follows from instructions/, which are chosen by the
 * build: each file there has the same names. */
#ifndef TS_PARALLEL_FLOATS_H
#define TS_PARALLEL_FLOATS_H

#include "numbers/formats.h"
#include INSTRUCTIONS

INLINE lanes first16(int64_t count)
{
    return count >= 16 ? 0xffff : (lanes)((1u << count) - 1);
}

/* e^value within 2 units in the last place; zero below -87. Cody and Waite's reduction, Cephes' polynomial. */
INLINE floats exp16(floats value)
{
    lanes is_normal = is_at_least(value, all(-87.3f));
    value = lesser(value, all(88.3f));
    floats power = nearest(times(value, all(1.44269504f)));
    floats rest = minus_times(power, all(0.693359375f), value);
    rest = minus_times(power, all(-2.12194440e-4f), rest);
    floats sum = all(1.9875691500e-4f);
    sum = times_plus(sum, rest, all(1.3981999507e-3f));
    sum = times_plus(sum, rest, all(8.3334519073e-3f));
    sum = times_plus(sum, rest, all(4.1665795894e-2f));
    sum = times_plus(sum, rest, all(1.6666665459e-1f));
    sum = times_plus(sum, rest, all(5.0000001201e-1f));
    sum = times_plus(sum, times(rest, rest), add(rest, all(1.0f)));
    return where(is_normal, times_power_of_2(sum, power), all(0));
}
#endif
