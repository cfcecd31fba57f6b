/* Threads that share the work of one call, and wait for the next one without holding a core for long.
 *
 * Two regions of a step follow each other within microseconds, so a thread that has done its part looks for the next
 * one for a while before it sleeps. OpenMP's threads either sleep at once or keep their core for milliseconds; the
 * processes that share a serving machine can afford neither.
 */
#ifndef TS_PARALLEL_POOL_H
#define TS_PARALLEL_POOL_H

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define POOL_MAX_THREADS 256
#define POOL_SPIN_NANOSECONDS 60000 /* longer than what lies between two regions of a step, shorter than a time slice */

#define POOL_OVER UINT32_MAX

typedef void (*pool_task)(const void *argument, int64_t index);

static struct {
    pthread_mutex_t owner; /* held by the caller whose tasks run */
    pid_t process;         /* a fork has the workers' state, but not the workers */
    int num_workers;
    _Atomic int num_wanted; /* how many of the workers take part */
    _Atomic uint32_t num_asleep;
    /* What runs. Changed only while the ticket says that nothing does. */
    pool_task task;
    const void *argument;
    int64_t num_tasks;
    int64_t share; /* of the tasks that are left, one in so many is taken at once */
    /* What is read soon after: who has nothing to do fetches it into the cache. A hint, so nobody waits for it. */
    const char *_Atomic ahead;
    _Atomic int64_t bytes_ahead;
    _Alignas(64) _Atomic uint64_t ticket; /* number of the region, number of its next task */
    _Alignas(64) _Atomic int64_t num_done;
    _Alignas(64) _Atomic uint32_t region; /* what sleepers wait for */
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .ticket = POOL_OVER};

/* Tell the processor that this thread does nothing but wait. */
static inline void pool_relax(void)
{
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("isb");
#endif
}

static inline int64_t pool_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Run tasks of region number `region` until there are none left. Who comes too late finds nothing to take. */
static inline void pool_take(uint32_t region)
{
    uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    while ((uint32_t)(ticket >> 32) == region) {
        uint32_t index = (uint32_t)ticket;
        pool_task task = pool.task;
        const void *argument = pool.argument;
        if (index == POOL_OVER || index >= pool.num_tasks)
            return;
        int64_t taken = (pool.num_tasks - index) / pool.share;
        if (taken < 1)
            taken = 1;
        /* Succeeds only if the region has not ended since the fields above were read. */
        if (atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket + (uint64_t)taken, memory_order_acq_rel,
                                                  memory_order_acquire)) {
            for (int64_t i = 0; i < taken; i++)
                task(argument, index + i);
            atomic_fetch_add_explicit(&pool.num_done, taken, memory_order_release);
            ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
        }
    }
}

static void *pool_worker(void *start)
{
    uint32_t seen = (uint32_t)((uintptr_t)start >> 16);
    int number = (uintptr_t)start & 0xffff;
    for (;;) {
        int64_t until = 0, left = atomic_load_explicit(&pool.bytes_ahead, memory_order_relaxed);
        const char *ahead = atomic_load_explicit(&pool.ahead, memory_order_relaxed);
        uint32_t now;
        while ((now = atomic_load_explicit(&pool.region, memory_order_acquire)) == seen) {
            if (left > 0) {
                for (int i = 0; i < 16; i++)
                    __builtin_prefetch(ahead + 64 * i, 0, 2);
                ahead += 1024;
                left -= 1024;
                continue;
            }
            for (int i = 0; i < 32 && atomic_load_explicit(&pool.region, memory_order_relaxed) == seen; i++)
                pool_relax();
            int64_t time = pool_now();
            if (!until)
                until = time + POOL_SPIN_NANOSECONDS;
            if (time < until)
                continue;
            atomic_fetch_add(&pool.num_asleep, 1);
            syscall(SYS_futex, &pool.region, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            atomic_fetch_sub(&pool.num_asleep, 1);
        }
        seen = now;
        if (number < atomic_load_explicit(&pool.num_wanted, memory_order_relaxed))
            pool_take(now);
    }
    return NULL;
}

/* With `owner` held: have this many workers, or as many as the system grants. */
static inline void pool_grow(int num_workers)
{
    if (pool.process != getpid()) {
        pool.process = getpid();
        pool.num_workers = 0;
        atomic_store(&pool.num_asleep, 0);
    }
    while (pool.num_workers < num_workers && pool.num_workers < POOL_MAX_THREADS) {
        uintptr_t start = ((uintptr_t)atomic_load(&pool.region) << 16) | (uintptr_t)pool.num_workers;
        pthread_t thread;
        if (pthread_create(&thread, NULL, pool_worker, (void *)start))
            return;
        pthread_detach(thread);
        pool.num_workers++;
    }
}

/* Before `pool_run`: what whoever is done first may fetch until the next region. */
static inline void pool_look_ahead(const void *memory, int64_t num_bytes)
{
    atomic_store_explicit(&pool.ahead, (const char *)memory, memory_order_relaxed);
    atomic_store_explicit(&pool.bytes_ahead, num_bytes, memory_order_relaxed);
}

/* Run `task` for all indices below `num_tasks`, in `num_threads` threads with this one, which take one in `share` of
 * those left at once. A caller that finds the workers busy with another's tasks runs its own alone. */
static inline void pool_share(pool_task task, const void *argument, int64_t num_tasks, int num_threads, int64_t share)
{
    if (num_threads > num_tasks)
        num_threads = (int)num_tasks;
    if (num_threads <= 1 || pthread_mutex_trylock(&pool.owner)) {
        for (int64_t index = 0; index < num_tasks; index++)
            task(argument, index);
        return;
    }
    pool_grow(num_threads - 1);
    uint32_t region = atomic_load(&pool.region) + 1;
    pool.task = task;
    pool.argument = argument;
    pool.num_tasks = num_tasks;
    pool.share = share;
    atomic_store(&pool.num_done, 0);
    atomic_store(&pool.num_wanted, num_threads - 1);
    atomic_store(&pool.ticket, (uint64_t)region << 32);
    atomic_store(&pool.region, region);
    if (atomic_load(&pool.num_asleep))
        syscall(SYS_futex, &pool.region, FUTEX_WAKE_PRIVATE, num_threads - 1, NULL, NULL, 0);
    pool_take(region);
    for (int i = 0; atomic_load_explicit(&pool.num_done, memory_order_acquire) < num_tasks; i++)
        if (i < 4096)
            pool_relax();
        else
            sched_yield(); /* its core was given to somebody else */
    atomic_store(&pool.ticket, ((uint64_t)region << 32) | POOL_OVER);
    pthread_mutex_unlock(&pool.owner);
}

/* Tasks one by one, for they take a different time. */
static inline void pool_run(pool_task task, const void *argument, int64_t num_tasks, int num_threads)
{
    pool_share(task, argument, num_tasks, num_threads, INT64_MAX);
}

/* Tasks that read memory one behind the other, in runs as long as can be: memory gives those faster. First half of
 * them, if there are two threads, at last a single one (guided self-scheduling, Polychronopoulos and Kuck 1987). */
static inline void pool_run_in_order(pool_task task, const void *argument, int64_t num_tasks, int num_threads)
{
    pool_share(task, argument, num_tasks, num_threads, num_threads);
}
#endif
