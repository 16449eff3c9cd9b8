/* One number for each logit: binary cross-entropy, its gradient, a gradient times its upstream. */
#include <stdlib.h>

#include "elementwise.h"

/* A task is some short rows, or a segment of a long one, whatever the number of threads. */
static int64_t rows_per_task(const Elementwise *job)
{
    int64_t rows = ELEMENTS_PER_TASK / (job->columns + 1);
    return segments_of(job->columns) > 1 || rows < 1 ? 1 : rows;
}

static void task(const Job *given, Part *parts, int64_t index)
{
    const Elementwise *job = (const Elementwise *)(const void *)given;
    const int64_t pieces = segments_of(job->columns), many = rows_per_task(job);
    const int64_t rows = job->outer * job->inner, first = index / pieces * many;
    const int64_t last = first + many < rows ? first + many : rows;
    double sum = 0;
    (void)parts;
    for (int64_t row = first; row < last; row++)
        sum += (job->x.dtype == FLOAT64 ? elements_f64 : elements_f32)(job, row, index % pieces);
    if (job->sums)
        job->sums[index] = sum;
}

/* 0: done. -1: no memory. */
int64_t chunked_ce_elementwise(Elementwise *job)
{
    int64_t rows = job->outer * job->inner, many = rows_per_task(job);
    int64_t tasks = (rows + many - 1) / many * segments_of(job->columns);
    int64_t threads = rows * job->columns / ELEMENTS_PER_THREAD;
    threads = threads < job->threads ? threads : job->threads;
    job->sums = job->kind == BINARY_SUM ? malloc((size_t)(tasks + 1) * sizeof(double)) : NULL;
    if (job->kind == BINARY_SUM && !job->sums)
        return -1;
    run_tasks((const Job *)(const void *)job, NULL, task, tasks, threads);
    for (int64_t i = 0; job->sums && i < tasks; i++)
        job->loss_sum += job->sums[i];
    free(job->sums);
    return 0;
}
