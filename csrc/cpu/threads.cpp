// Loops run on the threads that PyTorch's operations run on, if it was built with OpenMP: after an operation these
// spin for a while, and threads beside them would wait for the cores.
//
// Otherwise on threads of our own, with one property: a loop never waits for a thread that has not begun to work on
// it. Where the cores are shared with other processes that would be a wait for the scheduler.
#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace diffmtl::cpu {
namespace {

using Body = std::function<void(Int, int)>;

// One loop. Shared by those who work on it: a thread that comes late finds no task left and never touches the body.
class Loop {
 public:
  Loop(const Body& body, Int tasks, int threads) : body_(body), tasks_(tasks), threads_(threads) {}

  // Works on the tasks that are left; true if the last one of all was finished here.
  bool drain() {
    const int thread = next_thread_++;
    bool last = false;
    if (thread >= threads_) return last;
    for (Int task = next_task_++; task < tasks_; task = next_task_++) {
      body_(task, thread);
      last = ++finished_ == tasks_;
    }
    return last;
  }

  bool finished() const { return finished_ == tasks_; }

 private:
  const Body& body_;
  const Int tasks_;
  const int threads_;
  std::atomic<Int> next_task_{0}, finished_{0};
  std::atomic<int> next_thread_{0};
};

class Pool {
 public:
  // False if the pool is at work for another caller.
  bool run(Int tasks, int threads, const Body& body) {
    const std::unique_lock caller(one_caller_, std::try_to_lock);
    if (!caller) return false;
    for (; workers_ < threads - 1; ++workers_) std::thread([this] { work(); }).detach();
    const auto loop = std::make_shared<Loop>(body, tasks, threads);
    set_loop(loop);
    for (int i = 1; i < threads; ++i) wake_.notify_one();
    if (!loop->drain()) wait_for(*loop);
    set_loop(nullptr);
    return true;
  }

 private:
  void set_loop(const std::shared_ptr<Loop>& loop) {
    const std::lock_guard lock(mutex_);
    loop_ = loop;
  }

  void wait_for(const Loop& loop) {
    // The others are in the middle of their last tasks, which are short: going to sleep would take longer.
    for (int i = 0; i < 50 && !loop.finished(); ++i) std::this_thread::yield();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return loop.finished(); });
  }

  void work() {
    std::shared_ptr<Loop> loop;
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return loop_ && loop_ != loop; });
        loop = loop_;
      }
      if (loop->drain()) {
        const std::lock_guard lock(mutex_);
        done_.notify_one();
      }
    }
  }

  std::mutex one_caller_, mutex_;
  std::condition_variable wake_, done_;
  std::shared_ptr<Loop> loop_;
  int workers_ = 0;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them and starts anew.
std::atomic<Pool*> pool{nullptr};

// An OpenMP runtime waits in a forked child for the threads that it had before.
std::atomic<bool> forked{false};

[[maybe_unused]] const bool prepared = [] {
  pool = new Pool;
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, [] {
    pool = new Pool;
    forked = true;
  });
#endif
  return true;
}();

// What a compiler makes of "#pragma omp parallel": every thread of the team calls the function, then they meet. GCC's
// and LLVM's runtimes both export it.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// The entry to the OpenMP runtime that PyTorch has loaded, or null. Not linked: PyTorch's wheels bring a copy of their
// own, and a second one would be a second set of threads.
Parallel openmp() {
#if defined(_WIN32)
  return nullptr;
#else
  static const auto entry = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
#endif
}

bool run_with_openmp(Int tasks, int threads, const Body& body) {
  if (forked || !openmp()) return false;
  Loop loop(body, tasks, threads);
  // 0: the whole team, as PyTorch's operations take it. A runtime ends the threads that a smaller team leaves over, and
  // starts new ones for the next operation; here those who are too many go home at once.
  openmp()([](void* data) { static_cast<Loop*>(data)->drain(); }, &loop, 0, 0);
  return true;
}

}  // namespace

void parallel_for(Int tasks, int threads, const Body& body) {
  threads = static_cast<int>(std::min<Int>(threads, tasks));
  if (threads > 1 && (run_with_openmp(tasks, threads, body) || pool.load()->run(tasks, threads, body))) return;
  for (Int task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace diffmtl::cpu
