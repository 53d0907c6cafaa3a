// Threads for work that is cut into fixed tiles.
//
// The tiles never depend on the number of threads, and each is computed by one thread in one order, so results have the
// same bits for any number of threads. Which thread takes a tile does not matter to them.
#pragma once

#include <calm/core/error.hpp>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

/// A fixed set of threads, the caller's among them. One caller at a time; calls allocate nothing.
class ThreadPool {
 public:
  /// `threads` >= 1; 0 means one for each core of the machine.
  explicit ThreadPool(int threads = 0) {
    if (threads <= 0) threads = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
    workers_.reserve(static_cast<std::size_t>(threads) - 1);
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  ~ThreadPool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  /// Calls `tile(i, thread)` for every i in [0, count) and returns when all have ended. `thread` lies in [0, size()) and
  /// belongs to one thread for the length of the call. The first exception of a tile is rethrown here.
  template <class Tile>
  void for_each_tile(Index count, Tile&& tile) {
    if (workers_.empty() || count <= 1) {
      for (Index i = 0; i < count; ++i) tile(i, 0);
      return;
    }
    using Function = std::remove_reference_t<Tile>;
    call_ = [](const void* function, Index i, int thread) {
      (*static_cast<Function*>(const_cast<void*>(function)))(i, thread);
    };
    function_ = &tile;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      const std::lock_guard lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_tiles(0);
    while (running_.load(std::memory_order_acquire) != 0) pause();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void take_tiles(int thread) {
    try {
      for (Index i = next_.fetch_add(1, std::memory_order_relaxed); i < count_;
           i = next_.fetch_add(1, std::memory_order_relaxed))
        call_(function_, i, thread);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(count_, std::memory_order_relaxed);
    }
  }

  void work(int thread) {
    std::uint64_t seen = 0;
    while (true) {
      // Work comes in bursts of many short calls: look for the next one for a while before going to sleep.
      for (int spin = 0; spin < 4000 && generation_.load(std::memory_order_acquire) == seen; ++spin) pause();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stop_) return;
      take_tiles(thread);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<Index> next_{0};
  std::atomic<int> running_{0};
  void (*call_)(const void*, Index, int) = nullptr;
  const void* function_ = nullptr;
  Index count_ = 0;
  bool stop_ = false;
  std::exception_ptr error_;
};

}  // namespace calm::inline CALM_ABI
