// CpuBackend: the operations of backend.hpp on the cores of the host, with Eigen's vectorised functions.
//
// Work is cut into tiles of fixed size, each computed by one thread: results have the same bits for any thread count.
// Attention lies in cpu_attention.hpp.
#pragma once

#include <calm/backend/backend.hpp>
#include <calm/backend/cpu_attention.hpp>
#include <calm/backend/cpu_norms.hpp>
#include <calm/backend/cpu_product.hpp>
#ifdef CALM_WITH_ONEDNN
#include <calm/backend/cpu_onednn.hpp>
#endif

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

namespace calm::inline CALM_ABI {

#ifdef CALM_WITH_ONEDNN
inline constexpr MakeProducts default_products = onednn_products;
#else
inline constexpr MakeProducts default_products = own_products;
#endif

/// Operations that much code calls are kept out of their callers: inlined they would cost compile time and gain
/// nothing.
class CpuBackend : public cpu::Norms {
 public:
  using Memory = HostMemory;

  /// `products`: what computes the products of f32 linear maps, such as bf16_products.
  explicit CpuBackend(int threads = 0, MakeProducts products = default_products)
      : Norms(threads), scratch_(cpu::scratch_of(pool_)), make_products_(products),
        products_(products ? products(pool_) : nullptr) {}

  /// What another backend must be made with, beside its threads, to give the same bits.
  auto options() const { return std::tuple(make_products_); }

  /// A frozen weight, as the products take it: each makes the form that it needs when it is first called.
  template <class S>
  struct FrozenWeight {
    const StoredMatrix& stored;

    const cpu::PanelForm<S>& panels(ThreadPool& pool, cpu::Scratch& scratch) const {
      return stored.packed<cpu::PanelForm<S>>([&] {
        return cpu::pack_rows<S>(
            pool, scratch, stored.rows(), stored.cols(),
            [&](auto&, Index first, MatrixView<S> rows) { stored.read_rows(first, rows.rows, rows.data); });
      });
    }
    MatrixView<const S> dense() const {
      if (const S* values = stored.in_place<S>()) return {values, stored.rows(), stored.cols()};
      return stored.packed<DenseForm<S>>([&] { return DenseForm<S>{stored.dense<S>()}; }).values.view();
    }
  };

  template <class S>
  FrozenWeight<S> packed(const StoredMatrix& weight) {
    return {weight};
  }

  template <class S>
  [[gnu::noinline]] void multiply(FrozenWeight<S> w, MatrixView<const S> x, MatrixView<S> y, WriteMode auto mode) {
    if constexpr (std::is_same_v<S, float>)
      if (products_) return products_->multiply(x, w.stored, y, adds(mode));
    cpu::multiply(pool_, x, w.panels(pool_, scratch_), y, adds(mode));
  }
  template <class S>
  [[gnu::noinline]] void multiply(MatrixView<const S> w, MatrixView<const S> x, MatrixView<S> y, WriteMode auto mode) {
    if constexpr (std::is_same_v<S, float>)
      if (products_) return products_->multiply(x, w, y, adds(mode));
    cpu::multiply(pool_, scratch_, x, w, y, adds(mode));
  }

  template <class S>
  [[gnu::noinline]] void multiply_each(MatrixView<const S> x, std::span<const FrozenProduct<S>> products) {
    if constexpr (std::is_same_v<S, float>)
      if (products_) return products_->multiply_each(x, products);
    for (const auto& [weight, y] : products) multiply(packed<S>(*weight), x, y, Assign{});
  }

  template <class S>
  [[gnu::noinline]] void multiply_input_gradient(FrozenWeight<S> w, MatrixView<const S> dy, MatrixView<S> dx,
                                                 WriteMode auto mode) {
    if constexpr (std::is_same_v<S, float>)
      if (products_) return products_->multiply_input_gradient(dy, w.stored, dx, adds(mode));
    cpu::multiply_input_gradient(pool_, scratch_, dy, w.dense(), dx, adds(mode));
  }
  template <class S>
  [[gnu::noinline]] void multiply_input_gradient(MatrixView<const S> w, MatrixView<const S> dy, MatrixView<S> dx,
                                                 WriteMode auto mode) {
    if constexpr (std::is_same_v<S, float>)
      if (products_) return products_->multiply_input_gradient(dy, w, dx, adds(mode));
    cpu::multiply_input_gradient(pool_, scratch_, dy, w, dx, adds(mode));
  }

