// Attention for bf16 with AMX tiles: attention_blocks.h with both products on 16 x 16 tiles of fp32 sums.
//
// K (keys x depth) and the transposed V (value depth x keys) are packed as left operands, a sequence of tiles of
// 16 rows x 32 bf16, zero beyond their ends; Q and P, whose units already are pairs along the summed axis with
// the queries in the columns, are right operands as they stand.
#include "attention_pairs.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

constexpr int64_t kTileUnits = 16 * 16;

struct AmxMath : Bf16Pairs {
  // Tile registers are configured per thread; all eight are 16 rows of 64 bytes.
  struct Session {
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      static_assert(sizeof config == 64);
      __asm__ volatile("" ::"m"(config));
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
  };

  static int64_t steps(int64_t n) { return round_up(n, 32) / 2; }
  static int64_t rows(int64_t n) { return round_up(n, 16); }
  static int64_t packed_keys_size(int64_t keys, int64_t depth) { return keys * steps(depth); }
  static int64_t packed_values_size(int64_t keys, int64_t depth) { return rows(depth) * steps(keys); }

  static void pack_keys(const bf16* k, int64_t stride, int64_t keys, int64_t depth, float* to) {
    const int64_t units = steps(depth);
    for (int64_t key = 0; key < keys; ++key, k += stride) {
      if (key + kAhead < keys) prefetch_row(k + kAhead * stride, depth);
      float* row = to + key / 16 * 16 * units + key % 16 * 16;
      for (int64_t u = 0; u < units; u += 16, row += kTileUnits) store(row, load_units(k, u, depth));
    }
  }

  static void pack_values(const bf16* v, int64_t stride, int64_t keys, int64_t depth, int64_t block, float* to) {
    for (int64_t i = 0; i < std::min<int64_t>(keys, 32); ++i) prefetch_row(v + i * stride, depth);
    for (int64_t key = 0; key < keys; key += 32) {
      for (int64_t i = key + 32; i < std::min(keys, key + 64); ++i) prefetch_row(v + i * stride, depth);
      for (int64_t d = 0; d < depth; d += 16) {
        Vec pairs[16];
        for (int64_t i = 0; i < 16; ++i) {
          const int64_t even = key + 2 * i;
          pairs[i] = interleave(even < keys ? v + even * stride : nullptr,
                                even + 1 < keys ? v + (even + 1) * stride : nullptr, d, depth);
        }
        transpose(pairs);
        float* tile = to + d * steps(block) + key * 8;
        for (int64_t i = 0; i < 16; ++i) store(tile + i * 16, pairs[i]);
      }
    }
  }

  // I x J tiles: c = [c +] a b over `count` tiles of the summed axis; row tiles of a are `a_next` units apart.
  template <int I, int J>
  static void tiles(const float* a, int64_t a_next, const float* b, int64_t count, float* c, bool add) {
    constexpr int64_t kRow = kTile * 4;  // bytes of a row of b and c
    if (add) {
      _tile_loadd(0, c, kRow);
      if constexpr (J > 1) _tile_loadd(1, c + 16, kRow);
      if constexpr (I > 1) _tile_loadd(2, c + 16 * kTile, kRow);
      if constexpr (I > 1 && J > 1) _tile_loadd(3, c + 16 * kTile + 16, kRow);
    } else {
      _tile_zero(0);
      if constexpr (J > 1) _tile_zero(1);
      if constexpr (I > 1) _tile_zero(2);
      if constexpr (I > 1 && J > 1) _tile_zero(3);
    }
    for (int64_t t = 0; t < count; ++t, a += kTileUnits, b += 16 * kTile) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, kRow);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (J > 1) {
        _tile_loadd(7, b + 16, kRow);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (I > 1) {
        _tile_loadd(5, a + a_next, 64);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (J > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, kRow);
    if constexpr (J > 1) _tile_stored(1, c + 16, kRow);
    if constexpr (I > 1) _tile_stored(2, c + 16 * kTile, kRow);
    if constexpr (I > 1 && J > 1) _tile_stored(3, c + 16 * kTile + 16, kRow);
  }

  // One row of J tiles.
  template <int J>
  static void row_of_tiles(const float* a, const float* b, int64_t count, float* c, bool add) {
    constexpr int64_t kRow = kTile * 4;
    if (add) {
      _tile_loadd(0, c, kRow);
      if constexpr (J > 1) _tile_loadd(1, c + 16, kRow);
      if constexpr (J > 2) _tile_loadd(2, c + 32, kRow);
      if constexpr (J > 3) _tile_loadd(3, c + 48, kRow);
    } else {
      _tile_zero(0);
      if constexpr (J > 1) _tile_zero(1);
      if constexpr (J > 2) _tile_zero(2);
      if constexpr (J > 3) _tile_zero(3);
    }
    for (int64_t t = 0; t < count; ++t, a += kTileUnits, b += 16 * kTile) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, kRow);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (J > 1) {
        _tile_loadd(7, b + 16, kRow);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (J > 2) {
        _tile_loadd(5, b + 32, kRow);
        _tile_dpbf16ps(2, 4, 5);
      }
      if constexpr (J > 3) {
        _tile_loadd(6, b + 48, kRow);
        _tile_dpbf16ps(3, 4, 6);
      }
    }
    _tile_stored(0, c, kRow);
    if constexpr (J > 1) _tile_stored(1, c + 16, kRow);
    if constexpr (J > 2) _tile_stored(2, c + 32, kRow);
    if constexpr (J > 3) _tile_stored(3, c + 48, kRow);
  }

  template <int Columns>
  static void product(const float* a, int64_t a_next, const float* b, int64_t rows, int64_t count, float* c, bool add) {
    // GCC's tile intrinsics do not tell the compiler which memory they touch.
    __asm__ volatile("" ::: "memory");
    constexpr int kPaired = Columns / 2 * 2;
    for (; rows > 16; rows -= 32, a += 2 * a_next, c += 32 * kTile) {
      for (int j = 0; j < kPaired; j += 2) tiles<2, 2>(a, a_next, b + j * 16, count, c + j * 16, add);
      if (kPaired < Columns) tiles<2, 1>(a, a_next, b + kPaired * 16, count, c + kPaired * 16, add);
    }
    if (rows > 0) row_of_tiles<Columns>(a, b, count, c, add);
    __asm__ volatile("" ::: "memory");
  }

  template <int Columns>
  static void scores(const float* k, const float* q, int64_t keys, int64_t depth, float* s) {
    const int64_t units = steps(depth);
    product<Columns>(k, 16 * units, q, keys, units / 16, s, false);
  }

  template <int Columns>
  static void accumulate(const float* v, const float* p, int64_t keys, int64_t depth, int64_t block, float* out,
                         bool add, const float* rescale) {
    if (rescale)
      for (int64_t d = 0; d < depth; ++d)
        for (int n = 0; n < Columns; ++n) {
          float* to = out + d * kTile + n * kWidth;
          store(to, load(to) * load(rescale + n * kWidth));
        }
    product<Columns>(v, 16 * steps(block), p, depth, ceil_div(keys, 32), out, add);
  }
};

}  // namespace

void attention_bf16(const AttentionArgs& args) { attention_blocks<AmxMath>(args); }

}  // namespace fastdiff::cpu::FASTDIFF_ISA
