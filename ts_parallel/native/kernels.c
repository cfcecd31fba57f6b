/* What a step of a model spends its time with, in 16 bits: see the headers. Compiled once for each of instructions/,
 * `INSTRUCTIONS`, and where those multiply float32 once more with `IN_FLOAT16` (numbers/formats.h), as the module
 * `MODULE`. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "operations/attention.h"
#include "operations/sublayer.h"
#include "operations/elementwise.h"
#include "operations/linear.h"
#include "operations/sampling.h"
#include "numbers/packing.h"
#include "team.h"

static int num_threads = 1;

/* Integers of a call: pointers, counts, strides. */
static int integers(PyObject *const *arguments, Py_ssize_t count, Py_ssize_t wanted, int64_t *numbers)
{
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments are wanted, not %zd", wanted, count);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        numbers[i] = PyLong_AsLongLong(arguments[i]);
    return !PyErr_Occurred();
}

static PyObject *set_num_threads(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number;
    if (!integers(arguments, count, 1, &number))
        return NULL;
    num_threads = number < 1 ? 1 : (int)number;
    Py_RETURN_NONE;
}

static PyObject *get_num_threads(PyObject *self, PyObject *none)
{
    (void)self, (void)none;
    return PyLong_FromLong(num_threads);
}

static PyObject *pack(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[5];
    int has_nan;
    if (!integers(arguments, count, 5, number))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    has_nan = pack_rows((bits16 *)number[0], (const bits16 *)number[1], number[2], number[3], number[4]);
    Py_END_ALLOW_THREADS;
    return PyBool_FromLong(has_nan);
}

#ifndef IN_FLOAT16
/* coded panels, rows, num_rows, num_inputs, stride */
static PyObject *code(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[5], num_coded;
    if (!integers(arguments, count, 5, number))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    num_coded = code_rows((uint8_t *)number[0], (const bits16 *)number[1], number[2], number[3], number[4]);
    Py_END_ALLOW_THREADS;
    return PyLong_FromLongLong(num_coded);
}

/* num_pairs */
static PyObject *coded_panel_bytes(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number;
    if (!integers(arguments, count, 1, &number))
        return NULL;
    return PyLong_FromLongLong(bytes_of_coded_panel(number));
}

/* coded panel, where it lies as it is */
static PyObject *keep_plain(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[2];
    if (!integers(arguments, count, 2, number))
        return NULL;
    ((struct coded_panel *)number[0])->plain = (const uint8_t *)number[1];
    Py_RETURN_NONE;
}
#endif

