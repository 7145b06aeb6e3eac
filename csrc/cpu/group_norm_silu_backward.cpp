// The gradients of out = silu(z), z = n * factor + offset, n = group_norm(x + temb), from g, the gradient of out:
//
//   dz = g * silu'(z)
//   doffset = sum dz, dfactor = sum dz * n                                  over the pixels of a channel
//   dx = rstd * (dz * factor - mean(dz * factor) - n * mean(dz * factor * n))   means over a group
//   dtemb = sum dx                                                          over the pixels of a channel
//
// The work is cut into slices as in the forward: measured, summed and mapped while in cache, or with barriers in
// between where pixels are split over threads. Of fp32 tensors, dz waits in dx's memory; where that would round it,
// it is computed again.
#include "group_norm_silu_backward.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "moments.h"
#include "parallel.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

using Args = GroupNormSiluBackwardArgs;

constexpr int64_t kSerial = 16384;  // values that one thread finishes before others have woken up
constexpr int64_t kSteps = 32;      // vectors whose sums stay in fp32, and pixels taken together

struct Slice {
  int64_t b, c0, c1, p0, p1;
};

// Per channel of a slice, sums over pixels.
struct Sums3 {
  double dz, dzn, n;
};

// What a thread needs for a slice. Per channel: n = (x - sub) * rstd - rest, z = (x - sub) * rstd * factor + offset,
// dx = dz * c1 + (x - sub) * rstd * c2 + c0.
struct Scratch {
  explicit Scratch(int64_t channels)
      : floats(new float[7 * channels]), doubles(new double[2 * channels]),
        sub(floats.get()), rstd(sub + channels), factor(rstd + channels), offset(factor + channels),
        c0(offset + channels), c1(c0 + channels), c2(c1 + channels),
        rest(doubles.get()), spare(rest + channels) {}
  std::unique_ptr<float[]> floats;
  std::unique_ptr<double[]> doubles;
  float *sub, *rstd, *factor, *offset, *c0, *c1, *c2;
  double *rest, *spare;
};

// silu'(x), as accurately as silu_for.
template <class T>
inline Vec silu_slope(Vec x) {
  constexpr int degree = sizeof(T) == 4 ? 5 : std::is_same_v<T, bf16> ? 3 : 4;
  const Vec one(1.0f), d = one + exp2_near<degree>(x * Vec(-1.44269504088896341f));
#if defined(__AVX512F__)
  const Vec bounded = min(Vec(1e37f), d);  // whose reciprocal is normal; NaN stays
  Vec s = reciprocal_estimate(bounded);
  if constexpr (degree > 3) s = fma(s, fnma(bounded, s, one), s);
#else
  const Vec s = one / d;
#endif
  return s * fma(x, one - s, one);
}

// body(offset, lanes) for `steps` vectors `stride` apart, each of `lanes` values but the last one, of `last`.
template <class Body>
inline void strip(int64_t steps, int64_t stride, int64_t lanes, int64_t last, const Body& body) {
  const int64_t end = (steps - 1) * stride;
  if (lanes == Vec::size)
    for (int64_t at = 0; at < end; at += stride) body(at, All{});
  else
    for (int64_t at = 0; at < end; at += stride) body(at, lanes);
  last == Vec::size ? body(end, All{}) : body(end, last);
}

// The maps of one vector: of a channel's pixels, or of a pixel's channels.
template <class T, bool silu>
struct Maps {
  Vec sub, rstd, factor, offset, c0, c1, c2;
  template <class Get>
  Maps(const Scratch& s, const Get& get)
      : sub(get(s.sub)), rstd(get(s.rstd)), factor(get(s.factor)), offset(get(s.offset)), c0(get(s.c0)),
        c1(get(s.c1)), c2(get(s.c2)) {}
  Vec normal(Vec x) const { return (x - sub) * rstd; }
  Vec dz(Vec n, Vec g) const {
    if constexpr (silu) return g * silu_slope<T>(fma(n, factor, offset));
    return g;
  }
};

// body(maps, first channel, offset of its first value, steps, stride, lanes, last) for strips that make up a slice.
template <class T, bool silu, bool pixel_major, class Body>
void for_each_strip(const Args& a, const Slice& s, const Scratch& k, const Body& body) {
  constexpr int64_t w = Vec::size;
  const int64_t base = s.b * a.channels * a.spatial, channels = s.c1 - s.c0;
  if constexpr (pixel_major) {
    for (int64_t p = s.p0; p < s.p1; p += kSteps)
      for (int64_t c = 0; c < channels; c += w) {
        const int64_t lanes = std::min(w, channels - c);
        const Maps<T, silu> maps(k, [&](const float* values) { return load(values + c, lanes); });
        body(maps, c, base + p * a.channels + s.c0 + c, std::min(kSteps, s.p1 - p), a.channels, lanes, lanes);
      }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      const Maps<T, silu> maps(k, [&](const float* values) { return Vec(values[c]); });
      for (int64_t p = s.p0; p < s.p1; p += kSteps * w) {
        const int64_t n = std::min(kSteps * w, s.p1 - p), steps = (n + w - 1) / w;
        body(maps, c, base + (s.c0 + c) * a.spatial + p, steps, w, w, n - (steps - 1) * w);
      }
    }
  }
}

