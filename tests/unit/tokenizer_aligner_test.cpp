// Two tokenizers over one text: what the augment reads, and who sees it when.
#include <doctest/doctest.h>
#include <calm/io/tokenizer/byte_aligner.hpp>
#include <calm/io/tokenizer/gguf_vocabulary.hpp>

#include <random>

namespace {

using calm::Index;
using calm::TokenId;
using Tokenizer = std::shared_ptr<const calm::Tokenizer>;

/// SentencePiece with all bytes and these words; BOS is token 1.
Tokenizer pieces(const std::vector<std::string>& words) {
  calm::GgufVocabulary v;
  v.model = "llama";
  v.tokens = {"<unk>", "<s>", "</s>"};
  v.token_types = {2, 3, 3};
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(byte));
    v.tokens.push_back(name);
    v.token_types.push_back(6);
  }
  for (const std::string& word : words) {
    v.tokens.push_back(word);
    v.token_types.push_back(1);
  }
  for (std::size_t i = 0; i < v.tokens.size(); ++i) v.scores.push_back(static_cast<float>(v.tokens[i].size()));
  v.bos = 1;
  v.eos = 2;
  v.unknown = 0;
  v.add_bos = true;
  v.add_eos = false;
  v.add_space_prefix = false;
  return std::make_shared<const calm::Tokenizer>(calm::make_tokenizer(v, "test"));
}

const Tokenizer words = pieces({"h", "e", "l", "o", "he", "hel", "hell", "hello", "ll", "\u2581", "w", "\u2581w", "é"});
const Tokenizer letters = pieces({"h", "e", "l", "o", "w", "lo", "\u2581"});

std::vector<TokenId> ids_of(const calm::Tokenizer& tokenizer, const std::string& text) {
  std::vector<TokenId> ids;
  for (const auto& token : tokenizer.encode(text)) ids.push_back(token.id);
  return ids;
}

calm::AlignedBatch align(const calm::ByteAligner& aligner, const std::vector<TokenId>& ids, Index prompt,
                         const std::vector<Index>& pieces) {
  calm::AlignedBatch batch;
  batch.clear();
  calm::AlignmentState state;
  std::size_t at = 0;
  for (Index piece : pieces) {
    const auto end = std::min(ids.size(), at + static_cast<std::size_t>(piece));
    batch.append(aligner, state, std::span(ids).subspan(at, end - at), at == 0 ? prompt : 0);
    at = end;
  }
  return batch;
}

}  // namespace

TEST_CASE("a token of the prompt is seen from the anchor token on that ends with it or after it") {
  const calm::ByteAligner aligner(words, letters, 100);
  const auto ids = ids_of(*words, "hello w");  // BOS, hello, _w
  REQUIRE(ids.size() == 3);
  const auto batch = align(aligner, ids, 3, {3});
  CHECK(letters->decode(batch.ids) == "hello w");
  CHECK(batch.ids.size() == 7);                         // BOS h e l lo _ w
  CHECK(batch.visible == std::vector<Index>{1, 5, 7});  // BOS is seen at once
  CHECK(batch.key_positions == std::vector<Index>{0, 1, 1, 1, 1, 2, 2});
}

TEST_CASE("after the prompt each anchor token is encoded alone, and a split character is held back") {
  const calm::ByteAligner aligner(words, letters, 100);
  std::vector<TokenId> ids = ids_of(*words, "he");
  const auto prompt = static_cast<Index>(ids.size());
  ids.push_back(*words->find("ll"));
  ids.push_back(*words->find("o"));
  ids.push_back(3 + 0xC3);  // é as two bytes
  ids.push_back(3 + 0xA9);
  const auto batch = align(aligner, ids, prompt, {static_cast<Index>(ids.size())});
  CHECK(letters->decode(batch.ids) == "hello\u00e9");
  CHECK(batch.visible == std::vector<Index>{1, 3, 5, 6, 6, 8});  // l, l, o alone: "lo" is never merged over the border
}

TEST_CASE("the pieces in which a text comes change nothing, and neither does what follows") {
  std::mt19937 random(1);
  const std::vector<std::string> parts = {"hello", " w", "é", "\xF0\x9F\x98\x80", "x", "", " ", "\xFF", "lo", "<s>"};
  for (const auto& [a, b] : {std::pair{words, letters}, {letters, words}, {words, words}}) {
    const calm::ByteAligner aligner(a, b, 1000);
    for (int round = 0; round < 200; ++round) {
      std::string text;
      for (int i = 0; i < 6; ++i) text += parts[random() % parts.size()];
      const auto ids = ids_of(*a, text);
      const auto count = static_cast<Index>(ids.size());
      const Index prompt = 1 + static_cast<Index>(random()) % count;
      const auto whole = align(aligner, ids, prompt, {count});
      std::vector<Index> cuts{prompt};
      while (cuts.size() < ids.size()) cuts.push_back(1 + static_cast<Index>(random() % 3));
      const auto cut = align(aligner, ids, prompt, cuts);
      CHECK(cut.ids == whole.ids);
      CHECK(cut.visible == whole.visible);
      auto shorter = ids;
      if (count > prompt) shorter.pop_back();
      const auto before = align(aligner, shorter, prompt, {static_cast<Index>(shorter.size())});
      CHECK(std::equal(before.ids.begin(), before.ids.end(), whole.ids.begin()));
      CHECK(std::equal(before.visible.begin(), before.visible.end(), whole.visible.begin()));
      CHECK(static_cast<Index>(whole.ids.size()) <= aligner.augment_capacity(count));
    }
  }
}

TEST_CASE("a sequence without a prompt begins with the augment's own first token") {
  const calm::ByteAligner aligner(words, letters, 100);
  const auto batch = align(aligner, {*words->find("he")}, 0, {1});
  CHECK(batch.ids.size() == 3);
  CHECK(batch.ids[0] == 1);
  CHECK(batch.visible == std::vector<Index>{3});
}
