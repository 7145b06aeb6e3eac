#pragma once

#include "isa.h"

namespace fastdiff::cpu {

// The gradients of out = norm(x) * factor + offset over rows of `columns` values. Tensors of x's size are dense,
// (batch, tokens, columns), of one dtype; all others fp32, dense.
struct AdalnBackwardArgs {
  const void *grad, *x;      // grad: of out
  const void* grad_x;        // null, or the gradient that x has from elsewhere, added to dx
  void* dx;
  const float* factor;       // null: 1
  int64_t factor_batch_stride;  // columns, or 0 for one row for all samples
  float *dfactor, *doffset;  // (batch, columns)
  int64_t batch, tokens, columns;
  float eps;
  bool rms;
  DType dtype;
};
FASTDIFF_CPU_KERNEL(adaln_backward, AdalnBackwardArgs)

// The gradients of out = residual + gate * x, but for that of residual, which is grad.
struct GateBackwardArgs {
  const void *grad, *x;
  void* dx;
  const float* gate;
  int64_t gate_batch_stride;  // as factor_batch_stride
  float* dgate;               // (batch, columns)
  int64_t batch, tokens, columns;
  DType dtype;
};
FASTDIFF_CPU_KERNEL(gate_backward, GateBackwardArgs)

}  // namespace fastdiff::cpu