// The moments of each group of a slice.
template <class T, bool pixel_major>
void measure(const Args& a, const Slice& s, Scratch& k, Moments* moments) {
  const T* x = static_cast<const T*>(a.x) + s.b * a.channels * a.spatial;
  const float* temb = a.temb ? a.temb + s.b * a.channels : nullptr;
  const int64_t size = a.channels / a.groups, pixels = s.p1 - s.p0;
  double *mean = k.rest, *m2 = k.spare;
  if constexpr (pixel_major)
    measure_channels(x + s.p0 * a.channels + s.c0, a.channels, pixels, s.c1 - s.c0, k.sub, mean, m2);
  for (int64_t c = s.c0; c < s.c1; c += size, ++moments) {
    if constexpr (pixel_major) {
      *moments = {};
      for (int64_t i = c; i < c + size; ++i)
        moments->merge({static_cast<double>(pixels), mean[i - s.c0] + (temb ? temb[i] : 0.0f), m2[i - s.c0]});
    } else {
      *moments = measure_rows(x + c * a.spatial + s.p0, a.spatial, size, pixels, temb ? temb + c : nullptr);
    }
  }
}

// From a slice's moments, all of Scratch but c0, c1 and c2.
void fold(const Args& a, const Slice& s, const Moments* moments, Scratch& k) {
  const float* temb = a.temb ? a.temb + s.b * a.channels : nullptr;
  const float* factor = a.factor ? a.factor + s.b * a.factor_batch_stride : nullptr;
  const float* offset = a.offset ? a.offset + s.b * a.offset_batch_stride : nullptr;
  const int64_t size = a.channels / a.groups;
  for (int64_t c = s.c0; c < s.c1; ++c) {
    const Moments& m = moments[(c - s.c0) / size];
    const double rstd = 1.0 / std::sqrt(m.m2 / m.count + a.eps), mean = m.mean - (temb ? temb[c] : 0.0f);
    const int64_t i = c - s.c0;
    k.sub[i] = static_cast<float>(mean);
    k.rstd[i] = static_cast<float>(rstd);
    k.rest[i] = (mean - k.sub[i]) * rstd;
    k.factor[i] = factor ? factor[c] : 1.0f;
    k.offset[i] = static_cast<float>((offset ? offset[c] : 0.0) - k.rest[i] * k.factor[i]);
    k.c0[i] = k.c1[i] = k.c2[i] = 0.0f;
  }
}

template <class T, bool silu>
constexpr bool kKeepDz = silu && sizeof(T) == sizeof(float);

template <class T, bool silu, bool pixel_major>
void sum(const Args& a, const Slice& s, const Scratch& k, Sums3* sums) {
  const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad);
  [[maybe_unused]] T* dx = static_cast<T*>(a.dx);
  std::fill_n(sums, s.c1 - s.c0, Sums3{});
  for_each_strip<T, silu, pixel_major>(a, s, k, [&](const Maps<T, silu>& maps, int64_t c, int64_t at, int64_t steps,
                                                    int64_t stride, int64_t lanes, int64_t last) {
    Vec sum_dz(0.0f), sum_dzn(0.0f), sum_n(0.0f);
    strip(steps, stride, lanes, last, [&](int64_t i, auto lanes) {
      const Vec n = keep_first(maps.normal(load(x + at + i, lanes)), lanes), dz = maps.dz(n, load(grad + at + i, lanes));
      sum_dz = sum_dz + dz;
      sum_dzn = fma(dz, n, sum_dzn);
      sum_n = sum_n + n;
      if constexpr (kKeepDz<T, silu>) store(dx + at + i, dz, lanes);
    });
    if constexpr (pixel_major) {
      float dz[Vec::size], dzn[Vec::size], n[Vec::size];
      store(dz, sum_dz), store(dzn, sum_dzn), store(n, sum_n);
      for (int64_t i = 0; i < lanes; ++i) sums[c + i].dz += dz[i], sums[c + i].dzn += dzn[i], sums[c + i].n += n[i];
    } else {
      sums[c].dz += reduce_add(sum_dz), sums[c].dzn += reduce_add(sum_dzn), sums[c].n += reduce_add(sum_n);
    }
  });
}

