// The models that a command line names: opened by their files, described for adapters, composed.
#pragma once

#include "options.hpp"

#include <calm/backend/cpu.hpp>
#include <calm/compose/any_augment.hpp>
#include <calm/evaluate/cost.hpp>
#include <calm/io/adapter.hpp>
#include <calm/io/pretrained.hpp>
#include <calm/io/tokenizer/byte_aligner.hpp>
#include <calm/io/tokenizer/pretrained_tokenizer.hpp>

#include <map>
#include <utility>

namespace cli {

using calm::Index;
using calm::TokenId;
using Ctx = calm::Context<calm::CpuBackend>;
using Augment = calm::AnyAugment<Ctx>;
using Augments = calm::AnyAugments<Ctx>;
using TokenizerPointer = std::shared_ptr<const calm::Tokenizer>;

/// The tokenizer of a model, opened when it is first asked for. One that cannot be read is an error only where it is
/// needed.
class ModelTokenizer {
 public:
  explicit ModelTokenizer(std::string path) : path_(std::move(path)) {}

  /// nullptr where the model has none. Throws FormatError where it cannot be read.
  const TokenizerPointer& find() const {
    calm::require<calm::FormatError>(fault().empty(), fault());
    return tokenizer_;
  }
  /// The same, and a ConfigError where the model has none; `instead` says what to do then.
  const calm::Tokenizer& get(const char* instead = "") const {
    calm::require<calm::ConfigError>(find() != nullptr, path_, ": has no tokenizer", instead);
    return *tokenizer_;
  }
  /// Why it cannot be read; empty where it can be, and where the model has none.
  const std::string& fault() const {
    open();
    return fault_;
  }
  /// Empty where the model has none, or one that cannot be read.
  std::string identity() const {
    open();
    return tokenizer_ ? tokenizer_->identity() : "";
  }

 private:
  void open() const {
    if (std::exchange(opened_, true)) return;
    try {
      if (auto tokenizer = calm::find_tokenizer(path_))
        tokenizer_ = std::make_shared<const calm::Tokenizer>(std::move(*tokenizer));
    } catch (const calm::Error& error) {
      fault_ = error.what();
    }
  }

  std::string path_;
  mutable bool opened_ = false;
  mutable TokenizerPointer tokenizer_;
  mutable std::string fault_;
};

struct OpenedAugment {
  std::shared_ptr<const Augment> model;
  calm::BaseDescription description;
  ModelTokenizer tokenizer;
  calm::ModelCost cost;
};

/// Of any architecture.
OpenedAugment open_augment(const std::string& path);

/// The products that a command computes with: in f32 what multiplies many rows packs frozen weights, what decodes keeps
/// them interleaved, and what reads one prompt takes them as they are stored.
calm::MakeProducts products_of(Command command, const Options& o);

/// What `calm inspect` says of a model's weights.
struct StoredWeights {
  Index parameters = 0, bytes = 0;
  Index packed_f32 = 0, packed_bf16 = 0;  // bytes of the forms that products read, by --compute
  std::map<std::string, Index> types;     // how many values are stored as each type
};

// Compiled once for each architecture, in files of their own (architecture.cpp.in); nothing else of the program
// instantiates a model.

/// Runs the command with an anchor, or a single model, of this architecture.
template <class Architecture>
void run_with(Ctx& ctx, const Options& options, const calm::Pretrained& files);
template <class Architecture>
OpenedAugment open_augment_as(const calm::Pretrained& files);
template <class Architecture>
StoredWeights stored_weights_of(const calm::Pretrained& files);

/// "1,2,3" as ids.
std::vector<TokenId> parse_ids(const std::string& text);

/// The ids that --ids or --text give.
inline std::vector<TokenId> ids_of(const Options& o, const ModelTokenizer& tokenizer) {
  if (o.has_ids) return parse_ids(o.ids);
  std::vector<TokenId> ids;
  for (const auto& token : tokenizer.get("; give --ids").encode(o.text, {.add_special = !o.no_special}))
    ids.push_back(token.id);
  calm::require<calm::ConfigError>(!ids.empty(), "the text gives no token; give at least one");
  return ids;
}

/// Links as --links or --links-count say.
calm::Links links_of(const Options& o);

/// How the augments read what the anchor writes: what the adapter was made with (`stored`), which --alignment may not
/// contradict; without either identity where the tokenizers are one, which have to be readable then.
std::string alignment_of(const Options& o, const std::string& stored, const ModelTokenizer& anchor,
                         const std::vector<OpenedAugment>& augments);
std::vector<std::shared_ptr<const calm::Aligner>> aligners_of(const std::string& alignment,
                                                              const ModelTokenizer& anchor,
                                                              const std::vector<OpenedAugment>& augments);

}  // namespace cli
