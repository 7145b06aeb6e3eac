// One step of a linear sampler: the next sample, the new history entry and one more combination, in one pass over all
// operands
//
// Latents are small, so the cost is the call; only video latents are worth a second thread.
#include "scheduler_step.h"

#include "parallel.h"
#include "simd.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

// A sum of terms in fp32, for results that are rounded to half precision.
struct Single {
  static constexpr int unroll = 4;
  Vec sum{0.0f};
  void add(double c, Vec x) { sum = fma(Vec(static_cast<float>(c)), x, sum); }
  void add(double c, const Single& x) { add(c, x.sum); }
  void clamp(double bound) {
    const float limit = static_cast<float>(bound);
    sum = min(Vec(limit), max(Vec(-limit), sum));
  }
  Vec value() const { return sum; }
};

// In fp64: terms of a step cancel, and an fp32 result would show what each addition lost.
struct Double {
  static constexpr int unroll = 2;
#if defined(__AVX512F__)
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  static Double of(Vec x) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)),
            _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1)))};
  }
  void add(double c, const Double& x) {
    low = _mm512_fmadd_pd(_mm512_set1_pd(c), x.low, low);
    high = _mm512_fmadd_pd(_mm512_set1_pd(c), x.high, high);
  }
  void clamp(double bound) {
    low = _mm512_min_pd(_mm512_set1_pd(bound), _mm512_max_pd(_mm512_set1_pd(-bound), low));
    high = _mm512_min_pd(_mm512_set1_pd(bound), _mm512_max_pd(_mm512_set1_pd(-bound), high));
  }
  Vec value() const {
    const __m512d halves = _mm512_castps_pd(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)));
    return _mm512_castpd_ps(_mm512_insertf64x4(halves, _mm256_castps_pd(_mm512_cvtpd_ps(high)), 1));
  }
#else
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  static Double of(Vec x) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(x.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1))};
  }
  void add(double c, const Double& x) {
    low = _mm256_fmadd_pd(_mm256_set1_pd(c), x.low, low);
    high = _mm256_fmadd_pd(_mm256_set1_pd(c), x.high, high);
  }
  void clamp(double bound) {
    low = _mm256_min_pd(_mm256_set1_pd(bound), _mm256_max_pd(_mm256_set1_pd(-bound), low));
    high = _mm256_min_pd(_mm256_set1_pd(bound), _mm256_max_pd(_mm256_set1_pd(-bound), high));
  }
  Vec value() const { return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low)); }
#endif
  void add(double c, Vec x) { add(c, of(x)); }
};

// How elements are read and written: all tensors of one type, known when compiling, or each of its own.
template <class T>
struct Uniform {
  using Sum = std::conditional_t<sizeof(T) == sizeof(float), Double, Single>;
  template <class Lanes>
  static Vec read(const void* p, DType, int64_t i, Lanes lanes) {
    return load(static_cast<const T*>(p) + i, lanes);
  }
  template <class Lanes>
  static void write(void* p, DType, int64_t i, Vec v, Lanes lanes) {
    store(static_cast<T*>(p) + i, v, lanes);
  }
};
struct Mixed {
  using Sum = Double;
  template <class Lanes>
  static Vec read(const void* p, DType dtype, int64_t i, Lanes lanes) {
    Vec v(0.0f);
    dispatch(dtype, [&](auto tag) { v = load(static_cast<const decltype(tag)*>(p) + i, lanes); });
    return v;
  }
  template <class Lanes>
  static void write(void* p, DType dtype, int64_t i, Vec v, Lanes lanes) {
    dispatch(dtype, [&](auto tag) { store(static_cast<decltype(tag)*>(p) + i, v, lanes); });
  }
};

// The elements of `count` registers from i on; with Lanes other than All, count is 1.
template <class Access, bool keeps, int count, class Lanes>
inline void step(const SchedulerStepArgs& args, int64_t i, Lanes lanes) {
  typename Access::Sum next[count], entry[count], kept[count];
  const auto add = [&](const SchedulerStepArgs::Operand& t) {
    for (int k = 0; k < count; ++k) {
      const Vec v = Access::read(t.data, t.dtype, i + k * Vec::size, lanes);
      next[k].add(t.in_next, v);
      if constexpr (keeps) kept[k].add(t.in_kept, v);
      if (t.in_entry != 0) entry[k].add(t.in_entry, v);
    }
  };
  add(args.sample);
  add(args.model_output);
  if (args.entry) {
    for (int k = 0; k < count; ++k) {
      if (args.clip >= 0) entry[k].clamp(args.clip);
      next[k].add(args.entry_in_next, entry[k]);
      if constexpr (keeps) kept[k].add(args.entry_in_kept, entry[k]);
      Access::write(args.entry, args.entry_dtype, i + k * Vec::size, entry[k].value(), lanes);
    }
  }
  if (args.noise.data) add(args.noise);
  for (int h = 0; h < args.history_count; ++h) add(args.history[h]);
  for (int k = 0; k < count; ++k) {
    Access::write(args.prev, args.prev_dtype, i + k * Vec::size, next[k].value(), lanes);
    if constexpr (keeps) Access::write(args.kept, args.kept_dtype, i + k * Vec::size, kept[k].value(), lanes);
  }
}

template <class Access, bool keeps>
void run(const SchedulerStepArgs& shared) {
  constexpr int64_t kBlock = 1024;
  constexpr int kUnroll = Access::Sum::unroll;
  parallel_for(0, (shared.numel + kBlock - 1) / kBlock, 64, [&](int64_t begin, int64_t end) {
    const SchedulerStepArgs args = shared;  // a copy that the stores below cannot alias
    int64_t i = begin * kBlock;
    const int64_t stop = end * kBlock < args.numel ? end * kBlock : args.numel;
    for (; i + kUnroll * Vec::size <= stop; i += kUnroll * Vec::size) step<Access, keeps, kUnroll>(args, i, All{});
    for (; i + Vec::size <= stop; i += Vec::size) step<Access, keeps, 1>(args, i, All{});
    if (i < stop) step<Access, keeps, 1>(args, i, stop - i);
  });
}

bool uniform(const SchedulerStepArgs& args) {
  const DType dtype = args.sample.dtype;
  bool same = args.model_output.dtype == dtype && args.prev_dtype == dtype;
  if (args.entry) same = same && args.entry_dtype == dtype;
  if (args.kept) same = same && args.kept_dtype == dtype;
  if (args.noise.data) same = same && args.noise.dtype == dtype;
  for (int h = 0; h < args.history_count; ++h) same = same && args.history[h].dtype == dtype;
  return same;
}

}  // namespace

void scheduler_step(const SchedulerStepArgs& args) {
  const auto start = [&]<class Access>(Access) { args.kept ? run<Access, true>(args) : run<Access, false>(args); };
  if (!uniform(args)) return start(Mixed{});
  dispatch(args.sample.dtype, [&](auto tag) { start(Uniform<decltype(tag)>{}); });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
