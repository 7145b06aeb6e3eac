#include "include/cuda_runtime.h"

#include <sys/mman.h>

#include <cstdlib>
#include <deque>
#include <random>
#include <stdexcept>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulation {

Where where;
int64_t launches = 0;

namespace {

#ifdef __x86_64__
// A context is the stack pointer under which the registers a call preserves are saved. Tens of times faster than
// swapcontext, which also saves the signal mask.
struct Context {
  void* stack_pointer;
};
extern "C" void fastdiff_emulation_switch(Context* from, Context* to);
asm(R"(
.text
.type fastdiff_emulation_switch, @function
fastdiff_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void switch_context(Context& from, Context& to) { fastdiff_emulation_switch(&from, &to); }
void start_context(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size) - 2;  // so that the entry finds the stack aligned as after a call
  *top = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - 6;
}
#else
using Context = ucontext_t;
void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
void start_context(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = size;
  makecontext(&context, entry, 0);
}
#endif

constexpr size_t kStack = 256 << 10, kGuard = 4096;
constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;
};

struct Fiber {
  Context context;
  dim3 thread;
  enum class State { ready, at_barrier, at_collective, done } state;
  // Of the collective this fiber waits in.
  const char* name;
  unsigned mask;
  const void* in;
  void* out;
  std::deque<std::vector<Copy>> groups;  // of asynchronous copies, oldest first
  std::vector<Copy> open;
};

struct Range {
  const char *begin, *end;
  bool writable;
};

Context main_context;
std::vector<Fiber> fibers;
char* stacks = nullptr;
size_t stacks_count = 0;
int running = 0;
std::vector<int> ready;  // fibers that can run
int at_barrier = 0, alive = 0;
const std::function<void()>* kernel_body = nullptr;
const char* kernel_name = "";
std::string error;
std::vector<Range> allowed, static_shared;
std::vector<char> shared_memory;
size_t shared_size = 0, shared_limit = 0, static_size = 0;

std::mt19937 order;  // in which fibers run

char* shared_begin() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared_memory.data()) + 127) / 128 * 128);
}

void pause() { switch_context(fibers[running].context, main_context); }

void make_ready(int fiber) {
  fibers[fiber].state = Fiber::State::ready;
  ready.push_back(fiber);
}

void release_barrier() {
  if (at_barrier == 0 || at_barrier < alive) return;
  at_barrier = 0;
  for (size_t i = 0; i < fibers.size(); ++i)
    if (fibers[i].state == Fiber::State::at_barrier) make_ready(static_cast<int>(i));
}

void fiber_main() {
  (*kernel_body)();
  Fiber& fiber = fibers[running];
  if (!fiber.open.empty() || !fiber.groups.empty()) fail("the kernel ended with asynchronous copies not waited for");
  fiber.state = Fiber::State::done;
  --alive;
  release_barrier();
  pause();
  std::abort();
}

std::string describe(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

void run_block() {
  for (const Range& range : static_shared) std::memset(const_cast<char*>(range.begin), 0xff, range.end - range.begin);
  std::memset(shared_begin(), 0xff, shared_size + kGuard);
  ready.clear();
  at_barrier = 0, alive = static_cast<int>(fibers.size());
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    const dim3& size = where.block_size;
    const unsigned n = static_cast<unsigned>(i);
    fiber.thread = dim3(n % size.x, n / size.x % size.y, n / size.x / size.y);
    fiber.groups.clear(), fiber.open.clear();
    start_context(fiber.context, stacks + i * kStack, kStack, fiber_main);
    make_ready(static_cast<int>(i));
  }
  while (error.empty() && !ready.empty()) {
    const size_t pick = order() % ready.size();
    running = ready[pick];
    ready[pick] = ready.back();
    ready.pop_back();
    where.thread = fibers[running].thread;
    switch_context(main_context, fibers[running].context);
  }
  if (!error.empty()) return;
  if (alive > 0) {
    std::string waiting;
    for (const Fiber& fiber : fibers) {
      if (fiber.state == Fiber::State::done) continue;
      waiting = fiber.state == Fiber::State::at_barrier ? "__syncthreads" : fiber.name;
      where.thread = fiber.thread;
      break;
    }
    error = std::string(kernel_name) + ": block " + describe(where.block) + ": " + std::to_string(alive) +
            " threads wait for ever, thread " + describe(where.thread) + " in " + waiting;
    return;
  }
  for (size_t i = 0; i < kGuard; ++i)
    if (shared_begin()[shared_size + i] != '\xff') {
      error = std::string(kernel_name) + ": block " + describe(where.block) + ": written behind the " +
              std::to_string(shared_size) + " bytes of shared memory";
      return;
    }
}

bool contains(const Range& range, const char* begin, size_t bytes) {
  return range.begin <= begin && begin + bytes <= range.end;
}

}  // namespace

void fail(const std::string& message) {
  error = std::string(kernel_name) + ": block " + describe(where.block) + ", thread " + describe(where.thread) + ": " +
          message;
  pause();  // for good: the launch ends
  std::abort();
}

unsigned lane() { return static_cast<unsigned>(running) % kWarp; }

void barrier() {
  fibers[running].state = Fiber::State::at_barrier;
  ++at_barrier;
  release_barrier();
  pause();
}

