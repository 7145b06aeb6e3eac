#pragma once

#include "channels.h"

namespace fastdiff::cpu {

// Layouts of a (batch, channels, spatial) tensor: channel-major is (B, C, S) in memory, pixel-major (B, S, C).
struct GroupNormSiluArgs {
  const void* x;
  void* out;             // dense
  int64_t batch, channels, spatial, groups;
  int64_t x_batch_stride;
  bool x_pixel_major;    // implies out_pixel_major
  bool out_pixel_major;
  ChannelValues weight, bias, temb, scale, shift;
  double eps;
  bool silu;
  DType dtype;
};
FASTDIFF_CPU_KERNEL(group_norm_silu, GroupNormSiluArgs)

}  // namespace fastdiff::cpu
