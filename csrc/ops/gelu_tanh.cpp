#include "../cpu/gelu_tanh.h"

#include "tensor_args.h"

namespace fastdiff {

Tensor gelu_tanh(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "fastdiff: gelu_tanh takes a contiguous x");
  Tensor out = empty_output_like(x);
  require(cpu::gelu_tanh({x.const_data_ptr(), out.mutable_data_ptr(), x.numel(), dtype_of(x, "x")}), "gelu_tanh");
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("gelu_tanh", TORCH_BOX(&gelu_tanh)); }

}  // namespace fastdiff
