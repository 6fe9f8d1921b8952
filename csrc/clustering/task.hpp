// Threads of one solve, and a way out of it.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "wide.hpp"

namespace diffmtl {

// Thrown out of a solve when the caller asked for it to stop.
struct Interrupted {};

class Task {
 public:
  // interrupted: asked now and then, on the calling thread alone.
  Task(int threads, std::function<bool()> interrupted)
      : threads_(std::max(1, threads)), interrupted_(std::move(interrupted)), caller_(std::this_thread::get_id()) {}

  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;

  ~Task() {
    {
      std::lock_guard lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int threads() const { return threads_; }

  // Reports work done (in evaluations or so); throws Interrupted when asked to stop.
  void poll(Int work) {
    thread_local Int since_last = 0;
    since_last += work;
    if (since_last < (1 << 16)) return;
    since_last = 0;
    if (!stop_ && std::this_thread::get_id() == caller_) {
      const auto now = std::chrono::steady_clock::now();
      if (now - asked_ > std::chrono::milliseconds(50)) {
        asked_ = now;
        if (interrupted_()) stop_ = true;
      }
    }
    if (stop_) throw Interrupted{};
  }

  // body(i) for every i in 0 .. count - 1, in any order, on all threads. The first exception is thrown here.
  void parallel_for(Int count, const std::function<void(Int)>& body) {
    if (threads_ == 1 || count <= 1) {
      for (Int i = 0; i < count; ++i) body(i);
      return;
    }
    while (static_cast<int>(workers_.size()) < threads_ - 1) workers_.emplace_back([this] { work(); });
    {
      std::lock_guard lock(mutex_);
      body_ = &body, count_ = count, next_ = 0, failure_ = nullptr;
      busy_ = static_cast<int>(workers_.size());
      ++round_;
    }
    wake_.notify_all();
    drain();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void drain() {
    try {
      for (Int i = next_++; i < count_; i = next_++) (*body_)(i);
    } catch (...) {
      next_ = count_;
      std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  void work() {
    for (Int seen = 0;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return closing_ || round_ != seen; });
        if (closing_) return;
        seen = round_;
      }
      drain();
      std::lock_guard lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  int threads_;
  std::function<bool()> interrupted_;
  std::thread::id caller_;
  std::chrono::steady_clock::time_point asked_ = std::chrono::steady_clock::now();
  std::atomic<bool> stop_{false};

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(Int)>* body_ = nullptr;
  Int count_ = 0, round_ = 0;
  std::atomic<Int> next_{0};
  int busy_ = 0;
  bool closing_ = false;
  std::exception_ptr failure_;
};

}  // namespace diffmtl
