// out = rotate(norm(x)) for queries and keys, of two streams one after the other
//
// A block has one token of queries and keys. A norm's row, one head or all of them, lies in the registers of the threads
// that share it. Where a pair of the rotation is not in one pack, its other element is read again (from the L1 cache)
// and normalised again, which costs less than a way through shared memory.
#include "reduce.cuh"

namespace fastdiff::cuda {
namespace {

using Args = cpu::QkNormRopeArgs;

constexpr int kBlock = 256;  // threads, if a row does not need more
constexpr int kHeld = 32;    // values of a long row per thread
constexpr int kMaxThreads = kMaxNormed / kHeld;

// What a row's values are normalised with; x - mean and then - error, since mean has been rounded.
struct Normal {
  float mean, error, rstd;

  template <int width>
  __device__ __forceinline__ void map(const cpu::Heads& part, int64_t at, float (&v)[width]) const {
#pragma unroll
    for (int i = 0; i < width; ++i) v[i] = ((v[i] - mean) - error) * rstd;
    apply(part.weight, part.weight_dtype, at, v, [](float a, float b) { return a * b; });
    apply(part.bias, part.bias_dtype, at, v, [](float a, float b) { return a + b; });
  }
};

// Elements of a table, rounded to fp32: finer ones would be lost in the products with what is.
template <int width>
__device__ __forceinline__ void load_table(const Args& args, const void* table, int64_t at, float (&v)[width]) {
  if (args.table_is_f64) load(static_cast<const double*>(table) + at, v);
  else with_type(table, args.table_dtype, [&](auto* p) { load(p + at, v); });
}

// Cosines and sines of `width` elements from i on; the sines of a pair's first elements negated.
template <int width>
__device__ __forceinline__ void rotation(const Args& args, int64_t at, int i, float (&c)[width], float (&s)[width]) {
  const int half = static_cast<int>(args.width / 2);
  if (args.sine) {
    load_table(args, args.cosine, at + i, c);
    load_table(args, args.sine, at + i, s);
  } else if (width == 1) {
    const int64_t pair = at + 2 * (args.interleaved ? i / 2 : i % half);
    load_table(args, args.cosine, pair, c);
    load_table(args, args.cosine, pair + 1, s);
  } else if (args.interleaved) {
    float pairs[width];
    load_table(args, args.cosine, at + i, pairs);
#pragma unroll
    for (int k = 0; k < width; ++k) c[k] = pairs[k & ~1], s[k] = pairs[k | 1];
  } else {
    float pairs[2 * width];
    load_table(args, args.cosine, at + 2 * (i < half ? i : i - half), pairs);
#pragma unroll
    for (int k = 0; k < width; ++k) c[k] = pairs[2 * k], s[k] = pairs[2 * k + 1];
  }
#pragma unroll
  for (int k = 0; k < width; ++k)
    if (args.interleaved ? (i + k) % 2 == 0 : i < half) s[k] = -s[k];
}

template <class T, int width, int packs>
__global__ void __launch_bounds__(packs == 1 ? kBlock : kMaxThreads)
    qk_norm_rope_kernel(const __grid_constant__ Args args, uint32_t tokens) {
  FASTDIFF_SHARED(float[2][2 * kMaxThreads / kWarp], scratch);
  const int64_t batch = blockIdx.x / tokens, token = blockIdx.x % tokens;
  const int depth = static_cast<int>(args.depth), heads[2] = {static_cast<int>(args.joint[0].heads),
                                                              static_cast<int>(args.joint[1].heads)};
  const int lanes = blockDim.x, warps = lanes / kWarp;
  const auto sum = [&](auto& v, float* memory) {
    if constexpr (packs == 1) lanes_sum(v, lanes);
    else row_sum(v, memory, warps, threadIdx.y);
  };
  const int rows = args.across_heads ? 2 : heads[0] + heads[1];
  for (int first = 0; first < rows; first += blockDim.y) {  // the same number of rounds for all threads
    const int row = first + threadIdx.y;
    const bool keys = args.across_heads ? row == 1 : row >= heads[0];
    const cpu::Joint& joint = args.joint[keys];
    const int64_t total = joint.part[0].tokens + joint.part[1].tokens;
    const bool second = token >= joint.part[0].tokens;
    const cpu::Heads& part = joint.part[second];
    const int own_heads = keys ? heads[1] : heads[0], head = args.across_heads ? 0 : keys ? row - heads[0] : row;
    const int size = row < rows && token < total ? args.across_heads ? own_heads * depth : depth : 0;
    const T* x = static_cast<const T*>(part.data) + batch * part.stride[0] +
                 (second ? token - joint.part[0].tokens : token) * part.stride[1] + head * part.stride[2];
    const auto column = [&](int pack) { return (pack * lanes + static_cast<int>(threadIdx.x)) * width; };
    // Of column c: its head, counted from the row's first.
    const auto head_of = [&](int c) { return args.across_heads ? c / depth : 0; };
    const auto read = [&](int c, float (&v)[width]) {
      const int h = head_of(c);
      load(x + h * part.stride[2] + (c - h * depth), v);
    };

    float v[packs][width];
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      if (column(p) < size) {
        read(column(p), v[p]);
      } else {
#pragma unroll
        for (int i = 0; i < width; ++i) v[p][i] = 0.0f;
      }
    }
    Normal normal{0.0f, 0.0f, 1.0f};
    if (args.norm) {
      const float share = 1.0f / static_cast<float>(args.across_heads ? own_heads * depth : depth);
      if (!args.rms) {
        float mean[1] = {};
#pragma unroll
        for (int p = 0; p < packs; ++p)
#pragma unroll
          for (int i = 0; i < width; ++i) mean[0] += v[p][i];
        sum(mean, scratch[0]);
        normal.mean = mean[0] * share;
      }
      float sums[2] = {};  // of the distances and of their squares
#pragma unroll
      for (int p = 0; p < packs; ++p)
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const float distance = column(p) < size ? v[p][i] - normal.mean : 0.0f;
          sums[0] += distance;
          sums[1] += distance * distance;
        }
      sum(sums, scratch[1]);
      if (!args.rms) normal.error = sums[0] * share;
      normal.rstd = inverse_sqrt(sums[1] * share - normal.error * normal.error + args.eps);
    }

