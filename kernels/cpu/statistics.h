/* Sums over a range of a row's classes. */

/* Return the maximum, NaNs left out. Its lanes are explicit because clang does not vectorize a
   comparison as a maximum where there may be a NaN. */
static REAL KIND(maximum)(const REAL *z, int64_t n)
{
    enum { LANES = 32 };
    REAL maxima[LANES], m = -INFINITY;
    const int64_t whole = n - n % LANES;
    for (int k = 0; k < LANES; k++)
        maxima[k] = -INFINITY;
    for (int64_t i = 0; i < whole; i += LANES)
#pragma omp simd
        for (int k = 0; k < LANES; k++)
            maxima[k] = z[i + k] > maxima[k] ? z[i + k] : maxima[k];
    for (int64_t i = whole; i < n; i++)
        m = z[i] > m ? z[i] : m;
    for (int k = 0; k < LANES; k++)
        m = maxima[k] > m ? maxima[k] : m;
    return m;
}

/* Return sum exp(z - m). At most 512 terms are added in REAL, which is accurate enough even if the
   compiler adds them one after another. */
static double KIND(sum_exp)(const REAL *z, int64_t n, REAL m)
{
    double total = 0;
    for (int64_t start = 0; start < n; start += 512) {
        const int64_t stop = start + 512 < n ? start + 512 : n;
        REAL s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t i = start; i < stop; i++)
            s += KIND(exp)(z[i] - m);
        total += (double)s;
    }
    return total;
}

static double KIND(sum_exp_times)(const REAL *z, int64_t n, REAL m)
{
    REAL s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) {
        REAL r = z[i] - m;
        r = r < LOWEST ? LOWEST - 1 : r; /* 0 times inf would be NaN */
        s += r * KIND(exp)(r);
    }
    return (double)s;
}

static double KIND(sum_shifted)(const REAL *z, int64_t n, REAL m)
{
    REAL s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++)
        s += z[i] - m;
    return (double)s;
}

static double KIND(sum_weighted)(const REAL *z, const REAL *w, int64_t n, REAL m, double *weight_sum)
{
    REAL s = 0, total = 0;
#pragma omp simd reduction(+ : s, total)
    for (int64_t i = 0; i < n; i++) {
        REAL term = w[i] * (z[i] - m);
        s += w[i] == 0 ? 0 : term;
        total += w[i];
    }
    *weight_sum = (double)total;
    return (double)s;
}

/* Count the classes that beat `target`: greater, NaN, or equal if `ties`. */
static int64_t KIND(count_better)(const REAL *z, int64_t n, REAL target, int ties)
{
    int32_t count = 0;
    if (ties) {
#pragma omp simd reduction(+ : count)
        for (int64_t i = 0; i < n; i++)
            count += !(z[i] < target);
    } else {
#pragma omp simd reduction(+ : count)
        for (int64_t i = 0; i < n; i++)
            count += !(z[i] <= target);
    }
    return count;
}

static void KIND(find_best)(
    const REAL *z, int64_t start, int64_t n, REAL top, int is_best, Part *part)
{
    for (int64_t i = 0; is_best && i < n; i++)
        if (z[i] == top) {
            part->best_class = start + i;
            break;
        }
    for (int64_t i = 0; part->s != part->s && part->first_nan < 0 && i < n; i++)
        if (z[i] != z[i])
            part->first_nan = start + i;
}

/* Add at most BLOCK classes to `part`. The target is not among them. `ties`: they are to the left of
   the target, so they beat it on a tie. */
static void KIND(add_range)(const Job *job, int64_t row, const char *x, int64_t start, int64_t n,
                            REAL target_logit, int ties, Part *part)
{
    REAL buffer[BLOCK];
    const REAL *z = KIND(logits)(job, x, start, n, buffer);
    const REAL top = KIND(maximum)(z, n);
    const int is_best = part->best_class < 0 || (double)top > part->m;
    if ((double)top > part->m)
        move_part(part, (double)top);
    const REAL m = part->m == -INFINITY ? LOWEST_FINITE : (REAL)part->m;
    part->s += KIND(sum_exp)(z, n, m);
    if (job->entropy || job->ez_sum)
        part->ez_sum += KIND(sum_exp_times)(z, n, m);
    double weight_sum = (double)n;
    if ((job->mean_logprob || job->logit_sum || job->label_smoothing > 0) && !KIND(is_weighted)(job)) {
        part->logit_sum += KIND(sum_shifted)(z, n, m);
    } else if (job->mean_logprob || job->logit_sum) {
        REAL w[BLOCK];
        KIND(weights)(job, row, start, n, w);
        part->logit_sum += KIND(sum_weighted)(z, w, n, m, &weight_sum);
    }
    part->weight_sum += weight_sum;
    if (job->rank)
        part->num_better += KIND(count_better)(z, n, target_logit, ties);
    if (job->argmax)
        KIND(find_best)(z, start, n, top, is_best, part);
}

/* Return the sums of a segment, block by block. The target splits its block into two ranges. */
static Part KIND(segment_sums)(
    const Job *job, int64_t row, int64_t segment, REAL target_logit)
{
    Part part = empty_part();
    const char *x = row_start(&job->x, job->inner, row);
    const int64_t target = job->target[row], end = (segment + 1) * SEGMENT;
    const int64_t stop = end < job->vocab_size ? end : job->vocab_size;
    for (int64_t start = segment * SEGMENT; start < stop; start += BLOCK) {
        int64_t last = start + BLOCK < stop ? start + BLOCK : stop;
        int inside = start <= target && target < last;
        int64_t middle = inside ? target : last, next = inside ? target + 1 : last;
        if (middle > start)
            KIND(add_range)(job, row, x, start, middle - start, target_logit, start < target, &part);
        if (last > next)
            KIND(add_range)(job, row, x, next, last - next, target_logit, 0, &part);
    }
    return part;
}
