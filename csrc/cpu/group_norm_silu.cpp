// out = silu(group_norm(x + temb) * (1 + scale) + shift)
//
// The work is cut into slices: a sample's channels [c0, c1), whole groups, by its pixels [p0, p1). Where there
// are enough slices of all pixels for the threads, each is measured and then normalized while it is in cache;
// else the pixels are split too, and a barrier stands between measuring and normalizing. x is read twice.
//
// Everything per channel is folded into (x - sub) * mul + add: subtracting first keeps the digits of data whose
// mean is large, and what `sub` loses by rounding goes into `add`.
#include "group_norm_silu.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "moments.h"
#include "parallel.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

enum class Layout { channel_major, pixel_major, to_pixel_major };  // of x and out

constexpr int64_t kSerial = 16384;  // values that one thread finishes before others have woken up
constexpr int64_t kTile = 64;       // pixels whose channels are transposed together

// fp32 values per channel: sample b, channel c at data[b * batch_stride + c].
struct Channels {
  const float* data;
  int64_t batch_stride;
  const float* of(int64_t b) const { return data ? data + b * batch_stride : nullptr; }
};

struct Problem {
  GroupNormSiluArgs args;
  Channels weight, bias, temb, scale, shift;
  int64_t group_size() const { return args.channels / args.groups; }
};

struct Slice {
  int64_t b, c0, c1, p0, p1;
};

// What a thread needs for a slice, allocated once per thread.
struct Scratch {
  explicit Scratch(int64_t channels)
      : floats(new float[3 * channels]), doubles(new double[2 * channels]),
        sub(floats.get()), mul(sub + channels), add(mul + channels), mean(doubles.get()), m2(mean + channels) {}
  std::unique_ptr<float[]> floats;
  std::unique_ptr<double[]> doubles;
  float *sub, *mul, *add;  // of the final map
  double *mean, *m2;
};

// The moments of each group of a slice.
template <class T, Layout layout>
void measure(const Problem& p, const Slice& s, Scratch& scratch, Moments* moments) {
  const GroupNormSiluArgs& a = p.args;
  const T* x = static_cast<const T*>(a.x) + s.b * a.x_batch_stride;
  const int64_t size = p.group_size(), pixels = s.p1 - s.p0;
  const float* temb = p.temb.of(s.b);
  if constexpr (layout == Layout::pixel_major) {
    measure_channels(x + s.p0 * a.channels + s.c0, a.channels, pixels, s.c1 - s.c0, scratch.floats.get(),
                     scratch.mean, scratch.m2);
    for (int64_t c0 = s.c0; c0 < s.c1; c0 += size, ++moments) {
      const double* m2 = scratch.m2 + (c0 - s.c0);
      double* mean = scratch.mean + (c0 - s.c0);
      double centre = 0, square = 0, spread = 0;
      for (int64_t c = 0; c < size; ++c) {
        if (temb) mean[c] += temb[c0 + c];
        centre += mean[c];
        square += m2[c];
      }
      centre /= static_cast<double>(size);
      for (int64_t c = 0; c < size; ++c) spread += (mean[c] - centre) * (mean[c] - centre);
      const double n = static_cast<double>(pixels);
      *moments = {n * static_cast<double>(size), centre, square + n * spread};
    }
  } else {
    for (int64_t c = s.c0; c < s.c1; c += size, ++moments)
      *moments = measure_rows(x + c * a.spatial + s.p0, a.spatial, size, pixels, temb ? temb + c : nullptr);
  }
}

// The per-channel map of a slice's channels, into scratch.sub, mul and add.
void fold(const Problem& p, const Slice& s, const Moments* moments, Scratch& scratch) {
  const float *weight = p.weight.data, *bias = p.bias.data;
  const float *temb = p.temb.of(s.b), *scale = p.scale.of(s.b), *shift = p.shift.of(s.b);
  const int64_t size = p.group_size();
  for (int64_t c = s.c0; c < s.c1; ++moments) {
    const double rstd = 1.0 / std::sqrt(moments->m2 / moments->count + p.args.eps);
    for (const int64_t end = c + size; c < end; ++c) {
      double mul = weight ? rstd * weight[c] : rstd, add = bias ? bias[c] : 0.0;
      if (scale) mul *= 1.0 + scale[c], add *= 1.0 + scale[c];
      if (shift) add += shift[c];
      const double mean = moments->mean - (temb ? temb[c] : 0.0f);
      const float sub = static_cast<float>(mean);
      const int64_t i = c - s.c0;
      scratch.sub[i] = sub;
      scratch.mul[i] = static_cast<float>(mul);
      scratch.add[i] = static_cast<float>(add - (mean - sub) * mul);
    }
  }
}

