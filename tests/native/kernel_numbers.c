/* What the kernels of one instruction set make of the same random numbers, a result a line: no Python, so that it runs
 * under an emulator too. Compiled with INSTRUCTIONS, and IN_FLOAT16 or not, as ts_parallel/native/kernels.c is. */
#include <math.h>
#include <stdio.h>

#include "operations/attention.h"
#include "operations/sublayer.h"
#include "operations/elementwise.h"
#include "operations/linear.h"
#include "operations/sampling.h"
#include "numbers/packing.h"

static uint64_t state = 88172645463325252ULL;

/* About normal: the sum of four numbers of xorshift64. */
static float random_number(void)
{
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        sum += (float)(state >> 40) / (1 << 24) - 0.5f;
    }
    return sum * 1.7f;
}

static bits16 *random_numbers(int64_t count, float scale)
{
    bits16 *made = aligned_alloc(64, (size_t)(count * 2 + 127) / 64 * 64);
    for (int64_t i = 0; i < count; i++)
        made[i] = nearest_number(random_number() * scale);
    return made;
}

static void show(const char *what, int64_t number, const bits16 *values, int64_t count)
{
    printf("%s %lld", what, (long long)number);
    for (int64_t i = 0; i < count; i++)
        printf(" %.9g", (double)number_of(values[i]));
    printf("\n");
}

/* A weight [outputs, inputs] of this kind; one panel of what would be coded is not. */
static struct linear_part random_part(enum number_kind kind, int64_t outputs, int64_t inputs)
{
    bits16 *rows = random_numbers(outputs * inputs, 0.1f);
    int64_t num_panels = (outputs + PANEL - 1) / PANEL, size = bytes_of_panel(kind, inputs / 2);
    uint8_t *panels = aligned_alloc(64, (size_t)(num_panels * size + 63) / 64 * 64);
    memset(panels, 0, (size_t)(num_panels * size));
    rows[3] = nearest_number(1e-30f); /* an exception */
    struct linear_part part = {panels, NULL, outputs, kind, NULL, kind == INT4 ? 32 : inputs / 2};
    if (kind == PLAIN) {
        pack_rows((bits16 *)panels, rows, outputs, inputs, inputs);
    } else if (kind == CODED) {
        for (int64_t at = 0; at < num_panels; at++) {
            int64_t left = outputs - at * PANEL;
            const bits16 *own = rows + at * PANEL * inputs;
            if (at != 1 && code_panel(panels + at * size, own, left < PANEL ? left : PANEL, inputs, inputs))
                continue;
            bits16 *plain = aligned_alloc(64, (size_t)(inputs * PANEL) * 2);
            pack_rows(plain, own, left < PANEL ? left : PANEL, inputs, inputs);
            ((struct coded_panel *)(panels + at * size))->plain = (const uint8_t *)plain;
        }
    } else {
        int64_t group = 2 * part.pairs_a_group, groups = (inputs + group - 1) / group;
        bits16 *scales = aligned_alloc(64, (size_t)(num_panels * groups * PANEL) * 2);
        quantize_rows(kind, panels, scales, group, rows, outputs, inputs, inputs);
        part.scales = scales;
    }
    part.bias = random_numbers(outputs, 0.1f);
    return part;
}

static void show_linears(void)
{
    static const int64_t tokens[] = {1, 2, 3, 4, 5, 7, 9, 41};
    const int64_t inputs = 334, outputs = 150; /* more than a piece of wide.h */
#ifdef IN_FLOAT16
    const int last = INT4; /* the codes are of bfloat16 */
#else
    const int last = CODED;
#endif
    for (int kind = PLAIN; kind <= last; kind++) {
        struct linear layer = {.num_inputs = inputs, .num_parts = 2};
        for (int i = 0; i < 2; i++)
            layer.parts[i] = random_part((enum number_kind)kind, outputs, inputs);
        bits16 *input = random_numbers(41 * inputs, 1), *residual = random_numbers(41 * outputs, 1);
        bits16 *output = random_numbers(41 * outputs, 1);
        int64_t rows[] = {0, 149, 70};
        bits16 *found = random_numbers(3 * inputs, 1);
        look_up(&layer.parts[0], inputs, rows, 3, found);
        show("rows", kind, found, 3 * inputs);
        for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++)
            for (int activation = NO_ACTIVATION; activation <= RELU; activation++) {
                layer.activation = (enum activation)activation;
                layer.num_parts = activation ? 2 : 1;
                layer.num_panels = (outputs + PANEL - 1) / PANEL;
                struct linear_call call = {.layer = &layer, .input = input, .stride = inputs, .num_tokens = tokens[i],
                                           .residual = activation ? NULL : residual, .outputs = {output}};
                if (!linear_run(&call, 2))
                    abort();
                show("linear", kind * 100 + activation, output, tokens[i] * outputs);
                /* What is fetched ahead lies in the layer's panels, however many threads share them. */
                struct linear before = {.next = &layer};
                for (int num_threads = 1; num_threads < 5; num_threads++) {
                    look_behind(&before, num_threads);
                    int64_t size = bytes_of_panel((enum number_kind)kind, inputs / 2);
                    int64_t at = before.ahead ? (const uint8_t *)before.ahead - layer.parts[0].panels : 0;
                    if (at < 0 || at + before.bytes_ahead > layer.num_panels * size)
                        abort();
                }
            }
    }
}