    const int64_t turned = token - args.first;
    const int rotated = args.cosine && turned >= 0 && turned < args.rotated ? static_cast<int>(args.width) : 0;
    T* out = static_cast<T*>(joint.out) + ((batch * total + token) * own_heads + head) * depth;
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      const int c = column(p);
      if (c >= size) continue;
      const int h = head_of(c), i = c - h * depth;  // the element of its head
      if (args.norm) normal.map(part, c, v[p]);
      if (i < rotated) {
        float partner[width], cosine[width], sine[width];
        if (args.interleaved && width > 1) {
#pragma unroll
          for (int k = 0; k < width; ++k) partner[k] = v[p][k ^ 1];
        } else {
          const int other = c + (args.interleaved ? (i % 2 ? -1 : 1) : i < rotated / 2 ? rotated / 2 : -rotated / 2);
          read(other, partner);
          if (args.norm) normal.map(part, other, partner);
        }
        rotation(args, batch * args.table_stride[0] + turned * args.table_stride[1] + (head + h) * args.table_stride[2],
                 i, cosine, sine);
#pragma unroll
        for (int k = 0; k < width; ++k) v[p][k] = fmaf(v[p][k], cosine[k], partner[k] * sine[k]);
      }
      store(out + c, v[p]);
    }
    if (packs > 1) __syncthreads();  // before the next row's sums overwrite these
  }
}

// Whether all packs are aligned, and none reaches over the end of a head, of its rotated part or of half of that.
bool whole_packs(const Args& args) {
  bool fits = packable(args.depth, args.dtype) && packable(args.cosine) && packable(args.sine);
  for (const cpu::Joint& joint : args.joint)
    for (const cpu::Heads& part : joint.part) {
      fits = fits && packable(part.data) && packable(part.weight) && packable(part.bias);
      for (int64_t stride : part.stride) fits = fits && packable(stride, args.dtype);
    }
  for (int64_t stride : args.table_stride) fits = fits && packable(stride, args.table_dtype);
  return fits && packable(args.interleaved ? args.width : args.width / 2, args.dtype);
}

}  // namespace

const char* qk_norm_rope(const Args& args, Stream stream) {
  int64_t tokens = 0, heads = 0;
  for (const cpu::Joint& joint : args.joint) {
    tokens = std::max(tokens, joint.part[0].tokens + joint.part[1].tokens);
    heads = args.across_heads ? std::max(heads, joint.heads) : heads + joint.heads;
  }
  const int64_t size = args.across_heads ? heads * args.depth : args.depth, rows = args.across_heads ? 2 : heads;
  if (args.batch * tokens * heads * args.depth == 0) return nullptr;
  if (size > kMaxNormed) return "qk_norm_rope: a norm is over more than 16384 elements";
  return dispatch(args.dtype, whole_packs(args), [&](auto tag, auto width) {
    using T = decltype(tag);
    const auto with = [&](auto packs) {
      const unsigned least = packs == 1 ? 1 : kWarp;
      const unsigned lanes = std::max<unsigned>(least, power_of_two(ceil_div(size, width * packs), kMaxThreads));
      const unsigned wanted = std::min<unsigned>(power_of_two(rows, kBlock), std::max(1u, kBlock / lanes));
      const unsigned at_least = ceil_div(kWarp, lanes);  // a whole warp
      return launch(qk_norm_rope_kernel<T, width, packs>, args.batch * tokens,
                    dim3(lanes, std::max(wanted, at_least)), 0, stream, args,
                    static_cast<uint32_t>(tokens));
    };
    return size <= kWarp * width ? with(std::integral_constant<int, 1>())
                                 : with(std::integral_constant<int, kHeld / width>());
  });
}

}  // namespace fastdiff::cuda
