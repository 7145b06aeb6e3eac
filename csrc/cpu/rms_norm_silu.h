#pragma once

#include "channels.h"

namespace fastdiff::cpu {

// Layouts of a (batch, channels, spatial) tensor: channel-major is (B, C, S) in memory, pixel-major (B, S, C).
struct RmsNormSiluArgs {
  const void* x;
  void* out;  // dense, in x's layout
  int64_t batch, channels, spatial;
  int64_t x_batch_stride;
  bool pixel_major;
  ChannelValues weight, bias, scale, shift;
  double eps;
  bool clamp;  // eps bounds the norm from below, instead of being added to the mean square
  bool silu;
  DType dtype;
};
FASTDIFF_CPU_KERNEL(rms_norm_silu, RmsNormSiluArgs)

}  // namespace fastdiff::cpu
