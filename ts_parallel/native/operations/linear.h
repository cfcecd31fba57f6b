/* Linear layers whose weights lie in panels.
 *
 * T tokens, K input features, N output features. A packed weight [N, K] is a row of panels of 64 outputs; in a panel
 * two input features of all 64 outputs follow each other: `packed[n / 64][k / 2][n % 64][k % 2]`, zero where there is no
 * output. So one token reads a weight once from beginning to end, and many tokens find a panel in the cache. Few tokens
 * read its numbers as they are stored (numbers.h); of many, the first ones leave the panel in 16 bits for the others,
 * which meanwhile fetch the next one.
 */
#ifndef TS_PARALLEL_LINEAR_H
#define TS_PARALLEL_LINEAR_H

#include "numbers/numbers.h"
#include "operations/elementwise.h"
#include "pool.h"

#define MOST_PARTS 8
/* Where numbers are read from memory while they are multiplied. */
#define BYTES_AHEAD 2048

/* What is read once should leave the caches to the interpreter: so it does on AMD's processors (measured on Zen 4).
 * Intel's read memory three times as slow by the same hint (Sapphire Rapids). */
static int reads_past_caches;

static inline void find_reads_past_caches(void)
{
#ifdef __x86_64__
    __builtin_cpu_init();
    reads_past_caches = __builtin_cpu_is("amd");
#endif
}

enum activation { NO_ACTIVATION, SILU, GELU_TANH, RELU };

struct linear_part {
    const uint8_t *panels;
    const bits16 *bias; /* [N] or NULL */
    int64_t num_outputs;
    enum number_kind kind;
    const bits16 *scales; /* [panels, K / 2 / pairs_a_group, 64], or NULL where the numbers are no integers */
    int64_t pairs_a_group;
};

/* Weights that read the same inputs. With an activation there are two, and the outputs are `act(first) * second`. */
struct linear {
    int64_t num_inputs;
    int num_parts;
    enum activation activation;
    int64_t num_panels; /* of all parts; of one where there is an activation */
    struct linear *previous, *next; /* those made before and after, as a stage calls them one after another */
    /* What of the next one is fetched while this one is multiplied. That may be freed meanwhile, by a thread that holds
     * the interpreter's lock, which this one does not: so these are all that is read of it, and only fetched. */
    const void *_Atomic ahead;
    _Atomic int64_t bytes_ahead;
    struct linear_part parts[MOST_PARTS];
};

struct linear_call {
    const struct linear *layer;
    const bits16 *input; /* [T, K], rows `stride` apart */
    int64_t stride;
    const number *numbers; /* the same as the processor multiplies them, `numbers_stride` apart */
    int64_t numbers_stride;
    int64_t num_tokens;
    int64_t tokens_a_task;
    const bits16 *residual; /* [T, N] or NULL: added to what the only part gives */
    bits16 *outputs[MOST_PARTS]; /* [T, N] of each part */
};

#ifdef HAS_TILES
#include "operations/tiles.h"
#else
#define ROWS_OF_LINEARS MOST_ROWS

static inline void give_back_tiles(void)
{
}

/* `rows` tokens times `num_pairs` pairs of inputs from `first` on, for `parts` times 16 of a panel's outputs, which are
 * left PLAIN if it `keeps`. */
INLINE void multiply_parts(const enum number_kind kind, const int keeps, const int rows, const int part,
                           const int parts, const number *input, int64_t stride, const struct panel *panel,
                           int64_t first, int64_t num_pairs, floats sums[][4])
{
    const int64_t size = bytes_of_pair(kind), bytes_ahead = panel->bytes_ahead;
    const uint8_t *numbers = panel->numbers + first * size, *ahead = panel->ahead + first * bytes_ahead;
    bits16 *kept = keeps ? panel->kept + first * 2 * PANEL : NULL;
    struct decoder decoder = make_decoder(kind, panel->head);
    floats sum[MOST_ROWS][4];
    input += 2 * first;
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            sum[row][i] = all(0);
    for (int64_t pair = 0; pair < num_pairs; pair++) {
        const uint8_t *from = numbers + pair * size;
        operand weight[4];
        load_pair(kind, from, first + pair, part, parts, &decoder, weight);
        if (keeps)
#pragma GCC unroll 4
            for (int i = 0; i < parts; i++)
                keep_operand(kept + pair * 2 * PANEL + 32 * (part + i), weight[i]);
        /* The processor alone fetches too little ahead of what is decoded. */
        if ((rows < 3 || kind != PLAIN) && part == 0)
#pragma GCC unroll 4
            for (int line = 0; line < size; line += 64)
                if (rows < 3 && parts == 4 && reads_past_caches)
                    __builtin_prefetch(from + line + BYTES_AHEAD, 0, 0);
                else
                    __builtin_prefetch(from + line + BYTES_AHEAD, 0, 3);
        else if (kind == PLAIN && part == 0)
            for (int64_t byte = 0; byte < bytes_ahead; byte += 64)
                __builtin_prefetch(ahead + pair * bytes_ahead + byte, 0, 2);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            both inputs = pair_of(input + row * stride + pair * 2);
#pragma GCC unroll 4
            for (int i = 0; i < parts; i++)
                sum[row][i] = dot(sum[row][i], weight[i], inputs);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int i = 0; i < parts; i++)
            sums[row][part + i] = sum[row][i];
}

