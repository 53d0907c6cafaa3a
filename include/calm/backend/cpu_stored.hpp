// Products of CpuBackend with frozen weights as they are stored: no f32 form of them is made or kept. Results have the
// bits of the backend's own products, which pack frozen weights in f32. For weights stored in fewer bits these are
// quicker even where thousands of rows are multiplied, since less is read, and take a fraction of the memory.
//
// Context<CpuBackend>(threads, stored_products) reads the rows of the file and keeps nothing, so that it is ready at
// once. With interleaved_products a weight is copied when it is first needed, into as many bytes, the rows of a panel
// transposed and integers in the order in which they are read (cpu_stored_quantised.hpp), values of bf16 into fewer
// (cpu_compact.hpp): best for decoding, where the copy pays for itself within some tokens. A quantised weight with
// scales so far apart, or no numbers, that the copy would give other values is read as it is stored.
//
// A panel of rows is decoded, for one row of x straight into the sums, for more into the scratch of the thread, which
// register_tile then multiplies. Either way the products of an element are added in the order of k, so that its bits
// depend on its own row and column alone (cpu_product.hpp).
#pragma once

#include <calm/backend/cpu_compact.hpp>
#include <calm/backend/cpu_stored_quantised.hpp>

#include <atomic>
#include <optional>
#include <variant>

namespace calm::inline CALM_ABI {
namespace cpu {

/// Calls fn(k, count, rows) for pieces of `count` columns from k on. Ahead of a piece the memory is asked for that
/// of the panel behind: into the second cache, which waits for more lines at a time than the first and which a panel
/// fits into.
template <class Columns>
[[gnu::always_inline]] inline void for_each_piece(StoredRows rows, Index depth, const auto& fn) {
  constexpr Index cache_line = 64;
  const std::byte* next = rows.first + panel_rows * rows.row_bytes;
  Index k = 0;
  for (; k + Columns::depth <= depth; k += Columns::depth, rows = rows.from(Columns::bytes)) {
    for (Index i = 0; i < panel_rows * Columns::bytes; i += cache_line) __builtin_prefetch(next + i, 0, 2);
    next += panel_rows * Columns::bytes;
    fn(k, std::integral_constant<Index, Columns::depth>{}, rows);
  }
  if constexpr (Columns::depth < 32) {  // what is no block may end anywhere
    if (k == depth) return;
    std::byte rest[panel_rows * Columns::bytes] = {};
    const Index left = depth - k, bytes = left * Columns::bytes / Columns::depth;
    for (Index i = 0; i < panel_rows; ++i)
      std::copy_n(rows.first + i * rows.row_bytes, bytes, rest + i * Columns::bytes);
    fn(k, left, StoredRows{rest, Columns::bytes});
  }
}
template <class Columns, Index Panels>
[[gnu::always_inline]] inline void for_each_piece(InterleavedRows<Panels> rows, Index depth, const auto& fn) {
  AskingAhead<Panels> from(rows);
  Index k = 0;
  for (; k + Columns::depth <= depth; k += Columns::depth, from.move_on(Columns::bytes))
    fn(k, std::integral_constant<Index, Columns::depth>{}, from);
  if (k < depth) fn(k, depth - k, from);
}

/// Calls use(k, the values of each part) for all k of whole panels of rows.
template <class Columns>
[[gnu::always_inline]] inline void for_each_column(auto rows, Index depth, const auto& use) {
  for_each_piece<Columns>(
      rows, depth, [&](Index k, auto count, auto block) __attribute__((always_inline)) {
        Columns::decode(
            block, [&](int j, const auto& values) __attribute__((always_inline)) {
              if (j < count) use(k + j, values);
            });
      });
}

/// y = x W^T for one row x and the rows of one or two panels of W, or added to y.
template <class Columns, class Rows>
[[gnu::noinline]] void multiply_row(const float* x, Rows rows, Index depth, float* y, Index columns, bool add) {
  constexpr Index width = Rows::parts * row_lanes;
  float edge[width] = {};
  float* target = columns == width ? y : edge;
  if (target == edge) std::copy_n(y, columns, edge);
  auto* const parts = reinterpret_cast<Floats*>(target);
  auto sum = each_part<Rows::parts>([&](int p) { return add ? parts[p] : Floats{}; });
  for_each_column<Columns>(
      rows, depth, [&](Index k, const auto& values) __attribute__((always_inline)) {
        sum = each_part<Rows::parts>(
            [&](int p) { return multiply_add<float>(every_lane(x[k]), values.part[p], sum.part[p]); });
      });
  each_part<Rows::parts>([&](int p) { return parts[p] = sum.part[p]; });
  if (target == edge) std::copy_n(edge, columns, y);
}

/// The panel [depth, panel_columns] of cpu_product.hpp.
template <class Columns>
[[gnu::noinline]] void decode_panel(auto rows, Index depth, float* panel) {
  for_each_column<Columns>(
      rows, depth, [&](Index k, const auto& values) __attribute__((always_inline)) {
        std::memcpy(panel + k * panel_columns<float>, &values, sizeof(values));
      });
}

/// The rows of panel p of a weight, in the scratch of the thread where it has fewer than a panel.
inline StoredRows rows_of_panel(Arena<HostMemory>& arena, const StoredMatrix& w, Index p) {
  const Index first = p * panel_rows, count = std::min(panel_rows, w.rows() - first), bytes = w.row_bytes();
  const std::byte* stored = w.data() + first * bytes;
  if (count == panel_rows) return {stored, bytes};
  auto* copy = arena.allocate<std::byte>(panel_rows * bytes);
  std::fill(std::copy_n(stored, count * bytes, copy), copy + panel_rows * bytes, std::byte{});
  return {copy, bytes};
}

/// The panels of a weight as they lie in the file.
struct StoredPanels {
  const StoredMatrix& weight;

