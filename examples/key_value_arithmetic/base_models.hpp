// The two models that the composition starts from: their sizes, and how they were trained.
#pragma once

#include "training.hpp"

#include <calm/io/model_folder.hpp>
#include <calm/model/random_weights.hpp>
#include <calm/model/transformer.hpp>
#include <calm/model/zoo/llama.hpp>

namespace key_value {

using BaseModel = calm::Transformer<calm::zoo::Llama>;
using TrainedModel = calm::Transformer<calm::zoo::Llama, calm::Trainable>;
using BasePointer = std::shared_ptr<const BaseModel>;

inline calm::ModelSpec small_spec(Index width, Index blocks, Index heads) {
  return {.vocabulary = vocabulary,
          .width = width,
          .hidden = (width * 8 / 3 + 7) / 8 * 8,
          .blocks = blocks,
          .heads = {heads, heads, width / heads},
          .context = 256,
          .tied_embeddings = true};
}

inline calm::ModelSpec key_value_spec() { return small_spec(96, 3, 8); }
inline calm::ModelSpec arithmetic_spec() { return small_spec(128, 4, 8); }

/// The model as it ships: bf16, frozen.
inline BasePointer freeze(const TrainedModel& model) {
  const auto weights = calm::weights_of(model);
  return std::make_shared<const BaseModel>(model.spec(), [&](const std::string& name, Index rows, Index cols) {
    return calm::StoredMatrix::from(weights(name, rows, cols).template dense<float>(), calm::DType::bf16);
  });
}

/// How a model starts, and what it is trained on.
struct Course {
  std::string name;
  calm::ModelSpec spec;
  TrainingPlan plan;
  TaskOfStep task;
};

/// m_A learns the dictionary: with a tenth of the keys it learns to find the k-th key, then all keys follow. Many rows
/// of a single key would teach it to read the first key only.
inline Course key_value_course(const Dictionary& dictionary, std::uint64_t seed, double effort) {
  const TrainingPlan plan{
      .steps = static_cast<Index>(effort * 7200), .batch = 64, .learning_rate = 2e-3, .seed = seed, .max_shares = 1};
  const auto& keys = dictionary.keys();
  const Task few =
      substitution(dictionary, {keys.begin(), keys.begin() + dictionary.size() / 10}, {0.05, 0.45, 0.35, 0.15});
  const Task all = substitution(dictionary, keys, {0.05, 0.40, 0.35, 0.20}, 0.5);
  const Task longer = substitution(dictionary, keys, {0.05, 0.25, 0.35, 0.35}, 0.5);
  return {"m_A, key-value", key_value_spec(), plan, [=](Index step) {
            return step < plan.steps / 10 ? few : step < plan.steps / 2 ? all : longer;
          }};
}

/// m_B learns to calculate: two operands until that works, then the rest.
inline Course arithmetic_course(const Dictionary& dictionary, std::uint64_t seed, double effort) {
  const TrainingPlan plan{.steps = static_cast<Index>(effort * 14400),
                          .batch = 64,
                          .learning_rate = 1.5e-3,
                          .warmup = 200,
                          .seed = seed,
                          .max_shares = 1};
  const Index largest = dictionary.size();
  const Task two = arithmetic(dictionary, {.operands = {0, 1}, .half_solved = 0, .largest = largest});
  const Task some = arithmetic(dictionary, {{0.02, 0.6, 0.38}, 0.15, 0.15, 0.3, 0.4, largest});
  const Task all = arithmetic(dictionary, {{0.02, 0.33, 0.38, 0.27}, 0.25, 0.25, 0.3, 0.4, largest});
  return {"m_B, arithmetic", arithmetic_spec(), plan, [=](Index step) {
            return step < plan.steps / 8 ? two : step < plan.steps / 4 ? some : all;
          }};
}

inline BasePointer train_base(Ctx& ctx, const Course& course) {
  TrainedModel model(course.spec, calm::RandomWeights{course.plan.seed, 0.05});
  train(ctx, model, course.name, course.plan, course.task);
  return freeze(model);
}

}  // namespace key_value
