#include "../cpu/geglu.h"

#include "tensor_args.h"

namespace fastdiff {

Tensor geglu(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() && x.dim() >= 1 && x.sizes().back() % 2 == 0,
                  "fastdiff: geglu takes a contiguous x with an even last axis");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t columns = sizes.back() /= 2;
  Tensor out = empty_output(sizes, contiguous_strides(sizes), x.scalar_type(), x);
  const int64_t rows = columns ? out.numel() / columns : 0;
  const cpu::GegluArgs args{data_of(x, x, "x"), data_of(out), rows, columns, dtype_of(x, "x")};
  run("geglu", x, [&] { return cpu::geglu(args); }, [&](cuda::Stream s) { return cuda::geglu(args, s); });
  return out;
}

FASTDIFF_REGISTER(m) { m.impl("geglu", TORCH_BOX(&geglu)); }

}  // namespace fastdiff
