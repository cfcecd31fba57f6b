/* A sublayer of a decoder (Vaswani et al. 2017) as one call: norm, linears, attention or a gate, the linear behind it;
 * and many in a row as one.
 *
 * What lies between is nobody else's, so it has no tensors; and from one product to the next the interpreter, which
 * other threads use too, need not be waited for.
 */
#ifndef TS_PARALLEL_SUBLAYER_H
#define TS_PARALLEL_SUBLAYER_H

#include "operations/attention.h"
#include "operations/elementwise.h"
#include "operations/linear.h"

struct sublayer {
    const bits16 *weight; /* of the norm, [K] */
    int is_offset;
    float epsilon;
    const struct linear *first; /* queries, keys and values, or a gated pair */
    const struct linear *last;
    const struct site *site; /* NULL where there is a gate */
};

struct sublayer_call {
    const struct sublayer *sublayer;
    const struct step *step;
    const bits16 *cosine, *sine; /* [T, D] */
    const bits16 *input;         /* [T, K] */
    int64_t num_tokens;
    const bits16 *residual; /* [T, N] or NULL */
    bits16 *output;         /* [T, N] */
};

/* `between` is what lies between the first linear and the last, [T, inputs of the last]; `heads` are queries, keys and
 * values, each [T, its outputs]. */
static inline int attend_sublayer(const struct sublayer_call *call, bits16 *const heads[3], bits16 *between,
                                  int num_threads)
{
    const struct site *site = call->sublayer->site;
    const struct linear_part *parts = call->sublayer->first->parts;
    struct attention_call attention = {
        .site = site,
        .step = call->step,
        .query = {heads[0], site->head_dim, parts[0].num_outputs},
        .key = {heads[1], site->head_dim, parts[1].num_outputs},
        .value = {heads[2], site->value_dim, parts[2].num_outputs},
        .output = {between, site->value_dim, site->num_heads * site->value_dim},
        .cosine = call->cosine,
        .sine = call->sine,
    };
    return attention_run(&attention, num_threads);
}

/* Returns 0 where there is no memory. */
static inline int sublayer_run(const struct sublayer_call *call, int num_threads)
{
    const struct sublayer *sublayer = call->sublayer;
    int64_t num_tokens = call->num_tokens, width = sublayer->first->num_inputs, inner = sublayer->last->num_inputs;
    int64_t size = width + inner;
    for (int i = 0; sublayer->site && i < sublayer->first->num_parts; i++)
        size += sublayer->first->parts[i].num_outputs;
    bits16 *room = malloc((size_t)(num_tokens * size) * sizeof *room);
    if (!room)
        return 0;
    bits16 *normed = room, *between = normed + num_tokens * width, *heads[3] = {between + num_tokens * inner};
    struct norm_call norm = {call->input, sublayer->weight,    normed,           num_tokens,
                             width,       sublayer->is_offset, sublayer->epsilon};
    struct linear_call first = {.layer = sublayer->first, .input = normed, .stride = width, .num_tokens = num_tokens};
    struct linear_call last = {.layer = sublayer->last,
                               .input = between,
                               .stride = inner,
                               .num_tokens = num_tokens,
                               .residual = call->residual,
                               .outputs = {call->output}};
    int done;
    pool_run(norm_task, &norm, (num_tokens + ROWS_A_TASK - 1) / ROWS_A_TASK, num_threads);
    if (sublayer->site) {
        for (int i = 0; i < 3; i++) {
            if (i)
                heads[i] = heads[i - 1] + num_tokens * sublayer->first->parts[i - 1].num_outputs;
            first.outputs[i] = heads[i];
        }
    } else {
        first.outputs[0] = between;
    }
    done = linear_run(&first, num_threads);
    if (done && sublayer->site)
        done = attend_sublayer(call, heads, between, num_threads);
    done = done && linear_run(&last, num_threads);
    free(room);
    return done;
}

/* Sublayers one after the other: each adds what it gives to what the one before gave, the first to its input. */
struct stack_call {
    const struct sublayer *const *sublayers;
    int64_t num_sublayers;
    const struct step *step;
    const bits16 *cosine, *sine; /* [T, D] */
    const bits16 *input;         /* [T, K] */
    int64_t num_tokens;
    bits16 *output; /* [T, K] */
    /* Where each rank has a part of what is added: has to sum `count` numbers over the ranks in place, or return 0. */
    int (*sum)(void *ranks, bits16 *numbers, int64_t count);
    void *ranks;
};

enum stack_end { STACK_DONE, STACK_NO_MEMORY, STACK_NO_SUM };

static inline enum stack_end stack_run(const struct stack_call *call, int num_threads)
{
    int64_t count = call->num_tokens * call->sublayers[0]->first->num_inputs;
    struct sublayer_call one = {.step = call->step, .cosine = call->cosine, .sine = call->sine,
                                .num_tokens = call->num_tokens};
    bits16 *part = call->sum ? malloc((size_t)count * sizeof *part) : NULL;
    enum stack_end end = call->sum && !part ? STACK_NO_MEMORY : STACK_DONE;
    const bits16 *input = call->input;
    for (int64_t i = 0; i < call->num_sublayers && end == STACK_DONE; i++, input = call->output) {
        one.sublayer = call->sublayers[i];
        one.input = input;
        one.residual = part ? NULL : input;
        one.output = part ? part : call->output;
        if (!sublayer_run(&one, num_threads))
            end = STACK_NO_MEMORY;
        else if (part && !call->sum(call->ranks, part, count))
            end = STACK_NO_SUM;
        else if (part) {
            struct add_call add = {input, part, call->output, count};
            pool_run(add_task, &add, (count + NUMBERS_A_TASK - 1) / NUMBERS_A_TASK, num_threads);
        }
    }
    free(part);
    return end;
}
#endif
