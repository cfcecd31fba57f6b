/* AMX with BF16 (Sapphire Rapids and later) for the products of linears, whatever the number of tokens: tiles add in an
 * order of their own, and no token may depend on how many there are. All else is as in avx512_bf16.h. */
#include "instructions/avx512_bf16.h"

#undef KEEPING_ROWS
#define KEEPING_ROWS 16
#undef FEW_TOKENS
#define FEW_TOKENS 16 /* which are one tile, and need no numbers twice */
#define ROWS_OF_LINEARS 16 /* of a tile */
#define HAS_TILES
