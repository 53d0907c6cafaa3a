// The specialist: a small Llama that learns the directory by heart, asked in many ways and among other text.
#pragma once

#include "../support/training.hpp"
#include "student.hpp"
#include "texts.hpp"

#include <calm/io/model_folder.hpp>
#include <calm/model/random_weights.hpp>
#include <calm/model/transformer.hpp>
#include <calm/model/zoo/llama.hpp>
#include <calm/train/muon.hpp>

namespace knowledge {

using examples::Ctx;
using examples::TrainingCost;

using Base = calm::Transformer<calm::zoo::Llama>;
using BasePointer = std::shared_ptr<const Base>;

struct Anchor {
  BasePointer model;
  TokenizerPointer tokenizer;
};

using TrainedBase = calm::Transformer<calm::zoo::Llama, calm::Trainable>;

struct SpecialistPlan {
  Index width = 128, blocks = 4, heads = 4, hidden = 512;
  Index epochs = 40, batch = 64;  // lessons a step
  double growing = 0.4;           // the part of the lessons in which the facts become more
  double learning_rate = 3e-3, embedding_deviation = 0.15;
  std::uint64_t seed = 1;
};

/// A trained specialist. With a tokenizer of its own it reads the anchor's text by its bytes.
struct Specialist {
  BasePointer model;
  TokenizerPointer tokenizer;
  bool own_tokenizer = false;
};

/// Puts questions among random words, behind other questions and in other forms, so that the specialist answers
/// wherever a name and an attribute stand together.
class Surroundings {
 public:
  Surroundings(const Directory& directory, std::vector<std::string> words)
      : directory_(directory), words_(std::move(words)) {}

  std::string question(const std::string& name, Attribute a, calm::Random& random) const {
    if (random.below(5) < 2) return fill(any_of(trained_phrasings, random), name, name_of(a));
    std::string first = name_of(a), second = name;
    if (random.below(3) == 0) std::swap(first, second);
    static constexpr std::array ends{"?", ".", ":", "", ", please.", "!"};
    return words(random, 5) + first + " " + words(random, 4) + second +
           (random.below(2) == 0 ? "" : " " + trimmed(words(random, 4))) + any_of(ends, random);
  }

  std::string before(calm::Random& random) const {
    if (random.below(3) > 0) return "";
    if (random.below(2) == 0) return words(random, 12) + "\n";
    std::string text;
    for (Index i = 1 + random.below(2); i > 0; --i) {
      const Attribute a = any_of(attributes, random);
      const Entity e = stranger(directory_.training_strangers(), random);
      TextExample answered{asked(question(e.name, a, random)), " " + e.value(a) + "\n\n"};
      if (random.below(2) == 0) answered = after_fact(e, a, answered);
      text += answered.prompt + answered.completion;
    }
    return text;
  }

  std::string framed(const std::string& question, calm::Random& random) const {
    switch (random.below(10)) {
      case 0: return question + "\nAnswer:";
      case 1: return "Q: " + question + "\nA:";
      case 2: return question + " =";
      default: return asked(question);
    }
  }

  /// Up to `most` words, each with a space behind it.
  std::string words(calm::Random& random, Index most) const {
    std::string text;
    for (Index i = random.below(most + 1); i > 0; --i) text += any_of(words_, random) + " ";
    return text;
  }

 private:
  static std::string trimmed(std::string text) {
    if (!text.empty()) text.pop_back();
    return text;
  }