/* All of the panel's outputs, so many at once as there are registers for. */
INLINE void multiply(const enum number_kind kind, const int keeps, const int rows, const number *input, int64_t stride,
                     const struct panel *panel, int64_t first, int64_t num_pairs, floats sums[][4])
{
    const int parts = kind == PLAIN || PARTS_AT_ONCE(rows) > 2 ? PARTS_AT_ONCE(rows) : 2;
#pragma GCC unroll 4
    for (int part = 0; part < 4; part += parts)
        multiply_parts(kind, keeps, rows, part, parts, input, stride, panel, first, num_pairs, sums);
}

INLINE void multiply_block(const enum number_kind kind, int rows, const number *input, int64_t stride,
                           const struct panel *panel, int64_t first, int64_t num_pairs, floats sums[][4])
{
    switch (kind == PLAIN || !panel->kept ? rows : 0) {
    case 0: multiply(kind, 1, KEEPING_ROWS, input, stride, panel, first, num_pairs, sums); break;
    case 1: multiply(kind, 0, 1, input, stride, panel, first, num_pairs, sums); break;
    case 2: multiply(kind, 0, 2, input, stride, panel, first, num_pairs, sums); break;
    case 3: multiply(kind, 0, 3, input, stride, panel, first, num_pairs, sums); break;
#if MOST_ROWS > 4
    case 4: multiply(kind, 0, 4, input, stride, panel, first, num_pairs, sums); break;
    case 5: multiply(kind, 0, 5, input, stride, panel, first, num_pairs, sums); break;
#endif
    default: multiply(kind, 0, MOST_ROWS, input, stride, panel, first, num_pairs, sums); break;
    }
}
#endif

static void multiply_pairs(int rows, const number *input, int64_t stride, const struct panel *panel, int64_t first,
                           int64_t num_pairs, floats sums[][4])
{
    switch (panel->kind) {
    case PLAIN: multiply_block(PLAIN, rows, input, stride, panel, first, num_pairs, sums); break;
#ifndef IN_FLOAT16
    case CODED: multiply_block(CODED, rows, input, stride, panel, first, num_pairs, sums); break;
#endif
    case INT8: multiply_block(INT8, rows, input, stride, panel, first, num_pairs, sums); break;
    default: multiply_block(INT4, rows, input, stride, panel, first, num_pairs, sums); break;
    }
}

/* Each row's sums are of the same numbers in the same order, whatever kind they are read as. */
static void multiply_panel(int rows, const number *input, int64_t stride, const struct panel *panel, floats sums[][4])
{
    const bits16 *scales = panel->scales;
    if (!rows && !panel->kept)
        return; /* the other of a pair is only kept */
    if (!scales) {
        multiply_pairs(rows, input, stride, panel, 0, panel->num_pairs, sums);
        return;
    }
    for (int64_t first = 0, count; first < panel->num_pairs; first += count, scales += PANEL) {
        floats sum[ROWS_OF_LINEARS][4];
        count = panel->num_pairs - first < panel->pairs_a_group ? panel->num_pairs - first : panel->pairs_a_group;
        multiply_pairs(rows, input, stride, panel, first, count, sum);
        for (int part = 0; part < 4; part++) {
            floats scale = load16(scales + 16 * part, 0xffff);
            for (int row = 0; row < rows; row++)
                sums[row][part] = first ? times_plus(sum[row][part], scale, sums[row][part])
                                        : times(sum[row][part], scale);
        }
    }
}

