/* libcuda: the device, modules as cubin images, launches and TMA descriptors that are checked like the real ones. */
#define _GNU_SOURCE
#include "null_gpu.h"
#include <cuda.h>
#include <dlfcn.h>
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CONTEXT ((CUcontext)0x1000)
#define SECTION_NAME_ROOM 4096

struct module {
    const char *image;
};
struct function {
    char *name;
    int registers;
};

void *new_handle(void) { return calloc(1, 64); }

int answer_nothing(void) { return 0; }

static const int attributes[][2] = {
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, GRID_LIMIT_X},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, GRID_LIMIT_YZ},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, GRID_LIMIT_YZ},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, SHARED_MEMORY_PER_BLOCK},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, SHARED_MEMORY_OPTIN},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
    {CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, MULTIPROCESSORS},
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 32},
    {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 52428800},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
    {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
    {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 2619000},
    {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 5120},
    {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
    {CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, 1},
    {CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1},
    {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
    {CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT, 512},
    {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3},
};

int device_attribute(int which) {
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        if (attributes[i][0] == which)
            return attributes[i][1];
    return 0;
}

/* --- device and context --- */
CUresult cuDriverGetVersion(int *version) {
    *version = DRIVER_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    snprintf(name, length, DEVICE_NAME);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    *value = device_attribute(which);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = CONTEXT;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = CONTEXT;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 1 << 20;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error ? "refused by the null GPU" : "no error";
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
    if (memory_place((void *)address) != DEVICE_MEMORY_RANGE)
        return CUDA_ERROR_INVALID_VALUE;
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)value = address;
    else if (which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        *(unsigned *)value = CU_MEMORYTYPE_DEVICE;
    else
        *(int *)value = 0;
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress_v2(const char *name, void **found, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
    *found = dlsym(RTLD_DEFAULT, name);
    if (!*found)
        *found = (void *)answer_nothing;
    if (status)
        *status = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}

/* --- modules --- */
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    struct module *made = new_handle();
    made->image = image;
    *module = (CUmodule)made;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}

CUresult cuModuleLoad(CUmodule *module, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file)
        return CUDA_ERROR_FILE_NOT_FOUND;
    fseek(file, 0, SEEK_END);
    size_t size = ftell(file);
    rewind(file);
    char *image = malloc(size);
    size_t got = fread(image, 1, size, file);
    fclose(file);
    return got == size ? cuModuleLoadData(module, image) : CUDA_ERROR_INVALID_IMAGE;
}

/* A kernel is a section .text.NAME of the cubin; the high byte of its info field holds the number of registers. */
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    const char *image = ((struct module *)module)->image;
    const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
    if (memcmp(header->e_ident, ELFMAG, SELFMAG))
        return CUDA_ERROR_INVALID_IMAGE;
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
    const char *names = image + sections[header->e_shstrndx].sh_offset;
    char wanted[SECTION_NAME_ROOM];
    snprintf(wanted, sizeof wanted, ".text.%s", name);
    for (int i = 0; i < header->e_shnum; i++) {
        if (strcmp(names + sections[i].sh_name, wanted))
            continue;
        struct function *made = new_handle();
        made->name = strdup(name);
        made->registers = sections[i].sh_info >> 24;
        *function = (CUfunction)made;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    *value = 0;
    if (which == CU_FUNC_ATTRIBUTE_NUM_REGS)
        *value = ((struct function *)function)->registers;
    else if (which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)
        *value = 1024;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    int excessive = which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > SHARED_MEMORY_OPTIN;
    return excessive ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    *count = 16;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int block, size_t shared) {
    *count = 2;
    return CUDA_SUCCESS;
}

/* --- launches --- */
static CUresult launch(CUfunction handle, unsigned x, unsigned y, unsigned z, unsigned shared) {
    const char *name = ((struct function *)handle)->name;
    int fits = x && y && z && x <= GRID_LIMIT_X && y <= GRID_LIMIT_YZ && z <= GRID_LIMIT_YZ;
    if (!fits || shared > SHARED_MEMORY_OPTIN) {
        ledger_add("refused:launch of %s, grid %u %u %u, %u bytes shared", name, x, y, z, shared);
        return CUDA_ERROR_INVALID_VALUE;
    }
    ledger_add("triton:%s", name);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream stream, void **arguments, void **extra) {
    return launch(function, x, y, z, shared);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    return launch(function, config->gridDimX, config->gridDimY, config->gridDimZ, config->sharedMemBytes);
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x,
                                   unsigned block_y, unsigned block_z, unsigned shared, CUstream stream,
                                   void **arguments) {
    return launch(function, x, y, z, shared);
}

/* --- TMA descriptors --- */
static int element_bytes(CUtensorMapDataType type) {
    static const int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    return bytes[type];
}

static int widest_inner_box(CUtensorMapSwizzle swizzle) {
    static const int bytes[] = {1 << 20, 32, 64, 128, 128, 128, 128};
    return bytes[swizzle];
}

/* The rules that the documentation of cuTensorMapEncodeTiled names; a violation is refused and noted. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    char shape[512] = "";
    int length = 0;
    int inner = box[0] * element_bytes(type);
    int wrong = rank < 1 || rank > 5 || (uintptr_t)base % 16 || memory_place(base) != DEVICE_MEMORY_RANGE;
    wrong |= inner % 16 || inner > widest_inner_box(swizzle);
    for (unsigned i = 0; i < rank; i++) {
        wrong |= sizes[i] < 1 || sizes[i] > 1ULL << 32 || box[i] < 1 || box[i] > 256 || steps[i] < 1 || steps[i] > 8;
        if (i + 1 < rank)
            wrong |= strides[i] % 16 || strides[i] >= 1ULL << 40;
        length += snprintf(shape + length, sizeof shape - length, " %lu/%u", (unsigned long)sizes[i], box[i]);
    }
    ledger_add("%s:descriptor of type %d, swizzle %d, size/box%s", wrong ? "refused" : "descriptor", type, swizzle, shape);
    return wrong ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
