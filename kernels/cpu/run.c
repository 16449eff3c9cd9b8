/* The library's entries: what is divided among threads, and in which pieces. */
#include <stdlib.h>
#include <sys/mman.h>

#include "elementwise.h"
#include "pair.h"

enum { LAYOUT = 1, MAPPED_BYTES = 32 << 20 }; /* malloc maps what is larger anew each time */

static int64_t rows_per_task(const Job *job)
{
    int64_t rows = ELEMENTS_PER_TASK / (job->columns + 1);
    return rows < 1 ? 1 : rows;
}

static void some_rows(const Job *job, Part *parts, int64_t index)
{
    (void)parts;
    int64_t many = rows_per_task(job), rows = job->outer * job->inner;
    int64_t stop = (index + 1) * many < rows ? (index + 1) * many : rows;
    for (int64_t row = index * many; row < stop; row++)
        (job->x.dtype == FLOAT64 ? row_f64 : row_f32)(job, row);
}

static void whole_rows(const Job *job, int64_t threads)
{
    int64_t rows = job->outer * job->inner, many = rows_per_task(job);
    run_tasks(job, NULL, some_rows, (rows + many - 1) / many, threads);
}

/* Few rows: the threads share each, in the same segments as ever. */
static int segments(const Job *job, int64_t threads)
{
    int64_t rows = job->outer * job->inner, pieces = segments_of(job->vocab_size);
    int is_double = job->x.dtype == FLOAT64;
    if (job->kind != GRADIENT) {
        Part *parts = malloc((size_t)(rows * pieces) * sizeof(Part));
        if (!parts)
            return 0;
        run_tasks(job, parts, is_double ? segment_part_f64 : segment_part_f32, rows * pieces, threads);
        for (int64_t row = 0; row < rows; row++)
            (is_double ? finish_row_f64 : finish_row_f32)(job, row, parts + row * pieces);
        free(parts);
    }
    if (job->kind == GRADIENT || job->kind == LOSS_AND_GRADIENT)
        run_tasks(job, NULL, is_double ? segment_gradient_f64 : segment_gradient_f32, rows * pieces,
                  threads);
    return 1;
}

/* A large new gradient is memory that no one has touched: its first pages cost more than its numbers. */
static void ask_for_huge_pages(const Job *job)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21;
    int64_t bytes = job->outer * job->inner * job->columns * size_of(job->grad.dtype);
    int is_dense = job->outer == 1 && job->grad.stride[1] == job->columns && job->grad.stride[2] == 1;
    if (!is_dense || job->grad.data == job->x.data || bytes < MAPPED_BYTES)
        return;
    uintptr_t first = (uintptr_t)job->grad.data, stop = (first + (uintptr_t)bytes) & ~(page - 1);
    first = (first + page - 1) & ~(page - 1);
    madvise((void *)first, stop - first, MADV_HUGEPAGE); /* without them all is as well */
#else
    (void)job;
#endif
}

/* 0: done. Otherwise 1 + the first row whose target does not exist; then nothing is done. */
int64_t chunked_ce_run(const Job *job)
{
    int64_t rows = job->outer * job->inner, scored = 0;
    for (int64_t row = 0; row < rows; row++) {
        int64_t target = job->target[row];
        int ignored = target == job->ignore_index;
        scored += !ignored;
        if (!ignored && !job->shard && (target < 0 || target >= job->vocab_size))
            return row + 1;
    }
    if (job->kind == GRADIENT || job->kind == LOSS_AND_GRADIENT)
        ask_for_huge_pages(job);
    int64_t threads = scored * job->vocab_size / ELEMENTS_PER_THREAD;
    threads = threads < job->threads ? threads : job->threads;
    int few = threads > 1 && rows < 4 * threads && segments_of(job->vocab_size) > 1;
    if (!few || !segments(job, threads))
        whole_rows(job, threads);
    return 0;
}

/* Which version of the structures this is: a library of another version is not called. */
int64_t chunked_ce_layout(void)
{
    return LAYOUT * 10000 + (int64_t)(sizeof(Job) + sizeof(Elementwise) + sizeof(Pair));
}
