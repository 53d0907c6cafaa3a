// Muon: its step against the formula in double, what it leaves to AdamW, and the promises of every optimizer.
#include <doctest/doctest.h>
#include <calm/backend/cpu_bf16.hpp>
#include <calm/backend/reference.hpp>
#include <calm/train/checkpoint.hpp>
#include <calm/train/muon.hpp>
#include <support/models.hpp>
#include <support/temporary_folder.hpp>

#include <Eigen/SVD>
#include <fstream>
#include <map>

namespace muon_test {
using namespace calm_test;
using calm::Example;
using calm::PackedBatch;

namespace {

using Trained = calm::Transformer<calm::zoo::Llama, calm::Trainable, float>;
using Reference = calm::Context<calm::ReferenceBackend>;
using Dense = Eigen::MatrixXd;

template <class Ctx, class Model>
using MuonTrainer = calm::Trainer<Model, Ctx, calm::Muon<float>>;

constexpr Index vocabulary = 17;
const calm::CosineSchedule schedule{.peak = 0.01, .warmup = 0, .steps = 6};

Trained make_model() {
  const calm::ModelSpec spec{
      .vocabulary = vocabulary, .width = 16, .hidden = 40, .blocks = 2, .heads = {4, 2, 4}, .context = 64};
  return {spec, TestWeights{1, calm::DType::f32}};
}

PackedBatch batch_of(std::uint64_t seed) {
  std::vector<Example> examples;
  for (std::uint64_t i = 0; i < 8; ++i)
    examples.push_back(
        {random_tokens(2, vocabulary, seed * 100 + 2 * i), random_tokens(5, vocabulary, seed * 100 + 2 * i + 1)});
  return PackedBatch(examples);
}

template <class Values>
Dense dense(const Values& values, Index rows, Index cols) {
  Dense result(rows, cols);
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < cols; ++j) result(i, j) = static_cast<double>(values[static_cast<std::size_t>(i * cols + j)]);
  return result;
}

std::map<std::string, Matrix<float>> weights_in(const Trained& model) {
  std::map<std::string, Matrix<float>> weights;
  calm::for_each_parameter(model, [&](const std::string& name, const auto& p) { weights.emplace(name, p.value); });
  return weights;
}

/// The weights after `steps` steps.
template <class Ctx>
std::map<std::string, Matrix<float>> trained(Ctx& ctx, Index steps) {
  Trained model = make_model();
  MuonTrainer<Ctx, Trained> trainer(ctx, model, schedule);
  for (Index step = 0; step < steps; ++step) trainer.step(batch_of(static_cast<std::uint64_t>(step)));
  return weights_in(model);
}

bool same_weights(const std::map<std::string, Matrix<float>>& a, const std::map<std::string, Matrix<float>>& b) {
  return a.size() == b.size() &&
         std::all_of(a.begin(), a.end(), [&](const auto& one) { return same_bits(one.second, b.at(one.first)); });
}

bool is_for_adamw(const std::string& name) {
  return contains(name, "norm") || contains(name, "embed") || contains(name, "lm_head");
}

}  // namespace

TEST_CASE("a step is that of Muon in double, for wide, tall and square matrices") {
  Cpu ctx(1);
  Trained model = make_model();
  const calm::MuonOptions options{.momentum = 0.9, .weight_decay = 2, .others = {.clip_norm = 0.5}};
  MuonTrainer<Cpu, Trained> trainer(ctx, model, schedule, options);
  std::map<std::string, Dense> momentum;
  for (Index step = 1; step <= 3; ++step) {
    const auto before = weights_in(model);
    const double norm = trainer.step(batch_of(static_cast<std::uint64_t>(step))).gradient_norm;
    REQUIRE(norm > 0.5);
    const double rate = schedule(step);
    calm::for_each_parameter(model, [&](const std::string& name, const auto& parameter) {
      if (is_for_adamw(name)) return;
      CAPTURE(name);
      const Index rows = parameter.value.rows(), cols = parameter.value.cols();
      const auto at = static_cast<std::size_t>(parameter.offset);
      const Dense gradient = dense(trainer.gradients().values().subspan(at), rows, cols) * (0.5 / norm);
      Dense& m = momentum.try_emplace(name, Dense::Zero(rows, cols)).first->second;
      m = 0.9 * m + gradient;
      Dense x = 0.9 * m + gradient;
      x /= x.norm();
      for (int i = 0; i < 5; ++i) {
        const Dense gram = x * x.transpose();
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram * gram) * x;
      }
      const double size = 0.2 * std::sqrt(static_cast<double>(std::max(rows, cols)));
      const Dense old = dense(before.at(name).values(), rows, cols);
      const Dense expected = (1 - 2 * rate) * old - rate * size * x;
      CHECK((dense(parameter.value.values(), rows, cols) - expected).cwiseAbs().maxCoeff() < 1e-4 * rate);
    });
  }
  CHECK(momentum.size() == 14);
}

