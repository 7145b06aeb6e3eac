// out = uncond + s (cond - uncond), rescaled per sample by r std(cond) / std(out) + 1 - r where r > 0
//
// The rescale reads the inputs twice: once for the deviations, in chunks that stay in L1 for the two passes of a
// stable variance, and once for the result.
#include "cfg_combine.h"

#include <cmath>
#include <vector>

#include "loops.h"
#include "moments.h"
#include "parallel.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kChunk = 2048;

// body(i, lanes) for the elements begin to end
template <class Body>
inline void for_each_between(int64_t begin, int64_t end, const Body& body) {
  for_each_vec(end - begin, [&](int64_t i, auto lanes) { body(begin + i, lanes); });
}

double deviation(const Moments& m) { return std::sqrt(m.m2 / (m.count - 1)); }

// value(i, lanes): the elements of one quantity. What the mean loses by rounding is taken out of the squares.
template <class Value>
Moments moments(int64_t begin, int64_t end, const Value& value) {
  const double count = static_cast<double>(end - begin);
  Vec sum(0.0f), rest(0.0f), squares(0.0f);
  for_each_between(begin, end, [&](int64_t i, auto lanes) { sum = sum + keep_first(value(i, lanes), lanes); });
  const float mean = static_cast<float>(reduce_add(sum) / count);
  for_each_between(begin, end, [&](int64_t i, auto lanes) {
    const Vec centred = keep_first(value(i, lanes) - Vec(mean), lanes);
    rest = rest + centred;
    squares = fma(centred, centred, squares);
  });
  const double error = reduce_add(rest) / count;
  return {count, mean + error, reduce_add(squares) - error * error * count};
}

template <class T>
void combine(const CfgCombineArgs& args) {
  const T* uncond = static_cast<const T*>(args.uncond);
  const T* cond = static_cast<const T*>(args.cond);
  T* out = static_cast<T*>(args.out);
  const Vec scale(args.guidance_scale);
  const auto guided = [&](int64_t i, auto lanes) {
    const Vec u = load(uncond + i, lanes);
    return fma(scale, load(cond + i, lanes) - u, u);
  };
  const int64_t chunks = (args.numel + kChunk - 1) / kChunk;  // per sample
  // body(chunk, begin, end): the elements of one chunk of one sample
  const auto for_each_chunk = [&](const auto& body) {
    parallel_for(0, args.samples * chunks, 32, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t sample = chunk / chunks * args.numel, offset = chunk % chunks * kChunk;
        body(chunk, sample + offset, sample + (offset + kChunk < args.numel ? offset + kChunk : args.numel));
      }
    });
  };
  if (!(args.guidance_rescale > 0)) {
    return for_each_chunk([&](int64_t, int64_t begin, int64_t end) {
      for_each_between(begin, end, [&](int64_t i, auto lanes) { store(out + i, guided(i, lanes), lanes); });
    });
  }
  std::vector<Moments> of_cond(args.samples * chunks), of_guided(args.samples * chunks);
  for_each_chunk([&](int64_t chunk, int64_t begin, int64_t end) {
    of_cond[chunk] = moments(begin, end, [&](int64_t i, auto lanes) { return load(cond + i, lanes); });
    of_guided[chunk] = moments(begin, end, guided);
  });
  std::vector<float> factor(args.samples);
  for (int64_t sample = 0; sample < args.samples; ++sample) {
    Moments c, g;
    for (int64_t chunk = sample * chunks; chunk < (sample + 1) * chunks; ++chunk)
      c.merge(of_cond[chunk]), g.merge(of_guided[chunk]);
    const double rescale = args.guidance_rescale;
    factor[sample] = static_cast<float>(rescale * (deviation(c) / deviation(g)) + (1 - rescale));
  }
  for_each_chunk([&](int64_t chunk, int64_t begin, int64_t end) {
    const Vec by(factor[chunk / chunks]);
    for_each_between(begin, end, [&](int64_t i, auto lanes) { store(out + i, guided(i, lanes) * by, lanes); });
  });
}

}  // namespace

void cfg_combine(const CfgCombineArgs& args) {
  dispatch(args.dtype, [&](auto tag) { combine<decltype(tag)>(args); });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