/* As many tokens as fit the registers, at `most`, and no last block of one or two if that can be helped. */
static inline int rows_of_block(int64_t left, int most)
{
    if (left <= most)
        return (int)left;
    return left <= most + 2 ? (int)(left + 1) / 2 : most;
}

#ifdef WIDE_ROWS
#include "operations/wide.h"
#endif

INLINE floats activated(enum activation kind, floats value)
{
    switch (kind) {
    case SILU: return over(value, add(all(1.0f), exp16(subtract(all(0), value))));
    case GELU_TANH: {
        floats cube = times(times(value, value), value);
        floats inner = times_plus(all(0.044715f), cube, value);
        floats twice = times(inner, all(2 * 0.7978845608f));
        /* 0.5 (1 + tanh(x)) = 1 / (1 + e^(-2x)) */
        return over(value, add(all(1.0f), exp16(subtract(all(0), twice))));
    }
    case RELU: return greater(value, all(0));
    default: return value;
    }
}

INLINE floats with_bias(floats sum, const bits16 *bias, int64_t first, lanes mask)
{
    return bias ? add(sum, load16(bias + first, mask)) : sum;
}

static inline struct panel panel_of(const struct linear_part *part, int64_t index, int64_t num_pairs)
{
    struct panel panel = {.kind = part->kind, .num_pairs = num_pairs, .pairs_a_group = part->pairs_a_group};
    const uint8_t *from = part->panels + index * bytes_of_panel(panel.kind, num_pairs);
    if (panel.kind == CODED) {
        panel.head = (const struct coded_panel *)from;
        panel.numbers = panel.head->plain;
        if (panel.numbers)
            panel.kind = PLAIN;
        else
            panel.numbers = from + bytes_of_head(num_pairs);
    } else {
        panel.numbers = from;
        if (part->scales)
            panel.scales = part->scales + index * ((num_pairs + part->pairs_a_group - 1) / part->pairs_a_group) * PANEL;
    }
    return panel;
}

/* Which part a layer's panel number `place` belongs to; `place` becomes its number there. */
static inline int find_part(const struct linear *layer, int64_t *place)
{
    int number = 0, last = layer->activation ? 0 : layer->num_parts - 1;
    for (int64_t own; number < last; number++, *place -= own)
        if (*place < (own = (layer->parts[number].num_outputs + PANEL - 1) / PANEL))
            break;
    return number;
}

/* With the interpreter's lock: the layer has another one behind it, or none now. */
static inline void look_behind(struct linear *layer, int num_threads)
{
    const struct linear *next = layer->next;
    const uint8_t *ahead = NULL;
    int64_t size = 0;
    if (next && num_threads > 1) { /* the panel that the second thread will begin with */
        int64_t place = next->num_panels / num_threads;
        const struct linear_part *part = &next->parts[find_part(next, &place)];
        size = bytes_of_panel(part->kind, next->num_inputs / 2);
        ahead = part->panels + place * size;
    }
    atomic_store_explicit(&layer->bytes_ahead, size, memory_order_relaxed);
    atomic_store_explicit(&layer->ahead, ahead, memory_order_relaxed);
}

/* The `num_blocks` of tokens that read the panel's numbers in the cache fetch what lies behind it in memory. */
static inline void look_behind_panel(struct panel *panel, int64_t num_blocks)
{
    const int64_t size = bytes_of_pair(panel->kind);
    panel->ahead = panel->numbers + panel->num_pairs * size;
    panel->bytes_ahead = num_blocks ? (size + num_blocks - 1) / num_blocks : 0;
}

/* The panel with the numbers that were kept of it. */
static inline struct panel unpacked(const struct panel *panel, int64_t num_blocks)
{
    struct panel kept = *panel;
    look_behind_panel(&kept, num_blocks);
    kept.kind = PLAIN;
    kept.kept = NULL;
    kept.numbers = (const uint8_t *)panel->kept;
    return kept;
}

/* What a task computes: some tokens times a panel, or two of them where there is an activation. */
struct linear_share {
    const struct linear_call *call;
    int which; /* of the layer's parts */
    int num_panels;
    int64_t place; /* of the panels in their parts */
    int64_t begin, end; /* of the tokens */
    struct panel panels[2];
};

