/* Loading and storing a block of a row in the type REAL, and the transforms of the head. */
#include <math.h>

#include "job.h"

#define LOAD_LOOP(type, convert)                                                                   \
    do {                                                                                           \
        const type *source = (const type *)(const void *)data + start * stride;                    \
        if (stride == 1) {                                                                         \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                    \
                values[i] = (REAL)convert(source[i]);                                              \
        } else {                                                                                   \
            for (int64_t i = 0; i < n; i++)                                                        \
                values[i] = (REAL)convert(source[i * stride]);                                     \
        }                                                                                          \
    } while (0)

#define STORE_LOOP(type, convert)                                                                  \
    do {                                                                                           \
        type *destination = (type *)(void *)data + start * stride;                                 \
        if (stride == 1) {                                                                         \
            _Pragma("omp simd") for (int64_t i = 0; i < n; i++)                                    \
                destination[i] = (type)convert(values[i]);                                         \
        } else {                                                                                   \
            for (int64_t i = 0; i < n; i++)                                                        \
                destination[i * stride] = (type)convert(values[i]);                                \
        }                                                                                          \
    } while (0)

static void KIND(load)(
    const char *data, int64_t dtype, int64_t stride, int64_t start, int64_t n, REAL *values)
{
    switch (dtype) {
    case FLOAT32: LOAD_LOOP(float, ); break;
    case FLOAT64: LOAD_LOOP(double, ); break;
    case BFLOAT16: LOAD_LOOP(uint16_t, from_bfloat16); break;
    default: LOAD_LOOP(uint16_t, from_float16);
    }
}

static void KIND(store)(
    char *data, int64_t dtype, int64_t stride, int64_t start, int64_t n, const REAL *values)
{
    switch (dtype) {
    case FLOAT32: STORE_LOOP(float, ); break;
    case FLOAT64: STORE_LOOP(double, ); break;
    case BFLOAT16: STORE_LOOP(uint16_t, to_bfloat16); break;
    default: STORE_LOOP(uint16_t, to_float16);
    }
}

/* Replace x by z = softcap tanh(logit_scale x / softcap). */
static void KIND(apply_head)(const Job *job, int64_t n, REAL *z)
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

/* Replace x by dz/dx. 1 - tanh^2 would cancel near the cap; 4 e / (1 + e)^2 does not. */
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

/* Return n logits of a row from `start` on. They are copied to `buffer` only if they must change. */
static const REAL *KIND(logits)(
    const Job *job, const char *row, int64_t start, int64_t n, REAL *buffer)
{
    if (job->x.dtype == OWN_DTYPE && job->x.stride[2] == 1 && !KIND(has_head)(job))
        return (const REAL *)(const void *)row + start;
    KIND(load)(row, job->x.dtype, job->x.stride[2], start, n, buffer);
    KIND(apply_head)(job, n, buffer);
    return buffer;
}

/* Return one logit. The vector code of whole rows computes it, so it has the same bits. */
static REAL KIND(logit_at)(const Job *job, const char *row, int64_t column)
{
    REAL copies[16];
    KIND(load)(row + column * job->x.stride[2] * item_size(job->x.dtype), job->x.dtype, 0, 0, 16, copies);
    KIND(apply_head)(job, 16, copies);
    return copies[0];
}

/* Compute w_j = class_weight_j (prob_scale prob_j + prob_shift). */
static void KIND(weights)(const Job *job, int64_t row, int64_t start, int64_t n, REAL *w)
{
    const REAL *class_weight = job->class_weight;
    if (job->prob.data) {
        const REAL scale = (REAL)job->prob_scale, shift = (REAL)job->prob_shift;
        KIND(load)(row_start(&job->prob, job->inner, row), job->prob.dtype, job->prob.stride[2], start, n, w);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            w[i] = w[i] * scale + shift;
    } else {
        for (int64_t i = 0; i < n; i++)
            w[i] = 1;
    }
    if (class_weight) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            w[i] *= class_weight[start + i];
    }
}

static int KIND(is_weighted)(const Job *job)
{
    return job->class_weight || job->prob.data;
}
