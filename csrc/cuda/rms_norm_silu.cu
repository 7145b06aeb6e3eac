// out = silu(x / rms(x) * weight * (1 + scale) + bias * (1 + scale) + shift), the rms being over channels
//
// A block has some pixels at a time, with all their channels. Threads that share a pixel, or a pack of neighbouring
// pixels where these are innermost, take turns at its channels, or packs of channels. What a thread reads for the sums it
// holds in registers for the result; what does not fit there is read again, from a cache. A block has several such tiles
// of pixels, so that the map of the channels, which lies in shared memory, is computed once for all of them.
#include "reduce.cuh"

namespace fastdiff::cuda {
namespace {

using Args = cpu::RmsNormSiluArgs;

constexpr int kBlock = 256;
template <int width>
constexpr int kHeld = width == 1 ? 8 : 4;  // packs of a thread
constexpr int kTurns = 16;                  // tiles of a block at most
#ifdef FASTDIFF_CUDA_EMULATION  // so that blocks of small tensors take turns
int64_t enough_blocks() { return 2; }
#else
int64_t enough_blocks() { return 8 * multiprocessors(); }
#endif

struct Geometry {
  Args args;
  int64_t tiles;    // of a sample
  uint32_t blocks;  // of a sample
  int lanes;        // threads that share a pixel, or a pack of them: a power of two
  float bound;      // of 1 / the Euclidean norm, where it is clamped
};

template <class T, int width, bool pixel_major>
struct Tile {
  const Args& args;
  const T* x;
  T* out;
  int64_t lane, lanes;

  // Packs lie along the channels, or along the pixels.
  static constexpr int kStep = pixel_major ? width : 1;
  __device__ __forceinline__ int64_t channel(int64_t item) const { return (item * lanes + lane) * kStep; }
  __device__ __forceinline__ int64_t offset(int64_t c) const { return pixel_major ? c : c * args.spatial; }

  // Calls body(channel, values of a pack) for all of the thread's, those in `held` from there, if it has them.
  template <bool reread, class Body>
  __device__ __forceinline__ void for_each(float (&held)[kHeld<width>][width], int64_t channels, const Body& body) const {
#pragma unroll
    for (int i = 0; i < kHeld<width>; ++i) {
      const int64_t c = channel(i);
      if (c >= channels) continue;
      if (!reread) load(x + offset(c), held[i]);
      body(c, held[i]);
    }
#pragma unroll 2
    for (int64_t c = channel(kHeld<width>); c < channels; c += lanes * kStep) {
      float v[width];
      load(x + offset(c), v);
      body(c, v);
    }
  }
};

template <class T, int width, bool pixel_major>
__global__ void __launch_bounds__(kBlock, 2) rms_norm_kernel(const __grid_constant__ Geometry g) {
  constexpr int kSums = pixel_major ? 1 : width;  // pixels of a thread
  FASTDIFF_SHARED(float[2][kBlock * kSums], scratch);
  const Args& args = g.args;
  const int lanes = g.lanes, places = kBlock / lanes;
  const int lane = pixel_major ? threadIdx.x % lanes : threadIdx.x / places;
  const int place = pixel_major ? threadIdx.x / lanes : threadIdx.x % places;
  const int64_t b = blockIdx.x / g.blocks;

  float* mul = dynamic_shared<float>();
  float* add = mul + (args.channels + 3) / 4 * 4;  // aligned for packs
  for (int64_t c = threadIdx.x; c < args.channels; c += kBlock) {
    const float scale = 1.0f + value(args.scale, b, c, 0.0f);
    mul[c] = value(args.weight, b, c, 1.0f) * scale;
    add[c] = value(args.bias, b, c, 0.0f) * scale + value(args.shift, b, c, 0.0f);
  }
  __syncthreads();

  const T* x = static_cast<const T*>(args.x) + b * args.x_batch_stride;
  T* out = static_cast<T*>(args.out) + b * args.channels * args.spatial;
  int turn = 0;
  for (int64_t tile = blockIdx.x % g.blocks; tile < g.tiles; tile += g.blocks, ++turn) {
    const int64_t pixel = (tile * places + place) * kSums;
    // Threads without a pixel still meet the others.
    const int64_t channels = pixel < args.spatial ? args.channels : 0, start = pixel_major ? pixel * channels : pixel;
    const Tile<T, width, pixel_major> mine{args, x + start, out + start, lane, lanes};
    float held[kHeld<width>][width], factor[kSums] = {};
    mine.template for_each<false>(held, channels, [&](int64_t, const float(&v)[width]) {
#pragma unroll
      for (int k = 0; k < width; ++k) factor[k % kSums] = fmaf(v[k], v[k], factor[k % kSums]);
    });
    if constexpr (pixel_major) {
      lanes_sum(factor, lanes);
    } else {
      // Of the lanes in a warp, then of the warps: a barrier, the next tile's sums going elsewhere.
      for (int bit = kWarp / 2; bit >= places; bit /= 2)
#pragma unroll
        for (int k = 0; k < kSums; ++k) factor[k] += __shfl_xor_sync(kAllLanes, factor[k], bit);
      const int sharers = places < kWarp ? kWarp / places : 1;  // lanes in a warp; their first leaves the sum
      float* sums = scratch[turn % 2];
      if (lane % sharers == 0)
#pragma unroll
        for (int k = 0; k < kSums; ++k) sums[(lane / sharers * places + place) * kSums + k] = factor[k];
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        factor[k] = 0.0f;
        for (int w = 0; w < lanes / sharers; ++w) factor[k] += sums[(w * places + place) * kSums + k];
      }
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      const float count = static_cast<float>(args.channels);
      if (args.clamp) {
        const float inverse = inverse_sqrt(factor[k]);
        factor[k] = sqrtf(count) * (inverse > g.bound ? g.bound : inverse);  // NaN stays
      } else {
        factor[k] = inverse_sqrt(divide(factor[k], count) + static_cast<float>(args.eps));
      }
    }
    mine.template for_each<true>(held, channels, [&](int64_t c, float(&v)[width]) {
      float m[Tile<T, width, pixel_major>::kStep], a[Tile<T, width, pixel_major>::kStep];
      load(mul + c, m), load(add + c, a);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const int of = pixel_major ? k : 0;
        const float y = fmaf(v[k] * factor[k % kSums], m[of], a[of]);
        v[k] = args.silu ? silu<T>(y) : y;
      }
      store(mine.out + mine.offset(c), v);
    });
  }
}