/* Outputs of `rows` tokens from number `token` on, of which these are the sums. */
static inline void finish_rows(const struct linear_share *share, int64_t token, int64_t rows, floats sums[][4],
                               floats others[][4])
{
    const struct linear_call *call = share->call;
    const struct linear *layer = call->layer;
    const struct linear_part *part = &layer->parts[share->which], *gated = &layer->parts[1];
    int64_t first = share->place * PANEL, width = part->num_outputs;
    for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < 4; i++) {
            int64_t at = first + 16 * i;
            if (at >= width)
                break;
            lanes mask = first16(width - at);
            int64_t element = (token + row) * width + at;
            floats value = with_bias(sums[row][i], part->bias, at, mask);
            if (layer->activation) {
                floats other = rounded(with_bias(others[row][i], gated->bias, at, mask));
                value = times(rounded(activated(layer->activation, rounded(value))), other);
            }
            if (call->residual)
                value = add(load16(call->residual + element, mask), rounded(value));
            store16(call->outputs[share->which] + element, mask, value);
        }
}

/* Block by block; the first one of many tokens leaves codes and integers in 16 bits for the others. */
static void multiply_in_blocks(struct linear_share *share)
{
    const struct linear_call *call = share->call;
    struct panel *panels = share->panels;
    int64_t num_tokens = share->end - share->begin;
    int is_keeping = 0;
    for (int i = 0; i < share->num_panels; i++) {
        if (panels[i].kind != PLAIN && num_tokens > FEW_TOKENS)
            panels[i].kept = scratch_of((size_t)(panels[i].num_pairs * bytes_of_pair(PLAIN)), i);
        is_keeping |= panels[i].kept != NULL;
        if (call->layer->parts[share->which + i].kind == PLAIN)
            look_behind_panel(&panels[i], (num_tokens + ROWS_OF_LINEARS - 1) / ROWS_OF_LINEARS);
    }
    floats sums[ROWS_OF_LINEARS][4], others[ROWS_OF_LINEARS][4];
    for (int64_t token = share->begin, rows; token < share->end; token += rows) {
        int64_t left = share->end - token;
        rows = is_keeping && left > KEEPING_ROWS ? KEEPING_ROWS : rows_of_block(left, ROWS_OF_LINEARS);
        const number *input = call->numbers + token * call->numbers_stride;
        multiply_panel((int)rows, input, call->numbers_stride, &panels[0], sums);
        if (share->num_panels > 1)
            multiply_panel((int)rows, input, call->numbers_stride, &panels[1], others);
        for (int i = 0; i < share->num_panels; i++)
            if (panels[i].kept)
                panels[i] = unpacked(&panels[i], (left - rows + ROWS_OF_LINEARS - 1) / ROWS_OF_LINEARS);
            else
                panels[i].ahead += panels[i].num_pairs * panels[i].bytes_ahead;
        is_keeping = 0;
        finish_rows(share, token, rows, sums, others);
    }
}

static void linear_task(const void *argument, int64_t index)
{
    const struct linear_call *call = argument;
    const struct linear *layer = call->layer;
    struct linear_share share = {.call = call, .num_panels = layer->activation ? 2 : 1};
    share.place = index % layer->num_panels;
    share.begin = index / layer->num_panels * call->tokens_a_task;
    share.end = share.begin + call->tokens_a_task < call->num_tokens ? share.begin + call->tokens_a_task
                                                                       : call->num_tokens;
    share.which = find_part(layer, &share.place);
    for (int i = 0; i < share.num_panels; i++)
        share.panels[i] = panel_of(&layer->parts[share.which + i], share.place, layer->num_inputs / 2);
#ifdef WIDE_ROWS
    int64_t num_tokens = share.end - share.begin;
    if (num_tokens > TOKENS_BEFORE_WIDE) {
        floats(*sums)[4] = multiply_wide(share.panels, share.num_panels,
                                         call->numbers + share.begin * call->numbers_stride, call->numbers_stride,
                                         num_tokens);
        if (sums) {
            finish_rows(&share, share.begin, num_tokens, sums, sums + num_tokens);
            return;
        }
    }
#endif
    multiply_in_blocks(&share);
    give_back_tiles();
}

/* Tokens of one task: their inputs stay in a core's second-level cache while the panels pass by. */
static inline int64_t tokens_a_task(int64_t num_tokens, int64_t num_inputs)
{
    int64_t most = 393216 / (int64_t)sizeof(number) / num_inputs / 12 * 12;
    if (most < 48)
        most = 48;
    int64_t num_tasks = (num_tokens + most - 1) / most;
    int64_t even = (num_tokens + num_tasks - 1) / num_tasks;
    return (even + ROWS_OF_LINEARS - 1) / ROWS_OF_LINEARS * ROWS_OF_LINEARS;
}

