// Rows of values in vectors, each element met by the same instructions wherever its row begins and ends: a tail that
// is computed one value at a time would have other bits.
#pragma once

#include <calm/core/arithmetic.hpp>

#include <Eigen/Core>

#include <algorithm>

namespace calm::inline CALM_ABI::cpu {

inline constexpr Index chunk = 16;  // whole vectors of any machine

/// The sum of `chunk` values, which it uses up: halves are added to halves.
template <class T>
T sum_of_halves(T* values) {
  for (Index width = chunk / 2; width > 0; width /= 2)
    for (Index i = 0; i < width; ++i) values[i] = values[i] + values[i + width];
  return values[0];
}

/// `chunk` values, computed lane by lane. The compiler makes vectors of them; the functions are Eigen's.
template <class S>
class Chunk {
 public:
  typedef S Lanes __attribute__((vector_size(chunk * sizeof(S)), aligned(alignof(S)),
                                 may_alias));  // NOLINT(modernize-use-using)
  Lanes lanes;

  Chunk() = default;
  explicit Chunk(const S* source) : lanes(*reinterpret_cast<const Lanes*>(source)) {}
  explicit Chunk(S value) : lanes(Lanes{} + value) {}
  void store(S* target) const { *reinterpret_cast<Lanes*>(target) = lanes; }
  S operator[](Index i) const { return lanes[i]; }

  /// In the same order on every machine.
  S sum() const {
    S values[chunk];
    store(values);
    return sum_of_halves(values);
  }
  S largest() const { return array(*this).maxCoeff(); }

  friend Chunk operator-(const Chunk& a) { return from(-a.lanes); }
  friend Chunk operator+(const Chunk& a, const Chunk& b) { return from(a.lanes + b.lanes); }
  friend Chunk operator-(const Chunk& a, const Chunk& b) { return from(a.lanes - b.lanes); }
  friend Chunk operator*(const Chunk& a, const Chunk& b) { return from(a.lanes * b.lanes); }
  friend Chunk operator/(const Chunk& a, const Chunk& b) { return from(a.lanes / b.lanes); }
  friend Chunk operator+(const Chunk& a, S b) { return from(a.lanes + b); }
  friend Chunk operator-(const Chunk& a, S b) { return from(a.lanes - b); }
  friend Chunk operator*(const Chunk& a, S b) { return from(a.lanes * b); }
  friend Chunk operator-(S a, const Chunk& b) { return from(a - b.lanes); }
  friend Chunk operator/(S a, const Chunk& b) { return from(a / b.lanes); }
  friend Chunk max(const Chunk& a, const Chunk& b) { return from(a.lanes > b.lanes ? a.lanes : b.lanes); }
  friend Chunk exp(const Chunk& a) {
    return a.mapped([](const auto& x) { return x.exp(); });
  }
  friend Chunk log(const Chunk& a) {
    return a.mapped([](const auto& x) { return x.log(); });
  }
  friend Chunk tanh(const Chunk& a) {
    return a.mapped([](const auto& x) { return x.tanh(); });
  }

  /// fn of each lane.
  template <class Fn>
  Chunk unaryExpr(const Fn& fn) const {
    Chunk result;
    for (Index i = 0; i < chunk; ++i) result.lanes[i] = fn(lanes[i]);
    return result;
  }

 private:
  static Chunk from(const Lanes& lanes) {
    Chunk result;
    result.lanes = lanes;
    return result;
  }

  using Array = Eigen::Array<S, chunk, 1>;
  static Eigen::Map<const Array> array(const Chunk& a) {
    return Eigen::Map<const Array>(reinterpret_cast<const S*>(&a.lanes));
  }

  template <class Fn>
  Chunk mapped(Fn fn) const {
    Chunk result;
    Eigen::Map<Array>(reinterpret_cast<S*>(&result.lanes)) = fn(array(*this));
    return result;
  }
};

/// n <= chunk values, the rest zero.
template <class S>
Chunk<S> load(const S* source, Index n) {
  if (n == chunk) return Chunk<S>(source);
  S values[chunk] = {};
  std::copy_n(source, n, values);
  return Chunk<S>(values);
}
template <class S>
void store(S* target, Index n, const Chunk<S>& values) {
  if (n == chunk) return values.store(target);
  S all[chunk];
  values.store(all);
  std::copy_n(all, n, target);
}

template <class S, class Fn>
void for_chunks(Index count, Fn&& fn) {
  for (Index j = 0; j < count; j += chunk) fn(j, std::min(chunk, count - j));
}

/// The sum of term(j) in an order that depends on nothing but the count.
template <class Term>
auto sum(Index count, Term term) {
  using S = decltype(term(Index{0}));
  S partial[chunk] = {};
  Index j = 0;
  for (; j + chunk <= count; j += chunk)
    for (Index i = 0; i < chunk; ++i) partial[i] += term(j + i);
  for (Index i = 0; j < count; ++i, ++j) partial[i] += term(j);
  return sum_of_halves(partial);
}

template <class S>
S dot(const S* a, const S* b, Index count) {
  return sum(count, [=](Index j) { return a[j] * b[j]; });
}

}  // namespace calm::inline CALM_ABI::cpu
