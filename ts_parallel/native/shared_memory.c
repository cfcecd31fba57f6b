/* Ranks of one host talk through memory that all of them have mapped: teams that sum and gather, rings of messages.
 *
 * Addresses are those of the caller's mapping; the memory is zero before anybody enters. A waiting rank spins, then
 * offers its core to others where that is cheap, then sleeps until it is woken, and looks now and then whether the
 * other one lives.
 * Knows bytes and element types, not tensors. Linux only. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "numbers/formats.h"
#include "team.h"

/* Two cache lines, for processors fetch the one beside it too. */
#define APART 128
#define UNIT 64

/* Bytes of one half of a rank's slot. Both halves and what they are summed into stay in a core's second-level cache. */
#define HALF_SLOT (256 * 1024)

/* Up to here a call does its work without letting other threads of Python have their turn: about 5 us. */
#define SMALL (32 * 1024)

#define HELD_NS 4000
#define SPIN_NS 40000
#define YIELD_NS 600000 /* longer than the leader takes between two steps: to be woken costs tens of microseconds */
#define DEAR_NS 500000  /* a yield that took so long has given the core to a program that wants it for itself */
#define SHY_NS 200000000
#define TICK_NS 250000000

static const uint64_t second = 1000000000;

struct process {
    int32_t pid;
    int32_t rank;
    uint64_t start; /* in the kernel's ticks since boot: a later process of the same id has another one */
};

/* A number that one process counts up and others wait for. */
struct counter {
    _Atomic uint32_t value;
    _Atomic uint32_t num_asleep;
    struct process owner;
    _Atomic uint32_t has_owner; /* once this is set, `owner` is whole and stays as it is */
    char pad[APART - 3 * sizeof(uint32_t) - sizeof(struct process)];
};

/* `sent` and `taken` count units since the beginning; their difference is what lies in the ring. */
struct ring {
    struct counter sent, taken;
    char units[];
};

struct record {
    int64_t num_bytes;
    int64_t is_elsewhere;
};

_Static_assert(sizeof(struct counter) == APART, "counters lie apart");
_Static_assert(sizeof(struct record) <= UNIT, "a record's head lies in one piece");

/* One call from Python, which lets other threads run once it takes long. */
struct call {
    PyThreadState *released;
    uint64_t patience_ns;
};

static void let_others_run(struct call *call)
{
    if (!call->released)
        call->released = PyEval_SaveThread();
}

