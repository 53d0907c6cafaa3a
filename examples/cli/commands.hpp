// The commands over a model of known type: a Transformer, or a composed model.
#pragma once

#include "models.hpp"

#include <calm/backend/cpu_bf16.hpp>
#include <calm/evaluate/chrf.hpp>
#include <calm/evaluate/progress.hpp>
#include <calm/evaluate/table.hpp>
#include <calm/generate/generate.hpp>
#include <calm/io/text_data.hpp>
#include <calm/io/tokenizer/chat.hpp>
#include <calm/train/checkpoint.hpp>

#include <chrono>
#include <iostream>

namespace cli {

/// Keeps a copy of the stream after each block.
struct KeepStreams {
  std::vector<calm::Matrix<float>>& streams;

  void after_block(auto&, Index, calm::MatrixView<float>& x) { keep(x); }
  void keep(calm::MatrixView<const float> x) {
    streams.emplace_back(x.rows, x.cols);
    for (Index t = 0; t < x.rows; ++t) std::copy_n(x.row(t), x.cols, &streams.back()(t, 0));
  }
};

/// Throws where a sequence is longer than the context of the model or of an augment; `what` names it.
template <class Model>
void check_fits(const Model& model, std::span<const TokenId> ids, Index prompt_length, const std::string& what) {
  const auto count = static_cast<Index>(ids.size());
  calm::require<calm::ContextLimitError>(count <= model.spec().context, what, " has ", count,
                                         " tokens, but the model's context is ", model.spec().context, "; shorten it");
  calm::require<calm::ContextLimitError>(model.fits(nullptr, 0, ids, prompt_length, 0), what, " has ", count,
                                         " tokens, which the context of an augment does not hold; shorten it");
}

template <class Model>
void logits(Ctx& ctx, const Model& model, const Options& o, const ModelTokenizer& tokenizer) {
  using ConstView = calm::MatrixView<const float>;
  const std::vector<TokenId> ids = ids_of(o, tokenizer);
  const auto count = static_cast<Index>(ids.size());
  const std::vector<Index> offsets{0, count}, prompts{o.has_ids ? Index{0} : count};
  check_fits(model, ids, prompts[0], o.main_model() + ": the text");
  const calm::TokenBatch batch{ids, offsets, prompts, {}};
  typename Model::States states;
  model.prepare_augments(ctx, batch, states);
  calm::MatrixView<float> x = model.embed(ctx, batch);
  std::vector<calm::Matrix<float>> streams;
  KeepStreams keep{streams};
  keep.keep(x);
  model.run(ctx, batch, states, x, 0, model.spec().blocks, nullptr, keep);
  calm::Matrix<float> result(count, model.spec().vocabulary);
  typename Model::HeadCache head;
  model.head(ctx, ConstView(x), result.view(), head);
  calm::SafetensorsWriter writer;
  const auto add = [&](const std::string& name, const calm::Matrix<float>& m) {
    writer.add(name, {m.rows(), m.cols()}, m.values(), calm::DType::f32);
  };
  add("logits", result);
  if (o.hidden)
    for (std::size_t i = 0; i < streams.size(); ++i) add(calm::message("hidden.", i), streams[i]);
  writer.write(o.out);
  if (o.json) std::cout << nlohmann::json{{"tokens", count}, {"vocabulary", result.cols()}, {"out", o.out}} << '\n';
  else std::cout << count << " tokens -> " << o.out << '\n';
}

inline std::vector<TokenId> encode_plain(const calm::Tokenizer& tokenizer, const std::string& text, bool special) {
  std::vector<TokenId> ids;
  for (const auto& token : tokenizer.encode(text, {.add_special = special, .dummy_prefix = special}))
    ids.push_back(token.id);
  return ids;
}

/// The prompt as a person gave it, or as the model's chat template writes it.
inline std::string prompt_text(const Options& o, const calm::Tokenizer& tokenizer, const std::string& text) {
  if (!o.chat) return text;
  std::vector<calm::ChatMessage> messages;
  if (const auto system = calm::chat_default_system(tokenizer.chat_template())) messages.push_back(*system);
  messages.push_back({"user", text});
  return calm::chat_prompt(calm::chat_family_of(tokenizer.chat_template(), tokenizer.chat_source()), messages);
}

/// Prompt ids, at least one.
inline std::vector<TokenId> prompt_ids(const calm::Tokenizer& tokenizer, const std::string& text, bool special = true) {
  std::vector<TokenId> ids = encode_plain(tokenizer, text, special);
  if (ids.empty() && tokenizer.bos()) ids.push_back(*tokenizer.bos());
  calm::require<calm::ConfigError>(!ids.empty(), "the prompt is empty and the tokenizer has no token to begin with");
  return ids;
}

/// The tokens that end an answer.
inline std::vector<TokenId> end_tokens(const Options& o, const calm::Tokenizer& tokenizer) {
  std::vector<TokenId> ends = tokenizer.ends();
  if (o.chat)
    for (const char* mark : {"<|im_end|>", "<end_of_turn>", "<|eot_id|>"})
      if (const auto id = tokenizer.find(mark)) ends.push_back(*id);
  return ends;
}

inline calm::GenerateOptions generate_options(const Options& o, const calm::Tokenizer& tokenizer) {
  calm::GenerateOptions options;
  options.max_new_tokens = o.max_new_tokens;
  options.end_tokens = end_tokens(o, tokenizer);
  options.sampler.temperature = o.temperature;
  options.sampler.top_k = o.top_k;
  options.sampler.top_p = o.top_p;
  options.sampler.seed = o.seed;
  options.at_limit = calm::AtContextLimit::stop;
  return options;
}

template <class Model>
void generate(Ctx& ctx, const Model& model, const Options& o, const ModelTokenizer& model_tokenizer) {
  const calm::Tokenizer& tokenizer = model_tokenizer.get();
  const std::vector<std::vector<TokenId>> prompts{prompt_ids(tokenizer, prompt_text(o, tokenizer, o.prompt))};
  check_fits(model, prompts[0], static_cast<Index>(prompts[0].size()), o.main_model() + ": the prompt");
  calm::TokenStream stream(tokenizer);
  for (const TokenId id : prompts[0]) stream.push(id);  // what follows is no beginning of a text
  calm::GenerateOptions options = generate_options(o, tokenizer);
  options.stop = o.stop;
  options.text_of = [&](TokenId id) { return id < tokenizer.vocabulary_size() ? stream.push(id) : std::string(); };
  const auto result = calm::generate(ctx, model, std::span(prompts), options, [&](const calm::StreamedToken& token) {
    if (!o.json) std::cout << token.text << std::flush;
  });
  constexpr const char* reasons[] = {"end_token", "stop_string", "length", "context"};
  if (result[0].reason == calm::FinishReason::context)
    std::cerr << "calm: the context of the model or of an augment is full; the text ends here\n";
  if (o.json)
    std::cout << nlohmann::json{{"text", result[0].text},
                                {"ids", result[0].ids},
                                {"finish_reason", reasons[static_cast<std::size_t>(result[0].reason)]},
                                {"log_probabilities", result[0].log_probabilities}}
                     .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)
              << '\n';
  else std::cout << stream.finish() << '\n';
}

