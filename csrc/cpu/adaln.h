#pragma once

#include "isa.h"

namespace fastdiff::cpu {

// A tensor (..., D), D contiguous elements in a row, broadcast to x's leading axes.
struct Rows {
  static constexpr int kAxes = 4;
  const void* data = nullptr;  // null: not given
  DType dtype = DType::f32;
  int64_t stride[kAxes] = {};  // of the leading axes, in elements; 0 where broadcast
};

// With a residual, y = residual + gate * x, or residual + x without a gate; else y = x. With `out`,
// out = norm(y) * (1 + scale) + shift; with `out2`, also out2 = norm(y) * (1 + scale2) + shift2.
struct AdalnArgs {
  int64_t size[Rows::kAxes];  // x's leading axes
  int64_t columns;            // D
  Rows x;
  Rows gate, residual;  // residual has x's dtype
  void* y = nullptr;    // contiguous, x's dtype; only with a residual
  Rows scale, shift;
  Rows weight, bias;
  void* out = nullptr;  // contiguous
  Rows scale2, shift2;
  void* out2 = nullptr;  // contiguous, of out's dtype; only with out
  DType out_dtype = DType::f32;
  float eps = 0;
  bool rms = false;
};
FASTDIFF_CPU_KERNEL(adaln, AdalnArgs)

}  // namespace fastdiff::cpu
