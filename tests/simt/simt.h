// Runs CUDA kernels on the CPU. Every thread is a fiber; a few blocks run at a time; warps are
// picked at random and run ahead as far as barriers allow, so that a missing barrier shows under
// some schedule. Shared memory starts as NaN. Warp operations need the full mask.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

inline constexpr std::size_t kStack = 48 * 1024, kShared = 227 * 1024;
inline constexpr unsigned kBlocks = 3;              // at a time
alignas(16) inline char shared[kBlocks * kShared];  // [kBlocks, kShared]

enum class State { ready, barrier, warp, done };
enum class Op { ballot, exclusive_or, up, broadcast, meet };

struct Fiber {
  jmp_buf resume;
  ucontext_t start;
  State state = State::ready;
  bool started = false;
  Op op = Op::ballot;
  int argument = 0;
  std::uint64_t value = 0, result = 0;
  std::array<unsigned, 8> operands = {};  // for a tensor-core operation
  void* fake_stack = nullptr;
};

inline std::vector<Fiber> fibers;  // [blocks at a time, threads]
inline unsigned running = 0;       // index of the running fiber
inline std::unique_ptr<char[]> stacks;
inline std::size_t stack_count = 0;
inline jmp_buf scheduler;
inline const void* scheduler_stack = nullptr;
inline std::size_t scheduler_stack_size = 0;
inline std::function<void()> body;
inline dim3 thread, block, block_size, grid_size;  // of the running fiber
inline dim3 blocks[kBlocks];
inline std::uint32_t random_state = 1;

// Mutations: every place with a barrier or bound that a kernel executed, and the broken one.
inline std::map<std::string, long> places;
inline std::string broken;

inline bool breaks(const char* file, int line) {
  const char* name = std::strrchr(file, '/');
  const std::string place = std::string(name ? name + 1 : file) + ":" + std::to_string(line);
  ++places[place];
  return place == broken;
}

inline void seed(std::uint32_t s) { random_state = s * 2654435761u + 1; }
inline std::uint32_t random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}

inline char* stack_of(std::size_t i) { return stacks.get() + i * kStack; }

inline void arrive([[maybe_unused]] Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

/// Switches to the scheduler, until it resumes this fiber.
inline void leave(State why) {
  Fiber& fiber = fibers[running];
  fiber.state = why;
  if (_setjmp(fiber.resume)) return arrive(fiber);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(why == State::done ? nullptr : &fiber.fake_stack, scheduler_stack,
                                 scheduler_stack_size);
#endif
  _longjmp(scheduler, 1);
}

inline void enter() {
  arrive(fibers[running]);
  body();
  leave(State::done);
}

inline void resume(unsigned i) {
  running = i;
  thread.x = i % block_size.x;
  block = blocks[i / block_size.x];
  Fiber& fiber = fibers[i];
  [[maybe_unused]] static void* fake_stack;
  if (!_setjmp(scheduler)) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake_stack, stack_of(i), kStack);
#endif
    if (std::exchange(fiber.started, true)) _longjmp(fiber.resume, 1);
    setcontext(&fiber.start);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

/// Executes the operation that all 32 lanes from `first` on are waiting at.
inline void exchange(unsigned first) {
  std::uint32_t ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const Fiber& fiber = fibers[first + lane];
    if (fiber.state != State::warp || fiber.op != fibers[first].op)
      throw std::runtime_error("simt: lanes of a warp are not at one warp operation");
    ballot |= static_cast<std::uint32_t>(fiber.value != 0) << lane;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    Fiber& fiber = fibers[first + lane];
    const unsigned by = static_cast<unsigned>(fiber.argument);
    const unsigned from = fiber.op == Op::exclusive_or ? lane ^ by
                          : fiber.op == Op::up         ? (lane < by ? lane : lane - by)
                                                       : by;
    fiber.result = fiber.op == Op::ballot ? ballot : fibers[first + from % 32].value;
    fiber.state = State::ready;
  }
}