static void come_back(struct call *call)
{
    if (call->released) {
        PyEval_RestoreThread(call->released);
        call->released = NULL;
    }
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * second + (uint64_t)now.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- Processes ---- */

#define ENDED 0
#define UNKNOWN UINT64_MAX

/* When a process began. ENDED also where it has, and nobody has asked for its status yet. */
static uint64_t start_of(int pid)
{
    char path[32], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return errno == ENOENT || errno == ESRCH ? ENDED : UNKNOWN;
    size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = 0;
    char *after_name = strrchr(text, ')'); /* a name may hold anything, also brackets and spaces */
    char state;
    unsigned long long start;
    const char *format = " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu";
    if (!after_name || sscanf(after_name + 1, format, &state, &start) != 2 || state == 'Z' || state == 'X')
        return ENDED;
    return start;
}

/* `process` may be all zero: who has not entered yet. */
static bool has_ended(struct process process)
{
    if (!process.pid || process.start == UNKNOWN)
        return false;
    uint64_t start = start_of(process.pid);
    return start != UNKNOWN && start != process.start;
}

/* Nobody else has to have entered before a rank begins to wait. Who saw a process's id without its start yet would take
 * it for one that has ended, so all of `owner` is published at once: written first, then released, and read only by who
 * has acquired it. */
static void enter(struct counter *counter, int rank)
{
    counter->owner = (struct process){getpid(), rank, start_of(getpid())};
    atomic_store_explicit(&counter->has_owner, 1, memory_order_release);
}

/* All zero where nobody has entered yet. */
static struct process owner_of(struct counter *counter)
{
    if (!atomic_load_explicit(&counter->has_owner, memory_order_acquire))
        return (struct process){0};
    return counter->owner;
}

/* ---- Waiting ---- */

static inline bool has_reached(struct counter *counter, uint32_t wanted)
{
    return (int32_t)(atomic_load_explicit(&counter->value, memory_order_acquire) - wanted) >= 0;
}

static void count_to(struct counter *counter, uint32_t value)
{
    /* In one order with the load below and with sleep_until's: either this sees the sleeper, or that sees the value. */
    atomic_store(&counter->value, value);
    if (atomic_load(&counter->num_asleep))
        syscall(SYS_futex, &counter->value, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void sleep_until(struct counter *counter, uint32_t wanted)
{
    const struct timespec tick = {.tv_nsec = TICK_NS};
    atomic_fetch_add(&counter->num_asleep, 1);
    uint32_t value = atomic_load(&counter->value);
    if ((int32_t)(value - wanted) < 0)
        syscall(SYS_futex, &counter->value, FUTEX_WAIT, value, &tick, NULL, 0);
    atomic_fetch_sub(&counter->num_asleep, 1);
}

/* Whether to go on waiting; if not, an exception is set. */
static bool is_worth_waiting(struct call *call, struct counter *counter, uint32_t wanted, uint64_t began)
{
    struct process owner = owner_of(counter);
    bool is_lost = has_ended(owner), is_late = now_ns() - began >= call->patience_ns;
    if (has_reached(counter, wanted))
        return true;
    come_back(call);
    if (PyErr_CheckSignals())
        return false;
    if (is_lost)
        PyErr_Format(PyExc_RuntimeError, "rank %d (process %d) has ended, and this rank waited for it", owner.rank,
                     owner.pid);
    else if (is_late)
        PyErr_Format(PyExc_RuntimeError, "this rank has waited %llu s for rank %d (process %d): no longer",
                     (unsigned long long)(call->patience_ns / second), owner.rank, owner.pid);
    else {
        let_others_run(call);
        return true;
    }
    return false;
}

/* Whether the counter has got there; if not, an exception is set. */
static bool wait_slowly(struct call *call, struct counter *counter, uint32_t wanted)
{
    uint64_t began = now_ns(), waited = 0;
    while (waited < SPIN_NS) {
        for (int i = 0; i < 16; i++) {
            relax();
            if (has_reached(counter, wanted))
                return true;
        }
        waited = now_ns() - began;
        if (waited > HELD_NS)
            let_others_run(call);
    }
    /* Who yields to a busy program loses a time slice of milliseconds, however nice that is, for it forfeits the time it
     * was entitled to; who sleeps keeps that, and runs soon after it is woken. There are dozens of waits in a token, so
     * after one such loss this thread sleeps at once for a while, and then tries again. */
    static _Thread_local uint64_t yields_from;
    for (uint64_t now = now_ns(); now >= yields_from && now - began < SPIN_NS + YIELD_NS;) {
        uint64_t before = now;
        sched_yield();
        now = now_ns();
        if (now - before > DEAR_NS)
            yields_from = now + SHY_NS;
        if (has_reached(counter, wanted))
            return true;
    }
    for (;;) {
        sleep_until(counter, wanted);
        if (has_reached(counter, wanted))
            return true;
        if (!is_worth_waiting(call, counter, wanted, began))
            return false;
    }
}

static inline bool wait_for(struct call *call, struct counter *counter, uint32_t wanted)
{
    return has_reached(counter, wanted) || wait_slowly(call, counter, wanted);
}

/* ---- Sums, in float32 and in the order of the ranks ---- */

static const size_t bytes_of_type[NUM_TYPES] = {4, 2, 2};

INLINE float same(float value)
{
    return value;
}

/* So many sums are made at once, in the first-level cache. */
#define AT_ONCE 512

#define DEFINE_SUM(NAME, TARGET, TYPE, WIDEN, NARROW)                                                                  \
    TARGET static void NAME(void *out, const void *const *parts, int num_parts, size_t count)                          \
    {                                                                                                                  \
        float sums[AT_ONCE];                                                                                           \
        for (size_t begin = 0; begin < count; begin += AT_ONCE) {                                                      \
            size_t num = count - begin < AT_ONCE ? count - begin : AT_ONCE;                                            \
            const TYPE *first = (const TYPE *)parts[0] + begin;                                                        \
            for (size_t i = 0; i < num; i++)                                                                           \
                sums[i] = WIDEN(first[i]);                                                                             \
            for (int rank = 1; rank < num_parts; rank++) {                                                             \
                const TYPE *part = (const TYPE *)parts[rank] + begin;                                                  \
                for (size_t i = 0; i < num; i++)                                                                       \
                    sums[i] += WIDEN(part[i]);                                                                         \
            }                                                                                                          \
            TYPE *sum = (TYPE *)out + begin;                                                                           \
            for (size_t i = 0; i < num; i++)                                                                           \
                sum[i] = NARROW(sums[i]);                                                                              \
        }                                                                                                              \
    }

#define ANY
DEFINE_SUM(sum_float32, ANY, float, same, same)
DEFINE_SUM(sum_bfloat16, ANY, uint16_t, widen_bfloat16, narrow_bfloat16)
DEFINE_SUM(sum_float16, ANY, uint16_t, widen_float16, narrow_float16)

typedef void (*sum_function)(void *, const void *const *, int, size_t);
static sum_function sums[NUM_TYPES] = {sum_float32, sum_bfloat16, sum_float16};

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

DEFINE_SUM(sum_float32_avx2, AVX2, float, same, same)
DEFINE_SUM(sum_bfloat16_avx2, AVX2, uint16_t, widen_bfloat16, narrow_bfloat16)
DEFINE_SUM(sum_float32_avx512, AVX512, float, same, same)
DEFINE_SUM(sum_bfloat16_avx512, AVX512, uint16_t, widen_bfloat16, narrow_bfloat16)

/* The compiler does not find these conversions by itself. */
AVX2 static void sum_float16_avx2(void *out, const void *const *parts, int num_parts, size_t count)
{
    const uint16_t *rest[num_parts];
    size_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256 sum = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)parts[0] + i)));
        for (int rank = 1; rank < num_parts; rank++) {
            const __m128i *part = (const __m128i *)((const uint16_t *)parts[rank] + i);
            sum = _mm256_add_ps(sum, _mm256_cvtph_ps(_mm_loadu_si128(part)));
        }
        _mm_storeu_si128((__m128i *)((uint16_t *)out + i), _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
    }
    for (int rank = 0; rank < num_parts; rank++)
        rest[rank] = (const uint16_t *)parts[rank] + i;
    sum_float16((uint16_t *)out + i, (const void *const *)rest, num_parts, count - i);
}

