// out = silu(x / rms(x) * weight * (1 + scale) + bias * (1 + scale) + shift), the rms being over channels
//
// A task is some pixels of a sample with all their channels: they are squared and summed, then normalized while they
// are in cache. Channel-major, a register holds the same channel of neighbouring pixels, each with a sum of its own.
#include "rms_norm_silu.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "loops.h"
#include "parallel.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kSerial = 16384;    // values that one thread finishes before others have woken up
constexpr int64_t kTile = 128;        // pixels of a task, channel-major
constexpr int64_t kAddends = 32;      // channels whose squares are summed before these sums are
constexpr int64_t kCache = 1 << 19;   // bytes of x that stay in cache between the two passes

// What becomes of x / rms(x): y * mul + add, with fp32 values per sample and channel.
class Map {
 public:
  explicit Map(const RmsNormSiluArgs& a) : channels_(a.channels), per_sample_(a.scale.data || a.shift.data) {
    const int64_t rows = per_sample_ ? a.batch : 1;
    values_.reset(new float[2 * rows * channels_]);
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t c = 0; c < channels_; ++c) {
        const double factor = 1.0 + get(a.scale, b, c, 0.0f);
        values_[2 * b * channels_ + c] = static_cast<float>(factor * get(a.weight, b, c, 1.0f));
        values_[(2 * b + 1) * channels_ + c] =
            static_cast<float>(factor * get(a.bias, b, c, 0.0f) + get(a.shift, b, c, 0.0f));
      }
  }
  const float* mul(int64_t b) const { return values_.get() + (per_sample_ ? 2 * b * channels_ : 0); }
  const float* add(int64_t b) const { return mul(b) + channels_; }

 private:
  static double get(const ChannelValues& v, int64_t b, int64_t c, float absent) {
    if (!v.data) return absent;
    float value = 0;
    dispatch(v.dtype, [&](auto tag) {
      value = load_one(static_cast<const decltype(tag)*>(v.data) + b * v.batch_stride + c * v.channel_stride);
    });
    return value;
  }
  int64_t channels_;
  bool per_sample_;
  std::unique_ptr<float[]> values_;
};

float factor_of(const RmsNormSiluArgs& a, float square) {
  const float n = static_cast<float>(a.channels);
  if (a.clamp) return std::sqrt(n) / std::max(std::sqrt(square), static_cast<float>(a.eps));
  return 1.0f / std::sqrt(square / n + static_cast<float>(a.eps));
}

template <class T, bool silu>
inline Vec finish(Vec x, Vec factor, Vec mul, Vec add) {
  const Vec y = fma(x * factor, mul, add);
  if constexpr (silu) return silu_for<T>(y);
  return y;
}

// `pixels` <= kTile pixels from x on, whose channels are `stride` apart.
template <class T, bool silu>
void channel_major(const RmsNormSiluArgs& a, const T* x, T* out, int64_t pixels, const float* mul, const float* add) {
  const int64_t stride = a.spatial;
  float factor[kTile] = {};
  for (int64_t first = 0; first < a.channels; first += kAddends) {
    const int64_t last = std::min(first + kAddends, a.channels);
    for_each_vec(pixels, [&](int64_t i, auto lanes) {
      Vec sum(0.0f);
      for (int64_t c = first; c < last; ++c) {
        const Vec value = load(x + c * stride + i, lanes);
        sum = fma(value, value, sum);
      }
      store(factor + i, sum + load(factor + i, lanes), lanes);
    });
  }
  for (int64_t i = 0; i < pixels; ++i) factor[i] = factor_of(a, factor[i]);
  for (int64_t c = 0; c < a.channels; ++c, x += stride, out += stride) {
    const Vec m(mul[c]), s(add[c]);
    for_each_vec(pixels, [&](int64_t i, auto lanes) {
      store(out + i, finish<T, silu>(load(x + i, lanes), load(factor + i, lanes), m, s), lanes);
    });
  }
}

template <class T, bool silu>
void pixel_major(const RmsNormSiluArgs& a, const T* x, T* out, const float* mul, const float* add) {
  Vec sum[kUnroll];
  for (Vec& s : sum) s = Vec(0.0f);
  for_each_vec(a.channels, [&](int64_t c, int k, auto lanes) {
    const Vec value = load(x + c, lanes);
    sum[k] = fma(value, value, sum[k]);
  });
  const Vec factor(factor_of(a, total(sum)));
  for_each_vec(a.channels, [&](int64_t c, auto lanes) {
    store(out + c, finish<T, silu>(load(x + c, lanes), factor, load(mul + c, lanes), load(add + c, lanes)), lanes);
  });
}

template <class T, bool silu>
void run(const RmsNormSiluArgs& a) {
  const Map map(a);
  const int64_t fits = kCache / static_cast<int64_t>(sizeof(T)) / a.channels / 16 * 16;
  const int64_t tile = a.pixel_major ? 1 : std::clamp<int64_t>(fits, 16, kTile);
  const int64_t tiles = (a.spatial + tile - 1) / tile;
  const int64_t grain = std::max<int64_t>(1, kSerial / (tile * a.channels));
  parallel_for(0, a.batch * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles, p = task % tiles * tile;
      const T* x = static_cast<const T*>(a.x) + b * a.x_batch_stride;
      T* out = static_cast<T*>(a.out) + b * a.channels * a.spatial;
      if (a.pixel_major)
        pixel_major<T, silu>(a, x + p * a.channels, out + p * a.channels, map.mul(b), map.add(b));
      else
        channel_major<T, silu>(a, x + p, out + p, std::min(tile, a.spatial - p), map.mul(b), map.add(b));
    }
  });
}

}  // namespace

void rms_norm_silu(const RmsNormSiluArgs& args) {
  dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    args.silu ? run<T, true>(args) : run<T, false>(args);
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
