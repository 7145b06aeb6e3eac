// Vec: one register of fp32 values (16 with AVX-512, 8 with AVX2), and the loads and stores that widen
// fp16 and bf16 to it and round back to nearest even. All kernels compute in Vec, whatever the tensor holds.
//
// Include it only from files compiled once per instruction set: everything lives in
// fastdiff::cpu::FASTDIFF_ISA, so the linker never mixes two sets' versions of an inline function.
// NaN: min(a, b) and max(a, b) return b when either is NaN, so clamp(x) = min(hi, max(lo, x)) keeps it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

struct Vec {
  static constexpr int size = 16;
  __m512 v;
  Vec() = default;
  Vec(__m512 value) : v(value) {}
  explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
};

inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }    // a*b + c
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }  // c - a*b
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
inline Vec copysign(Vec magnitude, Vec sign) {
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(int(0x80000000u)),
                                                       _mm512_castps_si512(sign.v),
                                                       _mm512_castps_si512(magnitude.v), 0xCA));
}
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
// where a < b (false for NaN): x, else y
inline Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v);
}
// a * 2^n for integral n; overflows to Inf, underflows gradually.
inline Vec ldexp(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }
// The fraction in [0, 1) of x - floor(x), and a * 2^floor(x).
inline Vec fraction(Vec x) { return _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline Vec ldexp_floor(Vec a, Vec x) { return _mm512_scalef_ps(a.v, x.v); }
// 1/a within 2^-14, for normal a.
inline Vec reciprocal_estimate(Vec a) { return _mm512_rcp14_ps(a.v); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline Vec load(const f16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline __m256i to_bf16(Vec a) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000)), 16));
#endif
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
inline void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// The first n elements, 0 <= n <= size; the other lanes are zero. Nothing beyond them is touched.
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline Vec load(const bf16* p, int64_t n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16));
}
inline Vec load(const f16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
inline Vec keep_first(Vec a, int64_t n) { return _mm512_maskz_mov_ps(first(n), a.v); }
inline void store(float* p, Vec a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void store(bf16* p, Vec a, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(a)); }
inline void store(f16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// rows[i] lane j <-> rows[j] lane i
inline void transpose(Vec (&rows)[Vec::size]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {  // 4x4 blocks within each 128-bit lane
    const __m512 a = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v), b = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    const __m512 c = _mm512_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    const __m512 d = _mm512_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    t[i] = _mm512_shuffle_ps(a, c, 0x44), t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44), t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
  }
  for (int i = 0; i < 4; ++i) {  // then the 4x4 arrangement of the lanes
    const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xDD);
    const __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xDD);
    rows[i].v = _mm512_shuffle_f32x4(a, c, 0x88), rows[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xDD);
    rows[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88), rows[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
}

#else  // AVX2

struct Vec {
  static constexpr int size = 8;
  __m256 v;
  Vec() = default;
  Vec(__m256 value) : v(value) {}
  explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
};

inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec round(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
inline Vec copysign(Vec magnitude, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_and_ps(bit, sign.v), _mm256_andnot_ps(bit, magnitude.v));
}
inline float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline Vec select_lt(Vec a, Vec b, Vec x, Vec y) {
  return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}
inline Vec ldexp(Vec a, Vec n) {
  // 2^n in two factors, so that results below 2^-126 round once at the end instead of flushing.
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)));
}
inline Vec fraction(Vec x) { return _mm256_sub_ps(x.v, _mm256_floor_ps(x.v)); }
inline Vec ldexp_floor(Vec a, Vec x) { return ldexp(a, _mm256_floor_ps(x.v)); }  // |x| <= 252

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline Vec load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline __m128i to_bf16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  const __m256i high = _mm256_srli_epi32(
      _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                           _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan)), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(a)); }
