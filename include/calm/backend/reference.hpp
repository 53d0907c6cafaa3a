// ReferenceBackend: every operation of backend.hpp by its formula, in plain loops. The oracle of the other backends.
//
// One thread, no vectors, no tiles; sums run in double whatever the scalar is. Read it to learn what an operation
// means, and copy its list of functions to begin a new backend.
#pragma once

#include <calm/backend/backend.hpp>
#include <calm/backend/reference_norms.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

namespace calm::inline CALM_ABI {

class ReferenceBackend : public reference::Norms {
 public:
  using Memory = HostMemory;

  /// The number of threads is ignored: there is one.
  explicit ReferenceBackend(int = 1) {}

  template <class S>
  MatrixView<const S> packed(const StoredMatrix& weight) {
    if (const S* values = weight.in_place<S>()) return {values, weight.rows(), weight.cols()};
    return weight.packed<Dense<S>>([&] { return Dense<S>{weight.dense<S>()}; }).values.view();
  }

  // Matrix products

  template <class S>
  void multiply(MatrixView<const S> w, MatrixView<const S> x, MatrixView<S> y, WriteMode auto mode) {
    for (Index t = 0; t < x.rows; ++t)
      for (Index i = 0; i < w.rows; ++i)
        write(y(t, i), sum(x.cols, [&](Index j) { return product(x(t, j), w(i, j)); }), mode);
  }

  template <class S>
  void multiply_each(MatrixView<const S> x, std::span<const FrozenProduct<S>> products) {
    for (const auto& [weight, y] : products) multiply(packed<S>(*weight), x, y, Assign{});
  }

  template <class S>
  void multiply_input_gradient(MatrixView<const S> w, MatrixView<const S> dy, MatrixView<S> dx, WriteMode auto mode) {
    for (Index t = 0; t < dy.rows; ++t)
      for (Index j = 0; j < w.cols; ++j)
        write(dx(t, j), sum(w.rows, [&](Index i) { return product(dy(t, i), w(i, j)); }), mode);
  }

  template <class S>
  void multiply_weight_gradient(MatrixView<const S> dy, MatrixView<const S> x, MatrixView<S> dw) {
    for (Index i = 0; i < dw.rows; ++i)
      for (Index j = 0; j < dw.cols; ++j)
        write(dw(i, j), sum(x.rows, [&](Index t) { return product(dy(t, i), x(t, j)); }), Accumulate{});
  }

  // Rows

  template <class S>
  void gather(const StoredMatrix& table, std::span<const TokenId> ids, MatrixView<S> y) {
    for (Index t = 0; t < y.rows; ++t) table.read_rows(at(ids, t), 1, y.row(t));
  }

  template <class S>
  void gather(MatrixView<const S> table, std::span<const TokenId> ids, MatrixView<S> y) {
    for (Index t = 0; t < y.rows; ++t)
      for (Index j = 0; j < y.cols; ++j) y(t, j) = table(at(ids, t), j);
  }

  template <class S>
  void scatter_add(std::span<const TokenId> ids, MatrixView<const S> dy, MatrixView<S> dtable) {
    for (Index t = 0; t < dy.rows; ++t)
      for (Index j = 0; j < dy.cols; ++j) dtable(at(ids, t), j) += dy(t, j);
  }

  template <class S>
  void gather_rows(MatrixView<const S> from, std::span<const Index> rows, MatrixView<S> to) {
    for (Index t = 0; t < to.rows; ++t)
      for (Index j = 0; j < to.cols; ++j) to(t, j) = from(at(rows, t), j);
  }

  template <class S>
  void scatter_rows(MatrixView<const S> from, std::span<const Index> rows, MatrixView<S> to) {
    for (Index t = 0; t < from.rows; ++t)
      for (Index j = 0; j < from.cols; ++j) to(at(rows, t), j) += from(t, j);
  }

  // Rotary positions

