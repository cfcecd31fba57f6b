/* Logits → token ids, a row a task: what `runtime/backends/torch/sampling.py` says, without its sort.
 *
 * 16 bits are few numbers, and a row of V tokens has each of them often. So its tokens are counted by number: a group
 * are those of one number, in the order of their ids. The most likely first, probabilities and their sums are then
 * those of some thousand groups. A token that a penalty or bias has given a float32 number which has no 16 bits is a
 * stray, a group for itself; only strays are sorted. Sums are float64, and a row's are its own: nothing depends on the
 * rows beside it.
 */
#ifndef TS_PARALLEL_SAMPLING_H
#define TS_PARALLEL_SAMPLING_H

#include <math.h>
#include <stdlib.h>

#include "numbers/floats.h"
#include "numbers/numbers.h"

/* In place of a token: `step_plan.NoToken`. */
#define NOT_A_NUMBER -1
#define NOTHING_ALLOWED -2
#define NO_MEMORY -3 /* of this file alone: the call fails */

#define MINUS_INFINITY (0x8000 | INFINITE)
#define MOST_NUMBERS 65536
/* Beyond e^-50 of the best, all tokens of any vocabulary together are less than float64 tells apart. */
#define NEGLIGIBLE 50.0

struct argmax_call {
    const bits16 *logits; /* [R, V], contiguous */
    int64_t num_columns;
    int64_t *result; /* [R] */
};

/* `runtime/backends/native/sampling.py` packs it. Where something begins is counted in words of 8 bytes. */
struct sampled_row {
    int64_t row, top_k, position;
    uint64_t seed;
    double temperature, top_p, min_p, repetition, presence, frequency;
    int64_t history, num_prompt, num_output;
    int64_t biases, num_biases; /* ids, then float64 */
    int64_t mask, num_words;    /* of `Chunk.allowed`; no words: anything is */
};

struct sample_call {
    const bits16 *logits; /* [R, V], contiguous */
    int64_t num_columns;
    const struct sampled_row *rows;
    const int64_t *words;
    int64_t *result;
};

struct groups {
    int64_t number;
    float *values;   /* falling */
    int32_t *counts;
    int32_t *tokens; /* the stray, or -1 */
    double *weights; /* e^((value - best) / temperature) */
};

struct change {
    float number;
    int32_t times; /* that the answer has the token, until that was taken off */
};

/* Memory of a task. */
struct sampling_room {
    bits16 *own;          /* [V], the row as it is to be chosen from; strays are minus infinity */
    int32_t *histogram; /* by how far below the greatest a number is */
    uint64_t *touched;  /* bits [V] */
    struct change *changed; /* [V], of tokens that are touched */
    uint64_t *strays, *sorting; /* [V + 1] */
    struct groups counted, groups;
};

static inline size_t take_room(size_t *size, size_t num_bytes)
{
    size_t at = *size;
    *size += (num_bytes + 63) / 64 * 64;
    return at;
}

static struct groups groups_at(char *memory, size_t *size, size_t most)
{
    size_t values = take_room(size, most * sizeof(float)), counts = take_room(size, most * sizeof(int32_t));
    size_t tokens = take_room(size, most * sizeof(int32_t)), weights = take_room(size, most * sizeof(double));
    return (struct groups){0, (float *)(memory + values), (int32_t *)(memory + counts), (int32_t *)(memory + tokens),
                           (double *)(memory + weights)};
}

