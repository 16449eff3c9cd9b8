/* Threads for one call: none outlives it, so that nothing is left to a fork. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

#include "job.h"

enum { MOST_THREADS = 1024 };

typedef struct {
    const Job *job;
    Part *parts;
    Task task;
    int64_t count;
    _Atomic int64_t next;
} Queue;

static void *work(void *given)
{
    Queue *queue = given;
    int64_t index;
    while ((index = atomic_fetch_add(&queue->next, 1)) < queue->count)
        queue->task(queue->job, queue->parts, index);
    return NULL;
}

void run_tasks(const Job *job, Part *parts, Task task, int64_t count, int64_t threads)
{
    Queue queue = {.job = job, .parts = parts, .task = task, .count = count};
    pthread_t started[MOST_THREADS];
    sigset_t all, before;
    int64_t others = (threads < count ? threads : count) - 1;
    int64_t n = 0;
    others = others > MOST_THREADS ? MOST_THREADS : others;
    if (others > 0) { /* signals are for the threads that Python knows */
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        while (n < others && pthread_create(&started[n], NULL, work, &queue) == 0)
            n++; /* one that cannot start: the others do its share */
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    work(&queue);
    while (n > 0)
        pthread_join(started[--n], NULL);
}
