// Arena: memory for the activations of one run, handed out in order and taken back all at once.
//
// The first pass may ask the system for several pieces; reset() then joins them into one of the size that was needed,
// so that later passes of the same size ask for nothing. Memory is a policy: where the bytes live.
#pragma once

#include <calm/core/huge_pages.hpp>
#include <calm/tensor/view.hpp>

#include <algorithm>
#include <cstddef>
#include <new>
#include <vector>

namespace calm::inline CALM_ABI {

/// Bytes in the main memory of the host.
struct HostMemory {
  static constexpr std::size_t alignment = 64;
  static std::byte* allocate(std::size_t bytes) {
    auto* const p = static_cast<std::byte*>(::operator new (bytes, std::align_val_t{alignment}));
    ask_for_huge_pages(p, bytes);
    return p;
  }
  static void release(std::byte* p) { ::operator delete (p, std::align_val_t{alignment}); }
};

template <class Memory = HostMemory>
class Arena {
 public:
  Arena() = default;
  explicit Arena(std::size_t bytes) { add_chunk(bytes); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    for (const Chunk& chunk : chunks_) Memory::release(chunk.data);
  }

  /// `count` uninitialised values that live until the next reset() or until a Mark taken before is left.
  template <class T>
  T* allocate(Index count) {
    return reinterpret_cast<T*>(take(static_cast<std::size_t>(count) * sizeof(T)));
  }

  template <class T>
  MatrixView<T> matrix(Index rows, Index cols) {
    return {allocate<T>(rows * cols), rows, cols};
  }

  template <class T>
  std::span<T> vector(Index count) {
    return {allocate<T>(count), static_cast<std::size_t>(count)};
  }

  /// Takes everything back, and joins the pieces if there were several.
  void reset() {
    if (chunks_.size() > 1) {
      const std::size_t total = capacity();
      for (const Chunk& chunk : chunks_) Memory::release(chunk.data);
      chunks_.clear();
      add_chunk(total);
    }
    for (Chunk& chunk : chunks_) chunk.used = 0;
    current_ = 0;
    in_use_ = 0;
  }

  std::size_t capacity() const {
    std::size_t total = 0;
    for (const Chunk& chunk : chunks_) total += chunk.size;
    return total;
  }

  /// The most bytes that were in use at once.
  std::size_t peak() const { return peak_; }

  /// Takes back, when it goes out of scope, what was allocated since it was made.
  class Mark {
   public:
    explicit Mark(Arena& arena)
        : arena_(arena), current_(arena.current_),
          used_(arena.current_ < arena.chunks_.size() ? arena.chunks_[arena.current_].used : 0),
          in_use_(arena.in_use_) {}
    Mark(const Mark&) = delete;
    Mark& operator=(const Mark&) = delete;
    ~Mark() { arena_.give_back(current_, used_, in_use_); }

   private:
    Arena& arena_;
    std::size_t current_, used_, in_use_;
  };

 private:
  struct Chunk {
    std::byte* data;
    std::size_t size, used;
  };

  static std::size_t round_up(std::size_t bytes) {
    return (bytes + HostMemory::alignment - 1) / HostMemory::alignment * HostMemory::alignment;
  }

  /// Not inlined: it is called everywhere, and costs little beside what is done with the memory.
  [[gnu::noinline]] std::byte* take(std::size_t wanted) {
    const std::size_t bytes = round_up(wanted);
    while (current_ < chunks_.size() && chunks_[current_].size - chunks_[current_].used < bytes) ++current_;
    if (current_ == chunks_.size()) add_chunk(std::max(bytes, std::max(capacity(), std::size_t{1} << 20)));
    Chunk& chunk = chunks_[current_];
    std::byte* result = chunk.data + chunk.used;
    chunk.used += bytes;
    in_use_ += bytes;
    peak_ = std::max(peak_, in_use_);
    return result;
  }

  [[gnu::noinline]] void give_back(std::size_t current, std::size_t used, std::size_t in_use) {
    for (std::size_t i = current; i < chunks_.size(); ++i) chunks_[i].used = i == current ? used : 0;
    current_ = current;
    in_use_ = in_use;
  }

  [[gnu::cold]] void add_chunk(std::size_t bytes) {
    chunks_.push_back({nullptr, 0, 0});  // first, so that no memory is lost where the list cannot grow
    chunks_.back().data = Memory::allocate(round_up(bytes));
    chunks_.back().size = round_up(bytes);
  }

  std::vector<Chunk> chunks_;
  std::size_t current_ = 0, in_use_ = 0, peak_ = 0;
};

}  // namespace calm::inline CALM_ABI
