#include "../cpu/adaln.h"

#include "tensor_args.h"

namespace fastdiff {
namespace {

using OptionalTensor = std::optional<Tensor>;

// t as rows that broadcast to x: of x's rank, or (D,), or (B, 1..., D) with axes left out.
cpu::Rows rows_of(const Tensor& t, const Tensor& x, const char* name) {
  const auto sizes = t.sizes(), strides = t.strides(), full = x.sizes();
  const size_t rank = sizes.size(), full_rank = full.size();
  bool fits = 1 <= rank && rank <= full_rank && full_rank <= cpu::Rows::kAxes + 1 &&
              sizes[rank - 1] == full[full_rank - 1] && (strides[rank - 1] == 1 || sizes[rank - 1] == 1);
  cpu::Rows rows{data_of(t, x, name), dtype_of(t, name)};
  for (size_t axis = 0; fits && axis + 1 < rank; ++axis) {
    // Aligned at the batch axis; x's last axes before D that t lacks are broadcast.
    if (sizes[axis] == 1) continue;
    fits = sizes[axis] == full[axis] && (rank == full_rank || axis == 0);
    rows.stride[axis] = strides[axis];
  }
  STD_TORCH_CHECK(fits, "fastdiff: ", name, " does not broadcast to x, or its last axis is not contiguous");
  return rows;
}

cpu::Rows rows_of(const OptionalTensor& t, const Tensor& x, const char* name) {
  return t ? rows_of(*t, x, name) : cpu::Rows{};
}

struct Call {
  explicit Call(const Tensor& x) : x(x), sizes(x.sizes().begin(), x.sizes().end()) {
    args.x = rows_of(x, x, "x");
    for (size_t axis = 0; axis < cpu::Rows::kAxes; ++axis) args.size[axis] = axis + 1 < sizes.size() ? sizes[axis] : 1;
    args.columns = sizes.back();
  }

  Tensor gate(const OptionalTensor& gate, const Tensor& residual) {
    STD_TORCH_CHECK(residual.scalar_type() == x.scalar_type(), "fastdiff: residual must have x's dtype");
    args.gate = rows_of(gate, x, "gate");
    args.residual = rows_of(residual, x, "residual");
    Tensor y = empty_output(sizes, contiguous_strides(sizes), x.scalar_type(), x);
    args.y = data_of(y);
    return y;
  }

  Tensor norm(const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& weight,
              const OptionalTensor& bias, double eps, bool rms, ScalarType dtype) {
    args.scale = rows_of(scale, x, "scale");
    args.shift = rows_of(shift, x, "shift");
    args.weight = rows_of(weight, x, "weight");
    args.bias = rows_of(bias, x, "bias");
    args.eps = static_cast<float>(eps);
    args.rms = rms;
    Tensor out = empty_output(sizes, contiguous_strides(sizes), dtype, x);
    args.out = data_of(out);
    args.out_dtype = dtype_of(out, "out_dtype");
    return out;
  }

  Tensor second(const OptionalTensor& scale, const OptionalTensor& shift, ScalarType dtype) {
    args.scale2 = rows_of(scale, x, "scale2");
    args.shift2 = rows_of(shift, x, "shift2");
    Tensor out = empty_output(sizes, contiguous_strides(sizes), dtype, x);
    args.out2 = data_of(out);
    return out;
  }

  void run(const char* op) const {
    fastdiff::run(op, x, [&] { return cpu::adaln(args); }, [&](cuda::Stream s) { return cuda::adaln(args, s); });
  }

  const Tensor& x;
  std::vector<int64_t> sizes;
  cpu::AdalnArgs args{};
};

Tensor adaln_modulate(const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms,
                      std::optional<ScalarType> out_dtype) {
  Call call(x);
  Tensor out = call.norm(scale, shift, weight, bias, eps, rms, out_dtype.value_or(x.scalar_type()));
  call.run("adaln_modulate");
  return out;
}

std::tuple<Tensor, Tensor> adaln_modulate_dual(const Tensor& x, const OptionalTensor& scale,
                                               const OptionalTensor& shift, const OptionalTensor& scale2,
                                               const OptionalTensor& shift2, const OptionalTensor& weight,
                                               const OptionalTensor& bias, double eps, bool rms,
                                               std::optional<ScalarType> out_dtype) {
  Call call(x);
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  Tensor out = call.norm(scale, shift, weight, bias, eps, rms, dtype);
  Tensor out2 = call.second(scale2, shift2, dtype);
  call.run("adaln_modulate_dual");
  return {out, out2};
}

Tensor gate_residual(const Tensor& x, const Tensor& gate, const Tensor& residual) {
  Call call(x);
  Tensor y = call.gate(gate, residual);
  call.run("gate_residual");
  return y;
}

std::tuple<Tensor, Tensor> gate_residual_adaln(const Tensor& x, const OptionalTensor& gate, const Tensor& residual,
                                               const OptionalTensor& scale, const OptionalTensor& shift,
                                               const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                               bool rms) {
  Call call(x);
  Tensor y = call.gate(gate, residual);
  Tensor out = call.norm(scale, shift, weight, bias, eps, rms, x.scalar_type());
  call.run("gate_residual_adaln");
  return {y, out};
}

}  // namespace

FASTDIFF_REGISTER(m) {
  m.impl("adaln_modulate", TORCH_BOX(&adaln_modulate));
  m.impl("adaln_modulate_dual", TORCH_BOX(&adaln_modulate_dual));
  m.impl("gate_residual", TORCH_BOX(&gate_residual));
  m.impl("gate_residual_adaln", TORCH_BOX(&gate_residual_adaln));
}

}  // namespace fastdiff