/// Texts as examples: both parts encoded by themselves, the end token appended. With --chat the prompt stands in the
/// model's chat template, as `generate` writes it. What does not fit into a context is found here, not after hours.
template <class Model>
std::vector<calm::Example> examples_of(const Model& model, const Options& o, const std::string& path,
                                       const calm::Tokenizer& tokenizer) {
  std::vector<calm::Example> examples;
  const TokenId end = tokenizer.eos().value_or(0);
  calm::require<calm::FormatError>(end < model.spec().vocabulary, o.main_model(), ": the end token is ", end,
                                   ", which is outside the model's vocabulary of ", model.spec().vocabulary);
  for (const calm::TextExample& text : calm::read_text_examples(path)) {
    calm::Example example{prompt_ids(tokenizer, prompt_text(o, tokenizer, text.prompt)),
                          encode_plain(tokenizer, text.completion, false)};
    if (tokenizer.eos()) example.completion.push_back(*tokenizer.eos());
    const std::string where = calm::message(path, ": line ", text.line);
    calm::require<calm::FormatError>(!example.completion.empty(), where, ": the completion is empty");
    std::vector<TokenId> ids = example.prompt;
    ids.insert(ids.end(), example.completion.begin(), example.completion.end() - 1);
    check_fits(model, ids, static_cast<Index>(example.prompt.size()),
               where + ": the example (prompt, completion and end, but for its last token)");
    examples.push_back(std::move(example));
  }
  return examples;
}