static const char *choose_sums(void)
{
    __builtin_cpu_init();
    const char *chosen = "plain C";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
        sums[FLOAT32] = sum_float32_avx2;
        sums[BFLOAT16] = sum_bfloat16_avx2;
        sums[FLOAT16] = sum_float16_avx2;
        chosen = "AVX2";
    }
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        sums[FLOAT32] = sum_float32_avx512;
        sums[BFLOAT16] = sum_bfloat16_avx512;
        chosen = "AVX-512";
    }
    return chosen;
}

#else

static const char *choose_sums(void)
{
    return "plain C";
}

#endif

/* ---- Teams ----
 *
 * Each rank counts the pieces that it has put into its slot, one half after the other. That it has put piece s there
 * says too that it has read all it wants of piece s - 1. So who has seen everybody's s - 1 may overwrite its s - 2. */

struct team {
    char *memory;
    int rank, size;
};

static struct counter *counter_of(struct team team, int rank)
{
    return (struct counter *)team.memory + rank;
}

static char *slot_of(struct team team, int rank, uint32_t piece)
{
    size_t counters = (size_t)team.size * sizeof(struct counter);
    return team.memory + counters + ((size_t)rank * 2 + (piece & 1)) * HALF_SLOT;
}

static uint64_t bytes_of_team(int size)
{
    return (uint64_t)size * (sizeof(struct counter) + 2 * HALF_SLOT);
}

static bool wait_for_all(struct call *call, struct team team, uint32_t piece)
{
    for (int rank = 0; rank < team.size; rank++)
        if (rank != team.rank && !wait_for(call, counter_of(team, rank), piece))
            return false;
    return true;
}

static bool put_piece(struct call *call, struct team team, uint32_t piece, const char *data, size_t num_bytes)
{
    if (!wait_for_all(call, team, piece - 1))
        return false;
    memcpy(slot_of(team, team.rank, piece), data, num_bytes);
    count_to(counter_of(team, team.rank), piece);
    return true;
}

