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
  void add(double c, const Single& x) { sum = fma(Vec(static_cast<float>(c)), x.sum, sum); }
  void clamp(double bound) {
    const float limit = static_cast<float>(bound);
    sum = min(Vec(limit), max(Vec(-limit), sum));
  }
  template <class T, class Lanes>
  static Single read(const T* p, Lanes lanes) {
    return {load(p, lanes)};
  }
  template <class T, class Lanes>
  void write(T* p, Lanes lanes) const {
    store(p, sum, lanes);
  }
};

// In fp64: terms of a step cancel, and an fp32 result would show what each addition lost. Two registers, for the two
// halves of an fp32 one.
struct Double {
  static constexpr int unroll = 2;
#if defined(__AVX512F__)
  using Half = __m512d;
  static Half widen(__m256 x) { return _mm512_cvtps_pd(x); }
  static __m256 narrow(Half x) { return _mm512_cvtpd_ps(x); }
  static __m256 lower(Vec x) { return _mm512_castps512_ps256(x.v); }
  static __m256 upper(Vec x) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1)); }
  static __m256 load_half(const float* p) { return _mm256_loadu_ps(p); }
  static void store_half(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
  static Vec join(__m256 low, __m256 high) {
    const __m512d halves = _mm512_castps_pd(_mm512_castps256_ps512(low));
    return _mm512_castpd_ps(_mm512_insertf64x4(halves, _mm256_castps_pd(high), 1));
  }
  static Half all(double x) { return _mm512_set1_pd(x); }
  static Half fma(Half a, Half b, Half c) { return _mm512_fmadd_pd(a, b, c); }
  static Half clamp(Half x, Half b) { return _mm512_min_pd(b, _mm512_max_pd(_mm512_sub_pd(all(0), b), x)); }
#else
  using Half = __m256d;
  static Half widen(__m128 x) { return _mm256_cvtps_pd(x); }
  static __m128 narrow(Half x) { return _mm256_cvtpd_ps(x); }
  static __m128 lower(Vec x) { return _mm256_castps256_ps128(x.v); }
  static __m128 upper(Vec x) { return _mm256_extractf128_ps(x.v, 1); }
  static __m128 load_half(const float* p) { return _mm_loadu_ps(p); }
  static void store_half(float* p, __m128 x) { _mm_storeu_ps(p, x); }
  static Vec join(__m128 low, __m128 high) { return _mm256_set_m128(high, low); }
  static Half all(double x) { return _mm256_set1_pd(x); }
  static Half fma(Half a, Half b, Half c) { return _mm256_fmadd_pd(a, b, c); }
  static Half clamp(Half x, Half b) { return _mm256_min_pd(b, _mm256_max_pd(_mm256_sub_pd(all(0), b), x)); }
#endif
  Half low = all(0), high = all(0);

  static Double of(Vec x) { return {widen(lower(x)), widen(upper(x))}; }
  void add(double c, const Double& x) {
    low = fma(all(c), x.low, low);
    high = fma(all(c), x.high, high);
  }
  void clamp(double bound) {
    low = clamp(low, all(bound));
    high = clamp(high, all(bound));
  }
  Vec value() const { return join(narrow(low), narrow(high)); }

  // Whole registers of fp32 are read and written by halves: taking them apart and joining them takes longer.
  template <class T, class Lanes>
  static Double read(const T* p, Lanes lanes) {
    if constexpr (std::is_same_v<T, float> && std::is_same_v<Lanes, All>)
      return {widen(load_half(p)), widen(load_half(p + Vec::size / 2))};
    else
      return of(load(p, lanes));
  }
  template <class T, class Lanes>
  void write(T* p, Lanes lanes) const {
    if constexpr (std::is_same_v<T, float> && std::is_same_v<Lanes, All>) {
      store_half(p, narrow(low));
      store_half(p + Vec::size / 2, narrow(high));
    } else {
      store(p, value(), lanes);
    }
  }
};

// How elements are read and written: all tensors of one type, known when compiling, or each of its own.
template <class T>
struct Uniform {
  using Sum = std::conditional_t<sizeof(T) == sizeof(float), Double, Single>;
  template <class Lanes>
  static Sum read(const void* p, DType, int64_t i, Lanes lanes) {
    return Sum::read(static_cast<const T*>(p) + i, lanes);
  }
  template <class Lanes>
  static void write(void* p, DType, int64_t i, const Sum& sum, Lanes lanes) {
    sum.write(static_cast<T*>(p) + i, lanes);
  }
};
struct Mixed {
  using Sum = Double;
  template <class Lanes>
  static Sum read(const void* p, DType dtype, int64_t i, Lanes lanes) {
    Sum sum;
    dispatch(dtype, [&](auto tag) { sum = Sum::read(static_cast<const decltype(tag)*>(p) + i, lanes); });
    return sum;
  }
  template <class Lanes>
  static void write(void* p, DType dtype, int64_t i, const Sum& sum, Lanes lanes) {
    dispatch(dtype, [&](auto tag) { sum.write(static_cast<decltype(tag)*>(p) + i, lanes); });
  }
};

// The elements of `count` registers from i on; with Lanes other than All, count is 1.
template <class Access, bool keeps, int count, class Lanes>
inline void step(const SchedulerStepArgs& args, int64_t i, Lanes lanes) {
  using Sum = typename Access::Sum;
  Sum next[count], entry[count], kept[count];
  // Most tensors are in one or two of the results only, and the arithmetic is what takes the time.
  const auto add_to = [](Sum(&sum)[count], double c, const Sum(&value)[count]) {
    if (c != 0)
      for (int k = 0; k < count; ++k) sum[k].add(c, value[k]);
  };
  const auto add = [&](const SchedulerStepArgs::Operand& t) {
    Sum value[count];
    for (int k = 0; k < count; ++k) value[k] = Access::read(t.data, t.dtype, i + k * Vec::size, lanes);
    add_to(next, t.in_next, value);
    if constexpr (keeps) add_to(kept, t.in_kept, value);
    add_to(entry, t.in_entry, value);
  };
  add(args.sample);
  add(args.model_output);
  if (args.entry) {
    for (int k = 0; k < count; ++k) {
      if (args.clip >= 0) entry[k].clamp(args.clip);
      Access::write(args.entry, args.entry_dtype, i + k * Vec::size, entry[k], lanes);
    }
    add_to(next, args.entry_in_next, entry);
    if constexpr (keeps) add_to(kept, args.entry_in_kept, entry);
  }
  if (args.noise.data) add(args.noise);
  for (int h = 0; h < args.history_count; ++h) add(args.history[h]);
  for (int k = 0; k < count; ++k) {
    Access::write(args.prev, args.prev_dtype, i + k * Vec::size, next[k], lanes);
    if constexpr (keeps) Access::write(args.kept, args.kept_dtype, i + k * Vec::size, kept[k], lanes);
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
