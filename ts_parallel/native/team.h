/* What kernels.c needs of shared_memory.c: a sum over ranks, between the parts of one call. */
#ifndef TS_PARALLEL_TEAM_H
#define TS_PARALLEL_TEAM_H

#include <Python.h>

#include <stdint.h>

#define TEAM_NAME "ts_parallel.native.shared_memory.team" /* of the capsule */

struct summing_team {
    /* Sums `count` numbers in bfloat16 over the ranks, in place. `released` is the calling thread's state, which runs
     * without the interpreter. Returns 0 where that fails: then an exception is set, and the thread has it again. */
    int (*sum)(const struct summing_team *team, uint16_t *numbers, int64_t count, PyThreadState **released);
    void *memory;
    int rank, size;
    int64_t patience; /* seconds */
};
#endif
