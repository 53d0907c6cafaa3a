// The rows of the table: each trains what it trains on the same data, and is scored on the same evaluation sets.
#pragma once

#include "base_models.hpp"
#include "evaluation.hpp"
#include "gate_model.hpp"

#include <calm/compose/composed_model.hpp>

namespace key_value {

using Composed = calm::ComposedModel<BaseModel, BaseModel>;
using LoraModel = calm::Transformer<calm::zoo::Llama, calm::Lora>;

/// What the bridges learn from keys.
enum class Lesson : std::uint8_t {
  chain,         // abc+de= -> 17+203=220
  substitution,  // abc+de= -> 17+203=, and nothing is said of what follows
  direct,        // abc+de= -> 220
};

/// A point of a learning curve: percent right on a small sample.
struct CurvePoint {
  Index step = 0;
  double loss = 0, seen = 0, unseen = 0;
};

struct RowResult {
  std::string name;
  Score score;
  Index trained_parameters = 0;
  double seconds = 0;
  std::vector<CurvePoint> curve;
};

/// Keys arithmetic over the seen keys with 1 to 3 operands, three quarters of it, and arithmetic on numbers as m_B
/// knows it: where calculating is not taught with keys also after words that are no keys, so that the bridges learn to
/// leave it alone.
inline Task bridge_task(const Dictionary& dictionary, Lesson lesson) {
  ArithmeticMix mix{
      .operands = {0.1, 0.4, 0.5}, .reworded = 0.3, .by_length = 0.1, .half_solved = 0, .largest = dictionary.size()};
  if (lesson == Lesson::direct) mix.reworded = 0;
  if (lesson == Lesson::substitution) mix.words = 0.5;
  const Task numbers = arithmetic(dictionary, mix);
  return [&dictionary, lesson, numbers](calm::Random& random) {
    if (random.below(4) == 0) return numbers(random);
    const Index operands = 1 + pick(random, {0.2, 0.4, 0.4});
    const Expression e = for_training([&] { return random_keys(random, operands, dictionary.seen()); },
                                      [&](const Expression& x) { return keys_touch_evaluation(x, dictionary); });
    const Expression values = substitute(e, dictionary);
    const std::string prompt = write(e) + "=", steps = solve(values);
    switch (lesson) {
      case Lesson::chain: return example(prompt, write(values) + "=" + steps);
      case Lesson::substitution: return example(prompt, write(values) + "=", false);
      case Lesson::direct: break;
    }
    return example(prompt, steps.substr(steps.rfind('=') + 1));
  };
}

/// What all rows of one table share.
struct Experiment {
  Ctx& ctx;
  const Dictionary& dictionary;
  const EvaluationSets& sets;
  BasePointer a, b;
  TrainingPlan plan;
  Index curve_every = 0;
  Lesson lesson = Lesson::chain;

  template <class Model>
  Score score_of(const Model& model) const {
    return score(sets, [&](const std::vector<std::string>& prompts) { return answer(ctx, model, prompts); });
  }

  /// Trains a model on a lesson and scores it.
  template <class Model>
  RowResult trained(const std::string& name, Model& model, Lesson what, double rate_factor = 1) const {
    RowResult row{name, {}, calm::count_parameters(model), 0, {}};
    const Task task = bridge_task(dictionary, what);
    TrainingPlan own = plan;
    own.learning_rate *= rate_factor;
    row.seconds = train(
        ctx, model, name, own, [&](Index) { return task; },
        [&](Index step, double loss) {
          if (curve_every > 0 && (step % curve_every == 0 || step == own.steps))
            row.curve.push_back({step, loss, sample(model, seen_keys), sample(model, unseen_keys)});
        });
    row.score = score_of(model);
    return row;
  }

  template <class Model>
  double sample(const Model& model, std::size_t column) const {
    const auto& items = sets[column];
    const std::size_t count = std::min<std::size_t>(100, items.size());
    std::vector<std::string> prompts;
    for (std::size_t i = 0; i < count; ++i) prompts.push_back(items[i].prompt);
    const Answers given = answer(ctx, model, prompts);
    std::size_t right = 0;
    for (std::size_t i = 0; i < count; ++i) right += is_right(items[i], column, given.texts[i], given.ended[i]) ? 1 : 0;
    return 100.0 * static_cast<double>(right) / static_cast<double>(count);
  }

  /// Bridges into the last blocks of m_B from the last of the augment: there its next token can be read and written.
  Composed compose_with(const BasePointer& augment) const {
    const Index last_a = augment->spec().blocks - 1, last_b = b->spec().blocks - 1;
    return calm::compose(b, {{0, last_a - 1, last_b - 2}, {0, last_a, last_b - 1}, {0, last_a, last_b}},
                         calm::BridgeOptions{.rotary = true, .seed = plan.seed}, augment);
  }

  RowResult model_alone(const std::string& name, const BasePointer& model) const {
    return {name, score_of(*model), 0, 0, {}};
  }

  RowResult composed(const std::string& name, const BasePointer& augment, Lesson what) const {
    Composed model = compose_with(augment);
    return trained(name, model, what);
  }

  /// m_A writes the values, m_B computes from what it wrote. A prompt without letters has nothing to substitute.
  RowResult cascade(const std::string& name) const {
    const auto answers = [&](const std::vector<std::string>& prompts) {
      const auto has_letters = [](const std::string& text) {
        return std::any_of(text.begin(), text.end(), [](char c) { return 'a' <= c && c <= 'z'; });
      };
      const Answers values = answer(ctx, *a, prompts);
      std::vector<std::string> rewritten;
      for (std::size_t i = 0; i < prompts.size(); ++i)
        rewritten.push_back(has_letters(prompts[i]) ? values.texts[i].substr(0, values.texts[i].find('=')) + "="
                                                    : prompts[i]);
      Answers result = answer(ctx, *b, rewritten);
      for (std::size_t i = 0; i < prompts.size(); ++i)
        if (has_letters(prompts[i])) result.texts[i] = rewritten[i] + result.texts[i];
      return result;
    };
    return {name, score(sets, answers), 0, 0, {}};
  }

  RowResult gate(const std::string& name) const {
    GateModel<BaseModel, BaseModel> model(a, b, 64, plan.seed);
    return trained(name, model, lesson);
  }

  /// LoRA of the rank whose number of parameters comes nearest to that of the bridges.
  RowResult lora(const std::string& name) const {
    const Index wanted = calm::count_parameters(compose_with(a));
    const auto with_rank = [&](Index rank) {
      return LoraModel(b->spec(), calm::LoraWeights{calm::weights_of(*b), rank, 2.0, plan.seed});
    };
    const Index rank =
        std::max<Index>(1, (wanted + calm::count_parameters(with_rank(1)) / 2) / calm::count_parameters(with_rank(1)));
    LoraModel model = with_rank(rank);
    return trained(name, model, lesson);
  }

  /// All weights of m_B; at three tenths of the rate, since they are no new weights.
  RowResult fully_tuned(const std::string& name) const {
    TrainedModel model(b->spec(), calm::weights_of(*b));
    return trained(name, model, lesson, 0.3);
  }
};

}  // namespace key_value
