// generate: continues prompts with any LanguageModel, with caches, many prompts of different lengths at once.
//
// Each prompt draws from a random stream of its own, so what it gets does not depend on the batch it is in.
#pragma once

#include <calm/generate/sampler.hpp>
#include <calm/model/decoder.hpp>
#include <calm/nn/embedding.hpp>

#include <algorithm>
#include <functional>
#include <string>

namespace calm::inline CALM_ABI {

/// What happens where a context is full: that of the model, or that of any augment of a composed one. In either case a
/// prompt that does not fit is a ContextLimitError before anything is generated. How many tokens an augment with a
/// tokenizer of its own will read is not known before: where its context proves too short, the generation ends with
/// FinishReason::context, in either case.
enum class AtContextLimit : std::uint8_t {
  error,  // ContextLimitError before anything is generated, if prompt and new tokens together could not fit
  stop,   // the generation ends there, with FinishReason::context
};

enum class FinishReason : std::uint8_t { end_token, stop_string, length, context };

struct GenerateOptions {
  Index max_new_tokens = 128;
  std::vector<TokenId> end_tokens = {};  // any of them ends a text; empty: none
  SamplerOptions sampler = {};
  std::vector<std::string> stop = {};  // needs `text_of`; the text ends before the first that appears
  std::function<std::string(TokenId)> text_of = {};
  AtContextLimit at_limit = AtContextLimit::error;
  Index batch = 256;     // prompts that run side by side
  bool augments = true;  // false: a composed model generates as its anchor alone
};

/// A token as it is streamed: which prompt it continues, and the text that is now certain not to begin a stop string.
struct StreamedToken {
  std::size_t prompt = 0;
  SampledToken token;
  std::string_view text;
};

struct Generation {
  std::vector<TokenId> ids;  // without the end token
  std::vector<double> log_probabilities;
  std::string text;  // where text_of is given, without the stop string
  FinishReason reason = FinishReason::length;
};

namespace generation {

/// Text that grows by tokens and may end in a stop string.
class StopMatcher {
 public:
  explicit StopMatcher(const std::vector<std::string>& stops) : stops_(&stops) {}

  /// Adds text; true when a stop string is complete. released() is then what stands before the first.
  bool add(std::string_view more) {
    const std::size_t before = text_.size();
    text_ += more;
    std::size_t found = std::string::npos;
    for (const std::string& stop : *stops_) {
      const std::size_t from = before > stop.size() ? before - stop.size() : 0;
      if (!stop.empty()) found = std::min(found, text_.find(stop, from));
    }
    if (found != std::string::npos) text_.resize(found);
    safe_ = found != std::string::npos ? text_.size() : std::max(safe_, text_.size() - held_back());
    return found != std::string::npos;
  }

  /// Text that was not released before and can no longer become part of a stop string.
  std::string_view release() {
    const std::string_view fresh = std::string_view(text_).substr(released_, safe_ - released_);
    released_ = safe_;
    return fresh;
  }
  std::string_view release_all() {
    safe_ = text_.size();
    return release();
  }
  const std::string& text() const { return text_; }

 private:
  std::size_t held_back() const {
    std::size_t most = 0;
    for (const std::string& stop : *stops_)
      for (std::size_t n = 1; n < stop.size() && n <= text_.size(); ++n)
        if (text_.ends_with(std::string_view(stop).substr(0, n))) most = std::max(most, n);
    return most;
  }