// From the sums over all pixels: c0, c1 and c2, and with `write` the results per channel.
void finish(const Args& a, const Slice& s, const Sums3* sums, Scratch& k, bool write) {
  const int64_t size = a.channels / a.groups;
  const double pixels = static_cast<double>(a.spatial), count = pixels * static_cast<double>(size);
  for (int64_t first = 0; first < s.c1 - s.c0; first += size) {
    double mean = 0, slope = 0;
    for (int64_t i = first; i < first + size; ++i) {
      mean += k.factor[i] * sums[i].dz;
      slope += k.factor[i] * (sums[i].dzn - k.rest[i] * sums[i].dz);
    }
    mean /= count, slope /= count;
    for (int64_t i = first; i < first + size; ++i) {
      const double rstd = k.rstd[i], factor = k.factor[i];
      k.c0[i] = static_cast<float>(rstd * (k.rest[i] * slope - mean));
      k.c1[i] = static_cast<float>(rstd * factor);
      k.c2[i] = static_cast<float>(-rstd * slope);
      if (!write) continue;
      const int64_t at = s.b * a.channels + s.c0 + i;
      a.doffset[at] = static_cast<float>(sums[i].dz);
      a.dfactor[at] = static_cast<float>(sums[i].dzn - k.rest[i] * sums[i].dz);
      const double normals = sums[i].n - pixels * k.rest[i];
      a.dtemb[at] = static_cast<float>(rstd * (factor * sums[i].dz - pixels * mean - slope * normals));
    }
  }
}

template <class T, bool silu, bool pixel_major>
void map(const Args& a, const Slice& s, const Scratch& k) {
  const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad);
  T* dx = static_cast<T*>(a.dx);
  for_each_strip<T, silu, pixel_major>(a, s, k, [&](const Maps<T, silu>& maps, int64_t, int64_t at, int64_t steps,
                                                    int64_t stride, int64_t lanes, int64_t last) {
    strip(steps, stride, lanes, last, [&](int64_t i, auto lanes) {
      const Vec n = maps.normal(load(x + at + i, lanes));
      Vec dz = load((kKeepDz<T, silu> ? dx : grad) + at + i, lanes);
      if constexpr (!kKeepDz<T, silu>) dz = maps.dz(n, dz);
      store(dx + at + i, fma(dz, maps.c1, fma(n, maps.c2, maps.c0)), lanes);
    });
  });
}

template <class T, bool silu, bool pixel_major>
void run(const Args& a) {
  const int64_t size = a.channels / a.groups, width = pixel_major ? a.channels : size, groups = width / size;
  const int64_t slices = a.channels / width, whole = a.batch * slices, threads = num_threads();
  const bool balanced = (whole + threads - 1) / threads * threads * 4 <= whole * 5;
  int64_t chunk = a.spatial;
  if (!balanced && whole * width * a.spatial > kSerial) {
    const int64_t most = (4 * threads + whole - 1) / whole;
    const int64_t chunks = std::clamp<int64_t>(a.spatial * width / kSerial, 1, most);
    chunk = (a.spatial + chunks - 1) / chunks;
  }
  const int64_t chunks = (a.spatial + chunk - 1) / chunk, tasks = whole * chunks;
  const int64_t grain = std::max<int64_t>(1, kSerial / (width * chunk));
  const auto slice_of = [&](int64_t task) {
    const int64_t slice = task / chunks, c0 = slice % slices * width, p0 = task % chunks * chunk;
    return Slice{slice / slices, c0, c0 + width, p0, std::min(p0 + chunk, a.spatial)};
  };
  std::vector<Moments> moments(tasks * groups);
  std::vector<Sums3> sums(tasks * width);

  const auto measure_task = [&](int64_t task, Scratch& k) {
    measure<T, pixel_major>(a, slice_of(task), k, &moments[task * groups]);
  };
  const auto fold_task = [&](int64_t task, Scratch& k) {
    const int64_t first = task / chunks * chunks;
    std::vector<Moments> total(groups);
    for (int64_t i = 0; i < chunks * groups; ++i) total[i % groups].merge(moments[first * groups + i]);
    fold(a, slice_of(task), total.data(), k);
  };
  const auto sum_task = [&](int64_t task, Scratch& k) {
    sum<T, silu, pixel_major>(a, slice_of(task), k, &sums[task * width]);
  };
  const auto map_task = [&](int64_t task, Scratch& k) {
    const int64_t first = task / chunks * chunks;
    std::vector<Sums3> total(width);
    for (int64_t i = 0; i < chunks * width; ++i) {
      Sums3& t = total[i % width];
      const Sums3& part = sums[first * width + i];
      t.dz += part.dz, t.dzn += part.dzn, t.n += part.n;
    }
    finish(a, slice_of(task), total.data(), k, task == first);
    map<T, silu, pixel_major>(a, slice_of(task), k);
  };
  const auto for_each_task = [&](const auto& body) {
    parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch(width);
      for (int64_t task = begin; task < end; ++task) body(task, scratch);
    });
  };
  if (chunks == 1) {
    for_each_task([&](int64_t task, Scratch& k) {
      measure_task(task, k), fold_task(task, k), sum_task(task, k), map_task(task, k);
    });
  } else {
    for_each_task(measure_task);
    for_each_task([&](int64_t task, Scratch& k) { fold_task(task, k), sum_task(task, k); });
    for_each_task([&](int64_t task, Scratch& k) { fold_task(task, k), map_task(task, k); });
  }
}

}  // namespace

void group_norm_silu_backward(const Args& args) {
  dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (args.silu)
      args.pixel_major ? run<T, true, true>(args) : run<T, true, false>(args);
    else
      args.pixel_major ? run<T, false, true>(args) : run<T, false, false>(args);
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
