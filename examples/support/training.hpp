// What the larger examples share: any model is trained on batches, with a progress line, and what that costs.
#pragma once

#include <calm/backend/cpu.hpp>
#include <calm/evaluate/progress.hpp>
#include <calm/train/checkpoint.hpp>

#include <chrono>

namespace examples {

using calm::Index;
using Ctx = calm::Context<calm::CpuBackend>;

inline double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct TrainingCost {
  Index parameters = 0;
  double seconds = 0, tokens = 0;
};

template <class Model>
using Batches = std::function<std::vector<calm::TrainingBatch<Model>>(Index)>;

/// Runs the schedule; `watch(step, loss)` is called after each step and its time is not counted. `max_shares` is that
/// of calm::Trainer.
template <class Model, class Optimizer = calm::AdamW<float>>
TrainingCost train(Ctx& ctx, Model& model, const std::string& name, const calm::CosineSchedule& schedule,
                   const typename Optimizer::Options& options, const Batches<Model>& batches,
                   const std::function<void(Index, double)>& watch = {}, Index max_shares = calm::usual_shares) {
  calm::Trainer<Model, Ctx, Optimizer> trainer(ctx, model, schedule, options, max_shares);
  calm::Progress progress(name, schedule.steps);
  TrainingCost cost{calm::count_parameters(model)};
  const auto start = std::chrono::steady_clock::now();
  double watching = 0, loss = 0;
  calm::run_training(trainer, batches, {}, {}, [&](const calm::StepReport& report) {
    cost.tokens += static_cast<double>(report.result.tokens);
    loss = report.step == 1 ? report.result.loss : 0.95 * loss + 0.05 * report.result.loss;
    cost.seconds = seconds_since(start) - watching;
    progress.update(report.step, [&] {
      return calm::message("loss ", calm::fixed(loss, 3), "  ", calm::fixed(cost.tokens / cost.seconds, 0),
                           " tokens/s");
    });
    const auto before = std::chrono::steady_clock::now();
    if (watch) watch(report.step, report.result.loss);
    watching += seconds_since(before);
  });
  progress.finish(calm::message("loss ", calm::fixed(loss, 3), "  ",
                                calm::fixed(cost.tokens / std::max(1e-9, cost.seconds), 0), " tokens/s"));
  return cost;
}

}  // namespace examples
