/* The entry points of the library. They divide the work among threads. */
#include <stdlib.h>
#include <sys/mman.h>

#include "elementwise.h"

enum { LAYOUT = 1, MAPPED_BYTES = 32 << 20 }; /* malloc maps new pages for larger blocks */

static int64_t rows_per_task(const Job *job)
{
    int64_t rows = ELEMENTS_PER_TASK / (job->columns + 1);
    return rows < 1 ? 1 : rows;
}

static void run_row_task(const Job *job, Part *parts, int64_t index)
{
    (void)parts;
    int64_t per_task = rows_per_task(job), rows = job->outer * job->inner;
    int64_t stop = (index + 1) * per_task < rows ? (index + 1) * per_task : rows;
    for (int64_t row = index * per_task; row < stop; row++)
        (job->x.dtype == FLOAT64 ? row_f64 : row_f32)(job, row);
}

static void run_rows(const Job *job, int64_t threads)
{
    int64_t rows = job->outer * job->inner, per_task = rows_per_task(job);
    run_tasks(job, NULL, run_row_task, (rows + per_task - 1) / per_task, threads);
}

/* Share each row among the threads, because there are few rows. The segments are always the same, so
   the results are too. Return 0 if there is no memory. */
static int run_segments(const Job *job, int64_t threads)
{
    int64_t rows = job->outer * job->inner, segments = num_segments(job->vocab_size);
    int is_double = job->x.dtype == FLOAT64;
    if (job->kind != GRADIENT) {
        Part *parts = malloc((size_t)(rows * segments) * sizeof(Part));
        if (!parts)
            return 0;
        run_tasks(job, parts, is_double ? segment_part_f64 : segment_part_f32, rows * segments, threads);
        for (int64_t row = 0; row < rows; row++)
            (is_double ? finish_row_f64 : finish_row_f32)(job, row, parts + row * segments);
        free(parts);
    }
    if (job->kind == GRADIENT || job->kind == LOSS_AND_GRADIENT)
        run_tasks(job, NULL, is_double ? segment_gradient_f64 : segment_gradient_f32, rows * segments,
                  threads);
    return 1;
}

/* Ask for huge pages for a large new gradient. Mapping its small pages would take longer than
   computing its values. */
static void ask_for_huge_pages(const Job *job)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page_bytes = 1 << 21;
    int64_t bytes = job->outer * job->inner * job->columns * item_size(job->grad.dtype);
    int is_dense = job->outer == 1 && job->grad.stride[1] == job->columns && job->grad.stride[2] == 1;
    if (!is_dense || job->grad.data == job->x.data || bytes < MAPPED_BYTES)
        return;
    uintptr_t first = (uintptr_t)job->grad.data, stop = (first + (uintptr_t)bytes) & ~(page_bytes - 1);
    first = (first + page_bytes - 1) & ~(page_bytes - 1);
    madvise((void *)first, stop - first, MADV_HUGEPAGE); /* a failure does no harm */
#else
    (void)job;
#endif
}

/* Return 0, or 1 + the first row with a target out of range, before anything is written. */
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
    int split_rows = threads > 1 && rows < 4 * threads && num_segments(job->vocab_size) > 1;
    if (!split_rows || !run_segments(job, threads))
        run_rows(job, threads);
    return 0;
}

/* Return the version of the structures. The caller refuses a library with another version. */
int64_t chunked_ce_layout(void)
{
    return LAYOUT * 10000 + (int64_t)(sizeof(Job) + sizeof(Elementwise));
}
