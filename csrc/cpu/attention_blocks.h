// Blockwise attention with an online softmax (FlashAttention), with the queries in the vector lanes.
//
// A tile of kTile queries is held transposed, (depth, query), and so are its logits, (key, query), and its
// accumulator, (value depth, query):
//
//   S[key][query]  = sum_d   K[key][d] Q[d][query]        P = exp(scale (S - max over keys))
//   O[d][query]   += sum_key V[key][d] P[key][query]
//
// Both products broadcast an element of K or V against vectors of queries. So any depth and any number of keys is
// computed without padding, the softmax has no horizontal reduction, and one routine, Math::product, does both.
// Only Q, the output and a mask are transposed, once per tile.
//
// K and V are packed (converted, padded) in blocks of keys, into scratch that fits the second-level cache: all
// blocks of a head, once, or, of long heads, one block at a time, which then serves a group of tiles of queries.
//
// Math says how: see attention.cpp (fp32, and bf16 pairs) and attention_amx.cpp. All buffers are counted in units
// of 4 bytes: an fp32 value, or a pair of bf16 values that are adjacent along the summed axis.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "attention.h"
#include "parallel.h"
#include "simd.h"

namespace fastdiff::cpu::FASTDIFF_ISA {

constexpr int64_t kWidth = Vec::size;
constexpr int kColumns = kWidth == 16 ? 4 : 2;  // registers of queries in a tile
constexpr int64_t kTile = kColumns * kWidth;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// 2^x for x <= 0, -inf and NaN: a minimax polynomial in the fraction, times 2^floor(x).
// Relative error: Degree 4 3e-6, Degree 5 1.4e-7.
template <int Degree>
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec f = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x); 0 for -inf
#else
  x = max(Vec(-150.0f), x);  // 2^-150 rounds to zero
  const Vec n = _mm256_floor_ps(x.v), f = x - n;
#endif
  Vec p;
  if constexpr (Degree == 4) {
    p = fma(Vec(0.013426684249863562f), f, Vec(0.052242474326589204f));
    p = fma(p, f, Vec(0.24128020465726416f));
    p = fma(p, f, Vec(0.6930448449182381f));
  } else {
    p = fma(Vec(0.0018671224731004108f), f, Vec(0.009017048221011409f));
    p = fma(p, f, Vec(0.05579989856910245f));
    p = fma(p, f, Vec(0.24016445491033828f));
    p = fma(p, f, Vec(0.693151311338148f));
  }
  p = fma(p, f, Vec(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p.v, x.v);
#else
  return ldexp(p, n);
#endif
}

// Rows of K, V and Q are short and far apart, so the hardware does not prefetch them.
constexpr int64_t kAhead = 16;  // rows
template <class T>
inline void prefetch_row(const T* row, int64_t length) {
  const char* p = reinterpret_cast<const char*>(row);
  const int64_t bytes = length * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T0);
  _mm_prefetch(p + bytes - 1, _MM_HINT_T0);
}