/* Where everything begins in `memory`; with `size`, how much that is. */
static struct sampling_room lay_out_room(char *memory, int64_t num_columns, size_t *size)
{
    size_t columns = (size_t)num_columns, most = MOST_NUMBERS + 64;
    size_t own = take_room(size, columns * sizeof(bits16)), histogram = take_room(size, most * sizeof(int32_t));
    size_t touched = take_room(size, columns / 8 + 8), changed = take_room(size, columns * sizeof(struct change));
    size_t strays = take_room(size, (columns + 1) * sizeof(uint64_t));
    size_t sorting = take_room(size, (columns + 1) * sizeof(uint64_t));
    struct groups counted = groups_at(memory, size, most), groups = groups_at(memory, size, columns + most);
    return (struct sampling_room){(bits16 *)(memory + own),
                                  (int32_t *)(memory + histogram),
                                  (uint64_t *)(memory + touched),
                                  (struct change *)(memory + changed),
                                  (uint64_t *)(memory + strays),
                                  (uint64_t *)(memory + sorting),
                                  counted,
                                  groups};
}

/* Returns 0 where there is no memory, of which it takes a few MB. */
static int take_sampling_room(int64_t num_columns, struct sampling_room *room)
{
    size_t size = 0, again = 0;
    lay_out_room(NULL, num_columns, &size);
    char *memory = scratch_of(size, 0);
    if (memory)
        *room = lay_out_room(memory, num_columns, &again);
    return memory != NULL;
}

/* int16 in the order of the numbers; both zeros are 0. Without a branch, so that compilers make vectors of it. */
static inline int16_t order_of(bits16 bits)
{
    int16_t number = (int16_t)(bits == 0x8000 ? 0 : bits);
    return (int16_t)(number ^ ((number >> 15) & 0x7fff));
}

static inline int is_nan(bits16 bits)
{
    return (bits & 0x7fff) > INFINITE;
}

static inline float number_at(int order)
{
    return number_of((bits16)(order < 0 ? (uint16_t)order ^ 0x7fff : order));
}

/* The place of a row's greatest number in the order; minus infinity's where there is no other. */
static int16_t greatest_order(const bits16 *row, int64_t num_columns, int *has_nan)
{
    int16_t greatest = order_of(MINUS_INFINITY);
    uint16_t furthest = 0; /* without their signs, NaN's bits are the largest */
    for (int64_t at = 0; at < num_columns; at++) {
        int16_t order = order_of(row[at]);
        uint16_t bits = row[at] & 0x7fff;
        greatest = order > greatest ? order : greatest;
        furthest = bits > furthest ? bits : furthest;
    }
    *has_nan = is_nan(furthest);
    return greatest;
}

#define TOKENS_AT_ONCE 256

/* Token number `member`, from 0 on, of those that have this place in the order. */
static int64_t find_member(const bits16 *row, int64_t num_columns, int order, int64_t member)
{
    for (int64_t at = 0; at < num_columns; at += TOKENS_AT_ONCE) {
        int64_t own = num_columns - at < TOKENS_AT_ONCE ? num_columns - at : TOKENS_AT_ONCE;
        uint16_t count = 0;
        for (int64_t i = 0; i < own; i++)
            count = (uint16_t)(count + (order_of(row[at + i]) == order));
        for (int64_t i = 0; member < count && i < own; i++)
            if (order_of(row[at + i]) == order && member-- == 0)
                return at + i;
        member -= count;
    }
    abort(); /* it was counted */
}

/* The first of the greatest numbers of a row, or why there is none. */
static void argmax_task(const void *argument, int64_t row)
{
    const struct argmax_call *call = argument;
    const bits16 *logits = call->logits + row * call->num_columns;
    int has_nan, greatest = greatest_order(logits, call->num_columns, &has_nan);
    if (has_nan)
        call->result[row] = NOT_A_NUMBER;
    else if (greatest == order_of(MINUS_INFINITY))
        call->result[row] = NOTHING_ALLOWED;
    else
        call->result[row] = find_member(logits, call->num_columns, greatest, 0);
}

static inline int is_allowed(const struct sampled_row *row, const uint64_t *mask, int64_t token)
{
    return !row->num_words || (token / 64 < row->num_words && mask[token / 64] >> (token % 64) & 1);
}