inline void store(f16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

inline Vec keep_first(Vec a, int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane)));
}
template <class T>
inline Vec load(const T* p, int64_t n) {
  T lanes[Vec::size] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store(T* p, Vec a, int64_t n) {
  T lanes[Vec::size];
  store(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// rows[i] lane j <-> rows[j] lane i
inline void transpose(Vec (&rows)[Vec::size]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {  // 4x4 blocks within each 128-bit lane
    const __m256 a = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v), b = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    const __m256 c = _mm256_unpacklo_ps(rows[i + 2].v, rows[i + 3].v);
    const __m256 d = _mm256_unpackhi_ps(rows[i + 2].v, rows[i + 3].v);
    t[i] = _mm256_shuffle_ps(a, c, 0x44), t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44), t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
  }
  for (int i = 0; i < 4; ++i) {  // then the 2x2 arrangement of the lanes
    rows[i].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

#endif

// All lanes, where the loads and stores above take a count.
struct All {};
template <class T>
inline Vec load(const T* p, All) {
  return load(p);
}
template <class T>
inline void store(T* p, Vec a, All) {
  store(p, a);
}
inline Vec keep_first(Vec a, All) { return a; }

// Fetch the cache line `ahead` bytes beyond p; it need not exist. The hardware stops at every 4 KiB, and falls
// behind where there is much arithmetic per line: measured 10 to 25% in kernels that are memory bound on paper.
inline constexpr int64_t kPrefetch = 4096;
inline void prefetch(const void* p, int64_t ahead = 0) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + ahead), _MM_HINT_T0);
}

// Whether loops that stream Ts through memory are to prefetch. AMD's Zen 4 writes a line of 64 bytes that one store
// fills without reading it first, unless it was prefetched: fp32 kernels are 1.3 to 1.9 times as fast without.
template <class T>
inline bool prefetch_pays() {
  return sizeof(T) < 4 || Vec::size < 16 || !is_amd();
}

// Whether to write `numel` contiguous Ts, in rows of `columns`, past the caches. On Zen 4 (32 MiB of last-level cache)
// adaLN and a reader of its output after it take as long together at 9 MiB of output, and a fifth less from 24 MiB on.
// Where the output's pages are fresh it makes no difference.
constexpr int64_t kStream = 12 << 20;
template <class T>
inline bool streams(const T* out, int64_t numel, int64_t columns) {
  constexpr int64_t bytes = sizeof(T), vector = Vec::size * bytes;
  return Vec::size == 16 && is_amd() && numel * bytes >= kStream && columns * bytes % vector == 0 &&
         reinterpret_cast<uintptr_t>(out) % vector == 0;
}
// All who streamed call this before others read.
inline void finish_streaming() { _mm_sfence(); }

// Stores the lanes, past the caches if `past` (see streams).
template <class T, class Lanes>
inline void write(T* p, Vec a, Lanes lanes, bool past) {
#if defined(__AVX512F__)
  if (past) {
    if constexpr (std::is_same_v<T, float>)
      return _mm512_stream_ps(p, a.v);
    else if constexpr (std::is_same_v<T, bf16>)
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(a));
    else
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  store(p, a, lanes);
}

// One element, converted as the vector forms do.
template <class T>
inline float load_one(const T* p) {
  float lanes[Vec::size];
  store(lanes, load(p, 1));
  return lanes[0];
}
inline float load_one(const float* p) { return *p; }
inline float load_one(const bf16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// 2^x by a minimax polynomial on the fraction. Relative error: degree 3 7.5e-5, 4 2.6e-6, 5 9e-8.
template <int degree>
inline Vec exp2_near(Vec x) {
  static_assert(degree >= 3 && degree <= 5);
  constexpr float c[3][6] = {
      {0.9999251962f, 0.6958335638f, 0.2260671556f, 0.0780245215f},
      {1.0000026226f, 0.6930038333f, 0.2414427549f, 0.0520114601f, 0.0135341678f},
      {0.9999999404f, 0.6931530833f, 0.2401536107f, 0.0558263175f, 0.0089893397f, 0.0018775767f}};
#if !defined(__AVX512F__)
  x = min(Vec(252.0f), max(Vec(-252.0f), x));  // an infinite x has no fraction; 2^252 overflows, 2^-252 is 0
#endif
  const Vec f = fraction(x);
  Vec p = Vec(c[degree - 3][degree]);
  for (int i = degree - 1; i >= 0; --i) p = fma(p, f, Vec(c[degree - 3][i]));
  return ldexp_floor(p, x);
}

// silu(x) as accurately as a T can hold: for float within about 2 ulp, for bf16 and f16 with an error that
// disappears in the rounding (below 1/20 of it).
template <class T>
inline Vec silu_for(Vec x) {
  constexpr int degree = sizeof(T) == 4 ? 5 : std::is_same_v<T, bf16> ? 3 : 4;
  const Vec d = Vec(1.0f) + exp2_near<degree>(x * Vec(-1.44269504088896341f));
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bf16>) return x * reciprocal_estimate(d);
#endif
  return x / d;
}

// Calls body with a value of the element type that `dtype` names.
template <class Body>
inline void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
  }
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
