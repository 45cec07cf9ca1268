// Two Hopper (sm_90a) GEMMs whose epilogues do the elementwise half of a LeakyReLU(1/2)^2 MLP, behind a C ABI.
//
//   backward   out = (a b) * aux           a (m, k), b (k, n), aux and out (m, n)
//   forward    z = a b^T                   a (m, k), b (n, k)
//              act = leaky(z)^2, slope = d act / d z = 2 leaky(z) leaky'(z)        both (m, n)
//
// All matrices are row-major bfloat16 and packed. Products are accumulated and epilogues computed in fp32; every output
// is rounded once, to nearest. Mainloop: wgmma fed by TMA, one producer and two cooperating consumer warpgroups, a
// persistent grid. The epilogues are CUTLASS visitor trees; their operands travel by TMA too.

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include <cuda_runtime.h>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/functional.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

namespace {

namespace collective = cutlass::epilogue::collective;
namespace fusion = cutlass::epilogue::fusion;
using cute::_1, cute::_64, cute::_128, cute::_256;

using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using Tile = cute::Shape<_128, _256, _64>;
using Cluster = cute::Shape<_1, _1, _1>;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
using EpilogueTile = collective::EpilogueTileAuto;

constexpr int kAlignment = 8;  // elements in the 16 bytes that TMA wants of row starts and row lengths
constexpr int kSharedBytesOfHopper = 232448;  // of one block
constexpr auto kNearest = cutlass::FloatRoundStyle::round_to_nearest;

// 2 leaky(z) leaky'(z): 2 z above zero, z / 2 below. Scaling by powers of two is exact, so the rounded slope is the
// slope of the rounded z.
template <class T>
struct Slope {
  CUTLASS_HOST_DEVICE T operator()(T z) const { return z > T(0) ? T(2) * z : T(0.5f) * z; }
};

// leaky(z)^2 = slope z / 2: no second comparison.
template <class T>
struct HalfProduct {
  CUTLASS_HOST_DEVICE T operator()(T slope, T z) const { return T(0.5f) * slope * z; }
};

template <class T, int N>
struct Slope<cutlass::Array<T, N>> {
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(cutlass::Array<T, N> const& z) const {
    cutlass::Array<T, N> result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) result[i] = Slope<T>{}(z[i]);
    return result;
  }
};

template <class T, int N>
struct HalfProduct<cutlass::Array<T, N>> {
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(cutlass::Array<T, N> const& slope,
                                                      cutlass::Array<T, N> const& z) const {
    cutlass::Array<T, N> result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) result[i] = HalfProduct<T>{}(slope[i], z[i]);
    return result;
  }
};

// A source operand (C) is never read. The backward epilogue declares one all the same: its load pipeline, which brings
// aux, then has the depth and the reuse of shared memory that CUTLASS gives to an epilogue with loads. The forward
// epilogue loads nothing, and without a source a fourth mainloop stage fits.
template <class Source>
using Descriptor = collective::detail::EpilogueDescriptor<Tile, EpilogueTile, Source, Element, EpilogueSchedule>;

using BackwardSource = Element;
using BackwardAux = collective::detail::AuxLoadDescriptor<Descriptor<BackwardSource>, RowMajor, Element>;
using BackwardTree = fusion::Sm90EVT<
    fusion::Sm90Compute<cutlass::multiplies, Element, float, kNearest>,
    fusion::Sm90AccFetch,
    fusion::Sm90AuxLoad<BackwardAux::Stages, BackwardAux::EpilogueTile, Element, BackwardAux::Stride,
                        BackwardAux::SmemLayoutAtom, BackwardAux::CopyOpS2R, kAlignment, false>>;

using ForwardSource = void;
using ForwardAux = collective::detail::AuxStoreDescriptor<Descriptor<ForwardSource>, RowMajor, Element>;
using StoredSlope = fusion::Sm90EVT<
    fusion::Sm90AuxStore<ForwardAux::Stages, ForwardAux::EpilogueTile, Element, kNearest, ForwardAux::Stride,
                         ForwardAux::SmemLayoutAtom, ForwardAux::CopyOpR2S, kAlignment, false>,
    fusion::Sm90EVT<fusion::Sm90Compute<Slope, float, float, kNearest>, fusion::Sm90AccFetch>>;
