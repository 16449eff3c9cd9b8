/* Threads for one call. A thread that starts too late finds nothing to do; the call does not wait for it. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "job.h"

enum { MOST_THREADS = 1024, STACK_BYTES = 1 << 20 };

typedef struct {
    const Job *job; /* gone once all tasks are done, as `parts` */
    Part *parts;
    Task task;
    int64_t count;
    _Atomic int64_t next, done, owners; /* the last owner frees the queue */
    pthread_mutex_t mutex;
    pthread_cond_t all_done;
} Queue;

/* Threads started that have not run yet: while the machine is so busy, no more are added to them. */
static _Atomic int64_t waiting;

static void forget_waiting(void) { atomic_store(&waiting, 0); }

__attribute__((constructor)) static void at_load(void)
{
    pthread_atfork(NULL, NULL, forget_waiting); /* a forked child has none of them */
}

static void take_tasks(Queue *queue)
{
    int64_t index;
    while ((index = atomic_fetch_add(&queue->next, 1)) < queue->count) {
        queue->task(queue->job, queue->parts, index);
        if (atomic_fetch_add(&queue->done, 1) + 1 == queue->count) {
            pthread_mutex_lock(&queue->mutex);
            pthread_cond_signal(&queue->all_done);
            pthread_mutex_unlock(&queue->mutex);
        }
    }
}

static void let_go(Queue *queue)
{
    if (atomic_fetch_sub(&queue->owners, 1) > 1)
        return;
    pthread_cond_destroy(&queue->all_done);
    pthread_mutex_destroy(&queue->mutex);
    free(queue);
}

static void *work(void *queue)
{
    atomic_fetch_sub(&waiting, 1);
    take_tasks(queue);
    let_go(queue);
    return NULL;
}

/* Signals are for the threads that Python knows. */
static void start_threads(Queue *queue, int64_t count)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;
    if (pthread_attr_init(&attributes) != 0)
        return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int64_t i = atomic_load(&waiting); i < count; i++) {
        atomic_fetch_add(&queue->owners, 1);
        atomic_fetch_add(&waiting, 1);
        if (pthread_create(&thread, &attributes, work, queue) != 0) {
            atomic_fetch_sub(&queue->owners, 1); /* the others do its share */
            atomic_fetch_sub(&waiting, 1);
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

void run_tasks(const Job *job, Part *parts, Task task, int64_t count, int64_t threads)
{
    int64_t others = (threads < count ? threads : count) - 1;
    Queue *queue = others > 0 ? malloc(sizeof *queue) : NULL;
    if (!queue) {
        for (int64_t i = 0; i < count; i++)
            task(job, parts, i);
        return;
    }
    *queue = (Queue){.job = job, .parts = parts, .task = task, .count = count, .owners = 1};
    pthread_mutex_init(&queue->mutex, NULL);
    pthread_cond_init(&queue->all_done, NULL);
    start_threads(queue, others < MOST_THREADS ? others : MOST_THREADS);
    take_tasks(queue);
    pthread_mutex_lock(&queue->mutex);
    while (atomic_load(&queue->done) < count)
        pthread_cond_wait(&queue->all_done, &queue->mutex);
    pthread_mutex_unlock(&queue->mutex);
    let_go(queue);
}
