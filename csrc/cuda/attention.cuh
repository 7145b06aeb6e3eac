// Blockwise attention with an online softmax (FlashAttention-2), on tensor cores by mma.sync
//
// A warp takes 16 queries of one head, and a block of them goes over the keys in blocks of kKeys, which it copies ahead
// asynchronously. Where all keys fit into shared memory they stay there, and the block goes on to further queries:
// cross-attention to a prompt is this. The head dimension is padded with zeros to a multiple of 16 in shared memory only.
// Rows there are 16 bytes longer than their elements, so that ldmatrix meets no bank twice.
//
// Up to 16 queries (`few`) would occupy one warp: there the warps have the same queries and a part of every block of
// keys each, and merge what they found. At head dimension 512 a warp's result does not fit its registers: there pairs of
// warps have the same queries and a half (`slice`) of the result each.
//
// A kernel for another instruction (wgmma) would be another `attention_kernel`, chosen in `attention_of`.
#pragma once

#include "ptx.cuh"

namespace fastdiff::cuda {

using AttentionArgs = cpu::AttentionArgs;

constexpr int kWarps = 4, kMostWarps = 8;
constexpr int kFew = 16;  // queries of a warp
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// How the keys are held: `stages` blocks in shared memory, which is all of them where `resident`.
struct AttentionPlan {
  int key_blocks, stages, warps;
  bool resident;
  bool packs;  // rows of q, k and v are made of whole, aligned packs
  uint32_t query_tiles, tiles_per_block, blocks_per_head;
};

template <class T, int depth, bool few>
struct Attention {
  static constexpr int kSlices = depth > 256 ? 2 : 1, kShares = few ? kWarps : 1;
  static constexpr int kKeys = depth > 128 && !few ? 32 : 64;
  static constexpr int kRow = depth + 8;  // elements between rows in shared memory
  static constexpr int kBlockSize = kKeys * kRow;
  static constexpr __host__ __device__ int queries(int warps) { return 16 * warps / kSlices / kShares; }
  static constexpr int64_t shared_bytes(int stages, int warps) {
    return 2 * (int64_t{queries(warps)} * kRow + int64_t{stages} * 2 * kBlockSize);
  }

