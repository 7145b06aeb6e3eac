// GELU, exact (erf) and tanh-approximated. T, the tensor's element type, chooses the accuracy: bf16 has shorter
// polynomials, whose error (1e-4 relative) disappears in the rounding.
#pragma once

#include <type_traits>

#include "simd.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

template <int n>
inline Vec polynomial(const float (&coefficient)[n], Vec x) {
  Vec p(coefficient[n - 1]);
  for (int i = n - 2; i >= 0; --i) p = fma(p, x, Vec(coefficient[i]));
  return p;
}

// a * 2^n, where n is in the low bits of n_shifted = n + 1.5 * 2^23, and a and the result are normal numbers.
inline Vec add_exponent(Vec a, Vec n_shifted) {
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(n_shifted.v), 23)));
#else
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(_mm256_castps_si256(n_shifted.v), 23)));
#endif
}

// 2^f / 2 for |f| <= 1/2, minimax: within a relative 2e-9, and 8e-5.
inline constexpr float kHalfExp2[] = {0.5f,           0.346573591f,    0.120113231f,   0.0277516432f,
                                      0.00480924454f, 0.000669996545f, 7.67290621e-05f};
inline constexpr float kHalfExp2Short[] = {0.499964029f, 0.346630484f, 0.121305563f, 0.0275858063f};

template <int n>
inline Vec half_exp2_by(const float (&coefficient)[n], Vec a, Vec b) {
  const Vec shift(12582912.0f);  // 1.5 * 2^23: a sum with it is rounded to an integer
  const Vec shifted = fma(a, b, shift);
  return add_exponent(polynomial(coefficient, fma(a, b, shift - shifted)), shifted);
}

// 2^(a b) / 2 for |a b| <= 125; the product is not rounded.
template <class T>
inline Vec half_exp2(Vec a, Vec b) {
  if constexpr (!std::is_same_v<T, bf16>) return half_exp2_by(kHalfExp2, a, b);
#if defined(__AVX512F__)
  return exp2_near<3>(fma(a, b, Vec(-1.0f)));  // has instructions of its own
#else
  return half_exp2_by(kHalfExp2Short, a, b);
#endif
}

// gelu(x) = max(x, 0) - t q(t), where t = |x| and q(t) = 1 - Phi(t) = 2^(t r(t)) / 2.
//
// log2(2 q) is smooth, so one polynomial r serves the whole range: no division, no branch and none of the
// cancellation of 1 + erf(x) for negative x. r is a minimax fit weighted by what its error does to the result:
// q is within a relative 4e-9 (short: 4e-5) down to t q = 1e-6 and t q within 1e-9 beyond, up to t = 10, where q is
// below 1e-22. fp32 results come out within 1.1 times the RMS error of correctly rounded ones.
inline constexpr float kErf[] = {-1.15110409f,    -0.459223717f,   -0.0524232052f,  0.00690166233f,
                                 5.73999678e-05f, -0.000320785301f, 9.39898673e-05f, -1.54954851e-05f,
                                 1.55415921e-06f, -8.74626309e-08f, 2.10219286e-09f};
inline constexpr float kErfShort[] = {-1.15071666f,     -0.459994584f,   -0.0524623878f, 0.00783082563f,
                                      -0.000776254921f, 4.44300858e-05f, -1.09416339e-06f};

template <class T>
inline Vec erf_gelu(Vec x) {
  const Vec t = min(Vec(10.0f), abs(x));  // keeps NaN
  Vec r;
  if constexpr (std::is_same_v<T, bf16>)
    r = polynomial(kErfShort, t);
  else
    r = polynomial(kErf, t);
  return fnma(t, half_exp2<T>(t, r), max(Vec(0.0f), x));
}

// v / d for d from 1 to 2^126
template <class T>
inline Vec quotient(Vec v, Vec d) {
#if defined(__AVX512F__)
  // A division is as long as all the rest.
  const Vec r = reciprocal_estimate(d);
  if constexpr (std::is_same_v<T, bf16>) return v * r;
  return v * fma(fnma(d, r, Vec(1.0f)), r, r);  // one Newton step: 2^-27
#else
  return v / d;
#endif
}

// x / (1 + 2^z) with z = -2 log2(e) sqrt(2/pi) (x + 0.044715 x^3): the same as 0.5 x (1 + tanh(...)), without its
// cancellation for negative x.
template <class T>
inline Vec tanh_gelu(Vec x) {
  constexpr float k = -2.3022081983f;  // -2 log2(e) sqrt(2/pi)
  const Vec v = max(Vec(-9.9f), x);    // there the result is already below 1e-35; keeps NaN
  const Vec w = min(Vec(9.9f), v);     // |z| <= 123
  const Vec slope = fma(w * w, Vec(0.044715f * k), Vec(k));
  return quotient<T>(v, fma(Vec(2.0f), half_exp2<T>(w, slope), Vec(1.0f)));
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
