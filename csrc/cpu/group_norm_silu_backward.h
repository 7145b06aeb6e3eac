#pragma once

#include "isa.h"

namespace fastdiff::cpu {

// The gradients of out = silu(n * factor + offset), n = group_norm(x + temb). Tensors of x's size are dense,
// (batch, channels, spatial), or (batch, spatial, channels) where pixel_major; all others fp32, dense.
struct GroupNormSiluBackwardArgs {
  const void *grad, *x;  // grad: of out
  void* dx;
  int64_t batch, channels, spatial, groups;
  bool pixel_major;
  const float *factor, *offset, *temb;                // null: 1, 0, 0
  int64_t factor_batch_stride, offset_batch_stride;  // channels, or 0 for one row for all samples
  float *dfactor, *doffset, *dtemb;                   // (batch, channels)
  double eps;
  bool silu;
  DType dtype;
};
FASTDIFF_CPU_KERNEL(group_norm_silu_backward, GroupNormSiluBackwardArgs)

}  // namespace fastdiff::cpu
