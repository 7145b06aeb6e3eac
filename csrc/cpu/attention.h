#pragma once

#include "isa.h"

namespace fastdiff::cpu {

struct AttentionArgs {
  const void *q, *k, *v;  // (batch, sequence, head, depth); the last axis is contiguous
  const void* mask;       // null, or (batch, head, query, key); on a CPU the last axis is contiguous
  void* out;              // (batch, query, head, depth), contiguous
  float* lse;             // null, or (batch, query, head): natural log of the sum of exponentials
  int64_t batch, heads, queries, keys, depth;
  int64_t q_strides[3], k_strides[3], v_strides[3];  // of batch, sequence and head, in elements
  int64_t mask_strides[4];                           // of batch, head, query and key; 0 where broadcast
  float scale;                                       // not negative
  int threads;
  bool causal;
  bool mask_is_bool;  // bytes, non-zero: attend; otherwise mask_dtype values, added to the scaled logits
  DType mask_dtype;
  DType dtype;
};
FASTDIFF_CPU_KERNEL(attention_in_registers, AttentionArgs)

#ifdef FASTDIFF_HAVE_AMX
namespace amx { void attention_bf16(const AttentionArgs&); }
#endif

inline bool attention(const AttentionArgs& args) {
#ifdef FASTDIFF_HAVE_AMX
  if (isa() >= Isa::amx && args.dtype == DType::bf16) return amx::attention_bf16(args), true;
#endif
  return attention_in_registers(args);
}

}  // namespace fastdiff::cpu
