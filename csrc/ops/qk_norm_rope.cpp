#include "../cpu/qk_norm_rope.h"

#include <tuple>

#include "tensor_args.h"

namespace fastdiff {
namespace {

using OptionalTensor = std::optional<Tensor>;

class Call {
 public:
  Call(const Tensor& q, const Tensor& k) : like_(q) {
    args.batch = q.size(0), args.depth = q.dim() == 4 ? q.size(3) : 0;
    args.dtype = dtype_of(q, "q");
    args.joint[0].heads = q.size(2), args.joint[1].heads = k.size(2);
  }

  void part(int joint, int part, const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == args.batch && t.size(2) == args.joint[joint].heads &&
                        t.size(3) == args.depth && (t.stride(3) == 1 || args.depth <= 1) &&
                        t.scalar_type() == like_.scalar_type(),
                    "fastdiff: qk_norm_rope's ", name, " does not match q or k, or its last axis is not contiguous");
    cpu::Heads& heads = args.joint[joint].part[part];
    heads.data = data_of(t, like_, name), heads.tokens = t.size(1);
    for (int i = 0; i < 3; ++i) heads.stride[i] = t.stride(i);
  }

  void norm(std::optional<double> eps, bool rms, bool across_heads) {
    args.norm = eps.has_value(), args.rms = rms, args.across_heads = args.norm && across_heads;
    args.eps = static_cast<float>(eps.value_or(0));
  }

  void affine(int joint, int part, const OptionalTensor& weight, const OptionalTensor& bias) {
    cpu::Heads& heads = args.joint[joint].part[part];
    const int64_t n = args.across_heads ? args.joint[joint].heads * args.depth : args.depth;
    const auto pointer = [&](const OptionalTensor& t, cpu::DType& dtype) -> const void* {
      if (!t) return nullptr;
      STD_TORCH_CHECK(args.norm && t->dim() == 1 && t->size(0) == n && (t->stride(0) == 1 || n == 1),
                      "fastdiff: qk_norm_rope takes contiguous weights and biases of the normalised size");
      dtype = dtype_of(*t, "weight");
      return data_of(*t, like_, "a weight or bias");
    };
    heads.weight = pointer(weight, heads.weight_dtype);
    heads.bias = pointer(bias, heads.bias_dtype);
  }

  void rope(const OptionalTensor& cosine, const OptionalTensor& sine, int64_t start, bool interleaved) {
    if (!cosine) return;
    const int64_t pairs = sine ? 0 : 1, rank = cosine->dim() - pairs, last = cosine->dim() - 1;
    const int64_t full[] = {args.batch, tokens(0), args.joint[0].heads};
    STD_TORCH_CHECK((rank == 2 || rank == 4) && cosine->stride(last) == 1 &&
                        (sine || (cosine->size(last) == 2 && cosine->stride(last - 1) == 2)),
                    "fastdiff: qk_norm_rope takes tables with a contiguous last axis");
    args.table_is_f64 = cosine->scalar_type() == ScalarType::Double;
    if (!args.table_is_f64) args.table_dtype = dtype_of(*cosine, "cos");
    args.width = cosine->size(rank - 1) * (1 + pairs);
    args.rotated = cosine->size(rank == 2 ? 0 : 1);
    args.first = start;
    bool fits = args.width <= args.depth && args.width % 2 == 0 && start >= 0;
    for (int joint = 0; joint < 2; ++joint) fits = fits && start + args.rotated <= tokens(joint);
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t own = rank == 2 ? axis - 1 : axis;
      if (own < 0 || own >= rank - 1 || cosine->size(own) == 1) continue;
      const int64_t keys = args.joint[1].heads;  // none: only queries are rotated
      fits = fits && (axis == 1 || cosine->size(own) == full[axis]) && (axis != 2 || !keys || full[2] == keys);
      args.table_stride[axis] = cosine->stride(own);
    }
    if (sine) {
      fits = fits && sine->dim() == cosine->dim() && sine->scalar_type() == cosine->scalar_type();
      for (int64_t i = 0; fits && i <= last; ++i)
        fits = sine->size(i) == cosine->size(i) && (sine->stride(i) == cosine->stride(i) || sine->size(i) == 1);
      args.sine = data_of(*sine, like_, "sin");
    }
    STD_TORCH_CHECK(fits, "fastdiff: qk_norm_rope's tables do not fit q and k, or cos and sin differ in layout");
    args.cosine = data_of(*cosine, like_, "cos");
    args.interleaved = interleaved;
  }

  Tensor output(int joint) {
    const std::vector<int64_t> sizes{args.batch, tokens(joint), args.joint[joint].heads, args.depth};
    Tensor out = empty_output(sizes, contiguous_strides(sizes), like_.scalar_type(), like_);
    args.joint[joint].out = data_of(out);
    return out;
  }

  cpu::QkNormRopeArgs args{};

 private:
  int64_t tokens(int joint) const { return args.joint[joint].part[0].tokens + args.joint[joint].part[1].tokens; }
  const Tensor& like_;
};

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const OptionalTensor& q_weight,
                                        const OptionalTensor& k_weight, const OptionalTensor& q_bias,
                                        const OptionalTensor& k_bias, const OptionalTensor& cos,
                                        const OptionalTensor& sin, const OptionalTensor& text_q,
                                        const OptionalTensor& text_k, const OptionalTensor& text_q_weight,
                                        const OptionalTensor& text_k_weight, std::optional<double> eps, bool rms,
                                        bool across_heads, bool interleaved, bool text_first, int64_t rope_start) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && text_q.has_value() == text_k.has_value(),
                  "fastdiff: qk_norm_rope takes q and k with four axes, and both or neither of text_q and text_k");
  Call call(q, k);
  call.norm(eps, rms, across_heads);
  const int own = text_q && text_first ? 1 : 0, text = 1 - own;
  call.part(0, own, q, "q"), call.part(1, own, k, "k");
  call.affine(0, own, q_weight, q_bias), call.affine(1, own, k_weight, k_bias);
  if (text_q) {
    call.part(0, text, *text_q, "text_q"), call.part(1, text, *text_k, "text_k");
    call.affine(0, text, text_q_weight, std::nullopt), call.affine(1, text, text_k_weight, std::nullopt);
  }
  call.rope(cos, sin, rope_start, interleaved);
  Tensor q_out = call.output(0), k_out = call.output(1);
  const auto on_cpu = [&] {
    STD_TORCH_CHECK(!call.args.table_is_f64 && call.args.table_dtype == cpu::DType::f32,
                    "fastdiff: qk_norm_rope takes float32 tables on a CPU");
    return cpu::qk_norm_rope(call.args);
  };
  run("qk_norm_rope", q, on_cpu, [&](cuda::Stream s) { return cuda::qk_norm_rope(call.args, s); });
  return {q_out, k_out};
}

}  // namespace

FASTDIFF_REGISTER(m) { m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope)); }

}  // namespace fastdiff
