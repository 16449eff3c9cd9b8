/* Pairs of rows of logits, a student's and a teacher's: what threads share. */
#include <stddef.h>

#include "pair.h"

static int64_t rows_per_task(const Pair *job)
{
    int64_t rows = ELEMENTS_PER_TASK / (job->vocab_size + 1);
    return rows < 1 ? 1 : rows;
}

static void task(const Job *given, Part *parts, int64_t index)
{
    const Pair *job = (const Pair *)(const void *)given;
    const int64_t rows = job->outer * job->inner, many = rows_per_task(job);
    const int64_t last = (index + 1) * many < rows ? (index + 1) * many : rows;
    (void)parts;
    for (int64_t row = index * many; row < last; row++)
        (job->x.dtype == FLOAT64 ? pair_row_f64 : pair_row_f32)(job, row);
}

void chunked_ce_pair(const Pair *job)
{
    int64_t rows = job->outer * job->inner, many = rows_per_task(job);
    int64_t threads = rows * job->vocab_size / ELEMENTS_PER_THREAD;
    threads = threads < job->threads ? threads : job->threads;
    run_tasks((const Job *)(const void *)job, NULL, task, (rows + many - 1) / many, threads);
}
