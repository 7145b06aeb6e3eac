#include "../cpu/gelu_tanh.h"

#include "tensor_args.h"

namespace fastdiff {

Tensor gelu_tanh(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "fastdiff: gelu_tanh takes a contiguous x");
  Tensor out = empty_output_like(x);
  const cpu::GeluTanhArgs args{data_of(x, x, "x"), data_of(out), x.numel(), dtype_of(x, "x")};
  run("gelu_tanh", x, [&] { return cpu::gelu_tanh(args); }, [&](cuda::Stream s) { return cuda::gelu_tanh(args, s); });
  return out;
}

FASTDIFF_REGISTER(m) { m.impl("gelu_tanh", TORCH_BOX(&gelu_tanh)); }

}  // namespace fastdiff
