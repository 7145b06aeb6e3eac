// What csrc/cuda offers to csrc/ops: no CUDA header, no torch header. The arguments are those of the CPU kernels.
//
// Every function queues its kernels on `stream`, allocates nothing, does not wait, and returns a message or null.
#pragma once

#include "../cpu/adaln.h"
#include "../cpu/attention.h"
#include "../cpu/cfg_combine.h"
#include "../cpu/geglu.h"
#include "../cpu/gelu_tanh.h"
#include "../cpu/group_norm_silu.h"
#include "../cpu/qk_norm_rope.h"
#include "../cpu/rms_norm_silu.h"
#include "../cpu/scheduler_step.h"
#include "../cpu/swiglu.h"

#ifdef FASTDIFF_HAVE_CUDA
#define FASTDIFF_CUDA_KERNEL(declaration) declaration;
#else
#define FASTDIFF_CUDA_KERNEL(declaration) \
  inline declaration { return "fastdiff was built without CUDA"; }
#endif

struct CUstream_st;  // CUDA's

namespace fastdiff::cuda {

using Stream = ::CUstream_st*;

// Scratch memory, in floats, that group_norm_silu and cfg_combine never need more of.
constexpr int64_t kMaxChunks = 128;
inline int64_t workspace_size(const cpu::GroupNormSiluArgs& args) { return 4 * kMaxChunks * args.batch * args.groups; }
inline int64_t workspace_size(const cpu::CfgCombineArgs& args) {
  return args.guidance_rescale > 0 ? 8 * kMaxChunks * args.samples : 0;
}

// The longest row of a norm of qk_norm_rope: it is held in registers.
constexpr int64_t kMaxNormed = 16384;
// The largest group of group_norm_silu in channels, and its largest channel.
constexpr int64_t kMaxGroupChannels = 256 * kMaxChunks;
constexpr int64_t kMaxPixels = int64_t{1} << 31;
// The most channels of rms_norm_silu: shared memory has a map of each.
constexpr int64_t kMaxRmsChannels = 4096;

FASTDIFF_CUDA_KERNEL(const char* adaln(const cpu::AdalnArgs& args, Stream stream))
FASTDIFF_CUDA_KERNEL(const char* attention_bf16(const cpu::AttentionArgs& args, Stream stream))
FASTDIFF_CUDA_KERNEL(const char* attention_fp16(const cpu::AttentionArgs& args, Stream stream))
FASTDIFF_CUDA_KERNEL(const char* attention_fp32(const cpu::AttentionArgs& args, Stream stream))
FASTDIFF_CUDA_KERNEL(const char* cfg_combine(const cpu::CfgCombineArgs& args, float* workspace, Stream stream))
FASTDIFF_CUDA_KERNEL(const char* geglu(const cpu::GegluArgs& args, Stream stream))
FASTDIFF_CUDA_KERNEL(const char* gelu_tanh(const cpu::GeluTanhArgs& args, Stream stream))
FASTDIFF_CUDA_KERNEL(const char* group_norm_silu(const cpu::GroupNormSiluArgs& args, float* workspace, Stream stream))
FASTDIFF_CUDA_KERNEL(const char* qk_norm_rope(const cpu::QkNormRopeArgs& args, Stream stream))
FASTDIFF_CUDA_KERNEL(const char* rms_norm_silu(const cpu::RmsNormSiluArgs& args, Stream stream))
FASTDIFF_CUDA_KERNEL(const char* scheduler_step(const cpu::SchedulerStepArgs& args, Stream stream))
FASTDIFF_CUDA_KERNEL(const char* swiglu(const cpu::SwigluArgs& args, Stream stream))

inline const char* attention(const cpu::AttentionArgs& args, Stream stream) {
  if (args.dtype == cpu::DType::f32) return attention_fp32(args, stream);
  return args.dtype == cpu::DType::bf16 ? attention_bf16(args, stream) : attention_fp16(args, stream);
}

}  // namespace fastdiff::cuda
