// What the kernels of group_norm_silu share: the problem's geometry, and the map of a channel.
//
// The moments are taken relative to a pivot, the mean of 32 of the group's elements, so that a mean that is large beside
// the deviations costs no digits. Then everything per channel is folded into (x - sub) * mul + add: what `sub` loses by
// rounding goes into `add`.
#pragma once

#include "reduce.cuh"

namespace fastdiff::cuda {
namespace {

using Args = cpu::GroupNormSiluArgs;

constexpr int kBlock = 256;
static_assert(kMaxGroupChannels <= kBlock * kMaxChunks);
constexpr int64_t kChunk = 4096;  // a block's elements at least
#ifdef FASTDIFF_CUDA_EMULATION  // so that small tensors go all ways
constexpr int64_t kWhole = 2048;
constexpr int kMaps = 16;
#else
constexpr int64_t kWhole = 32768;  // elements: a second launch costs more than a block that does all of these
constexpr int kMaps = 1024;        // channels that a block has the maps of at a time
#endif

// What the kernels share. Group g of sample b has the moments of its `pieces`, and its pivot, at partial(b, g).
struct Problem {
  Args args;
  float* workspace;
  int64_t chunk;  // elements of a group (channel-major), or pixels (pixel-major)
  uint32_t chunks, pieces;
  int group_size;  // channels
  // Pixel-major: a block has a tile of channels, in whole packs: whole groups, or one of several parts of a large one.
  // `stretch`: the channels that `parts` tiles have.
  int tile, stretch;
  uint32_t tiles, parts;

  __device__ __forceinline__ float* partial(int64_t b, int64_t g) const {
    return workspace + kStored * pieces * (b * args.groups + g);
  }
  template <class T>
  __device__ __forceinline__ const T* x(int64_t b) const {
    return static_cast<const T*>(args.x) + b * args.x_batch_stride;
  }
  template <class T>
  __device__ __forceinline__ T* out(int64_t b) const {
    return static_cast<T*>(args.out) + b * args.channels * args.spatial;
  }
  // Computed by a warp.
  template <class T>
  __device__ __forceinline__ float new_pivot(int64_t b, int64_t g) const {
    const int64_t lane = threadIdx.x % kWarp;
    const int64_t c = g * group_size + lane * group_size / kWarp, pixel = lane * args.spatial / kWarp;
    float sum[1] = {load_one(x<T>(b) + (args.x_pixel_major ? pixel * args.channels + c : c * args.spatial + pixel))};
    warp_sum(sum);
    return sum[0] / kWarp;
  }
  __device__ __forceinline__ float stored_pivot(int64_t b, int64_t g) const {
    return load_one(partial(b, g) + kStored - 1);
  }
};

// The map of one channel, given its group's pivot and the moments relative to it.
struct Map {
  float sub, mul, add;
  __device__ __forceinline__ Map(const Args& args, int64_t b, int64_t c, float pivot, float mean, float rstd) {
    const float scale = 1.0f + value(args.scale, b, c, 0.0f);
    float lost = 0.0f;
    sub = add_exactly(pivot, add_exactly(mean, -value(args.temb, b, c, 0.0f), lost), lost);
    mul = rstd * value(args.weight, b, c, 1.0f) * scale;
    add = value(args.bias, b, c, 0.0f) * scale + value(args.shift, b, c, 0.0f) - lost * mul;
  }
};

template <class T>
__device__ __forceinline__ float finish(const Args& args, float x, float sub, float mul, float add) {
  const float y = fmaf(x - sub, mul, add);
  return args.silu ? silu<T>(y) : y;
}

__device__ __forceinline__ float rstd_of(const Args& args, const Moments& m) {
  return inverse_sqrt(divide(m.m2, m.count) + static_cast<float>(args.eps));
}

}  // namespace
}  // namespace fastdiff::cuda
