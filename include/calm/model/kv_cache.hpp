// KvCache: the keys and values of some blocks for some sequences (slots), appended as tokens come.
#pragma once

#include <calm/core/arithmetic.hpp>
#include <calm/nn/attention.hpp>

#include <cstddef>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace calm::inline CALM_ABI {

template <class Scalar>
class KvCache {
 public:
  /// Room for `slots` sequences of at most `capacity` tokens in `layers` attentions of `width` values a token.
  /// Throws FormatError where its size is no number of bytes.
  KvCache(Index layers, Index slots, Index capacity, Index width) : capacity_(capacity), width_(width) {
    require<ShapeError>(slots > 0 && capacity > 0, "KvCache: needs at least one slot and one token, found ", slots,
                        " and ", capacity);
    const std::string what = message("a cache of ", slots, " x ", capacity, " tokens");
    rows_of_slot_ = checked_add(capacity, cache_step - 1, what) / cache_step * cache_step;
    const Index values = checked_multiply(checked_multiply(slots, rows_of_slot_, what), width, what);
    bytes_of_layer_ = static_cast<std::size_t>(checked_multiply(values, 2 * Index{sizeof(Scalar)}, what));
    lengths_.assign(static_cast<std::size_t>(slots), 0);
    // Not set before it is written: rows that no token reaches never take a page of memory.
    const auto room = [&] { return Memory(static_cast<Scalar*>(::operator new(bytes_of_layer_ / 2, alignment))); };
    for (Index i = 0; i < layers; ++i) {
      keys_.push_back(room());
      values_.push_back(room());
    }
  }

  KvRows<Scalar> rows(Index layer) {
    const auto i = static_cast<std::size_t>(layer);
    return {keys_[i].get(), values_[i].get(), rows_of_slot_, width_};
  }

  Index slots() const { return static_cast<Index>(lengths_.size()); }
  Index capacity() const { return capacity_; }
  Index length(Index slot) const { return lengths_[checked(slot)]; }
  void clear(Index slot) { lengths_[checked(slot)] = 0; }
  std::size_t bytes() const { return keys_.size() * bytes_of_layer_; }

  /// Throws unless `count` more tokens fit into the slot.
  [[gnu::cold]] void check_room(Index slot, Index count) const {
    require<ContextLimitError>(length(slot) + count <= capacity_, "slot ", slot, " holds ", length(slot),
                               " tokens and ", count, " more were given, but the session was made for ", capacity_,
                               "; make it larger or stop earlier");
  }

  void advance(Index slot, Index count) { lengths_[checked(slot)] += count; }

 private:
  std::size_t checked(Index slot) const {
    require<ShapeError>(slot >= 0 && slot < slots(), "slot ", slot, " of a session with ", slots(), " slots");
    return static_cast<std::size_t>(slot);
  }

  static constexpr std::align_val_t alignment{HostMemory::alignment};
  struct Release {
    void operator()(Scalar* p) const { HostMemory::release(reinterpret_cast<std::byte*>(p)); }
  };
  using Memory = std::unique_ptr<Scalar, Release>;

  std::vector<Memory> keys_, values_;
  std::vector<Index> lengths_;
  Index capacity_, width_, rows_of_slot_;
  std::size_t bytes_of_layer_;
};

}  // namespace calm::inline CALM_ABI
