#include "../cpu/cfg_combine.h"

#include "tensor_args.h"

namespace fastdiff {

Tensor cfg_combine(const Tensor& uncond, const Tensor& cond, double guidance_scale, double guidance_rescale) {
  const int64_t samples = guidance_rescale > 0 && cond.dim() > 0 ? cond.sizes()[0] : 1;
  STD_TORCH_CHECK(uncond.is_contiguous() && cond.is_contiguous() && uncond.sizes().equals(cond.sizes()) &&
                      uncond.scalar_type() == cond.scalar_type(),
                  "fastdiff: cfg_combine takes contiguous tensors of one shape and dtype");
  Tensor out = empty_output_like(cond);
  if (cond.numel() == 0) return out;
  const cpu::CfgCombineArgs args{data_of(uncond, cond, "uncond"), data_of(cond, cond, "cond"), data_of(out), samples,
                                 cond.numel() / samples, static_cast<float>(guidance_scale),
                                 static_cast<float>(guidance_rescale), dtype_of(cond, "cond")};
  run("cfg_combine", cond, [&] { return cpu::cfg_combine(args); }, [&](cuda::Stream s) {
    Tensor workspace = scratch(cuda::workspace_size(args), cond);
    return cuda::cfg_combine(args, static_cast<float*>(data_of(workspace)), s);
  });
  return out;
}

FASTDIFF_REGISTER(m) { m.impl("cfg_combine", TORCH_BOX(&cfg_combine)); }

}  // namespace fastdiff
