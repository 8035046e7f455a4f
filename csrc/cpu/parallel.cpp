#include "parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace psykern {
namespace {

// Tasks of one loop, taken by the threads that work on it.
class Tasks {
 public:
  Tasks(int64_t count, const std::function<void(int64_t)>& task) : count_(count), task_(task) {}

  void take() {
    try {
      for (int64_t i = next_++; i < count_; i = next_++) task_(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_ = count_;
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t count_;
  const std::function<void(int64_t)>& task_;
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_;
};

// The entry of GNU's OpenMP runtime (LLVM's has it too) that compilers call for `#pragma omp parallel`.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

// That of the runtime which torch has loaded, or null. Linked with -fopenmp, this library might bring a second one.
GompParallel find_openmp() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

// For a process without OpenMP. One loop runs at a time.
class ThreadPool {
 public:
  static ThreadPool& shared() {
    static ThreadPool* pool = new ThreadPool;  // never destroyed: threads may outlive static destructors
    return *pool;
  }

  void run(int helpers, Tasks& tasks) {
    const std::lock_guard<std::mutex> one_loop(loop_mutex_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (num_workers_ < helpers) std::thread(&ThreadPool::work, this, num_workers_++).detach();
      tasks_ = &tasks;
      wanted_ = helpers;
      running_ = helpers;
      ++loop_;
    }
    start_.notify_all();
    tasks.take();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
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
      tasks_->take();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex loop_mutex_, mutex_;
  std::condition_variable start_, done_;
  Tasks* tasks_ = nullptr;
  int num_workers_ = 0, wanted_ = 0, running_ = 0;
  uint64_t loop_ = 0;
};

}  // namespace

void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t)>& task) {
  if (count <= 0) return;
  if (num_threads <= 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  static const GompParallel openmp = find_openmp();
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, count));
  Tasks tasks(count, task);
  if (openmp != nullptr) {
    openmp([](void* data) { static_cast<Tasks*>(data)->take(); }, &tasks, static_cast<unsigned>(threads), 0);
  } else {
    ThreadPool::shared().run(threads - 1, tasks);
  }
  tasks.rethrow();
}

}  // namespace psykern
