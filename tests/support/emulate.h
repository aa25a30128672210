// CUDA C on a CPU, for tests: what stands in front of a kernel's source here instead of a GPU.
//
// Blocks run one after the other, the threads of a block as coroutines that go on until they wait:
// at a barrier of the block, or for the lanes of a shuffle. Both orders are shuffled from a seed,
// and shared memory begins as NaN, so that a missing barrier shows. What is undefined on a GPU ends
// the launch with a message: a barrier that some threads never reach, lanes that wait at different
// shuffles, a load that is not aligned, an index beyond an array's end.
#pragma once

#include <csetjmp>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define EMULATED 1

struct dim3 { unsigned x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// The linker gives the bounds of a section whose name is an identifier.
extern "C" char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulated {

enum State { ready, at_barrier, at_shuffle, finished };

struct Thread {
  dim3 index;
  unsigned number;
  State state;
  bool started;
  ucontext_t begin;
  jmp_buf at;
  int line;                // where it waits
  unsigned mask;           // the lanes that it waits for,
  int source;              // the one whose value it wants,
  std::uint64_t value;     // its own value,
  std::uint64_t received;  // what it got,
  unsigned votes;          // and who else came with one that is not zero: a bit a lane, or a count
};

constexpr std::size_t stack_bytes = 1 << 16;
constexpr unsigned lanes = 32;

static std::vector<Thread> threads;
static std::vector<char> dynamic_memory;
static Thread* now;
static dim3 block_index, block_shape, grid_shape;
static jmp_buf scheduler;
static void (*body)(void**);
static void** arguments;
static char message[512];
static std::uint64_t random_state;

static std::uint64_t random_number() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

static std::vector<unsigned> shuffled(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  for (unsigned i = count; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  return order;
}

// Ends the launch from inside a thread.
__attribute__((noinline, noreturn)) static void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(message, sizeof message, format, values);
  va_end(values);
  std::size_t used = std::strlen(message);
  std::snprintf(message + used, sizeof message - used, " [thread (%u, %u, %u), block (%u, %u, %u)]",
                now->index.x, now->index.y, now->index.z, block_index.x, block_index.y,
                block_index.z);
  _longjmp(scheduler, 2);
}

__attribute__((noinline)) static void wait(State state, int line) {
  now->state = state;
  now->line = line;
  if (!_setjmp(now->at)) _longjmp(scheduler, 1);
}

static void bad_address(int, siginfo_t* what, void*) {
  fail("an access to %p, which is no memory", what->si_addr);
}

static void thread_main() {
  for (;;) {
    body(arguments);
    wait(finished, 0);
  }
}

// Lets a thread go on until it waits; false if it failed. now is the thread then.
__attribute__((noinline)) static bool resume(Thread& thread) {
  now = &thread;
  int how = _setjmp(scheduler);
  if (how == 0) {
    if (thread.started) _longjmp(thread.at, 1);
    thread.started = true;
    setcontext(&thread.begin);
  }
  return how == 1;
}

static void make_threads(unsigned count) {
  while (threads.size() < count) {
    Thread thread{};
    void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    thread.begin.uc_stack.ss_sp = stack;
    threads.push_back(thread);
  }
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    void* stack = thread.begin.uc_stack.ss_sp;
    thread.number = i;
    thread.index = {i % block_shape.x, i / block_shape.x % block_shape.y,
                    i / (block_shape.x * block_shape.y)};
    thread.started = false;
    getcontext(&thread.begin);
    thread.begin.uc_stack.ss_sp = stack;
    thread.begin.uc_stack.ss_size = stack_bytes;
    thread.begin.uc_link = nullptr;
    makecontext(&thread.begin, thread_main, 0);
  }
}

// Says of threads that cannot go on where they wait; true if the block's barrier may open.
static bool barrier_opens(unsigned count) {
  const Thread* first = nullptr;
  for (unsigned i = 0; i < count; ++i) {
    const Thread& thread = threads[i];
    if (thread.state == at_barrier && !first) first = &thread;
    if (thread.state == at_shuffle) {
      std::snprintf(message, sizeof message,
                    "line %d: thread %u waits for lanes 0x%x that never come", thread.line, i,
                    thread.mask);
      return false;
    }
  }
  for (unsigned i = 0; i < count; ++i) {
    const Thread& thread = threads[i];
    if (thread.state == at_barrier && thread.line == first->line) continue;
    std::snprintf(message, sizeof message,
                  thread.state == finished
                      ? "line %d: thread %u ended, while thread %u waits at __syncthreads"
                      : "line %d: thread %u waits at another __syncthreads than thread %u",
                  thread.state == finished ? first->line : thread.line, i, first->number);
    return false;
  }
  return true;
}

static bool run_block(unsigned count) {
  if (__start_emulated_shared)
    std::memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
  std::memset(dynamic_memory.data(), 0xff, dynamic_memory.size());
  for (unsigned i = 0; i < count; ++i) threads[i].state = ready;
  const std::vector<unsigned> order = shuffled(count);
  for (unsigned left = count; left;) {
    bool moved = false;
    for (unsigned i : order) {
      if (threads[i].state != ready) continue;
      moved = true;
      if (!resume(threads[i])) return false;
      if (threads[i].state == finished) --left;
    }
    if (moved || !left) continue;
    if (!barrier_opens(count)) return false;
    unsigned votes = 0;
    for (unsigned i = 0; i < count; ++i) votes += threads[i].value != 0;
    for (unsigned i = 0; i < count; ++i) {
      threads[i].state = ready;
      threads[i].votes = votes;
    }
  }
  return true;
}

// A lane has come to a shuffle: the last one of its mask hands every lane what it asked for.
static void meet(unsigned mask, int line, int source, std::uint64_t value) {
  const unsigned lane = now->number % lanes;
  Thread* warp = now - lane;
  if (!(mask >> lane & 1)) fail("line %d: lane %u is not in its own mask 0x%x", line, lane, mask);
  now->mask = mask;
  now->source = source;
  now->value = value;
  now->line = line;
  const unsigned count = block_shape.x * block_shape.y * block_shape.z;
  unsigned votes = 0;
  for (unsigned i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    if (now->number - lane + i >= count) fail("line %d: the block has no lane %u", line, i);
    const Thread& other = warp[i];
    if (&other != now) {
      if (other.state == finished)
        fail("line %d: lane %u waits for lane %u, which ended", line, lane, i);
      if (other.state != at_shuffle) return wait(at_shuffle, line);
      if (other.line != line || other.mask != mask)
        fail("line %d: lane %u meets lane %u at line %d", line, lane, i, other.line);
    }
    if (other.value) votes |= 1u << i;
  }
  for (unsigned i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    Thread& other = warp[i];
    if (!(mask >> other.source & 1))
      fail("line %d: lane %u asks lane %d, which is not in the mask", line, i, other.source);
    other.received = warp[other.source].value;
    other.votes = votes;
    other.state = ready;
  }
}

template <class T> T shuffle(unsigned mask, T value, int source, int line) {
  std::uint64_t bits = 0, received;
  std::memcpy(&bits, &value, sizeof value);
  meet(mask, line, source, bits);
  received = now->received;
  std::memcpy(&value, &received, sizeof value);
  return value;
}

static unsigned vote(unsigned mask, bool value, int line) {
  meet(mask, line, now->number % lanes, value);
  return now->votes;
}

// A barrier of the block, and how many of its threads came to it with true.
static unsigned vote_of_block(bool value, int line) {
  now->value = value;
  wait(at_barrier, line);
  return now->votes;
}

static int lane() { return now->number % lanes; }

// The lane to ask, or one's own where that lies beyond the group of `width` lanes.
static int near(int source, int width) {
  return source >= 0 && source / width == lane() / width ? source : lane();
}

template <class T> struct Launch;
template <class... A> struct Launch<void (*)(A...)> {
  template <class F, std::size_t... I>
  static void call(F* kernel, void** values, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(values[I])...);
  }
  template <class F> static void call(F* kernel, void** values) {
    call(kernel, values, std::index_sequence_for<A...>());
  }
  // One letter an argument, as Python's struct module has them; P stands for a pointer.
  static const char* kinds() {
    static const char letters[] = {
        (std::is_pointer<A>::value               ? 'P'
         : std::is_same<A, float>::value         ? 'f'
         : std::is_same<A, double>::value        ? 'd'
         : std::is_same<A, bool>::value          ? '?'
         : sizeof(A) == 8                        ? (std::is_signed<A>::value ? 'q' : 'Q')
         : sizeof(A) == 4                        ? (std::is_signed<A>::value ? 'i' : 'I')
                                                 : 'x')...,
        0};
    return letters;
  }
};

