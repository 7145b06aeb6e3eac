#include "../cpu/group_norm_silu.h"

#include "channel_args.h"

namespace fastdiff {

Tensor group_norm_silu(const Tensor& input, int64_t num_groups, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, double eps, const std::optional<Tensor>& temb,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool silu,
                       bool tokens) {
  const Pixels pixels("group_norm_silu", input);
  STD_TORCH_CHECK(num_groups > 0 && pixels.channels % num_groups == 0,
                  "fastdiff: group_norm_silu takes (B, C, *spatial) with C divisible by num_groups");
  const int64_t batch = pixels.batch, channels = pixels.channels, spatial = pixels.spatial;
  const Tensor& x = pixels.x;
  Tensor out = tokens ? empty_output({batch, spatial, channels}, {spatial * channels, channels, 1}, x.scalar_type(), x)
                      : pixels.like();
  if (out.numel() == 0) return out;
  const auto channel_values = [&](const std::optional<Tensor>& t, const char* name, bool per_sample) {
    return per_channel("group_norm_silu", t, name, x, per_sample);
  };
  cpu::GroupNormSiluArgs args{.x = data_of(x, x, "x"),
                              .out = data_of(out),
                              .batch = batch,
                              .channels = channels,
                              .spatial = spatial,
                              .groups = num_groups,
                              .x_batch_stride = x.stride(0),
                              .x_pixel_major = pixels.pixel_major,
                              .out_pixel_major = pixels.pixel_major || tokens,
                              .weight = channel_values(weight, "weight", false),
                              .bias = channel_values(bias, "bias", false),
                              .temb = channel_values(temb, "temb", true),
                              .scale = channel_values(scale, "scale", true),
                              .shift = channel_values(shift, "shift", true),
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
