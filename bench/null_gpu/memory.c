/* Device and pinned memory: anonymous pages of the host, which cost nothing until they are written. */
#define _GNU_SOURCE
#include "null_gpu.h"
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define MOST_RANGES (1u << 17)
#define LARGEST_REAL_COPY (1u << 24) /* bytes between two device tensors; what no kernel wrote is not worth copying */
#define LARGEST_REAL_FILL (1u << 20)
#define PAGE 4096UL

static struct range {
    char *begin;
    size_t size;
    enum place place;
} ranges[MOST_RANGES];
static size_t used_bytes, ranges_end;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct range *range_of(const void *address) {
    const char *place = address;
    for (size_t i = 0; i < ranges_end; i++)
        if (ranges[i].begin && place >= ranges[i].begin && place < ranges[i].begin + ranges[i].size)
            return &ranges[i];
    return NULL;
}

static struct range *free_range(void) {
    for (size_t i = 0; i < MOST_RANGES; i++)
        if (!ranges[i].begin) {
            if (i >= ranges_end)
                ranges_end = i + 1;
            return &ranges[i];
        }
    return NULL;
}

/* Pages for `size` bytes; NULL if the device is full, as on a real one. */
void *memory_take(size_t size, enum place place) {
    void *pages = NULL;
    pthread_mutex_lock(&lock);
    if (size && (place == HOST_MEMORY || used_bytes + size <= DEVICE_MEMORY)) {
        struct range *range = free_range();
        if (range)
            pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (pages == MAP_FAILED)
            pages = NULL;
        if (pages) {
            *range = (struct range){pages, size, place};
            used_bytes += place == DEVICE_MEMORY_RANGE ? size : 0;
        }
    }
    pthread_mutex_unlock(&lock);
    return pages;
}

void memory_give(void *address) {
    pthread_mutex_lock(&lock);
    struct range *range = range_of(address);
    if (range) {
        munmap(range->begin, range->size);
        used_bytes -= range->place == DEVICE_MEMORY_RANGE ? range->size : 0;
        range->begin = NULL;
    }
    pthread_mutex_unlock(&lock);
}

enum place memory_place(const void *address) {
    pthread_mutex_lock(&lock);
    struct range *range = range_of(address);
    enum place place = range ? range->place : UNKNOWN_MEMORY;
    pthread_mutex_unlock(&lock);
    return place;
}

size_t memory_free_bytes(void) { return DEVICE_MEMORY - used_bytes; }

void memory_copy(void *to, const void *from, size_t size) {
    int into = memory_place(to) == DEVICE_MEMORY_RANGE;
    int out_of = memory_place(from) == DEVICE_MEMORY_RANGE;
    ledger_add("copy:%s-to-%s", out_of ? "device" : "host", into ? "device" : "host");
    if (into && out_of && size > LARGEST_REAL_COPY)
        return;
    memmove(to, from, size);
}

void memory_set(void *to, int value, size_t size) {
    ledger_add("memset");
    if (size <= LARGEST_REAL_FILL) {
        memset(to, value, size);
        return;
    }
    uintptr_t begin = ((uintptr_t)to + PAGE - 1) & ~(PAGE - 1);
    uintptr_t end = ((uintptr_t)to + size) & ~(PAGE - 1);
    if (value == 0) /* pages that are given back read as zero */
        madvise((void *)begin, end - begin, MADV_DONTNEED);
}
