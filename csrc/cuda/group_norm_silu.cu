// out = silu(group_norm(x + temb) * (1 + scale) + shift)
//
// Where a group is small, or there are many, one kernel takes its moments and then maps it, reading it again from a
// cache. Else groups are too few blocks for a GPU, and are cut into chunks: one kernel leaves the moments of every chunk
// in the workspace, the next merges those of the groups it needs and maps its part of x, often from the L2 cache.
#include <numeric>

#include "group_norm.cuh"

namespace fastdiff::cuda {
namespace {

// Blocks of a multiprocessor: left to choose, the compiler would spill for more.
constexpr int kChunkBlocks = 4, kTileBlocks = 2;

// Channel-major: a group is one run of memory. Block: chunk blockIdx.x % chunks of group blockIdx.x / chunks.
template <class T, int width>
struct Chunk {
  const Problem& p;
  uint32_t chunk, spatial, first, size;  // first: of the pixels of the chunk's first channel; size: in elements
  int64_t b, g, channel, offset;         // channel: the first

  __device__ __forceinline__ explicit Chunk(const Problem& p) : p(p), spatial(p.args.spatial) {
    const uint32_t group = blockIdx.x / p.chunks, groups = p.args.groups;
    chunk = blockIdx.x % p.chunks;
    b = group / groups, g = group % groups;
    const int64_t begin = chunk * p.chunk, left = p.group_size * p.args.spatial - begin;
    size = left < p.chunk ? left : p.chunk;
    channel = g * p.group_size + begin / p.args.spatial;
    first = begin % p.args.spatial;
    offset = g * p.group_size * p.args.spatial + begin;
  }

  __device__ __forceinline__ void read(uint32_t i, float pivot, float* v) const {
    float pack[width];
    load(p.x<T>(b) + offset + i, pack);
    const float temb = p.args.temb.data ? value(p.args.temb, b, channel + (first + i) / spatial, 0.0f) : 0.0f;
#pragma unroll
    for (int k = 0; k < width; ++k) v[k] = (pack[k] - pivot) + temb;
  }

  // By all threads of the block, and the same for all.
  __device__ __forceinline__ Moments moments(float pivot) const {
    constexpr int kUnroll = width == 1 ? 4 : 2;
    FASTDIFF_SHARED(Moments[kBlock / kWarp], scratch);
    Moments m{};
    uint32_t i = threadIdx.x * width;
    for (; i + (kUnroll - 1) * kBlock * width < size; i += kUnroll * kBlock * width) {
      float v[kUnroll * width];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) read(i + u * kBlock * width, pivot, v + u * width);
      m.add(v, kUnroll * width);
    }
    for (; i < size; i += kBlock * width) {
      float v[width];
      read(i, pivot, v);
      m.add(v, width);
    }
    block_merge(m, scratch);
    return of_first_lane(m);
  }

