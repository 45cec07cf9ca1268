/* NCCL for processes of one machine: every collective is a meeting of all ranks in the folder NULL_GPU_RANKS. They must
   come with the same operation, count and type, or the call is refused, where the real library would hang or mix the
   data. Only broadcasts carry data: PyTorch sends objects with them. Reductions leave the values as they are, since no
   kernel computed them. All handles are opaque and all enumerations are ints, so that no header is needed. */
#define _GNU_SOURCE
#include "null_gpu.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

enum { SUCCESS, UNHANDLED_ERROR, SYSTEM_ERROR, INTERNAL_ERROR, INVALID_ARGUMENT, INVALID_USAGE };
enum { NCCL_VERSION = 23007, PATIENCE_MILLISECONDS = 300000, LINE_ROOM = 256, PATH_ROOM = 4096 };

typedef struct {
    char bytes[128];
} unique_id;

struct communicator {
    uint64_t id;
    int rank, ranks;
    long meetings;
};

static size_t type_bytes(int type) {
    static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return bytes[type];
}

static void meeting_path(char *path, const struct communicator *group, int rank) {
    const char *folder = getenv("NULL_GPU_RANKS");
    snprintf(path, PATH_ROOM, "%s/%016lx.%ld.%d", folder ? folder : "/tmp", group->id, group->meetings, rank);
}

/* Leave a line and perhaps data for the other ranks; the file appears whole or not at all. */
static int arrive(const struct communicator *group, const char *line, const void *data, size_t size) {
    char path[PATH_ROOM], temporary[PATH_ROOM + 8];
    meeting_path(path, group, group->rank);
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    FILE *file = fopen(temporary, "wb");
    if (!file)
        return SYSTEM_ERROR;
    fprintf(file, "%s\n", line);
    size_t written = fwrite(data, 1, size, file);
    int failed = fclose(file) || written != size || rename(temporary, path);
    return failed ? SYSTEM_ERROR : SUCCESS;
}

static FILE *wait_for(const struct communicator *group, int rank) {
    char path[PATH_ROOM];
    meeting_path(path, group, rank);
    for (int waited = 0; waited < PATIENCE_MILLISECONDS; waited++) {
        FILE *file = fopen(path, "rb");
        if (file)
            return file;
        usleep(1000);
    }
    return NULL;
}

/* All ranks meet with the same `line`; `data` goes from `source` to the others unless `source` is negative. */
static int meet(struct communicator *group, const char *line, int source, void *data, size_t size) {
    int sends = source == group->rank;
    int status = arrive(group, line, data, sends ? size : 0);
    ledger_add("nccl:%s", line);
    for (int rank = 0; rank < group->ranks && status == SUCCESS; rank++) {
        char theirs[LINE_ROOM] = "";
        FILE *file = wait_for(group, rank);
        if (!file || !fgets(theirs, sizeof theirs, file)) {
            ledger_add("refused:rank %d waited for rank %d in meeting %ld: %s", group->rank, rank, group->meetings, line);
            status = SYSTEM_ERROR;
        } else {
            theirs[strcspn(theirs, "\n")] = 0;
            if (strcmp(theirs, line)) {
                ledger_add("refused:meeting %ld: rank %d has %s, rank %d has %s", group->meetings, group->rank, line, rank,
                           theirs);
                fprintf(stderr, "null GPU: collective %ld: rank %d has %s, rank %d has %s\n", group->meetings, group->rank,
                        line, rank, theirs);
                status = INVALID_USAGE;
            } else if (rank == source && !sends && fread(data, 1, size, file) != size) {
                status = SYSTEM_ERROR;
            }
        }
        if (file)
            fclose(file);
    }
    group->meetings++;
    return status;
}

static int collective(struct communicator *group, const char *what, size_t count, int type, int detail, int source,
                      void *data) {
    char line[LINE_ROOM];
    snprintf(line, sizeof line, "%s of %zu, type %d, %d", what, count, type, detail);
    return meet(group, line, source, data, count * type_bytes(type));
}

/* --- communicators --- */
int ncclGetVersion(int *version) {
    *version = NCCL_VERSION;
    return SUCCESS;
}

const char *ncclGetErrorString(int error) { return error ? "refused by the null GPU" : "no error"; }

const char *ncclGetLastError(void *group) { return "see the lines of the null GPU"; }

int ncclGetUniqueId(unique_id *id) {
    memset(id, 0, sizeof *id);
    return getrandom(id->bytes, sizeof(uint64_t), 0) == sizeof(uint64_t) ? SUCCESS : SYSTEM_ERROR;
}

int ncclCommInitRank(struct communicator **group, int ranks, unique_id id, int rank) {
    struct communicator *made = calloc(1, sizeof *made);
    memcpy(&made->id, id.bytes, sizeof made->id);
    made->rank = rank;
    made->ranks = ranks;
    *group = made;
    return SUCCESS;
}

int ncclCommInitRankConfig(struct communicator **group, int ranks, unique_id id, int rank, void *config) {
    return ncclCommInitRank(group, ranks, id, rank);
}

int ncclCommInitRankScalable(struct communicator **group, int ranks, int rank, int ids, unique_id *id, void *config) {
    return ncclCommInitRank(group, ranks, *id, rank);
}

int ncclCommCount(const struct communicator *group, int *count) {
    *count = group->ranks;
    return SUCCESS;
}

int ncclCommUserRank(const struct communicator *group, int *rank) {
    *rank = group->rank;
    return SUCCESS;
}

int ncclCommGetAsyncError(struct communicator *group, int *error) {
    *error = SUCCESS;
    return SUCCESS;
}

/* --- collectives --- */
int ncclAllReduce(const void *from, void *to, size_t count, int type, int reduction, struct communicator *group,
                  void *stream) {
    return collective(group, "all-reduce", count, type, reduction, -1, to);
}

int ncclReduce(const void *from, void *to, size_t count, int type, int reduction, int root, struct communicator *group,
               void *stream) {
    return collective(group, "reduce", count, type, reduction, -1, to);
}

int ncclReduceScatter(const void *from, void *to, size_t count, int type, int reduction, struct communicator *group,
                      void *stream) {
    return collective(group, "reduce-scatter", count, type, reduction, -1, to);
}

int ncclAllGather(const void *from, void *to, size_t count, int type, struct communicator *group, void *stream) {
    return collective(group, "all-gather", count, type, 0, -1, to);
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, struct communicator *group,
                  void *stream) {
    void *data = group->rank == root ? (void *)from : to;
    return collective(group, "broadcast", count, type, root, root, data);
}

int ncclBcast(void *data, size_t count, int type, int root, struct communicator *group, void *stream) {
    return ncclBroadcast(data, data, count, type, root, group, stream);
}
