// Attention of CpuBackend, over ragged sequences with a visible range for each query.
//
// The lanes of a vector are queries: a group of `chunk` neighbouring queries of one head meets the keys that some of
// them see, key after key, so that largest scores and sums need nothing across lanes. Scores exist for one group at a
// time; the gradient computes them again from log_sum_exp, as FlashAttention does (Dao et al., 2022). A few queries
// alone, and one query for some heads that share keys, as in decoding, take keys as lanes instead, for which the keys
// of a cache lie as panels: value j of key i at row j of panel i / panel_columns. Either way each element is the same
// sum in the same order: that of the sequence's keys, or of 16 partial sums over every sixteenth key.
#pragma once

#include <calm/backend/cpu_product.hpp>
#include <calm/backend/cpu_vector.hpp>

#include <cmath>
#include <limits>

namespace calm::inline CALM_ABI::cpu {

inline constexpr Index query_tile = 64;     // queries of a task
inline constexpr Index few_queries = 4;     // so many would leave most lanes of a group empty
inline constexpr Index heads_together = 2;  // of one query: one head has too few sums that go on independently
inline constexpr Index key_step = chunk;
template <class S>
inline constexpr Index whole_step = std::max(key_step, panel_columns<S>);
static_assert(cache_step % whole_step<float> == 0 && cache_step % whole_step<double> == 0);

template <class S>
void set_zero(MatrixView<S> m) {
  for (Index i = 0; i < m.rows; ++i) std::fill_n(m.row(i), m.cols, S{});
}

/// `m` with rows of whole vectors: a copy filled up with zeros, unless its width allows to read it in place.
template <class S>
MatrixView<const S> whole_vectors(Arena<HostMemory>& arena, MatrixView<const S> m) {
  if (m.cols % lanes_of<S> == 0) return m;
  const auto copy = arena.matrix<S>(m.rows, ceil_divide(m.cols, lanes_of<S>) * lanes_of<S>);
  copy_rows<S>(m, copy);
  return copy;
}

/// c = a b, or added to c, for b with rows of whole vectors, of which c may use a part.
template <class S>
void product_whole(Index depth, Strided<S> a, MatrixView<const S> b, MatrixView<S> c, bool add) {
  for (Index j = 0; j < c.cols; j += panel_columns<S>)
    panel_product<S>(c.rows, depth, a, b.data + j, b.stride, c.middle_cols(j, std::min(panel_columns<S>, c.cols - j)),
                     add);
}

/// Heads [first, first + count) over the same keys; more than one where there is one query alone.
struct Heads {
  Index first, count = 1;
};

/// Queries [offset, offset + most) of a sequence for one head, or one query for several heads, with the keys that some
/// of them see: views into the packed batch. A row is a query of a head.
template <class S>
struct AttentionPart {
  std::span<const VisibleRange> visible;  // of the queries
  Heads heads;
  Index first, count;     // the first query, and the number of rows
  VisibleRange range;     // keys; begins at a whole step
  MatrixView<const S> q;  // [count, width]
  MatrixView<const S> k;  // [keys, width]; of a cache panels, that of key i begins at row(i)
  MatrixView<const S> v;
  bool cached;

  AttentionPart(MatrixView<const S> queries, const AttentionSequence<S>& sequence, std::span<const VisibleRange> ranges,
                HeadShape shape, Heads which, Index offset, Index most)
      : heads(which), first(sequence.first_query + offset), cached(sequence.cached) {
    const Index some = std::min(most, sequence.queries - offset);
    count = some * heads.count;
    visible = ranges.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(some));
    range = hull(visible);
    const Index step = cached ? whole_step<S> : key_step;
    range.begin = range.begin / step * step;
    q = rows_of(queries, shape.width);
    const Index column = heads.first / (shape.query_heads / shape.kv_heads) * shape.width;
    const Index keys = range.end - range.begin, begin = range.begin * sequence.stride;
    k = {sequence.keys + begin + column * (cached ? panel_columns<S> : 1), keys, shape.width, sequence.stride};
    v = {sequence.values + begin + column, keys, shape.width, sequence.stride};
  }

  /// Keys that row i sees, counted from the first row of k.
  VisibleRange seen(Index i) const {
    const VisibleRange& keys = visible[static_cast<std::size_t>(i / heads.count)];
    return keys.begin < keys.end ? VisibleRange{keys.begin - range.begin, keys.end - range.begin} : VisibleRange{};
  }