template <class Model>
void evaluate(Ctx& ctx, const Model& model, const Options& o, const ModelTokenizer& model_tokenizer) {
  const calm::Tokenizer& tokenizer = model_tokenizer.get();
  nlohmann::json result{{"metric", o.metric}};
  if (o.metric == "nll") {
    const calm::PackedDataset data(examples_of(model, o, o.data, tokenizer), o.batch_tokens, 0);
    double total = 0, count = 0;
    calm::Progress progress("eval", data.size());
    for (const calm::PackedBatch& batch : data.batches()) {
      calm::KeptStates<Model> states;
      total += calm::batch_loss(ctx, model, batch, states, nullptr, 1.0);
      count += static_cast<double>(batch.rows().size());
      progress.update(static_cast<Index>(&batch - data.batches().data()) + 1);
    }
    progress.finish();
    result["value"] = total / count;
    result["tokens"] = count;
    result["unit"] = "nats a token";
  } else {
    const auto texts = calm::read_text_examples(o.data);
    calm::GenerateOptions options = generate_options(o, tokenizer);
    options.batch = 32;
    calm::Chrf chrf;
    double exact = 0;
    std::vector<std::vector<TokenId>> all;
    for (const calm::TextExample& text : texts) {
      all.push_back(prompt_ids(tokenizer, prompt_text(o, tokenizer, text.prompt)));
      check_fits(model, all.back(), static_cast<Index>(all.back().size()),
                 calm::message(o.data, ": line ", text.line, ": the prompt"));
    }
    calm::Progress progress("eval", static_cast<Index>(texts.size()));
    for (std::size_t begin = 0; begin < texts.size(); begin += 32) {
      const std::size_t end = std::min(texts.size(), begin + 32);
      const auto answers =
          calm::generate(ctx, model, std::span(std::as_const(all)).subspan(begin, end - begin), options);
      for (std::size_t i = begin; i < end; ++i) {
        calm::TokenStream stream(tokenizer);
        for (const TokenId id : all[i]) stream.push(id);
        std::string answer;
        for (const TokenId id : answers[i - begin].ids)
          if (id < tokenizer.vocabulary_size()) answer += stream.push(id);  // models pad their vocabulary
        answer += stream.finish();
        for (const std::string& stop : o.stop) answer.resize(std::min(answer.size(), answer.find(stop)));
        exact += answer == texts[i].completion ? 1 : 0;
        chrf.add(answer, texts[i].completion);
      }
      progress.update(static_cast<Index>(end));
    }
    progress.finish();
    result["value"] = o.metric == "chrf" ? chrf.score() : 100 * exact / static_cast<double>(texts.size());
    result["examples"] = texts.size();
    result["unit"] = o.metric == "chrf" ? "chrF, 0 to 100" : "percent";
  }
  if (o.json) std::cout << result << '\n';
  else
    std::cout << o.metric << ": " << result["value"].get<double>() << ' ' << result["unit"].get<std::string>() << '\n';
}

