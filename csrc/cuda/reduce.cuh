// Sums over warps and blocks, and moments that are merged without cancellation.
#pragma once

#include "device.cuh"

namespace fastdiff::cuda {

template <int n>
__device__ __forceinline__ void warp_sum(float (&v)[n]) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] += __shfl_xor_sync(kAllLanes, v[i], bit);
}

// Sums over groups of `lanes` threads, a power of two up to 32, that lie side by side in a warp.
template <int n>
__device__ __forceinline__ void lanes_sum(float (&v)[n], int lanes) {
  for (int bit = lanes / 2; bit > 0; bit /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] += __shfl_xor_sync(kAllLanes, v[i], bit);
}

// Sums over the `warps` warps that share a row, `row` counting the rows of the block. All threads of the block call
// it. `scratch` holds n floats per warp and is not to be used again before the next barrier but one: callers alternate.
template <int n>
__device__ __forceinline__ void row_sum(float (&v)[n], float* scratch, int warps, int row) {
  warp_sum(v);
  if (warps == 1) return;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < n; ++i) scratch[(row * warps + warp) * n + i] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = 0.0f;
  for (int w = 0; w < warps; ++w)
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] += scratch[(row * warps + w) * n + i];
}

// a / b and 1 / sqrt(v) to about an ulp, without the calls that the correctly rounded forms make, around which registers
// would be spilled. The correction is NaN where the result is 0 or infinite already.
__device__ __forceinline__ float divide(float a, float b) {
  const float quotient = __fdividef(a, b), error = fmaf(-quotient, b, a);
  return error == error ? fmaf(error, __fdividef(1.0f, b), quotient) : quotient;
}
__device__ __forceinline__ float inverse_sqrt(float v) {
  const float root = rsqrtf(v), error = fmaf(-v * root, root, 1.0f);
  return error == error ? fmaf(0.5f * root, error, root) : root;
}

// a + b as a rounded sum and what it lost (Knuth).
__device__ __forceinline__ float add_exactly(float a, float b, float& lost) {
  const float sum = a + b, part = sum - a;
  lost += (a - (sum - part)) + (b - part);
  return sum;
}

// Count, mean and sum of squared distances from it; combined as by Chan, Golub and LeVeque (1983).
struct Moments {
  float count, mean, m2;

  __device__ __forceinline__ void merge(float n, float other_mean, float other_m2) {
    const float both = count + n;
    // No branch: between shuffles it would cost a call each.
    const float delta = other_mean - mean, share = both == 0.0f ? 0.0f : __fdividef(n, both);
    mean += delta * share;
    m2 += other_m2 + delta * delta * count * share;
    count = both;
  }
  // Of `n` values that lie in registers: two passes.
  template <int size>
  __device__ __forceinline__ void add(const float (&v)[size], int n) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < size; ++i)
      if (i < n) sum += v[i];
    const float centre = __fdividef(sum, static_cast<float>(n));
#pragma unroll
    for (int i = 0; i < size; ++i)
      if (i < n) squares += (v[i] - centre) * (v[i] - centre);
    merge(static_cast<float>(n), centre, squares);
  }
};

__device__ __forceinline__ void warp_merge(Moments& m) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) {
    const float n = __shfl_xor_sync(kAllLanes, m.count, bit), mean = __shfl_xor_sync(kAllLanes, m.mean, bit);
    m.merge(n, mean, __shfl_xor_sync(kAllLanes, m.m2, bit));
  }
}

__device__ __forceinline__ Moments of_first_lane(const Moments& m) {
  return {__shfl_sync(kAllLanes, m.count, 0), __shfl_sync(kAllLanes, m.mean, 0), __shfl_sync(kAllLanes, m.m2, 0)};
}

// Merges the moments of a block's threads, a multiple of 32. `scratch`: one per warp.
__device__ __forceinline__ void block_merge(Moments& m, Moments* scratch) {
  warp_merge(m);
  const int thread = threadIdx.x + blockDim.x * threadIdx.y, warps = blockDim.x * blockDim.y / kWarp;
  if (thread % kWarp == 0) scratch[thread / kWarp] = m;
  __syncthreads();
  m = thread % kWarp < warps ? scratch[thread % kWarp] : Moments{};
  warp_merge(m);
}

// Partial moments as they lie in the workspace: a pack of count, mean, m2 and a number of the caller's.
constexpr int kStored = 4;
__device__ __forceinline__ void store_moments(float* p, const Moments& m, float extra = 0.0f) {
  store(p, {m.count, m.mean, m.m2, extra});
}
// A warp merges `count` partial moments that lie `stride` floats apart; all lanes get the same result.
__device__ __forceinline__ Moments merge_stored(const float* p, int count, int64_t stride) {
  Moments m{};
  for (int first = 0; first < count; first += kWarp) {  // the same number of rounds for all lanes
    const int i = first + threadIdx.x % kWarp;
    float stored[kStored] = {};
    if (i < count) load(p + i * stride, stored);
    m.merge(stored[0], stored[1], stored[2]);
  }
  warp_merge(m);
  return of_first_lane(m);
}

}  // namespace fastdiff::cuda
