// Attention in fp32, whose products tensor cores would round
//
// A warp takes kRows queries of one head. Of a block of keys a lane has one key, or with deep heads a part of one, and
// computes its logits; of the result it has every 32nd column. The weights go from one to the other by shared memory.
#include "attention.cuh"
#include "reduce.cuh"

namespace fastdiff::cuda {
namespace {

template <int depth>
struct FmaAttention {
  static constexpr int kRows = depth > 128 ? 4 : 8, kKeys = depth > 160 ? 16 : 32;
  static constexpr int kMostWarps = kWarps;
  using Shared = Operands<float, depth, kKeys>;
  static constexpr __host__ __device__ int queries(int warps) { return kRows * warps; }
  static constexpr int64_t shared_bytes(int stages, int warps) {
    return 4 * (int64_t{queries(warps)} * (kRowOf<float, depth> + kKeys) + int64_t{stages} * 2 * Shared::kSize);
  }
};

template <int n>
__device__ __forceinline__ void warp_max(float (&v)[n]) {
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2)
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = fmaxf(v[i], __shfl_xor_sync(kAllLanes, v[i], bit));
}

template <int depth>
__global__ void __launch_bounds__(kWarps* kWarp, 1)  // 1: else ptxas spills for occupancy
    fma_attention_kernel(const __grid_constant__ AttentionArgs args, const __grid_constant__ AttentionPlan plan) {
  using A = FmaAttention<depth>;
  constexpr int kRows = A::kRows, kKeys = A::kKeys, kRow = kRowOf<float, depth>, kColumns = depth / kWarp;
  constexpr int kQueries = A::queries(kWarps), kParts = kWarp / kKeys;
  float* q_shared = dynamic_shared<float>();
  float* weights_shared = q_shared + kQueries * kRow;
  float* kv_shared = weights_shared + kQueries * kKeys;

  const int lane = threadIdx.x % kWarp, own_row = kRows * (threadIdx.x / kWarp);
  const int own_key = lane % kKeys, part = lane / kKeys;
  const Head head(plan, args.heads);
  const int real_depth = args.depth;
  const float* own_q = q_shared + own_row * kRow;
  float* own_weights = weights_shared + own_row * kKeys;
  const typename A::Shared shared{args, plan, head, q_shared, kv_shared, kQueries};

  shared.for_each_tile([&](int first_query) {
    const int row = first_query + own_row;
    float out[kRows][kColumns] = {}, base[kRows], sum[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) base[r] = -INFINITY;
    const float scale = log2_scale(args);
    shared.for_each_block(first_query, [&](int first_key, const float* block_shared) {
      const float *k_shared = block_shared + own_key * kRow, *v_shared = block_shared + A::Shared::kSize + lane;

      float s[kRows] = {};
#pragma unroll 2
      for (int d = 4 * part; d < real_depth; d += 4 * kParts) {
        float key[4], query[4];
        load(k_shared + d, key);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          load(own_q + r * kRow + d, query);
#pragma unroll
          for (int i = 0; i < 4; ++i) s[r] += query[i] * key[i];
        }
      }
      if constexpr (kParts > 1)
#pragma unroll
        for (int r = 0; r < kRows; ++r) s[r] += __shfl_xor_sync(kAllLanes, s[r], kKeys);

      if (shared.hides(first_query, first_key + kKeys))
        hide(args, head, first_query, first_key, [&](const auto& visit) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) visit(own_row + r, own_key, s[r]);
        });

      float top[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) top[r] = fmaxf(base[r], s[r]);
      warp_max(top);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float shift = top[r] == -INFINITY ? 0.0f : top[r];  // all keys hidden so far
        const float factor = exp2_fast((base[r] - shift) * scale), weight = exp2_fast((s[r] - shift) * scale);
        base[r] = top[r];
        sum[r] = sum[r] * factor + (part == 0 ? weight : 0.0f);
        if (part == 0) store_one(own_weights + r * kKeys + own_key, weight);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) out[r][c] *= factor;
      }
      __syncwarp();
      float partial[kRows][kColumns] = {};  // a sum of sums, whose error grows with the number of blocks only
      for (int key = 0; key < kKeys; key += 4) {
        float weights[kRows][4];
#pragma unroll
        for (int r = 0; r < kRows; ++r) load(own_weights + r * kKeys + key, weights[r]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const float value = load_one(v_shared + (key + i) * kRow + c * kWarp);
#pragma unroll
            for (int r = 0; r < kRows; ++r) partial[r][c] += weights[r][i] * value;
          }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) out[r][c] += partial[r][c];
      __syncwarp();  // before the next block's weights are written
    });

    warp_sum(sum);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= args.queries) continue;
      const int64_t place = (int64_t{head.batch} * args.queries + row + r) * args.heads + head.index;
      float* to = static_cast<float*>(args.out) + place * real_depth;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (const int column = c * kWarp + lane; column < real_depth)
          store_one(to + column, sum[r] == 0.0f ? 0.0f : divide(out[r][c], sum[r]));
      if (args.lse && lane == 0) store_one(args.lse + place, base[r] * scale * kLn2 + logf(sum[r]));
    }
  });
}

template <int depth>
const char* attention_with(const AttentionArgs& args, Stream stream) {
  return launch_attention<FmaAttention<depth>>(fma_attention_kernel<depth>, args, in_packs<float>(args), stream);
}

}  // namespace

const char* attention_fp32(const AttentionArgs& args, Stream stream) {
  if (args.depth <= 32) return attention_with<32>(args, stream);
  if (args.depth <= 64) return attention_with<64>(args, stream);
  if (args.depth <= 96) return attention_with<96>(args, stream);
  if (args.depth <= 128) return attention_with<128>(args, stream);
  if (args.depth <= 160) return attention_with<160>(args, stream);
  if (args.depth <= 256) return attention_with<256>(args, stream);
  if (args.depth <= 512) return attention_with<512>(args, stream);
  return "attention: the head dimension is larger than 512";
}

}  // namespace fastdiff::cuda
