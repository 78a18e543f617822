#include "parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"

namespace tersor {
namespace {

// One contiguous part of [0, count) per member of a team.
struct Job {
  int64_t count;
  int parts;
  detail::Body body;
  void* context;

  void run_part(int part, int of) const {
    const int64_t begin = count / of * part + std::min<int64_t>(part, count % of);
    const int64_t end = begin + count / of + (part < count % of ? 1 : 0);
    if (begin < end) body(context, begin, end);
  }
};

// ---- The OpenMP runtime that is already in the process -------------------------------------

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  bool usable() const {
    return parallel && thread_num && num_threads && max_threads && in_parallel;
  }
};

// All three OpenMP runtimes in use (GNU, LLVM, Intel) export the GNU entry point.
OpenMP find_openmp() {
  std::vector<std::string> paths;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const std::string path = info->dlpi_name ? info->dlpi_name : "";
        const std::string file = path.substr(path.rfind('/') + 1);
        for (const char* name : {"libgomp", "libomp", "libiomp5"})
          if (file.compare(0, std::strlen(name), name) == 0)
            static_cast<std::vector<std::string>*>(out)->push_back(path);
        return 0;
      },
      &paths);
  // Another package may have brought a runtime of its own: Torch's is the one to share.
  std::stable_partition(paths.begin(), paths.end(), [](const std::string& path) {
    return path.find("torch") != std::string::npos;
  });
  for (const std::string& path : paths) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (!library) continue;
    OpenMP found;
    const auto bind = [library](auto& function, const char* name) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    };
    bind(found.parallel, "GOMP_parallel");
    bind(found.thread_num, "omp_get_thread_num");
    bind(found.num_threads, "omp_get_num_threads");
    bind(found.max_threads, "omp_get_max_threads");
    bind(found.in_parallel, "omp_in_parallel");
    if (found.usable()) return found;  // the handle stays open: the runtime lives as long as we do
    dlclose(library);
  }
  return {};
}

const OpenMP& openmp() {
  static OpenMP found;
  static std::mutex mutex;
  static std::atomic<bool> known{false};
  if (!known.load(std::memory_order_acquire)) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!found.usable()) found = find_openmp();
    known.store(true, std::memory_order_release);
  }
  return found;
}

struct TeamCall {
  const Job* job;
  const OpenMP* omp;
};

void run_openmp(const OpenMP& omp, const Job& job) {
  TeamCall call{&job, &omp};
  omp.parallel(
      [](void* data) {
        const auto* call = static_cast<const TeamCall*>(data);
        // The runtime may give fewer threads than asked for: divide by what came.
        call->job->run_part(call->omp->thread_num(), call->omp->num_threads());
      },
      &call, static_cast<unsigned>(job.parts), 0);
}

// ---- A pool of our own ----------------------------------------------------------------------

thread_local bool inside_pool = false;

class Pool {
 public:
  // Returns false, having done nothing, when another thread's job is running.
  bool run(const Job& job) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    const int workers = job.parts - 1;
    while (static_cast<int>(threads_.size()) < workers) {
      const int index = static_cast<int>(threads_.size());
      threads_.emplace_back([this, index, seen = generation_]() mutable { work(index, seen); });
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      pending_ = static_cast<int>(threads_.size());
      ++generation_;
    }
    wake_.notify_all();
    inside_pool = true;
    job.run_part(0, job.parts);
    inside_pool = false;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
    return true;
  }

 private:
  void work(int index, uint64_t seen) {
    inside_pool = true;
    for (;;) {
      const Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        job = job_;
      }
      if (index + 1 < job->parts) job->run_part(index + 1, job->parts);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int pending_ = 0;
};

// Never destroyed: the workers may outlive static destruction. A forked child has none of the
// parent's threads, so it begins with a pool of its own.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });
  });
  return *the_pool;
}

// ---- Settings -------------------------------------------------------------------------------

int environment_threads() {
  static const int count = [] {
    const char* text = std::getenv("TERSOR_THREADS");
    if (!text || !*text) return 0;
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (*end || value < 1 || value > 1024)
      throw Error(std::string("TERSOR_THREADS must be a number from 1 to 1024, not '") + text +
                  "'");
    return static_cast<int>(value);
  }();
  return count;
}

int processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

std::atomic<int> chosen_threads{0};
std::atomic<bool> pool_forced{false};

}  // namespace

int thread_count() {
  if (const int count = environment_threads()) return count;
  if (const int count = chosen_threads.load(std::memory_order_relaxed)) return count;
  if (backend() == Backend::openmp) return std::max(1, openmp().max_threads());
  static const int count = processors();
  return count;
}

void set_thread_count(int count) { chosen_threads = std::max(0, count); }

Backend backend() {
  return !pool_forced.load(std::memory_order_relaxed) && openmp().usable() ? Backend::openmp
                                                                           : Backend::pool;
}

void set_backend(Backend wanted) {
  if (wanted == Backend::openmp && !openmp().usable())
    throw Error("no OpenMP runtime is loaded in this process; import torch first");
  pool_forced = wanted == Backend::pool;
}

void detail::run(int64_t count, int64_t grain, Body body, void* context) {
  if (count <= 0) return;
  const int64_t parts = std::min<int64_t>(thread_count(), count / std::max<int64_t>(grain, 1));
  const bool team = parts > 1 && !inside_pool;
  const Job job{count, static_cast<int>(parts), body, context};
  if (team && backend() == Backend::openmp) {
    if (!openmp().in_parallel()) return run_openmp(openmp(), job);
  } else if (team && pool().run(job)) {
    return;
  }
  body(context, 0, count);
}

}  // namespace tersor
