// Trains one model on a task, with a progress line and, where asked for, a learning curve.
#pragma once

#include "tasks.hpp"

#include <calm/backend/cpu.hpp>
#include <calm/evaluate/progress.hpp>
#include <calm/train/checkpoint.hpp>

#include <chrono>

namespace key_value {

using Ctx = calm::Context<calm::CpuBackend>;

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct TrainingPlan {
  Index steps = 0, batch = 64;  // examples a step
  double learning_rate = 1e-3;
  Index warmup = 100;
  double weight_decay = 0.01;
  std::uint64_t seed = 1;
};

/// `task(step)` is the task of a step; `watch(step, loss)` is called after each.
template <class Model>
double train(Ctx& ctx, Model& model, const std::string& name, const TrainingPlan& plan,
             const std::function<Task(Index)>& task, const std::function<void(Index, double)>& watch = {}) {
  using Trainer = calm::Trainer<Model, Ctx>;
  const auto start = std::chrono::steady_clock::now();
  Trainer trainer(ctx, model, calm::CosineSchedule{plan.learning_rate, plan.warmup, plan.steps, 0.02},
                  calm::AdamWOptions{.weight_decay = plan.weight_decay});
  calm::Progress progress(name, plan.steps);
  calm::PackedBatch batch;
  Index tokens = 0;
  double watching = 0;
  calm::run_training<Model, Ctx>(
      trainer,
      [&](Index step) {
        batch = batch_of(task(step), plan.seed, step, plan.batch);
        return std::vector<calm::TrainingBatch<Model>>{{&batch, nullptr}};
      },
      {}, {},
      [&](const calm::StepReport& report) {
        tokens += report.result.tokens;
        progress.update(report.step, [&] {
          const double rate = static_cast<double>(tokens) / std::max(1e-9, seconds_since(start) - watching);
          return calm::message("loss ", calm::fixed(report.result.loss, 3), "  ", calm::fixed(rate, 0), " tokens/s");
        });
        const auto before = std::chrono::steady_clock::now();
        if (watch) watch(report.step, report.result.loss);
        watching += seconds_since(before);
      });
  const double seconds = seconds_since(start) - watching;
  progress.finish(calm::message(calm::fixed(static_cast<double>(tokens) / seconds, 0), " tokens/s"));
  return seconds;
}

}  // namespace key_value
