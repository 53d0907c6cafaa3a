// Products of CpuBackend in bf16, for Context<CpuBackend>(threads, bf16_products): both f32 operands are rounded to
// bf16 (to nearest, ties to even), the products are exact, the sums are f32 in the order of k. So rounded are the
// weights, frozen or trained, the activations and the gradients that enter a product of a linear map or of the output
// head, forward and backward; what it writes stays f32. Embeddings, norms, attention, losses, trained weights, their
// gradient sums and the optimizer are not rounded.
//
// Operands are pairs of two consecutive k, as the instruction vdpbf16ps of AVX512-BF16 takes them; other machines
// multiply the same pairs in f32. An element's bits depend on its own row and column alone, as in cpu_product.hpp; the
// gradient of a weight sums over tokens, so which ones are pairs, and with them its last bits, depends on the rows that
// a pass is asked for (TokenBatch::rows).
#pragma once

#include <calm/backend/cpu_product.hpp>
#include <calm/tensor/half.hpp>

#include <bit>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace calm::inline CALM_ABI {
namespace cpu {

/// The bf16 values of an even k (lower half) and of the next.
using Pair = std::uint32_t;

inline Index pairs_of(Index depth) { return ceil_divide(depth, 2); }

template <>
struct Multiplication<Pair> {
  static Vector<float> add(Vector<float> sum, Pair a, Vector<Pair> b) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Vector<float>>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
        reinterpret_cast<__m512bh>(b)));
#else
    constexpr Pair upper = 0xFFFF0000;
    const auto add_half = [](Vector<float> to, Pair value, Vector<Pair> values) {
      return multiply_add<float>(every_lane(std::bit_cast<float>(value)), reinterpret_cast<Vector<float>>(values), to);
    };
    return add_half(add_half(sum, a & upper, b & upper), a << 16, b << 16);
#endif
  }
};

inline Pair pair_of(float first, float second) {
  return to_bf16(first).bits | static_cast<Pair>(to_bf16(second).bits) << 16;
}

/// A row of `count` values as pairs; an odd last one is paired with zero.
inline void round_row(const float* source, Index count, Pair* target) {
  Index k = 0;
#if defined(__AVX512BF16__)
  for (; k + 32 <= count; k += 32) {
    const auto low = _mm512_loadu_ps(source + k), high = _mm512_loadu_ps(source + k + 16);
    const auto rounded = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(target + k / 2, &rounded, sizeof(rounded));
  }
#endif
  for (; k + 2 <= count; k += 2) target[k / 2] = pair_of(source[k], source[k + 1]);
  if (k < count) target[k / 2] = pair_of(source[k], 0);
}

/// A frozen weight in bf16: the panels of its transpose, in pairs. Half the bytes of the panels in f32.
inline PanelForm<Pair> pair_form(ThreadPool& pool, Scratch& scratch, const StoredMatrix& w) {
  const auto read = [&](auto& arena, Index first, MatrixView<Pair> rounded) {
    const auto rows = arena.template matrix<float>(rounded.rows, w.cols());
    w.read_rows(first, rows.rows, rows.data);
    for (Index i = 0; i < rows.rows; ++i) round_row(rows.row(i), w.cols(), rounded.row(i));
  };
  return pack_rows<Pair>(pool, scratch, w.rows(), pairs_of(w.cols()), read);
}

/// The products. One object serves one pool; its memory grows to the largest product.
///
/// Operands that are not packed already are rounded in pieces of rows and of k, all threads together, before any tile
/// is computed: a tile would round again what its neighbours have rounded.
class Bf16Products : public Products {
 public:
  explicit Bf16Products(ThreadPool& pool) : pool_(pool), scratch_(scratch_of(pool)) {}

  /// y = x w^T for a frozen w                                        [T, in], [out, in] -> [T, out]
  void multiply(MatrixView<const float> x, const StoredMatrix& stored, MatrixView<float> y, bool add) override {
    const auto& w = packed(stored);
    for_pieces(x, y, add, [&](MatrixView<const float> part, Index k, MatrixView<float> target, bool adds) {
      const auto a = rounded_rows(part);
      product(rows_of(a), a.cols, {w.values.data() + k / 2 * panel_columns<Pair>, w.values.cols()}, target, adds);
    });
  }