template <class Model>
void gradients(Ctx& ctx, Model& model, const Options& o, const ModelTokenizer& tokenizer) {
  const std::vector<TokenId> ids = ids_of(o, tokenizer);
  calm::require<calm::ConfigError>(ids.size() >= 2, "--ids: a loss needs at least two tokens, found ", ids.size());
  check_fits(model, std::span(ids).first(ids.size() - 1), 1, o.main_model() + ": the text without its last token");
  calm::PackedBatch batch;
  batch.add({{ids[0]}, {ids.begin() + 1, ids.end()}});
  calm::Gradients<float> grads(model);
  calm::KeptStates<Model> states;
  typename Model::Tape tape;
  const auto count = static_cast<double>(batch.rows().size());
  const double total = calm::batch_loss(ctx, model, batch, states, &tape, 1 / count, grads);
  calm::SafetensorsWriter writer;
  const std::vector<float> loss{static_cast<float>(total / count)};
  writer.add("loss", {1}, std::span<const float>(loss), calm::DType::f32);
  calm::for_each_parameter(model, [&](const std::string& name, const auto& parameter) {
    writer.add("grad." + name, parameter.shape(), std::span<const float>(calm::flat(grads[parameter])),
               calm::DType::f32);
  });
  writer.write(o.out);
  if (o.json) std::cout << nlohmann::json{{"loss", loss[0]}, {"out", o.out}} << '\n';
  else std::cout << "loss " << loss[0] << " -> " << o.out << '\n';
}

template <class Model>
void train(Ctx& ctx, Model& model, const Options& o, const ModelTokenizer& model_tokenizer,
           const std::vector<calm::BaseDescription>& bases, const std::string& alignment) {
  const calm::Tokenizer& tokenizer = model_tokenizer.get();
  if (!tokenizer.eos())
    std::cerr << "calm: " << o.main_model()
              << ": no file of the model names an end token; completions are learned without\n";
  const calm::PackedDataset data(examples_of(model, o, o.data, tokenizer), o.batch_tokens, o.seed);
  std::optional<calm::PackedDataset> valid;
  if (!o.valid.empty()) valid.emplace(examples_of(model, o, o.valid, tokenizer), o.batch_tokens, 0);
  calm::Trainer trainer(
      ctx, model,
      calm::CosineSchedule{.peak = o.learning_rate, .warmup = std::min<Index>(50, o.steps / 10), .steps = o.steps});
  constexpr std::size_t keep_bytes = std::size_t{2} << 30;
  calm::DatasetBatches<Model> batches(data, o.accumulate, keep_bytes);
  calm::Progress progress("train", o.steps);
  double validation = std::numeric_limits<double>::quiet_NaN();
  std::function<double()> validate;
  if (valid) validate = [&] { return calm::mean_loss(ctx, model, valid->batches()); };
  const Index often = std::max<Index>(1, o.steps / 10);
  calm::RunOptions run{
      .folder = std::filesystem::path(o.out) / "checkpoint",
      .checkpoint_every = often,
      .validate_every = often,
      .resume = o.resume,
      .fingerprint = calm::message(
          "data ", calm::content_hash_of_file(o.data), ", valid ",
          o.valid.empty() ? std::string("none") : calm::content_hash_of_file(o.valid), ", adapter ",
          calm::content_hash_of_file(std::filesystem::path(o.adapter) / "adapter_model.safetensors"), ", alignment ",
          alignment, ", steps ", o.steps, ", lr ", o.learning_rate, ", batch ", o.batch_tokens, "x", o.accumulate,
          ", seed ", o.seed, o.compute == "f32" ? std::string() : ", compute " + o.compute)};
  const auto start = std::chrono::steady_clock::now();
  double tokens = 0, loss = std::numeric_limits<double>::quiet_NaN();
  const auto describe = [&] {
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return calm::message("loss ", calm::fixed(loss, 3), "  ", calm::fixed(tokens / seconds, 0), " tokens/s",
                         std::isnan(validation) ? "" : "  valid " + calm::fixed(validation, 3));
  };
  const double best = calm::run_training<Model>(trainer, std::ref(batches), run, validate, [&](const auto& report) {
    tokens += static_cast<double>(report.result.tokens);
    loss = report.result.loss;
    if (!std::isnan(report.validation_loss)) validation = report.validation_loss;
    progress.update(report.step, describe);
  });
  const bool was_done = std::isnan(loss);
  if (!was_done) progress.finish(describe());
  calm::save_adapter(model, o.out, bases, alignment);
  nlohmann::json result{{"steps", trainer.step_count()}, {"out", o.out}};
  if (!std::isnan(loss)) result["loss"] = loss;
  if (!std::isnan(best)) result["valid_loss"] = best;  // that of the weights that are saved
  if (o.json) std::cout << result << '\n';
  else {
    if (was_done) std::cout << "all " << trainer.step_count() << " steps were done before";
    else std::cout << "loss " << loss << " after " << trainer.step_count() << " steps";
    if (!std::isnan(best)) std::cout << ", valid_loss " << best;
    std::cout << " -> " << o.out << '\n';
  }
}

