/* What a layer does between its matrix products: each as torch rounds it, in one pass. */
#ifndef TS_PARALLEL_ELEMENTWISE_H
#define TS_PARALLEL_ELEMENTWISE_H

#include <math.h>

#include "numbers/floats.h"
#include "pool.h"

#define ROWS_A_TASK 16

struct norm_call {
    const bits16 *input, *weight; /* [T, K], [K] */
    bits16 *output;               /* [T, K] */
    int64_t num_rows, width;
    int is_offset; /* multiply by 1 + weight, before rounding (Gemma), not by weight after it (Llama) */
    float epsilon;
};

/* Root mean square normalisation (Zhang and Sennrich 2019). */
static void norm_task(const void *argument, int64_t index)
{
    const struct norm_call *call = argument;
    int64_t end = (index + 1) * ROWS_A_TASK < call->num_rows ? (index + 1) * ROWS_A_TASK : call->num_rows;
    for (int64_t row = index * ROWS_A_TASK; row < end; row++) {
        const bits16 *input = call->input + row * call->width;
        floats squares = all(0);
        for (int64_t at = 0; at < call->width; at += 16) {
            floats value = load16(input + at, first16(call->width - at));
            squares = times_plus(value, value, squares);
        }
        float mean = sum_of(squares) / (float)call->width;
        floats scale = all(1.0f / sqrtf(mean + call->epsilon));
        for (int64_t at = 0; at < call->width; at += 16) {
            lanes mask = first16(call->width - at);
            floats value = times(load16(input + at, mask), scale), weight = load16(call->weight + at, mask);
            if (call->is_offset)
                weight = add(weight, all(1.0f));
            else
                value = rounded(value);
            store16(call->output + row * call->width + at, mask, times(value, weight));
        }
    }
}

struct rotary_call {
    const bits16 *input; /* [T, H, D] */
    int64_t token_stride, head_stride, num_tokens, num_heads, head_dim;
    const bits16 *cosine, *sine; /* [T, D], the second half as the first or not */
    bits16 *output;              /* [T, H, D], contiguous */
};

/* Rotary position embedding (Su et al. 2021) of one head: x cos + (-x2, x1) sin for its halves. */
INLINE void turn(const bits16 *input, const bits16 *cosine, const bits16 *sine, int64_t head_dim, bits16 *output)
{
    int64_t half = head_dim / 2;
    for (int64_t at = 0; at < half; at += 16) {
        lanes mask = first16(half - at);
        floats first = load16(input + at, mask), second = load16(input + half + at, mask);
        floats a = rounded(times(first, load16(cosine + at, mask)));
        floats b = rounded(times(second, load16(sine + at, mask)));
        floats c = rounded(times(second, load16(cosine + half + at, mask)));
        floats d = rounded(times(first, load16(sine + half + at, mask)));
        store16(output + at, mask, subtract(a, b));
        store16(output + half + at, mask, add(c, d));
    }
}

static void rotary_task(const void *argument, int64_t index)
{
    const struct rotary_call *call = argument;
    int64_t end = (index + 1) * ROWS_A_TASK < call->num_tokens ? (index + 1) * ROWS_A_TASK : call->num_tokens;
    for (int64_t token = index * ROWS_A_TASK; token < end; token++)
        for (int64_t head = 0; head < call->num_heads; head++)
            turn(call->input + token * call->token_stride + head * call->head_stride,
                 call->cosine + token * call->head_dim, call->sine + token * call->head_dim, call->head_dim,
                 call->output + (token * call->num_heads + head) * call->head_dim);
}

struct add_call {
    const bits16 *first, *second;
    bits16 *output;
    int64_t count;
};

#define NUMBERS_A_TASK 16384

static void add_task(const void *argument, int64_t index)
{
    const struct add_call *call = argument;
    int64_t begin = index * NUMBERS_A_TASK, end = begin + NUMBERS_A_TASK;
    if (end > call->count)
        end = call->count;
    for (int64_t at = begin; at < end; at += 16) {
        lanes mask = first16(end - at);
        store16(call->output + at, mask, add(load16(call->first + at, mask), load16(call->second + at, mask)));
    }
}
#endif
