#include "../cpu/group_norm_silu.h"

#include "tensor_args.h"

namespace fastdiff {
namespace {

// The strides with which (B, C, *spatial) is dense in each sample, channels before or after the pixels; axes of
// size 1 do not count. `batch_stride` of 0 leaves the stride between samples free.
bool has_layout(const Tensor& x, bool pixel_major, int64_t batch_stride) {
  const auto sizes = x.sizes(), strides = x.strides();
  const auto matches = [&](size_t axis, int64_t stride) { return sizes[axis] == 1 || strides[axis] == stride; };
  int64_t stride = 1;
  if (pixel_major) {
    if (!matches(1, 1)) return false;
    stride = sizes[1];
  }
  for (size_t axis = sizes.size() - 1; axis > 1; --axis) {
    if (!matches(axis, stride)) return false;
    stride *= sizes[axis];
  }
  return (pixel_major || matches(1, stride)) && (batch_stride == 0 || matches(0, batch_stride));
}

// Of shape (C,), or with `per_sample`, (B, C) and further axes of size 1.
cpu::ChannelValues per_channel(const std::optional<Tensor>& t, const char* name, const Tensor& x, bool per_sample) {
  if (!t) return {};
  const int64_t dim = t->dim(), batch = x.size(0), channels = x.size(1);
  const bool fits = per_sample
                        ? dim >= 2 && t->size(0) == batch && t->size(1) == channels && t->numel() == batch * channels
                        : dim == 1 && t->size(0) == channels;
  STD_TORCH_CHECK(fits, "fastdiff: group_norm_silu takes ", name, per_sample ? " (B, C)" : " (C,)");
  return {data_of(*t, x, name), dtype_of(*t, name), dim > 1 ? t->stride(0) : 0, t->stride(dim > 1 ? 1 : 0)};
}

}  // namespace

Tensor group_norm_silu(const Tensor& input, int64_t num_groups, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& temb,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool silu,
                       bool tokens) {
  const auto sizes = input.sizes();
  STD_TORCH_CHECK(sizes.size() >= 2 && num_groups > 0 && sizes[1] > 0 && sizes[1] % num_groups == 0,
                  "fastdiff: group_norm_silu takes (B, C, *spatial) with C divisible by num_groups");
  const int64_t batch = sizes[0], channels = sizes[1];
  int64_t spatial = 1;
  for (size_t axis = 2; axis < sizes.size(); ++axis) spatial *= sizes[axis];

  const bool contiguous = input.is_contiguous();
  const bool pixel_major = !contiguous && has_layout(input, true, channels * spatial);
  const bool dense = contiguous || pixel_major;
  const Tensor x = dense || has_layout(input, false, 0) ? input : torch::stable::contiguous(input);
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  Tensor out = tokens ? empty_output({batch, spatial, channels}, {spatial * channels, channels, 1}, x.scalar_type(), x)
               : dense ? empty_output_like(x)
                       : empty_output(shape, contiguous_strides(shape), x.scalar_type(), x);
  if (out.numel() == 0) return out;
  cpu::GroupNormSiluArgs args{.x = data_of(x, x, "x"),
                              .out = data_of(out),
                              .batch = batch,
                              .channels = channels,
                              .spatial = spatial,
                              .groups = num_groups,
                              .x_batch_stride = x.stride(0),
                              .x_pixel_major = pixel_major,
                              .out_pixel_major = pixel_major || tokens,
                              .weight = per_channel(weight, "weight", x, false),
                              .bias = per_channel(bias, "bias", x, false),
                              .temb = per_channel(temb, "temb", x, true),
                              .scale = per_channel(scale, "scale", x, true),
                              .shift = per_channel(shift, "shift", x, true),
                              .eps = eps,
                              .silu = silu,
                              .dtype = dtype_of(x, "x")};
  run("group_norm_silu", x, [&] { return cpu::group_norm_silu(args); }, [&](cuda::Stream s) {
    Tensor workspace = scratch(cuda::workspace_size(args), x);
    return cuda::group_norm_silu(args, static_cast<float*>(data_of(workspace)), s);
  });
  return out;
}

FASTDIFF_REGISTER(m) { m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu)); }

}  // namespace fastdiff