static const char* run(void (*kernel)(void**), void** values, const unsigned* grid,
                       const unsigned* block, std::size_t shared, std::uint64_t seed) {
  body = kernel;
  arguments = values;
  grid_shape = {grid[0], grid[1], grid[2]};
  block_shape = {block[0], block[1], block[2]};
  random_state = seed * 0x9e3779b97f4a7c15u + 1;
  dynamic_memory.assign(shared + 16, 0);
  const unsigned count = block[0] * block[1] * block[2];
  make_threads(count);
  struct sigaction action = {}, before;
  action.sa_sigaction = bad_address;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;  // which nobody returns from
  sigaction(SIGSEGV, &action, &before);
  bool fine = true;
  for (unsigned i : shuffled(grid[0] * grid[1] * grid[2])) {
    block_index = {i % grid[0], i / grid[0] % grid[1], i / (grid[0] * grid[1])};
    if (!(fine = run_block(count))) break;
  }
  sigaction(SIGSEGV, &before, nullptr);
  return fine ? nullptr : message;
}

}  // namespace emulated

// The compiler calls these where -fsanitize=alignment,bounds,null finds something.
struct SourceLocation { const char* file; std::uint32_t line, column; };
extern "C" void __ubsan_handle_type_mismatch_v1(SourceLocation* where, std::uintptr_t address) {
  emulated::fail("line %u: misaligned or null address 0x%zx", where->line, address);
}
extern "C" void __ubsan_handle_out_of_bounds(SourceLocation* where, std::uintptr_t index) {
  emulated::fail("line %u: index %zd is beyond its array", where->line, index);
}

