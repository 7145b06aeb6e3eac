// What attention's bf16 products share: a unit is two bf16 values that are adjacent along the summed axis.
// Needs AVX512_BF16. Denormals count as zero in these products and sums, as in torch's own bf16 matrix product.
#pragma once

#include "attention_blocks.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

struct Bf16Pairs {
  using Element = bf16;
  static constexpr bool kPairs = true;
  static constexpr int64_t kOneBlock = 384, kKeyBlock = 256, kChunk = 32;

  static __m512bh bits(Vec a) { return (__m512bh)_mm512_castps_si512(a.v); }

  // Sums, per lane, of both halves' products.
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_dpbf16_ps(sum.v, bits(a), bits(b)); }
  static Vec add_pair(Vec sum, Vec pair) {
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    return _mm512_dpbf16_ps(sum.v, bits(pair), (__m512bh)ones);
  }

  // Rounds values that are not negative to bf16: even ones to the low halves, odd ones to the high halves. To nearest,
  // ties away from zero: four simple instructions, where conversion and interleaving take twice the time. A NaN must
  // not have all its lower bits set; only a mask could bring in such a one, see load_mask.
  static Vec pair(Vec even, Vec odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_add_epi32(_mm512_castps_si512(even.v), half);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd.v), half);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(low, 16), high));
  }

  // Up to 32 values of a row from unit `unit` on, zeros beyond `length` values.
  static Vec load_units(const bf16* row, int64_t unit, int64_t length) {
    const int64_t n = std::clamp<int64_t>(length - 2 * unit, 0, 32);
    const __mmask32 valid = static_cast<__mmask32>((uint64_t(1) << n) - 1);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(valid, row + 2 * unit));
  }

  // Units of two rows, columns d to d + 15: the first row in the low halves. A null row counts as zeros.
  static Vec interleave(const bf16* even, const bf16* odd, int64_t d, int64_t depth) {
    const __mmask16 valid = first(std::min<int64_t>(depth - d, 16));
    const __m512i low = even ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, even + d)) : __m512i{};
    const __m512i high = odd ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, odd + d)) : __m512i{};
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};

}  // namespace fastdiff::cpu::FASTDIFF_ISA
