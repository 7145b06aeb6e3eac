// Means and variances that stay accurate for any data, in one pass over memory.
//
// Within a block of some thousand values, sums of (x - centre) and its square are kept in fp32, where centre is
// the mean of all blocks before (for the first: of an eighth of itself); blocks are merged in double (Chan et al.,
// 1979). What a block far from its centre loses in precision, a few ulp of count * distance^2, is small against
// what the distance adds to the variance.
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int64_t kBlock = 8192;      // values per block: 32 KiB of fp32, within L1
constexpr int64_t kPixelBlock = 128;  // pixels per block where every channel has its own sums

// How far ahead memory is asked for. The hardware's prefetchers alone leave 15 to 30 % of the time to waiting.
constexpr int64_t kReadAhead = 2048, kWriteAhead = 512;  // bytes
constexpr int64_t kPixelsAhead = 8;
inline void read_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kReadAhead); }
inline void write_ahead(void* p) { __builtin_prefetch(static_cast<char*>(p) + kWriteAhead, 1); }

// Count, mean and sum of squared deviations of a set of values.
struct Moments {
  double count = 0, mean = 0, m2 = 0;
  void merge(const Moments& other) {
    const double total = count + other.count, delta = other.mean - mean;
    m2 += other.m2 + delta * delta * (count * other.count / total);
    mean += delta * (other.count / total);
    count = total;
  }
};

struct Sums {
  double sum, square;
};

// How many of a first block's n parts give it its centre: an eighth, but at least `least`.
inline int64_t sample(int64_t n, int64_t least) { return std::max((n + 7) / 8, std::min(n, least)); }

// Sums of d = (x - centre) + offset and of d^2 over `rows` rows of `n` values.
template <bool has_offset, class T>
Sums sums(const T* x, int64_t stride, int64_t rows, int64_t n, const float* offset, float centre) {
  Vec sum[4], square[4];
  for (int i = 0; i < 4; ++i) sum[i] = square[i] = Vec(0.0f);
  const Vec shift(centre);
  const bool ahead = prefetch_pays<T>();
  for (int64_t row = 0; row < rows; ++row, x += stride) {
    const Vec extra(has_offset ? offset[row] : 0.0f);
    const auto add = [&](Vec value, int k, int64_t lanes) {
      Vec d = value - shift;
      if constexpr (has_offset) d = d + extra;
      if (lanes < Vec::size) d = keep_first(d, lanes);
      sum[k] = sum[k] + d;
      square[k] = fma(d, d, square[k]);
    };
    int64_t i = 0;
    for (; i + 4 * Vec::size <= n; i += 4 * Vec::size)
      for (int k = 0; k < 4; ++k) {
        if (ahead) read_ahead(x + i + k * Vec::size);
        add(load(x + i + k * Vec::size), k, Vec::size);
      }
    for (int k = 0; i + Vec::size <= n; i += Vec::size, ++k) add(load(x + i), k, Vec::size);
    if (i < n) add(load(x + i, n - i), 3, n - i);
  }
  return {reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])),
          reduce_add((square[0] + square[1]) + (square[2] + square[3]))};
}

// The moments of x + offset over `rows` rows of `n` values.
template <class T>
Moments measure_rows(const T* x, int64_t stride, int64_t rows, int64_t n, const float* offset) {
  Moments moments;
  const int64_t block_rows = std::max<int64_t>(1, kBlock / n), block_n = std::min(n, kBlock);
  for (int64_t row = 0; row < rows; row += block_rows)
    for (int64_t i = 0; i < n; i += block_n) {
      const int64_t r = std::min(block_rows, rows - row), m = std::min(block_n, n - i);
      const auto block_sums = [&](int64_t r, int64_t m, float centre) {
        const T* block = x + row * stride + i;
        return offset ? sums<true>(block, stride, r, m, offset + row, centre)
                      : sums<false>(block, stride, r, m, nullptr, centre);
      };
      if (moments.count == 0) {
        const int64_t sample_r = sample(r, 64 / m + 1), sample_m = r > 1 ? m : sample(m, 64);
        moments.mean = block_sums(sample_r, sample_m, 0.0f).sum / static_cast<double>(sample_r * sample_m);
      }
      const float centre = static_cast<float>(moments.mean);
      const double count = static_cast<double>(r * m);
      const Sums s = block_sums(r, m, centre);
      moments.merge({count, centre + s.sum / count, s.square - s.sum * s.sum / count});
    }
  return moments;
}

