// The norms and biases of CpuBackend, and the tiles of rows and columns that its operations are cut into.
#pragma once

#include <calm/backend/backend.hpp>
#include <calm/backend/cpu_vector.hpp>
#include <calm/core/parallel.hpp>

#include <cmath>

namespace calm::inline CALM_ABI::cpu {

class Tiles {
 public:
  explicit Tiles(int threads) : pool_(threads) {}

  ThreadPool& pool() { return pool_; }

 protected:
  template <class Fn>
  void for_rows(Index rows, Fn&& fn) {
    constexpr Index tile = 32;
    pool_.for_each_tile(ceil_divide(rows, tile), [&](Index i, int) {
      for (Index t = i * tile; t < std::min(rows, (i + 1) * tile); ++t) fn(t);
    });
  }

  template <class Fn>
  void for_columns(Index cols, Fn&& fn) {
    constexpr Index tile = 64;
    pool_.for_each_tile(ceil_divide(cols, tile), [&](Index i, int) { fn(i * tile, std::min(tile, cols - i * tile)); });
  }

  /// Writes value(j), or adds it, to each of `count` targets.
  template <class S, class Value>
  static void write_row(S* target, Index count, bool add, const Value& value) {
    if (add)
      for (Index j = 0; j < count; ++j) target[j] += value(j);
    else
      for (Index j = 0; j < count; ++j) target[j] = value(j);
  }

  ThreadPool pool_;
};

class Norms : public Tiles {
 public:
  using Tiles::Tiles;

  template <class S>
  [[gnu::noinline]] void rms_norm(MatrixView<const S> x, std::span<const S> weight, double epsilon, MatrixView<S> y,
                                  std::span<S> inverse_rms) {
    for_rows(x.rows, [&](Index t) {
      const S mean = dot(x.row(t), x.row(t), x.cols) / static_cast<S>(x.cols);
      const S inverse = S{1} / std::sqrt(mean + static_cast<S>(epsilon));
      inverse_rms[static_cast<std::size_t>(t)] = inverse;
      for (Index j = 0; j < x.cols; ++j) y(t, j) = weight[static_cast<std::size_t>(j)] * (x(t, j) * inverse);
    });
  }

  template <class S>
  void rms_norm_input_gradient(MatrixView<const S> dy, MatrixView<const S> x, std::span<const S> weight,
                               std::span<const S> inverse_rms, MatrixView<S> dx, WriteMode auto mode) {
    rms_norm_input_gradient(dy, x, weight, inverse_rms, dx, adds(mode));
  }

  template <class S>
  void rms_norm_weight_gradient(MatrixView<const S> dy, MatrixView<const S> x, std::span<const S> inverse_rms,
                                std::span<S> dweight) {
    for_columns(x.cols, [&](Index first, Index count) {
      S* target = dweight.data() + first;
      for (Index t = 0; t < x.rows; ++t)
        for (Index j = 0; j < count; ++j)
          target[j] += dy(t, first + j) * x(t, first + j) * inverse_rms[static_cast<std::size_t>(t)];
    });
  }

  template <class S>
  [[gnu::noinline]] void layer_norm(MatrixView<const S> x, std::span<const S> weight, std::span<const S> bias,
                                    double epsilon, MatrixView<S> y, std::span<S> mean,
                                    std::span<S> inverse_deviation) {
    const auto count = static_cast<S>(x.cols);
    for_rows(x.rows, [&](Index t) {
      const S* v = x.row(t);
      const S m =
          sum_of_products<S>(
              x.cols, [=](Index j, Index n) { return load(v + j, n); }, [](Index, Index) { return Chunk<S>(S{1}); }) /
          count;
      const auto off_mean = [=](Index j, Index n) { return load(v + j, n) - m; };
      const S variance = sum_of_products<S>(x.cols, off_mean, off_mean) / count;
      const S r = S{1} / std::sqrt(variance + static_cast<S>(epsilon));
      mean[static_cast<std::size_t>(t)] = m;
      inverse_deviation[static_cast<std::size_t>(t)] = r;
      for (Index j = 0; j < x.cols; ++j)
        y(t, j) = (v[j] - m) * r * weight[static_cast<std::size_t>(j)] + bias[static_cast<std::size_t>(j)];
    });
  }

