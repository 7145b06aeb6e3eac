#pragma once

#include "isa.h"

namespace fastdiff::cpu {

struct CfgCombineArgs {
  const void *uncond, *cond;  // samples x numel contiguous elements
  void* out;
  int64_t samples, numel;  // numel: per sample
  float guidance_scale, guidance_rescale;
  DType dtype;
};
FASTDIFF_CPU_KERNEL(cfg_combine, CfgCombineArgs)

}  // namespace fastdiff::cpu
