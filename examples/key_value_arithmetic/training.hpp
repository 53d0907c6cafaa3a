// Trains one model on a task, with a progress line and, where asked for, a learning curve.
#pragma once

#include "../support/training.hpp"
#include "tasks.hpp"

namespace key_value {

using examples::Ctx;

struct TrainingPlan {
  Index steps = 0, batch = 64;  // examples a step
  double learning_rate = 1e-3;
  Index warmup = 100;
  double weight_decay = 0.01;
  std::uint64_t seed = 1;
  Index max_shares = calm::usual_shares;  // of a step; the bits of the weights depend on it
};

using TaskOfStep = std::function<Task(Index)>;

/// `watch(step, loss)` is called after each step. Returns the seconds of training.
template <class Model>
double train(Ctx& ctx, Model& model, const std::string& name, const TrainingPlan& plan, const TaskOfStep& task,
             const std::function<void(Index, double)>& watch = {}) {
  calm::PackedBatch batch;
  return examples::train<Model>(
             ctx, model, name, calm::CosineSchedule{plan.learning_rate, plan.warmup, plan.steps, 0.02},
             calm::AdamWOptions{.weight_decay = plan.weight_decay},
             [&](Index step) {
               batch = calm::PackedBatch(examples_of(task(step), plan.seed, step, plan.batch));
               return std::vector<calm::TrainingBatch<Model>>{{&batch, nullptr}};
             },
             watch, plan.max_shares)
      .seconds;
}

}  // namespace key_value