  __device__ __forceinline__ void map(float pivot, const Moments& m) const {
    float* maps = dynamic_shared<float>();  // sub, mul and add of up to kMaps channels
    const float rstd = rstd_of(p.args, m);
    const T* x = p.x<T>(b) + offset;
    T* out = p.out<T>(b) + offset;
    const uint32_t channels = (first + size - 1) / spatial + 1;
    for (uint32_t done = 0; done < channels; done += kMaps) {
      const bool last = channels - done <= kMaps;
      const uint32_t count = last ? channels - done : kMaps;
      if (done > 0) __syncthreads();  // the maps there have been read by all
      for (uint32_t c = threadIdx.x; c < count; c += kBlock) {
        const Map map(p.args, b, channel + done + c, pivot, m.mean, rstd);
        maps[3 * c] = map.sub, maps[3 * c + 1] = map.mul, maps[3 * c + 2] = map.add;
      }
      __syncthreads();
      const uint32_t end = last ? size : (done + kMaps) * spatial - first;
#pragma unroll 2
      for (uint32_t i = (done > 0 ? done * spatial - first : 0) + threadIdx.x * width; i < end; i += kBlock * width) {
        const float* map = maps + 3 * ((first + i) / spatial - done);
        float v[width];
        load(x + i, v);
#pragma unroll
        for (int k = 0; k < width; ++k) v[k] = finish<T>(p.args, v[k], map[0], map[1], map[2]);
        store(out + i, v);
      }
    }
  }
};

template <class T, int width>
__global__ void __launch_bounds__(kBlock) moments_kernel(const __grid_constant__ Problem p) {
  const Chunk<T, width> c(p);
  const float pivot = p.new_pivot<T>(c.b, c.g);
  const Moments m = c.moments(pivot);
  if (threadIdx.x == 0) store_moments(p.partial(c.b, c.g) + kStored * c.chunk, m, pivot);
}

template <class T, int width>
__global__ void __launch_bounds__(kBlock, kChunkBlocks) map_kernel(const __grid_constant__ Problem p) {
  const Chunk<T, width> c(p);
  const Moments m = merge_stored(p.partial(c.b, c.g), p.pieces, kStored);
  c.map(p.stored_pivot(c.b, c.g), m);
}

template <class T, int width>
__global__ void __launch_bounds__(kBlock, kChunkBlocks) whole_kernel(const __grid_constant__ Problem p) {
  const Chunk<T, width> c(p);
  const float pivot = p.new_pivot<T>(c.b, c.g);
  c.map(pivot, c.moments(pivot));
}

// Pixel-major: a block has a tile of channels and a chunk of pixels; a thread has a pack of channels and every
// rows-th pixel.
struct TilePlace {
  uint32_t chunk, piece, b;
  int64_t first_pixel, end_pixel;
  int first, first_group, groups;       // of the tile: its first channel, and the groups it has all or a part of
  int columns, channels, row, rows, c;  // c: the thread's first channel in the tile
  bool works;
};
template <int width>
__device__ __forceinline__ TilePlace tile_place(const Problem& p) {
  TilePlace t;
  t.chunk = blockIdx.x % p.chunks;
  const uint32_t tile = blockIdx.x / p.chunks % p.tiles, part = tile % p.parts;
  t.piece = t.chunk * p.parts + part;
  t.b = blockIdx.x / p.chunks / p.tiles;
  t.first_pixel = t.chunk * p.chunk;
  t.end_pixel = t.first_pixel + p.chunk < p.args.spatial ? t.first_pixel + p.chunk : p.args.spatial;
  t.first = tile / p.parts * p.stretch + part * p.tile;
  int left = static_cast<int>(p.args.channels) - t.first;
  if (p.parts > 1) left = p.stretch - part * p.tile;
  t.channels = left < p.tile ? left : p.tile;
  t.first_group = t.first / p.group_size;
  t.groups = p.parts > 1 ? 1 : t.channels / p.group_size;
  t.columns = p.tile / width;
  t.rows = blockDim.x / t.columns;
  t.row = threadIdx.x / t.columns;
  t.c = threadIdx.x % t.columns * width;
  t.works = t.row < t.rows && t.c < t.channels;
  return t;
}

// Leaves the pivot of every group of the tile in pivots and calls emit(group of the tile, moments) by all lanes of a
// warp. `scratch`, (row, channel of the tile), has their mean and m2.
template <class T, int width, class Emit>
__device__ __forceinline__ void tile_moments(const Problem& p, const TilePlace& t, float* pivots, float* scratch,
                                             const Emit& emit) {
  constexpr int kUnroll = width == 1 ? 4 : 2;
  for (int g = threadIdx.x / kWarp; g < t.groups; g += blockDim.x / kWarp)
    pivots[g] = p.new_pivot<T>(t.b, t.first_group + g);
  __syncthreads();
  if (t.works) {
    const T* x = p.x<T>(t.b) + t.first + t.c;
    float mean[width], m2[width], centre[width], count = 0.0f;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      centre[k] = pivots[(t.c + k) / p.group_size];
      mean[k] = m2[k] = 0.0f;
    }
#pragma unroll kUnroll
    for (int64_t pixel = t.first_pixel + t.row; pixel < t.end_pixel; pixel += t.rows) {
      float v[width];
      load(x + pixel * p.args.channels, v);
      count += 1.0f;
      const float share = __fdividef(1.0f, count);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float centred = v[k] - centre[k], delta = centred - mean[k];
        mean[k] = fmaf(delta, share, mean[k]);
        m2[k] = fmaf(delta, centred - mean[k], m2[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < width; ++k) {
      float* at = scratch + 2 * (t.row * p.tile + t.c + k);
      at[0] = mean[k] + value(p.args.temb, t.b, t.first + t.c + k, 0.0f), at[1] = m2[k];
    }
  }
  __syncthreads();
  const int pixels = t.end_pixel - t.first_pixel, channels = t.channels / t.groups;
  for (int g = threadIdx.x / kWarp; g < t.groups; g += blockDim.x / kWarp) {
    Moments m{};
    for (int i = threadIdx.x % kWarp; i < t.rows * channels; i += kWarp) {
      const int row = i / channels, c = g * channels + i % channels;
      const float* at = scratch + 2 * (row * p.tile + c);
      m.merge(static_cast<float>((pixels - row + t.rows - 1) / t.rows), at[0], at[1]);
    }
    warp_merge(m);
    emit(g, m);
  }
}

// The mean and 1 / deviation of groups first to end, to statistics[2 (g - first)], by all threads of the block.
__device__ __forceinline__ void merge_groups(const Problem& p, int64_t b, int64_t first, int64_t end,
                                             float* statistics) {
  for (int64_t g = first + threadIdx.x / kWarp; g < end; g += blockDim.x / kWarp) {
    const Moments m = merge_stored(p.partial(b, g), p.pieces, kStored);
    if (threadIdx.x % kWarp == 0) {
      statistics[2 * (g - first)] = m.mean;
      statistics[2 * (g - first) + 1] = rstd_of(p.args, m);
    }
  }
  __syncthreads();
}

// `statistics` as of merge_groups, and pivot_of(group of the tile).
template <class T, int width, class PivotOf>
__device__ __forceinline__ void tile_map(const Problem& p, const float* statistics, const PivotOf& pivot_of) {
  const TilePlace t = tile_place<width>(p);  // again: held since the moments, it would be spilled
  if (!t.works) return;
  float sub[width], mul[width], add[width];
#pragma unroll
  for (int k = 0; k < width; ++k) {
    const int c = t.first + t.c + k, g = c / p.group_size - t.first_group;
    const Map map(p.args, t.b, c, pivot_of(g), statistics[2 * g], statistics[2 * g + 1]);
    sub[k] = map.sub, mul[k] = map.mul, add[k] = map.add;
  }
  const T* x = p.x<T>(t.b) + t.first + t.c;
  T* out = p.out<T>(t.b) + t.first + t.c;
#pragma unroll 2
  for (int64_t pixel = t.first_pixel + t.row; pixel < t.end_pixel; pixel += t.rows) {
    float v[width];
    load(x + pixel * p.args.channels, v);
#pragma unroll
    for (int k = 0; k < width; ++k) v[k] = finish<T>(p.args, v[k], sub[k], mul[k], add[k]);
    store(out + pixel * p.args.channels, v);
  }
}

template <class T, int width>
__global__ void __launch_bounds__(kBlock, kTileBlocks)
    tile_moments_kernel(const __grid_constant__ Problem p) {
  const TilePlace t = tile_place<width>(p);
  float* pivots = dynamic_shared<float>();
  tile_moments<T, width>(p, t, pivots, pivots + t.groups, [&](int g, const Moments& m) {
    if (threadIdx.x % kWarp == 0) store_moments(p.partial(t.b, t.first_group + g) + kStored * t.piece, m, pivots[g]);
  });
}

template <class T, int width>
__global__ void __launch_bounds__(kBlock, kTileBlocks)
    tile_map_kernel(const __grid_constant__ Problem p) {
  float* statistics = dynamic_shared<float>();
  const TilePlace t = tile_place<width>(p);
  merge_groups(p, t.b, t.first_group, t.first_group + t.groups, statistics);
  tile_map<T, width>(p, statistics, [&](int g) { return p.stored_pivot(t.b, t.first_group + g); });
}

template <class T, int width>
__global__ void __launch_bounds__(kBlock, kTileBlocks)
    whole_tile_kernel(const __grid_constant__ Problem p) {
  const TilePlace t = tile_place<width>(p);
  float* pivots = dynamic_shared<float>();
  float* statistics = pivots + t.groups;
  tile_moments<T, width>(p, t, pivots, statistics + 2 * t.groups, [&](int g, const Moments& m) {
    if (threadIdx.x % kWarp) return;
    statistics[2 * g] = m.mean, statistics[2 * g + 1] = rstd_of(p.args, m);
  });
  __syncthreads();
  tile_map<T, width>(p, statistics, [&](int g) { return pivots[g]; });
}

// Channel-major x to pixel-major out: a block transposes kSide channels by kSide pixels in shared memory.
constexpr int kSide = 64;
template <class T, int width>
__global__ void __launch_bounds__(kBlock) transpose_kernel(const __grid_constant__ Problem p) {
  FASTDIFF_SHARED(float[kSide][kSide + 1], tile);
  FASTDIFF_SHARED(float[2 * kSide], statistics);
  FASTDIFF_SHARED(float[kSide][3], maps);  // sub, mul, add
  const uint32_t pixel_tiles = (p.args.spatial + kSide - 1) / kSide;
  const uint32_t channel_tiles = (p.args.channels + kSide - 1) / kSide;
  const int64_t pixel = int64_t{blockIdx.x % pixel_tiles} * kSide, b = blockIdx.x / pixel_tiles / channel_tiles;
  const int first = blockIdx.x / pixel_tiles % channel_tiles * kSide;
  const int pixels = p.args.spatial - pixel < kSide ? p.args.spatial - pixel : kSide;
  const int channels = p.args.channels - first < kSide ? p.args.channels - first : kSide;
  const int first_group = first / p.group_size;
  merge_groups(p, b, first_group, (first + channels - 1) / p.group_size + 1, statistics);
  if (const int c = threadIdx.x; c < channels) {
    const int g = (first + c) / p.group_size;
    const float* of_group = statistics + 2 * (g - first_group);
    const Map map(p.args, b, first + c, p.stored_pivot(b, g), of_group[0], of_group[1]);
    maps[c][0] = map.sub, maps[c][1] = map.mul, maps[c][2] = map.add;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSide * kSide / width; i += kBlock) {
    const int c = i / (kSide / width), at = i % (kSide / width) * width;
    if (c >= channels || at >= pixels) continue;
    const float* map = maps[c];
    float v[width];
    load(p.x<T>(b) + (first + c) * p.args.spatial + pixel + at, v);
#pragma unroll
    for (int k = 0; k < width; ++k) tile[c][at + k] = finish<T>(p.args, v[k], map[0], map[1], map[2]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSide * kSide / width; i += kBlock) {
    const int at = i / (kSide / width), c = i % (kSide / width) * width;
    if (at >= pixels || c >= channels) continue;
    float v[width];
#pragma unroll
    for (int k = 0; k < width; ++k) v[k] = tile[c + k][at];
    store(p.out<T>(b) + (pixel + at) * p.args.channels + first + c, v);
  }
}

int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Chunks of a job of `elements`, so that `jobs` of them fill the GPU a few times over; 1 where one kernel does it all.
int64_t chunks_of(int64_t elements, int64_t jobs) {
  if (elements <= kWhole) return 1;
  const int64_t wanted = std::min(kMaxChunks, ceil_div(4 * multiprocessors(), jobs));
  return std::max<int64_t>(1, std::min(wanted, ceil_div(elements, kChunk)));
}

// Whether a pixel-major tile takes whole groups; else a block has a part of one.
bool whole_groups(const Problem& p, int width) { return std::lcm(p.group_size, width) <= kBlock * width; }

template <class T, int width>
const char* pixel_major(Problem& p, Stream stream) {
  const Args& a = p.args;
  if (whole_groups(p, width)) {
    p.tile = std::min(round_up(a.channels, width), round_up(64, std::lcm(p.group_size, width)));  // about 64 channels
    p.parts = 1, p.stretch = p.tile;
    p.tiles = ceil_div(a.channels, p.tile);
  } else {
    p.tile = round_up(ceil_div(p.group_size, ceil_div(p.group_size, kBlock * width)), width);
    p.parts = ceil_div(p.group_size, p.tile), p.stretch = p.group_size;
    p.tiles = a.groups * p.parts;
  }
  const int64_t chunks = std::min(kMaxChunks / p.parts, chunks_of(a.spatial * p.tile, a.batch * p.tiles));
  p.chunk = ceil_div(a.spatial, chunks);
  p.chunks = ceil_div(a.spatial, p.chunk);
  p.pieces = p.chunks * p.parts;
  const int columns = p.tile / width, rows = std::max<int64_t>(1, std::min<int64_t>(kBlock / columns, p.chunk));
  const int64_t blocks = a.batch * p.tiles * p.chunks;
  const dim3 block(round_up(rows * columns, kWarp));
  const int rows_that_fit = block.x / columns, groups = std::max(1, p.tile / p.group_size);
  const size_t moments = 4 * (groups + 2 * rows_that_fit * p.tile), statistics = 8 * groups;  // bytes
  if (p.pieces == 1) return launch(whole_tile_kernel<T, width>, blocks, block, moments + statistics, stream, p);
  if (const char* error = launch(tile_moments_kernel<T, width>, blocks, block, moments, stream, p)) return error;
  return launch(tile_map_kernel<T, width>, blocks, block, statistics, stream, p);
}

template <class T, int width>
const char* channel_major(Problem& p, Stream stream) {
  const Args& a = p.args;
  const int64_t size = p.group_size * a.spatial, groups = a.batch * a.groups;
  p.chunk = round_up(ceil_div(size, chunks_of(size, groups)), width);
  p.chunks = p.pieces = ceil_div(size, p.chunk);
  const int64_t blocks = groups * p.chunks, tiles = ceil_div(a.spatial, kSide) * ceil_div(a.channels, kSide);
  const dim3 block(kBlock);
  const size_t maps = 12 * std::min<int64_t>(p.group_size, kMaps);  // bytes
  if (p.chunks == 1 && !a.out_pixel_major) return launch(whole_kernel<T, width>, blocks, block, maps, stream, p);
  if (const char* error = launch(moments_kernel<T, width>, blocks, block, 0, stream, p)) return error;
  if (!a.out_pixel_major) return launch(map_kernel<T, width>, blocks, block, maps, stream, p);
  return launch(transpose_kernel<T, width>, a.batch * tiles, block, 0, stream, p);
}

}  // namespace

const char* group_norm_silu(const Args& args, float* workspace, Stream stream) {
  if (args.batch * args.channels * args.spatial == 0) return nullptr;
  Problem p{};
  p.args = args, p.workspace = workspace;
  p.group_size = static_cast<int>(args.channels / args.groups);
  if (p.group_size > kMaxGroupChannels || args.spatial >= kMaxPixels)
    return "group_norm_silu: a group has more than 32768 channels, or a channel 2^31 elements";
  bool packs = packable(args.x) && packable(args.out) && packable(args.x_batch_stride, args.dtype);
  if (args.x_pixel_major || args.out_pixel_major) packs = packs && packable(args.channels, args.dtype);
  if (!args.x_pixel_major) packs = packs && packable(args.spatial, args.dtype);
  const int pack = args.dtype == DType::f32 ? 4 : 8;
  if (args.x_pixel_major && !whole_groups(p, pack)) packs = packs && packable(p.group_size, args.dtype);
  return dispatch(args.dtype, packs, [&](auto tag, auto width) {
    return args.x_pixel_major ? pixel_major<decltype(tag), width>(p, stream)
                              : channel_major<decltype(tag), width>(p, stream);
  });
}

}  // namespace fastdiff::cuda
