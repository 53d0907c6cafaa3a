// Threads for work that is cut into fixed tiles.
//
// The tiles never depend on the number of threads, and each is computed by one thread in one order, so results have the
// same bits for any number of threads. Which thread takes a tile does not matter to them. Ranges do depend on it: they
// are for work of which no result depends on where it is cut.
#pragma once

#include <calm/core/arithmetic.hpp>
#include <calm/core/error.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
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
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (...) {  // the system gives no more threads: those that run must end before this object does
      end();
      throw;
    }
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  ~ThreadPool() { end(); }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  /// Calls `tile(i, thread)` for every i in [0, count) and returns when all have ended. `thread` lies in [0, size())
  /// and belongs to one thread for the length of the call. The first exception of a tile is rethrown here. A thread
  /// that the system does not run holds nothing up but the tile that it has taken.
  template <class Tile>
  void for_each_tile(Index count, Tile&& tile) {
    using Function = std::remove_reference_t<Tile>;
    run(
        count,
        [](const void* function, Index i, int thread) {
          (*static_cast<Function*>(const_cast<void*>(function)))(i, thread);
        },
        &tile);
  }

  /// Calls `range(begin, end, thread)` for ranges that together are [0, count): large ones first, so that a thread
  /// reads on without a break, and small ones at the end, so that threads end together. Only the last may have fewer
  /// than `least`, or than a 128th of all.
  template <class Range>
  void for_each_range(Index count, Index least, Range&& range) {
    constexpr Index most_ranges = 128;
    least = std::max(least, ceil_divide(count, most_ranges));
    std::array<Index, most_ranges + 1> begins;
    Index ranges = 0;
    for (Index begin = 0; begin < count; ++ranges) {
      begins[static_cast<std::size_t>(ranges)] = begin;
      begin += std::min(count - begin, std::max(least, (count - begin) / (2 * Index{size()})));
    }
    begins[static_cast<std::size_t>(ranges)] = count;
    for_each_tile(ranges, [&](Index i, int thread) {
      range(begins[static_cast<std::size_t>(i)], begins[static_cast<std::size_t>(i) + 1], thread);
    });
  }

 private:
  using Call = void (*)(const void*, Index, int);

  void end() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  [[gnu::noinline]] void run(Index count, Call call, const void* function) {
    if (workers_.empty() || count <= 1) {
      for (Index i = 0; i < count; ++i) call(function, i, 0);
      return;
    }
    require<ShapeError>(static_cast<std::uint64_t>(count) < no_tile, "for_each_tile: ", count, " tiles");
    const std::uint64_t call_number = ++calls_ << 32;
    ticket_.store(call_number | no_tile);  // nobody takes a tile of a call that is half written
    call_.store(call, std::memory_order_relaxed);
    function_.store(function, std::memory_order_relaxed);
    count_.store(count, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(call_number);
    if (sleepers_.load() > 0) {
      { const std::lock_guard lock(mutex_); }
      wake_.notify_all();
    }
    take_tiles(0);
    for (int spins = 0; done_.load(std::memory_order_acquire) != count; ++spins) pause(spins);
    if (failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  /// Takes tiles of the current call until none is left. A ticket is the call's number and the next tile: taking one
  /// fails when the call has ended meanwhile, so what was read of the call before is then not used.
  bool take_tiles(int thread) {
    bool any = false;
    for (std::uint64_t ticket = ticket_.load();;) {
      const Call call = call_.load(std::memory_order_relaxed);
      const void* function = function_.load(std::memory_order_relaxed);
      const auto tile = static_cast<Index>(ticket & no_tile);
      if (tile >= count_.load(std::memory_order_acquire)) return any;
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
      any = true;
      try {
        call(function, tile, thread);
      } catch (...) {
        const std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
        failed_ = true;
      }
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load();
    }
  }

  void work(int thread) {
    while (true) {
      // Work comes in bursts of many short calls: look for the next one for a while before going to sleep.
      for (int idle = 0; idle < 2000; ++idle) {
        if (take_tiles(thread)) idle = 0;
        pause(0);
      }
      std::unique_lock lock(mutex_);
      ++sleepers_;
      wake_.wait(lock, [&] { return stop_ || static_cast<Index>(ticket_.load() & no_tile) < count_.load(); });
      --sleepers_;
      if (stop_) return;
    }
  }

  /// Lets the other thread of a core run, and after a while any other thread.
  static void pause(int spins) {
    if (spins > 200) return std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  static constexpr std::uint64_t no_tile = 0xFFFFFFFF;

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> ticket_{no_tile};
  std::atomic<Call> call_{nullptr};
  std::atomic<const void*> function_{nullptr};
  std::atomic<Index> count_{0}, done_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> failed_{false};
  std::uint64_t calls_ = 0;
  bool stop_ = false;
  std::exception_ptr error_;
};

}  // namespace calm::inline CALM_ABI
