// The only threads of the library.
//
// Inside a Torch process the workers are those of the OpenMP runtime that Torch has already loaded:
// a second pool would fight the first one's spinning threads for the same cores
// (bench/threads.py measures it). Without such a runtime a small pool of our own does the work.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace tersor {

enum class Backend { openmp, pool };

// Threads that the next parallel_for may use: TERSOR_THREADS, else set_thread_count(), else the
// OpenMP runtime's own setting (torch.set_num_threads), else the processors this process may use.
int thread_count();
void set_thread_count(int count);  // 0: back to the default

Backend backend();
void set_backend(Backend wanted);  // throws std::runtime_error when no OpenMP runtime is loaded

namespace detail {
using Body = void (*)(void* context, int64_t begin, int64_t end);
void run(int64_t count, int64_t grain, Body body, void* context);
}  // namespace detail

// Calls body(begin, end) on contiguous parts that together cover [0, count), each at least `grain`
// long where count allows it. The body must not throw. A call from inside a parallel region runs
// on the calling thread alone.
template <class F>
void parallel_for(int64_t count, int64_t grain, F&& body) {
  using Function = std::remove_reference_t<F>;
  detail::run(
      count, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<Function*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

}  // namespace tersor
