// qk_norm_rope: norm of queries and keys, rotary embedding, and the joint sequence of two streams, in one pass
//
// Work goes by tokens. A token's heads, a few KB, stay in L1 between the sums of the norm and the rotation. The
// token's rotation, shared by its heads in queries and keys, is brought to one form first: y * c + partner(y) * s,
// with the minus of every pair's first element in s.
#include "qk_norm_rope.h"

#include <vector>

#include "parallel.h"
#include "row_norm.h"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

inline Vec swap_pairs(Vec a) {
#if defined(__AVX512F__)
  return _mm512_permute_ps(a.v, 0xB1);
#else
  return _mm256_permute_ps(a.v, 0xB1);
#endif
}

// The norms' parameters of one stream in fp32.
struct Affine {
  void read(const Heads& heads, int64_t n) {
    widen(heads.weight, heads.weight_dtype, weight, n);
    widen(heads.bias, heads.bias_dtype, bias, n);
  }
  static void widen(const void* from, DType dtype, std::vector<float>& to, int64_t n) {
    if (!from) return;
    to.resize(n);
    dispatch(dtype, [&](auto tag) {
      const auto* source = static_cast<const decltype(tag)*>(from);
      for_each_vec(n, [&](int64_t i, auto lanes) { store(to.data() + i, load(source + i, lanes), lanes); });
    });
  }
  std::vector<float> weight, bias;  // empty: not given
};

struct Rotation {
  explicit Rotation(const QkNormRopeArgs& args) : args(args), c(args.width), s(args.width) {}
  bool has(int64_t token) const { return args.cosine && token >= args.first && token < args.first + args.rotated; }
  void set(int64_t batch, int64_t token, int64_t head) {
    const int64_t offset = batch * args.table_stride[0] + (token - args.first) * args.table_stride[1] +
                           head * args.table_stride[2];
    if (offset == offset_) return;
    offset_ = offset;
    const int64_t width = args.width, half = width / 2;
    const float* cosine = static_cast<const float*>(args.cosine) + offset;
    const float* sine = args.sine ? static_cast<const float*>(args.sine) + offset : nullptr;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t pair = args.interleaved ? i / 2 : i % half;
      const bool is_first = args.interleaved ? i % 2 == 0 : i < half;
      c[i] = sine ? cosine[i] : cosine[2 * pair];
      const float value = sine ? sine[i] : cosine[2 * pair + 1];
      s[i] = is_first ? -value : value;
    }
  }
  const QkNormRopeArgs& args;
  std::vector<float> c, s;

 private:
  int64_t offset_ = -1;
};

template <class T>
class Worker {
 public:
  explicit Worker(const QkNormRopeArgs& args) : args_(args), rotation_(args) {
    int64_t heads = 1;
    for (int j = 0; j < 2; ++j) {
      const Joint& joint = args.joint[j];
      if (args.across_heads && joint.heads > heads) heads = joint.heads;
      for (int p = 0; p < 2; ++p)
        affine_[j][p].read(joint.part[p], args.across_heads ? joint.heads * args.depth : args.depth);
    }
    wide_.resize(heads * args.depth);
    turned_.resize(args.interleaved ? 0 : args.depth);
  }

