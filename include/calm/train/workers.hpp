// Workers: contexts of one thread each, which compute parts of a pass side by side.
//
// Sequences need nothing of each other. A thread that takes its own sequences through all blocks keeps their
// activations in its caches, and waits for the others once and not at every operation.
#pragma once

#include <calm/backend/backend.hpp>

#include <algorithm>
#include <memory>
#include <span>
#include <tuple>
#include <vector>

namespace calm::inline CALM_ABI {

template <class Ctx>
class Workers {
 public:
  explicit Workers(Ctx& ctx) : ctx_(ctx) {
    if constexpr (has_threads) {
      const int threads = ctx.backend.pool().size();
      for (int i = 0; threads > 1 && i < threads; ++i)
        contexts_.push_back(std::apply([](const auto&... options) { return std::make_unique<Ctx>(1, options...); },
                                       ctx.backend.options()));
    }
  }

  /// Places that for_each() tells apart.
  Index size() const { return std::max<Index>(1, static_cast<Index>(contexts_.size())); }

  /// Calls fn(context, place, i) for every part i, whose sizes are given: side by side, each on one thread, where that
  /// keeps the threads about equally busy, else one after the other on all threads. A place is in one call at a time.
  /// fn must give the same bits either way.
  template <class Fn>
  void for_each(std::span<const Index> sizes, Fn&& fn) {
    const auto count = static_cast<Index>(sizes.size());
    if constexpr (has_threads) {
      if (!contexts_.empty() && are_balanced(sizes)) {
        ctx_.backend.pool().for_each_tile(size(), [&](Index place, int) {  // the same parts in the same place each time
          for (Index i = first_part(place, count); i < first_part(place + 1, count); ++i)
            fn(*contexts_[static_cast<std::size_t>(place)], place, i);
        });
        return;
      }
    }
    for (Index i = 0; i < count; ++i) fn(ctx_, Index{0}, i);
  }

 private:
  Index first_part(Index place, Index count) const { return place * count / size(); }

  /// Whether no place has more than a fifth above its share.
  bool are_balanced(std::span<const Index> sizes) const {
    const auto count = static_cast<Index>(sizes.size());
    Index largest = 0, total = 0;
    for (Index place = 0; place < size(); ++place) {
      Index sum = 0;
      for (Index i = first_part(place, count); i < first_part(place + 1, count); ++i)
        sum += sizes[static_cast<std::size_t>(i)];
      largest = std::max(largest, sum);
      total += sum;
    }
    return 5 * largest * size() <= 6 * total;
  }

  static constexpr bool has_threads = requires(Ctx & ctx) { ctx.backend.pool(); };

  Ctx& ctx_;
  std::vector<std::unique_ptr<Ctx>> contexts_;  // none where there is one thread
};

}  // namespace calm::inline CALM_ABI
