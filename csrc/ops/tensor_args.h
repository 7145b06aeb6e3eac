// What every op's front needs to turn stable-ABI tensors into a kernel's plain arguments.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <optional>
#include <vector>

#include "../cpu/isa.h"

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

// Large fresh outputs cost more in page faults than in arithmetic: 128 MB faulted in as 4 KiB pages takes about
// 70 ms, as 2 MiB pages 28 ms. This asks Linux for huge pages for this one output, a hint it may ignore (it is
// what torch does for all tensors under THP_MEM_ALLOC_ENABLE=1). Memory that is already resident is unaffected. The
// hint stays with the addresses until they go back to the system, which for blocks this large is when they are freed.
inline void prefer_huge_pages(const Tensor& out) {
#ifdef __linux__
  constexpr int64_t kThreshold = 4 << 20, kPage = 4096;
  const int64_t bytes = out.numel() * out.element_size();
  if (bytes < kThreshold) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// An uninitialised CPU tensor shaped, typed and strided like `like`, for a kernel to fill.
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

// An uninitialised CPU tensor of the given geometry, for a kernel to fill.
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

}  // namespace fastdiff