static uint32_t next_piece(struct team team)
{
    return atomic_load_explicit(&counter_of(team, team.rank)->value, memory_order_relaxed) + 1;
}

static bool sum_over_ranks(struct call *call, struct team team, char *data, size_t num_bytes, int type)
{
    const void *parts[team.size];
    uint32_t piece = next_piece(team);
    for (size_t begin = 0; begin < num_bytes; begin += HALF_SLOT, piece++) {
        size_t length = num_bytes - begin < HALF_SLOT ? num_bytes - begin : HALF_SLOT;
        if (!put_piece(call, team, piece, data + begin, length) || !wait_for_all(call, team, piece))
            return false;
        for (int rank = 0; rank < team.size; rank++)
            parts[rank] = rank == team.rank ? data + begin : slot_of(team, rank, piece);
        sums[type](data + begin, parts, team.size, length / bytes_of_type[type]);
    }
    return true;
}

/* A rank's part `[rows, width]` is one run of bytes; its bytes from `begin` on go to their places in rows of `stride`
 * bytes, of which `whole` is the part's first byte. */
static void place(char *whole, size_t stride, size_t width, size_t begin, const char *piece, size_t length)
{
    while (length) {
        size_t row = begin / width, column = begin % width;
        size_t fitting = width - column < length ? width - column : length;
        memcpy(whole + row * stride + column, piece, fitting);
        begin += fitting;
        piece += fitting;
        length -= fitting;
    }
}

/* `whole` is NULL on a rank that only gives. */
static bool gather_parts(struct call *call, struct team team, const char *part, size_t rows, const size_t *widths,
                         char *whole)
{
    size_t stride = 0, widest = 0, length_of_widest;
    for (int rank = 0; rank < team.size; rank++) {
        stride += widths[rank];
        widest = widths[rank] > widest ? widths[rank] : widest;
    }
    length_of_widest = rows * widest;
    uint32_t piece = next_piece(team);
    for (size_t begin = 0; begin < length_of_widest; begin += HALF_SLOT, piece++) {
        size_t lengths[team.size];
        for (int rank = 0; rank < team.size; rank++) {
            size_t length = rows * widths[rank];
            length = length > begin ? length - begin : 0;
            lengths[rank] = length < HALF_SLOT ? length : HALF_SLOT;
        }
        if (!put_piece(call, team, piece, part + begin, lengths[team.rank]))
            return false;
        if (!whole)
            continue;
        if (!wait_for_all(call, team, piece))
            return false;
        size_t column = 0;
        for (int rank = 0; rank < team.size; column += widths[rank++]) {
            const char *source = rank == team.rank ? part + begin : slot_of(team, rank, piece);
            place(whole + column, stride, widths[rank], begin, source, lengths[rank]);
        }
    }
    return true;
}

/* ---- Rings ---- */

static void copy_in(struct ring *ring, size_t num_bytes_of_ring, size_t at, const void *data, size_t num_bytes)
{
    at %= num_bytes_of_ring;
    size_t first = num_bytes_of_ring - at < num_bytes ? num_bytes_of_ring - at : num_bytes;
    memcpy(ring->units + at, data, first);
    memcpy(ring->units, (const char *)data + first, num_bytes - first);
}

static void copy_out(struct ring *ring, size_t num_bytes_of_ring, size_t at, void *data, size_t num_bytes)
{
    at %= num_bytes_of_ring;
    size_t first = num_bytes_of_ring - at < num_bytes ? num_bytes_of_ring - at : num_bytes;
    memcpy(data, ring->units + at, first);
    memcpy((char *)data + first, ring->units, num_bytes - first);
}

static size_t units_of(struct record record)
{
    return (sizeof record + (record.is_elsewhere ? 0 : (size_t)record.num_bytes) + UNIT - 1) / UNIT;
}

static uint32_t value_of(struct counter *counter)
{
    return atomic_load_explicit(&counter->value, memory_order_acquire);
}

/* ---- What Python sees ---- */

static bool read_numbers(PyObject *const *arguments, Py_ssize_t given, Py_ssize_t wanted, int64_t *numbers)
{
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", wanted, given);
        return false;
    }
    for (Py_ssize_t i = 0; i < wanted; i++) {
        numbers[i] = PyLong_AsLongLong(arguments[i]);
        if (numbers[i] == -1 && PyErr_Occurred())
            return false;
    }
    return true;
}

