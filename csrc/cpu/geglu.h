#pragma once

#include "isa.h"

namespace fastdiff::cpu {

struct GegluArgs {
  const void* x;  // rows x (2 * columns) contiguous elements: hidden, gate
  void* out;      // rows x columns
  int64_t rows, columns;
  DType dtype;
};
FASTDIFF_CPU_KERNEL(geglu, GegluArgs)

}  // namespace fastdiff::cpu
