#pragma once

#include "isa.h"

namespace fastdiff::cpu {

struct GeluTanhArgs {
  const void* x;  // numel contiguous elements
  void* out;
  int64_t numel;
  DType dtype;
};
FASTDIFF_CPU_KERNEL(gelu_tanh, GeluTanhArgs)

}  // namespace fastdiff::cpu
