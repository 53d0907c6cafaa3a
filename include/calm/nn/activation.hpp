// Activation functions as policies: value and derivative, on scalars and on chunks of values alike.
#pragma once

#include <calm/core/config.hpp>

#include <cmath>
#include <type_traits>

namespace calm::inline CALM_ABI {

/// x sigmoid(x), the activation of SwiGLU (Shazeer, arXiv 2002.05202).
struct Silu {
  template <class A>
  static A value(const A& x) {
    using std::exp;
    return x / (exp(-x) + 1);
  }
  template <class A>
  static A derivative(const A& x) {
    using std::exp;
    const A sigmoid = 1 / (exp(-x) + 1);
    return sigmoid * (x * (1 - sigmoid) + 1);
  }
};

/// The tanh form of GELU (Hendrycks and Gimpel, arXiv 1606.08415), as GPT-2 and Gemma use it.
struct GeluTanh {
  template <class A>
  static A value(const A& x) {
    using std::tanh;
    const A inner = tanh(x * (x * x * 0.044715F + 1) * 0.7978845608028654F);
    return x * (inner + 1) * 0.5F;
  }
  template <class A>
  static A derivative(const A& x) {
    using std::tanh;
    const A square = x * x;
    const A inner = tanh(x * (square * 0.044715F + 1) * 0.7978845608028654F);
    return (inner + 1) * 0.5F + x * (1 - inner * inner) * (square * 0.134145F + 1) * 0.3989422804014327F;
  }
};

/// GELU itself, with the error function, as GPT-NeoX uses it.
struct Gelu {
  template <class A>
  static A value(const A& x) {
    return x * cumulative(x);
  }
  template <class A>
  static A derivative(const A& x) {
    using std::exp;
    return cumulative(x) + x * exp(x * x * (-0.5F)) * 0.3989422804014327F;
  }

 private:
  /// The normal distribution function.
  template <class A>
  static A cumulative(const A& x) {
    constexpr double root_half = 0.70710678118654752;
    if constexpr (std::is_floating_point_v<A>) {
      return static_cast<A>(0.5) * std::erfc(-x * static_cast<A>(root_half));
    } else {
      return x.unaryExpr([](auto v) { return cumulative(v); });
    }
  }
};

}  // namespace calm::inline CALM_ABI
