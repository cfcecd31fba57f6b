/* Products of a panel by tiles of 16 rows of 64 bytes. Pairs of inputs lie in a panel as a tile wants them: 16 of them,
 * for 16 outputs, are one. */
#ifndef TS_PARALLEL_TILES_H
#define TS_PARALLEL_TILES_H

#include <immintrin.h>

#include "numbers/numbers.h"

#define TILE_PAIRS 16

struct tile_settings {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Other libraries use the tiles of the same threads, and find their settings as they left them: so does each task. */
static _Thread_local struct tile_settings found_settings;
static _Thread_local int configured_rows; /* 0 between tasks */

/* Tiles 0 to 3 are sums of `rows` tokens for 16 outputs each, 4 is of inputs, 5 to 7 are of weights. */
static inline void configure_tiles(int rows)
{
    if (configured_rows == rows)
        return;
    if (!configured_rows)
        _tile_storeconfig(&found_settings);
    struct tile_settings settings = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        settings.row_bytes[tile] = 64;
        settings.rows[tile] = (uint8_t)(tile < 5 ? rows : TILE_PAIRS);
    }
    _tile_loadconfig(&settings);
    configured_rows = rows;
}

static inline void give_back_tiles(void)
{
    if (configured_rows)
        _tile_loadconfig(&found_settings);
    configured_rows = 0;
}

/* So many pairs of a panel in bfloat16, from number `first` on; where less than a tile is left, zeros behind them. */
INLINE const bits16 *pairs_of_tile(const enum number_kind kind, const struct panel *panel, int64_t first, int64_t count,
                                 struct decoder *decoder, bits16 room[TILE_PAIRS * 2 * PANEL])
{
    const int64_t size = bytes_of_pair(kind);
    const uint8_t *from = panel->numbers + first * size, *ahead = panel->ahead + first * panel->bytes_ahead;
    if (kind == PLAIN) {
        for (int64_t byte = 0; byte < count * panel->bytes_ahead; byte += 64)
            __builtin_prefetch(ahead + byte, 0, 2);
        if (count == TILE_PAIRS)
            return (const bits16 *)from;
        memcpy(room, from, (size_t)(count * size));
    } else {
        bits16 *to = panel->kept ? panel->kept + first * 2 * PANEL : room;
        for (int64_t pair = 0; pair < count; pair++) {
            operand weight[4];
#pragma GCC unroll 4
            for (int line = 0; line < size; line += 64)
                __builtin_prefetch(from + pair * size + line + 2048, 0, 3);
            load_pair(kind, from + pair * size, first + pair, 0, 4, decoder, weight);
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++)
                keep_operand(to + pair * 2 * PANEL + 32 * part, weight[part]);
        }
        if (count == TILE_PAIRS)
            return to;
        if (to != room)
            memcpy(room, to, (size_t)(count * 2 * PANEL) * sizeof *to);
    }
    memset(room + count * 2 * PANEL, 0, (size_t)((TILE_PAIRS - count) * 2 * PANEL) * sizeof *room);
    return room;
}

static inline int64_t pairs_at(int64_t num_pairs, int64_t pair)
{
    return num_pairs - pair < TILE_PAIRS ? num_pairs - pair : TILE_PAIRS;
}

#define ADD_TILE(sums, weights, part)                                                                                  \
    _tile_loadd(weights, from + 32 * (part), 2 * PANEL * sizeof(bits16));                                                \
    _tile_dpbf16ps(sums, 4, weights)

/* `rows` tokens, at most 16, times `num_pairs` pairs of inputs from `first` on; in bfloat16 they are left in `kept`. */
INLINE void multiply_block(const enum number_kind kind, int rows, const bits16 *input, int64_t stride,
                           const struct panel *panel, int64_t first, int64_t num_pairs, floats sums[][4])
{
    /* A tile is not loaded before what was stored there has left the processor: so the next one is made before. */
    _Alignas(64) bits16 room[2][TILE_PAIRS * 2 * PANEL], inputs[16 * 2 * TILE_PAIRS];
    struct decoder decoder = make_decoder(kind, panel->head);
    const bits16 *next = pairs_of_tile(kind, panel, first, pairs_at(num_pairs, 0), &decoder, room[0]);
    configure_tiles(rows);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t pair = 0; pair < num_pairs; pair += TILE_PAIRS) {
        const bits16 *from = next, *own = input + 2 * (first + pair);
        int64_t own_stride = stride, count = pairs_at(num_pairs, pair), later = pair + TILE_PAIRS;
        if (later < num_pairs)
            next = pairs_of_tile(kind, panel, first + later, pairs_at(num_pairs, later), &decoder,
                                 room[later / TILE_PAIRS % 2]);
        if (count < TILE_PAIRS) { /* what lies behind a row may be no number */
            memset(inputs, 0, sizeof inputs);
            for (int row = 0; row < rows; row++)
                memcpy(inputs + row * 2 * TILE_PAIRS, own + row * stride, (size_t)(2 * count) * sizeof *own);
            own = inputs;
            own_stride = 2 * TILE_PAIRS;
        }
        _tile_loadd(4, own, own_stride * (int64_t)sizeof *own);
        ADD_TILE(0, 5, 0);
        ADD_TILE(1, 6, 1);
        ADD_TILE(2, 7, 2);
        ADD_TILE(3, 5, 3);
    }
    _tile_stored(0, &sums[0][0], sizeof *sums);
    _tile_stored(1, &sums[0][1], sizeof *sums);
    _tile_stored(2, &sums[0][2], sizeof *sums);
    _tile_stored(3, &sums[0][3], sizeof *sums);
}
#endif
