#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace psykern {
namespace {

class ThreadPool {
 public:
  static ThreadPool& shared() {
    static ThreadPool* pool = new ThreadPool;  // never destroyed: threads may outlive static destructors
    return *pool;
  }

  void run(int64_t count, int num_threads, const std::function<void(int64_t)>& task) {
    const std::lock_guard<std::mutex> one_loop(loop_mutex_);
    const int helpers = static_cast<int>(std::min<int64_t>(num_threads, count)) - 1;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(num_workers_) < helpers) std::thread(&ThreadPool::work, this, num_workers_++).detach();
      task_ = &task;
      count_ = count;
      next_ = 0;
      error_ = nullptr;
      wanted_ = helpers;
      running_ = helpers;
      ++loop_;
    }
    if (helpers > 0) start_.notify_all();
    take_tasks();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return loop_ != seen; });
        seen = loop_;
        if (index >= wanted_) continue;
      }
      take_tasks();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  void take_tasks() {
    try {
      for (int64_t i = next_++; i < count_; i = next_++) (*task_)(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_ = count_;
    }
  }

  std::mutex loop_mutex_, mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::exception_ptr error_;
  int num_workers_ = 0, wanted_ = 0, running_ = 0;
  uint64_t loop_ = 0;
};

}  // namespace

void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t)>& task) {
  if (count <= 0) return;
  if (num_threads <= 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
  } else {
    ThreadPool::shared().run(count, num_threads, task);
  }
}

}  // namespace psykern