  template <class Columns>
  static constexpr Index most = 1;  // at a time

  template <Index>
  StoredRows panels(Arena<HostMemory>& arena, Index first) const {
    return rows_of_panel(arena, weight, first);
  }
};

/// A weight whose panels are interleaved, in the stored type; rows and blocks that it lacks are filled up.
struct InterleavedForm {
  PackedMatrix<std::byte> values;  // a panel a row

  template <class Columns>
  static constexpr Index most = 2;  // at a time, so that more sums go on

  std::size_t bytes() const { return values.bytes(); }
  template <Index Panels>
  InterleavedRows<Panels> panels(Arena<HostMemory>& /*arena*/, Index first) const {
    return {&values(first, 0), values.cols()};
  }
};

/// The interleaved form of a weight; none where it would not have the same values.
template <class Stored>
std::optional<InterleavedForm> interleaved(ThreadPool& pool, Scratch& scratch, const StoredMatrix& w) {
  using Columns = StoredColumns<Stored>;
  const Index panels = panels_of<float>(w.rows()), blocks = ceil_divide(w.cols(), Columns::depth);
  InterleavedForm form{PackedMatrix<std::byte>(panels, blocks * Columns::bytes * panel_rows)};
  std::atomic<bool> same = true;
  pool.for_each_tile(panels, [&](Index p, int thread) {
    if (!same) return;
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    for_each_piece<Columns>(rows_of_panel(arena, w, p), w.cols(), [&](Index k, auto, StoredRows rows) {
      if constexpr (BlockQuantised<Stored>)
        if (!Columns::can_interleave(rows)) same = false;
      std::byte* const target = &form.values(p, k / Columns::depth * Columns::bytes * panel_rows);
      Columns::decode(Interleaver{rows, target}, [](int, const auto&) {});
    });
  });
  if (!same) return std::nullopt;
  return form;
}

/// Values of a row that are decoded at once: whole blocks of every type, and a panel that stays in the cache.
inline constexpr Index slice = 256;

/// Panels [first, end) of y = x w^T for one row x, for a `weight` with panels<Panels>(arena, first).
template <class Columns, class Weight>
void multiply_panels(Arena<HostMemory>& arena, MatrixView<const float> x, const Weight& weight, MatrixView<float> y,
                     Index first, Index end, bool add) {
  const auto at_once = [&]<Index Panels>(std::integral_constant<Index, Panels>) {
    for (; first + Panels <= end; first += Panels) {
      arena.reset();
      const Index column = first * panel_rows;
      multiply_row<Columns>(x.data, weight.template panels<Panels>(arena, first), x.cols, y.data + column,
                            std::min(Panels * panel_rows, y.cols - column), add);
    }
  };
  constexpr Index most = Weight::template most<Columns>;
  at_once(std::integral_constant<Index, most>{});
  if constexpr (most > 1) at_once(std::integral_constant<Index, 1>{});
}

/// y = x w^T for any rows of x                                       [T, in], [out, in] -> [T, out]
template <class Columns, class Weight>
void multiply_columns(ThreadPool& pool, Scratch& scratch, MatrixView<const float> x, const Weight& weight,
                      MatrixView<float> y, bool add) {
  constexpr Index many_rows = 8 * rows_of_tile;  // decoding is paid for by many rows
  const Index panels = panels_of<float>(y.cols), group = std::clamp<Index>(panels / 64, y.rows >= 32 ? 4 : 1, 8);
  for_each_block(pool, y.rows, many_rows, panels, group, [&](const Block& b, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    const auto target_of = [&](Index p) {
      const Index column = p * panel_rows;
      return y.middle_rows(b.row, b.rows).middle_cols(column, std::min(panel_rows, y.cols - column));
    };
    // A slice of all panels is decoded and multiplied with some rows at a time, so that both stay in the cache.
    arena.reset();
    const auto values = arena.matrix<float>(b.columns, slice * panel_columns<float>);
    for (Index k = 0; k == 0 || k < x.cols; k += slice) {
      const Index depth = std::min(slice, x.cols - k);
      for (Index p = b.column; p < b.column + b.columns; ++p) {
        const Arena<HostMemory>::Mark mark(arena);
        decode_panel<Columns>(weight.template panels<1>(arena, p).from(k / Columns::depth * Columns::bytes), depth,
                              values.row(p - b.column));
      }
      for (Index row = 0; row < b.rows; row += rows_of_tile) {
        const Index rows = std::min(rows_of_tile, b.rows - row);
        for (Index p = b.column; p < b.column + b.columns; ++p)
          panel_product<float>(rows, depth, {x.row(b.row + row) + k, x.stride, 1}, values.row(p - b.column),
                               panel_columns<float>, target_of(p).middle_rows(row, rows), add || k > 0);
      }
    }
  });
}

/// dx = dy w                                                         [T, out], [out, in] -> [T, in]
/// The rows of w are decoded in pieces that stay in the cache.
inline void multiply_input_gradient(ThreadPool& pool, Scratch& scratch, MatrixView<const float> dy,
                                    const StoredMatrix& w, MatrixView<float> dx, bool add) {
  constexpr Index many_rows = 8 * rows_of_tile, piece = 128, width = panel_columns<float>;
  const StoredBlock block = block_of(w.dtype());
  const Index columns = ceil_divide(4 * width, block.values) * block.values;
  for_each_block(pool, dx.rows, many_rows, dx.cols, columns, [&](const Block& b, int thread) {
    auto& arena = scratch[static_cast<std::size_t>(thread)];
    arena.reset();
    const Index whole = ceil_divide(b.columns, width) * width;
    const auto values = arena.matrix<float>(piece, whole);
    const auto target = dx.middle_rows(b.row, b.rows).middle_cols(b.column, b.columns);
    for (Index o = 0; o < dy.cols; o += piece) {
      const Index depth = std::min(piece, dy.cols - o);
      for (Index k = 0; k < depth; ++k) {
        decode(w.dtype(), w.data() + (o + k) * w.row_bytes() + b.column / block.values * block.bytes, b.columns,
               values.row(k));
        std::fill(values.row(k) + b.columns, values.row(k) + whole, 0.0F);
      }
      for (Index row = 0; row < b.rows; row += rows_of_tile) {
        const Index rows = std::min(rows_of_tile, b.rows - row);
        for (Index j = 0; j < b.columns; j += width)
          panel_product<float>(rows, depth, {dy.row(b.row + row) + o, dy.stride, 1}, values.row(0) + j, values.stride,
                               target.middle_rows(row, rows).middle_cols(j, std::min(width, b.columns - j)),
                               add || o > 0);
      }
    }
    if (dy.cols == 0 && !add)
      for (Index t = 0; t < b.rows; ++t) std::fill_n(target.row(t), b.columns, 0.0F);
  });
}

/// What interleaved products keep of a weight, with the same values; or nothing, if it is read as it is stored.
struct KeptForm {
  std::variant<std::monostate, InterleavedForm, CompactForm> form;
  std::size_t bytes() const {
    return std::visit(
        []<class Form>(const Form& kept) -> std::size_t {
          if constexpr (std::is_same_v<Form, std::monostate>) return 0;
          else return kept.bytes();
        },
        form);
  }
};

template <class Stored>
inline constexpr bool may_be_compact = CompactBf16::available &&
                                       (std::is_same_v<Stored, bf16> || std::is_same_v<Stored, float>);

template <class Stored>
KeptForm kept_form(ThreadPool& pool, Scratch& scratch, const StoredMatrix& w) {
  if constexpr (may_be_compact<Stored>)
    if (std::is_same_v<Stored, bf16> || is_bf16(pool, w))
      if (auto form = compact(pool, scratch, w)) return {std::move(*form)};
  if (auto form = interleaved<Stored>(pool, scratch, w)) return {std::move(*form)};
  return {};
}

enum class StoredForm { rows, interleaved };

template <StoredForm Form>
class StoredProducts final : public OwnProducts {
 public:
  using OwnProducts::multiply;
  using OwnProducts::multiply_input_gradient;
  using OwnProducts::OwnProducts;

