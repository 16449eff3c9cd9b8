/* From the sums of a row to its statistics, in double. chunked_ce/core/row_stats.py has the same
   formulas. */
#include <math.h>
#include <stddef.h>

#include "job.h"

Part empty_part(void)
{
    return (Part){.m = -INFINITY, .best_class = -1, .first_nan = -1};
}

/* Make the sums of `part` relative to m, which is at least its own maximum. */
void move_part(Part *part, double m)
{
    if (part->m == m)
        return;
    if (part->m == -INFINITY) {
        part->m = m;
        return; /* s is 0, and logit_sum is 0 or stays -inf */
    }
    double shift = part->m - m, scale = exp(shift);
    part->ez_sum = scale == 0 ? part->ez_sum * 0 : scale * (part->ez_sum + part->s * shift);
    part->s *= scale;
    if (part->weight_sum != 0)
        part->logit_sum += part->weight_sum * shift;
    part->m = m;
}

/* Add `right` to `left`, which holds the lower class indices. */
void merge_part(Part *left, const Part *right)
{
    Part moved = *right;
    if (left->best_class < 0 || right->m > left->m)
        left->best_class = right->best_class < 0 ? left->best_class : right->best_class;
    if (left->first_nan < 0)
        left->first_nan = right->first_nan;
    double m = right->m > left->m ? right->m : left->m;
    move_part(left, m);
    move_part(&moved, m);
    left->s += moved.s;
    left->ez_sum += moved.ez_sum;
    left->logit_sum += moved.logit_sum;
    left->weight_sum += moved.weight_sum;
    left->num_better += moved.num_better;
}

/* Return the statistics of a whole row. `target_logit` is finite, -inf or NaN. */
Finished finish(const Part *part, double target_logit, double target_weight, int64_t vocab_size)
{
    double gap = part->m - target_logit, log_s = log(part->s), d = gap + log_s;
    double back = gap - part->m; /* Knuth's TwoSum: gap_low is the rounding error of gap */
    double gap_low = (part->m - (gap - back)) - (target_logit + back);
    gap_low = isfinite(gap_low) ? gap_low : 0.0;
    double tail = log1p(d < 0 ? part->s * exp(gap) * (1.0 + gap_low) : exp(-d));
    double loss = (d < 0 ? 0.0 : d) + tail;
    int others_lead = d > 0;
    double above_m = others_lead ? log_s + tail : loss - gap; /* lse - m */
    Finished out;
    if (others_lead) {
        out.lse = part->m + above_m;
        out.lse_low = (part->m - out.lse) + above_m;
    } else {
        out.lse = target_logit + loss;
        out.lse_low = (target_logit - out.lse) + loss;
    }
    out.logprob = -loss;
    double others = exp(-above_m) * (part->s * above_m - part->ez_sum);
    double target_entropy = exp(-loss) * loss;
    out.entropy = (part->m == -INFINITY ? 0.0 : others) + (loss == INFINITY ? 0.0 : target_entropy);
    double other_terms = vocab_size > 1 ? part->logit_sum - part->weight_sum * above_m : 0.0;
    if (part->weight_sum == 0 && isinf(above_m))
        other_terms = 0.0;
    double target_term = target_weight == 0 ? 0.0 : target_weight * loss;
    out.mean_logprob = (other_terms - target_term) / (double)vocab_size;
    return out;
}

RowGradient row_gradient(double lse, double logprob, double lse_low, Coefficients n)
{
    double p_target = exp(logprob), factor = exp(-lse_low);
    RowGradient out = {.lse = lse, .slope = n.b * factor, .u = n.u};
    out.scale = (n.a - n.c - n.b * lse_low) * factor;
    out.at_target = -n.c * expm1(logprob) + n.a * p_target;
    if (p_target != 0)
        out.at_target += n.b * p_target * logprob;
    return out;
}

double token_loss(const Finished *row, double label_smoothing, double z_loss_weight)
{
    double loss = -row->logprob;
    if (label_smoothing == 1)
        loss = -row->mean_logprob;
    else if (label_smoothing > 0)
        loss = (1 - label_smoothing) * loss - label_smoothing * row->mean_logprob;
    return z_loss_weight > 0 ? loss + z_loss_weight * row->lse * row->lse : loss;
}
