// Rows of values in vectors, each element met by the same instructions wherever its row begins and ends: a tail that
// is computed one value at a time would have other bits.
#pragma once

#include <calm/core/arithmetic.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cstring>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace calm::inline CALM_ABI::cpu {

#if defined(__AVX512F__)
inline constexpr Index vector_bytes = 64;
#elif defined(__AVX__)
inline constexpr Index vector_bytes = 32;
#else
inline constexpr Index vector_bytes = 16;
#endif

/// A vector of the machine at any address. A typedef, since clang does not keep the alignment of an alias template.
template <class S>
struct VectorOf {
  typedef S Type
      __attribute__((vector_size(vector_bytes), aligned(alignof(S)), may_alias));  // NOLINT(modernize-use-using)
};
template <class S>
using Vector = typename VectorOf<S>::Type;

template <class S>
inline constexpr Index lanes_of = vector_bytes / static_cast<Index>(sizeof(S));

/// a b + sum, rounded once where the machine can. Sums of products are asked for by this name: a compiler that is left
/// to itself takes two instructions in some places (GCC for some AMD processors, in a chain that stands alone), so that
/// the same sum would have other bits from one function, or one machine, to the next.
template <class S>
[[gnu::always_inline]] inline Vector<S> multiply_add(Vector<S> a, Vector<S> b, Vector<S> sum) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>)
    return reinterpret_cast<Vector<S>>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
  else
    return reinterpret_cast<Vector<S>>(
        _mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(sum)));
#elif defined(__FMA__)
  if constexpr (std::is_same_v<S, float>)
    return reinterpret_cast<Vector<S>>(
        _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(sum)));
  else
    return reinterpret_cast<Vector<S>>(
        _mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(sum)));
#else
  return sum + a * b;
#endif
}

#if defined(__FMA__) || defined(__AVX512F__)
inline constexpr bool fused_multiply_add = true;  // multiply_add rounds once
#else
inline constexpr bool fused_multiply_add = false;
#endif

/// `value` in every lane; less a zero, which leaves -0 as it is, so that nothing is computed.
template <class S>
[[gnu::always_inline]] inline Vector<S> every_lane(S value) {
  return value - Vector<S>{};
}

inline constexpr Index chunk = 16;  // whole vectors of any machine

/// The sum of `chunk` values, which it uses up: halves are added to halves.
template <class T>
T sum_of_halves(T* values) {
  for (Index width = chunk / 2; width > 0; width /= 2)
    for (Index i = 0; i < width; ++i) values[i] = values[i] + values[i + width];
  return values[0];
}

/// `chunk` values, computed lane by lane in vectors of the machine; wider ones than it has would be copied through
/// memory at every use. The functions are Eigen's.
template <class S>
class Chunk {
 public:
  Chunk() = default;
  explicit Chunk(const S* source)
      : Chunk(each([&](Index p) { return *reinterpret_cast<const Vector<S>*>(source + p * lanes); })) {}
  explicit Chunk(S value) : Chunk(each([&](Index) { return every_lane(value); })) {}
  /// `count` values, the rest zero.
  Chunk(const S* source, Index count) {
    S padded[chunk];
    if (count < chunk) [[unlikely]] {
      Chunk(S{}).store(padded);
      copy_some(source, count, padded);
      source = padded;
    }
    *this = Chunk(source);
  }

  void store(S* target) const {
    each([&](Index p) { return *reinterpret_cast<Vector<S>*>(target + p * lanes) = part_[p]; });
  }
  /// The first `count` values.
  void store(S* target, Index count) const {
    if (count >= chunk) [[likely]]
      return store(target);
    S values[chunk];
    store(values);
    copy_some(values, count, target);
  }

  /// The first `count` values, the rest zero.
  Chunk head(Index count) const {
    if (count >= chunk) return *this;
    S values[chunk];
    store(values);
    return Chunk(values, count);
  }

  S operator[](Index i) const { return part_[i / lanes][i % lanes]; }
  void set(Index i, S value) { part_[i / lanes][i % lanes] = value; }

  /// In the same order on every machine.
  S sum() const {
    S values[chunk];
    store(values);
    return sum_of_halves(values);
  }
  S largest() const {
    S values[chunk];
    store(values);
    return *std::max_element(values, values + chunk);
  }