/* Minus infinity where a token is not allowed; returns whether there is NaN, there or elsewhere. */
static int copy_allowed(const struct sampled_row *row, const bits16 *from, const uint32_t *mask, bits16 *to,
                        int64_t num_columns)
{
    uint16_t furthest = 0;
    for (int64_t at = 0; at < num_columns; at += 32) {
        int64_t own = num_columns - at < 32 ? num_columns - at : 32;
        uint32_t allowed = !row->num_words ? 0xffffffffu : at / 32 < 2 * row->num_words ? mask[at / 32] : 0;
        for (int i = 0; i < own; i++) {
            uint16_t bits = from[at + i] & 0x7fff;
            furthest = bits > furthest ? bits : furthest;
            to[at + i] = allowed >> i & 1 ? from[at + i] : MINUS_INFINITY;
        }
    }
    return is_nan(furthest);
}

/* Whether the token was not touched before; then it has the model's own number. */
static inline int touch(const struct sampling_room *room, const bits16 *logits, int64_t token)
{
    uint64_t bit = 1ULL << (token % 64);
    if (room->touched[token / 64] & bit)
        return 0;
    room->touched[token / 64] |= bit;
    room->changed[token] = (struct change){number_of(logits[token]), 0};
    return 1;
}

/* A head may have fewer outputs than the vocabulary has tokens. */
static inline int has_logit(const struct sample_call *call, int64_t token)
{
    return token >= 0 && token < call->num_columns;
}

/* How often the answer has a token tells what is taken off it. */
static void take_off_repeated(const struct sample_call *call, const struct sampled_row *row, const bits16 *logits,
                              const struct sampling_room *room)
{
    const int64_t *output = call->words + row->history + row->num_prompt;
    for (int64_t i = 0; i < row->num_output; i++)
        if (has_logit(call, output[i])) {
            touch(room, logits, output[i]);
            room->changed[output[i]].times++;
        }
    for (int64_t i = 0; i < row->num_output; i++)
        if (has_logit(call, output[i]) && room->changed[output[i]].times) {
            struct change *own = &room->changed[output[i]];
            own->number -= (float)(row->presence + row->frequency * own->times);
            own->times = 0;
        }
}

/* Penalties, then biases, each as float32 rounds. */
static void change_numbers(const struct sample_call *call, const struct sampled_row *row, const bits16 *logits,
                           const struct sampling_room *room)
{
    const int64_t *seen = call->words + row->history, *ids = call->words + row->biases;
    float repetition = (float)row->repetition;
    memset(room->touched, 0, (size_t)(call->num_columns / 8 + 8));
    for (int64_t i = 0; row->repetition != 1 && i < row->num_prompt + row->num_output; i++)
        if (has_logit(call, seen[i]) && touch(room, logits, seen[i])) {
            float *own = &room->changed[seen[i]].number;
            *own = *own > 0 ? *own / repetition : *own * repetition;
        }
    if (row->presence != 0 || row->frequency != 0)
        take_off_repeated(call, row, logits, room);
    for (int64_t i = 0; i < row->num_biases; i++)
        if (has_logit(call, ids[i])) {
            double bias;
            memcpy(&bias, ids + row->num_biases + i, sizeof bias);
            touch(room, logits, ids[i]);
            room->changed[ids[i]].number += (float)bias;
        }
}

/* Greater numbers come first, then lower ids. */
static inline uint64_t stray_of(float value, int64_t token)
{
    uint32_t bits = bits_of_float(value), order = bits & 0x80000000 ? ~bits : bits | 0x80000000;
    return (uint64_t)~order << 32 | (uint64_t)token;
}

static inline float value_of_stray(uint64_t stray)
{
    uint32_t order = ~(uint32_t)(stray >> 32);
    return float_of_bits(order & 0x80000000 ? order & 0x7fffffff : ~order);
}

/* Makes `room->own` of the model's logits; how many strays there are, or -1 where a number is NaN, be it allowed or
 * not. */