  void multiply(MatrixView<const float> x, const StoredMatrix& w, MatrixView<float> y, bool add) override {
    const FrozenProduct<float> product{&w, y};
    if (y.rows == 1) return multiply_one_row(x, {&product, 1}, add);
    with_form(w, [&]<class Columns>(Columns, const auto& weight) {
      multiply_columns<Columns>(pool_, scratch_, x, weight, y, add);
    });
  }
  void multiply_each(MatrixView<const float> x, std::span<const FrozenProduct<float>> products) override {
    if (x.rows == 1) multiply_one_row(x, products, false);
    else Products::multiply_each(x, products);
  }
  void multiply_input_gradient(MatrixView<const float> dy, const StoredMatrix& w, MatrixView<float> dx,
                               bool add) override {
    cpu::multiply_input_gradient(pool_, scratch_, dy, w, dx, add);
  }

 private:
  /// Calls fn(Columns, weight) for the form that is multiplied, which it makes where there is none.
  void with_form(const StoredMatrix& w, const auto& fn) {
    visit_dtype(w.dtype(), [&]<class Stored>(Stored) {
      if constexpr (Form == StoredForm::rows) {
        fn(StoredColumns<Stored>{}, StoredPanels{w});
      } else {
        const auto& kept = w.packed<KeptForm>([&] { return kept_form<Stored>(pool_, scratch_, w); });
        if constexpr (may_be_compact<Stored>)
          if (const auto* compact = std::get_if<CompactForm>(&kept.form)) return fn(CompactBf16{}, *compact);
        if (const auto* in_order = std::get_if<InterleavedForm>(&kept.form)) fn(StoredColumns<Stored>{}, *in_order);
        else fn(StoredColumns<Stored>{}, StoredPanels{w});
      }
    });
  }