/* kind, panels, scales, inputs_a_group, rows, num_rows, num_inputs, stride */
static PyObject *quantize(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[8];
    if (!integers(arguments, count, 8, number))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    quantize_rows((enum number_kind)number[0], (uint8_t *)number[1], (bits16 *)number[2], number[3],
                  (const bits16 *)number[4], number[5], number[6], number[7]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

/* kind, panels, integers (int8), num_rows, num_inputs, stride */
static PyObject *place(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[6];
    if (!integers(arguments, count, 6, number))
        return NULL;
    Py_BEGIN_ALLOW_THREADS;
    place_rows((enum number_kind)number[0], (uint8_t *)number[1], (const int8_t *)number[2], number[3], number[4],
               number[5]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

#define PART_SIZE 6

/* panels, bias, num_outputs, kind, scales, pairs_a_group */
static struct linear_part part_of(const int64_t number[PART_SIZE])
{
    return (struct linear_part){(const uint8_t *)number[0],     (const bits16 *)number[1], number[2],
                                (enum number_kind)number[3], (const bits16 *)number[4], number[5]};
}

/* num_inputs, rows (int64), num_rows, output, then the part that a linear has of the weight */
static PyObject *embedding(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[4 + PART_SIZE];
    if (!integers(arguments, count, 4 + PART_SIZE, number))
        return NULL;
    struct linear_part part = part_of(number + 4);
    look_up(&part, number[0], (const int64_t *)number[1], number[2], (bits16 *)number[3]);
    Py_RETURN_NONE;
}

static struct linear *last_layer; /* the one made last, if it is there still */

static void drop_layer(PyObject *capsule)
{
    struct linear *layer = PyCapsule_GetPointer(capsule, "linear");
    if (layer->previous) {
        layer->previous->next = layer->next;
        look_behind(layer->previous, num_threads);
    }
    if (layer->next)
        layer->next->previous = layer->previous;
    if (layer == last_layer)
        last_layer = layer->previous;
    free(layer);
}

/* num_inputs, activation, then each part */
static PyObject *make_linear(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[2 + PART_SIZE * MOST_PARTS];
    if (count < 2 + PART_SIZE || count > 2 + PART_SIZE * MOST_PARTS || (count - 2) % PART_SIZE)
        return PyErr_Format(PyExc_TypeError, "%zd arguments are not 2 and %d for each of 1 to %d parts", count,
                            PART_SIZE, MOST_PARTS);
    if (!integers(arguments, count, count, number))
        return NULL;
    struct linear *layer = calloc(1, sizeof *layer);
    if (!layer)
        return PyErr_NoMemory();
    layer->num_inputs = number[0];
    layer->activation = (enum activation)number[1];
    layer->num_parts = (int)(count - 2) / PART_SIZE;
    for (int i = 0; i < layer->num_parts; i++) {
        layer->parts[i] = part_of(number + 2 + PART_SIZE * i);
        if (!layer->activation || !i)
            layer->num_panels += (layer->parts[i].num_outputs + PANEL - 1) / PANEL;
    }
    layer->previous = last_layer;
    if (last_layer) {
        last_layer->next = layer;
        look_behind(last_layer, num_threads);
    }
    last_layer = layer;
    return PyCapsule_New(layer, "linear", drop_layer);
}

/* layer, input, stride, num_tokens, residual, then the outputs of each part */
static PyObject *linear(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    struct linear_call call = {0};
    int64_t number[4 + MOST_PARTS];
    if (count < 6 || count > 5 + MOST_PARTS)
        return PyErr_Format(PyExc_TypeError, "%zd arguments are not 6 to %d", count, 5 + MOST_PARTS);
    call.layer = PyCapsule_GetPointer(arguments[0], "linear");
    if (!call.layer || !integers(arguments + 1, count - 1, count - 1, number))
        return NULL;
    call.input = (const bits16 *)number[0];
    call.stride = number[1];
    call.num_tokens = number[2];
    call.residual = (const bits16 *)number[3];
    for (Py_ssize_t i = 5; i < count; i++)
        call.outputs[i - 5] = (bits16 *)number[i - 1];
    int done = 1;
    if (call.num_tokens) {
        Py_BEGIN_ALLOW_THREADS;
        done = linear_run(&call, num_threads);
        Py_END_ALLOW_THREADS;
    }
    if (!done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* One call of many small things; the interpreter is let go only where it takes a while. */
#define RUN(task, call, num_tasks)                                                                                     \
    do {                                                                                                               \
        if ((num_tasks) == 1) {                                                                                        \
            task(call, 0);                                                                                             \
        } else if (num_tasks) {                                                                                        \
            Py_BEGIN_ALLOW_THREADS;                                                                                    \
            pool_run(task, call, num_tasks, num_threads);                                                              \
            Py_END_ALLOW_THREADS;                                                                                      \
        }                                                                                                              \
    } while (0)

/* input, weight, output, num_rows, width, is_offset, epsilon */
static PyObject *rms_norm(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[6];
    if (count != 7)
        return PyErr_Format(PyExc_TypeError, "7 arguments are wanted, not %zd", count);
    double epsilon = PyFloat_AsDouble(arguments[6]);
    if (!integers(arguments, 6, 6, number))
        return NULL;
    struct norm_call call = {(const bits16 *)number[0], (const bits16 *)number[1], (bits16 *)number[2], number[3],
                             number[4], (int)number[5], (float)epsilon};
    int64_t num_tasks = (call.num_rows + ROWS_A_TASK - 1) / ROWS_A_TASK;
    RUN(norm_task, &call, num_tasks);
    Py_RETURN_NONE;
}

/* input, token_stride, head_stride, num_tokens, num_heads, head_dim, cosine, sine, output */
static PyObject *rotary(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[9];
    if (!integers(arguments, count, 9, number))
        return NULL;
    struct rotary_call call = {(const bits16 *)number[0], number[1], number[2], number[3], number[4], number[5],
                               (const bits16 *)number[6], (const bits16 *)number[7], (bits16 *)number[8]};
    int64_t num_tasks = (call.num_tokens + ROWS_A_TASK - 1) / ROWS_A_TASK;
    RUN(rotary_task, &call, num_tasks);
    Py_RETURN_NONE;
}

/* logits, num_rows, num_columns, result */
static PyObject *argmax(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[4];
    if (!integers(arguments, count, 4, number))
        return NULL;
    struct argmax_call call = {(const bits16 *)number[0], number[2], (int64_t *)number[3]};
    RUN(argmax_task, &call, number[1]);
    Py_RETURN_NONE;
}

/* logits, num_columns, result, rows, words */
static PyObject *sample(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[3];
    char *rows, *words;
    Py_ssize_t rows_size, words_size;
    if (count != 5)
        return PyErr_Format(PyExc_TypeError, "5 arguments are wanted, not %zd", count);
    if (!integers(arguments, 3, 3, number) || PyBytes_AsStringAndSize(arguments[3], &rows, &rows_size) ||
        PyBytes_AsStringAndSize(arguments[4], &words, &words_size))
        return NULL;
    if (rows_size % (Py_ssize_t)sizeof(struct sampled_row))
        return PyErr_Format(PyExc_ValueError, "a row has %zu bytes", sizeof(struct sampled_row));
    struct sample_call call = {(const bits16 *)number[0], number[1], (const struct sampled_row *)rows,
                               (const int64_t *)words, (int64_t *)number[2]};
    Py_ssize_t num_rows = rows_size / (Py_ssize_t)sizeof(struct sampled_row);
    RUN(sample_task, &call, num_rows);
    for (Py_ssize_t row = 0; row < num_rows; row++)
        if (call.result[row] == NO_MEMORY)
            return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static void drop_site(PyObject *capsule)
{
    free(PyCapsule_GetPointer(capsule, "site"));
}

static void drop_step(PyObject *capsule)
{
    struct step *step = PyCapsule_GetPointer(capsule, "step");
    free((void *)step->blocks);
    free((void *)step->slots);
    free(step);
}

/* num_heads, num_kv_heads, head_dim, value_dim, window, keys, values, sinks, scaling, softcap */
static PyObject *make_site(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[8];
    if (count != 10)
        return PyErr_Format(PyExc_TypeError, "10 arguments are wanted, not %zd", count);
    double scaling = PyFloat_AsDouble(arguments[8]), softcap = PyFloat_AsDouble(arguments[9]);
    if (!integers(arguments, 8, 8, number))
        return NULL;
    struct site *site = malloc(sizeof *site);
    if (!site)
        return PyErr_NoMemory();
    *site = (struct site){number[0], number[1], number[2], number[3], number[4], (float)scaling, (float)softcap,
                          (const bits16 *)number[7], (bits16 *)number[5], (bits16 *)number[6]};
    return PyCapsule_New(site, "site", drop_site);
}

/* block_size, num_tokens, chunks (int64 [C, 4] as bytes), blocks (int64 as bytes) */
static PyObject *make_step(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[2];
    char *chunks, *blocks;
    Py_ssize_t chunks_size, blocks_size;
    if (count != 4)
        return PyErr_Format(PyExc_TypeError, "4 arguments are wanted, not %zd", count);
    if (!integers(arguments, 2, 2, number) || PyBytes_AsStringAndSize(arguments[2], &chunks, &chunks_size) ||
        PyBytes_AsStringAndSize(arguments[3], &blocks, &blocks_size))
        return NULL;
    struct step *step = malloc(sizeof *step + (size_t)chunks_size);
    int64_t *copy = malloc((size_t)blocks_size), *slots = malloc((size_t)number[1] * sizeof *slots);
    if (!step || !copy || !slots) {
        free(step);
        free(copy);
        free(slots);
        return PyErr_NoMemory();
    }
    step->block_size = number[0];
    step->num_lanes = lanes_of(number[0]);
    step->num_tokens = number[1];
    step->num_chunks = chunks_size / (Py_ssize_t)sizeof(struct chunk);
    memcpy(step->chunks, chunks, (size_t)chunks_size);
    memcpy(copy, blocks, (size_t)blocks_size);
    step->blocks = copy;
    step->slots = slots;
    for (int64_t i = 0; i < step->num_chunks; i++)
        for (int64_t token = 0; token < step->chunks[i].num_tokens; token++)
            slots[step->chunks[i].first_row + token] = slot_of(step, &step->chunks[i], step->chunks[i].start + token);
    return PyCapsule_New(step, "step", drop_step);
}

/* site, step, cosine, sine, then data, head stride and token stride of query, key, value and output */
static PyObject *attention(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[14];
    struct attention_call call = {0};
    if (count != 16)
        return PyErr_Format(PyExc_TypeError, "16 arguments are wanted, not %zd", count);
    call.site = PyCapsule_GetPointer(arguments[0], "site");
    call.step = PyCapsule_GetPointer(arguments[1], "step");
    if (!call.site || !call.step || !integers(arguments + 2, 14, 14, number))
        return NULL;
    call.cosine = (const bits16 *)number[0];
    call.sine = (const bits16 *)number[1];
    struct heads *heads[4] = {&call.query, &call.key, &call.value, &call.output};
    for (int i = 0; i < 4; i++)
        *heads[i] = (struct heads){(bits16 *)number[2 + 3 * i], number[3 + 3 * i], number[4 + 3 * i]};
    int done;
    Py_BEGIN_ALLOW_THREADS;
    done = attention_run(&call, num_threads);
    Py_END_ALLOW_THREADS;
    if (!done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* What the addresses in a sublayer belong to. */
struct owned_sublayer {
    struct sublayer sublayer;
    PyObject *owners[3]; /* first, last, site */
};

static void drop_sublayer(PyObject *capsule)
{
    struct owned_sublayer *own = PyCapsule_GetPointer(capsule, "sublayer");
    for (int i = 0; i < 3; i++)
        Py_DECREF(own->owners[i]);
    free(own);
}

/* weight, is_offset, epsilon, first, last, site or None */
static PyObject *make_sublayer(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[2];
    if (count != 6)
        return PyErr_Format(PyExc_TypeError, "6 arguments are wanted, not %zd", count);
    double epsilon = PyFloat_AsDouble(arguments[2]);
    struct sublayer sublayer = {.epsilon = (float)epsilon,
                                .first = PyCapsule_GetPointer(arguments[3], "linear"),
                                .last = PyCapsule_GetPointer(arguments[4], "linear")};
    if (!sublayer.first || !sublayer.last || !integers(arguments, 2, 2, number))
        return NULL;
    if (arguments[5] != Py_None && !(sublayer.site = PyCapsule_GetPointer(arguments[5], "site")))
        return NULL;
    sublayer.weight = (const bits16 *)number[0];
    sublayer.is_offset = (int)number[1];
    struct owned_sublayer *own = malloc(sizeof *own);
    if (!own)
        return PyErr_NoMemory();
    *own = (struct owned_sublayer){sublayer, {arguments[3], arguments[4], arguments[5]}};
    for (int i = 0; i < 3; i++)
        Py_INCREF(own->owners[i]);
    return PyCapsule_New(own, "sublayer", drop_sublayer);
}

/* sublayer, step or None, cosine, sine, input, num_tokens, residual, output */
static PyObject *run_sublayer(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[6];
    if (count != 8)
        return PyErr_Format(PyExc_TypeError, "8 arguments are wanted, not %zd", count);
    const struct owned_sublayer *own = PyCapsule_GetPointer(arguments[0], "sublayer");
    if (!own || !integers(arguments + 2, 6, 6, number))
        return NULL;
    struct sublayer_call call = {.sublayer = &own->sublayer,
                                 .cosine = (const bits16 *)number[0],
                                 .sine = (const bits16 *)number[1],
                                 .input = (const bits16 *)number[2],
                                 .num_tokens = number[3],
                                 .residual = (const bits16 *)number[4],
                                 .output = (bits16 *)number[5]};
    if (own->sublayer.site && !(call.step = PyCapsule_GetPointer(arguments[1], "step")))
        return NULL;
    int done = 1;
    if (call.num_tokens) {
        Py_BEGIN_ALLOW_THREADS;
        done = sublayer_run(&call, num_threads);
        Py_END_ALLOW_THREADS;
    }
    if (!done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* What a stack needs for its sums: a team, and the state of the thread that has let go of the interpreter. */
struct ranks {
    const struct summing_team *team;
    PyThreadState *released;
};

static int sum_over_ranks(void *argument, bits16 *numbers, int64_t count)
{
    struct ranks *ranks = argument;
#ifdef IN_FLOAT16
    const enum summed type = FLOAT16;
#else
    const enum summed type = BFLOAT16;
#endif
    return ranks->team->sum(ranks->team, numbers, count, type, &ranks->released);
}

/* sublayers (a tuple), step, cosine, sine, input, num_tokens, output, team or None */
static PyObject *run_stack(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    (void)self;
    int64_t number[5];
    if (count != 8 || !PyTuple_Check(arguments[0]))
        return PyErr_Format(PyExc_TypeError, "a tuple and 7 more arguments are wanted");
    Py_ssize_t num_sublayers = PyTuple_GET_SIZE(arguments[0]);
    const struct sublayer *sublayers[num_sublayers + 1];
    for (Py_ssize_t i = 0; i < num_sublayers; i++)
        if (!(sublayers[i] = PyCapsule_GetPointer(PyTuple_GET_ITEM(arguments[0], i), "sublayer")))
            return NULL; /* what owns it begins with it */
    struct ranks ranks = {NULL, NULL};
    struct stack_call call = {.sublayers = sublayers, .num_sublayers = num_sublayers, .ranks = &ranks};
    if (!(call.step = PyCapsule_GetPointer(arguments[1], "step")) || !integers(arguments + 2, 5, 5, number))
        return NULL;
    if (arguments[7] != Py_None) {
        if (!(ranks.team = PyCapsule_GetPointer(arguments[7], TEAM_NAME)))
            return NULL;
        call.sum = sum_over_ranks;
    }
    call.cosine = (const bits16 *)number[0];
    call.sine = (const bits16 *)number[1];
    call.input = (const bits16 *)number[2];
    call.num_tokens = number[3];
    call.output = (bits16 *)number[4];
    enum stack_end end = STACK_DONE;
    if (call.num_tokens && num_sublayers) {
        ranks.released = PyEval_SaveThread();
        end = stack_run(&call, num_threads);
        if (ranks.released)
            PyEval_RestoreThread(ranks.released);
    }
    if (end == STACK_NO_MEMORY)
        return PyErr_NoMemory();
    if (end == STACK_NO_SUM)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"set_num_threads", (PyCFunction)(void (*)(void))set_num_threads, METH_FASTCALL, NULL},
    {"get_num_threads", get_num_threads, METH_NOARGS, NULL},
    {"pack", (PyCFunction)(void (*)(void))pack, METH_FASTCALL, NULL},
#ifndef IN_FLOAT16
    {"code", (PyCFunction)(void (*)(void))code, METH_FASTCALL, NULL},
    {"coded_panel_bytes", (PyCFunction)(void (*)(void))coded_panel_bytes, METH_FASTCALL, NULL},
    {"keep_plain", (PyCFunction)(void (*)(void))keep_plain, METH_FASTCALL, NULL},
#endif
    {"quantize", (PyCFunction)(void (*)(void))quantize, METH_FASTCALL, NULL},
    {"place", (PyCFunction)(void (*)(void))place, METH_FASTCALL, NULL},
    {"embedding", (PyCFunction)(void (*)(void))embedding, METH_FASTCALL, NULL},
    {"make_linear", (PyCFunction)(void (*)(void))make_linear, METH_FASTCALL, NULL},
    {"linear", (PyCFunction)(void (*)(void))linear, METH_FASTCALL, NULL},
    {"rms_norm", (PyCFunction)(void (*)(void))rms_norm, METH_FASTCALL, NULL},
    {"rotary", (PyCFunction)(void (*)(void))rotary, METH_FASTCALL, NULL},
    {"argmax", (PyCFunction)(void (*)(void))argmax, METH_FASTCALL, NULL},
    {"sample", (PyCFunction)(void (*)(void))sample, METH_FASTCALL, NULL},
    {"make_site", (PyCFunction)(void (*)(void))make_site, METH_FASTCALL, NULL},
    {"make_step", (PyCFunction)(void (*)(void))make_step, METH_FASTCALL, NULL},
    {"attention", (PyCFunction)(void (*)(void))attention, METH_FASTCALL, NULL},
    {"make_sublayer", (PyCFunction)(void (*)(void))make_sublayer, METH_FASTCALL, NULL},
    {"run_sublayer", (PyCFunction)(void (*)(void))run_sublayer, METH_FASTCALL, NULL},
    {"run_stack", (PyCFunction)(void (*)(void))run_stack, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

#define JOINED(first, second) first##second
#define INIT_OF(name) JOINED(PyInit_, name)
#define TEXT_OF(name) #name
#define NAME_OF(name) TEXT_OF(name)

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, NAME_OF(MODULE), NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC INIT_OF(MODULE)(void)
{
    find_reads_past_caches();
    return PyModule_Create(&module);
}
