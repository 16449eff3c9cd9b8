/* What one call does: filled in by chunked_ce/backends/cpu.py, field for field. */
#ifndef CHUNKED_CE_JOB_H
#define CHUNKED_CE_JOB_H

#include <stdint.h>

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum { STATISTICS, PARTS, GRADIENT, LOSS_AND_GRADIENT };
enum { BLOCK = 2048, SEGMENT = 8 * BLOCK };
enum { ELEMENTS_PER_TASK = 1 << 15, ELEMENTS_PER_THREAD = 1 << 17 }; /* to start one takes some 50 us */

/* [outer, inner, V]: element (i, j, v) is at data + (i stride[0] + j stride[1] + v stride[2]) */
typedef struct {
    char *data;
    int64_t stride[3];
    int64_t dtype;
} Rows;

/* real: float, or double for FLOAT64 logits; all of them [rows], NULL where not wanted */
typedef struct {
    Rows x, grad, prob;
    const void *class_weight; /* [V] real */
    const int64_t *target;
    void *lse, *logprob, *lse_low; /* real; of GRADIENT what comes in */
    void *entropy, *mean_logprob, *weight_sum;
    int64_t *rank, *argmax;
    void *m, *s, *ez_sum, *logit_sum, *target_logit; /* of PARTS */
    const void *a, *b, *c, *u;                     /* of GRADIENT */
    const void *token_weight;                      /* of LOSS_AND_GRADIENT, as the rest */
    void *loss;
    double divisor, label_smoothing, z_loss_weight;
    double softcap, logit_scale, prob_scale, prob_shift; /* softcap 0: none */
    int64_t outer, inner, vocab_size, columns, ignore_index;
    int64_t kind, shard, threads;
} Job;

/* Sums over some classes of a row but its target; see chunked_ce/core/row_stats.py. */
typedef struct {
    double m, s, ez_sum, logit_sum, weight_sum;
    int64_t num_better, best_class, first_nan; /* -1: none */
} Part;

/* The finished statistics of a row, in double whatever the logits are. */
typedef struct {
    double lse, lse_low, logprob, entropy, mean_logprob;
} Finished;

/* e (scale + slope (z - lse)) + u w, e = exp(z - lse); at_target there */
typedef struct {
    double lse, scale, slope, u, at_target;
} RowGradient;

typedef struct {
    double a, b, c, u;
} Coefficients;

Part empty_part(void);
void move_part(Part *part, double m);
void merge_part(Part *left, const Part *right);
Finished finish(const Part *part, double target_logit, double target_weight, int64_t vocab_size);
RowGradient row_gradient(double lse, double logprob, double lse_low, Coefficients numbers);
double token_loss(const Finished *row, double label_smoothing, double z_loss_weight);

typedef void (*Task)(const Job *job, Part *parts, int64_t index);
/* Runs task(job, parts, 0 .. count - 1) on at most `threads` threads. */
void run_tasks(const Job *job, Part *parts, Task task, int64_t count, int64_t threads);

/* Per kind of real: a whole row; a segment's sums; what follows from a row's; a segment's gradient */
void row_f32(const Job *job, int64_t row);
void row_f64(const Job *job, int64_t row);
void segment_part_f32(const Job *job, Part *parts, int64_t index);
void segment_part_f64(const Job *job, Part *parts, int64_t index);
void finish_row_f32(const Job *job, int64_t row, const Part *parts);
void finish_row_f64(const Job *job, int64_t row, const Part *parts);
void segment_gradient_f32(const Job *job, Part *parts, int64_t index);
void segment_gradient_f64(const Job *job, Part *parts, int64_t index);

static inline int64_t segments_of(int64_t columns)
{
    return columns <= SEGMENT ? 1 : (columns + SEGMENT - 1) / SEGMENT;
}

static inline int64_t size_of(int64_t dtype)
{
    return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2;
}

static inline char *row_of(const Rows *rows, int64_t inner, int64_t row)
{
    int64_t at = row / inner * rows->stride[0] + row % inner * rows->stride[1];
    return rows->data + at * size_of(rows->dtype);
}

#endif