// How many threads share a pixel, so that what they read at once is contiguous, and if it can be, all is held.
template <int width>
int lanes_of(const Args& a) {
  if (a.pixel_major) return power_of_two(ceil_div(a.channels, width), kWarp);
  constexpr int kMost = width == 1 ? kBlock / kWarp : kBlock / 2, kLeast = width == 1 ? 1 : kBlock / kWarp;
  return std::max(kLeast, power_of_two(ceil_div(a.channels, kHeld<width>), kMost));
}

}  // namespace

const char* rms_norm_silu(const Args& args, Stream stream) {
  if (args.batch * args.channels * args.spatial == 0) return nullptr;
  if (args.channels > kMaxRmsChannels) return "rms_norm_silu: there are more than 4096 channels";
  const int64_t innermost = args.pixel_major ? args.channels : args.spatial;
  const bool packs = packable(args.x) && packable(args.out) && packable(innermost, args.dtype) &&
                     (args.batch == 1 || packable(args.x_batch_stride, args.dtype));
  return dispatch(args.dtype, packs, [&](auto tag, auto width) {
    using T = decltype(tag);
    Geometry g{.args = args, .lanes = lanes_of<width>(args), .bound = static_cast<float>(1.0 / args.eps)};
    g.tiles = ceil_div(args.spatial, kBlock / g.lanes * (args.pixel_major ? 1 : int{width}));
    const int64_t turns = std::clamp<int64_t>(args.batch * g.tiles / enough_blocks(), 1, kTurns);
    g.blocks = static_cast<uint32_t>(ceil_div(g.tiles, turns));
    const size_t maps = 8 * (args.channels + 4);  // bytes
    const auto run = [&](auto kernel) { return launch(kernel, args.batch * g.blocks, dim3(kBlock), maps, stream, g); };
    return args.pixel_major ? run(rms_norm_kernel<T, width, true>) : run(rms_norm_kernel<T, width, false>);
  });
}

}  // namespace fastdiff::cuda