  template <class S>
  [[gnu::noinline]] void multiply_weight_gradient(MatrixView<const S> dy, MatrixView<const S> x, MatrixView<S> dw) {
    if constexpr (std::is_same_v<S, float>)
      if (products_) return products_->multiply_weight_gradient(dy, x, dw);
    cpu::multiply_weight_gradient(pool_, scratch_, dy, x, dw);
  }

  template <class S>
  void gather(const StoredMatrix& table, std::span<const TokenId> ids, MatrixView<S> y) {
    for_rows(y.rows, [&](Index t) { table.read_rows(ids[static_cast<std::size_t>(t)], 1, y.row(t)); });
  }

  template <class S>
  void gather(MatrixView<const S> table, std::span<const TokenId> ids, MatrixView<S> y) {
    for_rows(y.rows, [&](Index t) { std::copy_n(table.row(ids[static_cast<std::size_t>(t)]), y.cols, y.row(t)); });
  }

  template <class S>
  void scatter_add(std::span<const TokenId> ids, MatrixView<const S> dy, MatrixView<S> dtable) {
    for_columns(dy.cols, [&](Index first, Index count) {
      for (Index t = 0; t < dy.rows; ++t) {
        S* target = dtable.row(ids[static_cast<std::size_t>(t)]) + first;
        for (Index j = 0; j < count; ++j) target[j] += dy(t, first + j);
      }
    });
  }

  template <class S>
  void gather_rows(MatrixView<const S> from, std::span<const Index> rows, MatrixView<S> to) {
    for_rows(to.rows, [&](Index t) { std::copy_n(from.row(rows[static_cast<std::size_t>(t)]), to.cols, to.row(t)); });
  }

  template <class S>
  void scatter_rows(MatrixView<const S> from, std::span<const Index> rows, MatrixView<S> to) {
    for_rows(from.rows, [&](Index t) {
      S* target = to.row(rows[static_cast<std::size_t>(t)]);
      for (Index j = 0; j < from.cols; ++j) target[j] += from(t, j);
    });
  }

  template <class S>
  [[gnu::noinline]] void rotary_angles(std::span<const Index> positions, std::span<const S> frequencies,
                                       MatrixView<S> cosines, MatrixView<S> sines) {
    for_rows(cosines.rows, [&](Index t) {
      for (Index i = 0; i < cosines.cols; ++i) {
        const S angle =
            static_cast<S>(positions[static_cast<std::size_t>(t)]) * frequencies[static_cast<std::size_t>(i)];
        cosines(t, i) = std::cos(angle);
        sines(t, i) = std::sin(angle);
      }
    });
  }

  template <class S>
  [[gnu::noinline]] void rotate(MatrixView<S> x, MatrixView<const S> cosines, MatrixView<const S> sines, Index heads,
                                int direction) {
    const Index half = cosines.cols, width = x.cols / heads;
    const auto rotate_all = [&]<class Step>(Step) {
      using V = typename Step::Type;
      constexpr Index step = sizeof(V) / sizeof(S);
      for_rows(x.rows, [&](Index t) {
        const S* c = cosines.row(t);
        const S* s = sines.row(t);
        const S sign = static_cast<S>(direction);
        for (Index h = 0; h < heads; ++h) {
          S* a = x.row(t) + h * width;
          S* b = a + half;
          for (Index i = 0; i < half; i += step) {
            V first, second, cosine, sine;
            std::memcpy(&first, a + i, sizeof(V)), std::memcpy(&second, b + i, sizeof(V));
            std::memcpy(&cosine, c + i, sizeof(V)), std::memcpy(&sine, s + i, sizeof(V));
            sine = sine * sign;
            const V of_second = second * sine, of_first = first * sine;
            first = first * cosine - of_second;
            second = second * cosine + of_first;
            std::memcpy(a + i, &first, sizeof(V)), std::memcpy(b + i, &second, sizeof(V));
          }
        }
      });
    };
    if (half % 8 == 0) rotate_all(EightValues<S>{});
    else rotate_all(OneValue<S>{});
  }