#define threadIdx (emulated::now->index)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_shape)
#define gridDim (emulated::grid_shape)
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulated::dynamic_shared())
#define __syncthreads() emulated::wait(emulated::at_barrier, __LINE__)
#define __syncthreads_count(value) static_cast<int>(emulated::vote_of_block(value, __LINE__))
#define __syncthreads_or(value) static_cast<int>(emulated::vote_of_block(value, __LINE__) != 0)
#define __syncthreads_and(value) static_cast<int>(emulated::vote_of_block(!(value), __LINE__) == 0)
#define __syncwarp(...) emulated::vote(emulated::all_or(__VA_ARGS__), true, __LINE__)
#define __shfl_sync(mask, value, source) emulated::shuffle(mask, value, (source) & 31, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
  emulated::shuffle(mask, value, emulated::lane() ^ (bits), __LINE__)
#define __shfl_down_sync(mask, value, by) \
  emulated::shuffle(mask, value, emulated::near(emulated::lane() + (by), 32), __LINE__)
#define __shfl_up_sync(mask, value, by) \
  emulated::shuffle(mask, value, emulated::near(emulated::lane() - (by), 32), __LINE__)
#define __ballot_sync(mask, value) emulated::vote(mask, value, __LINE__)
#define __any_sync(mask, value) (emulated::vote(mask, value, __LINE__) != 0)
#define __all_sync(mask, value) (emulated::vote(mask, !(value), __LINE__) == 0)
#define __trap() emulated::fail("line %d: __trap()", __LINE__)

namespace emulated {
inline unsigned all_or(unsigned mask = 0xffffffff) { return mask; }
inline char* dynamic_shared() {
  const auto address = reinterpret_cast<std::uintptr_t>(dynamic_memory.data());
  return reinterpret_cast<char*>((address + 15) / 16 * 16);
}
template <class To, class From> To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emulated

inline float __uint_as_float(unsigned x) { return emulated::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated::bits<unsigned>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
using std::isinf;
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T atomicAdd(T* p, T value) { T old = *p; *p = old + value; return old; }
template <class T> T atomicMax(T* p, T value) { T old = *p; *p = max(old, value); return old; }
template <class T> T atomicMin(T* p, T value) { T old = *p; *p = min(old, value); return old; }

// One such line a kernel follows its source.
#define EMULATED_KERNEL(name)                                                                   \
  static void emulated_call_##name(void** values) {                                             \
    emulated::Launch<decltype(&name)>::call(name, values);                                      \
  }                                                                                             \
  extern "C" const char* emulated_run_##name(void** values, const unsigned* grid,               \
                                             const unsigned* block, std::size_t shared,         \
                                             std::uint64_t seed) {                              \
    return emulated::run(emulated_call_##name, values, grid, block, shared, seed);              \
  }                                                                                             \
  extern "C" const char* emulated_kinds_##name() {                                              \
    return emulated::Launch<decltype(&name)>::kinds();                                          \
  }