using ForwardTree = fusion::Sm90EVT<fusion::Sm90Compute<HalfProduct, Element, float, kNearest>, StoredSlope,
                                    fusion::Sm90AccFetch>;

template <class LayoutB, class Source, class Tree>
struct Fused {
  using Epilogue = typename collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, EpilogueTile, float, float, Source, RowMajor,
      kAlignment, Element, RowMajor, kAlignment, EpilogueSchedule, Tree>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element, LayoutB, kAlignment,
      float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Arguments = typename Gemm::Arguments;
  static constexpr int kStages = Mainloop::DispatchPolicy::Stages;
  static_assert(Kernel::SharedStorageSize <= kSharedBytesOfHopper);

  template <class Shape, class Thread>
  static Arguments arguments(Shape shape, void const* a, void const* b, Thread const& thread, void* out) {
    auto [m, n, k, batch] = shape;
    auto stride_a = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, cute::make_shape(m, k, batch));
    auto stride_b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, cute::make_shape(n, k, batch));
    auto stride_d = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, cute::make_shape(m, n, batch));
    Arguments result{cutlass::gemm::GemmUniversalMode::kGemm, shape,
                     {static_cast<Element const*>(a), stride_a, static_cast<Element const*>(b), stride_b},
                     {thread, nullptr, stride_d, static_cast<Element*>(out), stride_d}};
    // A TMA descriptor is made of a declared source even though nothing is read through it: it needs a valid address.
    if constexpr (!std::is_void_v<Source>) result.epilogue.ptr_C = static_cast<Element const*>(out);
    return result;
  }

  static cutlass::Status launch(Arguments const& arguments, void* workspace, int64_t workspace_bytes,
                                cudaStream_t stream) {
    Gemm gemm;
    if (auto status = Gemm::can_implement(arguments); status != cutlass::Status::kSuccess) return status;
    if (workspace_bytes < int64_t(Gemm::get_workspace_size(arguments))) return cutlass::Status::kErrorWorkspaceNull;
    return gemm.run(arguments, workspace, stream);
  }
};

using Backward = Fused<RowMajor, BackwardSource, BackwardTree>;
using Forward = Fused<ColumnMajor, ForwardSource, ForwardTree>;
using Size = cute::Shape<int, int, int, int>;

constexpr int kBackward = 0, kForward = 1;
constexpr int kCudaErrors = 1000;  // status of a CUDA call: this much above its cudaError_t; below: a cutlass::Status

auto packed(Size shape) {
  return cutlass::make_cute_packed_stride(BackwardAux::Stride{},
                                          cute::make_shape(cute::get<0>(shape), cute::get<1>(shape), 1));
}

Backward::Arguments backward(Size shape, void const* a, void const* b, void const* aux, void* out) {
  using Thread = decltype(Backward::Arguments{}.epilogue.thread);
  // in the order of the tree: accumulator, aux, product
  Thread thread{{}, {static_cast<Element const*>(aux), Element(0), packed(shape)}, {}};
  return Backward::arguments(shape, a, b, thread, out);
}

Forward::Arguments forward(Size shape, void const* a, void const* b, void* act, void* slope) {
  using Thread = decltype(Forward::Arguments{}.epilogue.thread);
  // in the order of the tree: ((accumulator, slope), its store), accumulator, half product
  Thread thread{{{{}, {}}, {static_cast<Element*>(slope), packed(shape)}}, {}, {}};
  return Forward::arguments(shape, a, b, thread, act);
}

