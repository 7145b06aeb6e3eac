#include "../cpu/rms_norm_silu.h"

#include "channel_args.h"

namespace fastdiff {

Tensor rms_norm_silu(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     double eps, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool clamp,
                     bool silu) {
  const Pixels pixels("rms_norm_silu", input);
  const Tensor& x = pixels.x;
  Tensor out = pixels.like();
  if (out.numel() == 0) return out;
  const auto channel_values = [&](const std::optional<Tensor>& t, const char* name, bool per_sample) {
    return per_channel("rms_norm_silu", t, name, x, per_sample);
  };
  const cpu::RmsNormSiluArgs args{.x = data_of(x, x, "x"),
                                  .out = data_of(out),
                                  .batch = pixels.batch,
                                  .channels = pixels.channels,
                                  .spatial = pixels.spatial,
                                  .x_batch_stride = x.stride(0),
                                  .pixel_major = pixels.pixel_major,
                                  .weight = channel_values(weight, "weight", false),
                                  .bias = channel_values(bias, "bias", false),
                                  .scale = channel_values(scale, "scale", true),
                                  .shift = channel_values(shift, "shift", true),
                                  .eps = eps,
                                  .clamp = clamp,
                                  .silu = silu,
                                  .dtype = dtype_of(x, "x")};
  run("rms_norm_silu", x, [&] { return cpu::rms_norm_silu(args); },
      [&](cuda::Stream s) { return cuda::rms_norm_silu(args, s); });
  return out;
}

FASTDIFF_REGISTER(m) { m.impl("rms_norm_silu", TORCH_BOX(&rms_norm_silu)); }

}  // namespace fastdiff