/* Inputs of some tokens to what the processor multiplies. */
static void convert_task(const void *argument, int64_t index)
{
    const struct linear_call *call = argument;
    int64_t end = (index + 1) * ROWS_A_TASK < call->num_tokens ? (index + 1) * ROWS_A_TASK : call->num_tokens;
    int64_t width = call->layer->num_inputs;
    for (int64_t token = index * ROWS_A_TASK; token < end; token++)
        for (int64_t at = 0; at < width; at += 16)
            store_numbers((number *)call->numbers + token * call->numbers_stride + at,
                          load16(call->input + token * call->stride + at, first16(width - at)));
}

/* Returns 0 where there is no memory. */
static inline int convert_inputs(struct linear_call *call, int num_threads)
{
    if (sizeof(number) == sizeof(bits16)) {
        call->numbers = (const number *)call->input;
        call->numbers_stride = call->stride;
        return 1;
    }
    call->numbers_stride = (call->layer->num_inputs + 15) / 16 * 16;
    if (call->numbers_stride % 1024 == 0)
        call->numbers_stride += 16; /* or the same number of all rows would be at the same place in a cache */
    call->numbers = scratch_of((size_t)(call->num_tokens * call->numbers_stride) * sizeof(number), CALLERS_SCRATCH);
    if (!call->numbers)
        return 0;
    pool_run(convert_task, call, (call->num_tokens + ROWS_A_TASK - 1) / ROWS_A_TASK, num_threads);
    return 1;
}

/* Returns 0 where there is no memory. */
static inline int linear_run(struct linear_call *call, int num_threads)
{
    if (!convert_inputs(call, num_threads))
        return 0;
    call->tokens_a_task = tokens_a_task(call->num_tokens, call->layer->num_inputs);
    if (num_threads > 1)
        pool_look_ahead(atomic_load_explicit(&call->layer->ahead, memory_order_relaxed),
                        atomic_load_explicit(&call->layer->bytes_ahead, memory_order_relaxed));
    int64_t num_blocks = (call->num_tokens + call->tokens_a_task - 1) / call->tokens_a_task;
    pool_run_in_order(linear_task, call, num_blocks * call->layer->num_panels, num_threads);
    return 1;
}

/* An output's two numbers of a PLAIN pair. */
static inline void plain_two(const bits16 *pair, int64_t row, bits16 to[2])
{
#ifdef IN_FLOAT16
    to[0] = pair[row / 16 * 32 + row % 16];
    to[1] = pair[row / 16 * 32 + row % 16 + 16];
#else
    to[0] = pair[2 * row];
    to[1] = pair[2 * row + 1];
#endif
}

/* Rows of a packed weight, as an embedding looks them up. */
static void look_up(const struct linear_part *part, int64_t num_inputs, const int64_t *rows,
                                int64_t num_rows, bits16 *to)
{
    for (int64_t i = 0; i < num_rows; i++, to += num_inputs) {
        struct panel panel = panel_of(part, rows[i] / PANEL, num_inputs / 2);
        int64_t row = rows[i] % PANEL, vector = row / 16, lane = row % 16;
        for (int64_t pair = 0; pair < panel.num_pairs; pair++) {
            const uint8_t *from = panel.numbers + pair * bytes_of_pair(panel.kind);
            if (panel.kind == PLAIN) {
                plain_two((const bits16 *)from, row, to + 2 * pair);
                continue;
            }
            if (panel.kind == CODED) {
                decode_two(panel.head, from, 2 * row, to + 2 * pair);
                continue;
            }
            int both[2];
            for (int j = 0; j < 2; j++) {
                int64_t place = 2 * row + j;
                int byte = from[panel.kind == INT8 ? place / 64 * 64 + byte_of(place) : 4 * lane + 2 * j + vector / 2];
                if (panel.kind == INT8)
                    both[j] = integer_of_byte((uint8_t)byte);
                else
                    both[j] = (byte >> vector % 2 * 4 & 15) - 8;
            }
            float numbers[16] = {(float)both[0], (float)both[1]};
            float scale = number_of(panel.scales[pair / panel.pairs_a_group * PANEL + row]);
            store16(to + 2 * pair, 3, times(load_floats(numbers), all(scale)));
        }
        if (panel.kind == CODED)
            decode_exceptions(panel.head, 2 * row, to);
    }
}
#endif
