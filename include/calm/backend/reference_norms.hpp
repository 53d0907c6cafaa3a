// The norms and biases of ReferenceBackend, and the sums that all its operations use.
#pragma once

#include <calm/backend/backend.hpp>

#include <cmath>
#include <type_traits>

namespace calm::inline CALM_ABI::reference {

class Sums {
 protected:
  /// range[i], for a range that counts in std::size_t.
  template <class Range>
  static auto at(Range& range, Index i) -> decltype((range[0])) {
    return range[static_cast<std::size_t>(i)];
  }

  template <class S>
  static double product(S a, S b) {
    return static_cast<double>(a) * static_cast<double>(b);
  }

  template <class Term>
  static double sum(Index count, Term term) {
    double total = 0;
    for (Index i = 0; i < count; ++i) total += term(i);
    return total;
  }

  template <class S, WriteMode Mode>
  static void write(S& target, double value, Mode) {
    if constexpr (std::is_same_v<Mode, Assign>) target = static_cast<S>(value);
    else target = static_cast<S>(target + value);
  }
};

class Norms : protected Sums {
 public:
  // RMS norm: y = r x w with r = 1 / sqrt(mean(x^2) + epsilon)

  template <class S>
  void rms_norm(MatrixView<const S> x, std::span<const S> weight, double epsilon, MatrixView<S> y,
                std::span<S> inverse_rms) {
    for (Index t = 0; t < x.rows; ++t) {
      const double squares = sum(x.cols, [&](Index j) { return product(x(t, j), x(t, j)); });
      const double r = 1 / std::sqrt(squares / static_cast<double>(x.cols) + epsilon);
      at(inverse_rms, t) = static_cast<S>(r);
      for (Index j = 0; j < x.cols; ++j) y(t, j) = static_cast<S>(product(x(t, j), at(weight, j)) * r);
    }
  }

  /// dx = r w dy - x r^3 / D <w dy, x>
  template <class S>
  void rms_norm_input_gradient(MatrixView<const S> dy, MatrixView<const S> x, std::span<const S> weight,
                               std::span<const S> inverse_rms, MatrixView<S> dx, WriteMode auto mode) {
    for (Index t = 0; t < x.rows; ++t) {
      const double r = at(inverse_rms, t);
      const double along = sum(x.cols, [&](Index j) { return product(dy(t, j), x(t, j)) * at(weight, j); });
      for (Index j = 0; j < x.cols; ++j) {
        const double through_scale = x(t, j) * r * r * r * along / static_cast<double>(x.cols);
        write(dx(t, j), product(dy(t, j), at(weight, j)) * r - through_scale, mode);
      }
    }
  }

  template <class S>
  void rms_norm_weight_gradient(MatrixView<const S> dy, MatrixView<const S> x, std::span<const S> inverse_rms,
                                std::span<S> dweight) {
    for (Index j = 0; j < x.cols; ++j)
      write(at(dweight, j), sum(x.rows, [&](Index t) { return product(dy(t, j), x(t, j)) * at(inverse_rms, t); }),
            Accumulate{});
  }

  // Layer norm: y = n w + b with n = (x - mean(x)) r and r = 1 / sqrt(var(x) + epsilon)

  template <class S>
  void layer_norm(MatrixView<const S> x, std::span<const S> weight, std::span<const S> bias, double epsilon,
                  MatrixView<S> y, std::span<S> mean, std::span<S> inverse_deviation) {
    const auto count = static_cast<double>(x.cols);
    for (Index t = 0; t < x.rows; ++t) {
      const double m = sum(x.cols, [&](Index j) { return static_cast<double>(x(t, j)); }) / count;
      const double variance = sum(x.cols, [&](Index j) { return (x(t, j) - m) * (x(t, j) - m); }) / count;
      const double r = 1 / std::sqrt(variance + epsilon);
      at(mean, t) = static_cast<S>(m);
      at(inverse_deviation, t) = static_cast<S>(r);
      for (Index j = 0; j < x.cols; ++j) y(t, j) = static_cast<S>((x(t, j) - m) * r * at(weight, j) + at(bias, j));
    }
  }

  /// dx = r (w dy - mean(w dy) - n mean(w dy n))
  template <class S>
  void layer_norm_input_gradient(MatrixView<const S> dy, MatrixView<const S> x, std::span<const S> weight,
                                 std::span<const S> mean, std::span<const S> inverse_deviation, MatrixView<S> dx,
                                 WriteMode auto mode) {
    const auto count = static_cast<double>(x.cols);
    for (Index t = 0; t < x.rows; ++t) {
      const double m = at(mean, t), r = at(inverse_deviation, t);
      const double plain = sum(x.cols, [&](Index j) { return product(dy(t, j), at(weight, j)); }) / count;
      const double along =
          sum(x.cols, [&](Index j) { return product(dy(t, j), at(weight, j)) * (x(t, j) - m) * r; }) / count;
      for (Index j = 0; j < x.cols; ++j)
        write(dx(t, j), r * (product(dy(t, j), at(weight, j)) - plain - (x(t, j) - m) * r * along), mode);
    }
  }

  template <class S>
  void layer_norm_weight_gradient(MatrixView<const S> dy, MatrixView<const S> x, std::span<const S> mean,
                                  std::span<const S> inverse_deviation, std::span<S> dweight) {
    const auto term = [&](Index t, Index j) {
      return dy(t, j) * (static_cast<double>(x(t, j)) - at(mean, t)) * at(inverse_deviation, t);
    };
    for (Index j = 0; j < x.cols; ++j)
      write(at(dweight, j), sum(x.rows, [&](Index t) { return term(t, j); }), Accumulate{});
  }

  // Biases

  template <class S>
  void add_bias(std::span<const S> bias, MatrixView<S> y) {
    for (Index t = 0; t < y.rows; ++t)
      for (Index j = 0; j < y.cols; ++j) y(t, j) += at(bias, j);
  }

  template <class S>
  void add_columns(MatrixView<const S> dy, std::span<S> dbias) {
    for (Index j = 0; j < dy.cols; ++j)
      write(at(dbias, j), sum(dy.rows, [&](Index t) { return static_cast<double>(dy(t, j)); }), Accumulate{});
  }

  template <class S>
  void scale_columns(MatrixView<const S> x, std::span<const S> factors, MatrixView<S> y, WriteMode auto mode) {
    for (Index t = 0; t < x.rows; ++t)
      for (Index j = 0; j < x.cols; ++j) write(y(t, j), product(x(t, j), at(factors, j)), mode);
  }

  template <class S>
  void add_column_products(MatrixView<const S> a, MatrixView<const S> b, std::span<S> sums) {
    for (Index j = 0; j < a.cols; ++j)
      write(at(sums, j), sum(a.rows, [&](Index t) { return product(a(t, j), b(t, j)); }), Accumulate{});
  }
};

}  // namespace calm::inline CALM_ABI::reference