  /// These rows of a matrix like q, with `width` values for each head of a query.
  template <class T>
  MatrixView<T> rows_of(MatrixView<T> m, Index width) const {
    return {m.row(first) + heads.first * width, count, width, heads.count > 1 ? width : m.stride};
  }

 private:
  /// The smallest range that holds what all queries see.
  static VisibleRange hull(std::span<const VisibleRange> visible) {
    VisibleRange all{std::numeric_limits<Index>::max(), 0};
    for (const VisibleRange& v : visible) {
      if (v.begin >= v.end) continue;
      all.begin = std::min(all.begin, v.begin);
      all.end = std::max(all.end, v.end);
    }
    return all.end == 0 ? VisibleRange{} : all;
  }
};

/// `values` in the lanes whose `at` lies in [begin, end), `otherwise` elsewhere.
template <class S>
[[gnu::always_inline]] inline Chunk<S> inside(const Chunk<S>& values, const Chunk<S>& at, const Chunk<S>& begin,
                                              const Chunk<S>& end, const Chunk<S>& otherwise) {
  return where_less(at, begin, otherwise, where_less(at, end, values, otherwise));
}

/// The ranges of a group of queries, one a lane; lanes without a query see nothing.
template <class S>
struct LaneRanges {
  Chunk<S> begin{S{}}, end{S{}};

  explicit LaneRanges(const AttentionPart<S>& part) {
    for (Index i = 0; i < part.count; ++i) {
      begin.set(i, static_cast<S>(part.seen(i).begin));
      end.set(i, static_cast<S>(part.seen(i).end));
    }
  }

  /// `values` where a query sees the key, `otherwise` elsewhere.
  [[gnu::always_inline]] Chunk<S> where_seen(Index key, const Chunk<S>& values, const Chunk<S>& otherwise) const {
    return inside(values, Chunk<S>(static_cast<S>(key)), begin, end, otherwise);
  }
  /// `values` where a query sees any key.
  Chunk<S> where_any(const Chunk<S>& values, const Chunk<S>& otherwise) const {
    return inside(values, begin, begin, end, otherwise);
  }
};

/// Sums over keys: partial sums over every sixteenth key, then their halves added up.
template <class S>
class KeySums {
 public:
  KeySums() { std::fill_n(partial_, chunk, Chunk<S>(S{})); }
  [[gnu::always_inline]] void add(Index key, const Chunk<S>& values) {
    partial_[key % chunk] = partial_[key % chunk] + values;
  }
  Chunk<S> total() { return sum_of_halves(partial_); }

 private:
  Chunk<S> partial_[chunk];
};

/// Products of keys (or values) with the rows of a group, one a lane: [keys, chunk]. The keys may be a cache's panels.
template <class S>
void key_products(Arena<HostMemory>& arena, MatrixView<const S> keys, MatrixView<const S> rows, MatrixView<S> scores,
                  bool cached = false) {
  const Arena<HostMemory>::Mark mark(arena);
  constexpr Index panel = panel_columns<S>;
  const auto lanes = arena.matrix<S>(rows.cols, chunk);
  transpose_rows<chunk>(rows, 0, lanes.data);
  if (!cached) return product_whole<S>(keys.cols, {keys.data, keys.stride, 1}, lanes, scores, false);
  for (Index i = 0; i < keys.rows; i += panel)
    product_whole<S>(keys.cols, {keys.row(i), 1, panel}, lanes, scores.middle_rows(i, std::min(panel, keys.rows - i)),
                     false);
}

/// Writes the keys of positions first, first + 1, ... into the panels of a cache; what a new panel lacks is zero.
template <class S>
void append_keys(ThreadPool& pool, MatrixView<const S> keys, Index first, MatrixView<S> cache) {
  constexpr Index panel = panel_columns<S>;
  const Index first_panel = first / panel, end = first + keys.rows;
  pool.for_each_tile(ceil_divide(end, panel) - first_panel, [&](Index tile, int) {
    const Index begin = (first_panel + tile) * panel;
    S* const target = cache.row(begin);
    if (begin >= first) std::fill_n(target, panel * cache.cols, S{});
    for (Index i = std::max(begin, first); i < std::min(begin + panel, end); ++i)
      for (Index j = 0; j < keys.cols; ++j) target[j * panel + i - begin] = keys(i - first, j);
  });
}

