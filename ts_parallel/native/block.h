/* Half a decoder layer as one call: norm, linears, attention or a gate, and the linear behind it.
 *
 * What lies between is nobody else's, so it has no tensors; and from one product to the next the interpreter, which
 * other threads use too, need not be waited for.
 */
#ifndef TS_PARALLEL_BLOCK_H
#define TS_PARALLEL_BLOCK_H

#include "attention.h"
#include "elementwise.h"
#include "linear.h"

struct block {
    const bf16 *weight; /* of the norm, [K] */
    int is_offset;
    float epsilon;
    const struct linear *first; /* queries, keys and values, or a gated pair */
    const struct linear *last;
    const struct site *site; /* NULL where there is a gate */
};

struct block_call {
    const struct block *block;
    const struct step *step;
    const bf16 *cosine, *sine; /* [T, D] */
    const bf16 *input;         /* [T, K] */
    int64_t num_tokens;
    const bf16 *residual; /* [T, N] or NULL */
    bf16 *output;         /* [T, N] */
};

/* `between` is what lies between the first linear and the last, [T, inputs of the last]; `heads` are queries, keys and
 * values, each [T, its outputs]. */
static inline int attend_block(const struct block_call *call, bf16 *const heads[3], bf16 *between, int num_threads)
{
    const struct site *site = call->block->site;
    const struct linear_part *parts = call->block->first->parts;
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
static inline int block_run(const struct block_call *call, int num_threads)
{
    const struct block *block = call->block;
    int64_t num_tokens = call->num_tokens, width = block->first->num_inputs, inner = block->last->num_inputs;
    int64_t size = width + inner;
    for (int i = 0; block->site && i < block->first->num_parts; i++)
        size += block->first->parts[i].num_outputs;
    bf16 *room = malloc((size_t)(num_tokens * size) * sizeof *room);
    if (!room)
        return 0;
    bf16 *normed = room, *between = normed + num_tokens * width, *heads[3] = {between + num_tokens * inner};
    struct norm_call norm = {call->input, block->weight, normed, num_tokens, width, block->is_offset, block->epsilon};
    struct linear_call first = {.layer = block->first, .input = normed, .stride = width, .num_tokens = num_tokens};
    struct linear_call last = {.layer = block->last,
                               .input = between,
                               .stride = inner,
                               .num_tokens = num_tokens,
                               .residual = call->residual,
                               .outputs = {call->output}};
    int done = 1;
    pool_run(norm_task, &norm, (num_tokens + ROWS_A_TASK - 1) / ROWS_A_TASK, num_threads);
    if (block->site) {
        for (int i = 0; i < 3; i++) {
            if (i)
                heads[i] = heads[i - 1] + num_tokens * block->first->parts[i - 1].num_outputs;
            first.outputs[i] = heads[i];
        }
    } else {
        first.outputs[0] = between;
    }
    linear_run(&first, num_threads);
    if (block->site)
        done = attend_block(call, heads, between, num_threads);
    if (done)
        linear_run(&last, num_threads);
    free(room);
    return done;
}
#endif
