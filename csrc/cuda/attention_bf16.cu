#include "attention_mma.cuh"

namespace fastdiff::cuda {

const char* attention_bf16(const cpu::AttentionArgs& args, Stream stream) { return attention_of<__nv_bfloat16>(args, stream); }

}  // namespace fastdiff::cuda
