#pragma once

#include <pybind11/pybind11.h>

#include "cpu/scheduler_step.h"

namespace fastdiff {

// The op scheduler_step on CPU tensors, of which all is known but where the tensors are.
struct BoundStep {
  // Places among the addresses: of the results, then of the operands; history follows.
  enum { kNext, kEntry, kKept, kSample, kModelOutput, kNoise, kFixed };
  static constexpr size_t kMost = kFixed + cpu::SchedulerStepArgs::kMaxHistory;

  cpu::SchedulerStepArgs args;
  uint32_t there = 0;  // a bit for each place that has a tensor

  size_t count() const { return kFixed + args.history_count; }

  // Runs the kernel; `data` has count() addresses, null where no tensor is.
  void operator()(void* const* data) const;
};

void define_bound_step(pybind11::module_& m);

}  // namespace fastdiff