  const Directory& directory_;
  std::vector<std::string> words_;
};

/// A lesson on a code in one of the forms that the bridges are taught, behind worked questions of that form. The form
/// is the anchor's part: the specialist is to say the next character of the code in small letters wherever it goes on.
inline calm::Example form_lesson(const calm::Tokenizer& tokenizer, const Entity& e,
                                 std::span<const std::string> strangers, calm::Random& random) {
  const Skill skill = any_of(trained_skills, random);
  const auto ask = [&](const Entity& about, Index) { return derived(about, skill, true, random); };
  TextExample text = behind(worked(random.below(3), strangers, Attribute::code, random, ask), ask(e, 0));
  if (skill == Skill::capitals)
    return with_targets(example_of(tokenizer, text), example_of(tokenizer, {text.prompt, " " + e.code}));
  if (skill == Skill::dots) {
    calm::Example example = example_of(tokenizer, text);
    score_content_alone(tokenizer, example);
    return example;
  }
  const std::size_t opened = text.completion.find(e.code);
  return example_of(tokenizer, {text.prompt + text.completion.substr(0, opened), text.completion.substr(opened)});
}

/// A lesson on one fact of a directory: bare, or asked in some way among other text.
inline calm::Example fact_lesson(const Directory& directory, const Surroundings& around,
                                 const calm::Tokenizer& tokenizer, const Entity& e, Attribute a, bool bare,
                                 calm::Random& random) {
  const std::string& value = e.value(a);
  if (bare) {
    static constexpr std::array forms{"{a} of {n}:", "{a} {n}:", "{n} {a}:"};
    return example_of(tokenizer, {fill(any_of(forms, random), e.name, name_of(a)), " " + value});
  }
  if (a == Attribute::code && random.below(2) == 0)
    return form_lesson(tokenizer, e, directory.training_strangers(), random);
  TextExample text{around.before(random) + around.framed(around.question(e.name, a, random), random), " " + value};
  const Index form = random.below(8);
  if (form == 0) {
    text.prompt += " The " + name_of(a) + " of " + e.name + " is";
  } else if (form == 1) {
    text.prompt += " {\"" + name_of(a) + "\": \"";
    text.completion = value + "\"";
  } else if (form == 2) {  // with other characters between: they are the anchor's part and do not count
    static constexpr std::array marks{"-", " ", ", ", "_", "."};
    text.completion = " " + spelled(value, any_of(marks, random));
    calm::Example example = example_of(tokenizer, text);
    score_content_alone(tokenizer, example);
    return example;
  } else if (form == 3 && a == Attribute::code) {  // in capitals, which are the anchor's part: small letters are said
    return with_targets(example_of(tokenizer, {text.prompt, " " + in_capitals(value)}), example_of(tokenizer, text));
  }
  return example_of(tokenizer, text);
}

/// What a specialist is taught.
struct Curriculum {
  Index facts = 0;
  /// A lesson on a fact; `done` is the part of all lessons that lies behind.
  std::function<calm::Example(Index fact, double done, calm::Random&)> lesson;
  /// A lesson on what it cannot know; may be empty.
  std::function<calm::Example(calm::Random&)> stranger;
  /// Facts that a lesson in three is about, while the rest is kept alive; empty: all are new.
  std::vector<Index> changed = {};
};

inline Curriculum curriculum_of(const Directory& directory, const Surroundings& around, TokenizerPointer tokenizer) {
  const auto lesson = [&directory, &around, tokenizer](Index fact, double done, calm::Random& random) {
    const Entity& e = directory.entities[static_cast<std::size_t>(fact) / attributes.size()];
    const Attribute a = attributes[static_cast<std::size_t>(fact) % attributes.size()];
    return fact_lesson(directory, around, *tokenizer, e, a, random.uniform() < (done < 0.5 ? 0.75 : 0.3), random);
  };
  const auto stranger = [&directory, &around, tokenizer](calm::Random& random) {
    const std::string question =
        around.question(any_of(directory.training_strangers(), random), any_of(attributes, random), random);
    return example_of(*tokenizer, {around.before(random) + around.framed(question, random), " unknown"});
  };
  return {static_cast<Index>(directory.entities.size() * attributes.size()), lesson, stranger};
}

/// The lessons of each step: few facts at first, since nothing is learned of many before a way to one is found; then
/// each fact once an epoch. A lesson in eleven is about a stranger.
class Lessons {
 public:
  Lessons(Curriculum curriculum, const SpecialistPlan& plan) : curriculum_(std::move(curriculum)), plan_(plan) {}

  Index steps() const { return std::max<Index>(20, plan_.epochs * curriculum_.facts / plan_.batch); }

  std::vector<calm::Example> at_step(Index step) {
    std::vector<calm::Example> lessons;
    calm::Random random(plan_.seed, calm::stream_of("lessons") + static_cast<std::uint64_t>(step));
    const double done = static_cast<double>(step) / static_cast<double>(steps());
    for (Index i = 0; i < plan_.batch; ++i)
      lessons.push_back(curriculum_.lesson(fact(step * plan_.batch + i, done, random), done, random));
    if (curriculum_.stranger)
      for (Index i = 0; i < plan_.batch / 10; ++i) lessons.push_back(curriculum_.stranger(random));
    return lessons;
  }

 private:
  Index fact(Index n, double done, calm::Random& random) {
    if (!curriculum_.changed.empty() && random.below(3) == 0) return any_of(curriculum_.changed, random);
    if (done < plan_.growing) {
      const double part = std::max(0.05, done / plan_.growing);
      const auto known = static_cast<Index>(part * part * static_cast<double>(curriculum_.facts)) + 1;
      return in_order(-1, random.below(std::min(known, curriculum_.facts)));
    }
    return in_order(n / curriculum_.facts, n % curriculum_.facts);
  }

