#pragma once

#include "isa.h"

namespace fastdiff::cpu {

// One value per channel, or per sample and channel.
struct ChannelValues {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::f32;
  int64_t batch_stride = 0, channel_stride = 1;  // in elements
};

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
