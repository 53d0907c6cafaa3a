// Rows of values in vectors, each element met by the same instructions wherever its row begins and ends: a tail that
// is computed one value at a time would have other bits.
#pragma once

#include <calm/core/arithmetic.hpp>

#include <Eigen/Core>

#include <algorithm>

namespace calm::inline CALM_ABI::cpu {

inline constexpr Index chunk = 16;  // whole vectors of any machine
template <class S>
using Chunk = Eigen::Array<S, chunk, 1>;

/// n <= chunk values, the rest zero.
template <class S>
Chunk<S> load(const S* source, Index n) {
  if (n == chunk) return Eigen::Map<const Chunk<S>>(source);
  Chunk<S> values = Chunk<S>::Zero();
  std::copy_n(source, n, values.data());
  return values;
}
template <class S>
void store(S* target, Index n, const Chunk<S>& values) {
  if (n == chunk) Eigen::Map<Chunk<S>>{target} = values;
  else std::copy_n(values.data(), n, target);
}

template <class S, class Fn>
void for_chunks(Index count, Fn&& fn) {
  for (Index j = 0; j < count; j += chunk) fn(j, std::min(chunk, count - j));
}

/// The sum of term(j) in an order that depends on nothing but the count.
template <class Term>
auto sum(Index count, Term term) {
  using S = decltype(term(Index{0}));
  constexpr Index lanes = 16;
  S partial[lanes] = {};
  Index j = 0;
  for (; j + lanes <= count; j += lanes)
    for (Index i = 0; i < lanes; ++i) partial[i] += term(j + i);
  for (Index i = 0; j < count; ++i, ++j) partial[i] += term(j);
  for (Index width = lanes / 2; width > 0; width /= 2)
    for (Index i = 0; i < width; ++i) partial[i] += partial[i + width];
  return partial[0];
}

template <class S>
S dot(const S* a, const S* b, Index count) {
  return sum(count, [=](Index j) { return a[j] * b[j]; });
}

}  // namespace calm::inline CALM_ABI::cpu
