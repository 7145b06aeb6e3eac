// One step of a linear sampler: the next sample, the new history entry and one more combination, in one pass over all
// operands
//
// Latents are small, so the cost is the call; only video latents are worth a second thread.
#include "scheduler_step.h"

#include <cfloat>

#include "parallel.h"
#include "simd.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

// How elements are read and written: all tensors of one type, known when compiling, or each of its own.
template <class T>
struct Uniform {
  static constexpr bool exact = sizeof(T) == sizeof(float);  // the coefficients' low parts show in the result
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
  static constexpr bool exact = true;
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

using Coefficient = SchedulerStepArgs::Coefficient;

// The factor of the low part: there an infinite v would give Inf - Inf, or 0 * Inf.
inline Vec finite(Vec v) { return min(Vec(FLT_MAX), max(Vec(-FLT_MAX), v)); }

// c * v + sum; the small part is added first.
template <bool exact>
inline Vec fma(Coefficient c, Vec v, Vec sum) {
  if constexpr (exact) sum = fma(Vec(c.low), finite(v), sum);
  return fma(Vec(c.high), v, sum);
}

// a * v + b * w
template <bool exact>
inline Vec combine(Coefficient a, Vec v, Coefficient b, Vec w) {
  if constexpr (!exact) return fma(Vec(a.high), v, Vec(b.high) * w);
  return fma(Vec(a.high), v, fma(Vec(b.high), w, fma(Vec(a.low), finite(v), Vec(b.low) * finite(w))));
}

// The elements of `count` registers from i on; with Lanes other than All, count is 1.
template <class Access, bool keeps, int count, class Lanes>
inline void step(const SchedulerStepArgs& args, int64_t i, Lanes lanes) {
  Vec next[count], entry[count], kept[count];
  for (int k = 0; k < count; ++k) {
    const int64_t at = i + k * Vec::size;
    const Vec sample = Access::read(args.sample.data, args.sample.dtype, at, lanes);
    const Vec output = Access::read(args.model_output.data, args.model_output.dtype, at, lanes);
    next[k] = combine<Access::exact>(args.sample.coefficient, sample, args.model_output.coefficient, output);
    if constexpr (keeps)
      kept[k] = combine<Access::exact>(args.sample.in_kept, sample, args.model_output.in_kept, output);
    entry[k] = combine<Access::exact>(args.entry_sample, sample, args.entry_output, output);
  }
  if (args.entry) {
    if (args.clip >= 0)
      for (Vec& v : entry) v = min(Vec(args.clip), max(Vec(-args.clip), v));
    for (int k = 0; k < count; ++k) {
      next[k] = fma<Access::exact>(args.entry_coefficient, entry[k], next[k]);
      if constexpr (keeps) kept[k] = fma<Access::exact>(args.entry_in_kept, entry[k], kept[k]);
      Access::write(args.entry, args.entry_dtype, i + k * Vec::size, entry[k], lanes);
    }
  }
  const auto add = [&](const SchedulerStepArgs::Operand& t) {
    for (int k = 0; k < count; ++k) {
      const Vec v = Access::read(t.data, t.dtype, i + k * Vec::size, lanes);
      next[k] = fma<Access::exact>(t.coefficient, v, next[k]);
      if constexpr (keeps) kept[k] = fma<Access::exact>(t.in_kept, v, kept[k]);
    }
  };
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
  constexpr int kUnroll = 4;
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
