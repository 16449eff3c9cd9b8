/* Threads that live for one call. A thread that starts late finds no task left, and the call does not
   wait for it. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "job.h"

enum { MOST_THREADS = 1024, STACK_BYTES = 1 << 20 };

typedef struct {
    const Job *job; /* like `parts` valid only until all tasks are done */
    Part *parts;
    Task task;
    int64_t count;
    _Atomic int64_t next, done, owners; /* the last owner frees the queue */
    pthread_mutex_t mutex;
    pthread_cond_t all_done;
} Queue;

/* Number of threads that were created but do not run yet. On a busy machine it limits new ones. */
static _Atomic int64_t num_starting;

static void forget_starting(void) { atomic_store(&num_starting, 0); }

__attribute__((constructor)) static void register_fork_handler(void)
{
    pthread_atfork(NULL, NULL, forget_starting); /* a forked child has no threads */
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

static void release_queue(Queue *queue)
{
    if (atomic_fetch_sub(&queue->owners, 1) > 1)
        return;
    pthread_cond_destroy(&queue->all_done);
    pthread_mutex_destroy(&queue->mutex);
    free(queue);
}

static void *run_worker(void *queue)
{
    atomic_fetch_sub(&num_starting, 1);
    take_tasks(queue);
    release_queue(queue);
    return NULL;
}

/* Start threads with all signals blocked, so that Python's own threads receive them. */
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
    for (int64_t i = atomic_load(&num_starting); i < count; i++) {
        atomic_fetch_add(&queue->owners, 1);
        atomic_fetch_add(&num_starting, 1);
        if (pthread_create(&thread, &attributes, run_worker, queue) != 0) {
            atomic_fetch_sub(&queue->owners, 1); /* the other threads do its tasks */
            atomic_fetch_sub(&num_starting, 1);
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

void run_tasks(const Job *job, Part *parts, Task task, int64_t count, int64_t threads)
{
    int64_t num_helpers = (threads < count ? threads : count) - 1;
    Queue *queue = num_helpers > 0 ? malloc(sizeof *queue) : NULL;
    if (!queue) {
        for (int64_t i = 0; i < count; i++)
            task(job, parts, i);
        return;
    }
    *queue = (Queue){.job = job, .parts = parts, .task = task, .count = count, .owners = 1};
    pthread_mutex_init(&queue->mutex, NULL);
    pthread_cond_init(&queue->all_done, NULL);
    start_threads(queue, num_helpers < MOST_THREADS ? num_helpers : MOST_THREADS);
    take_tasks(queue);
    pthread_mutex_lock(&queue->mutex);
    while (atomic_load(&queue->done) < count)
        pthread_cond_wait(&queue->all_done, &queue->mutex);
    pthread_mutex_unlock(&queue->mutex);
    release_queue(queue);
}
