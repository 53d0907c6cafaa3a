// Attention of CpuBackend, over ragged sequences with a visible range for each query.
//
// A task is one sequence and one key-value head (forward also one tile of queries); scores exist for one tile of
// queries at a time, and only where a group of neighbouring queries sees them. The gradient computes them again from
// log_sum_exp, as FlashAttention does (Dao et al., 2022). Ranges of keys are widened to whole steps that are counted
// from the first key of the sequence: the order of every sum follows from the position and the range of its query.
#pragma once

#include <calm/backend/cpu_product.hpp>
#include <calm/backend/cpu_vector.hpp>

#include <cmath>
#include <limits>

namespace calm::inline CALM_ABI::cpu {

inline constexpr Index query_tile = 64;  // queries whose scores exist at a time
inline constexpr Index query_group = 8;  // queries that are multiplied with the same keys
inline constexpr Index key_step = chunk;

template <class S>
void set_zero(MatrixView<S> m) {
  for (Index i = 0; i < m.rows; ++i) std::fill_n(m.row(i), m.cols, S{});
}

inline VisibleRange in_whole_steps(VisibleRange range) {
  return {range.begin / key_step * key_step, ceil_divide(range.end, key_step) * key_step};
}

/// The smallest range that holds what all of these queries see.
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

/// `m` with rows of whole vectors: a copy filled up with zeros, unless its width allows to read it in place.
template <class S>
MatrixView<const S> whole_vectors(Arena<HostMemory>& arena, MatrixView<const S> m) {
  if (m.cols % lanes_of<S> == 0) return m;
  const auto copy = arena.matrix<S>(m.rows, ceil_divide(m.cols, lanes_of<S>) * lanes_of<S>);
  for (Index i = 0; i < m.rows; ++i)
    std::fill(std::copy_n(m.row(i), m.cols, copy.row(i)), copy.row(i) + copy.cols, S{});
  return copy;
}

/// c = a b, or added to c, for b with rows of whole vectors, of which c may use a part.
template <class S>
void product_whole(Index depth, Strided<S> a, MatrixView<const S> b, MatrixView<S> c, bool add) {
  for (Index j = 0; j < c.cols; j += panel_columns<S>)
    panel_product<S>(c.rows, depth, a, b.data + j, b.stride, c.middle_cols(j, std::min(panel_columns<S>, c.cols - j)),
                     add);
}

/// Columns of scores over so many keys: whole steps and whole panels.
template <class S>
Index score_columns(Index keys) {
  constexpr Index whole = std::max(key_step, panel_columns<S>);
  return ceil_divide(keys, whole) * whole;
}

/// Rows of keys or values as the panels of product_abt, filled up with zeros.
template <class S>
const S* transposed(Arena<HostMemory>& arena, MatrixView<const S> m) {
  const Index panels = panels_of<S>(score_columns<S>(m.rows));
  S* packed = arena.allocate<S>(panels * panel_columns<S> * m.cols);
  pack_transposed(m, 0, panels, packed);
  return packed;
}

/// A tile of queries of one head with what they see: views into the packed batch. Columns of the scores are keys,
/// counted from the first whole step that is seen.
template <class S>
struct AttentionTile {
  std::span<const VisibleRange> visible;  // of this tile's queries
  Index first, count;                     // queries
  VisibleRange range;                     // keys; begins at a whole step
  MatrixView<const S> q;                  // [count, width]
  MatrixView<const S> k;                  // [keys, width]
  MatrixView<const S> v;

  AttentionTile(MatrixView<const S> queries, const AttentionSequence<S>& sequence, std::span<const VisibleRange> ranges,
                HeadShape heads, Index head, Index offset)
      : first(sequence.first_query + offset), count(std::min(query_tile, sequence.queries - offset)) {
    visible = ranges.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    range = hull(visible, 0, count);
    range.begin = in_whole_steps(range).begin;
    q = queries.middle_rows(first, count).middle_cols(head * heads.width, heads.width);
    const Index column = head / (heads.query_heads / heads.kv_heads) * heads.width;
    const Index keys = range.end - range.begin;
    k = {sequence.keys + range.begin * sequence.stride + column, keys, heads.width, sequence.stride};
    v = {sequence.values + range.begin * sequence.stride + column, keys, heads.width, sequence.stride};
  }

  Index groups() const { return ceil_divide(count, query_group); }
  Index group_size(Index group) const { return std::min(query_group, count - group * query_group); }

