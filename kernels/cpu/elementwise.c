/* Elementwise calls: binary cross-entropy, its gradient, and scaling a gradient. */
#include <stdlib.h>

#include "elementwise.h"

/* A task is several short rows or one segment of a long row, for any number of threads. */
static int64_t rows_per_task(const Elementwise *job)
{
    int64_t rows = ELEMENTS_PER_TASK / (job->columns + 1);
    return num_segments(job->columns) > 1 || rows < 1 ? 1 : rows;
}

static void run_task(const Job *opaque, Part *parts, int64_t index)
{
    const Elementwise *job = (const Elementwise *)(const void *)opaque;
    const int64_t segments = num_segments(job->columns), per_task = rows_per_task(job);
    const int64_t rows = job->outer * job->inner, first = index / segments * per_task;
    const int64_t last = first + per_task < rows ? first + per_task : rows;
    double sum = 0;
    (void)parts;
    for (int64_t row = first; row < last; row++)
        sum += (job->x.dtype == FLOAT64 ? elements_f64 : elements_f32)(job, row, index % segments);
    if (job->sums)
        job->sums[index] = sum;
}

/* Return 0, or -1 if there is no memory. */
int64_t chunked_ce_elementwise(Elementwise *job)
{
    int64_t rows = job->outer * job->inner, per_task = rows_per_task(job);
    int64_t tasks = (rows + per_task - 1) / per_task * num_segments(job->columns);
    int64_t threads = rows * job->columns / ELEMENTS_PER_THREAD;
    threads = threads < job->threads ? threads : job->threads;
    job->sums = job->kind == BINARY_SUM ? malloc((size_t)(tasks + 1) * sizeof(double)) : NULL;
    if (job->kind == BINARY_SUM && !job->sums)
        return -1;
    run_tasks((const Job *)(const void *)job, NULL, run_task, tasks, threads);
    for (int64_t i = 0; job->sums && i < tasks; i++)
        job->loss_sum += job->sums[i];
    free(job->sums);
    return 0;
}