  /// The panels of all products in one call of the pool, so that threads wait for each other once.
  void multiply_one_row(MatrixView<const float> x, std::span<const FrozenProduct<float>> products, bool add) {
    constexpr Index step = 2, least = 2;  // the most panels that are multiplied at a time; steps of a range
    const auto panels_in = [](const FrozenProduct<float>& product) { return panels_of<float>(product.y.cols); };
    Index steps = 0;
    for (const auto& product : products) {
      with_form(*product.weight, [](auto, const auto&) {});  // made before the threads ask for it
      steps += ceil_divide(panels_in(product), step);
    }
    pool_.for_each_range(steps, least, [&](Index begin, Index end, int thread) {
      Index before = 0;  // steps of the products before
      for (const auto& product : products) {
        const Index panels = panels_in(product), own = ceil_divide(panels, step);
        const Index first = std::max(begin - before, Index{0}), last = std::min(end - before, own);
        before += own;
        if (first >= last) continue;
        with_form(*product.weight, [&]<class Columns>(Columns, const auto& weight) {
          multiply_panels<Columns>(scratch_[static_cast<std::size_t>(thread)], x, weight, product.y, step * first,
                                   std::min(step * last, panels), add);
        });
      }
    });
  }
};

}  // namespace cpu

inline std::unique_ptr<cpu::Products> stored_products(ThreadPool& pool) {
  return std::make_unique<cpu::StoredProducts<cpu::StoredForm::rows>>(pool);
}
inline std::unique_ptr<cpu::Products> interleaved_products(ThreadPool& pool) {
  return std::make_unique<cpu::StoredProducts<cpu::StoredForm::interleaved>>(pool);
}

}  // namespace calm::inline CALM_ABI
