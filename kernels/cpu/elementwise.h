/* The arguments of an elementwise call. chunked_ce/backends/cpu_binary.py fills in the same fields. */
#ifndef CHUNKED_CE_ELEMENTWISE_H
#define CHUNKED_CE_ELEMENTWISE_H

#include "job.h"

enum { BINARY_SUM, BINARY_LOSS, BINARY_GRADIENT, SCALE };

/* Tensors [rows, V]. Where `data` is NULL, labels are 0 and weights are 1. */
typedef struct {
    Rows x, out, label, weight, pos_weight, upstream;
    const int32_t *left_out; /* [rows, left_out_per_row] classes to leave out of the sum, ascending */
    double *sums;            /* one per task; the library allocates it */
    double loss_sum;
    int64_t outer, inner, columns, left_out_per_row, kind, threads;
} Elementwise;

/* Compute a segment of a row. Return the sum of its losses for BINARY_SUM, else 0. */
double elements_f32(const Elementwise *job, int64_t row, int64_t segment);
double elements_f64(const Elementwise *job, int64_t row, int64_t segment);

#endif
