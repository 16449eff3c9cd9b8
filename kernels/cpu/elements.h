/* Binary cross-entropy of a segment of a row, its gradient, and scaling a gradient.

   softplus z = max(z, 0) + log(1 + exp -|z|), with label y, weight w and positive weight v:
   loss = w [(1 - y) softplus z + v y softplus -z], slope = w [(1 - y) sigmoid z - v y sigmoid -z].
   No term cancels for a label of 0 or 1. */
#include "elementwise.h"

#define ONE_MINUS(y) (1.0 - (y))

/* Load n numbers of a row. A stride of 0 repeats one number. */
static void KIND(load_broadcast)(
    const Elementwise *job, const Rows *rows, int64_t row, int64_t start, int64_t n, REAL *values)
{
    const char *data = row_start(rows, job->inner, row);
    const int64_t stride = rows->stride[2];
    KIND(load)(data, rows->dtype, stride, start, stride ? n : 1, values);
    for (int64_t i = 1; stride == 0 && i < n; i++)
        values[i] = values[0];
}

/* Compute w (1 - y) and w v y. */
static void KIND(label_terms)(
    const Elementwise *job, int64_t row, int64_t start, int64_t n, REAL *negative, REAL *positive)
{
    REAL w[BLOCK];
    const Rows *label = &job->label;
    if (label->data)
        KIND(load_broadcast)(job, label, row, start, n, positive);
    for (int64_t i = 0; i < n; i++) {
        positive[i] = label->data ? positive[i] : 0;
        negative[i] = 1 - positive[i];
    }
    if (label->data && label->dtype == FLOAT64) { /* near 1, 1 - y must come from y before rounding */
        const int64_t stride = label->stride[2];
        const char *data = row_start(label, job->inner, row);
        REAL *values = negative;
        LOAD_LOOP(double, ONE_MINUS);
    }
    if (job->pos_weight.data) {
        KIND(load_broadcast)(job, &job->pos_weight, row, start, n, w);
        for (int64_t i = 0; i < n; i++)
            positive[i] *= w[i];
    }
    if (job->weight.data) {
        KIND(load_broadcast)(job, &job->weight, row, start, n, w);
        for (int64_t i = 0; i < n; i++) {
            positive[i] *= w[i];
            negative[i] *= w[i];
        }
    }
}

/* Return log(1 + e) for 0 <= e <= 1 by the series of 2 atanh(s), s = e / (2 + e) <= 1/3. */
static inline REAL KIND(log1p)(REAL e)
{
    REAL s = e / (2 + e), q = s * s, p = (REAL)2 / (2 * LOG1P_TERMS + 1);
    for (int k = LOG1P_TERMS - 1; k >= 0; k--)
        p = p * q + (REAL)2 / (REAL)(2 * k + 1);
    return p * s;
}

static inline REAL KIND(binary_loss)(REAL z, REAL negative, REAL positive)
{
    REAL magnitude = z < 0 ? -z : z, small = KIND(log1p)(KIND(exp)(-magnitude));
    REAL above = z > 0 ? z : 0, below = z < 0 ? -z : 0;
    /* 0 times inf would be NaN */
    REAL negative_loss = negative == 0 ? 0 : negative * (above + small);
    REAL positive_loss = positive == 0 ? 0 : positive * (below + small);
    return z == z ? negative_loss + positive_loss : z;
}

static inline REAL KIND(binary_slope)(REAL z, REAL negative, REAL positive)
{
    REAL magnitude = z < 0 ? -z : z, e = KIND(exp)(-magnitude), larger = 1 / (1 + e), smaller = e * larger;
    REAL up = z < 0 ? smaller : larger, down = z < 0 ? larger : smaller;
    return z == z ? negative * up - positive * down : z;
}

/* Return z with -inf at the classes to leave out. Their label is 0, so their loss is 0. */
static const REAL *KIND(mask_left_out)(
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

/* Multiply `out` by the upstream gradient. 0 stays 0 even if that is inf or NaN. */
static void KIND(gradient_block)(
    const Elementwise *job, int64_t row, int64_t start, int64_t n, REAL *out)
{
    REAL upstream[BLOCK];
    KIND(load_broadcast)(job, &job->upstream, row, start, n, upstream);
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
        const char *x = row_start(&job->x, job->inner, row);
        const REAL *z = buffer;
        if (job->x.dtype == OWN_DTYPE && job->x.stride[2] == 1)
            z = (const REAL *)(const void *)x + start;
        else
            KIND(load_broadcast)(job, &job->x, row, start, n, buffer);
        if (job->kind != SCALE)
            KIND(label_terms)(job, row, start, n, negative, positive);
        if (job->left_out)
            z = KIND(mask_left_out)(job, row, start, n, z, buffer);
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
        KIND(store)(row_start(&job->out, job->inner, row), job->out.dtype, job->out.stride[2], start, n, out);
    }
    return total;
}