// c[m][query] = sum_t a[m a_row + t a_step] b[t][query], added to c (times rescale[query], if given) if `add`.
template <class Math, int Rows, int Columns>
inline void product_rows(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t steps, float* c,
                         bool add, const float* rescale) {
  Vec sum[Rows][Columns];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < Columns; ++n) sum[m][n] = Vec(0.0f);
  for (int64_t t = 0; t < steps; ++t, a += a_step, b += kTile) {
    Vec queries[Columns];
#pragma GCC unroll 4
    for (int n = 0; n < Columns; ++n) queries[n] = load(b + n * kWidth);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const Vec element(a[m * a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < Columns; ++n) sum[m][n] = Math::multiply_add(element, queries[n], sum[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < Columns; ++n) {
      float* to = c + m * kTile + n * kWidth;
      if (rescale)
        sum[m][n] = fma(load(to), load(rescale + n * kWidth), sum[m][n]);
      else if (add)
        sum[m][n] = load(to) + sum[m][n];
      store(to, sum[m][n]);
    }
}

// The same for any number of rows, in groups of nearly equal size: a group of one row would wait for its sums.
template <class Math, int Columns>
inline void product_in_registers(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t rows,
                                 int64_t steps, float* c, bool add, const float* rescale) {
  const int64_t groups = ceil_div(rows, 6);
  for (int64_t g = 0, m = 0; g < groups; ++g) {
    const int64_t end = rows * (g + 1) / groups, size = end - m;
    const float* first = a + m * a_row;
    float* to = c + m * kTile;
    switch (size) {
      case 1: product_rows<Math, 1, Columns>(first, a_row, a_step, b, steps, to, add, rescale); break;
      case 2: product_rows<Math, 2, Columns>(first, a_row, a_step, b, steps, to, add, rescale); break;
      case 3: product_rows<Math, 3, Columns>(first, a_row, a_step, b, steps, to, add, rescale); break;
      case 4: product_rows<Math, 4, Columns>(first, a_row, a_step, b, steps, to, add, rescale); break;
      case 5: product_rows<Math, 5, Columns>(first, a_row, a_step, b, steps, to, add, rescale); break;
      case 6: product_rows<Math, 6, Columns>(first, a_row, a_step, b, steps, to, add, rescale); break;
    }
    m = end;
  }
}

// One thread's work: scratch memory and the loops over it.
template <class Math>
class AttentionWorker {
  using T = typename Math::Element;

 public:
  struct Plan {
    int64_t block;     // keys per block
    int64_t blocks;    // per head
    int64_t resident;  // blocks that are kept packed: all or one
    int64_t group;     // tiles of queries that share a packed block
    int64_t groups;    // per head
    int64_t units;     // of work: (batch, head, group)
  };

  static Plan plan(const AttentionArgs& args) {
    constexpr int64_t kBudget = 512 << 10;  // bytes
    const int64_t tiles = ceil_div(args.queries, kTile), heads = args.batch * args.heads;
    Plan plan;
    plan.blocks = args.keys <= Math::kOneBlock ? 1 : ceil_div(args.keys, Math::kKeyBlock);
    plan.block = round_up(ceil_div(args.keys, plan.blocks), 32);
    plan.resident = plan.blocks;
    plan.group = 1;
    const int64_t block_units =
        Math::packed_keys_size(plan.block, args.depth) + Math::packed_values_size(plan.block, args.depth);
    if (4 * block_units * plan.blocks > kBudget) {
      plan.resident = 1;
      const int64_t most = std::clamp<int64_t>(kBudget / (8 * kTile * args.depth), 1, 8);
      plan.group = std::clamp<int64_t>(ceil_div(heads * tiles, 2 * int64_t{args.threads}), 1, most);
    }
    plan.groups = ceil_div(tiles, plan.group);
    plan.units = heads * plan.groups;
    return plan;
  }

  AttentionWorker(const AttentionArgs& args, const Plan& plan) : args_(args), plan_(plan) {
    const int64_t block = plan.block;
    q_size_ = round_up(Math::steps(args.depth), kWidth) * kTile;
    o_size_ = Math::rows(args.depth) * kTile;
    k_size_ = round_up(Math::packed_keys_size(block, args.depth), 16);
    v_size_ = round_up(Math::packed_values_size(block, args.depth), 16);
    const int64_t sizes[] = {plan.resident * k_size_,
                             plan.resident * v_size_,
                             block * kTile,
                             Math::kPairs ? block / 2 * kTile : 0,
                             args.mask ? Math::kChunk + kWidth : 0,
                             plan.group * (q_size_ + o_size_ + 3 * kTile),
                             kTile};
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size, 16);
    scratch_ = new (std::align_val_t(64)) float[static_cast<size_t>(total)];
    float* next = scratch_;
    float** const places[] = {&k_, &v_, &s_, &p_, &bias_, &tiles_, &rescale_};
    for (int i = 0; i < 7; ++i) *places[i] = next, next += round_up(sizes[i], 16);
    if (!Math::kPairs) p_ = s_;
    packed_.assign(static_cast<size_t>(plan.resident), -1);
  }
  AttentionWorker(const AttentionWorker&) = delete;
  ~AttentionWorker() { ::operator delete[](scratch_, std::align_val_t(64)); }

  void run(int64_t unit) {
    const int64_t head_index = unit / plan_.groups;
    batch_ = head_index / args_.heads, head_ = head_index % args_.heads;
    const int64_t first = unit % plan_.groups * plan_.group * kTile;
    const int64_t tiles = std::min(plan_.group, ceil_div(args_.queries - first, kTile));
    for (int64_t i = 0; i < tiles; ++i) pack_queries(tile_at(i, first));
    const int64_t last = std::min(first + tiles * kTile, args_.queries);  // queries, exclusive
    const int64_t keys = args_.causal ? std::min(args_.keys, last) : args_.keys;
    for (int64_t block = 0, begin = 0; begin < keys; ++block, begin += plan_.block) {
      pack_block(head_index, block);
      for (int64_t i = 0; i < tiles; ++i) {
        Tile tile = tile_at(i, first);
        int64_t count = std::min(plan_.block, args_.keys - begin);
        if (args_.causal) count = std::min(count, tile.query + tile.count - begin);
        if (count <= 0) continue;
        switch (ceil_div(tile.count, kWidth)) {
          case 1: attend<1>(tile, block, count); break;
          case 2: attend<2>(tile, block, count); break;
          case 3: attend<std::min(3, kColumns)>(tile, block, count); break;
          case 4: attend<std::min(4, kColumns)>(tile, block, count); break;
        }
      }
    }
    for (int64_t i = 0; i < tiles; ++i) finish(tile_at(i, first));
  }

 private:
  struct Tile {
    float* q;      // packed queries
    float* out;    // (value depth, query), not yet divided by sum
    float* base;   // per query: what is subtracted from its logits
    float* sum;    // of the exponentials, as they enter the second product
    float* exact;  // of the exponentials before rounding, for the log-sum-exp
    int64_t query, count;
  };

  Tile tile_at(int64_t i, int64_t first) const {
    float* p = tiles_ + i * (q_size_ + o_size_ + 3 * kTile);
    float* base = p + q_size_ + o_size_;
    const int64_t query = first + i * kTile;
    return {p, p + q_size_, base, base + kTile, base + 2 * kTile, query, std::min(kTile, args_.queries - query)};
  }

  const T* at(const void* data, const int64_t (&strides)[3], int64_t position) const {
    return static_cast<const T*>(data) + batch_ * strides[0] + position * strides[1] + head_ * strides[2];
  }

  void pack_block(int64_t head_index, int64_t block) {
    const int64_t slot = block % plan_.resident, id = head_index * plan_.blocks + block;
    if (packed_[static_cast<size_t>(slot)] == id) return;
    packed_[static_cast<size_t>(slot)] = id;
    const int64_t begin = block * plan_.block, count = std::min(plan_.block, args_.keys - begin);
    Math::pack_keys(at(args_.k, args_.k_strides, begin), args_.k_strides[1], count, args_.depth, k_ + slot * k_size_);
    Math::pack_values(at(args_.v, args_.v_strides, begin), args_.v_strides[1], count, args_.depth, plan_.block,
                      v_ + slot * v_size_);
  }

  void pack_queries(const Tile& tile) const {
    const T* q = at(args_.q, args_.q_strides, tile.query);
    const int64_t units = round_up(Math::steps(args_.depth), kWidth);
    for (int64_t i = 0; i < tile.count; ++i) prefetch_row(q + i * args_.q_strides[1], args_.depth);
    for (int64_t j = 0; j < tile.count; j += kWidth)
      for (int64_t d = 0; d < units; d += kWidth) {
        Vec rows[kWidth];
        for (int64_t i = 0; i < kWidth; ++i)
          rows[i] = j + i < tile.count ? Math::load_units(q + (j + i) * args_.q_strides[1], d, args_.depth) : Vec(0.0f);
        transpose(rows);
        for (int64_t i = 0; i < kWidth; ++i) store(tile.q + (d + i) * kTile + j, rows[i]);
      }
  }

  template <int Columns>
  void attend(const Tile& tile, int64_t block, int64_t keys) {
    const int64_t begin = block * plan_.block, slot = block % plan_.resident, depth = args_.depth;
    Vec top[Columns];  // per query: the block's largest logit
    for (int n = 0; n < Columns; ++n) top[n] = Vec(-kInfinity);
    for (int64_t key = 0; key < keys; key += Math::kChunk) {  // the maximum is taken while the logits are near
      const int64_t count = std::min(Math::kChunk, keys - key);
      float* s = s_ + key * kTile;
      const float* k = k_ + slot * k_size_ + key * Math::packed_keys_size(1, depth);
      Math::template scores<Columns>(k, tile.q, count, depth, s);
      if (args_.mask)
        add_mask<Columns>(tile, s, begin + key, count);
      else if (args_.causal && begin + key + count - 1 > tile.query)
        mask_future<Columns>(tile, s, begin + key, count);
      raise<Columns>(top, s, count);
    }
    const float scale = args_.mask ? 1.0f : args_.scale * kLog2E;  // to powers of two
    const bool first = block == 0, rescale = set_base<Columns>(tile, top, scale, first);
    if (args_.lse)
      exponentials<Columns, true>(tile, keys, scale);
    else
      exponentials<Columns, false>(tile, keys, scale);
    Math::template accumulate<Columns>(v_ + slot * v_size_, p_, keys, depth, plan_.block, tile.out, !first,
                                       rescale ? rescale_ : nullptr);
  }

  template <int Columns>
  static void raise(Vec (&top)[Columns], const float* s, int64_t keys) {
    Vec other[Columns];
    for (int n = 0; n < Columns; ++n) other[n] = top[n];
    for (; keys >= 2; keys -= 2, s += 2 * kTile)
      for (int n = 0; n < Columns; ++n) {
        top[n] = max(load(s + n * kWidth), top[n]);
        other[n] = max(load(s + kTile + n * kWidth), other[n]);
      }
    for (int n = 0; n < Columns; ++n) {
      if (keys) other[n] = max(load(s + n * kWidth), other[n]);
      top[n] = max(top[n], other[n]);
    }
  }

  // The base, which is subtracted from the logits, follows the maximum: then the weight that matters most is 1, which
  // bf16 holds exactly. True if it changed: the sums are rescaled, and the accumulator is to be, by rescale_.
  template <int Columns>
  bool set_base(const Tile& tile, const Vec (&top)[Columns], float scale_value, bool first) {
    if (first) {
      for (int n = 0; n < Columns; ++n) {
        store(tile.base + n * kWidth, top[n]);
        store(tile.sum + n * kWidth, Vec(0.0f));
        store(tile.exact + n * kWidth, Vec(0.0f));
      }
      return false;
    }
    Vec raised(0.0f);
    for (int n = 0; n < Columns; ++n)
      raised = select_lt(load(tile.base + n * kWidth), top[n], Vec(1.0f), raised);
    if (reduce_max(raised) == 0.0f) return false;
    const Vec scale(scale_value);
    for (int n = 0; n < Columns; ++n) {
      const Vec old = load(tile.base + n * kWidth), base = max(top[n], old);
      const Vec factor = select_lt(old, base, exp2<5>((old - base) * scale), Vec(1.0f));  // not NaN for -inf - -inf
      store(tile.base + n * kWidth, base);
      store(rescale_ + n * kWidth, factor);
      store(tile.sum + n * kWidth, load(tile.sum + n * kWidth) * factor);
      store(tile.exact + n * kWidth, load(tile.exact + n * kWidth) * factor);
    }
    return true;
  }

  // Logits to exponentials, and their sums.
  template <int Columns, bool Lse>
  void exponentials(const Tile& tile, int64_t keys, float scale_value) {
    const Vec scale(scale_value);
    Vec base[Columns], sum[Columns], exact[Columns];
    for (int n = 0; n < Columns; ++n) {
      const Vec b = load(tile.base + n * kWidth);
      base[n] = select_lt(Vec(-kInfinity), b, b, Vec(0.0f));  // all masked: exponentials are to be 0, not NaN
      sum[n] = load(tile.sum + n * kWidth), exact[n] = load(tile.exact + n * kWidth);
    }
    const float* s = s_;
    float* p = p_;
    if constexpr (Math::kPairs) {
      constexpr int kDegree = Lse ? 5 : 4;  // enough for values that are rounded to bf16
      for (int64_t key = 0; key < keys; key += 2, s += 2 * kTile, p += kTile)
#pragma GCC unroll 4
        for (int n = 0; n < Columns; ++n) {
          // Difference first: the product of a large base and the scale rounds to more than the exponent can bear.
          const Vec even = exp2<kDegree>((load(s + n * kWidth) - base[n]) * scale);
          const Vec odd = key + 1 < keys ? exp2<kDegree>((load(s + kTile + n * kWidth) - base[n]) * scale) : Vec(0.0f);
          const Vec pair = Math::pair(even, odd);
          store(p + n * kWidth, pair);
          // The rounded values are summed: the rounding errors of numerator and denominator then cancel in part.
          sum[n] = Math::add_pair(sum[n], pair);
          if (Lse) exact[n] = exact[n] + (even + odd);
        }
      for (int64_t step = ceil_div(keys, 2); step < Math::steps(keys); ++step, p += kTile)
        for (int n = 0; n < Columns; ++n) store(p + n * kWidth, Vec(0.0f));
    } else {
      for (int64_t key = 0; key < keys;) {
        Vec part[Columns];  // sums of sums: one long chain of additions would lose digits
        for (int n = 0; n < Columns; ++n) part[n] = Vec(0.0f);
        for (const int64_t end = std::min(keys, key + 32); key < end; ++key, s += kTile, p += kTile)
#pragma GCC unroll 4
          for (int n = 0; n < Columns; ++n) {
            // Difference first, so that a query's only key counts exactly 1.
            const Vec value = exp2<5>((load(s + n * kWidth) - base[n]) * scale);
            store(p + n * kWidth, value);
            part[n] = part[n] + value;
          }
        for (int n = 0; n < Columns; ++n) sum[n] = sum[n] + part[n];
      }
    }
    for (int n = 0; n < Columns; ++n) {
      store(tile.sum + n * kWidth, sum[n]);
      if (Lse) store(tile.exact + n * kWidth, Math::kPairs ? exact[n] : sum[n]);
    }
  }

  template <int Columns>
  static void mask_future(const Tile& tile, float* s, int64_t begin, int64_t keys) {
    float lanes[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) lanes[i] = static_cast<float>(i);
    // Positions relative to the tile's first query stay exact in fp32.
    for (int64_t key = std::max<int64_t>(0, tile.query - begin); key < keys; ++key)
      for (int n = 0; n < Columns; ++n) {
        float* at = s + key * kTile + n * kWidth;
        const Vec query = load(lanes) + Vec(static_cast<float>(n * kWidth));
        store(at, select_lt(query, Vec(static_cast<float>(begin + key - tile.query)), Vec(-kInfinity), load(at)));
      }
  }

  template <int Columns>
  void add_mask(const Tile& tile, float* s, int64_t begin, int64_t keys) {
    if (args_.mask_is_bool) return add_mask_of<Columns, uint8_t>(tile, s, begin, keys);
    dispatch(args_.mask_dtype, [&](auto tag) { add_mask_of<Columns, decltype(tag)>(tile, s, begin, keys); });
  }

  // s = (scale s + mask) log2 e
  template <int Columns, class M>
  void add_mask_of(const Tile& tile, float* s, int64_t begin, int64_t keys) {
    const Vec scale(args_.scale * kLog2E);
    const int64_t* strides = args_.mask_strides;
    const M* mask = static_cast<const M*>(args_.mask) + batch_ * strides[0] + head_ * strides[1] +
                    tile.query * strides[2] + begin;
    if (strides[2] == 0) {  // one row for all queries
      for (int64_t key = 0; key < keys; key += kWidth) store(bias_ + key, load_mask(mask + key, keys - key));
      for (int64_t key = 0; key < keys; ++key)
        for (int n = 0; n < Columns; ++n) {
          float* at = s + key * kTile + n * kWidth;
          store(at, fma(load(at), scale, Vec(bias_[key])));
        }
      return;
    }
    for (int64_t key = 0; key < keys; key += kWidth)
      for (int n = 0; n < Columns; ++n) {
        Vec rows[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
          const int64_t query = n * kWidth + i;
          rows[i] = query < tile.count ? load_mask(mask + query * strides[2] + key, keys - key) : Vec(0.0f);
        }
        transpose(rows);
        for (int64_t i = 0; i < std::min(kWidth, keys - key); ++i) {
          float* at = s + (key + i) * kTile + n * kWidth;
          store(at, fma(load(at), scale, rows[i]));
        }
      }
  }

  // Times log2 e. Finite values are kept where that cannot overflow: masks are often made of the lowest float. All NaN
  // become the same one, whose lower bits are zero.
  template <class M>
  static Vec load_mask(const M* p, int64_t n) {
    const Vec bias = n >= kWidth ? load(p) : load(p, n);
    const Vec rest = select_lt(bias, Vec(0.0f), bias, Vec(std::numeric_limits<float>::quiet_NaN()));  // -inf or NaN
    return select_lt(Vec(-kInfinity), bias, max(Vec(-2e38f), bias), rest) * Vec(kLog2E);
  }
  static Vec load_mask(const uint8_t* p, int64_t n) {
    uint8_t bytes[16] = {};
    std::memcpy(bytes, p, static_cast<size_t>(std::min(n, kWidth)));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
#if defined(__AVX512F__)
    const Vec values = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(b));
#else
    const Vec values = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b));