template <class T, bool silu>
inline Vec finish(Vec x, Vec sub, Vec mul, Vec add) {
  const Vec y = fma(x - sub, mul, add);
  if constexpr (silu) return silu_for<T>(y);
  return y;
}

template <class T, bool silu>
void map_row(const T* x, T* out, int64_t n, float sub, float mul, float add, bool past) {
  const Vec s(sub), m(mul), a(add);
  const bool ahead = prefetch_pays<T>();
  int64_t i = 0;
  for (; i + Vec::size <= n; i += Vec::size) {
    if (ahead) read_ahead(x + i);
    if (ahead && !past) write_ahead(out + i);
    write(out + i, finish<T, silu>(load(x + i), s, m, a), All{}, past);
  }
  if (i < n) store(out + i, finish<T, silu>(load(x + i, n - i), s, m, a), n - i);
}

template <class T, bool silu>
void map_pixel(const T* x, T* out, int64_t channels, const Scratch& k, bool past) {
  const bool ahead = prefetch_pays<T>();
  int64_t c = 0;
  for (; c + Vec::size <= channels; c += Vec::size) {
    if (ahead) read_ahead(x + c);
    if (ahead && !past) write_ahead(out + c);
    write(out + c, finish<T, silu>(load(x + c), load(k.sub + c), load(k.mul + c), load(k.add + c)), All{}, past);
  }
  if (const int64_t n = channels - c; n > 0)
    store(out + c, finish<T, silu>(load(x + c, n), load(k.sub + c, n), load(k.mul + c, n), load(k.add + c, n)), n);
}

// `channels` x `pixels`, each at most Vec::size, of channel-major x to pixel-major out.
template <class T, bool silu>
void map_tile(const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t channels, int64_t pixels,
              const float* sub, const float* mul, const float* add) {
  Vec tile[Vec::size];
  for (int64_t c = 0; c < channels; ++c) {
    const T* row = x + c * x_stride;
    const Vec value = pixels == Vec::size ? load(row) : load(row, pixels);
    tile[c] = finish<T, silu>(value, Vec(sub[c]), Vec(mul[c]), Vec(add[c]));
  }
  for (int64_t c = channels; c < Vec::size; ++c) tile[c] = Vec(0.0f);
  transpose(tile);
  for (int64_t i = 0; i < pixels; ++i, out += out_stride)
    channels == Vec::size ? store(out, tile[i]) : store(out, tile[i], channels);
}

template <class T, bool silu, Layout layout>
void map(const Problem& p, const Slice& s, const Scratch& k, bool past) {
  const GroupNormSiluArgs& a = p.args;
  const T* x = static_cast<const T*>(a.x) + s.b * a.x_batch_stride;
  T* out = static_cast<T*>(a.out) + s.b * a.channels * a.spatial;
  const int64_t channels = s.c1 - s.c0;
  if constexpr (layout == Layout::channel_major) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = (s.c0 + c) * a.spatial + s.p0;
      map_row<T, silu>(x + at, out + at, s.p1 - s.p0, k.sub[c], k.mul[c], k.add[c], past);
    }
  } else if constexpr (layout == Layout::pixel_major) {
    for (int64_t i = s.p0; i < s.p1; ++i)
      map_pixel<T, silu>(x + i * a.channels + s.c0, out + i * a.channels + s.c0, channels, k, past);
  } else {
    constexpr int64_t w = Vec::size;
    for (int64_t first = s.p0; first < s.p1; first += kTile)
      for (int64_t c = 0; c < channels; c += w)
        for (int64_t i = first; i < std::min(first + kTile, s.p1); i += w)
          map_tile<T, silu>(x + (s.c0 + c) * a.spatial + i, a.spatial, out + i * a.channels + s.c0 + c, a.channels,
                            std::min(w, channels - c), std::min(w, s.p1 - i), k.sub + c, k.mul + c, k.add + c);
  }
}

// How a problem is cut: slices of `width` channels by `chunk` pixels.
struct Plan {
  int64_t width, chunk;
};

Plan plan(const Problem& p, Layout layout, int64_t element_size) {
  const GroupNormSiluArgs& a = p.args;
  const int64_t threads = num_threads(), size = p.group_size();
  // Channel-major: a group. Pixel-major: all channels, because memory is read fastest in order, even when that
  // is more than the cache holds. Transposing: groups that together end on a cache line of out.
  const int64_t width = layout == Layout::channel_major ? size
                        : layout == Layout::pixel_major ? a.channels
                                                        : std::min(a.channels, std::lcm(size, 64 / element_size));
  const int64_t slices = a.batch * ((a.channels + width - 1) / width);
  const int64_t rounds = (slices + threads - 1) / threads;
  const bool balanced = rounds * threads * 4 <= slices * 5;
  if (balanced || a.batch * a.channels * a.spatial <= kSerial) return {width, a.spatial};
  const int64_t chunks = std::clamp<int64_t>(a.spatial * width / kSerial, 1, (4 * threads + slices - 1) / slices);
  return {width, (a.spatial + chunks - 1) / chunks};
}

