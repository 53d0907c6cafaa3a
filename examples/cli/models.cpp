#include "models.hpp"

#include <calm/backend/cpu_bf16.hpp>
#include <calm/backend/cpu_stored.hpp>
#include <calm/model/zoo/zoo.hpp>

#include <sstream>

namespace cli {

OpenedAugment open_augment(const std::string& path) {
  const calm::Pretrained files(path);
  return calm::zoo::All::visit(files.model_type(),
                               [&](auto architecture) { return open_augment_as<decltype(architecture)>(files); });
}

std::vector<TokenId> parse_ids(const std::string& text) {
  std::vector<TokenId> ids;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    std::size_t used = 0;
    long value = -1;
    try {
      value = std::stol(part, &used);
    } catch (const std::exception&) {
    }
    calm::require<calm::ConfigError>(used > 0 && used == part.size() && value >= 0 && value <= 0x7FFFFFFF, "--ids: '",
                                     part, "' is no token; expected numbers such as 1,2,3");
    ids.push_back(static_cast<TokenId>(value));
  }
  calm::require<calm::ConfigError>(!ids.empty(), "--ids: at least one token is needed");
  return ids;
}

calm::MakeProducts products_of(Command command, const Options& o) {
  if (o.compute == "bf16") return calm::bf16_products;
  return command == Command::logits ? calm::stored_products : calm::interleaved_products;
}

calm::Links links_of(const Options& o) {
  if (o.links.empty()) return calm::links::evenly_spaced(o.links_count);
  return calm::Links(calm::parse_links(o.links, "--links"));
}

std::string alignment_of(const Options& o, const std::string& stored, const ModelTokenizer& anchor,
                         const std::vector<OpenedAugment>& augments) {
  calm::require<calm::ConfigError>(stored.empty() || o.alignment.empty() || stored == o.alignment, "--alignment ",
                                   o.alignment, ": the adapter was made for the alignment ", stored);
  if (!stored.empty()) return stored;
  if (!o.alignment.empty()) return o.alignment;
  const auto check = [](const ModelTokenizer& tokenizer) {
    calm::require<calm::FormatError>(tokenizer.fault().empty(), tokenizer.fault(),
                                     "; with --alignment identity no tokenizer is needed");
  };
  check(anchor);
  bool one = true;
  for (const OpenedAugment& augment : augments) {
    check(augment.tokenizer);
    one = one && anchor.identity() == augment.tokenizer.identity();
  }
  return one ? "identity" : "bytes";
}

std::vector<std::shared_ptr<const calm::Aligner>> aligners_of(const std::string& alignment,
                                                              const ModelTokenizer& anchor,
                                                              const std::vector<OpenedAugment>& augments) {
  std::vector<std::shared_ptr<const calm::Aligner>> aligners;
  for (const OpenedAugment& augment : augments) {
    if (alignment == "identity") {
      aligners.push_back(std::make_shared<calm::IdentityAligner>());
      continue;
    }
    const TokenizerPointer &outer = anchor.find(), &inner = augment.tokenizer.find();
    calm::require<calm::ConfigError>(outer && inner,
                                     "an alignment by bytes needs the tokenizers of the anchor and of each augment; "
                                     "with --ids give --alignment identity");
    aligners.push_back(std::make_shared<calm::ByteAligner>(outer, inner, augment.model->spec().context));
  }
  return aligners;
}

}  // namespace cli