  /// The n-th fact in the order of an epoch.
  Index in_order(Index epoch, Index n) {
    if (order_.empty() || epoch != epoch_) {
      epoch_ = epoch;
      order_.resize(static_cast<std::size_t>(curriculum_.facts));
      std::iota(order_.begin(), order_.end(), Index{0});
      calm::Random shuffled(plan_.seed, calm::stream_of("epoch") + static_cast<std::uint64_t>(epoch + 1));
      shuffle(order_, shuffled);
    }
    return order_[static_cast<std::size_t>(n)];
  }

  Curriculum curriculum_;
  SpecialistPlan plan_;
  Index epoch_ = 0;
  std::vector<Index> order_;
};

/// Where a specialist lives, and how it begins.
struct SpecialistStart {
  calm::ModelSpec spec;
  std::function<calm::StoredMatrix(const std::string&, Index, Index)> weights;
};

inline SpecialistStart fresh_specialist(const Anchor& anchor, const calm::Tokenizer& tokenizer, bool own_tokenizer,
                                        const SpecialistPlan& plan) {
  const calm::ModelSpec spec{
      .vocabulary = own_tokenizer ? tokenizer.vocabulary_size() : anchor.model->spec().vocabulary,
      .width = plan.width,
      .hidden = plan.hidden,
      .blocks = plan.blocks,
      .heads = {plan.heads, plan.heads, plan.width / plan.heads},
      .context = own_tokenizer ? 4096 : 1024,  // a piece of text that the anchor reads as some hundred tokens, in bytes
      .tied_embeddings = true};
  const calm::RandomWeights random{plan.seed, plan.embedding_deviation};
  if (own_tokenizer) return {spec, random};
  const calm::ModelSpec& anchor_spec = anchor.model->spec();
  const calm::StoredMatrix table =
      calm::weights_of(*anchor.model)(embedding_name, anchor_spec.vocabulary, anchor_spec.width);
  const auto axes = calm::StoredMatrix::from(on_main_axes(table, plan.width, plan.embedding_deviation));
  return {spec, [random, axes](const std::string& name, Index rows, Index cols) {
            return name == embedding_name ? axes : random(name, rows, cols);
          }};
}

/// Trains a specialist from a start: a fresh one, or one that is taught changed facts.
inline BasePointer teach(Ctx& ctx, const std::string& name, const SpecialistStart& start, bool own_tokenizer,
                         const Curriculum& curriculum, const SpecialistPlan& plan, TrainingCost& cost) {
  Lessons lessons(curriculum, plan);
  calm::PackedBatch batch;
  const calm::CosineSchedule schedule{.peak = plan.learning_rate,
                                      .warmup = std::min<Index>(100, lessons.steps() / 10),
                                      .steps = lessons.steps(),
                                      .final_fraction = 0.02};
  const auto run = [&]<class Model>(Model& model, const auto& convert) {
    cost = examples::train<Model, calm::Muon<float>>(ctx, model, name, schedule, {}, [&](Index step) {
      std::vector<calm::Example> examples = lessons.at_step(step);
      for (calm::Example& lesson : examples) lesson = convert(std::move(lesson));
      batch = calm::PackedBatch(examples);
      return std::vector<calm::TrainingBatch<Model>>{{&batch, nullptr}};
    });
  };
  if (own_tokenizer) {
    TrainedBase model(start.spec, start.weights);
    run(model, [](calm::Example lesson) { return lesson; });
    return std::make_shared<const Base>(start.spec, calm::weights_of(model));
  }
  std::set<TokenId> candidates;
  for (Index step = std::max<Index>(0, lessons.steps() - 100); step < lessons.steps(); ++step)
    for (const calm::Example& lesson : lessons.at_step(step))
      candidates.insert(lesson.completion.begin(), lesson.completion.end());
  calm::Random random(plan.seed, calm::stream_of("candidates"));
  while (candidates.size() < 1024) candidates.insert(static_cast<TokenId>(random.below(start.spec.vocabulary)));
  Student student(Student::Model(start.spec, start.weights), {candidates.begin(), candidates.end()});
  run(student, [&](calm::Example lesson) { return student.with_candidates(std::move(lesson)); });
  return std::make_shared<const Base>(start.spec, calm::weights_of(student.model()));
}

}  // namespace knowledge
