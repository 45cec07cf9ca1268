/* A GPU that does nothing: a library that answers for libcuda, cudart, cuBLAS and NCCL like an H100 with its driver, so
   that PyTorch, Inductor and Triton work on a machine without one. Memory is host memory that nobody has touched, copies
   are made, kernels are counted and not run. Whatever a caller needs and the library lacks returns 0 (see build.py). */
#ifndef NULL_GPU_H
#define NULL_GPU_H
#include <stddef.h>

#define DEVICE_NAME "NVIDIA H100 80GB HBM3"
#define DEVICE_MEMORY 85029158912ULL /* bytes that an H100 SXM reports: 79.19 GiB */
#define DRIVER_VERSION 13000
#define SHARED_MEMORY_PER_BLOCK 49152
#define SHARED_MEMORY_OPTIN 232448
#define MULTIPROCESSORS 132
#define GRID_LIMIT_X 2147483647u
#define GRID_LIMIT_YZ 65535u

enum place { UNKNOWN_MEMORY, HOST_MEMORY, DEVICE_MEMORY_RANGE };

/* ledger.c: how often what happened, by name */
void ledger_add(const char *format, ...) __attribute__((format(printf, 1, 2)));
void nullgpu_reset(void);
int nullgpu_dump(const char *path);

/* memory.c */
void *memory_take(size_t size, enum place place);
void memory_give(void *address);
enum place memory_place(const void *address);
size_t memory_free_bytes(void);
void memory_copy(void *to, const void *from, size_t size);
void memory_set(void *to, int value, size_t size);

/* graphs.c */
int graph_recording(void);
void graph_add_node(void);

/* driver.c */
int device_attribute(int which);
int answer_nothing(void);
void *new_handle(void);
#endif
