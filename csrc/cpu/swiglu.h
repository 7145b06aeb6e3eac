#pragma once

#include "isa.h"

namespace fastdiff::cpu {

struct SwigluArgs {
  const void *gate, *x;  // rows of `columns` contiguous elements, their starts the strides apart
  int64_t gate_stride, x_stride;
  void* out;  // rows x columns
  int64_t rows, columns;
  DType dtype;
};
FASTDIFF_CPU_KERNEL(swiglu, SwigluArgs)

}  // namespace fastdiff::cpu
