#include "attention_mma.cuh"

namespace fastdiff::cuda {

const char* attention_fp16(const cpu::AttentionArgs& args, Stream stream) { return attention_of<__half>(args, stream); }

}  // namespace fastdiff::cuda
