// Attention on tensor cores, by mma.sync
//
// A warp takes 16 queries of one head. Up to 16 queries (`few`) would occupy one warp: there the warps have the same
// queries and a part of every block of keys each, and merge what they found. At head dimension 512 a warp's result does
// not fit its registers: there pairs of warps have the same queries and a half (`slice`) of the result each.
#pragma once

#include "attention.cuh"

namespace fastdiff::cuda {

constexpr int kFew = 16;  // queries of a warp

template <class T, int depth, bool few>
struct Attention {
  static constexpr int kSlices = depth > 256 ? 2 : 1, kShares = few ? kWarps : 1;
  static constexpr int kKeys = depth > 128 && !few ? 32 : 64;
  static constexpr int kMostWarps = few ? kWarps : 8;
  using Shared = Operands<T, depth, kKeys>;
  static constexpr __host__ __device__ int queries(int warps) { return 16 * warps / kSlices / kShares; }
  static constexpr int64_t shared_bytes(int stages, int warps) {
    return 2 * (int64_t{queries(warps)} * kRowOf<T, depth> + int64_t{stages} * 2 * Shared::kSize);
  }
};

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

// Merges the results of warps that had different keys, by way of `memory`, and their sums. Says whether this warp is the
// one that has the whole of them, the last.
template <int tiles>
__device__ __forceinline__ bool merge_shares(float (&out)[tiles][4], float (&base)[2], float (&sum)[2], float (&exact)[2],
                                             float scale, float* memory) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float* statistics = memory + tiles * 4 * kWarp;  // by warp and row: base, sum and exact
  wait_copies<0>();
  __syncthreads();  // the keys there have been read by all
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float weights = quad_sum(sum[r]), all = quad_sum(exact[r]);
    float* to = statistics + 3 * (kFew * warp + lane / 4 + 8 * r);
    if (lane % 4 == 0) store_one(to, base[r]), store_one(to + 1, weights), store_one(to + 2, all);
  }
  __syncthreads();
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float* from = statistics + 3 * (lane / 4 + 8 * r);
    float top = -INFINITY;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, load_one(from + 3 * kFew * w));
    const float shift = top == -INFINITY ? 0.0f : top;
    factor[r] = exp2_fast((base[r] - shift) * scale);
    base[r] = top;
    // A quad's lanes are summed up later.
    sum[r] = exact[r] = 0.0f;
    if (lane % 4 == 0)
      for (int w = 0; w < kWarps; ++w) {
        const float* of = from + 3 * kFew * w;
        const float share = exp2_fast((load_one(of) - shift) * scale);
        sum[r] += load_one(of + 1) * share, exact[r] += load_one(of + 2) * share;
      }
  }
#pragma unroll
  for (int n = 0; n < tiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) out[n][i] *= factor[i / 2];
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp)
#pragma unroll
      for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float* at = memory + (4 * n + i) * kWarp + lane;
          if (w > 0) out[n][i] += load_one(at);
          if (w + 1 < kWarps) store_one(at, out[n][i]);
        }
    __syncthreads();
  }
  return warp == kWarps - 1;
}

