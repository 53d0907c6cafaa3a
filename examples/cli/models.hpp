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

namespace cli {

using calm::Index;
using calm::TokenId;
using Ctx = calm::Context<calm::CpuBackend>;
using Augment = calm::AnyAugment<Ctx>;
using Augments = calm::AnyAugments<Ctx>;
using TokenizerPointer = std::shared_ptr<const calm::Tokenizer>;

/// nullptr where the model has none.
inline TokenizerPointer find_tokenizer(const std::string& path) {
  auto tokenizer = calm::find_tokenizer(path);
  return tokenizer ? std::make_shared<const calm::Tokenizer>(std::move(*tokenizer)) : nullptr;
}

inline std::string identity_of(const TokenizerPointer& tokenizer) { return tokenizer ? tokenizer->identity() : ""; }

struct OpenedAugment {
  std::shared_ptr<const Augment> model;
  calm::BaseDescription description;
  TokenizerPointer tokenizer;
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
OpenedAugment open_augment_as(const calm::Pretrained& files, TokenizerPointer tokenizer);
template <class Architecture>
StoredWeights stored_weights_of(const calm::Pretrained& files);

/// "1,2,3" as ids.
std::vector<TokenId> parse_ids(const std::string& text);

/// The ids that --ids or --text give.
inline std::vector<TokenId> ids_of(const Options& o, const TokenizerPointer& tokenizer) {
  if (!o.ids.empty()) return parse_ids(o.ids);
  calm::require<calm::ConfigError>(tokenizer != nullptr, o.main_model(), ": has no tokenizer; give --ids");
  std::vector<TokenId> ids;
  for (const auto& token : tokenizer->encode(o.text, {.add_special = !o.no_special})) ids.push_back(token.id);
  calm::require<calm::ConfigError>(!ids.empty(), "the text gives no token; give at least one");
  return ids;
}

/// Links as --links or --links-count say.
calm::Links links_of(const Options& o);

/// How the augments read what the anchor writes: what the adapter was made with (`stored`), which --alignment may not
/// contradict; without either identity where the tokenizers are one.
std::string alignment_of(const Options& o, const std::string& stored, const TokenizerPointer& anchor,
                         const std::vector<OpenedAugment>& augments);
std::vector<std::shared_ptr<const calm::Aligner>> aligners_of(const std::string& alignment,
                                                              const TokenizerPointer& anchor,
                                                              const std::vector<OpenedAugment>& augments);

}  // namespace cli
