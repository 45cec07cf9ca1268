/* cuBLAS and cuBLASLt: every product by its shape. All handles are opaque and all enumerations are ints, so that no
   header of the toolkit is needed. */
#include "null_gpu.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { CUBLAS_VERSION = 130100, TRANSPOSE_A = 3, TRANSPOSE_B = 4, BATCH_COUNT = 5, HEURISTIC_BYTES = 96 };

struct layout {
    long rows, columns, leading;
    int type, batch;
};
struct description {
    int transpose_a, transpose_b;
};

static void product(int transpose_a, int transpose_b, long m, long n, long k, int type, long batch) {
    char a = transpose_a ? 'T' : 'N';
    char b = transpose_b ? 'T' : 'N';
    ledger_add("gemm:%c%c m=%ld n=%ld k=%ld batch=%ld type=%d", a, b, m, n, k, batch, type);
}

/* --- cuBLAS --- */
int cublasCreate_v2(void **handle) {
    *handle = new_handle();
    return 0;
}

int cublasGetMathMode(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

int cublasGemmEx(void *handle, int transpose_a, int transpose_b, int m, int n, int k, const void *alpha, const void *a,
                 int type_a, int leading_a, const void *b, int type_b, int leading_b, const void *beta, void *c,
                 int type_c, int leading_c, int compute, int algorithm) {
    product(transpose_a, transpose_b, m, n, k, type_a, 1);
    return 0;
}

int cublasGemmStridedBatchedEx(void *handle, int transpose_a, int transpose_b, int m, int n, int k, const void *alpha,
                               const void *a, int type_a, int leading_a, long long stride_a, const void *b, int type_b,
                               int leading_b, long long stride_b, const void *beta, void *c, int type_c, int leading_c,
                               long long stride_c, int batch, int compute, int algorithm) {
    product(transpose_a, transpose_b, m, n, k, type_a, batch);
    return 0;
}

int cublasSgemm_v2(void *handle, int transpose_a, int transpose_b, int m, int n, int k, const float *alpha,
                   const float *a, int leading_a, const float *b, int leading_b, const float *beta, float *c,
                   int leading_c) {
    product(transpose_a, transpose_b, m, n, k, 0, 1);
    return 0;
}

/* --- cuBLASLt --- */
size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }

int cublasLtMatmulDescCreate(void **description, int compute, int scale) {
    *description = new_handle();
    return 0;
}

int cublasLtMatmulDescSetAttribute(void *handle, int which, const void *value, size_t size) {
    struct description *description = handle;
    if (which == TRANSPOSE_A)
        description->transpose_a = *(const int *)value;
    if (which == TRANSPOSE_B)
        description->transpose_b = *(const int *)value;
    return 0;
}

int cublasLtMatmulDescDestroy(void *description) {
    free(description);
    return 0;
}

int cublasLtMatmulPreferenceCreate(void **preference) {
    *preference = new_handle();
    return 0;
}

int cublasLtMatmulPreferenceDestroy(void *preference) {
    free(preference);
    return 0;
}

int cublasLtMatrixLayoutCreate(void **handle, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    struct layout *layout = new_handle();
    *layout = (struct layout){rows, columns, leading, type, 1};
    *handle = layout;
    return 0;
}

int cublasLtMatrixLayoutDestroy(void *layout) {
    free(layout);
    return 0;
}

int cublasLtMatrixLayoutSetAttribute(void *handle, int which, const void *value, size_t size) {
    struct layout *layout = handle;
    if (which == BATCH_COUNT)
        layout->batch = *(const int *)value;
    return 0;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
    memset(results, 0, HEURISTIC_BYTES);
    *found = 1;
    return 0;
}

int cublasLtMatmul(void *handle, void *description_handle, const void *alpha, const void *a, void *a_layout,
                   const void *b, void *b_layout, const void *beta, const void *c, void *c_layout, void *d,
                   void *d_layout, const void *algorithm, void *workspace, size_t workspace_size, void *stream) {
    struct description *description = description_handle;
    struct layout *left = a_layout;
    struct layout *out = d_layout;
    long depth = description->transpose_a ? left->rows : left->columns;
    product(description->transpose_a, description->transpose_b, out->rows, out->columns, depth, left->type, out->batch);
    return 0;
}
