/* What a call for each logit does: filled in by chunked_ce/backends/cpu_binary.py, field for field. */
#ifndef CHUNKED_CE_ELEMENTWISE_H
#define CHUNKED_CE_ELEMENTWISE_H

#include "job.h"

enum { BINARY_SUM, BINARY_LOSS, BINARY_GRADIENT, SCALE };

/* [rows, V] each; data NULL: labels 0, weights 1 */
typedef struct {
    Rows x, out, label, weight, pos_weight, upstream;
    const int32_t *left_out; /* [rows, left_out_per_row] ascending classes that are not summed */
    double *sums;            /* one a task, of this library */
    double loss_sum;
    int64_t outer, inner, columns, left_out_per_row, kind, threads;
} Elementwise;

/* A segment of a row; its sum, which is 0 unless the kind is BINARY_SUM. */
double elements_f32(const Elementwise *job, int64_t row, int64_t segment);
double elements_f64(const Elementwise *job, int64_t row, int64_t segment);

#endif