// Per channel, sums of d = x - centre and of d^2 over `pixels` pixels of V vectors of channels, the last one of `last`
// channels.
template <int V, class T>
void channel_sums(const T* x, int64_t stride, int64_t pixels, int64_t last, const float* centre, float* sum,
                  float* square) {
  constexpr int kUnroll = V >= 3 ? 1 : 4 / V;  // enough independent additions
  constexpr int64_t w = Vec::size;
  const bool ahead = prefetch_pays<T>();
  Vec shift[V], s[V][kUnroll], q[V][kUnroll];
  for (int v = 0; v < V; ++v) {
    shift[v] = v == V - 1 ? load(centre + v * w, last) : load(centre + v * w);
    for (int u = 0; u < kUnroll; ++u) s[v][u] = q[v][u] = Vec(0.0f);
  }
  const auto add = [&](const T* p, int u, bool full) {
    for (int v = 0; v < V; ++v) {
      if (ahead) __builtin_prefetch(p + kPixelsAhead * stride + v * w);
      const Vec d = (v == V - 1 && !full ? load(p + v * w, last) : load(p + v * w)) - shift[v];
      s[v][u] = s[v][u] + d;
      q[v][u] = fma(d, d, q[v][u]);
    }
  };
  const auto run = [&](bool full) {
    int64_t p = 0;
    for (; p + kUnroll <= pixels; p += kUnroll)
      for (int u = 0; u < kUnroll; ++u) add(x + (p + u) * stride, u, full);
    for (; p < pixels; ++p) add(x + p * stride, 0, full);
  };
  last == w ? run(true) : run(false);
  for (int v = 0; v < V; ++v) {
    for (int u = 1; u < kUnroll; ++u) s[v][0] = s[v][0] + s[v][u], q[v][0] = q[v][0] + q[v][u];
    const int64_t n = v == V - 1 ? last : w;
    store(sum + v * w, s[v][0], n);
    store(square + v * w, q[v][0], n);
  }
}

// The same in memory order, with the sums in L1: reading a part of each pixel at a time instead takes 1.7 times as long
// (Zen 4, 320 channels), because the prefetchers lose the order.
template <class T>
void channel_sums_in_order(const T* x, int64_t stride, int64_t pixels, int64_t channels, const float* centre, float* sum,
                           float* square) {
  const bool ahead = prefetch_pays<T>();
  std::fill_n(sum, channels, 0.0f), std::fill_n(square, channels, 0.0f);
  for (int64_t p = 0; p < pixels; ++p, x += stride) {
    const auto add = [&](int64_t c, auto lanes) {
      if (ahead) read_ahead(x + c);
      const Vec d = load(x + c, lanes) - load(centre + c, lanes);
      store(sum + c, load(sum + c, lanes) + d, lanes);
      store(square + c, fma(d, d, load(square + c, lanes)), lanes);
    };
    int64_t c = 0;
    for (; c + Vec::size <= channels; c += Vec::size) add(c, All{});
    if (c < channels) add(c, channels - c);
  }
}

template <class T>
void channel_sums(const T* x, int64_t stride, int64_t pixels, int64_t channels, const float* centre, float* sum,
                  float* square) {
  const int64_t vectors = (channels + Vec::size - 1) / Vec::size, last = channels - (vectors - 1) * Vec::size;
  switch (vectors) {
    case 1: return channel_sums<1>(x, stride, pixels, last, centre, sum, square);
    case 2: return channel_sums<2>(x, stride, pixels, last, centre, sum, square);
    case 3: return channel_sums<3>(x, stride, pixels, last, centre, sum, square);
    case 4: return channel_sums<4>(x, stride, pixels, last, centre, sum, square);
    default: return channel_sums_in_order(x, stride, pixels, channels, centre, sum, square);
  }
}

// Per channel, the mean and sum of squared deviations over `pixels` pixels; `work` holds 3 * channels floats.
template <class T>
void measure_channels(const T* x, int64_t stride, int64_t pixels, int64_t channels, float* work,
                      double* mean, double* m2) {
  float *centre = work, *sum = centre + channels, *square = sum + channels;
  for (int64_t p = 0; p < pixels; p += kPixelBlock) {
    const int64_t n = std::min(kPixelBlock, pixels - p);
    const T* block = x + p * stride;
    const double count = static_cast<double>(n);
    if (p == 0) {
      std::fill_n(centre, channels, 0.0f);
      const int64_t first = sample(n, 16);
      channel_sums(block, stride, first, channels, centre, sum, square);
      for (int64_t c = 0; c < channels; ++c) centre[c] = sum[c] / static_cast<float>(first);
      std::fill_n(mean, channels, 0.0);
      std::fill_n(m2, channels, 0.0);
    }
    channel_sums(block, stride, n, channels, centre, sum, square);
    const double share = count / static_cast<double>(p + n), weight = static_cast<double>(p) * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double shift = sum[c] / count, delta = centre[c] + shift - mean[c];
      m2[c] += square[c] - sum[c] * shift + delta * delta * weight;
      mean[c] += delta * share;
      centre[c] = static_cast<float>(mean[c]);
    }
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
