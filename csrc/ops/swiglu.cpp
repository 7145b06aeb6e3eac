#include "../cpu/swiglu.h"

#include "tensor_args.h"

namespace fastdiff {
namespace {

// t as rows of contiguous elements a constant stride apart: all of a contiguous tensor, or a chunk of one.
struct Strided {
  explicit Strided(const Tensor& t, const char* name) {
    int64_t axis = t.dim();
    for (; axis > 0 && (t.size(axis - 1) == 1 || t.stride(axis - 1) == columns); --axis) columns *= t.size(axis - 1);
    for (; axis > 0; --axis) {
      const int64_t size = t.size(axis - 1), step = t.stride(axis - 1);
      if (size == 1) continue;
      if (rows == 1) stride = step;
      STD_TORCH_CHECK(step == stride * rows, "fastdiff: swiglu takes ", name, " as evenly strided contiguous rows");
      rows *= size;
    }
  }
  // The same elements, cut into shorter rows.
  void cut(int64_t shorter) {
    if (columns == shorter) return;
    STD_TORCH_CHECK(rows == 1 && columns % shorter == 0, "fastdiff: swiglu's gate and x are strided differently");
    stride = shorter, rows = columns / shorter, columns = shorter;
  }
  int64_t rows = 1, columns = 1, stride = 0;
};

Tensor swiglu(const Tensor& gate, const Tensor& x) {
  const std::vector<int64_t> sizes(gate.sizes().begin(), gate.sizes().end());
  STD_TORCH_CHECK(sizes == std::vector<int64_t>(x.sizes().begin(), x.sizes().end()) &&
                      gate.scalar_type() == x.scalar_type(),
                  "fastdiff: swiglu's gate and x differ in shape or dtype");
  Tensor out = empty_output(sizes, contiguous_strides(sizes), gate.scalar_type(), gate);
  const cpu::DType dtype = dtype_of(gate, "gate");
  if (out.numel() == 0) return out;
  Strided a(gate, "gate"), b(x, "x");
  const int64_t columns = a.columns < b.columns ? a.columns : b.columns;
  a.cut(columns), b.cut(columns);
  const cpu::SwigluArgs args{data_of(gate, gate, "gate"), data_of(x, gate, "x"), a.stride, b.stride, data_of(out), a.rows,
                             columns, dtype};
  run("swiglu", gate, [&] { return cpu::swiglu(args); }, [&](cuda::Stream s) { return cuda::swiglu(args, s); });
  return out;
}

}  // namespace

FASTDIFF_REGISTER(m) { m.impl("swiglu", TORCH_BOX(&swiglu)); }

}  // namespace fastdiff