void collective(const char* name, unsigned mask, const void* in, void* out, Combine combine) {
  const int first = running / kWarp * kWarp;
  const int end = std::min(first + kWarp, static_cast<int>(fibers.size()));
  Fiber& me = fibers[running];
  if (!(mask >> (running - first) & 1)) fail(std::string(name) + " by a lane that is not in its own mask");
  me.name = name, me.mask = mask, me.in = in, me.out = out, me.state = Fiber::State::at_collective;
  bool complete = true;
  const void* ins[kWarp] = {};
  void* outs[kWarp] = {};
  for (int i = first; i < first + kWarp; ++i) {
    if (!(mask >> (i - first) & 1)) continue;
    if (i >= end || fibers[i].state == Fiber::State::done)
      fail(std::string(name) + " names lane " + std::to_string(i - first) + ", which does not run");
    const Fiber& other = fibers[i];
    if (other.state != Fiber::State::at_collective) {
      complete = false;
      continue;
    }
    if (std::strcmp(other.name, name) != 0 || other.mask != mask)
      fail(std::string("lanes of a warp meet in ") + other.name + " and " + name + ", or with different masks");
    ins[i - first] = other.in, outs[i - first] = other.out;
  }
  if (complete) {
    combine(ins, outs, mask);
    for (int i = first; i < end; ++i)
      if (mask >> (i - first) & 1) make_ready(i);
  }
  pause();
}

void allow(const void* data, size_t bytes, bool writable) {
  const char* begin = static_cast<const char*>(data);
  allowed.push_back({begin, begin + bytes, writable});
}
void forget_allowed() { allowed.clear(); }

void check(const void* data, size_t bytes, size_t alignment, bool write) {
  const char* begin = static_cast<const char*>(data);
  const auto access = [&] { return (write ? "writes " : "reads ") + std::to_string(bytes) + " bytes"; };
  if (reinterpret_cast<uintptr_t>(data) % alignment)
    fail(access() + " at an address that is not a multiple of " + std::to_string(alignment));
  if (contains({shared_begin(), shared_begin() + shared_size, true}, begin, bytes)) return;
  for (const Range& range : static_shared)
    if (contains(range, begin, bytes)) return;
  bool readable = false;
  for (const Range& range : allowed)
    if (contains(range, begin, bytes)) {
      if (!write || range.writable) return;
      readable = true;
    }
  if (readable) fail(access() + " of an input");
  const Range* nearest = nullptr;
  int64_t least = 4096;
  for (const Range& range : allowed) {
    const int64_t distance = begin < range.begin ? range.begin - begin : begin - range.end + 1;
    if (distance < least) nearest = &range, least = distance;
  }
  if (nearest)
    fail(access() + " out of bounds: at byte " + std::to_string(begin - nearest->begin) + " of a tensor of " +
         std::to_string(nearest->end - nearest->begin));
  fail(access() + " out of bounds: near no tensor");
}

void* dynamic_shared() { return shared_begin(); }

void add_static_shared(void* data, size_t bytes) {
  std::memset(data, 0xff, bytes);
  static_shared.push_back({static_cast<char*>(data), static_cast<char*>(data) + bytes, true});
}

void count_static_shared(size_t bytes) {
  static_size += bytes;
  if (static_size + shared_size > shared_limit)
    fail("needs " + std::to_string(static_size) + " bytes of static and " + std::to_string(shared_size) +
         " of dynamic shared memory, and has " + std::to_string(shared_limit));
}

void copy_async(void* to, const void* from, size_t bytes, size_t valid) {
  check(to, bytes, bytes, true);
  if (valid) check(from, valid, bytes, false);
  std::memset(to, 0xff, bytes);
  fibers[running].open.push_back({to, from, bytes, valid});
}
void commit_copies() {
  Fiber& fiber = fibers[running];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
void wait_copies(int groups_left) {
  Fiber& fiber = fibers[running];
  while (static_cast<int>(fiber.groups.size()) > groups_left) {
    for (const Copy& copy : fiber.groups.front()) {
      std::memset(copy.to, 0, copy.bytes);
      if (copy.valid) std::memcpy(copy.to, copy.from, copy.valid);
    }
    fiber.groups.pop_front();
  }
}

void run(const char* kernel, dim3 grid, dim3 block, size_t shared, size_t limit, const std::function<void()>& body) {
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  kernel_name = kernel, error.clear();
  const auto refuse = [&](const std::string& why) { throw std::runtime_error(std::string(kernel) + ": " + why); };
  if (threads == 0 || threads > 1024 || block.z > 64) refuse("a block of " + describe(block) + " threads");
  if (!grid.x || !grid.y || !grid.z || grid.x >= 1u << 31 || grid.y > 65535 || grid.z > 65535)
    refuse("a grid of " + describe(grid) + " blocks");
  if (shared > limit) refuse(std::to_string(shared) + " bytes of shared memory");
  if (threads > stacks_count) {
    if (stacks) munmap(stacks, stacks_count * kStack);
    stacks_count = threads;
    stacks = static_cast<char*>(mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) throw std::bad_alloc();
  }
  fibers.resize(threads);
  ++launches;
  shared_size = shared, shared_limit = limit, static_size = 0;
  shared_memory.resize(shared + kGuard + 128);
  kernel_body = &body;
  where = {dim3(), dim3(), block, grid};
  for (unsigned z = 0; z < grid.z && error.empty(); ++z)
    for (unsigned y = 0; y < grid.y && error.empty(); ++y)
      for (unsigned x = 0; x < grid.x && error.empty(); ++x) {
        where.block = dim3(x, y, z);
        run_block();
      }
  if (!error.empty()) {
    forget_allowed();
    throw std::runtime_error("emulated kernel " + error);
  }
}

}  // namespace emulation

// For Python's ctypes.
extern "C" __attribute__((visibility("default"))) void fastdiff_emulation_seed(unsigned seed) {
  emulation::order.seed(seed);
}
