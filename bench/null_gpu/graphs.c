/* CUDA graphs: between the begin and the end of a recording, launches are counted as recorded, and whoever would wait
   for the recorded stream or for the device is refused, as by a real driver. One stream at a time is recorded. */
#include "null_gpu.h"
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stddef.h>

static struct {
    cudaStream_t stream;
    cudaGraph_t graph;
    unsigned long long id;
    size_t nodes; /* launches since the begin; of the last recording after its end */
} recording;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

int graph_recording(void) { return recording.graph != NULL; }

void graph_add_node(void) {
    pthread_mutex_lock(&lock);
    recording.nodes++;
    pthread_mutex_unlock(&lock);
}

static int records(cudaStream_t stream) { return graph_recording() && stream == recording.stream; }

/* --- recording --- */
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if (graph_recording()) {
        ledger_add("refused:a second recording");
        return cudaErrorStreamCaptureUnsupported;
    }
    recording.stream = stream;
    recording.nodes = 0;
    recording.id++;
    recording.graph = new_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (!records(stream))
        return cudaErrorIllegalState;
    *graph = recording.graph;
    recording.graph = NULL;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = records(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    cudaStreamIsCapturing(stream, status);
    if (id)
        *id = records(stream) ? recording.id : 0;
    if (graph)
        *graph = recording.graph;
    if (count)
        *count = 0;
    return cudaSuccess;
}

/* --- what a recording forbids --- */
static cudaError_t waiting(int refused, const char *what) {
    if (!refused)
        return cudaSuccess;
    ledger_add("refused:%s while a graph is recorded", what);
    return cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waiting(records(stream), "waiting for the stream"); }

cudaError_t cudaDeviceSynchronize(void) { return waiting(graph_recording(), "waiting for the device"); }

cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waiting(graph_recording(), "waiting for an event"); }

/* --- graphs --- */
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = recording.nodes;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = new_handle();
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    ledger_add("graph");
    return cudaSuccess;
}