  /// The same for a w that changes.
  void multiply(MatrixView<const float> x, MatrixView<const float> w, MatrixView<float> y, bool add) override {
    for_pieces(x, y, add, [&](MatrixView<const float> part, Index k, MatrixView<float> target, bool adds) {
      const auto a = rounded_rows(part), b = rounded_rows(w.middle_cols(k, part.cols));
      const WritablePanels panels = room(a.cols, w.rows);
      pool_.for_each_tile(panels_of<Pair>(w.rows),
                          [&](Index p, int) { pack_transposed<Pair>(b, p, 1, panels.data + p * panels.step); });
      product(rows_of(a), a.cols, panels, target, adds);
    });
  }

  /// dx = dy w for a frozen w                                        [T, out], [out, in] -> [T, in]
  void multiply_input_gradient(MatrixView<const float> dy, const StoredMatrix& stored, MatrixView<float> dx,
                               bool add) override {
    const auto& w = packed(stored);
    for_pieces(dy, dx, add, [&](MatrixView<const float> part, Index k, MatrixView<float> target, bool adds) {
      const auto a = rounded_rows(part);
      const WritablePanels panels =
          room(ceil_divide(part.cols, panel_columns<Pair>) * panel_columns<Pair> / 2, dx.cols);
      pool_.for_each_tile(panels_of<Pair>(dx.cols),
                          [&](Index p, int) { turn(w, k, part.cols, p, panels.data + p * panels.step); });
      product(rows_of(a), a.cols, panels, target, adds);
    });
  }

  /// The same for a w that changes.
  void multiply_input_gradient(MatrixView<const float> dy, MatrixView<const float> w, MatrixView<float> dx,
                               bool add) override {
    for_pieces(dy, dx, add, [&](MatrixView<const float> part, Index k, MatrixView<float> target, bool adds) {
      const auto a = rounded_rows(part);
      product(rows_of(a), a.cols, paired_rows(w.middle_rows(k, part.cols)), target, adds);
    });
  }

  /// dw += dy^T x                                                    [T, out], [T, in] -> [out, in]
  void multiply_weight_gradient(MatrixView<const float> dy, MatrixView<const float> x, MatrixView<float> dw) override {
    for (Index t = 0; t < x.rows; t += most_depth) {
      arena_.reset();
      const Index count = std::min(most_depth, x.rows - t), pairs = pairs_of(count);
      const auto a = arena_.matrix<Pair>(pairs, dw.rows);
      pool_.for_each_tile(ceil_divide(pairs, rows_at_once), [&](Index i, int) {
        for (Index k = i * rows_at_once; k < std::min(pairs, (i + 1) * rows_at_once); ++k)
          pair_up(dy.middle_rows(t, count), 2 * k, 0, dw.rows, a.row(k));
      });
      product({a.data, 1, a.stride}, pairs, paired_rows(x.middle_rows(t, count)), dw, true);
    }
  }

 private:
  /// Panels of pairs, `step` apart.
  struct Panels {
    const Pair* data;
    Index step;
  };
  struct WritablePanels {
    Pair* data;
    Index step;
    operator Panels() const { return {data, step}; }  // NOLINT(google-explicit-constructor)
  };

  const PanelForm<Pair>& packed(const StoredMatrix& w) {
    return w.packed<PanelForm<Pair>>([&] { return pair_form(pool_, scratch_, w); });
  }

  static constexpr Index most_rows = 4096, most_depth = 2048;  // of a piece
  static constexpr Index rows_at_once = 32;                    // that a thread rounds

  /// fn(piece of x, its first column, the rows of y that it gives, whether it adds to them). An element's sum goes on
  /// from piece to piece in the order of k.
  template <class Fn>
  void for_pieces(MatrixView<const float> x, MatrixView<float> y, bool add, Fn&& fn) {
    for (Index row = 0; row < x.rows; row += most_rows) {
      const Index rows = std::min(most_rows, x.rows - row);
      for (Index k = 0; k < x.cols; k += most_depth) {
        arena_.reset();
        fn(x.middle_rows(row, rows).middle_cols(k, std::min(most_depth, x.cols - k)), k, y.middle_rows(row, rows),
           add || k > 0);
      }
    }
  }

