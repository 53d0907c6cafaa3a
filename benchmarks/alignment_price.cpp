// alignment_price: what it costs an augment to read its text in the pieces of another tokenizer. Bits per byte of the
// augment alone on the same texts, tokenized as a whole and by ByteAligner.
//
// A text file has a paragraph a line. Each line after the first is scored behind the line before it, which is the
// prompt.
#include <calm/backend/cpu.hpp>
#include <calm/io/pretrained.hpp>
#include <calm/io/tokenizer/byte_aligner.hpp>
#include <calm/io/tokenizer/pretrained_tokenizer.hpp>
#include <calm/train/trainer.hpp>

#include <CLI/CLI.hpp>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <numbers>

namespace {

using calm::Index;
using calm::TokenId;
using Ids = std::vector<TokenId>;
using Context = calm::Context<calm::CpuBackend>;
using TokenizerPointer = std::shared_ptr<const calm::Tokenizer>;

struct Document {
  std::string prompt, completion;
};

std::vector<Document> read_documents(const std::string& path) {
  std::ifstream file(path);
  calm::require<calm::IoError>(file.good(), path, ": cannot be read");
  std::vector<Document> documents;
  std::string before;
  for (std::string line; std::getline(file, line); before = line + "\n")
    if (!before.empty()) documents.push_back({before, line});
  calm::require<calm::FormatError>(!documents.empty(), path, ": needs at least two lines");
  return documents;
}

Ids ids_of(const std::vector<calm::EncodedToken>& tokens) {
  Ids ids;
  for (const auto& token : tokens) ids.push_back(token.id);
  return ids;
}

/// Prompt and completion as the augment's own tokenizer cuts them when it sees both.
calm::Example canonical(const Document& document, const calm::Tokenizer& augment) {
  calm::Example example;
  const auto border = static_cast<Index>(document.prompt.size());
  for (const auto& token : augment.encode(document.prompt + document.completion)) {
    calm::require<calm::FormatError>(token.end <= border || token.begin >= border, "a token spans the end of a line");
    (token.end <= border ? example.prompt : example.completion).push_back(token.id);
  }
  return example;
}

/// The same as an augment reads them behind an anchor, by the function that training and generation call.
calm::Example piecewise(const Document& document, const calm::Tokenizer& anchor, const calm::Aligner& aligner) {
  Ids ids = ids_of(anchor.encode(document.prompt));
  const auto prompt = static_cast<Index>(ids.size());
  const Ids completion = ids_of(anchor.encode(document.completion, {.add_special = false, .dummy_prefix = false}));
  ids.insert(ids.end(), completion.begin(), completion.end());
  calm::AlignedBatch aligned;
  aligned.clear();
  calm::AlignmentState state;
  aligned.append(aligner, state, ids, prompt);
  const auto border = aligned.ids.begin() + aligned.prompt_lengths[0];
  return {{aligned.ids.begin(), border}, {border, aligned.ids.end()}};
}

struct Reading {
  double bits = 0;
  Index tokens = 0;

  template <class Model>
  void add(Context& ctx, const Model& model, const calm::Example& example) {
    calm::PackedBatch batch;
    batch.add(example);
    calm::KeptStates<Model> states;
    bits += calm::batch_loss(ctx, model, batch, states, nullptr, 1.0) / std::numbers::ln2;
    tokens += static_cast<Index>(example.completion.size());
  }
};

template <class Model>
void measure(Context& ctx, const Model& model, const TokenizerPointer& anchor, const TokenizerPointer& augment,
             const std::vector<std::string>& texts) {
  const calm::ByteAligner aligner(anchor, augment, model.spec().context);
  std::puts("| text | bytes | tokens, whole | tokens, pieces | bits a byte, whole | bits a byte, pieces | price |");
  std::puts("|---|---|---|---|---|---|---|");
  for (const std::string& text : texts) {
    Reading whole, pieces;
    double bytes = 0;
    for (const Document& document : read_documents(text)) {
      bytes += static_cast<double>(document.completion.size());
      whole.add(ctx, model, canonical(document, *augment));
      pieces.add(ctx, model, piecewise(document, *anchor, aligner));
    }
    std::printf("| %s | %.0f | %lld | %lld | %.3f | %.3f | %+.1f %% |\n",
                std::filesystem::path(text).stem().string().c_str(), bytes, static_cast<long long>(whole.tokens),
                static_cast<long long>(pieces.tokens), whole.bits / bytes, pieces.bits / bytes,
                100 * (pieces.bits / whole.bits - 1));
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Bits per byte of an augment: its text tokenized as a whole, and in the pieces of an anchor's tokens."};
  std::string anchor, augment;
  std::vector<std::string> texts;
  int threads = 0;
  app.add_option("--anchor", anchor, "whose tokenizer cuts the text")->required();
  app.add_option("--augment", augment, "the model that reads it")->required();
  app.add_option("--threads", threads);
  app.add_option("texts", texts, "text files, a paragraph a line")->required();
  CLI11_PARSE(app, argc, argv);
  try {
    const auto tokenizer_of = [](const std::string& path) {
      return std::make_shared<const calm::Tokenizer>(calm::open_tokenizer(path));
    };
    Context ctx(threads);
    calm::visit_model(augment,
                      [&](auto model) { measure(ctx, *model, tokenizer_of(anchor), tokenizer_of(augment), texts); });
  } catch (const std::exception& error) {
    std::fprintf(stderr, "alignment_price: %s\n", error.what());
    return 1;
  }
}
