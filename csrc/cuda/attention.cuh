// What the attention kernels share (FlashAttention-2, an online softmax over blocks of keys): how blocks of threads take
// queries and keys, what lies in shared memory, masks, the launch
//
// A block of threads goes over the keys of one head in blocks of kKeys, which it copies ahead asynchronously. Where all
// keys fit into shared memory they stay there, and it goes on to further queries: cross-attention to a prompt is this.
// The head dimension is padded with zeros in shared memory only.
//
// A kernel is a struct with the members that launch_attention() uses, a function, and a case in an `attention_*.cu`: one
// for another instruction (wgmma) would be another of them.
#pragma once

#include "ptx.cuh"

namespace fastdiff::cuda {

using AttentionArgs = cpu::AttentionArgs;

constexpr int kWarps = 4;  // of a block, at least
// Of queries or keys, which kernels count in 32 bits, and of what lies between two of a mask.
constexpr int64_t kMaxTokens = 1 << 30, kMaxMaskStride = 1 << 23;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// How the keys are held: `stages` blocks in shared memory, which is all of them where `resident`.
struct AttentionPlan {
  int key_blocks, stages, warps;
  bool resident;
  bool packs;  // rows of q, k and v are made of whole, aligned packs
  uint32_t query_tiles, tiles_per_block, blocks_per_head;
};

// The head that a block of threads works on.
struct Head {
  int batch, index;

