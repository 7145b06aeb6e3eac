// Loops over contiguous elements by registers.
#pragma once

#include <type_traits>

#include "simd.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

inline constexpr int kUnroll = 4;  // independent sums, to hide the latency of an addition

// body(i, lanes) or body(i, k, lanes): elements i..., with the k-th of kUnroll accumulators.
template <class Body>
inline void for_each_vec(int64_t n, const Body& body) {
  const auto at = [&](int64_t i, int k, auto lanes) {
    if constexpr (std::is_invocable_v<const Body&, int64_t, int, decltype(lanes)>)
      body(i, k, lanes);
    else
      body(i, lanes);
  };
  int64_t i = 0;
  for (; i + kUnroll * Vec::size <= n; i += kUnroll * Vec::size)
    for (int k = 0; k < kUnroll; ++k) at(i + k * Vec::size, k, All{});
  for (; i + Vec::size <= n; i += Vec::size) at(i, 0, All{});
  if (i < n) at(i, 0, n - i);
}

inline float total(const Vec (&sum)[kUnroll]) { return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])); }

}  // namespace fastdiff::cpu::FASTDIFF_ISA
