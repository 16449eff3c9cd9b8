/* Calls of every kind with 8 threads, two at once, against the same calls with one, bit for bit.
   For -fsanitize=thread, under which Python would not run: tests/sanitize_cpu.sh. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "elementwise.h"

int64_t chunked_ce_run(const Job *job);
int64_t chunked_ce_elementwise(Elementwise *job);

enum { THREADS = 8, VOCAB = 3 * SEGMENT + 77, COLUMNS = VOCAB + 5, ROW_NUMBERS = 24 };

/* A batch that is only read, and what one caller writes. */
typedef struct {
    int64_t dtype, rows, *target;
    char *x, *prob;
    double *row_numbers;
} Batch;

typedef struct {
    char *grad, *numbers, *ranks;
    double sum;
} Results;

static uint64_t state = 1;

static double uniform(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 11) / 9007199254740992.0;
}

static void *allocate(size_t bytes)
{
    void *memory = calloc(bytes, 1);
    if (!memory)
        exit(2);
    return memory;
}

static void put(char *data, int64_t dtype, int64_t i, double value)
{
    float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    if (dtype == FLOAT64)
        ((double *)(void *)data)[i] = value;
    else if (dtype == FLOAT32)
        ((float *)(void *)data)[i] = single;
    else /* bfloat16, truncated; as fp16 other numbers, but finite ones */
        ((uint16_t *)(void *)data)[i] = (uint16_t)(bits >> 16);
}

static Batch new_batch(int64_t dtype, int64_t rows)
{
    Batch batch = {.dtype = dtype, .rows = rows};
    size_t elements = (size_t)rows * COLUMNS;
    batch.x = allocate(elements * 8);
    batch.prob = allocate(elements * 8);
    batch.target = allocate((size_t)rows * 8);
    batch.row_numbers = allocate((size_t)rows * 8 * ROW_NUMBERS);
    for (size_t i = 0; i < elements; i++) {
        put(batch.x, dtype, (int64_t)i, dtype == FLOAT16 ? uniform() / 64 : 8 * uniform() - 4);
        put(batch.prob, dtype, (int64_t)i, dtype == FLOAT16 ? uniform() / 64 : uniform());
    }
    for (int64_t row = 0; row < rows; row++)
        batch.target[row] = row % 5 == 3 ? -100 : (int64_t)(uniform() * VOCAB);
    for (int64_t i = 0; i < rows * ROW_NUMBERS; i++)
        put((char *)batch.row_numbers, dtype == FLOAT64 ? FLOAT64 : FLOAT32, i, uniform());
    return batch;
}

static Rows rows_of(char *data, int64_t dtype)
{
    return (Rows){.data = data, .stride = {0, COLUMNS, 1}, .dtype = dtype};
}

/* The i-th array of one number a row */
static void *numbers(const Batch *batch, char *from, int i)
{
    return from + (size_t)i * (size_t)batch->rows * (batch->dtype == FLOAT64 ? 8 : 4);
}

static void ask_for_statistics(const Batch *batch, Results *out, Job *job)
{
    void **wanted[] = {&job->lse, &job->logprob, &job->lse_low, &job->entropy, &job->mean_logprob, &job->weight_sum};
    for (int i = 0; i < 6; i++)
        *wanted[i] = numbers(batch, out->numbers, i);
    job->rank = (int64_t *)(void *)out->ranks;
    job->argmax = job->rank + batch->rows;
    job->prob = rows_of(batch->prob, batch->dtype);
    job->softcap = 5;
}

static void ask_for_part(const Batch *batch, Results *out, Job *job)
{
    void **wanted[] = {&job->m, &job->s, &job->ez_sum, &job->logit_sum, &job->weight_sum, &job->target_logit};
    for (int i = 0; i < 6; i++)
        *wanted[i] = numbers(batch, out->numbers, i);
    job->shard = 1;
}

static void ask_for_gradient(const Batch *batch, Results *out, Job *job)
{
    char *row_numbers = (char *)batch->row_numbers;
    const void **coefficients[] = {&job->a, &job->b, &job->c, &job->u};
    for (int i = 0; i < 4; i++)
        *coefficients[i] = numbers(batch, row_numbers, i);
    job->lse = numbers(batch, row_numbers, 4);
    job->logprob = numbers(batch, row_numbers, 5);
    job->lse_low = numbers(batch, row_numbers, 6);
    job->grad = rows_of(out->grad, batch->dtype);
}

static void ask_for_loss_and_gradient(const Batch *batch, Results *out, Job *job)
{
    void **wanted[] = {&job->lse, &job->logprob, &job->lse_low, &job->loss};
    for (int i = 0; i < 4; i++)
        *wanted[i] = numbers(batch, out->numbers, i);
    job->grad = rows_of(out->grad, batch->dtype);
    job->label_smoothing = 0.1;
    job->z_loss_weight = 1e-3;
}