/// Tokens to measure with: a text, or where no tokenizer can be read the first of the vocabulary.
inline std::vector<TokenId> ids_to_measure(Index count, const calm::ModelSpec& spec,
                                           const ModelTokenizer& model_tokenizer) {
  std::vector<TokenId> ids;
  const TokenizerPointer tokenizer = model_tokenizer.fault().empty() ? model_tokenizer.find() : nullptr;
  while (tokenizer && static_cast<Index>(ids.size()) < count)
    for (const TokenId id :
         encode_plain(*tokenizer, "The small model knows, and the large model writes it down. ", false))
      ids.push_back(id);
  for (Index i = 0; static_cast<Index>(ids.size()) < count; ++i)
    ids.push_back(static_cast<TokenId>(i % spec.vocabulary));
  ids.resize(static_cast<std::size_t>(count));
  return ids;
}

template <class Fn>
double seconds_of(Fn&& fn) {
  const auto start = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// What a token costs by the sizes, beside how fast tokens are on this machine: a prompt of --tokens, the tokens after
/// it, and with bridges to train a step that scores half of a sequence as long.
template <class Model>
void print_cost(Ctx& ctx, Model& model, const Options& o, const std::vector<TokenId>& ids,
                const calm::CompositionCost& cost) {
  constexpr Index steps = 16;
  const Index prompt = o.tokens;
  auto session = model.make_session(ctx, 1, prompt + steps);
  const auto advance = [&](Index first, Index count) {
    const std::vector<Index> offsets{0, count}, lengths{first == 0 ? count : 0}, slots{0};
    ctx.arena.reset();
    const auto tokens = std::span(ids).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    calm::next_logits(ctx, model, session, {tokens, offsets, lengths, slots});
  };
  advance(0, prompt);  // packs the weights, where that is done
  session.clear(0);
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  const auto row = [&](const char* what, const calm::TokenCost& one, Index tokens, double seconds) {
    const double speed = static_cast<double>(tokens) / seconds;
    rows.push_back({{"what", what},
                    {"flops_a_token", std::round(one.flops())},
                    {"weight_bytes_a_token", std::round(one.weight_bytes)},
                    {"cache_bytes_a_token", std::round(one.cache_bytes)},
                    {"tokens_a_second", speed},
                    {"flops_a_second", std::round(one.flops() * speed)}});
  };
  row("prefill", cost.prefill(prompt), prompt, seconds_of([&] { advance(0, prompt); }));
  row("decode", cost.decode(prompt + steps / 2), steps, seconds_of([&] {
        for (Index t = 0; t < steps; ++t) advance(prompt + t, 1);
      }));
  if constexpr (Model::trainable) {
    const auto half = static_cast<std::ptrdiff_t>(prompt / 2);
    calm::PackedBatch batch;
    batch.add({{ids.begin(), ids.begin() + half + 1}, {ids.begin() + half + 1, ids.begin() + prompt + 1}});
    calm::Gradients<float> grads(model);
    calm::KeptStates<Model> states;
    typename Model::Tape tape;
    Ctx training(o.threads, products_of(Command::train, o));
    const auto step = [&] {
      states.filled = false;
      calm::batch_loss(training, model, batch, states, &tape, 1.0, grads);
    };
    step();
    const double scored = static_cast<double>(batch.rows().size()) / static_cast<double>(prompt);
    row("training step", cost.train(prompt, scored), prompt, seconds_of(step));
  }
  if (o.json) {
    nlohmann::ordered_json result{{"tokens", prompt}, {"threads", o.threads}, {"compute", o.compute}};
    auto pieces = nlohmann::ordered_json::array();
    for (const auto& augment : cost.augments) pieces.push_back(augment.tokens);
    if (!pieces.empty()) result["augment_tokens_a_token"] = pieces;
    result["rows"] = std::move(rows);
    std::cout << result << '\n';
    return;
  }
  calm::Table table({"a token of", "MFLOP", "MB of weights", "MB of caches", "tokens/s", "GFLOP/s"});
  for (const auto& r : rows) {
    const auto cell = [&](const char* key, double unit, int digits) {
      return calm::fixed(r[key].template get<double>() / unit, digits);
    };
    table.add_row({r["what"].template get<std::string>(), cell("flops_a_token", 1e6, 1),
                   cell("weight_bytes_a_token", 1e6, 2), cell("cache_bytes_a_token", 1e6, 2),
                   cell("tokens_a_second", 1, 1), cell("flops_a_second", 1e9, 1)});
  }
  std::cout << table.text();
}

/// The commands that take any model.
template <class Model>
void run_any(Ctx& ctx, const Model& model, const Options& o, const ModelTokenizer& tokenizer) {
  if (o.command == Command::logits) logits(ctx, model, o, tokenizer);
  else if (o.command == Command::generate) generate(ctx, model, o, tokenizer);
  else evaluate(ctx, model, o, tokenizer);
}

template <class Anchor>
void run_composed(Ctx& ctx, const Options& o, std::shared_ptr<const Anchor> anchor, const ModelTokenizer& tokenizer,
                  const std::vector<OpenedAugment>& augments) {
  using Model = calm::ComposedModel<Anchor, Augments>;
  std::vector<std::shared_ptr<const Augment>> models;
  for (const OpenedAugment& augment : augments) models.push_back(augment.model);
  std::vector<calm::BaseDescription> bases{calm::describe(*anchor, tokenizer.identity())};
  for (const OpenedAugment& augment : augments) bases.push_back(augment.description);
  if (o.command == Command::init) {
    calm::BridgeOptions options = o.preset == "paper" ? calm::preset::paper() : calm::BridgeOptions{};
    options.heads = o.heads;
    options.seed = o.seed;
    const std::string alignment = alignment_of(o, "", tokenizer, augments);
    const Model model(anchor, models, links_of(o), options, aligners_of(alignment, tokenizer, augments));
    calm::save_adapter(model, o.out, bases, alignment);
    const Index parameters = calm::count_parameters(model);
    if (o.json)
      std::cout << nlohmann::json{{"links", model.links().size()}, {"parameters", parameters}, {"out", o.out}} << '\n';
    else std::cout << model.links().size() << " links, " << parameters << " parameters -> " << o.out << '\n';
    return;
  }
  const calm::AdapterConfig config = calm::read_adapter_config(o.adapter);
  for (std::size_t i = 0; i < std::min(bases.size(), config.bases.size()); ++i) {
    const std::string& fault = (i == 0 ? tokenizer : augments[i - 1].tokenizer).fault();
    if (fault.empty()) continue;
    std::cerr << "calm: whether this tokenizer is the one that the adapter was made with is not known: " << fault
              << '\n';
    bases[i].tokenizer = config.bases[i].tokenizer;
  }
  calm::adapter::check_bases(o.adapter, config.bases, bases, o.allow_requantised);
  const std::string alignment = alignment_of(o, config.alignment, tokenizer, augments);
  Model model(anchor, models, calm::Links(config.links), config.options, aligners_of(alignment, tokenizer, augments));
  calm::load_adapter_weights(model, o.adapter, config);
  if (o.command == Command::inspect) {
    calm::CompositionCost cost{.anchor = calm::cost_of(*anchor), .links = model.links(), .options = model.options()};
    cost.value_bytes = o.compute == "bf16" ? 2 : 0;
    const std::vector<TokenId> ids = ids_to_measure(o.tokens + 16, anchor->spec(), tokenizer);
    const auto aligners = aligners_of(alignment, tokenizer, augments);
    for (std::size_t a = 0; a < augments.size(); ++a) {
      calm::AlignedBatch aligned;
      aligned.clear();
      calm::AlignmentState state;
      aligned.append(*aligners[a], state, std::span(ids), o.tokens);
      cost.augments.push_back(
          {augments[a].cost, static_cast<double>(aligned.ids.size()) / static_cast<double>(ids.size())});
    }
    return print_cost(ctx, model, o, ids, cost);
  }
  if (o.command == Command::gradients) gradients(ctx, model, o, tokenizer);
  else if (o.command == Command::train) train(ctx, model, o, tokenizer, bases, alignment);
  else run_any(ctx, model, o, tokenizer);
}

template <class Architecture>
void run_with(Ctx& ctx, const Options& o, const calm::Pretrained& files) {
  const auto model = files.open_as<calm::Transformer<Architecture>>();
  const ModelTokenizer tokenizer(o.main_model());
  if (!o.composed() && o.command == Command::inspect)
    return print_cost(ctx, *model, o, ids_to_measure(o.tokens + 16, model->spec(), tokenizer),
                      {.anchor = calm::cost_of(*model), .value_bytes = o.compute == "bf16" ? 2.0 : 0.0});
  if (!o.composed()) return run_any(ctx, *model, o, tokenizer);
  std::vector<OpenedAugment> augments;
  for (const std::string& path : o.augments) augments.push_back(open_augment(path));
  run_composed(ctx, o, model, tokenizer, augments);
}

template <class Architecture>
OpenedAugment open_augment_as(const calm::Pretrained& files) {
  const auto model = files.open_as<calm::Transformer<Architecture>>();
  ModelTokenizer tokenizer(files.path().string());
  calm::BaseDescription description = calm::describe(*model, tokenizer.identity());
  return {std::make_shared<const Augment>(model), std::move(description), std::move(tokenizer), calm::cost_of(*model)};
}

/// Of a frozen weight's cpu::PanelForm.
template <class S>
Index bytes_of_panels(Index rows, Index cols) {
  return calm::cpu::panels_of<S>(rows) * calm::cpu::panel_columns<S> * cols * Index{sizeof(S)};
}

template <class Architecture>
StoredWeights stored_weights_of(const calm::Pretrained& files) {
  StoredWeights found;
  const bool tied = files.spec().tied_embeddings;
  const auto add = [&](const std::string& name, const auto& weight) {
    found.parameters += weight.size();
    found.bytes += weight.stored_bytes();
    found.types[std::string(calm::name_of(weight.dtype()))] += weight.size();
    // Not multiplied: vectors, and tables whose rows are looked up.
    if (weight.rows() == 1 || name.starts_with("model.embed_positions")) return;
    if (!tied && name.starts_with("model.embed_tokens")) return;
    found.packed_f32 += bytes_of_panels<float>(weight.rows(), weight.cols());
    found.packed_bf16 += bytes_of_panels<calm::cpu::Pair>(weight.rows(), calm::cpu::pairs_of(weight.cols()));
  };
  calm::for_each_weight(*files.open_as<calm::Transformer<Architecture>>(), add);
  return found;
}

}  // namespace cli
