// What every op's front needs to turn stable-ABI tensors into a kernel's plain arguments, and to run the kernel of
// their device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <vector>

#include "../cpu/isa.h"
#include "../cuda/kernels.h"
#ifdef FASTDIFF_CUDA_EMULATION
#include <cuda_runtime.h>
#endif

// FASTDIFF_REGISTER(m) { m.impl(...); } registers implementations for every device this build has kernels for.
#if defined(FASTDIFF_CUDA_EMULATION)
#define FASTDIFF_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(fastdiff_emulated, CPU, m)
#elif defined(FASTDIFF_HAVE_CUDA)
#define FASTDIFF_REGISTER(m)                                                                 \
  static void fastdiff_register(torch::stable::detail::StableLibrary&);                      \
  STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, library) { fastdiff_register(library); }          \
  STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, library) { fastdiff_register(library); }         \
  static void fastdiff_register(torch::stable::detail::StableLibrary& m)
// Exported by torch's CUDA library only. Null with a CPU torch, which has no CUDA tensors either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#else
#define FASTDIFF_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m)
#endif

namespace fastdiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cpu::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return cpu::DType::f32;
    case ScalarType::BFloat16: return cpu::DType::bf16;
    case ScalarType::Half: return cpu::DType::f16;
    default: STD_TORCH_CHECK(false, "fastdiff: ", name, " must be float32, bfloat16 or float16");
  }
  return cpu::DType::f32;
}

// The data of t, an operand of an op on x.
inline const void* data_of(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(), "fastdiff: ", name,
                  " is on another device");
  const void* data = t.const_data_ptr();
#ifdef FASTDIFF_CUDA_EMULATION
  int64_t span = t.numel() ? 1 : 0;
  for (int64_t axis = 0; t.numel() && axis < t.dim(); ++axis) span += (t.size(axis) - 1) * t.stride(axis);
  emulation::allow(data, span * t.element_size(), false);
#endif
  return data;
}

// The data of a fresh output.
inline void* data_of(Tensor& t) {
  void* data = t.mutable_data_ptr();
#ifdef FASTDIFF_CUDA_EMULATION
  emulation::allow(data, t.numel() * t.element_size(), true);
  std::memset(data, 0xff, t.numel() * t.element_size());
#endif
  return data;
}

// Large fresh outputs cost more in page faults than in arithmetic: 128 MB faulted in as 4 KiB pages takes about
// 70 ms, as 2 MiB pages 28 ms. This asks Linux for huge pages for this one output, a hint it may ignore (it is
// what torch does for all tensors under THP_MEM_ALLOC_ENABLE=1). Memory that is already resident is unaffected. The
// hint stays with the addresses until they go back to the system, which for blocks this large is when they are freed.
inline void prefer_huge_pages(const Tensor& out) {
#ifdef __linux__
  if (out.is_cuda()) return;
  constexpr int64_t kThreshold = 4 << 20, kPage = 4096;
  const int64_t bytes = out.numel() * out.element_size();
  if (bytes < kThreshold) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// An uninitialised tensor shaped, typed and strided like `like`, for a kernel to fill.
inline Tensor empty_output_like(const Tensor& like) {
  Tensor out = torch::stable::empty_like(like);
  prefer_huge_pages(out);
  return out;
}

// Strides of a contiguous tensor, as torch gives them to tensors with axes of size 0 too.
inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  return strides;
}

// An uninitialised tensor of the given geometry on the device of `like`, for a kernel to fill.
inline Tensor empty_output(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            ScalarType dtype, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle));
  Tensor out(handle);
  prefer_huge_pages(out);
  return out;
}

inline void require(bool served, const char* op) {
  STD_TORCH_CHECK(served, "fastdiff: ", op, " has no kernel for this CPU (it needs AVX2)");
}

// Runs on_cpu(), which says whether there is a kernel for this CPU, or on_cuda(stream), which returns a message or
// null; whichever x asks for.
template <class OnCpu, class OnCuda>
void run(const char* op, const Tensor& x, const OnCpu& on_cpu, const OnCuda& on_cuda) {
#if defined(FASTDIFF_CUDA_EMULATION)
  on_cuda(nullptr);
  emulation::forget_allowed();
#else
#ifdef FASTDIFF_HAVE_CUDA
  if (x.is_cuda()) {
    const int32_t device = x.get_device_index();
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "fastdiff: ", op, ": this torch has no CUDA streams");
    torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const char* error = on_cuda(static_cast<cuda::Stream>(stream));
    STD_TORCH_CHECK(!error, "fastdiff: ", op, ": ", error);
    return;
  }
#endif
  require(on_cpu(), op);
#endif
}

// Scratch memory of `size` floats where x is. It may be freed as soon as the kernels are queued: torch's allocator gives
// it to later work of the same stream only.
inline Tensor scratch(int64_t size, const Tensor& x) { return empty_output({size}, {1}, ScalarType::Float, x); }

}  // namespace fastdiff
