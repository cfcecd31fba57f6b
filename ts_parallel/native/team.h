/* What kernels.c needs of shared_memory.c: a sum over ranks, between the parts of one call. */
#ifndef TS_PARALLEL_TEAM_H
#define TS_PARALLEL_TEAM_H

#include <Python.h>

#include <stdint.h>

#define TEAM_NAME "ts_parallel.native.shared_memory.team" /* of the capsule */

enum summed { FLOAT32, BFLOAT16, FLOAT16, NUM_TYPES };

struct summing_team {
    /* Sums `count` numbers of 16 bits, which are of this type, over the ranks, in place. `released` is the calling
     * thread's state, which runs without the interpreter. Returns 0 where that fails: then an exception is set, and the
     * thread has it again. */
    int (*sum)(const struct summing_team *team, uint16_t *numbers, int64_t count, enum summed type,
               PyThreadState **released);
    void *memory;
    int rank, size;
    int64_t patience; /* seconds */
};
#endif
