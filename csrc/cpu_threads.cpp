#include "cpu_threads.hpp"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace diffmtl::cpu {
namespace {

using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// The entry point of the OpenMP runtime that torch has loaded, or null.
//
// After an operation of torch its OpenMP threads keep spinning for a while: threads of our own would have to share
// the cores with them. So we borrow them. The symbol is looked up rather than linked to, because there must be no
// second runtime in the process, and torch decides which one is there; this entry point is part of the stable
// interface that compiled programs use, and the OpenMP runtimes of GNU, LLVM and Intel all have it.
GompParallel find_openmp() {
#if defined(_WIN32)
  return nullptr;
#else
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

struct Work {
  const std::function<void(Int, int)>& body;
  const Int tasks;
  std::atomic<Int> next_task{0};
  std::atomic<int> next_thread{0};

  void drain() {
    const int thread = next_thread++;
    for (Int task = next_task++; task < tasks; task = next_task++) body(task, thread);
  }
};

void run_on_new_threads(Work& work, int threads) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back([&work] { work.drain(); });
  work.drain();
  for (std::thread& other : others) other.join();
}

}  // namespace

void parallel_for(Int tasks, int threads, const std::function<void(Int, int)>& body) {
  threads = static_cast<int>(std::min<Int>(threads, tasks));
  if (threads <= 1) {
    for (Int task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  static const GompParallel openmp = find_openmp();
  Work work{body, tasks};
  if (openmp) {
    openmp([](void* data) { static_cast<Work*>(data)->drain(); }, &work, static_cast<unsigned>(threads), 0);
  } else {
    run_on_new_threads(work, threads);
  }
}

}  // namespace diffmtl::cpu
