// The statistics of LayerNorm and RMSNorm over one row of contiguous values.
#pragma once

#include <algorithm>
#include <cmath>

#include "loops.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

// The norm as a map: x -> (x - centre) * factor + offset.
struct RowNorm {
  float centre = 0, factor = 1, offset = 0;
};

// Sums of d = x - centre and of d^2 come from one pass, with the mean of the row's first values as centre. Where
// that turns out to be more than a standard deviation off, which would cost digits, the pass is repeated around the
// mean: then it is the corrected two-pass algorithm (Chan, Golub and LeVeque, 1983). Large means lose nothing, for
// x - centre is exact where they are close.
template <bool rms, class T>
RowNorm measure_row(const T* x, int64_t n, float eps) {
  float centre = 0, mean = 0, variance = 0;
  if constexpr (!rms) {
    Vec first(0.0f);
    const int64_t count = std::min<int64_t>(n, kUnroll * Vec::size);
    for_each_vec(count, [&](int64_t i, auto lanes) { first = first + load(x + i, lanes); });
    centre = reduce_add(first) / static_cast<float>(count);
  }
  for (int pass = 0; pass < 2; ++pass) {
    const Vec shift(centre);
    Vec sum[kUnroll], squares[kUnroll];
    for (int k = 0; k < kUnroll; ++k) sum[k] = squares[k] = Vec(0.0f);
    for_each_vec(n, [&](int64_t i, int k, auto lanes) {
      Vec d = load(x + i, lanes);
      if constexpr (!rms) {
        d = keep_first(d - shift, lanes);
        sum[k] = sum[k] + d;
      }
      squares[k] = fma(d, d, squares[k]);
    });
    const float square = total(squares) / n;
    if constexpr (!rms) mean = total(sum) / n;
    variance = square - mean * mean;
    if (rms || mean * mean <= variance) break;
    if (pass == 0) centre += mean;
  }
  const float factor = 1.0f / std::sqrt((variance < 0 ? 0 : variance) + eps);
  return {centre, factor, -mean * factor};
}

template <class T>
RowNorm measure_row(const T* x, int64_t n, float eps, bool rms) {
  return rms ? measure_row<true>(x, n, eps) : measure_row<false>(x, n, eps);
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
