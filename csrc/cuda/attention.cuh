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
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// How the keys are held: `stages` blocks in shared memory, which is all of them where `resident`.
struct AttentionPlan {
  int key_blocks, stages, warps;
  bool resident;
  bool packs;  // rows of q, k and v are made of whole, aligned packs
  uint32_t query_tiles, tiles_per_block, blocks_per_head;
};

// The head that a block of threads works on.
template <class T>
struct Head {
  int64_t batch, index, mask;  // mask: where its part begins
  const T *q, *k, *v;

  __device__ __forceinline__ Head(const AttentionArgs& args, const AttentionPlan& plan) {
    const uint32_t place = blockIdx.x / plan.blocks_per_head, heads = static_cast<uint32_t>(args.heads);
    batch = place / heads, index = place % heads;
    mask = batch * args.mask_strides[0] + index * args.mask_strides[1];
    q = static_cast<const T*>(args.q) + batch * args.q_strides[0] + index * args.q_strides[2];
    k = static_cast<const T*>(args.k) + batch * args.k_strides[0] + index * args.k_strides[2];
    v = static_cast<const T*>(args.v) + batch * args.v_strides[0] + index * args.v_strides[2];
  }
};

// Rows in shared memory: `depth` elements and 16 bytes more, so that 16 bytes of eight rows meet no bank twice.
template <class T, int depth>
constexpr int kRowOf = depth + kPack<T>;

// Rows [first, first + rows) of a head, as far as they exist; zeros behind.
template <class T, int depth>
__device__ __forceinline__ void copy_rows(T* to, const T* from, int64_t stride, int rows, int64_t existing,
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

// The keys and values of a head on their way through shared memory, `keys` of them in a block.
template <class T, int depth, int keys>
struct KeyBlocks {
  static constexpr int kSize = keys * kRowOf<T, depth>;  // of the keys, behind which the values lie
  const AttentionArgs& args;
  const AttentionPlan& plan;
  const Head<T>& head;
  T* shared;

  __device__ __forceinline__ void copy(int block) const {
    if (block < plan.key_blocks) {
      T* to = shared + block % plan.stages * 2 * kSize;
      const int64_t first = int64_t{block} * keys, existing = args.keys - first;
      const int real_depth = args.depth;
      const int64_t k_stride = args.k_strides[1], v_stride = args.v_strides[1];
      copy_rows<T, depth>(to, head.k + first * k_stride, k_stride, keys, existing, real_depth, plan.packs);
      copy_rows<T, depth>(to + kSize, head.v + first * v_stride, v_stride, keys, existing, real_depth, plan.packs);
    }
    commit_copies();  // an empty group keeps the count
  }
  __device__ __forceinline__ void start() const {
    if (plan.resident)
      for (int block = 0; block < plan.key_blocks; ++block) copy(block);
  }
  __device__ __forceinline__ void start_tile() const {
    if (!plan.resident)
      for (int block = 0; block + 1 < plan.stages; ++block) copy(block);
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
    return shared + block % plan.stages * 2 * kSize;
  }
};

// How many blocks of keys the queries from first_query to end_query see.
template <int keys>
__device__ __forceinline__ int blocks_seen(const AttentionArgs& args, const AttentionPlan& plan, int64_t end_query) {
  const int64_t needed = (end_query + keys - 1) / keys;
  return args.causal && needed < plan.key_blocks ? static_cast<int>(needed) : plan.key_blocks;
}

// q k as the softmax takes it, scaled if there is a mask: -inf where the query does not see the key.
__device__ __forceinline__ float masked(const AttentionArgs& args, int64_t mask, int64_t query, int64_t key, float s) {
  if (key >= args.keys || (args.causal && key > query)) return -INFINITY;
  if (!args.mask || query >= args.queries) return s;
  const int64_t at = mask + query * args.mask_strides[2] + key * args.mask_strides[3];
  s *= args.scale;
  if (args.mask_is_bool) {
    const uint8_t* attend = static_cast<const uint8_t*>(args.mask) + at;
    check_read(attend, 1, 1);
    return *attend ? s : -INFINITY;
  }
  with_type(args.mask, args.mask_dtype, [&](auto* p) { s += load_one(p + at); });
  return s;
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