  template <class S>
  void layer_norm_input_gradient(MatrixView<const S> dy, MatrixView<const S> x, std::span<const S> weight,
                                 std::span<const S> mean, std::span<const S> inverse_deviation, MatrixView<S> dx,
                                 WriteMode auto mode) {
    const auto count = static_cast<S>(x.cols);
    const bool add = adds(mode);
    for_rows(x.rows, [&](Index t) {
      const S m = mean[static_cast<std::size_t>(t)], r = inverse_deviation[static_cast<std::size_t>(t)];
      const S* w = weight.data();
      const S* g = dy.row(t);
      const S* v = x.row(t);
      const S plain = dot(w, g, x.cols) / count;
      const S along = sum_of_products<S>(
                          x.cols, [=](Index j, Index n) { return load(w + j, n) * load(g + j, n); },
                          [=](Index j, Index n) { return (load(v + j, n) - m) * r; }) /
                      count;
      write_row(dx.row(t), x.cols, add, [=](Index j) { return r * (w[j] * g[j] - plain - (v[j] - m) * r * along); });
    });
  }

  template <class S>
  void layer_norm_weight_gradient(MatrixView<const S> dy, MatrixView<const S> x, std::span<const S> mean,
                                  std::span<const S> inverse_deviation, std::span<S> dweight) {
    for_columns(x.cols, [&](Index first, Index count) {
      S* target = dweight.data() + first;
      for (Index t = 0; t < x.rows; ++t) {
        const S m = mean[static_cast<std::size_t>(t)], r = inverse_deviation[static_cast<std::size_t>(t)];
        for (Index j = 0; j < count; ++j) target[j] += dy(t, first + j) * (x(t, first + j) - m) * r;
      }
    });
  }

  template <class S>
  void add_bias(std::span<const S> bias, MatrixView<S> y) {
    for_rows(y.rows, [&](Index t) {
      for (Index j = 0; j < y.cols; ++j) y(t, j) += bias[static_cast<std::size_t>(j)];
    });
  }

  template <class S>
  void add_columns(MatrixView<const S> dy, std::span<S> dbias) {
    for_columns(dy.cols, [&](Index first, Index count) {
      S* target = dbias.data() + first;
      for (Index t = 0; t < dy.rows; ++t)
        for (Index j = 0; j < count; ++j) target[j] += dy(t, first + j);
    });
  }

  template <class S>
  void scale_columns(MatrixView<const S> x, std::span<const S> factors, MatrixView<S> y, WriteMode auto mode) {
    scale_columns(x, factors, y, adds(mode));
  }

  template <class S>
  void add_column_products(MatrixView<const S> a, MatrixView<const S> b, std::span<S> sums) {
    for_columns(a.cols, [&](Index first, Index count) {
      S* target = sums.data() + first;
      for (Index t = 0; t < a.rows; ++t)
        for (Index j = 0; j < count; ++j) target[j] += a(t, first + j) * b(t, first + j);
    });
  }

 private:
  template <class S>
  void rms_norm_input_gradient(MatrixView<const S> dy, MatrixView<const S> x, std::span<const S> weight,
                               std::span<const S> inverse_rms, MatrixView<S> dx, bool add) {
    for_rows(x.rows, [&](Index t) {
      const S inverse = inverse_rms[static_cast<std::size_t>(t)];
      const S* w = weight.data();
      const S* g = dy.row(t);
      const S* v = x.row(t);
      const S along = sum_of_products<S>(
          x.cols, [=](Index j, Index n) { return load(w + j, n) * load(g + j, n); },
          [=](Index j, Index n) { return load(v + j, n); });
      const S factor = along * inverse * inverse * inverse / static_cast<S>(x.cols);
      write_row(dx.row(t), x.cols, add, [=](Index j) { return inverse * w[j] * g[j] - factor * v[j]; });
    });
  }

  template <class S>
  void scale_columns(MatrixView<const S> x, std::span<const S> factors, MatrixView<S> y, bool add) {
    for_rows(x.rows, [&](Index t) {
      const S *from = x.row(t), *factor = factors.data();
      write_row(y.row(t), x.cols, add, [=](Index j) { return from[j] * factor[j]; });
    });
  }
};

}  // namespace calm::inline CALM_ABI::cpu