  // Rows [first, first + rows) of a head, as far as they exist; zeros behind.
  static __device__ __forceinline__ void copy_rows(T* to, const T* from, int64_t stride, int rows, int64_t existing,
                                                   int real_depth, bool packs) {
    if (packs) {
      constexpr int kAcross = depth / 8;
      for (int i = threadIdx.x; i < rows * kAcross; i += blockDim.x) {
        const int row = i / kAcross, c = i % kAcross * 8;
        const bool valid = row < existing && c < real_depth;
        copy_async(to + row * kRow + c, valid ? from + row * stride + c : from, valid);
      }
    } else {
      for (int i = threadIdx.x; i < rows * depth; i += blockDim.x) {
        const int row = i / depth, c = i % depth;
        const bool valid = row < existing && c < real_depth;
        to[row * kRow + c] = from_float<T>(valid ? load_one(from + row * stride + c) : 0.0f);
      }
    }
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
__global__ void __launch_bounds__(kMostWarps* kWarp)
    attention_kernel(const __grid_constant__ AttentionArgs args, const __grid_constant__ AttentionPlan plan) {
  using A = Attention<T, depth, few>;
  constexpr int kKeys = A::kKeys, kRow = A::kRow, kOwnKeys = kKeys / A::kShares, kOwnDepth = depth / A::kSlices;
  constexpr int kKeyTiles = kOwnKeys / 8, kDepthTiles = kOwnDepth / 8;
  const int queries = A::queries(plan.warps), row_warps = queries / 16;
  T* q_shared = dynamic_shared<T>();
  T* kv_shared = q_shared + queries * kRow;

  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t head_index = blockIdx.x / plan.blocks_per_head;
  const int64_t batch = head_index / static_cast<uint32_t>(args.heads), head = head_index % static_cast<uint32_t>(args.heads);
  const int real_depth = args.depth;
  const T* q = static_cast<const T*>(args.q) + batch * args.q_strides[0] + head * args.q_strides[2];
  const T* k = static_cast<const T*>(args.k) + batch * args.k_strides[0] + head * args.k_strides[2];
  const T* v = static_cast<const T*>(args.v) + batch * args.v_strides[0] + head * args.v_strides[2];
  const int own_row = few ? 0 : 16 * (warp % row_warps);  // of the tile of queries
  const int own_key = few ? warp * kOwnKeys : 0;          // of a block of keys
  const int own_column = A::kSlices > 1 ? warp / row_warps * kOwnDepth : 0;
  const int64_t mask_base = batch * args.mask_strides[0] + head * args.mask_strides[1];

  const auto copy_keys = [&](int block) {
    if (block < plan.key_blocks) {
      T* to = kv_shared + block % plan.stages * 2 * A::kBlockSize;
      const int64_t first = int64_t{block} * kKeys;
      A::copy_rows(to, k + first * args.k_strides[1], args.k_strides[1], kKeys, args.keys - first, real_depth, plan.packs);
      A::copy_rows(to + A::kBlockSize, v + first * args.v_strides[1], args.v_strides[1], kKeys, args.keys - first,
                   real_depth, plan.packs);
    }
    commit_copies();  // an empty group keeps the count
  };
  if (plan.resident)
    for (int block = 0; block < plan.key_blocks; ++block) copy_keys(block);

  const uint32_t first_tile = blockIdx.x % plan.blocks_per_head * plan.tiles_per_block;
  uint32_t end_tile = first_tile + plan.tiles_per_block;
  if (end_tile > plan.query_tiles) end_tile = plan.query_tiles;
  for (uint32_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t first_query = int64_t{tile} * queries;
    __syncthreads();  // before the queries of the last tile are overwritten
    A::copy_rows(q_shared, q + first_query * args.q_strides[1], args.q_strides[1], queries, args.queries - first_query,
                 real_depth, plan.packs);
    commit_copies();
    if (!plan.resident)
      for (int block = 0; block + 1 < plan.stages; ++block) copy_keys(block);

    // Of the two rows of this lane, g and g + 8 of its warp's 16.
    const int64_t row = first_query + own_row + lane / 4;
    float out[kDepthTiles][4] = {};
    float base[2] = {-INFINITY, -INFINITY}, sum[2] = {}, exact[2] = {};
    const float scale = args.mask ? kLog2E : args.scale * kLog2E;  // of what the softmax sees, to powers of two
    int blocks = plan.key_blocks;
    if (args.causal) {
      const int64_t needed = (first_query + queries + kKeys - 1) / kKeys;
      if (needed < blocks) blocks = needed;
    }
    for (int block = 0; block < blocks; ++block) {
      if (block == 0 || !plan.resident) {
        wait_copies<0>();
        __syncthreads();  // and the stage that is filled next has been read by all
      }
      if (!plan.resident) copy_keys(block + plan.stages - 1);
      if (plan.stages == 1 && !plan.resident) {
        wait_copies<0>();
        __syncthreads();
      }
      const T* k_shared = kv_shared + block % plan.stages * 2 * A::kBlockSize + own_key * kRow;
      const T* v_shared = k_shared + A::kBlockSize + own_column;

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

      const int64_t first_key = int64_t{block} * kKeys + own_key, end_key = first_key + kOwnKeys;
      const bool ragged = end_key > args.keys, future = args.causal && end_key > first_query + 1;
      if (ragged || future || args.mask) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int64_t key = first_key + 8 * n + lane % 4 * 2 + i % 2, query = row + i / 2 * 8;
            if (key >= args.keys || (args.causal && key > query)) {
              s[n][i] = -INFINITY;
            } else if (args.mask && query < args.queries) {
              const int64_t at = mask_base + query * args.mask_strides[2] + key;
              s[n][i] *= args.scale;
              if (args.mask_is_bool) {
                const uint8_t* attend = static_cast<const uint8_t*>(args.mask) + at;
                check_read(attend, 1, 1);
                if (!*attend) s[n][i] = -INFINITY;
              } else {
                with_type(args.mask, args.mask_dtype, [&](auto* p) { s[n][i] += load_one(p + at); });
              }
            }
          }
      }

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
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[n][i] = exp2_fast((s[n][i] - shift[i / 2]) * scale);
          exact[i / 2] += s[n][i];
          sum[i / 2] += round_to<T>(s[n][i]);  // the weights as they enter the second product
        }
#pragma unroll
      for (int key = 0; key < kOwnKeys; key += 16) {
        const float(&low)[4] = s[key / 8], (&high)[4] = s[key / 8 + 1];
        const uint32_t a[4] = {pack_two<T>(low[0], low[1]), pack_two<T>(low[2], low[3]), pack_two<T>(high[0], high[1]),
                               pack_two<T>(high[2], high[3])};
#pragma unroll
        for (int n = 0; n < kDepthTiles; n += 2) {
          uint32_t b[4];
          load_matrices<true>(b, v_shared + (key + lane % 16) * kRow + 8 * n + lane / 16 * 8);
          multiply_add<T>(out[n], a, b[0], b[1]);
          multiply_add<T>(out[n + 1], a, b[2], b[3]);
        }
      }
    }