/// Divides the rows of y by each query's sum, and writes log_sum_exp: infinity where a query sees nothing.
template <class S>
void finish(const AttentionPart<S>& part, const Chunk<S>& shift, const Chunk<S>& total, MatrixView<S> y,
            MatrixView<S> log_sum_exp) {
  const Chunk<S> log_sum = shift + log(total), inverse = S{1} / total;
  for (Index i = 0; i < part.count; ++i) {
    const VisibleRange seen = part.seen(i);
    log_sum_exp(i, 0) = seen.begin < seen.end ? log_sum[i] : std::numeric_limits<S>::infinity();
    for (Index j = 0; j < y.cols; ++j) y(i, j) *= inverse[i];
  }
}

/// Attention of a group of queries. Writes their rows of y, and log_sum_exp.
template <class S>
void attend_group(Arena<HostMemory>& arena, const AttentionPart<S>& part, MatrixView<S> y, MatrixView<S> log_sum_exp) {
  const Arena<HostMemory>::Mark mark(arena);
  const S factor = S{1} / std::sqrt(static_cast<S>(part.q.cols));
  const auto scores = arena.matrix<S>(part.k.rows, chunk);
  key_products(arena, part.k, part.q, scores, part.cached);
  const LaneRanges<S> ranges(part);
  constexpr Index chains = 4;
  const Chunk<S> nothing(-std::numeric_limits<S>::infinity()), zero(S{});
  Chunk<S> largest[chains];
  std::fill_n(largest, chains, nothing);
  for (Index key = 0; key < scores.rows; key += chains)
    for (Index i = key; i < std::min(key + chains, scores.rows); ++i)
      largest[i - key] = max(largest[i - key], ranges.where_seen(i, Chunk<S>(scores.row(i)), nothing));
  const Chunk<S> shift = ranges.where_any(max(max(largest[0], largest[1]), max(largest[2], largest[3])), zero) * factor;
  KeySums<S> sums;
  for (Index key = 0; key < scores.rows; ++key) {
    const Chunk<S> e = ranges.where_seen(key, exp(Chunk<S>(scores.row(key)) * factor - shift), zero);
    e.store(scores.row(key));
    sums.add(key, e);
  }
  const Chunk<S> total = ranges.where_any(sums.total(), Chunk<S>(S{1}));
  product_whole<S>(scores.rows, {scores.data, 1, chunk}, whole_vectors(arena, part.v), y, false);
  finish(part, shift, total, y, log_sum_exp);
}

/// The same for at most `few_queries` rows, one after the other.
template <class S>
void attend_few(Arena<HostMemory>& arena, const AttentionPart<S>& part, MatrixView<S> y, MatrixView<S> log_sum_exp) {
  const Arena<HostMemory>::Mark mark(arena);
  const S factor = S{1} / std::sqrt(static_cast<S>(part.q.cols));
  constexpr Index whole = whole_step<S>, panel = panel_columns<S>;
  const Index keys = ceil_divide(part.k.rows, key_step) * key_step, columns = ceil_divide(keys, whole) * whole;
  const auto scores = arena.matrix<S>(part.count, columns);
  MatrixView<const S> panels = part.k;
  if (!part.cached) {
    const auto packed = arena.matrix<S>(columns, part.k.cols);
    pack_transposed(part.k, 0, columns / panel, packed.data);
    panels = packed;
  }
  for (Index j = 0; j < keys; j += panel)
    panel_product<S>(part.count, part.q.cols, {part.q.data, part.q.stride, 1}, panels.row(j), panel,
                     scores.middle_cols(j, std::min(panel, keys - j)), false);
  Chunk<S> numbers;
  for (Index i = 0; i < key_step; ++i) numbers.set(i, static_cast<S>(i));
  static_assert(few_queries <= chunk);
  S shift[chunk] = {}, total[chunk];  // of each query
  std::fill_n(total, chunk, S{1});
  for (Index i = 0; i < part.count; ++i) {  // a query's scores become exp(score - largest), 0 where it sees nothing
    const VisibleRange seen = part.seen(i);
    S* const row = scores.row(i);
    if (seen.begin >= seen.end) {
      std::fill_n(row, keys, S{});
      continue;
    }
    const Chunk<S> begin(static_cast<S>(seen.begin)), end(static_cast<S>(seen.end));
    const Chunk<S> nothing(-std::numeric_limits<S>::infinity()), zero(S{});
    const auto where_seen = [&](Index j, const Chunk<S>& values, const Chunk<S>& otherwise) {
      return inside(values, Chunk<S>(static_cast<S>(j)) + numbers, begin, end, otherwise);
    };
    Chunk<S> largest = nothing, sums = zero;
    for (Index j = 0; j < keys; j += key_step) largest = max(largest, where_seen(j, Chunk<S>(row + j), nothing));
    shift[i] = largest.largest() * factor;
    for (Index j = 0; j < keys; j += key_step) {
      const Chunk<S> e = where_seen(j, exp(Chunk<S>(row + j) * factor - shift[i]), zero);
      e.store(row + j);
      sums = sums + e;
    }
    total[i] = sums.sum();
  }
  product_whole<S>(part.k.rows, {scores.data, scores.stride, 1}, whole_vectors(arena, part.v), y, false);
  finish(part, Chunk<S>(shift), Chunk<S>(total), y, log_sum_exp);
}

