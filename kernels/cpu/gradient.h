/* The gradient with respect to a range of a row's logits. */

static inline REAL KIND(slope_term)(REAL r, REAL scale, REAL slope)
{
    REAL finite = r < LOWEST ? LOWEST : r; /* 0 times inf would be NaN */
    return scale + slope * finite;
}

static void KIND(write_range)(const Job *job, int64_t row, const char *x, char *out, int64_t start,
                              int64_t n, const RowGradient *numbers)
{
    REAL buffer[BLOCK], grads[BLOCK], extra[BLOCK];
    const REAL lse = (REAL)numbers->lse, scale = (REAL)numbers->scale;
    const int has_weights = numbers->u != 0 && KIND(is_weighted)(job);
    const REAL u = has_weights ? 0 : (REAL)numbers->u, weight_factor = (REAL)numbers->u;
    const REAL slope = (REAL)numbers->slope;
    const REAL *z = KIND(logits)(job, x, start, n, buffer);
    const int direct = job->grad.dtype == OWN_DTYPE && job->grad.stride[2] == 1;
    REAL *g = direct && !KIND(has_head)(job) ? (REAL *)(void *)out + start : grads;
    if (numbers->slope != 0) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            REAL r = z[i] - lse;
            g[i] = KIND(exp)(r) * KIND(slope_term)(r, scale, slope) + u;
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            g[i] = KIND(exp)(z[i] - lse) * scale + u;
    }
    if (has_weights) {
        KIND(weights)(job, row, start, n, extra);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            g[i] += weight_factor * extra[i];
    }
    if (KIND(has_head)(job)) {
        KIND(load)(x, job->x.dtype, job->x.stride[2], start, n, extra);
        KIND(head_derivative)(job, n, extra);
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            g[i] *= extra[i];
    }
    if (g == grads)
        KIND(store)(out, job->grad.dtype, job->grad.stride[2], start, n, g);
}

static void KIND(write_target)(
    const Job *job, const char *x, char *out, int64_t target, double at_target)
{
    REAL value = (REAL)at_target;
    if (KIND(has_head)(job)) {
        REAL derivative[1];
        KIND(load)(x, job->x.dtype, job->x.stride[2], target, 1, derivative);
        KIND(head_derivative)(job, 1, derivative);
        value *= derivative[0];
    }
    KIND(store)(out, job->grad.dtype, job->grad.stride[2], target, 1, &value);
}

static void KIND(write_zeros)(const Job *job, char *out, int64_t start, int64_t stop)
{
    const REAL zeros[256] = {0};
    for (; start < stop; start += 256) {
        int64_t n = stop - start < 256 ? stop - start : 256;
        KIND(store)(out, job->grad.dtype, job->grad.stride[2], start, n, zeros);
    }
}

static void KIND(segment_grad)(
    const Job *job, int64_t row, int64_t segment, const RowGradient *numbers)
{
    const char *x = row_start(&job->x, job->inner, row);
    char *out = row_start(&job->grad, job->inner, row);
    const int64_t target = job->target[row], end = (segment + 1) * SEGMENT;
    const int64_t stop = end < job->vocab_size ? end : job->vocab_size;
    if (!numbers)
        KIND(write_zeros)(job, out, segment * SEGMENT, stop);
    if (stop == job->vocab_size)
        KIND(write_zeros)(job, out, stop, job->columns);
    if (!numbers)
        return;
    for (int64_t start = segment * SEGMENT; start < stop; start += BLOCK) {
        int64_t last = start + BLOCK < stop ? start + BLOCK : stop;
        int inside = start <= target && target < last;
        int64_t middle = inside ? target : last, next = inside ? target + 1 : last;
        KIND(write_range)(job, row, x, out, start, middle - start, numbers);
        if (inside)
            KIND(write_target)(job, x, out, target, numbers->at_target);
        KIND(write_range)(job, row, x, out, next, last - next, numbers);
    }
}