#endif
    return select_lt(Vec(0.0f), values, Vec(0.0f), Vec(-kInfinity));
  }

  void finish(const Tile& tile) const {
    const int64_t depth = args_.depth, row = args_.heads * depth;
    const int64_t position = (batch_ * args_.queries + tile.query) * args_.heads + head_;
    T* out = static_cast<T*>(args_.out) + position * depth;
    for (int64_t j = 0; j < tile.count; j += kWidth) {
      const Vec sum = load(tile.sum + j);
      const Vec inverse = select_lt(sum, Vec(std::numeric_limits<float>::min()), Vec(0.0f), Vec(1.0f) / sum);
      const int64_t queries = std::min(kWidth, tile.count - j);
      for (int64_t d = 0; d < depth; d += kWidth) {
        const int64_t count = std::min(kWidth, depth - d);
        Vec rows[kWidth];
        for (int64_t i = 0; i < kWidth; ++i)
          rows[i] = i < count ? load(tile.out + (d + i) * kTile + j) * inverse : Vec(0.0f);
        transpose(rows);
        for (int64_t i = 0; i < queries; ++i) {
          T* to = out + (j + i) * row + d;
          if (count == kWidth)
            store(to, rows[i]);
          else
            store(to, rows[i], count);
        }
      }
    }
    if (!args_.lse) return;
    const float scale = args_.mask ? 1 / kLog2E : args_.scale;
    for (int64_t i = 0; i < tile.count; ++i)
      args_.lse[position + i * args_.heads] = tile.base[i] * scale + std::log(tile.exact[i]);
  }

  const AttentionArgs& args_;
  const Plan plan_;
  int64_t q_size_, o_size_, k_size_, v_size_;  // units: per tile, per tile, per block, per block
  int64_t batch_ = 0, head_ = 0;
  std::vector<int64_t> packed_;  // which block of which head each resident slot holds
  float* scratch_;
  float *k_, *v_, *s_, *p_, *bias_, *tiles_, *rescale_;
};

template <class Math>
void attention_blocks(const AttentionArgs& args) {
  const auto plan = AttentionWorker<Math>::plan(args);
  const int64_t flops = 4 * kTile * plan.group * args.keys * args.depth;
  const int64_t grain = std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(flops, 1));
  parallel_for(0, plan.units, grain, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Math::Session session;
    AttentionWorker<Math> worker(args, plan);
    for (int64_t unit = begin; unit < end; ++unit) worker.run(unit);
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
