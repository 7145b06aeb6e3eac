// Values per channel of (B, C, *spatial), as the norms over it take them.
#pragma once

#include "isa.h"

namespace fastdiff::cpu {

// One value per channel, or per sample and channel.
struct ChannelValues {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::f32;
  int64_t batch_stride = 0, channel_stride = 1;  // in elements
};

}  // namespace fastdiff::cpu
