// Backend: the operations that a device offers to the modules of nn/ and compose/.
//
// All are over views of row-major matrices; a row is a token. `reference` states each operation in plain loops and is
// the oracle of the others. Kernels are templates on the scalar, never on a model, and no module reads a value on the
// host.
#pragma once

#include <calm/tensor/arena.hpp>
#include <calm/tensor/stored_matrix.hpp>

#include <concepts>
#include <span>

namespace calm::inline CALM_ABI {

/// How an operation writes its result: over what was there, or added to it.
struct Assign {};
struct Accumulate {};

template <class Mode>
concept WriteMode = std::same_as<Mode, Assign> || std::same_as<Mode, Accumulate>;

/// As a value, for an operation that both modes share.
constexpr bool adds(Assign) { return false; }
constexpr bool adds(Accumulate) { return true; }

/// The keys that a query may see: [begin, end), counted from the first key of its sequence.
struct VisibleRange {
  Index begin = 0, end = 0;
};

/// Positions that a cache has memory for are a multiple of this: of what any backend lays side by side.
inline constexpr Index cache_step = 64;

/// Query heads share the key and value heads in equal groups.
struct HeadShape {
  Index query_heads = 1, kv_heads = 1;
  Index width = 1;  // of one head
};

/// One sequence of a ragged batch: rows [first_query, first_query + queries) of the queries, and its own keys and
/// values, whose rows of kv_heads * width values lie `stride` apart. The keys of a cache lie as append_keys() wrote
/// them.
template <class Scalar>
struct AttentionSequence {
  Index first_query = 0, queries = 0;
  const Scalar* keys = nullptr;
  const Scalar* values = nullptr;
  Index stride = 0;
  Index key_count = 0;
  bool cached = false;
  Scalar* key_gradients = nullptr;    // backward only: overwritten, laid out as the keys
  Scalar* value_gradients = nullptr;  // backward only: overwritten
};

/// y = x W^T for a frozen W [out, in], one of several products with the same x.
template <class Scalar>
struct FrozenProduct {
  const StoredMatrix* weight = nullptr;
  MatrixView<Scalar> y;
};

/// One step of AdamW (Loshchilov and Hutter, 2019): decay is decoupled from the gradient.
struct AdamWStep {
  double learning_rate = 1e-3, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0;
  Index step = 1;  // counted from 1, for the bias corrections
};

/// What every backend offers; the comments are the contract. S is float or double, W the backend's form of a weight
/// [out, in], T rows of tokens. Unless a WriteMode says otherwise results are overwritten.
template <class B>
concept Backend = requires(B backend, const StoredMatrix& stored, MatrixView<const float> in, MatrixView<float> out,
                           std::span<const float> vector, std::span<float> values, std::span<const TokenId> ids,
                           std::span<const Index> positions, std::span<const VisibleRange> visible,
                           std::span<const AttentionSequence<float>> sequences, HeadShape heads, AdamWStep adamw,
                           std::span<const FrozenProduct<float>> products, double* sum) {
  typename B::Memory;

  // The form of a frozen weight that multiply() takes; made once and kept with the weight.
  backend.template packed<float>(stored);
  // y = x W^T                                                     [T, in] -> [T, out]
  backend.multiply(in, in, out, Assign{});
  // the same for each of these: where a token is decoded they are quicker together
  backend.multiply_each(in, products);
  // dx = dy W                                                     [T, out] -> [T, in]
  backend.multiply_input_gradient(in, in, out, Assign{});
  // dW += dy^T x                                                  [T, out], [T, in] -> [out, in]
  backend.multiply_weight_gradient(in, in, out);
  // y[t] = table[ids[t]]; ids must lie in the table
  backend.gather(stored, ids, out);
  backend.gather(in, ids, out);
  // dtable[ids[t]] += dy[t], in the order of t
  backend.scatter_add(ids, in, out);
  // to[t] = from[rows[t]], and the inverse to[rows[t]] += from[t] for distinct rows
  backend.gather_rows(in, positions, out);
  backend.scatter_rows(in, positions, out);
  // y = x / rms(x) * weight, rms(x) = sqrt(mean(x^2) + epsilon); inverse_rms[t] is kept for the gradient
  backend.rms_norm(in, vector, 1e-6, out, values);
  // arguments: dy, x, weight, inverse_rms, dx, mode; and dweight += ... from dy, x, inverse_rms
  backend.rms_norm_input_gradient(in, in, vector, vector, out, Assign{});
  backend.rms_norm_weight_gradient(in, in, vector, values);
  // y = (x - mean(x)) / deviation(x) * weight + bias; mean and inverse_deviation are kept for the gradient
  backend.layer_norm(in, vector, vector, 1e-6, out, values, values);
  // arguments: dy, x, weight, mean, inverse_deviation, dx, mode; and dweight += ... from dy, x, mean, inverse_deviation
  backend.layer_norm_input_gradient(in, in, vector, vector, vector, out, Assign{});
  backend.layer_norm_weight_gradient(in, in, vector, vector, values);
  // y[t] += bias; and dbias += the sum of dy[t]
  backend.add_bias(vector, out);
  backend.add_columns(in, values);
  // y[t] = x[t] * factors, column by column; and sums[j] += the sum over t of a[t, j] b[t, j]
  backend.scale_columns(in, vector, out, Assign{});
  backend.add_column_products(in, in, values);
  // cos and sin of position * frequency                           [T, frequencies]
  backend.rotary_angles(positions, vector, out, out);
  // rotates pairs (i, i + frequencies) of each head in place; direction +1 forward, -1 backward
  backend.rotate(out, in, in, Index{1}, 1);
  // y[t] = sum over visible s of softmax_s(q[t] k[s]^T / sqrt(width)) v[s], 0 where nothing is visible;
  // log_sum_exp [T, query_heads] is kept for the gradient
  backend.attention(in, sequences, visible, heads, out, out);
  // writes the keys of positions first, first + 1, ... into those of a cache, in the order in which this backend's
  // attention reads them; first is at most what the cache holds, and what lay behind it is lost; a cache has memory for
  // whole steps of cache_step positions
  backend.append_keys(in, Index{0}, out);
  // arguments: q, sequences (with gradients, not cached), visible, heads, y, log_sum_exp, dy, dq
  backend.attention_backward(in, sequences, visible, heads, in, in, in, out);
  // loss[t] = -log softmax(logits[t])[target]; dlogits = scale * gradient, and may be the logits themselves
  backend.cross_entropy(in, ids, 1.0, values, out);
  // y = 0;  y += x;  y = a x
  backend.set_zero(out);
  backend.add(in, out);
  backend.scale(in, 1.0, out);
  // total += tanh(gate) delta, and its gradients: ddelta = tanh(gate) dtotal, dgate += (1 - tanh^2) <dtotal, delta>
  backend.add_gated(vector, in, out);
  backend.gate_gradient(vector, in, in, out, values);
  // *sum = sum of squares, in a fixed order
  backend.sum_of_squares(vector, sum);
  // one update: values, gradients * *gradient_scale, first and second moment
  backend.adamw(values, vector, values, values, adamw, static_cast<const double*>(sum));
};

/// What a run owns: a backend and the memory for its activations. One thread uses a context at a time.
template <class BackendType>
struct Context {
  using Backend = BackendType;

  /// `threads` 0: one for each core. The options are those of the backend.
  template <class... Options>
  explicit Context(int threads = 0, const Options&... options) : backend(threads, options...) {}

  BackendType backend;
  Arena<typename BackendType::Memory> arena;
};

}  // namespace calm::inline CALM_ABI