static struct call begin_call(int64_t patience, size_t num_bytes)
{
    struct call call = {NULL, (uint64_t)patience * second};
    if (num_bytes > SMALL)
        let_others_run(&call);
    return call;
}

static PyObject *end_call(struct call *call, bool is_done)
{
    come_back(call);
    if (!is_done)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *team_bytes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t given)
{
    int64_t size;
    if (!read_numbers(arguments, given, 1, &size))
        return NULL;
    return PyLong_FromUnsignedLongLong(bytes_of_team((int)size));
}

static PyObject *enter_team(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t given)
{
    int64_t in[3];
    if (!read_numbers(arguments, given, 3, in))
        return NULL;
    enter((struct counter *)(intptr_t)in[0] + in[1], (int)in[2]);
    Py_RETURN_NONE;
}

static PyObject *all_reduce(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t given)
{
    int64_t in[7];
    if (!read_numbers(arguments, given, 7, in))
        return NULL;
    if (in[5] < 0 || in[5] >= NUM_TYPES)
        return PyErr_Format(PyExc_ValueError, "type %lld is none of FLOAT32, BFLOAT16, FLOAT16", (long long)in[5]);
    struct team team = {(char *)(intptr_t)in[0], (int)in[1], (int)in[2]};
    size_t num_bytes = (size_t)in[4] * bytes_of_type[in[5]];
    struct call call = begin_call(in[6], num_bytes);
    return end_call(&call, sum_over_ranks(&call, team, (char *)(intptr_t)in[3], num_bytes, (int)in[5]));
}

static int sum_for_kernels(const struct summing_team *summing, uint16_t *numbers, int64_t count, enum summed type,
                           PyThreadState **released)
{
    struct team team = {summing->memory, summing->rank, summing->size};
    struct call call = {*released, (uint64_t)summing->patience * second};
    bool is_done = sum_over_ranks(&call, team, (char *)numbers, (size_t)count * sizeof *numbers, (int)type);
    *released = call.released;
    return is_done;
}

static void drop_team(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, TEAM_NAME));
}

static PyObject *make_team(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t given)
{
    int64_t in[4];
    if (!read_numbers(arguments, given, 4, in))
        return NULL;
    struct summing_team *team = malloc(sizeof *team);
    if (!team)
        return PyErr_NoMemory();
    *team = (struct summing_team){sum_for_kernels, (void *)(intptr_t)in[0], (int)in[1], (int)in[2], in[3]};
    return PyCapsule_New(team, TEAM_NAME, drop_team);
}

static PyObject *gather(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t given)
{
    int64_t in[6];
    if (given != 7)
        return PyErr_Format(PyExc_TypeError, "takes 7 arguments, got %zd", given);
    if (!read_numbers(arguments, 6, 6, in))
        return NULL;
    int size = PyTuple_Check(arguments[6]) ? (int)Py_SIZE(arguments[6]) : 0;
    struct team team = {(char *)(intptr_t)in[0], (int)in[1], size};
    if (!team.size)
        return PyErr_Format(PyExc_TypeError, "the widths are a tuple of every rank's");
    size_t widths[team.size], num_bytes = 0;
    for (int rank = 0; rank < team.size; rank++) {
        widths[rank] = PyLong_AsSize_t(PyTuple_GET_ITEM(arguments[6], rank));
        if (PyErr_Occurred())
            return NULL;
        num_bytes += (size_t)in[3] * widths[rank];
    }
    struct call call = begin_call(in[5], num_bytes);
    const char *part = (const char *)(intptr_t)in[2];
    return end_call(&call, gather_parts(&call, team, part, (size_t)in[3], widths, (char *)(intptr_t)in[4]));
}

static PyObject *ring_bytes(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t given)
{
    int64_t num_bytes;
    if (!read_numbers(arguments, given, 1, &num_bytes))
        return NULL;
    if (num_bytes < 16 * UNIT || num_bytes > 1 << 30 || num_bytes & (num_bytes - 1))
        return PyErr_Format(PyExc_ValueError, "a ring of %lld bytes: a power of two is needed", (long long)num_bytes);
    return PyLong_FromLongLong((long long)sizeof(struct ring) + num_bytes);
}

