// Attention of CpuBackend, over ragged sequences with a visible range for each query.
//
// A task is one sequence and one key-value head (forward also one tile of queries); scores exist for one tile of
// queries at a time. The gradient computes them again from log_sum_exp, as FlashAttention does (Dao et al., 2022).
#pragma once

#include <calm/backend/cpu_product.hpp>

#include <Eigen/Core>

#include <cmath>
#include <limits>
#include <vector>

namespace calm::inline CALM_ABI::cpu {

inline constexpr Index query_tile = 64;

template <class S>
void set_zero(MatrixView<S> m) {
  for (Index i = 0; i < m.rows; ++i) std::fill_n(m.row(i), m.cols, S{});
}

/// The smallest range that holds what all queries [first, first + count) see.
inline VisibleRange hull(std::span<const VisibleRange> visible, Index first, Index count) {
  VisibleRange range{std::numeric_limits<Index>::max(), 0};
  for (Index t = first; t < first + count; ++t) {
    const VisibleRange& v = visible[static_cast<std::size_t>(t)];
    if (v.begin >= v.end) continue;
    range.begin = std::min(range.begin, v.begin);
    range.end = std::max(range.end, v.end);
  }
  return range.end == 0 ? VisibleRange{} : range;
}

/// A tile of queries of one head with what they see: views into the packed batch.
template <class S>
struct AttentionTile {
  Index first, count;     // queries
  VisibleRange range;     // keys
  MatrixView<const S> q;  // [count, width]
  MatrixView<const S> k;  // [keys, width]
  MatrixView<const S> v;

  AttentionTile(MatrixView<const S> queries, const AttentionSequence<S>& sequence,
                std::span<const VisibleRange> visible, HeadShape heads, Index head, Index offset)
      : first(sequence.first_query + offset), count(std::min(query_tile, sequence.queries - offset)),
        range(hull(visible, first, count)),
        q(queries.middle_rows(first, count).middle_cols(head * heads.width, heads.width)) {
    const Index column = head / (heads.query_heads / heads.kv_heads) * heads.width;
    const Index keys = range.end - range.begin;
    k = {sequence.keys + range.begin * sequence.stride + column, keys, heads.width, sequence.stride};
    v = {sequence.values + range.begin * sequence.stride + column, keys, heads.width, sequence.stride};
  }

