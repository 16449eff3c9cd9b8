/* A block of a row as reals: widened, gathered where classes are apart, through the head. */
#include <math.h>

#include "job.h"

#define LOAD_LOOP(type, convert)                                                                   \
    do {                                                                                           \
        const type *from = (const type *)(const void *)data + start * stride;                      \
        if (stride == 1) {                                                                         \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) to[i] = (REAL)convert(from[i]);    \
        } else {                                                                                   \
            for (int64_t i = 0; i < n; i++) to[i] = (REAL)convert(from[i * stride]);               \
        }                                                                                          \
    } while (0)

#define STORE_LOOP(type, convert)                                                                  \
    do {                                                                                           \
        type *into = (type *)(void *)data + start * stride;                                        \
        if (stride == 1) {                                                                         \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++) into[i] = (type)convert(from[i]);  \
        } else {                                                                                   \
            for (int64_t i = 0; i < n; i++) into[i * stride] = (type)convert(from[i]);             \
        }                                                                                          \
    } while (0)

static void KIND(load)(
    const char *data, int64_t dtype, int64_t stride, int64_t start, int64_t n, REAL *to)
{
    switch (dtype) {
    case FLOAT32: LOAD_LOOP(float, ); break;
    case FLOAT64: LOAD_LOOP(double, ); break;
    case BFLOAT16: LOAD_LOOP(uint16_t, from_bfloat16); break;
    default: LOAD_LOOP(uint16_t, from_float16);
    }
}

static void KIND(store)(
    char *data, int64_t dtype, int64_t stride, int64_t start, int64_t n, const REAL *from)
{
    switch (dtype) {
    case FLOAT32: STORE_LOOP(float, ); break;
    case FLOAT64: STORE_LOOP(double, ); break;
    case BFLOAT16: STORE_LOOP(uint16_t, to_bfloat16); break;
    default: STORE_LOOP(uint16_t, to_float16);
    }
}

/* z = softcap tanh(logit_scale x / softcap) */
static void KIND(through_head)(const Job *job, int64_t n, REAL *z)
{
    const REAL scale = (REAL)job->logit_scale, cap = (REAL)job->softcap;
    if (job->logit_scale != 1) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            z[i] *= scale;
    }
    if (job->softcap != 0) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            z[i] = cap * KIND(tanh)(z[i] / cap);
    }
}

/* dz/dx in place of x. 1 - tanh^2 would cancel where the cap is felt; 4 e / (1 + e)^2 does not. */
static void KIND(head_derivative)(const Job *job, int64_t n, REAL *x)
{
    const REAL scale = (REAL)job->logit_scale, cap = (REAL)job->softcap;
    if (job->softcap == 0) {
        for (int64_t i = 0; i < n; i++)
            x[i] = scale;
        return;
    }
    const REAL factor = 2 * scale / cap;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        REAL y = x[i] * factor, e = KIND(exp)(y < 0 ? y : -y);
        x[i] = e * (4 * scale) / ((1 + e) * (1 + e));
    }
}

static int KIND(has_head)(const Job *job)
{
    return job->softcap != 0 || job->logit_scale != 1;
}

/* n logits of a row from `start`: where they are if nothing is to be done, else in `buffer`. */
static const REAL *KIND(logits)(
    const Job *job, const char *row, int64_t start, int64_t n, REAL *buffer)
{
    if (job->x.dtype == OWN_DTYPE && job->x.stride[2] == 1 && !KIND(has_head)(job))
        return (const REAL *)(const void *)row + start;
    KIND(load)(row, job->x.dtype, job->x.stride[2], start, n, buffer);
    KIND(through_head)(job, n, buffer);
    return buffer;
}

/* One logit, by the same vector code as its row's, to the same bit. */
static REAL KIND(logit_at)(const Job *job, const char *row, int64_t column)
{
    REAL copies[16];
    KIND(load)(row + column * job->x.stride[2] * size_of(job->x.dtype), job->x.dtype, 0, 0, 16, copies);
    KIND(through_head)(job, 16, copies);
    return copies[0];
}

/* w_j = class_weight_j (prob_scale prob_j + prob_shift) */
static void KIND(weights)(const Job *job, int64_t row, int64_t start, int64_t n, REAL *w)
{
    const REAL *of_class = job->class_weight;
    if (job->prob.data) {
        const REAL scale = (REAL)job->prob_scale, shift = (REAL)job->prob_shift;
        KIND(load)(row_of(&job->prob, job->inner, row), job->prob.dtype, job->prob.stride[2], start, n, w);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            w[i] = w[i] * scale + shift;
    } else {
        for (int64_t i = 0; i < n; i++)
            w[i] = 1;
    }
    if (of_class) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            w[i] *= of_class[start + i];
    }
}

static int KIND(is_weighted)(const Job *job)
{
    return job->class_weight || job->prob.data;
}