  const std::vector<std::string>* stops_;
  std::string text_;
  std::size_t safe_ = 0, released_ = 0;
};

struct Running {
  std::size_t prompt;
  Random random;
  StopMatcher matcher;
};

}  // namespace generation

/// Appends a batch to a session and gives the logits of the token behind each sequence, [sequences, vocabulary] in the
/// arena; `batch.rows` is not read, since only the last row of a sequence goes through all of the last block. Throws
/// ShapeError where a sequence is empty, and what advance() throws.
template <class Model, class Ctx>
requires LanguageModel<Model, Ctx> MatrixView<typename Model::Scalar> next_logits(Ctx& ctx, const Model& model,
                                                                                  typename Model::Session& session,
                                                                                  TokenBatch batch) {
  batch.check();
  const auto rows = ctx.arena.template vector<Index>(batch.sequences());
  for (Index s = 0; s < batch.sequences(); ++s) {
    require<ShapeError>(batch.length(s) > 0, "next_logits: sequence ", s, " has no token");
    rows[static_cast<std::size_t>(s)] = batch.offsets[static_cast<std::size_t>(s) + 1] - 1;
  }
  batch.rows = batch.sequences() < batch.tokens() ? rows : std::span<const Index>();
  const MatrixView<const typename Model::Scalar> stream = model.advance(ctx, session, batch, NullObserver{});
  require<ShapeError>(stream.rows == batch.sequences(), "the model's advance() gave ", stream.rows,
                      " rows where the batch asks for ", batch.sequences(), " (TokenBatch::rows)");
  const auto logits = ctx.arena.template matrix<typename Model::Scalar>(stream.rows, model.spec().vocabulary);
  typename Model::HeadCache head;
  model.head(ctx, stream, logits, head);
  return logits;
}

/// Continues each prompt (at least one token each). `stream`, where given, is called with every token as it comes.
template <class Model, class Ctx>
requires LanguageModel<Model, Ctx> std::vector<Generation> generate(
    Ctx& ctx, const Model& model, std::span<const std::vector<TokenId>> prompts, const GenerateOptions& options,
    const std::function<void(const StreamedToken&)>& stream = {}) {
  using Scalar = typename Model::Scalar;
  require<ConfigError>(options.stop.empty() || options.text_of, "stop strings need text_of, the text of a token");
  require<ConfigError>(options.batch >= 1, "generate: batch must be at least 1, found ", options.batch);
  require<ConfigError>(options.max_new_tokens >= 0, "generate: max_new_tokens must be at least 0, found ",
                       options.max_new_tokens);
  const bool may_stop = options.at_limit == AtContextLimit::stop;
  const Index context = model.spec().context, most = std::min(options.max_new_tokens, context);
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    const auto length = static_cast<Index>(prompts[p].size());
    check_ids(prompts[p], model.spec().vocabulary);
    require<ShapeError>(length > 0, "prompt ", p, " is empty; a model continues at least one token");
    const Index needed = may_stop ? length : length + most;
    const Index more = needed - length;
    const auto wanted = more > 0 ? message(" and ", options.max_new_tokens, " more are asked for") : std::string();
    const std::string_view advice = more > 0 ? "ask for fewer or choose AtContextLimit::stop" : "shorten it";
    require<ContextLimitError>(needed <= context, "prompt ", p, " has ", length, " tokens", wanted,
                               ", but the model's context is ", context, "; ", advice);
    require<ContextLimitError>(model.fits(nullptr, 0, prompts[p], length, more, {-1, options.augments}), "prompt ", p,
                               " has ", length, " tokens", wanted, ", which the context of an augment does not hold; ",
                               advice, options.augments ? ", or generate without augments" : "");
  }
  Sampler sampler(options.sampler);
  std::vector<Generation> results(prompts.size());
  for (std::size_t begin = 0; begin < prompts.size(); begin += static_cast<std::size_t>(options.batch)) {
    const std::size_t end = std::min(prompts.size(), begin + static_cast<std::size_t>(options.batch));
    Index longest = 0;
    for (std::size_t p = begin; p < end; ++p) longest = std::max(longest, static_cast<Index>(prompts[p].size()));
    auto session = model.make_session(ctx, static_cast<Index>(end - begin), std::min(context, longest + most),
                                      SessionOptions{-1, options.augments});
    std::vector<generation::Running> running;
    std::vector<TokenId> ids;
    std::vector<Index> offsets{0}, lengths, slots;
    for (std::size_t p = begin; p < end; ++p) {
      running.push_back({p, Random(options.sampler.seed, p), generation::StopMatcher(options.stop)});
      ids.insert(ids.end(), prompts[p].begin(), prompts[p].end());
      offsets.push_back(static_cast<Index>(ids.size()));
      lengths.push_back(static_cast<Index>(prompts[p].size()));
      slots.push_back(static_cast<Index>(p - begin));
    }
    for (Index produced = 0; produced < options.max_new_tokens && !running.empty(); ++produced) {
      ctx.arena.reset();
      const MatrixView<Scalar> logits = next_logits(ctx, model, session, {ids, offsets, lengths, slots});
      ids.clear();
      offsets.assign(1, 0);
      lengths.clear();
      slots.clear();
      std::size_t kept = 0;
      for (std::size_t i = 0; i < running.size(); ++i) {
        auto& now = running[i];
        Generation& result = results[now.prompt];
        const SampledToken token =
            sampler(std::span<const Scalar>(logits.row(static_cast<Index>(i)), static_cast<std::size_t>(logits.cols)),
                    now.random);
        const bool ended =
            std::find(options.end_tokens.begin(), options.end_tokens.end(), token.id) != options.end_tokens.end();
        bool stopped = false;
        if (!ended) {
          result.ids.push_back(token.id);
          result.log_probabilities.push_back(token.log_probability);
          if (options.text_of) stopped = now.matcher.add(options.text_of(token.id));
        }
        const auto slot = static_cast<Index>(now.prompt - begin);
        const bool last = produced + 1 == options.max_new_tokens;
        const bool full = !ended && !stopped && !model.fits(&session, slot, std::span(&token.id, 1), 0, 0);
        const bool done = ended || stopped || full || last;
        if (stream) stream({now.prompt, token, done && !stopped ? now.matcher.release_all() : now.matcher.release()});
        if (done) {
          result.reason = ended     ? FinishReason::end_token
                          : stopped ? FinishReason::stop_string
                          : full    ? FinishReason::context
                                    : FinishReason::length;
          result.text = now.matcher.text();
          continue;
        }
        ids.push_back(token.id);
        offsets.push_back(static_cast<Index>(ids.size()));
        lengths.push_back(0);
        slots.push_back(slot);
        if (kept != i) running[kept] = std::move(now);
        ++kept;
      }
      running.erase(running.begin() + static_cast<std::ptrdiff_t>(kept), running.end());
    }
  }
  return results;
}

}  // namespace calm::inline CALM_ABI