static PyObject *enter_ring(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t given)
{
    int64_t in[3];
    if (!read_numbers(arguments, given, 3, in))
        return NULL;
    struct ring *ring = (struct ring *)(intptr_t)in[0];
    enter(in[1] ? &ring->sent : &ring->taken, (int)in[2]);
    Py_RETURN_NONE;
}

static PyObject *send(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t given)
{
    int64_t in[5];
    if (!read_numbers(arguments, given, 5, in))
        return NULL;
    struct ring *ring = (struct ring *)(intptr_t)in[0];
    size_t capacity = (size_t)in[1] / UNIT, size = (size_t)in[1];
    uint32_t sent = value_of(&ring->sent), lying = sent - value_of(&ring->taken);
    struct record record = {in[3], 0};
    /* The last eighth is kept for records that only announce, so that they need not wait. */
    record.is_elsewhere = in[3] > (int64_t)size || lying + units_of(record) > capacity - capacity / 8;
    size_t num_units = units_of(record);
    struct call call = begin_call(in[4], record.is_elsewhere ? 0 : (size_t)in[3]);
    bool is_done = wait_for(&call, &ring->taken, sent + (uint32_t)num_units - (uint32_t)capacity);
    if (is_done) {
        copy_in(ring, size, (size_t)sent * UNIT, &record, sizeof record);
        if (!record.is_elsewhere)
            copy_in(ring, size, (size_t)sent * UNIT + sizeof record, (const void *)(intptr_t)in[2], (size_t)in[3]);
        count_to(&ring->sent, sent + (uint32_t)num_units);
    }
    come_back(&call);
    return is_done ? PyBool_FromLong(!record.is_elsewhere) : NULL;
}

static PyObject *await_message(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t given)
{
    int64_t in[3];
    if (!read_numbers(arguments, given, 3, in))
        return NULL;
    struct ring *ring = (struct ring *)(intptr_t)in[0];
    uint32_t taken = value_of(&ring->taken);
    struct call call = begin_call(in[2], 0);
    bool is_done = wait_for(&call, &ring->sent, taken + 1);
    come_back(&call);
    if (!is_done)
        return NULL;
    struct record record;
    copy_out(ring, (size_t)in[1], (size_t)taken * UNIT, &record, sizeof record);
    return Py_BuildValue("LO", (long long)record.num_bytes, record.is_elsewhere ? Py_False : Py_True);
}

static PyObject *take(PyObject *Py_UNUSED(module), PyObject *const *arguments, Py_ssize_t given)
{
    int64_t in[3];
    if (!read_numbers(arguments, given, 3, in))
        return NULL;
    struct ring *ring = (struct ring *)(intptr_t)in[0];
    uint32_t taken = value_of(&ring->taken);
    struct record record;
    copy_out(ring, (size_t)in[1], (size_t)taken * UNIT, &record, sizeof record);
    struct call call = begin_call(0, record.is_elsewhere ? 0 : (size_t)record.num_bytes);
    if (!record.is_elsewhere)
        copy_out(ring, (size_t)in[1], (size_t)taken * UNIT + sizeof record, (void *)(intptr_t)in[2],
                 (size_t)record.num_bytes);
    count_to(&ring->taken, taken + (uint32_t)units_of(record));
    return end_call(&call, true);
}

#define METHOD(NAME) {#NAME, (PyCFunction)(void (*)(void))NAME, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    METHOD(team_bytes), METHOD(enter_team), METHOD(make_team),     METHOD(all_reduce), METHOD(gather), METHOD(ring_bytes),
    METHOD(enter_ring), METHOD(send),       METHOD(await_message), METHOD(take),       {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "shared_memory", .m_size = -1, .m_methods = methods,
};

PyMODINIT_FUNC PyInit_shared_memory(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module && (PyModule_AddStringConstant(module, "SUMS_BY", choose_sums()) ||
                   PyModule_AddIntConstant(module, "FLOAT32", FLOAT32) ||
                   PyModule_AddIntConstant(module, "BFLOAT16", BFLOAT16) ||
                   PyModule_AddIntConstant(module, "FLOAT16", FLOAT16))) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
