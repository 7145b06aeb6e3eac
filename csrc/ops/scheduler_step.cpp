#include "../cpu/scheduler_step.h"

#include <algorithm>

#include "tensor_args.h"

namespace fastdiff {
namespace {

using Args = cpu::SchedulerStepArgs;

// Hands out the operands in the memory order of `sample`, copying those that are laid out otherwise.
class Operands {
 public:
  Operands(const Tensor& sample, const std::vector<double>& prev, const std::vector<double>& kept)
      : sample_(sample), contiguous_(sample.is_contiguous()), prev_(prev), kept_(kept) {}

  // `t`, with the coefficients at `position`.
  Args::Operand read(const Tensor& t, size_t position, const char* name) {
    const auto equal = [](auto a, auto b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); };
    STD_TORCH_CHECK(equal(t.sizes(), sample_.sizes()), "fastdiff: ", name, " must have sample's shape");
    const void* data = data_of(t, sample_, name);
    if (contiguous_ && !t.is_contiguous()) {
      copies_.push_back(torch::stable::contiguous(t));
      data = data_of(copies_.back(), sample_, name);
    } else if (!contiguous_) {
      STD_TORCH_CHECK(equal(t.strides(), sample_.strides()), "fastdiff: ", name, " must be laid out like sample");
    }
    return {data, dtype_of(t, name), prev_[position], kept_.empty() ? 0.0 : kept_[position]};
  }

 private:
  const Tensor& sample_;
  bool contiguous_;
  const std::vector<double>&prev_, &kept_;
  std::vector<Tensor> copies_;
};

// Whether every element between the first and the last in memory is one of t's.
bool is_dense(const Tensor& t) {
  int64_t span = 1;
  for (size_t axis = 0; axis < t.sizes().size(); ++axis) span += (t.sizes()[axis] - 1) * t.strides()[axis];
  return span == t.numel();
}

Tensor result_like(const Tensor& sample, ScalarType dtype) {
  return dtype == sample.scalar_type()
             ? empty_output_like(sample)
             : empty_output({sample.sizes().begin(), sample.sizes().end()},
                            {sample.strides().begin(), sample.strides().end()}, dtype, sample);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> scheduler_step(
    const Tensor& sample, const Tensor& model_output, const std::vector<Tensor>& history,
    const std::optional<Tensor>& noise, const std::vector<double>& prev, const std::vector<double>& entry,
    std::optional<double> clip, std::optional<ScalarType> prev_dtype, std::optional<ScalarType> entry_dtype,
    const std::vector<double>& kept, std::optional<ScalarType> kept_dtype) {
  STD_TORCH_CHECK(history.size() <= Args::kMaxHistory && prev.size() == 4 + history.size() &&
                      (entry.empty() || entry.size() == 2) && (kept.empty() || kept.size() == prev.size()),
                  "fastdiff: scheduler_step takes up to 8 history tensors, 4 + as many coefficients in prev, 2 or none "
                  "in entry, and as many as in prev or none in kept");
  STD_TORCH_CHECK(sample.is_contiguous() || is_dense(sample), "fastdiff: sample must be dense in memory");
  Operands operands(sample, prev, kept);
  Args args;
  args.numel = sample.numel();
  args.sample = operands.read(sample, 0, "sample");
  args.model_output = operands.read(model_output, 1, "model_output");
  if (noise) args.noise = operands.read(*noise, 3, "noise");
  for (const Tensor& t : history) {
    args.history[args.history_count] = operands.read(t, 4 + args.history_count, "a history tensor");
    ++args.history_count;
  }

  const ScalarType own = sample.scalar_type(), given = model_output.scalar_type();
  const auto result = [&](bool wanted, ScalarType dtype) {
    return wanted ? result_like(sample, dtype) : empty_output({0}, {1}, dtype, sample);
  };
  Tensor next = result(true, prev_dtype.value_or(own));
  Tensor new_entry = result(!entry.empty(), entry_dtype.value_or(given));
  Tensor combination = result(!kept.empty(), kept_dtype.value_or(own));
  args.prev = data_of(next);
  args.prev_dtype = dtype_of(next, "prev_dtype");
  if (!entry.empty()) {
    args.entry = data_of(new_entry);
    args.entry_dtype = dtype_of(new_entry, "entry_dtype");
    args.sample.in_entry = entry[0];
    args.model_output.in_entry = entry[1];
    args.entry_in_next = prev[2];
    if (clip) args.clip = *clip;
  }
  if (!kept.empty()) {
    args.kept = data_of(combination);
    args.kept_dtype = dtype_of(combination, "kept_dtype");
    args.entry_in_kept = kept[2];
  }
  if (args.numel > 0)
    run("scheduler_step", sample, [&] { return cpu::scheduler_step(args); },
        [&](cuda::Stream s) { return cuda::scheduler_step(args, s); });
  return {next, new_entry, combination};
}

FASTDIFF_REGISTER(m) { m.impl("scheduler_step", TORCH_BOX(&scheduler_step)); }

}  // namespace fastdiff