  template <class S>
  void rotary_angles(std::span<const Index> positions, std::span<const S> frequencies, MatrixView<S> cosines,
                     MatrixView<S> sines) {
    for (Index t = 0; t < cosines.rows; ++t) {
      for (Index i = 0; i < cosines.cols; ++i) {
        const S angle = static_cast<S>(at(positions, t)) * at(frequencies, i);
        cosines(t, i) = std::cos(angle);
        sines(t, i) = std::sin(angle);
      }
    }
  }

  template <class S>
  void rotate(MatrixView<S> x, MatrixView<const S> cosines, MatrixView<const S> sines, Index heads, int direction) {
    const Index half = cosines.cols, width = x.cols / heads;
    for (Index t = 0; t < x.rows; ++t) {
      for (Index h = 0; h < heads; ++h) {
        for (Index i = 0; i < half; ++i) {
          S &a = x(t, h * width + i), &b = x(t, h * width + half + i);
          const double c = cosines(t, i), s = direction * static_cast<double>(sines(t, i));
          const double first = a, second = b;
          a = static_cast<S>(first * c - second * s);
          b = static_cast<S>(second * c + first * s);
        }
      }
    }
  }

  // Attention

  template <class S>
  void attention(MatrixView<const S> q, std::span<const AttentionSequence<S>> sequences,
                 std::span<const VisibleRange> visible, HeadShape heads, MatrixView<S> y, MatrixView<S> log_sum_exp) {
    for_each_query(sequences, heads, [&](const AttentionSequence<S>& sequence, Index t, Index head) {
      const std::vector<double> p = probabilities(q, sequence, at(visible, t), heads, t, head, &log_sum_exp(t, head));
      for (Index i = 0; i < heads.width; ++i) {
        double total = 0;
        for (Index s = at(visible, t).begin; s < at(visible, t).end; ++s)
          total += at(p, s - at(visible, t).begin) * value(sequence, heads, head, s)[i];
        y(t, head * heads.width + i) = static_cast<S>(total);
      }
    });
  }

  template <class S>
  void append_keys(MatrixView<const S> keys, Index first, MatrixView<S> cache) {
    scale(keys, 1, cache.middle_rows(first, keys.rows));
  }

  /// With p = softmax(a), a = q k^T / sqrt(width): dp = dy v^T, da = p (dp - <p, dp>), dq = da k / sqrt(width),
  /// dk = da^T q / sqrt(width), dv = p^T dy. Computed from q, k and v alone.
  template <class S>
  void attention_backward(MatrixView<const S> q, std::span<const AttentionSequence<S>> sequences,
                          std::span<const VisibleRange> visible, HeadShape heads, MatrixView<const S>,
                          MatrixView<const S>, MatrixView<const S> dy, MatrixView<S> dq) {
    const double factor = 1 / std::sqrt(static_cast<double>(heads.width));
    for (const AttentionSequence<S>& sequence : sequences) {
      for (Index s = 0; s < sequence.key_count; ++s) {
        std::fill_n(sequence.key_gradients + s * sequence.stride, heads.kv_heads * heads.width, S{0});
        std::fill_n(sequence.value_gradients + s * sequence.stride, heads.kv_heads * heads.width, S{0});
      }
    }
    for_each_query(sequences, heads, [&](const AttentionSequence<S>& sequence, Index t, Index head) {
      const VisibleRange range = at(visible, t);
      const Index first = head * heads.width, column = kv_column(heads, head);
      const std::vector<double> p = probabilities(q, sequence, range, heads, t, head, static_cast<S*>(nullptr));
      std::vector<double> dp(p.size());
      double mean = 0;
      for (Index s = range.begin; s < range.end; ++s) {
        const S* v = value(sequence, heads, head, s);
        at(dp, s - range.begin) = sum(heads.width, [&](Index i) { return product(dy(t, first + i), v[i]); });
        mean += at(p, s - range.begin) * at(dp, s - range.begin);
      }
      for (Index i = 0; i < heads.width; ++i) {
        double total = 0;
        for (Index s = range.begin; s < range.end; ++s) {
          const double da = at(p, s - range.begin) * (at(dp, s - range.begin) - mean) * factor;
          const Index place = s * sequence.stride + column + i;
          total += da * sequence.keys[place];
          write(sequence.key_gradients[place], da * q(t, first + i), Accumulate{});
          write(sequence.value_gradients[place], at(p, s - range.begin) * dy(t, first + i), Accumulate{});
        }
        dq(t, first + i) = static_cast<S>(total);
      }
    });
  }

