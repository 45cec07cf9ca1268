/* Counts of launches, copies, products and descriptors by name. */
#include "null_gpu.h"
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS (1u << 16)
#define LONGEST_NAME 8192
#define REFUSED "refused:"
#define RECORDED "recorded:" /* before what happens while a graph is recorded */

static struct {
    char *name;
    long calls;
} counts[SLOTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t slot_of(const char *name) {
    uint64_t hash = 1469598103934665603ULL; /* FNV-1a */
    for (const char *letter = name; *letter; letter++)
        hash = (hash ^ (uint8_t)*letter) * 1099511628211ULL;
    size_t slot = hash % SLOTS;
    while (counts[slot].name && strcmp(counts[slot].name, name))
        slot = (slot + 1) % SLOTS;
    return slot;
}

void ledger_add(const char *format, ...) {
    char room[LONGEST_NAME] = RECORDED, *name = room + sizeof RECORDED - 1;
    va_list values;
    va_start(values, format);
    vsnprintf(name, sizeof room - sizeof RECORDED, format, values);
    va_end(values);
    if (graph_recording() && strncmp(name, REFUSED, sizeof REFUSED - 1)) {
        graph_add_node();
        name = room;
    }
    pthread_mutex_lock(&lock);
    size_t slot = slot_of(name);
    if (!counts[slot].name)
        counts[slot].name = strdup(name);
    counts[slot].calls++;
    pthread_mutex_unlock(&lock);
}

void nullgpu_reset(void) {
    pthread_mutex_lock(&lock);
    for (size_t slot = 0; slot < SLOTS; slot++)
        counts[slot].calls = 0;
    pthread_mutex_unlock(&lock);
}

/* Write a line "calls<TAB>name" for all that happened since the last reset; 0 if that worked. */
int nullgpu_dump(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file)
        return 1;
    pthread_mutex_lock(&lock);
    for (size_t slot = 0; slot < SLOTS; slot++)
        if (counts[slot].calls)
            fprintf(file, "%ld\t%s\n", counts[slot].calls, counts[slot].name);
    pthread_mutex_unlock(&lock);
    return fclose(file);
}
