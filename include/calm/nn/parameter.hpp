// Parameters: the values that an optimizer may change, and the one contiguous range that holds their gradients.
//
// A module offers `visit(self, prefix, fn)`, which calls fn(name, weight) for each of its weights in a fixed order,
// where weight is a Parameter (trainable) or a StoredMatrix (frozen). Everything that walks over weights is built on
// it: the optimizer, checkpoints, counters, the gradient checker.
#pragma once

#include <calm/backend/backend.hpp>
#include <calm/core/random.hpp>

#include <cmath>
#include <string>
#include <vector>

namespace calm::inline CALM_ABI {

/// A trainable matrix. `offset` is where its gradient begins in Gradients, set by assign_offsets().
template <class Scalar>
struct Parameter {
  Matrix<Scalar> value;
  bool decay = true;  // whether weight decay applies: to matrices, not to norms and gates
  Index offset = -1;
  bool table = false;  // whether its rows belong to tokens: of an embedding, an output head

  /// As files hold it: norms and gates are vectors, all else matrices [out, in].
  std::vector<Index> shape() const {
    return decay ? std::vector<Index>{value.rows(), value.cols()} : std::vector<Index>{value.cols()};
  }
};

/// Calls fn(name, parameter) for every trainable weight of a module, in a fixed order.
template <class Module, class Fn>
void for_each_parameter(Module& module, Fn&& fn, const std::string& prefix = "") {
  std::remove_const_t<Module>::visit(module, prefix, [&](const std::string& name, auto& weight) {
    if constexpr (requires { weight.offset; }) fn(name, weight);
  });
}

/// Calls fn(name, weight) for every weight of a module, frozen ones as StoredMatrix.
template <class Module, class Fn>
void for_each_weight(Module& module, Fn&& fn, const std::string& prefix = "") {
  std::remove_const_t<Module>::visit(module, prefix, fn);
}

/// Gives every parameter its place in the gradient range and returns the number of trainable values.
template <class Module>
Index assign_offsets(Module& module) {
  Index count = 0;
  for_each_parameter(module, [&](const std::string&, auto& parameter) {
    parameter.offset = count;
    count += parameter.value.size();
  });
  return count;
}

/// The first trainable weight that holds NaN or infinity, as "NAME is nan"; empty where all are finite.
template <class Module>
std::string find_not_finite(const Module& module) {
  std::string found;
  for_each_parameter(module, [&](const std::string& name, const auto& parameter) {
    for (const auto value : parameter.value.values())
      if (found.empty() && !std::isfinite(value)) found = message(name, " is ", value);
  });
  return found;
}

template <class Module>
Index count_parameters(const Module& module) {
  Index count = 0;
  for_each_parameter(module, [&](const std::string&, const auto& parameter) { count += parameter.value.size(); });
  return count;
}

/// The gradients of all parameters of one model, contiguous and in the order of for_each_parameter.
template <class Scalar>
class Gradients {
 public:
  /// Zeros for every parameter of the model, whose offsets it assigns; the parameters must stay where they are.
  template <class Model>
  explicit Gradients(Model& model) : values_(1, assign_offsets(model)) {
    for_each_parameter(model, [&](const std::string&, auto& parameter) { parameters_.push_back(&parameter); });
  }

  MatrixView<Scalar> operator[](const Parameter<Scalar>& parameter) {
    return {values_.data() + parameter.offset, parameter.value.rows(), parameter.value.cols()};
  }
  /// Those of the model, in order.
  std::span<Parameter<Scalar>* const> parameters() const { return parameters_; }
  std::span<Scalar> values() { return values_.values(); }
  std::span<const Scalar> values() const { return values_.values(); }
  void set_zero() { std::fill(values_.values().begin(), values_.values().end(), Scalar{}); }

 private:
  Matrix<Scalar> values_;
  std::vector<Parameter<Scalar>*> parameters_;
};

/// Weights policies: what a module may do with its weights.
struct Frozen {
  static constexpr bool trainable = false;
  using Linear = Frozen;
  using Other = Frozen;  // norms, embeddings, the output head
};
struct Trainable {
  static constexpr bool trainable = true;
  using Linear = Trainable;
  using Other = Trainable;
};
/// Frozen weights with a trained low-rank addition in every linear map (Hu et al., arXiv 2106.09685).
struct Lora {
  static constexpr bool trainable = true;
  using Linear = Lora;
  using Other = Frozen;
};

/// Runs a module's backward, with gradients of its weights where it has trainable ones and the caller gave some.
template <class Module, class... Grads>
void backward_through(const Module& module, auto backward, Grads&... grads) {
  static_assert(sizeof...(Grads) <= 1);
  if constexpr (Module::trainable) backward(module, grads...);
  else backward(module);
}

/// A source of weights for a model under construction: called with a name and the expected shape.
template <class Source>
concept WeightSource = requires(Source source, const std::string& name) {
  { source(name, Index{1}, Index{1}) } -> std::convertible_to<StoredMatrix>;
};

/// A number that depends on the text alone: the random stream of a weight's name (FNV-1a).
constexpr std::uint64_t stream_of(std::string_view text) {
  std::uint64_t hash = 0xCBF29CE484222325U;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3U;
  return hash;
}

/// Uniform in +-1/sqrt(in): the usual start of a linear map [out, in].
template <class Scalar>
Matrix<Scalar> random_linear(Index out, Index in, std::uint64_t seed, std::string_view name) {
  Matrix<Scalar> m(out, in);
  Random random(seed, stream_of(name));
  const double bound = 1 / std::sqrt(static_cast<double>(in));
  for (Scalar& x : m.values()) x = static_cast<Scalar>((2 * random.uniform() - 1) * bound);
  return m;
}

}  // namespace calm::inline CALM_ABI