  /// Columns that some query of the group sees; the begin is a whole step.
  VisibleRange group_columns(Index group) const {
    return columns(hull(visible, group * query_group, group_size(group)));
  }
  /// Columns that query i sees.
  VisibleRange query_columns(Index i) const {
    const VisibleRange& seen = visible[static_cast<std::size_t>(i)];
    return seen.begin < seen.end ? VisibleRange{seen.begin - range.begin, seen.end - range.begin} : VisibleRange{};
  }

  /// Room for the scores of the tile.
  MatrixView<S> scores(Arena<HostMemory>& arena) const { return arena.matrix<S>(count, score_columns<S>(k.rows)); }

  /// a b^T for a group's rows of a [count, width], over the columns that the group sees.
  void products(Index group, VisibleRange columns, MatrixView<const S> a, const S* packed, MatrixView<S> c) const {
    const Index row = group * query_group, end = in_whole_steps(columns).end;
    for (Index p = columns.begin / panel_columns<S>; p * panel_columns<S> < end; ++p) {
      const Index column = p * panel_columns<S>;
      panel_product<S>(
          group_size(group), a.cols, {a.row(row), a.stride, 1}, packed + column * a.cols, panel_columns<S>,
          c.middle_rows(row, group_size(group)).middle_cols(column, std::min(panel_columns<S>, end - column)), false);
    }
  }

 private:
  VisibleRange columns(VisibleRange seen) const {
    if (seen.begin >= seen.end) return {};
    return {seen.begin / key_step * key_step - range.begin, seen.end - range.begin};
  }
};

/// Columns [column, column + key_step) of a row, with `otherwise` where they are not in `range`.
template <class S>
[[gnu::always_inline]] inline Chunk<S> inside(Chunk<S> step, Index column, VisibleRange range, S otherwise) {
  Chunk<S> numbers;
  for (Index i = 0; i < key_step; ++i) numbers.lanes[i] = static_cast<S>(i);
  const Chunk<S> outside(otherwise);
  step.lanes = numbers.lanes >= static_cast<S>(range.begin - column) ? step.lanes : outside.lanes;
  step.lanes = numbers.lanes < static_cast<S>(range.end - column) ? step.lanes : outside.lanes;
  return step;
}

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
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    const S* keys = transposed(arena, tile.k);
    const auto values = whole_vectors(arena, tile.v);
    const auto scores = tile.scores(arena);
    for (Index group = 0; group < tile.groups(); ++group) {
      const VisibleRange seen = tile.group_columns(group);
      tile.products(group, seen, tile.q, keys, scores);
      const Index row = group * query_group, rows = tile.group_size(group);
      static_assert(query_group <= chunk);
      S shift[chunk] = {}, total[chunk];  // of each query
      std::fill_n(total, chunk, S{1});
      for (Index i = 0; i < rows; ++i) {  // the scores of a query become exp(score - largest), 0 where it sees nothing
        const VisibleRange query = tile.query_columns(row + i);
        if (query.begin >= query.end) {
          std::fill(scores.row(row + i) + seen.begin, scores.row(row + i) + seen.end, S{});
          continue;
        }
        constexpr S nothing = -std::numeric_limits<S>::infinity();
        Chunk<S> largest(nothing), sums(S{});
        S* const scored = scores.row(row + i);
        for (Index j = seen.begin; j < seen.end; j += key_step)
          largest = max(largest, inside(Chunk<S>(scored + j), j, query, nothing));
        shift[i] = largest.largest() * factor;
        for (Index j = seen.begin; j < seen.end; j += key_step) {
          const Chunk<S> e = inside(exp(Chunk<S>(scored + j) * factor - shift[i]), j, query, S{});
          e.store(scored + j);
          sums = sums + e;
        }
        total[i] = sums.sum();
      }
      const Chunk<S> log_sum = Chunk<S>(shift) + log(Chunk<S>(total)), inverse = S{1} / Chunk<S>(total);
      for (Index i = 0; i < rows; ++i) {
        const VisibleRange query = tile.query_columns(row + i);
        log_sum_exp(tile.first + row + i, head) =
            query.begin < query.end ? log_sum[i] : std::numeric_limits<S>::infinity();
      }
      const auto target = y.middle_rows(tile.first + row, rows).middle_cols(head * heads.width, heads.width);
      product_whole<S>(seen.end - seen.begin, {scores.row(row) + seen.begin, scores.cols, 1},
                       {values.row(seen.begin), values.rows, values.cols, values.stride}, target, false);
      for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < heads.width; ++j) target(i, j) *= inverse[i];
    }
  });
}

