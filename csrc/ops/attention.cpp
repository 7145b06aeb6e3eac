#include "../cpu/attention.h"

#include <cmath>
#include <tuple>

#include "tensor_args.h"

namespace fastdiff {
namespace {

void set_strides(const Tensor& t, const char* name, int64_t (&strides)[3]) {
  STD_TORCH_CHECK(t.dim() == 4 && (t.stride(3) == 1 || t.size(3) <= 1), "fastdiff: attention takes ", name,
                  " with four axes, the last one contiguous");
  for (int i = 0; i < 3; ++i) strides[i] = t.stride(i);
}

void set_mask(const Tensor& mask, const Tensor& q, cpu::AttentionArgs& args) {
  const int64_t dim = mask.dim(), full[] = {args.batch, args.heads, args.queries, args.keys};
  STD_TORCH_CHECK(dim >= 2 && dim <= 4, "fastdiff: attention takes a mask with two to four axes");
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t axis = i - (4 - dim), size = axis < 0 ? 1 : mask.size(axis);
    STD_TORCH_CHECK(size == 1 || size == full[i], "fastdiff: attention's mask does not broadcast to the logits");
    args.mask_strides[i] = size == 1 ? 0 : mask.stride(axis);
  }
  args.mask = data_of(mask, q, "attn_mask");
  args.mask_is_bool = mask.scalar_type() == ScalarType::Bool;
  if (!args.mask_is_bool) args.mask_dtype = dtype_of(mask, "attn_mask");
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& attn_mask, std::optional<double> scale,
                                     bool is_causal, bool return_lse) {
  cpu::AttentionArgs args{};
  set_strides(q, "q", args.q_strides);
  set_strides(k, "k", args.k_strides);
  set_strides(v, "v", args.v_strides);
  args.batch = q.size(0), args.queries = q.size(1), args.heads = q.size(2), args.depth = q.size(3);
  args.keys = k.size(1);
  args.dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "fastdiff: attention takes q, k and v of one dtype");
  STD_TORCH_CHECK(k.size(0) == args.batch && v.size(0) == args.batch && k.size(2) == args.heads &&
                      v.size(2) == args.heads && k.size(3) == args.depth && v.size(1) == args.keys &&
                      v.size(3) == args.depth,
                  "fastdiff: attention's q, k and v do not match in shape");
  STD_TORCH_CHECK(args.keys > 0 && args.depth > 0, "fastdiff: attention needs keys");
  if (attn_mask) set_mask(*attn_mask, q, args);
  args.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(args.depth)));
  args.causal = is_causal;
  args.threads = static_cast<int>(torch::stable::get_num_threads());

  const std::vector<int64_t> sizes{args.batch, args.queries, args.heads, args.depth};
  Tensor out = empty_output(sizes, contiguous_strides(sizes), q.scalar_type(), q);
  std::vector<int64_t> lse_sizes{0};
  if (return_lse) lse_sizes.assign(sizes.begin(), sizes.end() - 1);
  Tensor lse = empty_output(lse_sizes, contiguous_strides(lse_sizes), ScalarType::Float, q);
  args.q = data_of(q, q, "q"), args.k = data_of(k, q, "k"), args.v = data_of(v, q, "v");
  args.out = data_of(out);
  args.lse = return_lse ? static_cast<float*>(data_of(lse)) : nullptr;
  const auto on_cpu = [&] {
    STD_TORCH_CHECK(!args.mask || args.mask_strides[3] == 1 || args.keys == 1,
                    "fastdiff: attention takes a mask with a contiguous last axis of one element per key on a CPU");
    return cpu::attention(args);
  };
  if (args.batch * args.heads * args.queries > 0)
    run("attention", q, on_cpu, [&](cuda::Stream s) { return cuda::attention(args, s); });
  return {std::move(out), std::move(lse)};
}

FASTDIFF_REGISTER(m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace fastdiff
