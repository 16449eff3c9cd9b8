/* Divergences of a pair of rows; chunked_ce/core/divergence.py says the same, and derives it. */
#include <math.h>

#include "pair.h"

/* The numbers of a pair of rows, [rows] in memory. */
typedef struct {
    REAL max, log_sum, teacher_max, teacher_log_sum, shift, student_kl;
    REAL base, teacher_base; /* what z and y are less by in d, so that an offset costs no digits */
} KIND(PairRow);

typedef struct {
    REAL p[BLOCK], q[BLOCK], d[BLOCK]; /* log q - log p */
} KIND(PairBlock);

static inline void KIND(set_bases)(KIND(PairRow) * row)
{
    const REAL above = row->teacher_max - row->max;
    const int apart = above > FAR_APART || above < -FAR_APART;
    row->base = apart ? row->max : 0;
    row->teacher_base = apart ? row->teacher_max : 0;
}

/* f(d) = d - 1 + exp(-d) */
static inline REAL KIND(excess)(REAL probability, REAL d, REAL other)
{
    REAL series = 0, size = d < 0 ? -d : d;
    for (int n = 13; n > 2; n--)
        series = (1 - d * series) * (REAL)(1.0 / n);
    series = d * d * (1 - d * series) * (REAL)0.5;
    REAL far = probability * (d - 1) + other; /* exp(-d) may be too large */
    REAL value = size < (REAL)0.5 ? probability * series : far;
    return probability == 0 ? other : value;
}

/* log(1 + v) for -1 <= v <= 0 */
static inline REAL KIND(log1p_below)(REAL v)
{
    REAL scaled = 1 + v;
    const REAL power = KIND(split_power)(&scaled);
    return power == 0 ? KIND(log1p)(v) : power * (REAL)0.69314718055994531 + KIND(log1p)(scaled - 1);
}

/* log m less the larger of log p and log q, negated: m is that times 1 + share (exp(-|d|) - 1). */
static inline REAL KIND(above_mixture)(REAL d, REAL beta, REAL rest)
{
    REAL share = d > 0 ? rest : beta, below = d > 0 ? -d : d, series = 0;
    for (int n = 13; n > 1; n--)
        series = (1 + below * series) * (REAL)(1.0 / n);
    series = below * (1 + below * series);
    REAL expm1 = below > (REAL)-0.25 ? series : KIND(exp)(below) - 1;
    return -KIND(log1p_below)(share * expm1);
}

static void KIND(add_exponentials)(
    const Pair *job, const Rows *rows, int64_t row, double *most, double *sum)
{
    const char *data = row_start(rows, job->inner, row);
    const REAL inverse = (REAL)(1 / job->temperature);
    REAL z[BLOCK];
    for (int64_t start = 0; start < job->vocab_size; start += BLOCK) {
        const int64_t left = job->vocab_size - start, n = left < BLOCK ? left : BLOCK;
        KIND(load)(data, rows->dtype, rows->stride[2], start, n, z);
        const double top = (double)KIND(maximum)(z, n);
        if (top > *most) {
            *sum = *most == -INFINITY ? *sum : *sum * exp((*most - top) / job->temperature);
            *most = top;
        }
        const REAL m = *most == -INFINITY ? LOWEST_FINITE : (REAL)*most;
        for (int64_t i = 0; i < n; i++)
            z[i] = (z[i] - m) * inverse;
        *sum += KIND(sum_exp)(z, n, 0);
    }
}

static void KIND(load_pair)(const Pair *job, const KIND(PairRow) * numbers, const char *x,
                            const char *y, int64_t start, int64_t n, KIND(PairBlock) * block)
{
    const REAL inverse = (REAL)(1 / job->temperature);
    const KIND(PairRow) r = *numbers;
    REAL *p = block->p, *q = block->q, *d = block->d;
    KIND(load)(x, job->x.dtype, job->x.stride[2], start, n, p);
    KIND(load)(y, job->teacher.dtype, job->teacher.stride[2], start, n, q);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        d[i] = ((q[i] - r.teacher_base) - (p[i] - r.base)) * inverse - r.shift;
        p[i] = KIND(exp)((p[i] - r.max) * inverse - r.log_sum);
        q[i] = KIND(exp)((q[i] - r.teacher_max) * inverse - r.teacher_log_sum);
    }
}

/* What at most 512 classes add to the loss and to student_kl. */
static void KIND(add_terms)(const Pair *job, const REAL *p, const REAL *q, const REAL *d, int64_t n,
                            double *loss, double *student_kl)
{
    const REAL beta = (REAL)job->beta, rest = (REAL)(1 - job->beta);
    REAL sum = 0, of_student = 0;
    if (job->kind == FORWARD) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++)
            sum += KIND(excess)(q[i], d[i], p[i]);
    } else if (job->kind == REVERSE) {
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++)
            sum += KIND(excess)(p[i], -d[i], q[i]);
        of_student = sum;
    } else {
#pragma omp simd reduction(+ : sum, of_student)
        for (int64_t i = 0; i < n; i++) {
            REAL mixture = beta * q[i] + rest * p[i], larger = KIND(above_mixture)(d[i], beta, rest);
            of_student += KIND(excess)(p[i], d[i] > 0 ? larger - d[i] : larger, mixture);
            sum += KIND(excess)(q[i], d[i] > 0 ? larger : larger + d[i], mixture);
        }
        sum = beta * sum + rest * of_student;
    }
    *loss += (double)sum;
    *student_kl += (double)of_student;
}