template <class S>
void attention_backward(ThreadPool& pool, Scratch& scratch, MatrixView<const S> q,
                        std::span<const AttentionSequence<S>> sequences, std::span<const VisibleRange> visible,
                        HeadShape heads, MatrixView<const S> /*y*/, MatrixView<const S> log_sum_exp,
                        MatrixView<const S> dy, MatrixView<S> dq) {
  const S factor = S{1} / std::sqrt(static_cast<S>(heads.width));
  const Index group_heads = heads.query_heads / heads.kv_heads;
  pool.for_each_tile(static_cast<Index>(sequences.size()) * heads.kv_heads, [&](Index task, int thread) {
    const auto& sequence = sequences[static_cast<std::size_t>(task / heads.kv_heads)];
    const Index kv_head = task % heads.kv_heads, column = kv_head * heads.width;
    const MatrixView<S> dk{sequence.key_gradients + column, sequence.key_count, heads.width, sequence.stride};
    const MatrixView<S> dv{sequence.value_gradients + column, sequence.key_count, heads.width, sequence.stride};
    set_zero(dk);
    set_zero(dv);
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    for (Index head = kv_head * group_heads; head < (kv_head + 1) * group_heads; ++head) {
      for (Index offset = 0; offset < sequence.queries; offset += query_tile) {
        const AttentionTile<S> tile(q, sequence, visible, heads, head, offset);
        const auto part = [&](auto m) {
          return m.middle_rows(tile.first, tile.count).middle_cols(head * heads.width, heads.width);
        };
        const auto dy_part = part(dy);
        const auto dq_part = part(dq);
        arena.reset();
        const S* keys = transposed(arena, tile.k);
        const S* values = transposed(arena, tile.v);
        const auto keys_whole = whole_vectors(arena, tile.k);
        const auto p = tile.scores(arena), dp = tile.scores(arena);
        VisibleRange columns[query_tile / query_group];
        for (Index group = 0; group < tile.groups(); ++group) {
          const VisibleRange seen = columns[group] = tile.group_columns(group);
          tile.products(group, seen, tile.q, keys, p);
          tile.products(group, seen, dy_part, values, dp);
          const Index row = group * query_group, rows = tile.group_size(group);
          for (Index i = row; i < row + rows; ++i) {
            const VisibleRange query = tile.query_columns(i);
            const S shift = query.begin < query.end ? log_sum_exp(tile.first + i, head) : S{};
            Chunk<S> along(S{});
            for (Index j = seen.begin; j < seen.end; j += key_step) {
              const Chunk<S> e = inside(exp(Chunk<S>(p.row(i) + j) * factor - shift), j, query, S{});
              e.store(p.row(i) + j);
              along = along + e * Chunk<S>(dp.row(i) + j);
            }
            const S delta = along.sum();
            for (Index j = seen.begin; j < seen.end; j += key_step)
              (Chunk<S>(p.row(i) + j) * (Chunk<S>(dp.row(i) + j) - delta) * factor).store(dp.row(i) + j);
          }
          product_whole<S>(seen.end - seen.begin, {dp.row(row) + seen.begin, dp.cols, 1},
                           {keys_whole.row(seen.begin), keys_whole.rows, keys_whole.cols, keys_whole.stride},
                           dq_part.middle_rows(row, rows), false);
        }
        const auto q_whole = whole_vectors(arena, tile.q), dy_whole = whole_vectors(arena, dy_part);
        for (Index j = 0; j < tile.k.rows; j += key_step) {  // keys that are seen by neighbouring groups of queries
          Index begin = 0, end = tile.groups();
          const auto misses = [&](Index g) { return columns[g].end <= j || columns[g].begin >= j + key_step; };
          while (begin < end && misses(begin)) ++begin;
          while (begin < end && misses(end - 1)) --end;
          const Index row = begin * query_group, depth = std::min(end * query_group, tile.count) - row;
          if (depth <= 0) continue;
          for (Index g = begin; g < end; ++g)
            if (misses(g))
              for (auto* m : {&p, &dp})
                for (Index i = 0; i < tile.group_size(g); ++i)
                  std::fill_n(m->row(g * query_group + i) + j, key_step, S{});
          const Index count = std::min(key_step, tile.k.rows - j), key = tile.range.begin + j;
          product_whole<S>(depth, {p.row(row) + j, 1, p.cols},
                           {dy_whole.row(row), depth, dy_whole.cols, dy_whole.stride}, dv.middle_rows(key, count),
                           true);
          product_whole<S>(depth, {dp.row(row) + j, 1, dp.cols},
                           {q_whole.row(row), depth, q_whole.cols, q_whole.stride}, dk.middle_rows(key, count), true);
        }
      }
    }
  });
}

}  // namespace calm::inline CALM_ABI::cpu
