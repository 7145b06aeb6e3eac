#include "../cpu/adaln_backward.h"

#include "tensor_args.h"

namespace fastdiff {
namespace {

struct Shape {
  Shape(const Tensor& x, const Tensor& grad) {
    STD_TORCH_CHECK(x.dim() == 3, "fastdiff: x must be (B, S, D)");
    same(x, grad, "grad");
    batch = x.size(0), tokens = x.size(1), columns = x.size(2);
  }
  static void same(const Tensor& x, const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(2) == x.size(2) &&
                        t.scalar_type() == x.scalar_type(),
                    "fastdiff: ", name, " must have x's shape and dtype");
  }
  // One row per sample or one for all; the stride between samples.
  int64_t check(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.dim() == 2 && (t.size(0) == batch || t.size(0) == 1) && t.size(1) == columns &&
                        t.is_contiguous() && t.scalar_type() == ScalarType::Float,
                    "fastdiff: ", name, " must be contiguous float32 of shape (1 or ", batch, ", ", columns, ")");
    return t.size(0) > 1 ? columns : 0;
  }
  Tensor sums(const Tensor& x) const { return torch::stable::new_zeros(x, {batch, columns}, ScalarType::Float); }
  int64_t batch, tokens, columns;
};

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> adaln_modulate_backward(const Tensor& grad_out, const Tensor& input,
                                                           const std::optional<Tensor>& factor, double eps, bool rms,
                                                           const std::optional<Tensor>& grad_x) {
  const Shape shape(input, grad_out);
  const Tensor x = torch::stable::contiguous(input), grad = torch::stable::contiguous(grad_out);
  std::optional<Tensor> more;
  if (grad_x) {
    Shape::same(input, *grad_x, "grad_x");
    more = torch::stable::contiguous(*grad_x);
  }
  Tensor dx = empty_output_like(x), dfactor = shape.sums(x), doffset = shape.sums(x);
  if (x.numel() == 0) return {dx, dfactor, doffset};
  const cpu::AdalnBackwardArgs args{.grad = grad.const_data_ptr(),
                                    .x = x.const_data_ptr(),
                                    .grad_x = more ? more->const_data_ptr() : nullptr,
                                    .dx = dx.mutable_data_ptr(),
                                    .factor = factor ? static_cast<const float*>(factor->const_data_ptr()) : nullptr,
                                    .factor_batch_stride = factor ? shape.check(*factor, "factor") : 0,
                                    .dfactor = floats(dfactor),
                                    .doffset = floats(doffset),
                                    .batch = shape.batch,
                                    .tokens = shape.tokens,
                                    .columns = shape.columns,
                                    .eps = static_cast<float>(eps),
                                    .rms = rms,
                                    .dtype = dtype_of(x, "x")};
  require(cpu::adaln_backward(args), "adaln_modulate_backward");
  return {dx, dfactor, doffset};
}

std::tuple<Tensor, Tensor> gate_residual_backward(const Tensor& grad_out, const Tensor& input, const Tensor& gate) {
  const Shape shape(input, grad_out);
  const Tensor x = torch::stable::contiguous(input), grad = torch::stable::contiguous(grad_out);
  Tensor dx = empty_output_like(x), dgate = shape.sums(x);
  if (x.numel() == 0) return {dx, dgate};
  const cpu::GateBackwardArgs args{.grad = grad.const_data_ptr(),
                                   .x = x.const_data_ptr(),
                                   .dx = dx.mutable_data_ptr(),
                                   .gate = static_cast<const float*>(gate.const_data_ptr()),
                                   .gate_batch_stride = shape.check(gate, "gate"),
                                   .dgate = floats(dgate),
                                   .batch = shape.batch,
                                   .tokens = shape.tokens,
                                   .columns = shape.columns,
                                   .dtype = dtype_of(x, "x")};
  require(cpu::gate_backward(args), "gate_residual_backward");
  return {dx, dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("adaln_modulate_backward", TORCH_BOX(&adaln_modulate_backward));
  m.impl("gate_residual_backward", TORCH_BOX(&gate_residual_backward));
}

}  // namespace fastdiff