static int64_t make_own(const struct sample_call *call, const struct sampled_row *row, const bits16 *logits,
                        const struct sampling_room *room)
{
    const uint64_t *mask = (const uint64_t *)(call->words + row->mask);
    int64_t num_strays = 0;
    if (copy_allowed(row, logits, (const uint32_t *)mask, room->own, call->num_columns))
        return -1;
    change_numbers(call, row, logits, room);
    for (int64_t word = 0; word < (call->num_columns + 63) / 64; word++)
        for (uint64_t left = room->touched[word]; left; left &= left - 1) {
            int64_t token = 64 * word + __builtin_ctzll(left);
            float value = room->changed[token].number;
            if (value != value)
                return -1;
            if (!is_allowed(row, mask, token))
                continue;
            bits16 bits = nearest_number(value);
            if (number_of(bits) != value) {
                bits = MINUS_INFINITY;
                room->strays[num_strays++] = stray_of(value, token);
            }
            room->own[token] = bits;
        }
    return num_strays;
}

/* Those that are not below `lowest`, the greatest first. They come with rising ids, and each pass keeps their order. */
static int64_t sort_strays(const struct sampling_room *room, int64_t number, double lowest)
{
    uint64_t *from = room->strays, *to = room->sorting;
    int64_t kept = 0;
    for (int64_t i = 0; i < number; i++)
        if (value_of_stray(from[i]) >= lowest)
            from[kept++] = from[i];
    for (int shift = 32; shift < 64 && kept > 1; shift += 8) { /* four passes end where they began */
        int64_t places[257] = {0};
        for (int64_t i = 0; i < kept; i++)
            places[(from[i] >> shift & 255) + 1]++;
        for (int digit = 0; digit < 256; digit++)
            places[digit + 1] += places[digit];
        for (int64_t i = 0; i < kept; i++)
            to[places[from[i] >> shift & 255]++] = from[i];
        uint64_t *other = from;
        from = to, to = other;
    }
    return kept;
}

/* How many tokens have each number, from the `greatest` on as far down as `span` places of the order. */
static void count_numbers(const bits16 *row, int64_t num_columns, int greatest, int span, int32_t *histogram)
{
    /* Whoever is not counted adds to a place of its own behind the others, so that nothing has to be foreseen. */
    memset(histogram, 0, (size_t)(span + 16) * sizeof *histogram);
    for (int64_t at = 0; at < num_columns; at += 32) {
        int64_t own = num_columns - at < 32 ? num_columns - at : 32;
        uint16_t below[32], nearest = 0xffff;
        for (int i = 0; i < own; i++) {
            below[i] = (uint16_t)(greatest - order_of(row[at + i]));
            nearest = below[i] < nearest ? below[i] : nearest;
        }
        if (nearest > span)
            continue;
        for (int i = 0; i < own; i++)
            histogram[below[i] <= span ? below[i] : span + 16 + i]++;
    }
}

/* A group for each number that was counted. */
static void group_counted(struct groups *groups, const int32_t *histogram, int greatest, int span)
{
    int64_t number = 0;
    for (int below = 0; below <= span; below++) {
        if (!histogram[below])
            continue;
        groups->values[number] = number_at(greatest - below);
        groups->counts[number] = histogram[below];
        groups->tokens[number++] = -1;
    }
    groups->number = number;
}

/* Merges what was counted with the sorted strays, whose memory has room for one more. */
static void merge_strays(struct groups *to, const struct groups *counted, uint64_t *strays, int64_t num_strays)
{
    int64_t stray = 0, group = 0;
    to->number = counted->number + num_strays;
    counted->values[counted->number] = -INFINITY;
    strays[num_strays] = stray_of(-INFINITY, 0);
    for (int64_t i = 0; i < to->number; i++) {
        float value = counted->values[group], other = value_of_stray(strays[stray]);
        int is_stray = other > value;
        to->values[i] = is_stray ? other : value;
        to->counts[i] = is_stray ? 1 : counted->counts[group];
        to->tokens[i] = is_stray ? (int32_t)(uint32_t)strays[stray] : -1;
        stray += is_stray;
        group += !is_stray;
    }
}

