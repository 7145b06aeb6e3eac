#pragma once

#include "isa.h"

namespace fastdiff::cpu {

// One stream's queries or keys, (B, S, H, D) with D contiguous, and the parameters of their norm.
struct Heads {
  const void* data = nullptr;  // null: there is no such stream
  int64_t tokens = 0;
  int64_t stride[3] = {};  // of batch, token and head, in elements
  const void *weight = nullptr, *bias = nullptr;
  DType weight_dtype = DType::f32, bias_dtype = DType::f32;
};

// Queries or keys: the tokens of up to two streams, one after the other.
struct Joint {
  Heads part[2];
  int64_t heads = 0;
  void* out = nullptr;  // (B, S of both parts, H, D), contiguous
};

// out = rotate(norm(x)) for queries and keys.
struct QkNormRopeArgs {
  Joint joint[2];
  int64_t batch, depth;
  DType dtype;
  bool norm, rms, across_heads;  // across_heads: one norm over H and D
  float eps;
  // Tokens [first, first + rotated) are rotated in their first `width` elements; null: none.
  const void *cosine = nullptr, *sine = nullptr;  // sine null: cosine holds (cosine, sine) pairs
  DType table_dtype = DType::f32;                 // on a CPU fp32 only
  bool table_is_f64 = false;
  int64_t table_stride[3] = {};  // of batch, token and head
  int64_t first = 0, rotated = 0, width = 0;
  bool interleaved = true;  // pairs are (2i, 2i+1), else (i, i + width/2)
};
FASTDIFF_CPU_KERNEL(qk_norm_rope, QkNormRopeArgs)

}  // namespace fastdiff::cpu