  // Activations

  template <class Activation, class S>
  void gated_activation(MatrixView<const S> gate, MatrixView<const S> up, MatrixView<S> h) {
    for (Index t = 0; t < h.rows; ++t)
      for (Index j = 0; j < h.cols; ++j) h(t, j) = Activation::value(gate(t, j)) * up(t, j);
  }

  template <class Activation, class S>
  void gated_activation_backward(MatrixView<const S> dh, MatrixView<const S> gate, MatrixView<const S> up,
                                 MatrixView<S> dgate, MatrixView<S> dup) {
    for (Index t = 0; t < dh.rows; ++t) {
      for (Index j = 0; j < dh.cols; ++j) {
        const S d = dh(t, j), g = gate(t, j), u = up(t, j);
        dgate(t, j) = d * u * Activation::derivative(g);
        dup(t, j) = d * Activation::value(g);
      }
    }
  }

  template <class Activation, class S>
  void activation(MatrixView<const S> x, MatrixView<S> h) {
    for (Index t = 0; t < h.rows; ++t)
      for (Index j = 0; j < h.cols; ++j) h(t, j) = Activation::value(x(t, j));
  }

  template <class Activation, class S>
  void activation_backward(MatrixView<const S> dh, MatrixView<const S> x, MatrixView<S> dx) {
    for (Index t = 0; t < dh.rows; ++t)
      for (Index j = 0; j < dh.cols; ++j) dx(t, j) = dh(t, j) * Activation::derivative(x(t, j));
  }

  // Loss

  template <class S>
  void cross_entropy(MatrixView<const S> logits, std::span<const TokenId> targets, double scale, std::span<S> losses,
                     MatrixView<S> dlogits) {
    for (Index t = 0; t < logits.rows; ++t) {
      const Index target = at(targets, t);
      const double largest = *std::max_element(logits.row(t), logits.row(t) + logits.cols);
      const double total = sum(logits.cols, [&](Index j) { return std::exp(logits(t, j) - largest); });
      at(losses, t) = static_cast<S>(std::log(total) + largest - logits(t, target));
      for (Index j = 0; j < logits.cols; ++j) {
        const double probability = std::exp(logits(t, j) - largest) / total;
        dlogits(t, j) = static_cast<S>(scale * (probability - (j == target ? 1 : 0)));
      }
    }
  }

  // Elements

  template <class S>
  void set_zero(MatrixView<S> y) {
    for (Index t = 0; t < y.rows; ++t)
      for (Index j = 0; j < y.cols; ++j) y(t, j) = S{};
  }

  template <class S>
  void add(MatrixView<const S> x, MatrixView<S> y) {
    for (Index t = 0; t < x.rows; ++t)
      for (Index j = 0; j < x.cols; ++j) y(t, j) += x(t, j);
  }

  template <class S>
  void scale(MatrixView<const S> x, double factor, MatrixView<S> y) {
    for (Index t = 0; t < x.rows; ++t)
      for (Index j = 0; j < x.cols; ++j) y(t, j) = static_cast<S>(factor * x(t, j));
  }

  template <class S>
  void add_gated(std::span<const S> gate, MatrixView<const S> delta, MatrixView<S> total) {
    const double g = std::tanh(static_cast<double>(gate[0]));
    for (Index t = 0; t < delta.rows; ++t)
      for (Index j = 0; j < delta.cols; ++j) write(total(t, j), g * delta(t, j), Accumulate{});
  }