  __device__ __forceinline__ explicit Head(const AttentionPlan& plan, int64_t heads) {
    const uint32_t place = blockIdx.x / plan.blocks_per_head, count = static_cast<uint32_t>(heads);
    batch = static_cast<int>(place / count), index = static_cast<int>(place % count);
  }
  // Row `row` of q, k or v.
  template <class T>
  __device__ __forceinline__ const T* at(const void* data, const int64_t (&strides)[3], int row) const {
    return static_cast<const T*>(data) + batch * strides[0] + index * strides[2] + row * strides[1];
  }
};

// Rows in shared memory: `depth` elements and 16 bytes more, so that 16 bytes of eight rows meet no bank twice.
template <class T, int depth>
constexpr int kRowOf = depth + kPack<T>;

// Rows [first, first + rows) of a head, as far as they exist; zeros behind.
template <class T, int depth>
__device__ __forceinline__ void copy_rows(T* to, const T* from, int64_t stride, int rows, int existing,
                                          int real_depth, bool packs) {
  constexpr int kRow = kRowOf<T, depth>;
  if (packs) {
    constexpr int kAcross = depth / kPack<T>;
    for (int i = threadIdx.x; i < rows * kAcross; i += blockDim.x) {
      const int row = i / kAcross, c = i % kAcross * kPack<T>;
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

// The queries, keys and values of a head on their way through shared memory, `keys` of them in a block.
template <class T, int depth, int keys>
struct Operands {
  static constexpr int kSize = keys * kRowOf<T, depth>;  // of the keys, behind which the values lie
  const AttentionArgs& args;
  const AttentionPlan& plan;
  const Head& head;
  T *q_shared, *kv_shared;
  int queries;  // of a tile

  // Goes over this block's tiles of queries and calls body(the first query), with the tile on its way to q_shared.
  template <class Body>
  __device__ __forceinline__ void for_each_tile(const Body& body) const {
    if (plan.resident)
      for (int block = 0; block < plan.key_blocks; ++block) copy(block);
    const uint32_t first_tile = blockIdx.x % plan.blocks_per_head * plan.tiles_per_block;
    uint32_t end_tile = first_tile + plan.tiles_per_block;
    if (end_tile > plan.query_tiles) end_tile = plan.query_tiles;
    for (uint32_t tile = first_tile; tile < end_tile; ++tile) {
      const int first_query = static_cast<int>(tile) * queries;
      __syncthreads();  // before the queries of the last tile are overwritten
      copy_rows<T, depth>(q_shared, head.template at<T>(args.q, args.q_strides, first_query), args.q_strides[1], queries,
                          static_cast<int>(args.queries) - first_query, args.depth, plan.packs);
      commit_copies();
      if (!plan.resident)
        for (int block = 0; block + 1 < plan.stages; ++block) copy(block);
      body(first_query);
    }
    wait_copies<0>();
  }

  // Goes over the blocks of keys that a tile sees and calls body(the first key, where they are).
  template <class Body>
  __device__ __forceinline__ void for_each_block(int first_query, const Body& body) const {
    const int needed = (first_query + queries + keys - 1) / keys;
    const int blocks = args.causal && needed < plan.key_blocks ? needed : plan.key_blocks;
    for (int block = 0; block < blocks; ++block) body(block * keys, at(block));
  }

  // Whether a tile does not see all of the keys from first_key to end_key alike.
  __device__ __forceinline__ bool hides(int first_query, int end_key) const {
    return end_key > args.keys || (args.causal && end_key > first_query + 1) || args.mask;
  }

 private:
  __device__ __forceinline__ void copy(int block) const {
    if (block < plan.key_blocks) {
      T* to = kv_shared + block % plan.stages * 2 * kSize;
      const int first = block * keys, existing = args.keys - first, real_depth = args.depth;
      copy_rows<T, depth>(to, head.template at<T>(args.k, args.k_strides, first), args.k_strides[1], keys, existing, real_depth,
                          plan.packs);
      copy_rows<T, depth>(to + kSize, head.template at<T>(args.v, args.v_strides, first), args.v_strides[1], keys, existing,
                          real_depth, plan.packs);
    }
    commit_copies();  // an empty group keeps the count
  }
  // Waits for a block, asks for the next one, and says where it is.
  __device__ __forceinline__ const T* at(int block) const {
    if (block == 0 || !plan.resident) {
      wait_copies<0>();
      __syncthreads();  // and the stage that is filled next has been read by all
    }
    if (!plan.resident) copy(block + plan.stages - 1);
    if (plan.stages == 1 && !plan.resident) {
      wait_copies<0>();
      __syncthreads();
    }
    return kv_shared + block % plan.stages * 2 * kSize;
  }
};

// Makes products q k what the softmax takes: -inf where the query does not see the key, scaled if there is a mask.
// for_each(visit) calls visit(query, key, product) for all that a thread has, counted from the given ones.
template <class ForEach>
__device__ __forceinline__ void hide(const AttentionArgs& args, const Head& head, int first_query, int first_key,
                                     const ForEach& for_each) {
  const int queries = static_cast<int>(args.queries) - first_query, keys = static_cast<int>(args.keys) - first_key;
  if (!args.mask)
    return for_each([&](int query, int key, float& s) {
      if (key >= keys || (args.causal && first_key + key > first_query + query)) s = -INFINITY;
    });
  const int64_t mask = head.batch * args.mask_strides[0] + head.index * args.mask_strides[1] +
                       first_query * args.mask_strides[2] + first_key * args.mask_strides[3];
  // Inside of a tile, 32 bits do.
  const int query_stride = static_cast<int>(args.mask_strides[2]), key_stride = static_cast<int>(args.mask_strides[3]);
  for_each([&](int query, int key, float& s) {
    if (key >= keys) s = -INFINITY;
    if (key >= keys || query >= queries) return;
    const int64_t at = mask + (query * query_stride + key * key_stride);
    s *= args.scale;
    if (args.mask_is_bool) {
      const uint8_t* attend = static_cast<const uint8_t*>(args.mask) + at;
      check_read(attend, 1, 1);
      if (!*attend) s = -INFINITY;
    } else {
      with_type(args.mask, args.mask_dtype, [&](auto* p) { s += load_one(p + at); });
    }
  });
}

// The factor of what the softmax sees, to powers of two.
__device__ __forceinline__ float log2_scale(const AttentionArgs& args) {
  return args.mask ? kLog2E : args.scale * kLog2E;
}

template <class T>
bool in_packs(const AttentionArgs& args) {
  bool packs = args.depth % kPack<T> == 0 && packable(args.q) && packable(args.k) && packable(args.v);
  for (const auto* strides : {&args.q_strides, &args.k_strides, &args.v_strides})
    for (int64_t stride : *strides) packs = packs && packable(stride, args.dtype);
  return packs;
}

// A says how many keys make a block (kKeys), up to how many warps a block of threads has (kMostWarps), how many queries
// so many warps take (queries) and how much shared memory that needs (shared_bytes).
template <class A>
const char* launch_attention(void (*kernel)(AttentionArgs, AttentionPlan), const AttentionArgs& args, bool packs,
                             Stream stream) {
  if (std::max(args.queries, args.keys) > kMaxTokens) return "attention: there are more than 2^30 queries or keys";
  if (args.mask && std::max(args.mask_strides[2], args.mask_strides[3]) > kMaxMaskStride)
    return "attention: the mask's queries or keys lie more than 2^23 elements apart";
  AttentionPlan plan{};
  plan.packs = packs;
  plan.key_blocks = static_cast<int>(ceil_div(args.keys, A::kKeys));
  const int64_t limit = shared_memory_limit(), heads = args.batch * args.heads;
  plan.resident = A::shared_bytes(plan.key_blocks, kWarps) <= limit;
  plan.stages = plan.resident ? plan.key_blocks : A::shared_bytes(2, kWarps) <= limit ? 2 : 1;
  // Where one block's keys fill a multiprocessor, that block has all the warps there are registers for.
  const bool alone = plan.resident && 2 * A::shared_bytes(plan.stages, kWarps) > limit;
  plan.warps = alone && A::shared_bytes(plan.stages, A::kMostWarps) <= limit ? A::kMostWarps : kWarps;
  plan.query_tiles = static_cast<uint32_t>(ceil_div(args.queries, A::queries(plan.warps)));
  // Enough blocks for the GPU; more would copy the resident keys more often.
  const int64_t wanted = plan.resident ? ceil_div(4 * multiprocessors(), heads) : plan.query_tiles;
  plan.tiles_per_block = static_cast<uint32_t>(ceil_div(plan.query_tiles, std::min<int64_t>(wanted, plan.query_tiles)));
  plan.blocks_per_head = static_cast<uint32_t>(ceil_div(plan.query_tiles, plan.tiles_per_block));
  return launch(kernel, heads * plan.blocks_per_head, dim3(plan.warps * kWarp),
                A::shared_bytes(plan.stages, plan.warps), stream, args, plan);
}

}  // namespace fastdiff::cuda