static void run_rows(const Batch *batch, Results *out, int64_t kind, int64_t threads)
{
    void (*const ask[])(const Batch *, Results *, Job *) = {
        ask_for_statistics, ask_for_part, ask_for_gradient, ask_for_loss_and_gradient};
    Job job = {.kind = kind, .threads = threads, .outer = 1, .inner = batch->rows,
               .vocab_size = VOCAB, .columns = COLUMNS, .ignore_index = -100,
               .logit_scale = 1, .prob_scale = 1, .divisor = 3};
    job.x = rows_of(batch->x, batch->dtype);
    job.target = batch->target;
    ask[kind](batch, out, &job);
    if (chunked_ce_run(&job) != 0)
        exit(3);
}

static void run_elements(const Batch *batch, Results *out, int64_t kind, int64_t threads)
{
    Elementwise job = {.kind = kind, .threads = threads, .outer = 1, .inner = batch->rows, .columns = COLUMNS};
    int64_t real = batch->dtype == FLOAT64 ? FLOAT64 : FLOAT32;
    job.x = rows_of(batch->x, batch->dtype);
    if (kind != SCALE)
        job.label = rows_of(batch->prob, batch->dtype);
    if (kind != BINARY_SUM)
        job.out = rows_of(out->grad, kind == BINARY_LOSS ? real : batch->dtype);
    if (kind == BINARY_GRADIENT || kind == SCALE)
        job.upstream = (Rows){.data = (char *)batch->row_numbers, .stride = {0, 1, 0}, .dtype = real};
    if (chunked_ce_elementwise(&job) != 0)
        exit(3);
    out->sum = job.loss_sum;
}

typedef struct {
    const Batch *batch;
    int64_t kind, threads; /* from 10 on: of `Elementwise` */
    Results results;
} Call;

static void *run(void *argument)
{
    Call *call = argument;
    size_t rows = (size_t)call->batch->rows;
    call->results = (Results){.grad = allocate(rows * COLUMNS * 8),
                              .numbers = allocate(rows * 8 * ROW_NUMBERS),
                              .ranks = allocate(rows * 16)};
    if (call->kind < 10)
        run_rows(call->batch, &call->results, call->kind, call->threads);
    else
        run_elements(call->batch, &call->results, call->kind - 10, call->threads);
    return NULL;
}

static int same(const Call *a, const Call *b)
{
    size_t rows = (size_t)a->batch->rows;
    return !memcmp(a->results.grad, b->results.grad, rows * COLUMNS * 8)
        && !memcmp(a->results.numbers, b->results.numbers, rows * 8 * ROW_NUMBERS)
        && !memcmp(a->results.ranks, b->results.ranks, rows * 16)
        && !memcmp(&a->results.sum, &b->results.sum, sizeof(double));
}

static void release(Call *call)
{
    free(call->results.grad);
    free(call->results.numbers);
    free(call->results.ranks);
}

/* How many of two calls at once differ from one of a single thread. */
static int compare(const Batch *batch, int64_t kind)
{
    Call calls[3];
    pthread_t threads[2];
    for (int i = 0; i < 3; i++)
        calls[i] = (Call){.batch = batch, .kind = kind, .threads = i == 2 ? 1 : THREADS};
    for (int i = 0; i < 2; i++)
        if (pthread_create(&threads[i], NULL, run, &calls[i]))
            exit(2);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    run(&calls[2]);
    int differing = !same(&calls[0], &calls[2]) + !same(&calls[1], &calls[2]);
    if (differing)
        printf("kind %d, dtype %d, %d rows: %d of 2 calls differ\n", (int)kind, (int)batch->dtype,
               (int)batch->rows, differing);
    for (int i = 0; i < 3; i++)
        release(&calls[i]);
    return differing;
}

int main(void)
{
    const int64_t kinds[] = {STATISTICS, PARTS, GRADIENT, LOSS_AND_GRADIENT, 10 + BINARY_SUM,
                             10 + BINARY_LOSS, 10 + BINARY_GRADIENT, 10 + SCALE};
    int differing = 0, calls = 0;
    for (int64_t dtype = FLOAT32; dtype <= FLOAT16; dtype++)
        for (int64_t rows = 20; rows <= 40; rows += 20) { /* in segments, whole */
            Batch batch = new_batch(dtype, rows);
            for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++, calls++)
                differing += compare(&batch, kinds[i]);
            free(batch.x);
            free(batch.prob);
            free(batch.target);
            free(batch.row_numbers);
        }
    printf("%d calls of 8 threads, two at once: %d differ from one thread's\n", 2 * calls, differing);
    return differing != 0;
}