  template <class S>
  void attention(MatrixView<const S> q, std::span<const AttentionSequence<S>> sequences,
                 std::span<const VisibleRange> visible, HeadShape heads, MatrixView<S> y, MatrixView<S> log_sum_exp) {
    cpu::attention(pool_, scratch_, q, sequences, visible, heads, y, log_sum_exp);
  }

  template <class S>
  void append_keys(MatrixView<const S> keys, Index first, MatrixView<S> cache) {
    cpu::append_keys(pool_, keys, first, cache);
  }

  template <class S>
  void attention_backward(MatrixView<const S> q, std::span<const AttentionSequence<S>> sequences,
                          std::span<const VisibleRange> visible, HeadShape heads, MatrixView<const S> y,
                          MatrixView<const S> log_sum_exp, MatrixView<const S> dy, MatrixView<S> dq) {
    cpu::attention_backward(pool_, scratch_, q, sequences, visible, heads, y, log_sum_exp, dy, dq);
  }

  /// h = Activation(gate) * up, for Activation::value on arrays.
  template <class Activation, class S>
  void gated_activation(MatrixView<const S> gate, MatrixView<const S> up, MatrixView<S> h) {
    for_rows(h.rows, [&](Index t) {
      cpu::for_chunks<S>(h.cols, [&](Index j, Index n) {
        cpu::store(h.row(t) + j, n, Activation::value(cpu::load(gate.row(t) + j, n)) * cpu::load(up.row(t) + j, n));
      });
    });
  }

  /// The gradients of gated_activation, from dh.
  template <class Activation, class S>
  void gated_activation_backward(MatrixView<const S> dh, MatrixView<const S> gate, MatrixView<const S> up,
                                 MatrixView<S> dgate, MatrixView<S> dup) {
    for_rows(dh.rows, [&](Index t) {
      cpu::for_chunks<S>(dh.cols, [&](Index j, Index n) {
        const auto d = cpu::load(dh.row(t) + j, n), g = cpu::load(gate.row(t) + j, n), u = cpu::load(up.row(t) + j, n);
        cpu::store(dgate.row(t) + j, n, d * u * Activation::derivative(g));
        cpu::store(dup.row(t) + j, n, d * Activation::value(g));
      });
    });
  }

  /// h = Activation(x), and dx = dh * Activation'(x).
  template <class Activation, class S>
  void activation(MatrixView<const S> x, MatrixView<S> h) {
    for_rows(h.rows, [&](Index t) {
      cpu::for_chunks<S>(h.cols, [&](Index j, Index n) {
        cpu::store(h.row(t) + j, n, Activation::value(cpu::load(x.row(t) + j, n)));
      });
    });
  }
  template <class Activation, class S>
  void activation_backward(MatrixView<const S> dh, MatrixView<const S> x, MatrixView<S> dx) {
    for_rows(dh.rows, [&](Index t) {
      cpu::for_chunks<S>(dh.cols, [&](Index j, Index n) {
        cpu::store(dx.row(t) + j, n, cpu::load(dh.row(t) + j, n) * Activation::derivative(cpu::load(x.row(t) + j, n)));
      });
    });
  }

  template <class S>
  void cross_entropy(MatrixView<const S> logits, std::span<const TokenId> targets, double scale, std::span<S> losses,
                     MatrixView<S> dlogits) {
    for_rows(logits.rows, [&](Index t) {
      const Index target = targets[static_cast<std::size_t>(t)];
      const S* row = logits.row(t);
      const S at_target = row[target];
      const S largest = *std::max_element(row, row + logits.cols);
      S total = 0;
      cpu::for_chunks<S>(logits.cols, [&](Index j, Index n) {
        const cpu::Chunk<S> e = exp(cpu::load(row + j, n) - largest);
        cpu::store(dlogits.row(t) + j, n, e);
        for (Index i = 0; i < n; ++i) total += e[i];
      });
      losses[static_cast<std::size_t>(t)] = std::log(total) + largest - at_target;
      const S factor = static_cast<S>(scale) / total;
      for (Index j = 0; j < logits.cols; ++j) dlogits(t, j) *= factor;
      dlogits(t, target) -= static_cast<S>(scale);
    });
  }