static void show_rows(void)
{
    const int64_t rows = 19, width = 100;
    bits16 *input = random_numbers(rows * width, 1), *weight = random_numbers(width, 1);
    bits16 *other = random_numbers(rows * width, 1), *output = random_numbers(rows * width, 1);
    for (int is_offset = 0; is_offset < 2; is_offset++) {
        struct norm_call call = {input, weight, output, rows, width, is_offset, 1e-5f};
        pool_run(norm_task, &call, 2, 2);
        show("norm", is_offset, output, rows * width);
    }
    struct rotary_call call = {input, width, 50, rows, 2, 50, weight, other, output};
    for (int64_t token = 0; token < rows; token++)
        memcpy(other + token * 50, weight + 50, 50 * sizeof *other);
    call.cosine = input;
    pool_run(rotary_task, &call, 2, 2);
    show("rotary", 0, output, rows * width);
    int64_t best[19];
    struct argmax_call greatest = {input, width, best};
    pool_run(argmax_task, &greatest, rows, 2);
    for (int64_t row = 0; row < rows; row++)
        printf("argmax %lld %lld\n", (long long)row, (long long)best[row]);
}

static void show_attention(int64_t block_size, int64_t window, float softcap, int has_sinks)
{
    enum { HEADS = 6, KV = 2, DIM = 24, VALUES = 20, BLOCKS = 16 };
    struct site site = {HEADS, KV, DIM, VALUES, window, 0.2f, softcap, NULL, NULL, NULL};
    site.keys = random_numbers(BLOCKS * block_size * KV * DIM, 1);
    site.values = random_numbers(BLOCKS * block_size * KV * VALUES, 1);
    if (has_sinks)
        site.sinks = random_numbers(HEADS, 1);
    static const int64_t lengths[] = {70, 1, 1, 3};
    int64_t start = 0, blocks[BLOCKS];
    for (int64_t i = 0; i < BLOCKS; i++)
        blocks[i] = (i * 7 + 3) % BLOCKS;
    for (int i = 0; i < 4; start += lengths[i++]) {
        int64_t tokens = lengths[i], slots[70];
        struct step *step = malloc(sizeof *step + sizeof(struct chunk));
        *step = (struct step){block_size, 1, tokens, lanes_of(block_size), blocks, slots};
        step->chunks[0] = (struct chunk){0, tokens, start, 0};
        for (int64_t token = 0; token < tokens; token++)
            slots[token] = slot_of(step, &step->chunks[0], start + token);
        bits16 *output = random_numbers(tokens * HEADS * VALUES, 1);
        struct attention_call call = {
            .site = &site,
            .step = step,
            .query = {random_numbers(tokens * HEADS * DIM, 1), DIM, HEADS * DIM},
            .key = {random_numbers(tokens * KV * DIM, 1), DIM, KV * DIM},
            .value = {random_numbers(tokens * KV * VALUES, 1), VALUES, KV * VALUES},
            .output = {output, VALUES, HEADS * VALUES},
        };
        if (i == 3) {
            call.cosine = random_numbers(tokens * DIM, 1);
            call.sine = random_numbers(tokens * DIM, 1);
        }
        if (!attention_run(&call, 2))
            abort();
        show("attention", start, output, tokens * HEADS * VALUES);
    }
}

int main(void)
{
#ifdef __AMX_TILE__
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* the tiles' numbers */))
        return 77;
#endif
    show_linears();
    show_rows();
    show_attention(16, 0, 0, 0);
    show_attention(6, 9, 0, 1);
    show_attention(48, 0, 2, 0);
    return 0;
}
