/* What a call for pairs of rows does: filled in by chunked_ce/backends/cpu_pair.py, field for field. */
#ifndef CHUNKED_CE_PAIR_H
#define CHUNKED_CE_PAIR_H

#include "job.h"

enum { FORWARD, REVERSE, JSD };

#define FAR_APART 16 /* maxima that differ by more: z and y are taken from them */

/* Statistics if `upstream` is NULL, else the gradient from them. real: as in Job, all [rows].
 * has_norms: all but `loss` and `student_kl` are given, of more classes than these. */
typedef struct {
    Rows x, teacher, grad;
    const uint8_t *ignored; /* NULL: none */
    void *loss, *student_kl, *max, *log_sum, *teacher_max, *teacher_log_sum, *shift; /* real */
    const void *upstream;
    double beta, temperature;
    int64_t outer, inner, columns, vocab_size, kind, threads, has_norms;
} Pair;

void pair_row_f32(const Pair *job, int64_t row);
void pair_row_f64(const Pair *job, int64_t row);

#endif