  template <class S>
  [[gnu::noinline]] void set_zero(MatrixView<S> y) {
    for_rows(y.rows, [&](Index t) { std::fill_n(y.row(t), y.cols, S{}); });
  }

  template <class S>
  [[gnu::noinline]] void add(MatrixView<const S> x, MatrixView<S> y) {
    for_rows(x.rows, [&](Index t) {
      for (Index j = 0; j < x.cols; ++j) y(t, j) += x(t, j);
    });
  }

  template <class S>
  [[gnu::noinline]] void scale(MatrixView<const S> x, double factor, MatrixView<S> y) {
    for_rows(x.rows, [&](Index t) {
      for (Index j = 0; j < x.cols; ++j) y(t, j) = static_cast<S>(factor) * x(t, j);
    });
  }

  template <class S>
  void add_gated(std::span<const S> gate, MatrixView<const S> delta, MatrixView<S> total) {
    const S g = std::tanh(gate[0]);
    for_rows(delta.rows, [&](Index t) {
      for (Index j = 0; j < delta.cols; ++j) total(t, j) += g * delta(t, j);
    });
  }

  template <class S>
  void gate_gradient(std::span<const S> gate, MatrixView<const S> delta, MatrixView<const S> dtotal,
                     MatrixView<S> ddelta, std::span<S> dgate) {
    const S g = std::tanh(gate[0]);
    S along = 0;
    for (Index t = 0; t < delta.rows; ++t) along += cpu::dot(dtotal.row(t), delta.row(t), delta.cols);
    scale(dtotal, g, ddelta);
    if (!dgate.empty()) dgate[0] += (S{1} - g * g) * along;
  }

  template <class S>
  void sum_of_squares(std::span<const S> values, double* result) {
    double total = 0;
    for (std::size_t i = 0; i < values.size(); i += 4096) {
      const auto n = static_cast<Index>(std::min<std::size_t>(4096, values.size() - i));
      total += static_cast<double>(cpu::dot(values.data() + i, values.data() + i, n));
    }
    *result = total;
  }

  template <class S>
  void adamw(std::span<S> values, std::span<const S> gradients, std::span<S> first_moment, std::span<S> second_moment,
             const AdamWStep& step, const double* gradient_scale) {
    const auto n = static_cast<Index>(values.size());
    const S beta1 = static_cast<S>(step.beta1), beta2 = static_cast<S>(step.beta2);
    const S rate = static_cast<S>(step.learning_rate / (1 - std::pow(step.beta1, static_cast<double>(step.step))));
    const S correction = static_cast<S>(1 / std::sqrt(1 - std::pow(step.beta2, static_cast<double>(step.step))));
    const S keep = static_cast<S>(1 - step.learning_rate * step.weight_decay);
    const S epsilon = static_cast<S>(step.epsilon), factor = static_cast<S>(*gradient_scale);
    constexpr Index tile = 4096;
    pool_.for_each_tile(ceil_divide(n, tile), [&](Index i, int) {
      S* value = values.data();
      const S* gradient = gradients.data();
      S* m = first_moment.data();
      S* v = second_moment.data();
      for (Index j = i * tile; j < std::min(n, (i + 1) * tile); ++j) {
        const S g = factor * gradient[j];
        m[j] = beta1 * m[j] + (S{1} - beta1) * g;
        v[j] = beta2 * v[j] + (S{1} - beta2) * g * g;
        value[j] = keep * value[j] - rate * m[j] / (correction * std::sqrt(v[j]) + epsilon);
      }
    });
  }

 private:
  /// Steps of rotate().
  template <class S>
  struct EightValues {
    typedef S Type __attribute__((vector_size(8 * sizeof(S))));  // NOLINT(modernize-use-using)
  };
  template <class S>
  struct OneValue {
    using Type = S;
  };

  template <class S>
  struct DenseForm {
    Matrix<S> values;
    std::size_t bytes() const { return values.bytes(); }
  };

  cpu::Scratch scratch_;  // one for each thread
  MakeProducts make_products_;
  std::unique_ptr<cpu::Products> products_;
};

static_assert(Backend<CpuBackend>);

}  // namespace calm::inline CALM_ABI