  /// Columns of the scores that query `i` of the tile sees.
  VisibleRange columns(std::span<const VisibleRange> visible, Index i) const {
    const VisibleRange& all = visible[static_cast<std::size_t>(first + i)];
    if (all.begin >= all.end) return {};
    return {all.begin - range.begin, all.end - range.begin};
  }
};

template <class S>
void attention(ThreadPool& pool, Scratch& scratch, MatrixView<const S> q,
               std::span<const AttentionSequence<S>> sequences, std::span<const VisibleRange> visible, HeadShape heads,
               MatrixView<S> y, MatrixView<S> log_sum_exp) {
  Index longest = 0;
  for (const auto& sequence : sequences) longest = std::max(longest, sequence.queries);
  const Index tiles = ceil_divide(longest, query_tile), count = static_cast<Index>(sequences.size());
  const S factor = S{1} / std::sqrt(static_cast<S>(heads.width));
  pool.for_each_tile(count * tiles * heads.query_heads, [&](Index task, int thread) {
    const auto& sequence = sequences[static_cast<std::size_t>(task / (tiles * heads.query_heads))];
    const Index head = task / tiles % heads.query_heads, offset = task % tiles * query_tile;
    if (offset >= sequence.queries) return;
    const AttentionTile<S> tile(q, sequence, visible, heads, head, offset);
    const auto target = y.middle_rows(tile.first, tile.count).middle_cols(head * heads.width, heads.width);
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    const Index stride = ceil_divide(tile.k.rows, 64) * 64;  // rows begin alike, so that Eigen takes the same lanes
    const MatrixView<S> scores(arena.allocate<S>(tile.count * stride), tile.count, tile.k.rows, stride);
    if (!scores.empty()) product_abt(arena, tile.q, tile.k, scores, false);
    for (Index i = 0; i < tile.count; ++i) {
      const auto [begin, end] = tile.columns(visible, i);
      Eigen::Map<Eigen::Array<S, 1, Eigen::Dynamic>> row(scores.row(i), scores.cols);
      S sum = std::numeric_limits<S>::infinity();
      if (begin < end) {
        auto seen = row.segment(begin, end - begin);
        const S largest = seen.maxCoeff();
        seen = ((seen - largest) * factor).exp();
        sum = seen.sum();
        seen /= sum;
        sum = largest * factor + std::log(sum);
      }
      row.head(begin).setZero();
      row.tail(scores.cols - end).setZero();
      log_sum_exp(tile.first + i, head) = sum;
    }
    if (scores.empty()) set_zero(target);
    else product_ab(arena, MatrixView<const S>(scores), tile.v, target, false);
  });
}

template <class S>
void attention_backward(ThreadPool& pool, Scratch& scratch, MatrixView<const S> q,
                        std::span<const AttentionSequence<S>> sequences, std::span<const VisibleRange> visible,
                        HeadShape heads, MatrixView<const S> y, MatrixView<const S> log_sum_exp, MatrixView<const S> dy,
                        MatrixView<S> dq) {
  const S factor = S{1} / std::sqrt(static_cast<S>(heads.width));
  const Index group = heads.query_heads / heads.kv_heads;
  pool.for_each_tile(static_cast<Index>(sequences.size()) * heads.kv_heads, [&](Index task, int thread) {
    const auto& sequence = sequences[static_cast<std::size_t>(task / heads.kv_heads)];
    const Index kv_head = task % heads.kv_heads, column = kv_head * heads.width;
    const MatrixView<S> dk{sequence.key_gradients + column, sequence.key_count, heads.width, sequence.stride};
    const MatrixView<S> dv{sequence.value_gradients + column, sequence.key_count, heads.width, sequence.stride};
    set_zero(dk);
    set_zero(dv);
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    for (Index head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      for (Index offset = 0; offset < sequence.queries; offset += query_tile) {
        const AttentionTile<S> tile(q, sequence, visible, heads, head, offset);
        const auto part = [&](auto m) {
          return m.middle_rows(tile.first, tile.count).middle_cols(head * heads.width, heads.width);
        };
        if (tile.k.rows == 0) {
          set_zero(part(dq));
          continue;
        }
        arena.reset();
        const auto p = arena.matrix<S>(tile.count, tile.k.rows), dp = arena.matrix<S>(tile.count, tile.k.rows);
        product_abt(arena, tile.q, tile.k, p, false);
        product_abt(arena, MatrixView<const S>(part(dy)), tile.v, dp, false);
        for (Index i = 0; i < tile.count; ++i) {
          const auto [begin, end] = tile.columns(visible, i);
          Eigen::Map<Eigen::Array<S, 1, Eigen::Dynamic>> p_row(p.row(i), p.cols), dp_row(dp.row(i), p.cols);
          S delta = 0;
          for (Index j = 0; j < heads.width; ++j) delta += part(dy)(i, j) * part(y)(i, j);
          auto seen = p_row.segment(begin, end - begin);
          auto dseen = dp_row.segment(begin, end - begin);
          if (begin < end) {
            seen = (seen * factor - log_sum_exp(tile.first + i, head)).exp();
            dseen = seen * (dseen - delta) * factor;
          }
          for (auto* row : {&p_row, &dp_row}) {
            row->head(begin).setZero();
            row->tail(p.cols - end).setZero();
          }
        }
        const Index keys = tile.k.rows;
        product_ab(arena, MatrixView<const S>(dp), tile.k, part(dq), false);
        product_atb(arena, MatrixView<const S>(p), part(dy), dv.middle_rows(tile.range.begin, keys), true);
        product_atb(arena, MatrixView<const S>(dp), tile.q, dk.middle_rows(tile.range.begin, keys), true);
      }
    }
  });
}

}  // namespace calm::inline CALM_ABI::cpu
