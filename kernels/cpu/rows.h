/* One row, or one segment of it: statistics, loss and gradient. */
#include <stddef.h>

#define PUT(name, row, value)                                                                      \
    do {                                                                                           \
        if (job->name)                                                                             \
            ((REAL *)job->name)[row] = (REAL)(value);                                              \
    } while (0)

static double KIND(number)(const void *numbers, int64_t row)
{
    return numbers ? (double)((const REAL *)numbers)[row] : 0.0;
}

static int KIND(has_target)(const Job *job, int64_t row)
{
    return job->target[row] >= 0 && job->target[row] < job->vocab_size;
}

static REAL KIND(target_logit)(const Job *job, int64_t row)
{
    if (!KIND(has_target)(job, row))
        return -INFINITY;
    return KIND(logit_at)(job, row_start(&job->x, job->inner, row), job->target[row]);
}

static void KIND(put_ignored)(const Job *job, int64_t row)
{
    PUT(lse, row, 0);
    PUT(logprob, row, 0);
    PUT(lse_low, row, 0);
    PUT(entropy, row, 0);
    PUT(mean_logprob, row, 0);
    PUT(weight_sum, row, 0);
    PUT(loss, row, 0);
    if (job->rank)
        job->rank[row] = -1;
    if (job->argmax)
        job->argmax[row] = -1;
}

static void KIND(put_part)(const Job *job, int64_t row, const Part *part, REAL z)
{
    PUT(m, row, part->m);
    PUT(s, row, part->s);
    PUT(ez_sum, row, part->ez_sum);
    PUT(logit_sum, row, part->logit_sum);
    PUT(weight_sum, row, part->weight_sum);
    PUT(target_logit, row, z == INFINITY ? NAN : z);
    if (job->argmax) {
        job->argmax[row] = part->best_class < 0 ? 0 : part->best_class;
        if (part->first_nan >= 0) {
            job->argmax[row] = part->first_nan;
            PUT(m, row, NAN);
        }
    }
}

static int64_t KIND(best_class)(const Part *part, REAL z, int64_t target)
{
    if (part->first_nan >= 0 || z != z)
        return part->first_nan < 0 || (z != z && target < part->first_nan) ? target : part->first_nan;
    double logit = (double)z;
    int ahead = part->best_class < 0 || logit > part->m || (logit == part->m && target < part->best_class);
    return ahead ? target : part->best_class;
}

static void KIND(put_row)(const Job *job, int64_t row, const Part *part, REAL z)
{
    const int64_t target = job->target[row];
    REAL weight = 1;
    if (KIND(is_weighted)(job))
        KIND(weights)(job, row, target, 1, &weight);
    /* A target logit of inf makes its row NaN, as in torch. log1p(exp(-inf)) would make the loss 0. */
    Finished out = finish(part, z == INFINITY ? NAN : (double)z, (double)weight, job->vocab_size);
    REAL lse = (REAL)out.lse;
    PUT(lse, row, lse);
    PUT(lse_low, row, (out.lse - (double)lse) + out.lse_low);
    PUT(logprob, row, out.logprob);
    PUT(entropy, row, out.entropy);
    PUT(mean_logprob, row, out.mean_logprob);
    PUT(weight_sum, row, part->weight_sum);
    PUT(loss, row, token_loss(&out, job->label_smoothing, job->z_loss_weight));
    if (job->rank)
        job->rank[row] = z != z || z == INFINITY ? job->vocab_size - 1 : part->num_better;
    if (job->argmax)
        job->argmax[row] = KIND(best_class)(part, z, target);
}

/* The same as `token_loss_coefficients` in chunked_ce/core/gradient.py. */
static Coefficients KIND(loss_coefficients)(const Job *job, int64_t row)
{
    double w = job->token_weight ? KIND(number)(job->token_weight, row) : 1.0;
    double lse = KIND(number)(job->lse, row), smoothing = job->label_smoothing;
    w = (double)(REAL)(w / job->divisor); /* autograd would pass it in this dtype */
    Coefficients n = {.c = (smoothing - 1) * w};
    if (job->z_loss_weight > 0)
        n.a = 2 * job->z_loss_weight * lse * w;
    if (smoothing > 0) {
        n.u = -smoothing * w / (double)job->vocab_size;
        n.a -= n.u * (double)(job->vocab_size - 1);
        n.c += n.u;
    }
    return n;
}

static RowGradient KIND(gradient_numbers)(const Job *job, int64_t row)
{
    Coefficients n = {KIND(number)(job->a, row), KIND(number)(job->b, row),
                      KIND(number)(job->c, row), KIND(number)(job->u, row)};
    if (job->kind == LOSS_AND_GRADIENT)
        n = KIND(loss_coefficients)(job, row);
    return row_gradient(KIND(number)(job->lse, row), KIND(number)(job->logprob, row),
                        KIND(number)(job->lse_low, row), n);
}

void KIND(finish_row)(const Job *job, int64_t row, const Part *parts)
{
    if (job->target[row] == job->ignore_index && job->kind != PARTS) {
        KIND(put_ignored)(job, row);
        return;
    }
    Part whole = empty_part();
    for (int64_t i = 0; i < num_segments(job->vocab_size); i++)
        merge_part(&whole, &parts[i]);
    (job->kind == PARTS ? KIND(put_part) : KIND(put_row))(job, row, &whole, KIND(target_logit)(job, row));
}

void KIND(segment_part)(const Job *job, Part *parts, int64_t index)
{
    int64_t segments = num_segments(job->vocab_size), row = index / segments;
    int ignored = job->target[row] == job->ignore_index && job->kind != PARTS;
    parts[index] = ignored ? empty_part()
                           : KIND(segment_sums)(job, row, index % segments, KIND(target_logit)(job, row));
}

void KIND(segment_gradient)(const Job *job, Part *parts, int64_t index)
{
    (void)parts;
    int64_t segments = num_segments(job->vocab_size), row = index / segments;
    RowGradient numbers = KIND(gradient_numbers)(job, row);
    int ignored = job->target[row] == job->ignore_index;
    KIND(segment_grad)(job, row, index % segments, ignored ? NULL : &numbers);
}

void KIND(row)(const Job *job, int64_t row)
{
    const int64_t segments = num_segments(job->vocab_size);
    const int ignored = job->target[row] == job->ignore_index;
    if (job->kind == GRADIENT) {
        /* lse, logprob and lse_low are inputs: other calls may read them, so nothing is written */
    } else if (ignored && job->kind != PARTS) {
        KIND(put_ignored)(job, row);
    } else {
        REAL z = KIND(target_logit)(job, row);
        Part whole = empty_part();
        for (int64_t i = 0; i < segments; i++) {
            Part part = KIND(segment_sums)(job, row, i, z);
            merge_part(&whole, &part);
        }
        (job->kind == PARTS ? KIND(put_part) : KIND(put_row))(job, row, &whole, z);
    }
    if (job->kind == STATISTICS || job->kind == PARTS)
        return;
    RowGradient numbers = KIND(gradient_numbers)(job, row);
    for (int64_t i = 0; i < segments; i++)
        KIND(segment_grad)(job, row, i, ignored ? NULL : &numbers);
}