  /// Rows are padded so that neighbours do not fall into the same lines of the cache.
  MatrixView<const Pair> rounded_rows(MatrixView<const float> x) {
    const Index pairs = pairs_of(x.cols), stride = ceil_divide(pairs, 32) * 32 + 16;
    const MatrixView<Pair> rounded(arena_.allocate<Pair>(x.rows * stride), x.rows, pairs, stride);
    pool_.for_each_tile(ceil_divide(x.rows, rows_at_once), [&](Index i, int) {
      for (Index t = i * rows_at_once; t < std::min(x.rows, (i + 1) * rows_at_once); ++t)
        round_row(x.row(t), x.cols, rounded.row(t));
    });
    return rounded;
  }
  static Strided<Pair> rows_of(MatrixView<const Pair> a) { return {a.data, a.stride, 1}; }

  WritablePanels room(Index pairs, Index columns) {
    const Index step = pairs * panel_columns<Pair>;
    return {arena_.allocate<Pair>(panels_of<Pair>(columns) * step), step};
  }

  /// Columns [column, column + count) of rows k and k + 1 as pairs; behind the last row lie zeros.
  static void pair_up(MatrixView<const float> x, Index k, Index column, Index count, Pair* target) {
    const float* first = x.row(k) + column;
    const float* second = k + 1 < x.rows ? x.row(k + 1) + column : nullptr;
    if (second)
      for (Index j = 0; j < count; ++j) target[j] = pair_of(first[j], second[j]);
    else
      for (Index j = 0; j < count; ++j) target[j] = pair_of(first[j], 0);
  }

  /// Panels of x whose pairs are two rows.                           [k, columns]
  Panels paired_rows(MatrixView<const float> x) {
    constexpr Index width = panel_columns<Pair>;
    const WritablePanels panels = room(pairs_of(x.rows), x.cols);
    pool_.for_each_tile(panels_of<Pair>(x.cols), [&](Index p, int) {
      const Index column = p * width, count = std::min(width, x.cols - column);
      Pair* target = panels.data + p * panels.step;
      for (Index k = 0; k < x.rows; k += 2, target += width) {
        pair_up(x, k, column, count, target);
        std::fill(target + count, target + width, Pair{});
      }
    });
    return panels;
  }

  /// Panel p of a packed w as the input gradient takes it: its lanes are columns of w, its pairs two rows, for rows
  /// [first, first + count). first is a multiple of a panel's width.
  static void turn(const PanelForm<Pair>& w, Index first, Index count, Index p, Pair* target) {
    constexpr Index width = panel_columns<Pair>, half = width / 2;
    constexpr std::uint64_t outer = 0xFFFF00000000FFFF;
    const Index begin = p * half, rows = std::min(half, w.in - begin);  // pairs of columns
    std::uint64_t fours[half * half];  // [columns 2 j and 2 j + 1][rows 2 i and 2 i + 1], four values each
    std::fill(fours + rows * half, fours + half * half, std::uint64_t{});
    for (Index k = 0; k < count; k += width, target += half * width) {
      std::memcpy(fours, &w.values((first + k) / width, begin * width),
                  static_cast<std::size_t>(rows * half) * sizeof(fours[0]));
      for (Index i = 0; i < rows * half; ++i)
        fours[i] = (fours[i] & outer) | (fours[i] >> 16 & 0xFFFF0000) | (fours[i] & 0xFFFF0000) << 16;
      for (Index j = 0; j < half; j += 4)
        for (Index i = 0; i < half; i += 4)
          transpose_four(fours + j * half + i, half, reinterpret_cast<std::uint64_t*>(target) + i * half + j, half);
    }
  }

  /// c = a b, or added to c, for c.cols columns of panels.
  void product(Strided<Pair> a, Index depth, Panels b, MatrixView<float> c, bool add) {
    constexpr Index width = panel_columns<Pair>;
    for_each_panel(pool_, c.rows, panels_of<Pair>(c.cols), [&](Index row, Index rows, Index p) {
      const Index column = p * width;
      panel_product<Pair>(rows, depth, {a.data + row * a.row_step, a.row_step, a.depth_step}, b.data + p * b.step,
                          width, c.middle_rows(row, rows).middle_cols(column, std::min(width, c.cols - column)), add);
    });
  }

  ThreadPool& pool_;
  Scratch scratch_;  // one for each thread, to pack weights in
  Arena<HostMemory> arena_;
};

}  // namespace cpu

inline std::unique_ptr<cpu::Products> bf16_products(ThreadPool& pool) {
  return std::make_unique<cpu::Bf16Products>(pool);
}

}  // namespace calm::inline CALM_ABI
