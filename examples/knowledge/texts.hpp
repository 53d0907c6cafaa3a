// Texts as tokens: the tokenizers of the example, and examples made of prompts and completions.
#pragma once

#include "questions.hpp"

#include <calm/io/atomic_file.hpp>
#include <calm/io/folder.hpp>
#include <calm/io/tokenizer/pretrained_tokenizer.hpp>
#include <calm/train/dataset.hpp>

#include <cctype>
#include <memory>

namespace knowledge {

using TokenizerPointer = std::shared_ptr<const calm::Tokenizer>;
using calm::TokenId;

inline std::vector<TokenId> encode(const calm::Tokenizer& tokenizer, const std::string& text, bool begins) {
  std::vector<TokenId> ids;
  for (const auto& token :
       tokenizer.encode(text, {.add_special = begins, .parse_special = false, .dummy_prefix = begins}))
    ids.push_back(token.id);
  return ids;
}

/// Prompt and completion encoded by themselves, the end token appended.
inline calm::Example example_of(const calm::Tokenizer& tokenizer, const TextExample& text, bool ends = true) {
  calm::Example example{encode(tokenizer, text.prompt, true), encode(tokenizer, text.completion, false)};
  if (ends && tokenizer.eos()) example.completion.push_back(*tokenizer.eos());
  return example;
}

/// Only digits and small letters of the completion count: what stands between them is up to the anchor.
inline void score_content_alone(const calm::Tokenizer& tokenizer, calm::Example& example) {
  example.scored.assign(example.completion.size(), false);
  for (std::size_t i = 0; i < example.completion.size(); ++i)
    for (const char c : tokenizer.token_bytes(example.completion[i]))
      if (('0' <= c && c <= '9') || ('a' <= c && c <= 'z'))
        example.scored[i] = !tokenizer.is_special(example.completion[i]);
}

/// Reads one text and should say another at the same places; where their tokens are not as many, reads what it says.
inline calm::Example with_targets(calm::Example read, calm::Example said) {
  if (read.completion.size() != said.completion.size()) return said;
  read.targets = std::move(said.completion);
  return read;
}

/// A tokenizer of single bytes, as a tokenizer.json that other programs read too.
inline void write_byte_tokenizer(const std::filesystem::path& folder) {
  nlohmann::ordered_json vocabulary;
  unsigned next = 0x100;
  for (unsigned byte = 0; byte < 256; ++byte) {  // the alphabet of byte-level tokenizers (GPT-2, bytes_to_unicode)
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    const unsigned c = printable ? byte : next++;
    const std::string text = c < 0x80
                                 ? std::string(1, static_cast<char>(c))
                                 : std::string{static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
    vocabulary[text] = byte;
  }
  constexpr int end = 256;
  vocabulary["<|end|>"] = end;
  const nlohmann::ordered_json bytes{
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
  const nlohmann::ordered_json document{{"version", "1.0"},
                                        {"truncation", nullptr},
                                        {"padding", nullptr},
                                        {"added_tokens",
                                         {{{"id", end},
                                           {"content", "<|end|>"},
                                           {"single_word", false},
                                           {"lstrip", false},
                                           {"rstrip", false},
                                           {"normalized", false},
                                           {"special", true}}}},
                                        {"normalizer", nullptr},
                                        {"pre_tokenizer", bytes},
                                        {"post_processor", nullptr},
                                        {"decoder", bytes},
                                        {"model",
                                         {{"type", "BPE"},
                                          {"dropout", nullptr},
                                          {"unk_token", nullptr},
                                          {"continuing_subword_prefix", nullptr},
                                          {"end_of_word_suffix", nullptr},
                                          {"fuse_unk", false},
                                          {"byte_fallback", false},
                                          {"ignore_merges", false},
                                          {"vocab", vocabulary},
                                          {"merges", nlohmann::ordered_json::array()}}}};
  calm::make_folder(folder);
  calm::write_file_atomically(folder / "tokenizer.json", document.dump(1) + "\n");
  calm::write_file_atomically(folder / "tokenizer_config.json", "{\n \"eos_token\": \"<|end|>\"\n}\n");
}

/// Words to put around questions: the short lower-case words of a tokenizer's vocabulary.
inline std::vector<std::string> words_of(const calm::Tokenizer& tokenizer) {
  std::vector<std::string> words;
  for (TokenId id = 0; id < tokenizer.vocabulary_size(); ++id) {
    const std::string text = tokenizer.token_bytes(id);
    const auto is_small = [](char c) { return 'a' <= c && c <= 'z'; };
    if (text.size() >= 3 && text.size() <= 9 && text[0] == ' ' && std::all_of(text.begin() + 1, text.end(), is_small))
      words.push_back(text.substr(1));
  }
  return words;
}

}  // namespace knowledge
