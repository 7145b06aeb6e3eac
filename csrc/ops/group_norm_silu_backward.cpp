#include "../cpu/group_norm_silu_backward.h"

#include "tensor_args.h"

namespace fastdiff {
namespace {

// The rows of t, one per sample or one for all, `channels` fp32 values each; null where t is absent.
const float* channel_rows(const std::optional<Tensor>& t, const char* name, int64_t batch, int64_t channels) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->dim() == 2 && (t->size(0) == batch || t->size(0) == 1) && t->size(1) == channels &&
                      t->is_contiguous() && t->scalar_type() == ScalarType::Float,
                  "fastdiff: ", name, " must be contiguous float32 of shape (1 or ", batch, ", ", channels, ")");
  return static_cast<const float*>(t->const_data_ptr());
}

int64_t stride_of(const std::optional<Tensor>& t) { return t && t->size(0) > 1 ? t->size(1) : 0; }

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad_out, const Tensor& input, int64_t num_groups, const std::optional<Tensor>& factor,
    const std::optional<Tensor>& offset, const std::optional<Tensor>& temb, double eps, bool silu,
    bool channels_last) {
  STD_TORCH_CHECK(input.dim() == 3 && grad_out.dim() == 3, "fastdiff: x and grad must have 3 dimensions");
  for (int64_t axis = 0; axis < 3; ++axis)
    STD_TORCH_CHECK(input.size(axis) == grad_out.size(axis), "fastdiff: x and grad must be of the same shape");
  STD_TORCH_CHECK(input.scalar_type() == grad_out.scalar_type(), "fastdiff: x and grad must be of the same dtype");
  const Tensor x = torch::stable::contiguous(input), grad = torch::stable::contiguous(grad_out);
  const int64_t batch = x.size(0), channels = x.size(channels_last ? 2 : 1), spatial = x.size(channels_last ? 1 : 2);
  STD_TORCH_CHECK(num_groups > 0 && channels > 0 && channels % num_groups == 0,
                  "fastdiff: group_norm_silu_backward takes channels divisible by num_groups");
  STD_TORCH_CHECK(!temb || temb->size(0) == batch, "fastdiff: temb must have a row per sample");
  Tensor dx = empty_output_like(x);
  const auto sums = [&] { return torch::stable::new_zeros(x, {batch, channels}, ScalarType::Float); };
  Tensor dfactor = sums(), doffset = sums(), dtemb = sums();
  if (x.numel() == 0) return {dx, dfactor, doffset, dtemb};
  const auto floats = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const cpu::GroupNormSiluBackwardArgs args{.grad = grad.const_data_ptr(),
                                            .x = x.const_data_ptr(),
                                            .dx = dx.mutable_data_ptr(),
                                            .batch = batch,
                                            .channels = channels,
                                            .spatial = spatial,
                                            .groups = num_groups,
                                            .pixel_major = channels_last,
                                            .factor = channel_rows(factor, "factor", batch, channels),
                                            .offset = channel_rows(offset, "offset", batch, channels),
                                            .temb = channel_rows(temb, "temb", batch, channels),
                                            .factor_batch_stride = stride_of(factor),
                                            .offset_batch_stride = stride_of(offset),
                                            .dfactor = floats(dfactor),
                                            .doffset = floats(doffset),
                                            .dtemb = floats(dtemb),
                                            .eps = eps,
                                            .silu = silu,
                                            .dtype = dtype_of(x, "x")};
  require(cpu::group_norm_silu_backward(args), "group_norm_silu_backward");
  return {dx, dfactor, doffset, dtemb};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace fastdiff