  void token(int j, int64_t batch, int64_t token) {
    const Joint& joint = args_.joint[j];
    const int64_t depth = args_.depth, total = joint.part[0].tokens + joint.part[1].tokens;
    if (token >= total) return;
    const int p = token >= joint.part[0].tokens;
    const Heads& part = joint.part[p];
    const int64_t own = p ? token - joint.part[0].tokens : token;
    const T* x = static_cast<const T*>(part.data) + batch * part.stride[0] + own * part.stride[1];
    T* out = static_cast<T*>(joint.out) + (batch * total + token) * joint.heads * depth;
    const bool rotate = rotation_.has(token);
    if (args_.across_heads) {
      for (int64_t head = 0; head < joint.heads; ++head) widen(x + head * part.stride[2], wide_.data() + head * depth);
      const RowNorm normal = measure_row(wide_.data(), joint.heads * depth, args_.eps, args_.rms);
      for (int64_t head = 0; head < joint.heads; ++head) {
        if (rotate) rotation_.set(batch, token, head);
        finish(wide_.data() + head * depth, normal, affine_[j][p], head * depth, rotate, out + head * depth);
      }
      return;
    }
    for (int64_t head = 0; head < joint.heads; ++head) {
      widen(x + head * part.stride[2], wide_.data());
      const RowNorm normal = args_.norm ? measure_row(wide_.data(), depth, args_.eps, args_.rms) : RowNorm{};
      if (rotate) rotation_.set(batch, token, head);
      finish(wide_.data(), normal, affine_[j][p], 0, rotate, out + head * depth);
    }
  }

 private:
  void widen(const T* from, float* to) const {
    for_each_vec(args_.depth, [&](int64_t i, auto lanes) { store(to + i, load(from + i, lanes), lanes); });
  }

  // Normalises one head's x, rotates it and stores it.
  void finish(const float* x, RowNorm normal, const Affine& affine, int64_t offset, bool rotate, T* out) {
    const float* weight = affine.weight.empty() ? nullptr : affine.weight.data() + offset;
    const float* bias = affine.bias.empty() ? nullptr : affine.bias.data() + offset;
    const Vec centre(normal.centre), factor(normal.factor), offset_by(normal.offset);
    const auto value = [&](int64_t i, auto lanes) {
      Vec y = fma(load(x + i, lanes) - centre, factor, offset_by);
      if (weight) y = y * load(weight + i, lanes);
      if (bias) y = y + load(bias + i, lanes);
      return y;
    };
    const int64_t depth = args_.depth, width = rotate ? args_.width : 0;
    const float *c = rotation_.c.data(), *s = rotation_.s.data();
    if (args_.interleaved) {
      for_each_vec(width, [&](int64_t i, auto lanes) {
        const Vec y = value(i, lanes);
        store(out + i, fma(y, load(c + i, lanes), swap_pairs(y) * load(s + i, lanes)), lanes);
      });
    } else if (width) {
      float* y = turned_.data();
      for_each_vec(width, [&](int64_t i, auto lanes) { store(y + i, value(i, lanes), lanes); });
      const int64_t half = width / 2;
      for (int64_t side = 0; side < 2; ++side) {
        const int64_t own = side * half, other = half - own;
        for_each_vec(half, [&](int64_t i, auto lanes) {
          const Vec turn = load(y + other + i, lanes) * load(s + own + i, lanes);
          store(out + own + i, fma(load(y + own + i, lanes), load(c + own + i, lanes), turn), lanes);
        });
      }
    }
    for_each_vec(depth - width, [&](int64_t i, auto lanes) { store(out + width + i, value(width + i, lanes), lanes); });
  }

  const QkNormRopeArgs& args_;
  Rotation rotation_;
  Affine affine_[2][2];
  std::vector<float> wide_, turned_;
};

}  // namespace

void qk_norm_rope(const QkNormRopeArgs& args) {
  int64_t tokens = 0;
  for (const Joint& joint : args.joint) {
    const int64_t total = joint.part[0].tokens + joint.part[1].tokens;
    if (total > tokens) tokens = total;
  }
  const int64_t row = (args.joint[0].heads + args.joint[1].heads) * args.depth;
  if (row == 0 || tokens == 0) return;
  dispatch(args.dtype, [&](auto tag) {
    parallel_for(0, args.batch * tokens, 8192 / row + 1, [&](int64_t begin, int64_t end) {
      Worker<decltype(tag)> worker(args);
      for (int64_t i = begin; i < end; ++i)
        for (int j = 0; j < 2; ++j) worker.token(j, i / tokens, i % tokens);
    });
  });
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