TEST_CASE("every direction of a gradient moves a matrix about as far") {
  Cpu ctx(1);
  Trained model = make_model();
  MuonTrainer<Cpu, Trained> trainer(ctx, model, schedule, {.weight_decay = 0});
  const auto before = weights_in(model);
  trainer.step(batch_of(1));
  calm::for_each_parameter(model, [&](const std::string& name, const auto& parameter) {
    if (is_for_adamw(name)) return;
    CAPTURE(name);
    const Index rows = parameter.value.rows(), cols = parameter.value.cols();
    const Dense gradient =
        dense(trainer.gradients().values().subspan(static_cast<std::size_t>(parameter.offset)), rows, cols);
    const Dense moved = dense(before.at(name).values(), rows, cols) - dense(parameter.value.values(), rows, cols);
    const Eigen::JacobiSVD<Dense> svd(gradient, Eigen::ComputeThinU | Eigen::ComputeThinV);
    const Dense along = svd.matrixU().transpose() * moved * svd.matrixV() /
                        (schedule(1) * 0.2 * std::sqrt(static_cast<double>(std::max(rows, cols))));
    Index strong = 0;  // directions that five steps bring up
    for (Index i = 0; i < along.rows(); ++i) {
      if (svd.singularValues()(i) < 0.02 * svd.singularValues().norm()) continue;
      ++strong;
      CHECK(along(i, i) > 0.6);
      CHECK(along(i, i) < 1.3);
    }
    CHECK(strong >= 4);
    CHECK((along - Dense(along.diagonal().asDiagonal())).cwiseAbs().maxCoeff() < 0.01);
  });
}

TEST_CASE("norms, embeddings and the output head are left to AdamW") {
  Cpu ctx(1);
  Trained by_muon = make_model(), by_adamw = make_model();
  MuonTrainer<Cpu, Trained> muon(ctx, by_muon, schedule);
  calm::Trainer<Trained, Cpu> adamw(ctx, by_adamw, schedule);
  muon.step(batch_of(1));
  adamw.step(batch_of(1));
  const auto found = weights_in(by_muon), expected = weights_in(by_adamw);
  Index left = 0;
  for (const auto& weight : found) {
    const std::string& name = weight.first;
    CAPTURE(name);
    CHECK(same_bits(weight.second, expected.at(name)) == is_for_adamw(name));
    left += is_for_adamw(name);
  }
  CHECK(left == 7);
}

TEST_CASE("the backends agree, and the bits do not depend on the number of threads") {
  Cpu one(1), three(3), bf16(1, calm::bf16_products), bf16_two(2, calm::bf16_products);
  Reference reference;
  const auto expected = trained(one, 4);
  CHECK(same_weights(trained(three, 4), expected));
  const auto rounded = trained(bf16, 4);
  CHECK(same_weights(trained(bf16_two, 4), rounded));
  CHECK(!same_weights(rounded, expected));
  const auto plain = trained(reference, 1), first = trained(one, 1);
  for (const auto& weight : first) {
    CAPTURE(weight.first);
    CHECK(relative_difference(weight.second, plain.at(weight.first)) <
          1e-3);  // both optimizers magnify small gradients
  }
}

TEST_CASE("a run that is resumed ends with the same bits, and a checkpoint of the other optimizer is refused") {
  const TemporaryFolder folder;
  const auto path = folder.path / "last.safetensors";
  Cpu ctx(1);
  Trained whole = make_model(), model = make_model(), again = make_model();
  const auto go_on = [](auto& trainer, std::uint64_t first, std::uint64_t last) {
    for (std::uint64_t step = first; step < last; ++step) trainer.step(batch_of(step));
  };
  MuonTrainer<Cpu, Trained> straight(ctx, whole, schedule), trainer(ctx, model, schedule),
      resumed(ctx, again, schedule);
  go_on(straight, 0, 6);
  go_on(trainer, 0, 3);
  calm::save_checkpoint(trainer, path, 0, "");
  calm::load_checkpoint(resumed, path, "");
  go_on(resumed, 3, 6);
  CHECK(same_weights(weights_in(again), weights_in(whole)));
  Trained other = make_model();
  calm::Trainer<Trained, Cpu> adamw(ctx, other, schedule);
  const std::string error = message_of<calm::FormatError>([&] { calm::load_checkpoint(adamw, path, ""); });
  CHECK(contains(error, "Muon"));
  CHECK(contains(error, "AdamW"));
  CHECK(adamw.step_count() == 0);
  // A checkpoint that says nothing is one of AdamW.
  calm::save_checkpoint(adamw, path, 0, "");
  std::ifstream in(path, std::ios::binary);
  std::string bytes(std::istreambuf_iterator<char>(in), {});
  in.close();
  bytes.replace(bytes.find("\"optimizer\""), 11, "\"optimizes\"");
  std::ofstream(path, std::ios::binary) << bytes;
  calm::load_checkpoint(adamw, path, "");
  CHECK_THROWS_AS(calm::load_checkpoint(resumed, path, ""), calm::FormatError);
}

TEST_CASE("options that make no sense are refused by name") {
  Cpu ctx(1);
  Trained model = make_model();
  const auto refusal = [&](const calm::MuonOptions& options) {
    return message_of<calm::ConfigError>([&] { MuonTrainer<Cpu, Trained>(ctx, model, schedule, options); });
  };
  CHECK(contains(refusal({.momentum = 1}), "MuonOptions: momentum is 1"));
  CHECK(contains(refusal({.weight_decay = -1}), "MuonOptions: weight_decay is -1"));
  CHECK(contains(refusal({.others = {.clip_norm = std::nan("")}}), "AdamWOptions: clip_norm"));
}

}  // namespace muon_test