  friend Chunk operator-(const Chunk& a) {
    return each([&](Index p) { return -a.part_[p]; });
  }
  friend Chunk operator+(const Chunk& a, const Chunk& b) {
    return each([&](Index p) { return a.part_[p] + b.part_[p]; });
  }
  friend Chunk operator-(const Chunk& a, const Chunk& b) {
    return each([&](Index p) { return a.part_[p] - b.part_[p]; });
  }
  friend Chunk operator*(const Chunk& a, const Chunk& b) {
    return each([&](Index p) { return a.part_[p] * b.part_[p]; });
  }
  friend Chunk operator/(const Chunk& a, const Chunk& b) {
    return each([&](Index p) { return a.part_[p] / b.part_[p]; });
  }
  friend Chunk operator+(const Chunk& a, S b) { return a + Chunk(b); }
  friend Chunk operator-(const Chunk& a, S b) { return a - Chunk(b); }
  friend Chunk operator*(const Chunk& a, S b) { return a * Chunk(b); }
  friend Chunk operator-(S a, const Chunk& b) { return Chunk(a) - b; }
  friend Chunk operator/(S a, const Chunk& b) { return Chunk(a) / b; }
  friend Chunk multiply_add(const Chunk& a, const Chunk& b, const Chunk& sum) {
    return each([&](Index p) { return cpu::multiply_add<S>(a.part_[p], b.part_[p], sum.part_[p]); });
  }
  friend Chunk max(const Chunk& a, const Chunk& b) { return where_less(b, a, a, b); }
  /// `then` in the lanes in which a is less than b, `otherwise` elsewhere.
  friend Chunk where_less(const Chunk& a, const Chunk& b, const Chunk& then, const Chunk& otherwise) {
    return each([&](Index p) { return a.part_[p] < b.part_[p] ? then.part_[p] : otherwise.part_[p]; });
  }
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
    S values[chunk];
    store(values);
    for (S& value : values) value = fn(value);
    return Chunk(values);
  }

 private:
  static constexpr Index lanes = lanes_of<S>, parts = chunk / lanes;

  /// The vectors fn(0), fn(1), ...: written out, which compiles quicker than a loop that is unrolled.
  template <class Fn>
  [[gnu::always_inline]] static Chunk each(const Fn& fn) {
    static_assert(parts <= 8);
    Chunk result;
    result.part_[0] = fn(0);
    if constexpr (parts > 1) result.part_[1] = fn(1);
    if constexpr (parts > 2) result.part_[2] = fn(2), result.part_[3] = fn(3);
    if constexpr (parts > 4)
      result.part_[4] = fn(4), result.part_[5] = fn(5), result.part_[6] = fn(6), result.part_[7] = fn(7);
    return result;
  }

  /// At most 32 bytes at a time: Eigen has other code, of other bits, for wider vectors.
  template <class Fn>
  [[gnu::always_inline]] Chunk mapped(const Fn& fn) const {
    constexpr Index width = std::min<Index>(lanes, 32 / static_cast<Index>(sizeof(S)));
    Chunk result = *this;
    for (Vector<S>& values : result.part_)
      for (Index i = 0; i < lanes; i += width) {
        Eigen::Map<Eigen::Array<S, width, 1>> array(reinterpret_cast<S*>(&values) + i);
        array = fn(array);
      }
    return result;
  }

  /// Fewer than `chunk` values, in pieces of whole words. A call, since it stands behind every load and store and is
  /// hardly needed.
  [[gnu::noinline]] static void copy_some(const S* source, Index count, S* target) {
#pragma GCC unroll 4
    for (Index piece = chunk / 2; piece > 0; piece /= 2) {
      if ((count & piece) == 0) continue;
      std::memcpy(target, source, static_cast<std::size_t>(piece) * sizeof(S));
      source += piece;
      target += piece;
    }
  }

  Vector<S> part_[parts];
};

/// n <= chunk values, the rest zero.
template <class S>
Chunk<S> load(const S* source, Index n) {
  return Chunk<S>(source, n);
}
template <class S>
void store(S* target, Index n, const Chunk<S>& values) {
  values.store(target, n);
}

template <class S, class Fn>
void for_chunks(Index count, Fn&& fn) {
  for (Index j = 0; j < count; j += chunk) fn(j, std::min(chunk, count - j));
}

/// The sum of first(j, n) second(j, n), which give the n values from j on, in an order that depends on nothing but the
/// count.
template <class S>
S sum_of_products(Index count, const auto& first, const auto& second) {
  Chunk<S> total(S{});
  for_chunks<S>(count, [&](Index j, Index n) { total = multiply_add(first(j, n).head(n), second(j, n), total); });
  return total.sum();
}

template <class S>
S dot(const S* a, const S* b, Index count) {
  return sum_of_products<S>(
      count, [=](Index j, Index n) { return load(a + j, n); }, [=](Index j, Index n) { return load(b + j, n); });
}

}  // namespace calm::inline CALM_ABI::cpu