/* e^value for values from -700 to 0, to the last bits of float64; 0 below. Cody and Waite's reduction, Taylor's series.
 * Without a branch or a call, so that compilers make vectors of it. */
static inline double exp_of(double value)
{
    static const double factors[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                     1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                                     0.5,             1.0,            1.0};
    const double whole = 6755399441055744.0; /* 1.5 * 2^52: added, a number loses what is behind its point */
    double some = value < -700 ? -700 : value, power = some * 1.44269504088896340736 + whole;
    int64_t exponent;
    memcpy(&exponent, &power, sizeof exponent);
    power -= whole;
    double rest = some - power * 6.93147180369123816490e-01 - power * 1.90821492927058770002e-10;
    double sum = 1.0 / 6227020800;
#pragma GCC unroll 13
    for (int i = 0; i < 13; i++)
        sum = sum * rest + factors[i];
    int64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    bits += (int64_t)((uint64_t)exponent << 52); /* what `whole` has below 2^12 in its bits is 0 */
    memcpy(&sum, &bits, sizeof sum);
    return value < -700 ? 0 : sum;
}

static void weigh_groups(struct groups *groups, float best, double temperature)
{
    for (int64_t at = 0; at < groups->number; at++)
        groups->weights[at] = exp_of(((double)groups->values[at] - best) / temperature);
    while (groups->number > 1 && groups->weights[groups->number - 1] == 0)
        groups->number--;
}

static double mass_of(const struct groups *groups)
{
    double mass = 0;
    for (int64_t i = 0; i < groups->number; i++)
        mass += groups->counts[i] * groups->weights[i];
    return mass;
}

/* top_k, top_p and min_p, each on what the one before has left; the first token always stays. */
static void restrict_groups(struct groups *groups, const struct sampled_row *row)
{
    if (row->top_k > 0) {
        int64_t left = row->top_k;
        for (int64_t i = 0; i < groups->number; left -= groups->counts[i++])
            if (groups->counts[i] >= left) {
                groups->counts[i] = (int32_t)left;
                groups->number = i + 1;
                break;
            }
    }
    if (row->top_p < 1) {
        double limit = row->top_p * mass_of(groups), mass = 0;
        for (int64_t i = 0; i < groups->number; mass += groups->counts[i] * groups->weights[i], i++) {
            double exact = (limit - mass) / groups->weights[i]; /* so many of this number's tokens reach the limit */
            if (exact > groups->counts[i] - 1)
                continue;
            int32_t kept = exact > 0 ? (int32_t)exact + ((int32_t)exact < exact) : 0;
            groups->counts[i] = i == 0 && kept == 0 ? 1 : kept;
            groups->number = i + (groups->counts[i] > 0);
            break;
        }
    }
    if (row->min_p > 0)
        while (groups->number > 1 && groups->weights[groups->number - 1] < row->min_p)
            groups->number--;
}

/* Inversion of the cumulated sum: the group that `number`, in [0, 1), falls into, and which of its tokens. */
static int64_t choose_group(const struct groups *groups, double number, int64_t *member)
{
    double target = number * mass_of(groups), mass = 0;
    for (int64_t i = 0; i < groups->number; i++) {
        double next = mass + groups->counts[i] * groups->weights[i];
        if (next > target) {
            *member = (int64_t)((target - mass) / groups->weights[i]);
            if (*member >= groups->counts[i])
                *member = groups->counts[i] - 1;
            return i;
        }
        mass = next;
    }
    *member = groups->counts[groups->number - 1] - 1; /* a product was rounded up to the whole sum */
    return groups->number - 1;
}

