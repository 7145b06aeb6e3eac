// parallel_for over torch's own thread pool, so that torch.set_num_threads is obeyed.
//
// Only the C entries of torch's stable ABI are declared here instead of including a torch header: the SIMD
// units compile in about a second and cannot pick up inline functions built for another instruction set.
#pragma once

#include <cstdint>
#include <stdexcept>

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size,
                                      void (*body)(int64_t, int64_t, void*), void* context);
extern "C" int32_t torch_get_num_threads(uint32_t* out);

namespace fastdiff::cpu {

// Static, like all that SIMD units share: a weak symbol could be taken from a unit for another instruction set.
static inline int64_t num_threads() {
  uint32_t n = 1;
  torch_get_num_threads(&n);
  return n;
}

// Calls body(begin, end) on disjoint sub-ranges. A range of at most `grain` runs on the calling thread. Throws if
// body throws on any thread (out of memory).
template <class Body>
static inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  if (end - begin <= grain) return body(begin, end);
  const int32_t error = torch_parallel_for(
      begin, end, grain,
      [](int64_t b, int64_t e, void* context) { (*static_cast<const Body*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&body)));
  if (error) throw std::runtime_error("fastdiff: a kernel failed on one of its threads");
}

}  // namespace fastdiff::cpu
