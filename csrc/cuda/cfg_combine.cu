// out = uncond + s (cond - uncond), rescaled per sample by r std(cond) / std(out) + 1 - r where r > 0
//
// With a rescale, a first kernel leaves the moments of chunks of each sample in the workspace.
#include "reduce.cuh"

namespace fastdiff::cuda {
namespace {

using Args = cpu::CfgCombineArgs;

constexpr int kBlock = 256;
constexpr int64_t kChunk = 4096;  // a block's elements at least

template <class T, int width>
__device__ __forceinline__ void guided(const Args& args, int64_t at, int64_t left, float (&cond)[width],
                                       float (&out)[width]) {
  load(static_cast<const T*>(args.uncond) + at, left, out);
  load(static_cast<const T*>(args.cond) + at, left, cond);
#pragma unroll
  for (int i = 0; i < width; ++i) out[i] = fmaf(args.guidance_scale, cond[i] - out[i], out[i]);
}

// Of chunk c of sample s: two packs at workspace[8 (s chunks + c)], the moments of cond and of the guided result.
template <class T, int width>
__global__ void __launch_bounds__(kBlock)
    cfg_moments_kernel(const __grid_constant__ Args args, float* workspace, uint32_t chunks, int64_t chunk) {
  FASTDIFF_SHARED(Moments[2][kBlock / kWarp], scratch);
  const int64_t first = static_cast<int64_t>(blockIdx.x / chunks) * args.numel;
  const int64_t begin = static_cast<int64_t>(blockIdx.x % chunks) * chunk;
  const int64_t end = begin + chunk < args.numel ? begin + chunk : args.numel;
  Moments of_cond{}, of_out{};
  float cond_pivot[1], out_pivot[1];  // so that a large mean costs no digits
  guided<T>(args, first, 1, cond_pivot, out_pivot);
  for (int64_t i = begin + threadIdx.x * width; i < end; i += kBlock * width) {
    float cond[width], out[width];
    guided<T>(args, first + i, end - i, cond, out);
    const int n = end - i < width ? static_cast<int>(end - i) : width;
#pragma unroll
    for (int k = 0; k < width; ++k) cond[k] -= cond_pivot[0], out[k] -= out_pivot[0];
    of_cond.add(cond, n);
    of_out.add(out, n);
  }
  block_merge(of_cond, scratch[0]);
  block_merge(of_out, scratch[1]);
  if (threadIdx.x == 0) {
    float* at = workspace + 2 * kStored * static_cast<int64_t>(blockIdx.x);
    store_moments(at, of_cond);
    store_moments(at + kStored, of_out);
  }
}

// chunks: of moments in the workspace, or 0 for no rescale.
template <class T, int width>
__global__ void __launch_bounds__(kBlock)
    cfg_combine_kernel(const __grid_constant__ Args args, const float* workspace, uint32_t blocks, uint32_t chunks) {
  FASTDIFF_SHARED(float[2], deviation);
  const int64_t sample = blockIdx.x / blocks;
  float factor = 1.0f;
  if (chunks > 0) {
    if (const int warp = threadIdx.x / kWarp; warp < 2) {
      const Moments m = merge_stored(workspace + kStored * (2 * sample * chunks + warp), chunks, 2 * kStored);
      if (threadIdx.x % kWarp == 0) deviation[warp] = sqrtf(m.m2 / (m.count - 1.0f));
    }
    __syncthreads();
    factor = args.guidance_rescale * (deviation[0] / deviation[1]) + (1.0f - args.guidance_rescale);
  }
  const int64_t i = (static_cast<int64_t>(blockIdx.x % blocks) * kBlock + threadIdx.x) * width;
  if (i >= args.numel) return;
  const int64_t at = sample * args.numel + i;
  float cond[width], out[width];
  guided<T>(args, at, args.numel - i, cond, out);
#pragma unroll
  for (int k = 0; k < width; ++k) out[k] *= factor;
  store(static_cast<T*>(args.out) + at, args.numel - i, out);
}

}  // namespace

const char* cfg_combine(const Args& args, float* workspace, Stream stream) {
  if (args.samples == 0 || args.numel == 0) return nullptr;
  const bool packs = packable(args.uncond) && packable(args.cond) && packable(args.out) &&
                     (args.samples == 1 || packable(args.numel, args.dtype));
  return dispatch(args.dtype, packs, [&](auto tag, auto width) {
    using T = decltype(tag);
    int64_t chunks = 0;
    if (args.guidance_rescale > 0) {
      const int64_t chunk = ceil_div(ceil_div(args.numel, std::min(kMaxChunks, ceil_div(args.numel, kChunk))), 8) * 8;
      chunks = ceil_div(args.numel, chunk);
      const char* error = launch(cfg_moments_kernel<T, width>, args.samples * chunks, dim3(kBlock), 0, stream,
                                 args, workspace, chunks, chunk);
      if (error) return error;
    }
    const int64_t blocks = ceil_div(args.numel, kBlock * width);  // of a sample
    return launch(cfg_combine_kernel<T, width>, args.samples * blocks, dim3(kBlock), 0, stream, args,
                  static_cast<const float*>(workspace), blocks, chunks);
  });
}

}  // namespace fastdiff::cuda
