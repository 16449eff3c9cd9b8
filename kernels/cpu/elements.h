/* Binary cross-entropy of a segment of a row, its gradient, and the scaling of a gradient.

   softplus z = max(z, 0) + log(1 + exp -|z|), with label y, weight w and positive weight v:
   loss = w [(1 - y) softplus z + v y softplus -z], slope = w [(1 - y) sigmoid z - v y sigmoid -z].
   No term cancels for a label of 0 or 1. */
#include "elementwise.h"

#define LACK_OF_ONE(y) (1.0 - (y))

/* n numbers of a row, which may all be one. */
static void KIND(load_of)(
    const Elementwise *job, const Rows *rows, int64_t row, int64_t start, int64_t n, REAL *to)
{
    const char *data = row_of(rows, job->inner, row);
    const int64_t stride = rows->stride[2];
    KIND(load)(data, rows->dtype, stride, start, stride ? n : 1, to);
    for (int64_t i = 1; stride == 0 && i < n; i++)
        to[i] = to[0];
}

/* w (1 - y) and w v y */
static void KIND(label_terms)(
    const Elementwise *job, int64_t row, int64_t start, int64_t n, REAL *negative, REAL *positive)
{
    REAL w[BLOCK];
    const Rows *label = &job->label;
    if (label->data)
        KIND(load_of)(job, label, row, start, n, positive);
    for (int64_t i = 0; i < n; i++) {
        positive[i] = label->data ? positive[i] : 0;
        negative[i] = 1 - positive[i];
    }
    if (label->data && label->dtype == FLOAT64) { /* 1 - y near 1 is not that of y rounded */
        const int64_t stride = label->stride[2];
        const char *data = row_of(label, job->inner, row);
        REAL *to = negative;
        LOAD_LOOP(double, LACK_OF_ONE);
    }
    if (job->pos_weight.data) {
        KIND(load_of)(job, &job->pos_weight, row, start, n, w);
        for (int64_t i = 0; i < n; i++)
            positive[i] *= w[i];
    }
    if (job->weight.data) {
        KIND(load_of)(job, &job->weight, row, start, n, w);
        for (int64_t i = 0; i < n; i++) {
            positive[i] *= w[i];
            negative[i] *= w[i];
        }
    }
}

/* log(1 + e), 0 <= e <= 1: 2 atanh s, s = e / (2 + e) <= 1/3, by its series. */
static inline REAL KIND(log1p)(REAL e)
{
    REAL s = e / (2 + e), q = s * s, p = (REAL)2 / (2 * LOG1P_TERMS + 1);
    for (int k = LOG1P_TERMS - 1; k >= 0; k--)
        p = p * q + (REAL)2 / (REAL)(2 * k + 1);
    return p * s;
}

static inline REAL KIND(binary_loss)(REAL z, REAL negative, REAL positive)
{
    REAL size = z < 0 ? -z : z, small = KIND(log1p)(KIND(exp)(-size));
    REAL above = z > 0 ? z : 0, below = z < 0 ? -z : 0;
    /* 0 inf would be NaN */
    REAL of_negative = negative == 0 ? 0 : negative * (above + small);
    REAL of_positive = positive == 0 ? 0 : positive * (below + small);
    return z == z ? of_negative + of_positive : z;
}

static inline REAL KIND(binary_slope)(REAL z, REAL negative, REAL positive)
{
    REAL size = z < 0 ? -z : z, e = KIND(exp)(-size), larger = 1 / (1 + e), smaller = e * larger;
    REAL up = z < 0 ? smaller : larger, down = z < 0 ? larger : smaller;
    return z == z ? negative * up - positive * down : z;
}

/* z with -inf at the classes to be left out, whose label is 0: they cost nothing. */
static const REAL *KIND(leave_out)(
    const Elementwise *job, int64_t row, int64_t start, int64_t n, const REAL *z, REAL *copy)
{
    const int32_t *left_out = job->left_out + row * job->left_out_per_row;
    int64_t low = 0, high = job->left_out_per_row;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (left_out[middle] < start)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == job->left_out_per_row || left_out[low] >= start + n)
        return z;
    for (int64_t i = 0; z != copy && i < n; i++)
        copy[i] = z[i];
    for (; low < job->left_out_per_row && left_out[low] < start + n; low++)
        copy[left_out[low] - start] = -INFINITY;
    return copy;
}

static double KIND(sum_losses)(const REAL *z, const REAL *negative, const REAL *positive, int64_t n)
{
    double total = 0;
    for (int64_t start = 0; start < n; start += 512) {
        const int64_t stop = start + 512 < n ? start + 512 : n;
        REAL s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t i = start; i < stop; i++)
            s += KIND(binary_loss)(z[i], negative[i], positive[i]);
        total += (double)s;
    }
    return total;
}

/* out = the slopes, or z where those are NULL, times upstream; 0 stays 0 whatever that is. */
static void KIND(gradient_block)(
    const Elementwise *job, int64_t row, int64_t start, int64_t n, REAL *out)
{
    REAL upstream[BLOCK];
    KIND(load_of)(job, &job->upstream, row, start, n, upstream);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        out[i] = out[i] == 0 ? out[i] : out[i] * upstream[i];
}

double KIND(elements)(const Elementwise *job, int64_t row, int64_t segment)
{
    REAL buffer[BLOCK], negative[BLOCK], positive[BLOCK], out[BLOCK];
    const int64_t end = (segment + 1) * SEGMENT, stop = end < job->columns ? end : job->columns;
    double total = 0;
    for (int64_t start = segment * SEGMENT; start < stop; start += BLOCK) {
        const int64_t n = start + BLOCK < stop ? BLOCK : stop - start;
        const char *x = row_of(&job->x, job->inner, row);
        const REAL *z = buffer;
        if (job->x.dtype == OWN_DTYPE && job->x.stride[2] == 1)
            z = (const REAL *)(const void *)x + start;
        else
            KIND(load_of)(job, &job->x, row, start, n, buffer);
        if (job->kind != SCALE)
            KIND(label_terms)(job, row, start, n, negative, positive);
        if (job->left_out)
            z = KIND(leave_out)(job, row, start, n, z, buffer);
        if (job->kind == BINARY_SUM) {
            total += KIND(sum_losses)(z, negative, positive, n);
            continue;
        }
        if (job->kind == BINARY_LOSS) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                out[i] = KIND(binary_loss)(z[i], negative[i], positive[i]);
        } else if (job->kind == BINARY_GRADIENT) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                out[i] = KIND(binary_slope)(z[i], negative[i], positive[i]);
        } else {
            for (int64_t i = 0; i < n; i++)
                out[i] = z[i];
        }
        if (job->upstream.data)
            KIND(gradient_block)(job, row, start, n, out);
        KIND(store)(row_of(&job->out, job->inner, row), job->out.dtype, job->out.stride[2], start, n, out);
    }
    return total;
}