template <class T, bool silu, Layout layout>
void run(const Problem& p) {
  const GroupNormSiluArgs& a = p.args;
  const auto [width, chunk] = plan(p, layout, sizeof(T));
  const int64_t slices = (a.channels + width - 1) / width, chunks = (a.spatial + chunk - 1) / chunk;
  const int64_t tasks = a.batch * slices * chunks, groups = width / p.group_size();  // groups per slice
  const int64_t grain = std::max<int64_t>(1, kSerial / (width * chunk));
  const auto slice_of = [&](int64_t task) {
    const int64_t slice = task / chunks, c0 = slice % slices * width, p0 = task % chunks * chunk;
    return Slice{slice / slices, c0, std::min(c0 + width, a.channels), p0, std::min(p0 + chunk, a.spatial)};
  };
  // Rows of out that a slice writes start at multiples of this.
  const int64_t unit = layout == Layout::pixel_major ? a.channels : std::gcd(a.spatial, chunk);
  const bool past = layout != Layout::to_pixel_major &&
                    streams(static_cast<const T*>(a.out), a.batch * a.channels * a.spatial, unit);
  std::vector<Moments> partial(chunks > 1 ? tasks * groups : 0);
  if (chunks > 1)
    parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch(width);
      for (int64_t task = begin; task < end; ++task)
        measure<T, layout>(p, slice_of(task), scratch, &partial[task * groups]);
    });
  parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(width);
    std::vector<Moments> moments(groups);
    for (int64_t task = begin; task < end; ++task) {
      const Slice s = slice_of(task);
      if (chunks == 1) {
        measure<T, layout>(p, s, scratch, moments.data());
      } else {
        std::fill(moments.begin(), moments.end(), Moments{});
        const Moments* parts = &partial[task / chunks * chunks * groups];
        for (int64_t i = 0; i < chunks * groups; ++i) moments[i % groups].merge(parts[i]);
      }
      fold(p, s, moments.data(), scratch);
      map<T, silu, layout>(p, s, scratch, past);
    }
    if (past) finish_streaming();
  });
}

// fp32 copies of per-channel values that are not fp32 and dense already.
class Widened {
 public:
  Widened(const GroupNormSiluArgs& args) : args_(args) {
    const ChannelValues* all[] = {&args.weight, &args.bias, &args.temb, &args.scale, &args.shift};
    int64_t total = 0;
    for (const ChannelValues* v : all) total += size(*v);
    if (total) memory_.reset(new float[total]);
    next_ = memory_.get();
  }
  Channels operator()(const ChannelValues& v) {
    if (!v.data) return {nullptr, 0};
    const int64_t n = size(v), c = args_.channels;
    if (n == 0) return {static_cast<const float*>(v.data), v.batch_stride};
    float* first = next_;
    dispatch(v.dtype, [&](auto tag) {
      for (int64_t b = 0; b < n / c; ++b, next_ += c) {
        const auto* from = static_cast<const decltype(tag)*>(v.data) + b * v.batch_stride;
        int64_t i = 0;
        if (v.channel_stride == 1)
          for (; i + Vec::size <= c; i += Vec::size) store(next_ + i, load(from + i));
        for (; i < c; ++i) next_[i] = load_one(from + i * v.channel_stride);
      }
    });
    return {first, v.batch_stride ? c : 0};
  }

 private:
  int64_t size(const ChannelValues& v) const {
    if (!v.data || (v.dtype == DType::f32 && v.channel_stride == 1)) return 0;
    return v.batch_stride ? args_.batch * args_.channels : args_.channels;
  }
  const GroupNormSiluArgs& args_;
  std::unique_ptr<float[]> memory_;
  float* next_;
};

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& args) {
  Widened widen(args);
  const Problem p{args,          widen(args.weight), widen(args.bias), widen(args.temb),
                  widen(args.scale), widen(args.shift)};
  dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto with_layout = [&]<bool silu>() {
      if (args.x_pixel_major) return run<T, silu, Layout::pixel_major>(p);
      if (args.out_pixel_major) return run<T, silu, Layout::to_pixel_major>(p);
      return run<T, silu, Layout::channel_major>(p);
    };
    args.silu ? with_layout.template operator()<true>() : with_layout.template operator()<false>();
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