/// Runs a warp until all its lanes wait at a barrier or have ended (true), or its turns are over.
inline bool run_warp(unsigned first) {
  for (unsigned turns = 1u << random() % 7; turns > 0; --turns) {
    const unsigned rotation = random();
    for (unsigned k = 0; k < 32; ++k) {
      const unsigned i = first + (k ^ rotation) % 32;
      if (fibers[i].state == State::ready) resume(i);
    }
    unsigned at_warp = 0;
    for (unsigned k = 0; k < 32; ++k) at_warp += fibers[first + k].state == State::warp;
    if (at_warp == 0) return true;
    exchange(first);
  }
  return false;
}

/// Runs `count` blocks of as many threads each, together.
inline void run_blocks(unsigned count, unsigned threads) {
  for (unsigned i = 0; i < count * threads; ++i) {
    Fiber& fiber = fibers[i] = Fiber{};
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stack_of(i);
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, enter, 0);
  }
  const unsigned warps = threads / 32;  // of a block
  std::vector<unsigned> ready(count * warps), waiting(count, 0);
  std::iota(ready.begin(), ready.end(), 0u);
  while (!ready.empty()) {
    unsigned& pick = ready[random() % ready.size()];
    const unsigned at = pick / warps;
    if (!run_warp(pick * 32)) continue;
    pick = ready.back();
    ready.pop_back();
    if (++waiting[at] < warps) continue;  // else release the block's barrier
    unsigned done = 0;
    for (unsigned i = at * threads; i < (at + 1) * threads; ++i)
      done += fibers[i].state == State::done;
    if (done == threads) continue;
    if (done > 0) throw std::runtime_error("simt: threads wait at a barrier others have left");
    for (unsigned i = at * threads; i < (at + 1) * threads; ++i) fibers[i].state = State::ready;
    for (unsigned w = 0; w < warps; ++w) ready.push_back(at * warps + w);
    waiting[at] = 0;
  }
}

inline void launch(dim3 grid, dim3 threads, std::size_t shared_bytes,
                   std::function<void()> kernel) {
  if (threads.x == 0 || threads.x % 32 != 0 || threads.x > 1024 || threads.y * threads.z != 1 ||
      grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("simt: no such grid or block");
  if (shared_bytes > kShared) throw std::runtime_error("simt: too much shared memory");
  const std::size_t most = kBlocks * threads.x;
  if (most > stack_count) stacks.reset(new char[(stack_count = most) * kStack]);
  fibers = std::vector<Fiber>(most);
  body = std::move(kernel);
  block_size = threads;
  grid_size = grid;
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
#ifdef __SANITIZE_ADDRESS__
  for (unsigned i = 0; i < kBlocks; ++i)
    __asan_poison_memory_region(shared + i * kShared + shared_bytes, kShared - shared_bytes);
#endif
  for (std::size_t first = 0; first < order.size();) {
    unsigned count = 0;
    for (; count < kBlocks && first < order.size(); ++count, ++first) {
      const unsigned b = order[first];
      blocks[count] = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
      std::memset(shared + count * kShared, 0xff, shared_bytes);
    }
    run_blocks(count, threads.x);
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(shared, kBlocks * kShared);
#endif
}

inline char* shared_memory() { return shared + running / block_size.x * kShared; }

inline std::uint64_t at_warp(Op op, std::uint64_t value, int argument) {
  Fiber& fiber = fibers[running];
  fiber.op = op;
  fiber.value = value;
  fiber.argument = argument;
  leave(State::warp);
  return fibers[running].result;
}

template <class T>
T shuffle(Op op, T value, int argument) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = at_warp(op, bits, argument);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// PTX's mma.m16n8k16: c [16, 8] += a [16, 16] b [16, 8], bf16 with f32 sums, operands distributed
/// over lanes as its manual says.
inline void multiply_add(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  const unsigned first = running / 32 * 32, lane = running % 32;
  fibers[running].operands = {a[0], a[1], a[2], a[3], b[0], b[1]};
  at_warp(Op::meet, 0, 0);
  const auto number = [&](unsigned holder, unsigned word, unsigned half) {
    const unsigned bits = fibers[first + holder].operands[word] >> 16 * half << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  };
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (unsigned k = 0; k < 16; ++k)
      c[e] += number(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2) *
              number(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
  }
  at_warp(Op::meet, 0, 0);  // all have read the operands before one is replaced
}

inline void barrier(bool broken_here) {
  if (!broken_here) leave(State::barrier);
}

}  // namespace simt
