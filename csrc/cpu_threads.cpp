// Threads of our own instead of OpenMP's, for one property: a loop never waits for a thread that has not begun to
// work on it. At the end of an OpenMP region every thread must have been there, and where the cores are shared with
// data loaders or other processes that means a wait for the scheduler, many times longer than the loop.
#include "cpu_threads.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#if !defined(_WIN32)
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

Pool& the_pool() {
  static const bool prepared = [] {
    pool = new Pool;
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
    return true;
  }();
  (void)prepared;
  return *pool;
}

}  // namespace

void parallel_for(Int tasks, int threads, const Body& body) {
  threads = static_cast<int>(std::min<Int>(threads, tasks));
  if (threads > 1 && the_pool().run(tasks, threads, body)) return;
  for (Int task = 0; task < tasks; ++task) body(task, 0);
}

}  // namespace diffmtl::cpu