// What TMA and 32-bit extents ask of sizes and addresses; CUTLASS itself does not look at the addresses.
cutlass::Status check(int64_t m, int64_t n, int64_t k, std::initializer_list<void const*> pointers) {
  for (int64_t extent : {m, n, k}) {
    if (extent <= 0 || extent > INT32_MAX) return cutlass::Status::kErrorInvalidProblem;
  }
  if (n % kAlignment != 0 || k % kAlignment != 0) return cutlass::Status::kErrorMisalignedOperand;
  for (void const* pointer : pointers) {
    if (!pointer || reinterpret_cast<uintptr_t>(pointer) % 16) return cutlass::Status::kErrorMisalignedOperand;
  }
  return cutlass::Status::kSuccess;
}

// The persistent grid is as large as the GPU. CUDA's runtime is linked into this library, so it is told the device.
template <class Kind>
int run_on(int device, typename Kind::Arguments arguments, void* workspace, int64_t workspace_bytes, void* stream) {
  if (auto error = cudaSetDevice(device); error != cudaSuccess) return kCudaErrors + int(error);
  int processors = 0;
  if (auto error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device); error != cudaSuccess) {
    return kCudaErrors + int(error);
  }
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = processors;
  return int(Kind::launch(arguments, workspace, workspace_bytes, static_cast<cudaStream_t>(stream)));
}

Size size(int64_t m, int64_t n, int64_t k) { return {int(m), int(n), int(k), 1}; }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// out (m, n) = (a (m, k) b (k, n)) * aux (m, n). Returns 0 or a status for cutlass_evt_error_text; the work is queued
// on `stream` of `device`, which becomes the calling thread's device.
EXPORT int cutlass_evt_gemm_mul(int device, void const* a, void const* b, void const* aux, void* out, int64_t m,
                                int64_t n, int64_t k, void* workspace, int64_t workspace_bytes, void* stream) {
  if (auto status = check(m, n, k, {a, b, aux, out}); status != cutlass::Status::kSuccess) return int(status);
  return run_on<Backward>(device, backward(size(m, n, k), a, b, aux, out), workspace, workspace_bytes, stream);
}

// z = a (m, k) b (n, k)^T; act (m, n) = leaky(z)^2 and slope (m, n) = its derivative; else as cutlass_evt_gemm_mul.
EXPORT int cutlass_evt_gemm_leaky_relu_squared(int device, void const* a, void const* b, void* act, void* slope,
                                               int64_t m, int64_t n, int64_t k, void* workspace,
                                               int64_t workspace_bytes, void* stream) {
  if (auto status = check(m, n, k, {a, b, act, slope}); status != cutlass::Status::kSuccess) return int(status);
  return run_on<Forward>(device, forward(size(m, n, k), a, b, act, slope), workspace, workspace_bytes, stream);
}

// Bytes of device memory (16-byte aligned) that a call needs as `workspace`; -1: no such kernel.
EXPORT int64_t cutlass_evt_workspace_bytes(int kernel, int64_t m, int64_t n, int64_t k) {
  if (kernel == kBackward) {
    return Backward::Gemm::get_workspace_size(backward(size(m, n, k), nullptr, nullptr, nullptr, nullptr));
  }
  if (kernel == kForward) {
    return Forward::Gemm::get_workspace_size(forward(size(m, n, k), nullptr, nullptr, nullptr, nullptr));
  }
  return -1;
}

// Dynamic shared memory of one block in bytes; -1: no such kernel.
EXPORT int cutlass_evt_shared_bytes(int kernel) {
  return kernel == kBackward ? Backward::Kernel::SharedStorageSize
         : kernel == kForward ? Forward::Kernel::SharedStorageSize : -1;
}

// Depth of the mainloop's pipeline; -1: no such kernel.
EXPORT int cutlass_evt_stages(int kernel) {
  return kernel == kBackward ? Backward::kStages : kernel == kForward ? Forward::kStages : -1;
}

// What a status says; valid for the life of the process.
EXPORT char const* cutlass_evt_error_text(int status) {
  return status >= kCudaErrors ? cudaGetErrorString(cudaError_t(status - kCudaErrors))
                               : cutlassGetStatusString(cutlass::Status(status));
}
