// Two tokenizers over one text: what the augment reads, and who sees it when.
#include <doctest/doctest.h>
#include <calm/generate/generate.hpp>
#include <calm/io/tokenizer/byte_aligner.hpp>
#include <calm/io/tokenizer/gguf_vocabulary.hpp>
#include <support/models.hpp>

#include <random>

namespace tokenizer_aligner_test {

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

/// The byte token of a tokenizer of pieces().
TokenId byte(int value) { return static_cast<TokenId>(3 + value); }

using Llama = calm::Transformer<calm::zoo::Llama, calm::Frozen, float>;
using Composed = calm::ComposedModel<Llama, Llama>;

std::shared_ptr<const Llama> make_model(const Tokenizer& tokenizer, std::uint64_t seed) {
  const calm::ModelSpec spec{.vocabulary = tokenizer->vocabulary_size(),
                             .width = 24,
                             .hidden = 40,
                             .blocks = 2,
                             .heads = {2, 2, 12},
                             .context = 200};
  return std::make_shared<const Llama>(spec, calm_test::TestWeights{seed, calm::DType::f32});
}
/// An anchor and an augment with a tokenizer each.
Composed make_composed(const Tokenizer& anchor, const Tokenizer& augment) {
  Composed model(make_model(anchor, 1), {make_model(augment, 2)}, {{0, 0, 0}, {0, 1, 1}}, {.rotary = true},
                 {std::make_shared<const calm::ByteAligner>(anchor, augment, 200)});
  calm_test::randomise(model, 3);
  return model;
}

const std::vector<std::pair<Tokenizer, Tokenizer>> pairs = {{words, letters}, {letters, words}, {words, words}};

/// Tokens that split characters, join words, end a text in the middle of a character, and say nothing.
std::vector<TokenId> adversarial_tokens(const calm::Tokenizer& tokenizer, std::size_t count, std::mt19937& random) {
  const std::vector<TokenId> odd = {byte(0xC3), byte(0xA9), byte(0xF0), byte(0x9F), byte(0xFF), 0, 1, 2};
  std::vector<TokenId> ids;
  for (std::size_t i = 0; i < count; ++i) {
    const auto any = static_cast<TokenId>(random() % static_cast<unsigned>(tokenizer.vocabulary_size()));
    const auto word = static_cast<TokenId>(259 + random() % static_cast<unsigned>(tokenizer.vocabulary_size() - 259));
    ids.push_back(random() % 3 == 0 ? odd[random() % odd.size()] : random() % 4 == 0 ? any : word);
  }
  return ids;
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

TEST_CASE("in the prompt a character that the anchor splits is seen with its last byte, a word with its last letter") {
  const calm::ByteAligner aligner(letters, words, 100);
  // h e l l o, then \u00e9 as two bytes and an emoji as four: the augment reads hello, \u00e9, four bytes.
  const auto ids = ids_of(*letters, "hello\u00e9\xF0\x9F\x98\x80");
  REQUIRE(ids.size() == 1 + 4 + 2 + 4);  // BOS h e l lo
  const auto batch = align(aligner, ids, 11, {11});
  CHECK(batch.ids == ids_of(*words, "hello\u00e9\xF0\x9F\x98\x80"));
  REQUIRE(batch.ids.size() == 1 + 1 + 1 + 4);
  CHECK(batch.visible == std::vector<Index>{1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 7});
}

TEST_CASE("after the prompt nothing is merged across the anchor's tokens") {
  const calm::ByteAligner aligner(letters, words, 100);
  const auto prompt = ids_of(*letters, "w");
  std::vector<TokenId> ids = prompt;
  for (const char* letter : {"h", "e", "l", "lo"}) ids.push_back(*letters->find(letter));
  const auto batch = align(aligner, ids, static_cast<Index>(prompt.size()), {static_cast<Index>(ids.size())});
  CHECK(words->decode(batch.ids) == "whello");
  CHECK(batch.ids.size() == 2 + 5);  // "hello" is one of the augment's tokens
  CHECK(batch.visible == std::vector<Index>{1, 2, 3, 4, 5, 7});
}

TEST_CASE("special tokens stand for no bytes, and those that are written out are text") {
  const calm::ByteAligner aligner(words, letters, 100);
  const TokenId bos = 1, eos = 2, he = *words->find("he");
  // In the prompt, after it, and between the halves of a character.
  const auto batch = align(aligner, {bos, he, eos, he, eos, byte(0xC3), bos, byte(0xA9), eos}, 3, {9});
  CHECK(letters->decode(batch.ids) == "hehe\u00e9");
  CHECK(batch.visible == std::vector<Index>{1, 3, 3, 5, 5, 5, 5, 7, 7});

  std::vector<TokenId> written = {bos};
  for (const char c : std::string("<s>")) written.push_back(byte(c));
  for (const Index prompt : {Index{1}, Index{4}}) {
    const auto text = align(aligner, written, prompt, {4});
    CHECK(text.ids == std::vector<TokenId>{1, byte('<'), byte('s'), byte('>')});
    CHECK(text.visible == std::vector<Index>{1, 2, 3, 4});
  }
}

TEST_CASE("an empty text is the augment's first token, which is seen at once") {
  const calm::ByteAligner aligner(words, letters, 100);
  for (const Index prompt : {Index{0}, Index{1}}) {
    const auto batch = align(aligner, {1}, prompt, {1});
    CHECK(batch.ids == std::vector<TokenId>{1});
    CHECK(batch.visible == std::vector<Index>{1});
  }
  CHECK(align(aligner, {}, 0, {0}).visible.empty());
}

TEST_CASE("bytes that become no character are read as bytes, and ids that no token has are not read") {
  const calm::ByteAligner aligner(words, letters, 100);
  const auto beyond = static_cast<TokenId>(words->vocabulary_size() + 5);  // models pad their vocabulary
  const auto batch = align(aligner, {1, beyond, byte(0xC3), beyond, *words->find("h"), byte(0xF0), byte(0x9F)}, 2, {7});
  CHECK(batch.ids == std::vector<TokenId>{1, byte(0xC3), *letters->find("h")});  // the last two wait for more
  CHECK(batch.visible == std::vector<Index>{1, 1, 1, 1, 3, 3, 3});
}

TEST_CASE("every byte of the anchor's text reaches the augment once and in order, and none before its token") {
  std::mt19937 random(5);
  for (const auto& [a, b] : pairs) {
    const calm::ByteAligner aligner(a, b, 1000);
    for (int round = 0; round < 200; ++round) {
      const auto ids = adversarial_tokens(*a, 12, random);
      const Index prompt = static_cast<Index>(random() % 13);
      const auto batch = align(aligner, ids, prompt, {12});
      std::string text;
      for (std::size_t t = 0; t < ids.size(); ++t) {
        text += a->is_special(ids[t]) ? "" : a->token_bytes(ids[t]);
        const std::string seen = b->decode(std::span(batch.ids).first(static_cast<std::size_t>(batch.visible[t])));
        CHECK(text.starts_with(seen));
        // All but a character that is not whole yet, once the prompt is over.
        if (static_cast<Index>(t) + 1 > prompt) CHECK(text.size() - seen.size() <= calm::incomplete_utf8_suffix(text));
        if (static_cast<Index>(t) + 1 == prompt) CHECK(seen == text);
      }
    }
  }
}

TEST_CASE("across tokenizers a changed token leaves every logit before it bitwise as it was") {
  std::mt19937 random(6);
  for (const auto& [a, b] : pairs) {
    const Composed model = make_composed(a, b);
    calm_test::Cpu ctx(1);
    auto session = model.make_session(ctx, 1, 40);
    for (const Index prompt : {Index{0}, Index{5}}) {
      auto ids = adversarial_tokens(*a, 30, random);
      const auto logits_of = [&](const std::vector<TokenId>& tokens, bool cached) {
        session.clear(0);
        if (cached) return calm_test::cached_logits(model, ctx, session, 0, tokens, prompt, {1, 3, 2});
        calm_test::Batch batch;
        batch.add(tokens, prompt);
        return calm_test::forward_logits(model, ctx, batch);
      };
      for (const bool cached : {false, true}) {
        const auto before = logits_of(ids, cached);
        for (Index t = prompt; t < 30; ++t) {
          CAPTURE(t);
          auto changed = ids;
          changed[static_cast<std::size_t>(t)] = adversarial_tokens(*a, 1, random)[0];
          const auto after = logits_of(changed, cached);
          CHECK(calm_test::same_bits(calm_test::constant(before).middle_rows(0, t),
                                     calm_test::constant(after).middle_rows(0, t)));
        }
      }
    }
  }
}

TEST_CASE("across tokenizers generation with caches is scored alike by a pass over the same tokens") {
  std::mt19937 random(7);
  for (const auto& [a, b] : pairs) {
    const Composed model = make_composed(a, b);
    calm_test::Cpu ctx(1);
    std::vector<std::vector<TokenId>> prompts = {ids_of(*a, ""), ids_of(*a, "hello w\u00e9"), ids_of(*a, "x\xFF<s>")};
    prompts.push_back(adversarial_tokens(*a, 9, random));
    const auto results = calm::generate(ctx, model, std::span<const std::vector<TokenId>>(prompts),
                                        {.max_new_tokens = 30, .sampler = {.temperature = 1.5, .seed = 8}});
    for (std::size_t p = 0; p < prompts.size(); ++p) {
      REQUIRE(results[p].ids.size() == 30);
      std::vector<TokenId> all = prompts[p];
      all.insert(all.end(), results[p].ids.begin(), results[p].ids.end());
      calm_test::Batch batch;
      batch.add(all, static_cast<Index>(prompts[p].size()));
      const auto logits = calm_test::forward_logits(model, ctx, batch);
      for (std::size_t i = 0; i < 30; ++i) {
        const auto row = logits.view().middle_rows(static_cast<Index>(prompts[p].size() + i) - 1, 1);
        double total = 0;
        for (Index v = 0; v < row.cols; ++v) total += std::exp(static_cast<double>(row(0, v)));
        CHECK(results[p].log_probabilities[i] ==
              doctest::Approx(static_cast<double>(row(0, results[p].ids[i])) - std::log(total)).epsilon(1e-4));
      }
    }
  }
}

}  // namespace tokenizer_aligner_test