/* In [0, 1): what numpy's Generator makes first of Philox4x64-10 (Salmon et al. 2011) with this key and counter. */
static double uniform_of(uint64_t seed, uint64_t position)
{
    uint64_t counter[4] = {position + 1, position == UINT64_MAX, 0, 0}, key[2] = {seed, 0}; /* it counts on first */
    for (int round = 0; round < 10; round++) {
        unsigned __int128 first = (unsigned __int128)0xd2e7470ee14c6c93 * counter[0];
        unsigned __int128 second = (unsigned __int128)0xca5a826395121157 * counter[2];
        uint64_t next[4] = {(uint64_t)(second >> 64) ^ counter[1] ^ key[0], (uint64_t)second,
                            (uint64_t)(first >> 64) ^ counter[3] ^ key[1], (uint64_t)first};
        memcpy(counter, next, sizeof counter);
        key[0] += 0x9e3779b97f4a7c15;
        key[1] += 0xbb67ae8584caa73b;
    }
    return (double)(counter[0] >> 11) * (1.0 / 9007199254740992.0);
}

/* The place in the order of a number that is at most this, or of the lowest one; not minus infinity. */
static int order_below(double value)
{
    int order = order_of(nearest_number((float)value)) - 1; /* one less: what is rounded may be greater */
    return order > order_of(MINUS_INFINITY) ? order : order_of(MINUS_INFINITY) + 1;
}

/* The group that the row's token is in, of numbers down to where they are negligible, and which of its tokens. */
static int64_t draw(const struct sampled_row *row, const bits16 *own, int64_t num_columns, int greatest, float best,
                    struct sampling_room *room, int64_t num_strays, struct groups *groups, int64_t *member)
{
    double negligible = best - NEGLIGIBLE * row->temperature;
    int lowest = order_below(negligible), span = greatest - lowest;
    if (span >= 0)
        count_numbers(own, num_columns, greatest, span, room->histogram);
    group_counted(&room->counted, room->histogram, greatest, span);
    num_strays = sort_strays(room, num_strays, negligible);
    *groups = num_strays ? room->groups : room->counted;
    if (num_strays)
        merge_strays(groups, &room->counted, room->strays, num_strays);
    weigh_groups(groups, best, row->temperature);
    restrict_groups(groups, row);
    return choose_group(groups, uniform_of(row->seed, (uint64_t)row->position), member);
}

static int64_t sample_row(const struct sample_call *call, const struct sampled_row *row)
{
    const bits16 *own = call->logits + row->row * call->num_columns;
    struct sampling_room room;
    struct groups groups;
    int64_t num_strays = 0, member;
    uint64_t first = UINT64_MAX; /* of the strays */
    if (!take_sampling_room(call->num_columns, &room))
        return NO_MEMORY;
    if (row->num_prompt || row->num_output || row->num_biases || row->num_words) {
        num_strays = make_own(call, row, own, &room);
        own = room.own;
    }
    int has_nan, greatest = greatest_order(own, call->num_columns, &has_nan);
    if (num_strays < 0 || has_nan)
        return NOT_A_NUMBER;
    for (int64_t i = 0; i < num_strays; i++)
        first = room.strays[i] < first ? room.strays[i] : first;
    int is_stray = num_strays && value_of_stray(first) > number_at(greatest);
    float best = is_stray ? value_of_stray(first) : number_at(greatest);
    if (best == -INFINITY)
        return NOTHING_ALLOWED;
    if (row->temperature == 0 || best == INFINITY) /* nothing counts beside it: there are no probabilities */
        return is_stray ? (int64_t)(uint32_t)first : find_member(own, call->num_columns, greatest, 0);
    int64_t group = draw(row, own, call->num_columns, greatest, best, &room, num_strays, &groups, &member);
    if (groups.tokens[group] >= 0)
        return groups.tokens[group];
    int order = order_of(nearest_number(groups.values[group]));
    return find_member(own, call->num_columns, order, member);
}

static void sample_task(const void *argument, int64_t index)
{
    const struct sample_call *call = argument;
    call->result[index] = sample_row(call, call->rows + index);
}
#endif