  /// An empty dgate is not computed.
  template <class S>
  void gate_gradient(std::span<const S> gate, MatrixView<const S> delta, MatrixView<const S> dtotal,
                     MatrixView<S> ddelta, std::span<S> dgate) {
    const double g = std::tanh(static_cast<double>(gate[0]));
    double along = 0;
    for (Index t = 0; t < delta.rows; ++t) {
      for (Index j = 0; j < delta.cols; ++j) {
        along += product(dtotal(t, j), delta(t, j));
        ddelta(t, j) = static_cast<S>(g * dtotal(t, j));
      }
    }
    if (!dgate.empty()) write(dgate[0], (1 - g * g) * along, Accumulate{});
  }

  template <class S>
  void sum_of_squares(std::span<const S> values, double* result) {
    *result = sum(static_cast<Index>(values.size()), [&](Index i) { return product(at(values, i), at(values, i)); });
  }

  // Optimizer

  template <class S>
  void adamw(std::span<S> values, std::span<const S> gradients, std::span<S> first_moment, std::span<S> second_moment,
             const AdamWStep& step, const double* gradient_scale) {
    const auto steps = static_cast<double>(step.step);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double g = *gradient_scale * gradients[i];
      const double m = step.beta1 * first_moment[i] + (1 - step.beta1) * g;
      const double v = step.beta2 * second_moment[i] + (1 - step.beta2) * g * g;
      const double corrected_m = m / (1 - std::pow(step.beta1, steps)),
                   corrected_v = v / (1 - std::pow(step.beta2, steps));
      first_moment[i] = static_cast<S>(m);
      second_moment[i] = static_cast<S>(v);
      const double decayed = values[i] * (1 - step.learning_rate * step.weight_decay);
      values[i] = static_cast<S>(decayed - step.learning_rate * corrected_m / (std::sqrt(corrected_v) + step.epsilon));
    }
  }

 private:
  template <class S>
  struct Dense {
    Matrix<S> values;
    std::size_t bytes() const { return values.bytes(); }
  };

  /// Calls fn(sequence, row of the query, query head).
  template <class S, class Fn>
  static void for_each_query(std::span<const AttentionSequence<S>> sequences, HeadShape heads, Fn&& fn) {
    for (const AttentionSequence<S>& sequence : sequences)
      for (Index t = sequence.first_query; t < sequence.first_query + sequence.queries; ++t)
        for (Index head = 0; head < heads.query_heads; ++head) fn(sequence, t, head);
  }

  /// Where the key-value head of a query head begins within a row.
  static Index kv_column(HeadShape heads, Index head) {
    return head / (heads.query_heads / heads.kv_heads) * heads.width;
  }

  template <class S>
  static const S* value(const AttentionSequence<S>& sequence, HeadShape heads, Index head, Index s) {
    return sequence.values + s * sequence.stride + kv_column(heads, head);
  }

  /// softmax over the visible keys, empty where there are none; its log_sum_exp is then infinite, so that exp(score -
  /// log_sum_exp) is zero.
  template <class S>
  static std::vector<double> probabilities(MatrixView<const S> q, const AttentionSequence<S>& sequence,
                                           VisibleRange range, HeadShape heads, Index t, Index head, S* log_sum_exp) {
    const double factor = 1 / std::sqrt(static_cast<double>(heads.width));
    std::vector<double> p(static_cast<std::size_t>(std::max<Index>(0, range.end - range.begin)));
    for (Index s = range.begin; s < range.end; ++s) {
      const S* k = sequence.keys + s * sequence.stride + kv_column(heads, head);
      at(p, s - range.begin) =
          factor * sum(heads.width, [&](Index i) { return product(q(t, head * heads.width + i), k[i]); });
    }
    if (p.empty()) {
      if (log_sum_exp) *log_sum_exp = std::numeric_limits<S>::infinity();
      return p;
    }
    const double largest = *std::max_element(p.begin(), p.end());
    double total = 0;
    for (double& x : p) total += x = std::exp(x - largest);
    for (double& x : p) x /= total;
    if (log_sum_exp) *log_sum_exp = static_cast<S>(largest + std::log(total));
    return p;
  }
};

static_assert(Backend<ReferenceBackend>);

}  // namespace calm::inline CALM_ABI