template <class T, int depth, bool few>
__global__ void __launch_bounds__(Attention<T, depth, few>::kMostWarps* kWarp, 1)  // 1: else ptxas spills for occupancy
    attention_kernel(const __grid_constant__ AttentionArgs args, const __grid_constant__ AttentionPlan plan) {
  using A = Attention<T, depth, few>;
  constexpr int kRow = kRowOf<T, depth>, kOwnKeys = A::kKeys / A::kShares, kOwnDepth = depth / A::kSlices;
  constexpr int kKeyTiles = kOwnKeys / 8, kDepthTiles = kOwnDepth / 8;
  const int queries = A::queries(plan.warps), row_warps = queries / 16;
  T* q_shared = dynamic_shared<T>();
  T* kv_shared = q_shared + queries * kRow;

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Head head(plan, args.heads);
  const int real_depth = args.depth;
  const int own_row = few ? 0 : 16 * (warp % row_warps);  // of the tile of queries
  const int own_key = few ? warp * kOwnKeys : 0;          // of a block of keys
  const int own_column = A::kSlices > 1 ? warp / row_warps * kOwnDepth : 0;
  const typename A::Shared shared{args, plan, head, q_shared, kv_shared, queries};

  shared.for_each_tile([&](int first_query) {
    // Of the two rows of this lane, g and g + 8 of its warp's 16.
    float out[kDepthTiles][4] = {};
    float base[2] = {-INFINITY, -INFINITY}, sum[2] = {}, exact[2] = {};
    const float scale = log2_scale(args);
    shared.for_each_block(first_query, [&](int first_key, const T* block_shared) {
      const T* k_shared = block_shared + own_key * kRow;
      const T* v_shared = k_shared + A::Shared::kSize + own_column;

      float s[kKeyTiles][4] = {};
#pragma unroll
      for (int d = 0; d < depth; d += 16) {
        uint32_t a[4];
        load_matrices<false>(a, q_shared + (own_row + lane % 16) * kRow + d + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += 2) {
          uint32_t b[4];
          load_matrices<false>(b, k_shared + (8 * n + lane / 16 * 8 + lane % 8) * kRow + d + lane / 8 % 2 * 8);
          multiply_add<T>(s[n], a, b[0], b[1]);
          multiply_add<T>(s[n + 1], a, b[2], b[3]);
        }
      }

      first_key += own_key;
      if (shared.hides(first_query, first_key + kOwnKeys))
        hide(args, head, first_query, first_key, [&](const auto& visit) {
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              visit(own_row + lane / 4 + i / 2 * 8, 8 * n + lane % 4 * 2 + i % 2, s[n][i]);
        });

      float factor[2], shift[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = base[r];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        top = quad_max(top);
        shift[r] = top == -INFINITY ? 0.0f : top;  // all keys hidden so far
        factor[r] = base[r] == -INFINITY ? 0.0f : exp2_fast((base[r] - shift[r]) * scale);
        base[r] = top;
        sum[r] *= factor[r], exact[r] *= factor[r];
      }
#pragma unroll
      for (int n = 0; n < kDepthTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= factor[i / 2];
      uint32_t weights[kKeyTiles][2];  // as they enter the second product, in pairs
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float one = exp2_fast((s[n][2 * r] - shift[r]) * scale);
          const float other = exp2_fast((s[n][2 * r + 1] - shift[r]) * scale);
          exact[r] += one + other;
          sum[r] += round_to<T>(one) + round_to<T>(other);
          weights[n][r] = pack_two<T>(one, other);
        }
#pragma unroll
      for (int key = 0; key < kOwnKeys; key += 16) {
        const uint32_t(&low)[2] = weights[key / 8], (&high)[2] = weights[key / 8 + 1];
        const uint32_t a[4] = {low[0], low[1], high[0], high[1]};
#pragma unroll
        for (int n = 0; n < kDepthTiles; n += 2) {
          uint32_t b[4];
          load_matrices<true>(b, v_shared + (key + lane % 16) * kRow + 8 * n + lane / 16 * 8);
          multiply_add<T>(out[n], a, b[0], b[1]);
          multiply_add<T>(out[n + 1], a, b[2], b[3]);
        }
      }
    });

    if constexpr (few)
      if (!merge_shares(out, base, sum, exact, scale, reinterpret_cast<float*>(kv_shared))) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_query + own_row + lane / 4 + 8 * r;
      const float weights = quad_sum(sum[r]), all = quad_sum(exact[r]);
      if (query >= args.queries) continue;
      const float share = base[r] == -INFINITY ? 0.0f : 1.0f / weights;
      const int64_t place = (int64_t{head.batch} * args.queries + query) * args.heads + head.index;
      T* to = static_cast<T*>(args.out) + place * real_depth;
#pragma unroll
      for (int n = 0; n < kDepthTiles; ++n) {
        const int c = own_column + 8 * n + lane % 4 * 2;
        const float pair[2] = {out[n][2 * r] * share, out[n][2 * r + 1] * share};
        if (c < real_depth) {
          if (real_depth % 2 == 0) {
            store(to + c, pair);
          } else {
            store_one(to + c, pair[0]);
            if (c + 1 < real_depth) store_one(to + c + 1, pair[1]);
          }
        }
      }
      if (args.lse && lane % 4 == 0 && own_column == 0)
        store_one(args.lse + place, base[r] * scale * kLn2 + logf(all));  // a NaN is in `all` only
    }
  });
}

template <class T, int depth, bool few = false>
const char* attention_with(const AttentionArgs& args, bool packs, Stream stream) {
  return launch_attention<Attention<T, depth, few>>(attention_kernel<T, depth, few>, args, packs, stream);
}

template <class T>
const char* attention_of(const AttentionArgs& args, Stream stream) {
  const bool packs = in_packs<T>(args);
  if (args.queries <= kFew && args.depth <= 256) {
    if (args.depth <= 64) return attention_with<T, 64, true>(args, packs, stream);
    if (args.depth <= 128) return attention_with<T, 128, true>(args, packs, stream);
    return attention_with<T, 256, true>(args, packs, stream);
  }
  if (args.depth <= 32) return attention_with<T, 32>(args, packs, stream);
  if (args.depth <= 48) return attention_with<T, 48>(args, packs, stream);
  if (args.depth <= 64) return attention_with<T, 64>(args, packs, stream);
  if (args.depth <= 80) return attention_with<T, 80>(args, packs, stream);
  if (args.depth <= 96) return attention_with<T, 96>(args, packs, stream);
  if (args.depth <= 128) return attention_with<T, 128>(args, packs, stream);
  if (args.depth <= 160) return attention_with<T, 160>(args, packs, stream);
  if (args.depth <= 256) return attention_with<T, 256>(args, packs, stream);
  if (args.depth <= 512) return attention_with<T, 512>(args, packs, stream);
  return "attention: the head dimension is larger than 512";
}

}  // namespace fastdiff::cuda
