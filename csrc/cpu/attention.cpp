// Attention in vector registers: fp32 arithmetic for all types, and bf16 products with fp32 sums where the CPU
// has them (avx512_bf16). The algorithm is in attention_blocks.h.
#if defined(__AVX512BF16__)
#include "attention_pairs.h"
#else
#include "attention_blocks.h"
#endif

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

// K and V are converted to fp32 when they are packed, Q when it is transposed.
template <class T>
struct Fp32Math {
  using Element = T;
  struct Session {};
  static constexpr bool kPairs = false;
  static constexpr int64_t kOneBlock = 320, kKeyBlock = 128, kChunk = 48;

  static int64_t steps(int64_t n) { return n; }
  static int64_t rows(int64_t n) { return n; }
  static int64_t row_stride(int64_t n) { return round_up(n, kWidth); }
  static int64_t packed_keys_size(int64_t keys, int64_t depth) { return keys * row_stride(depth); }
  static int64_t packed_values_size(int64_t keys, int64_t depth) { return keys * row_stride(depth); }

  static Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }

  static Vec load_units(const T* row, int64_t d, int64_t depth) {
    return d + kWidth <= depth ? load(row + d) : load(row + d, depth - d);
  }
  static void pack_keys(const T* k, int64_t stride, int64_t keys, int64_t depth, float* to) {
    for (int64_t key = 0; key < keys; ++key, to += row_stride(depth)) {
      if (key + kAhead < keys) prefetch_row(k + (key + kAhead) * stride, depth);
      for (int64_t d = 0; d < depth; d += kWidth) store(to + d, load_units(k + key * stride, d, depth));
    }
  }
  static void pack_values(const T* v, int64_t stride, int64_t keys, int64_t depth, int64_t, float* to) {
    pack_keys(v, stride, keys, depth, to);
  }
  template <int Columns>
  static void scores(const float* k, const float* q, int64_t keys, int64_t depth, float* s) {
    product_in_registers<Fp32Math, Columns>(k, row_stride(depth), 1, q, keys, depth, s, false, nullptr);
  }
  template <int Columns>
  static void accumulate(const float* v, const float* p, int64_t keys, int64_t depth, int64_t, float* out,
                         bool add, const float* rescale) {
    product_in_registers<Fp32Math, Columns>(v, 1, row_stride(depth), p, depth, keys, out, add, rescale);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Math : Bf16Pairs {
  struct Session {};

  static int64_t steps(int64_t n) { return ceil_div(n, 2); }
  static int64_t rows(int64_t n) { return n; }
  static int64_t packed_keys_size(int64_t keys, int64_t depth) { return keys * round_up(steps(depth), 16); }
  static int64_t packed_values_size(int64_t keys, int64_t depth) { return steps(keys) * round_up(depth, 16); }

  static void pack_keys(const bf16* k, int64_t stride, int64_t keys, int64_t depth, float* to) {
    const int64_t units = round_up(steps(depth), 16);
    for (int64_t key = 0; key < keys; ++key, to += units) {
      if (key + kAhead < keys) prefetch_row(k + (key + kAhead) * stride, depth);
      for (int64_t u = 0; u < units; u += 16) store(to + u, load_units(k + key * stride, u, depth));
    }
  }
  static void pack_values(const bf16* v, int64_t stride, int64_t keys, int64_t depth, int64_t, float* to) {
    for (int64_t key = 0; key < keys; key += 2, v += 2 * stride, to += round_up(depth, 16)) {
      for (int64_t i = kAhead; i < std::min(kAhead + 2, keys - key); ++i) prefetch_row(v + i * stride, depth);
      for (int64_t d = 0; d < depth; d += 16)
        store(to + d, interleave(v, key + 1 < keys ? v + stride : nullptr, d, depth));
    }
  }
  template <int Columns>
  static void scores(const float* k, const float* q, int64_t keys, int64_t depth, float* s) {
    product_in_registers<Bf16Math, Columns>(k, round_up(steps(depth), 16), 1, q, keys, steps(depth), s, false, nullptr);
  }
  template <int Columns>
  static void accumulate(const float* v, const float* p, int64_t keys, int64_t depth, int64_t, float* out,
                         bool add, const float* rescale) {
    product_in_registers<Bf16Math, Columns>(v, 1, round_up(depth, 16), p, depth, steps(keys), out, add, rescale);
  }
};
#endif

}  // namespace

void attention_in_registers(const AttentionArgs& args) {
#if defined(__AVX512BF16__)
  if (args.dtype == DType::bf16) return attention_blocks<Bf16Math>(args);
#endif
  dispatch(args.dtype, [&](auto tag) { attention_blocks<Fp32Math<decltype(tag)>>(args); });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