    if constexpr (few)
      if (!merge_shares(out, base, sum, exact, scale, reinterpret_cast<float*>(kv_shared))) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t query = row + 8 * r;
      const float weights = quad_sum(sum[r]), all = quad_sum(exact[r]);
      if (query >= args.queries) continue;
      const float share = base[r] == -INFINITY ? 0.0f : 1.0f / weights;
      const int64_t place = (batch * args.queries + query) * args.heads + head;
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
        store_one(args.lse + place, base[r] == -INFINITY ? -INFINITY : base[r] * scale * kLn2 + logf(all));
    }
  }
  wait_copies<0>();
}

template <class T, int depth, bool few = false>
const char* attention_with(const AttentionArgs& args, bool packs, Stream stream) {
  using A = Attention<T, depth, few>;
  AttentionPlan plan{};
  plan.packs = packs;
  plan.key_blocks = static_cast<int>(ceil_div(args.keys, A::kKeys));
  const int64_t limit = shared_memory_limit(), heads = args.batch * args.heads;
  const auto bytes = [](int stages, int warps) { return A::shared_bytes(stages, warps); };
  plan.resident = bytes(plan.key_blocks, kWarps) <= limit;
  plan.stages = plan.resident ? plan.key_blocks : bytes(2, kWarps) <= limit ? 2 : 1;
  // Where one block's keys fill a multiprocessor, that block has all the warps there are registers for.
  const bool alone = !few && plan.resident && 2 * bytes(plan.stages, kWarps) > limit;
  plan.warps = alone && bytes(plan.stages, kMostWarps) <= limit ? kMostWarps : kWarps;
  plan.query_tiles = static_cast<uint32_t>(ceil_div(args.queries, A::queries(plan.warps)));
  // Enough blocks for the GPU; more would copy the resident keys more often.
  const int64_t wanted = plan.resident ? ceil_div(4 * multiprocessors(), heads) : plan.query_tiles;
  plan.tiles_per_block = static_cast<uint32_t>(ceil_div(plan.query_tiles, std::min<int64_t>(wanted, plan.query_tiles)));
  plan.blocks_per_head = static_cast<uint32_t>(ceil_div(plan.query_tiles, plan.tiles_per_block));
  return launch(attention_kernel<T, depth, few>, heads * plan.blocks_per_head, dim3(plan.warps * kWarp),
                bytes(plan.stages, plan.warps), stream, args, plan);
}

template <class T>
const char* attention_of(const AttentionArgs& args, Stream stream) {
  bool packs = args.depth % 8 == 0 && packable(args.q) && packable(args.k) && packable(args.v);
  for (const auto* strides : {&args.q_strides, &args.k_strides, &args.v_strides})
    for (int64_t stride : *strides) packs = packs && packable(stride, args.dtype);
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
