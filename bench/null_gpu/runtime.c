/* cudart: the device, memory, events, streams, and the kernels of PyTorch itself by the name they register. */
#define _GNU_SOURCE
#include "null_gpu.h"
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EVENT_MILLISECONDS 0.01f /* between any two events: all choices of an autotuner are equal */

/* --- device --- */
cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = DRIVER_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = DRIVER_VERSION;
    return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error) { return error ? "refused" : "cudaSuccess"; }

const char *cudaGetErrorString(cudaError_t error) { return error ? "refused by the null GPU" : "no error"; }

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = device_attribute(which); /* the runtime numbers attributes like the driver */
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    *properties = (struct cudaDeviceProp){
        .name = DEVICE_NAME,
        .totalGlobalMem = DEVICE_MEMORY,
        .sharedMemPerBlock = SHARED_MEMORY_PER_BLOCK,
        .regsPerBlock = 65536,
        .warpSize = 32,
        .memPitch = 2147483647,
        .maxThreadsPerBlock = 1024,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {GRID_LIMIT_X, GRID_LIMIT_YZ, GRID_LIMIT_YZ},
        .totalConstMem = 65536,
        .major = 9,
        .textureAlignment = 512,
        .multiProcessorCount = MULTIPROCESSORS,
        .canMapHostMemory = 1,
        .concurrentKernels = 1,
        .unifiedAddressing = 1,
        .memoryBusWidth = 5120,
        .l2CacheSize = 52428800,
        .persistingL2CacheMaxSize = 32505856,
        .maxThreadsPerMultiProcessor = 2048,
        .streamPrioritiesSupported = 1,
        .globalL1CacheSupported = 1,
        .sharedMemPerMultiprocessor = 233472,
        .regsPerMultiprocessor = 65536,
        .sharedMemPerBlockOptin = SHARED_MEMORY_OPTIN,
        .maxBlocksPerMultiProcessor = 32,
        .reservedSharedMemPerBlock = 1024,
        .cooperativeLaunch = 1,
    };
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *possible, int device, int peer) {
    *possible = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:00:00.0");
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
    *found = dlsym(RTLD_DEFAULT, name);
    if (!*found)
        *found = (void *)answer_nothing;
    if (status)
        *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* --- memory --- */
cudaError_t cudaMalloc(void **memory, size_t size) {
    *memory = memory_take(size, DEVICE_MEMORY_RANGE);
    return *memory || !size ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaMallocAsync(void **memory, size_t size, cudaStream_t stream) { return cudaMalloc(memory, size); }

cudaError_t cudaFree(void *memory) {
    memory_give(memory);
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream) { return cudaFree(memory); }

cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) {
    *memory = memory_take(size, HOST_MEMORY);
    return *memory || !size ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *memory) { return cudaFree(memory); }

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *available = memory_free_bytes();
    *total = DEVICE_MEMORY;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    memory_copy(to, from, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return cudaMemcpy(to, from, size, kind);
}

cudaError_t cudaMemset(void *to, int value, size_t size) {
    memory_set(to, value, size);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) { return cudaMemset(to, value, size); }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
    memset(attributes, 0, sizeof *attributes);
    attributes->type = types[memory_place(address)];
    attributes->devicePointer = (void *)address;
    attributes->hostPointer = (void *)address;
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char memory[1 << 16];
    *address = memory;
    return cudaSuccess;
}

/* --- events and streams: everything has happened as soon as it is asked for --- */
cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = new_handle();
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = EVENT_MILLISECONDS;
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = new_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreate(stream); }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return cudaStreamCreate(stream);
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    function(data);
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned flags) {
    callback(stream, cudaSuccess, data);
    return cudaSuccess;
}

/* --- PyTorch's own kernels --- */
struct registered {
    const void *host;
    const char *name;
};
static struct registered *kernels;
static size_t kernels_room, kernels_end, kernels_sorted;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed;

void **__cudaRegisterFatBinary(void *binary) { return new_handle(); }

void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *thread,
                            void *block, void *block_size, void *grid_size, int *shared) {
    if (kernels_end == kernels_room) {
        kernels_room = kernels_room ? 2 * kernels_room : 65536;
        kernels = realloc(kernels, kernels_room * sizeof *kernels);
    }
    kernels[kernels_end++] = (struct registered){host, name};
}

static int by_host(const void *one, const void *other) {
    const char *a = ((const struct registered *)one)->host;
    const char *b = ((const struct registered *)other)->host;
    return (a > b) - (a < b);
}

static cudaError_t launch(const void *function) {
    struct registered key = {function, NULL};
    pthread_mutex_lock(&lock);
    if (kernels_sorted != kernels_end) {
        qsort(kernels, kernels_end, sizeof *kernels, by_host);
        kernels_sorted = kernels_end;
    }
    struct registered *found = bsearch(&key, kernels, kernels_end, sizeof *kernels, by_host);
    pthread_mutex_unlock(&lock);
    ledger_add("aten:%s", found ? found->name : "unknown");
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(void **kernel, const void *function) {
    *kernel = (void *)function;
    return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return launch(function);
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    return launch(function);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return launch(function);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = 90;
    attributes->binaryVersion = 90;
    attributes->maxDynamicSharedSizeBytes = SHARED_MEMORY_PER_BLOCK;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function, int block,
                                                                   size_t shared, unsigned flags) {
    *count = 2;
    return cudaSuccess;
}
