/* The arguments of one call. chunked_ce/backends/cpu.py packs the same fields in the same order. */
#ifndef CHUNKED_CE_JOB_H
#define CHUNKED_CE_JOB_H

#include <stdint.h>

enum { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum { STATISTICS, PARTS, GRADIENT, LOSS_AND_GRADIENT };
enum { BLOCK = 2048, SEGMENT = 8 * BLOCK };
enum { ELEMENTS_PER_TASK = 1 << 15, ELEMENTS_PER_THREAD = 1 << 17 }; /* starting a thread takes 50 us */

/* A tensor [outer, inner, V]. Element (i, j, v) is at data + i stride[0] + j stride[1] + v stride[2],
   in elements. */
typedef struct {
    char *data;
    int64_t stride[3];
    int64_t dtype;
} Rows;

/* "real" means float, or double for FLOAT64 logits. Pointers are to [rows] numbers, or NULL where
   they are not wanted. */
typedef struct {
    Rows x, grad, prob;
    const void *class_weight; /* [V] real */
    const int64_t *target;
    void *lse, *logprob, *lse_low; /* real; inputs of GRADIENT, else outputs */
    void *entropy, *mean_logprob, *weight_sum;
    int64_t *rank, *argmax;
    void *m, *s, *ez_sum, *logit_sum, *target_logit; /* outputs of PARTS */
    const void *a, *b, *c, *u;                     /* inputs of GRADIENT */
    const void *token_weight;                      /* LOSS_AND_GRADIENT: this and the next four */
    void *loss;
    double divisor, label_smoothing, z_loss_weight;
    double softcap, logit_scale, prob_scale, prob_shift; /* softcap 0: none */
    int64_t outer, inner, vocab_size, columns, ignore_index;
    int64_t kind, shard, threads;
} Job;

/* Sums over some classes of a row without its target; see chunked_ce/core/row_stats.py. */
typedef struct {
    double m, s, ez_sum, logit_sum, weight_sum;
    int64_t num_better, best_class, first_nan; /* -1: none */
} Part;

/* The statistics of a whole row, in double for every dtype of logits. */
typedef struct {
    double lse, lse_low, logprob, entropy, mean_logprob;
} Finished;

/* The gradient e (scale + slope (z - lse)) + u w with e = exp(z - lse), or at_target at the target. */
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
/* Run task(job, parts, i) for i from 0 to count - 1 on at most `threads` threads. */
void run_tasks(const Job *job, Part *parts, Task task, int64_t count, int64_t threads);

/* For float and double: run a whole row; sum a segment; finish a row from its segments' sums; write
   the gradient of a segment. */
void row_f32(const Job *job, int64_t row);
void row_f64(const Job *job, int64_t row);
void segment_part_f32(const Job *job, Part *parts, int64_t index);
void segment_part_f64(const Job *job, Part *parts, int64_t index);
void finish_row_f32(const Job *job, int64_t row, const Part *parts);
void finish_row_f64(const Job *job, int64_t row, const Part *parts);
void segment_gradient_f32(const Job *job, Part *parts, int64_t index);
void segment_gradient_f64(const Job *job, Part *parts, int64_t index);

static inline int64_t num_segments(int64_t columns)
{
    return columns <= SEGMENT ? 1 : (columns + SEGMENT - 1) / SEGMENT;
}

static inline int64_t item_size(int64_t dtype)
{
    return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2;
}

static inline char *row_start(const Rows *rows, int64_t inner, int64_t row)
{
    int64_t offset = row / inner * rows->stride[0] + row % inner * rows->stride[1];
    return rows->data + offset * item_size(rows->dtype);
}

#endif