template <class S>
void attention(ThreadPool& pool, Scratch& scratch, MatrixView<const S> q,
               std::span<const AttentionSequence<S>> sequences, std::span<const VisibleRange> visible, HeadShape heads,
               MatrixView<S> y, MatrixView<S> log_sum_exp) {
  Index longest = 0;
  for (const auto& sequence : sequences) longest = std::max(longest, sequence.queries);
  const Index tiles = ceil_divide(longest, query_tile), count = static_cast<Index>(sequences.size());
  const Index group = heads.query_heads / heads.kv_heads, together = longest == 1 ? heads_together : 1;
  const Index parts = ceil_divide(group, together);  // of a group of heads
  pool.for_each_tile(count * tiles * heads.kv_heads * parts, [&](Index task, int thread) {
    const auto& sequence = sequences[static_cast<std::size_t>(task / (tiles * heads.kv_heads * parts))];
    const Index part_of_all = task / tiles % (heads.kv_heads * parts), begin = task % tiles * query_tile;
    const Index head = part_of_all % parts * together;  // of its group
    const Heads which{part_of_all / parts * group + head, std::min(together, group - head)};
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    for (Index offset = begin; offset < std::min(begin + query_tile, sequence.queries); offset += chunk) {
      const AttentionPart<S> part(q, sequence, visible, heads, which, offset, chunk);
      const auto attend = part.count <= few_queries ? attend_few<S> : attend_group<S>;
      attend(arena, part, part.rows_of(y, heads.width), part.rows_of(log_sum_exp, 1));
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
      for (Index offset = 0; offset < sequence.queries; offset += chunk) {
        arena.reset();
        const AttentionPart<S> part(q, sequence, visible, heads, {head}, offset, chunk);
        const auto dy_part = part.rows_of(dy, heads.width);
        const Index keys = part.k.rows;
        const auto p = arena.matrix<S>(keys, chunk), dp = arena.matrix<S>(keys, chunk);  // of scores: [keys, queries]
        key_products(arena, part.k, part.q, p);
        key_products(arena, part.v, dy_part, dp);
        const LaneRanges<S> ranges(part);
        const Chunk<S> zero(S{});
        Chunk<S> shift(S{});
        for (Index i = 0; i < part.count; ++i) shift.set(i, log_sum_exp(part.first + i, head));
        shift = ranges.where_any(shift, zero);
        KeySums<S> along;
        for (Index key = 0; key < keys; ++key) {
          const Chunk<S> e = ranges.where_seen(key, exp(Chunk<S>(p.row(key)) * factor - shift), zero);
          e.store(p.row(key));
          along.add(key, e * Chunk<S>(dp.row(key)));
        }
        const Chunk<S> delta = along.total();
        for (Index key = 0; key < keys; ++key)
          (Chunk<S>(p.row(key)) * (Chunk<S>(dp.row(key)) - delta) * factor).store(dp.row(key));
        product_whole<S>(keys, {dp.data, 1, chunk}, whole_vectors(arena, part.k), part.rows_of(dq, heads.width), false);
        product_whole<S>(part.count, {p.data, chunk, 1}, whole_vectors(arena, dy_part),
                         dv.middle_rows(part.range.begin, keys), true);
        product_whole<S>(part.count, {dp.data, chunk, 1}, whole_vectors(arena, part.q),
                         dk.middle_rows(part.range.begin, keys), true);
      }
    }
  });
}

}  // namespace calm::inline CALM_ABI::cpu