/* dL/d(z / T), written over d */
static void KIND(slopes)(const Pair *job, REAL student_kl, int64_t n, KIND(PairBlock) * block)
{
    const REAL beta = (REAL)job->beta, rest = (REAL)(1 - job->beta), *p = block->p, *q = block->q;
    REAL *d = block->d;
    if (job->kind == FORWARD) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            REAL series = 0; /* p - q = -p expm1(d), without cancellation where they are near */
            for (int k = 13; k > 1; k--)
                series = (1 + d[i] * series) * (REAL)(1.0 / k);
            REAL near = -p[i] * d[i] * (1 + d[i] * series), size = d[i] < 0 ? -d[i] : d[i];
            d[i] = size < (REAL)0.25 ? near : p[i] - q[i];
        }
    } else if (job->kind == REVERSE) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            d[i] = p[i] == 0 ? 0 : p[i] * (-d[i] - student_kl);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            REAL larger = KIND(above_mixture)(d[i], beta, rest), above = d[i] > 0 ? larger - d[i] : larger;
            d[i] = p[i] == 0 ? 0 : p[i] * (rest * (above - student_kl));
        }
    }
}

static KIND(PairRow) KIND(given_norms)(const Pair *job, int64_t row)
{
    KIND(PairRow) r = {
        (REAL)KIND(number)(job->max, row), (REAL)KIND(number)(job->log_sum, row),
        (REAL)KIND(number)(job->teacher_max, row), (REAL)KIND(number)(job->teacher_log_sum, row),
        (REAL)KIND(number)(job->shift, row), (REAL)KIND(number)(job->student_kl, row), 0, 0,
    };
    KIND(set_bases)(&r);
    return r;
}

static KIND(PairRow) KIND(sum_norms)(const Pair *job, int64_t row)
{
    double most = -INFINITY, teacher_most = -INFINITY, sum = 0, teacher_sum = 0;
    KIND(PairRow) r = {0};
    KIND(add_exponentials)(job, &job->x, row, &most, &sum);
    KIND(add_exponentials)(job, &job->teacher, row, &teacher_most, &teacher_sum);
    const double log_sum = log(sum), teacher_log_sum = log(teacher_sum);
    r.max = (REAL)most, r.teacher_max = (REAL)teacher_most;
    r.log_sum = (REAL)log_sum, r.teacher_log_sum = (REAL)teacher_log_sum;
    KIND(set_bases)(&r);
    const double above = (teacher_most - (double)r.teacher_base) - (most - (double)r.base);
    r.shift = (REAL)(above / job->temperature + (teacher_log_sum - log_sum));
    return r;
}

static void KIND(put_statistics)(const Pair *job, int64_t row)
{
    double loss = 0, student_kl = 0;
    KIND(PairRow) r = {0};
    if (!(job->ignored && job->ignored[row])) {
        r = (job->has_norms ? KIND(given_norms) : KIND(sum_norms))(job, row);
        const char *x = row_start(&job->x, job->inner, row), *y = row_start(&job->teacher, job->inner, row);
        for (int64_t start = 0; start < job->vocab_size; start += BLOCK) {
            KIND(PairBlock) block;
            const int64_t left = job->vocab_size - start, n = left < BLOCK ? left : BLOCK;
            KIND(load_pair)(job, &r, x, y, start, n, &block);
            for (int64_t i = 0; i < n; i += 512)
                KIND(add_terms)(job, block.p + i, block.q + i, block.d + i, n - i < 512 ? n - i : 512,
                                &loss, &student_kl);
        }
    }
    PUT(loss, row, loss);
    PUT(student_kl, row, student_kl);
    PUT(max, row, r.max);
    PUT(log_sum, row, r.log_sum);
    PUT(teacher_max, row, r.teacher_max);
    PUT(teacher_log_sum, row, r.teacher_log_sum);
    PUT(shift, row, r.shift);
}

static void KIND(put_pair_gradient)(const Pair *job, int64_t row)
{
    const char *x = row_start(&job->x, job->inner, row), *y = row_start(&job->teacher, job->inner, row);
    char *out = row_start(&job->grad, job->inner, row);
    const int ignored = job->ignored && job->ignored[row];
    const REAL weight = (REAL)(KIND(number)(job->upstream, row) / job->temperature);
    const KIND(PairRow) r = KIND(given_norms)(job, row);
    const int64_t scored = ignored ? 0 : job->vocab_size;
    KIND(PairBlock) block;
    for (int64_t start = 0; start < scored; start += BLOCK) {
        const int64_t n = scored - start < BLOCK ? scored - start : BLOCK;
        KIND(load_pair)(job, &r, x, y, start, n, &block);
        KIND(slopes)(job, r.student_kl, n, &block);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            block.d[i] *= weight;
        KIND(store)(out, job->grad.dtype, job->grad.stride[2], start, n, block.d);
    }
    for (int64_t i = 0; i < BLOCK; i++)
        block.d[i] = 0;
    for (int64_t start = scored; start < job->columns; start += BLOCK) {
        const int64_t n = job->columns - start < BLOCK ? job->columns - start : BLOCK;
        KIND(store)(out, job->grad.dtype, job->grad.stride[2], start, n, block.d);
    }
}

void KIND(pair_row)(const Pair *job, int64_t row)
{
    (job->upstream ? KIND(put_pair_gradient) : KIND(put_statistics))(job, row);
}
