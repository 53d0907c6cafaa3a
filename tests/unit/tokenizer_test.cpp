#include <doctest/doctest.h>
#include <calm/core/random.hpp>
#include <calm/io/tokenizer/chat.hpp>
#include <calm/io/tokenizer/gguf_vocabulary.hpp>
#include <calm/io/tokenizer/tokenizer_json.hpp>
#include <support/temporary_folder.hpp>

#include <fstream>
#include <string>
#include <vector>

namespace tokenizer_test {

namespace {

using calm::EncodedToken;
using Ids = std::vector<calm::TokenId>;

// Byte-level: "l o" -> "lo", "Ġ lo" -> "Ġlo"; é is the two bytes Ã ©.
const std::string byte_level = R"({"added_tokens": [
    {"id": 7, "content": "<end>", "special": true, "normalized": false},
    {"id": 8, "content": "<pad>", "special": false, "normalized": false, "lstrip": true}],
  "normalizer": {"type": "NFC"},
  "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Digits", "individual_digits": true},
    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
  "post_processor": {"type": "TemplateProcessing", "single": [
      {"SpecialToken": {"id": "<end>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {"<end>": {"id": "<end>", "ids": [7], "tokens": ["<end>"]}}},
  "decoder": {"type": "ByteLevel"},
  "model": {"type": "BPE", "unk_token": null, "byte_fallback": false, "ignore_merges": false,
    "vocab": {"l": 0, "o": 1, "Ġ": 2, "Ã": 3, "©": 4, "lo": 5, "Ġlo": 6, "1": 9, "11": 10},
    "merges": ["l o", ["Ġ", "lo"], "1 1"]}})";

// As Llama 2: a prefix, spaces as U+2581, bytes of unknown characters as tokens.
const std::string pieces = R"({"added_tokens": [{"id": 0, "content": "<unk>", "special": true},
    {"id": 1, "content": "<s>", "special": true, "normalized": false}],
  "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
  "pre_tokenizer": null,
  "decoder": {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
  "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
    "vocab": {"<unk>": 0, "<s>": 1, "<0xC3>": 2, "<0xA9>": 3, "▁": 4, "a": 5, "b": 6, "ab": 7, "▁ab": 8},
    "merges": ["a b", "▁ ab"]}})";

calm::Tokenizer read(const std::string& text) { return calm::Tokenizer(calm::parse_tokenizer_json(text, "t.json")); }

std::string error_of(const std::string& text) {
  try {
    read(text);
  } catch (const calm::FormatError& error) {
    return error.what();
  }
  return "no error";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

std::string replaced(std::string text, const std::string& part, const std::string& by) {
  const std::size_t place = text.find(part);
  REQUIRE(place != std::string::npos);
  return text.replace(place, part.size(), by);
}

Ids ids_of(const std::vector<EncodedToken>& tokens) {
  Ids ids;
  for (const EncodedToken& token : tokens) ids.push_back(token.id);
  return ids;
}

constexpr calm::EncodeOptions plain{.add_special = false};

calm::GgufVocabulary small_gguf() {
  calm::GgufVocabulary file;
  file.model = "llama";
  file.tokens = {"<unk>", "<s>", "\u2581", "a", "b", "ab", "ba", "\u2581a", "<0xC3>", "<0xA9>"};
  file.scores = {0, 0, -9, -9, -9, -2, -1, -2, 0, 0};
  file.token_types = {2, 3, 1, 1, 1, 1, 1, 1, 6, 6};
  file.bos = 1;
  return file;
}

}  // namespace

TEST_CASE("byte-level BPE gives the ids and byte ranges of a text") {
  const calm::Tokenizer tokenizer = read(byte_level);
  CHECK(tokenizer.encode("lo lo") == std::vector<EncodedToken>{{7, 0, 0}, {5, 0, 2}, {6, 2, 5}});
  CHECK(tokenizer.encode("o\u00e9l", plain) == std::vector<EncodedToken>{{1, 0, 1}, {3, 1, 2}, {4, 2, 3}, {0, 3, 4}});
  CHECK(tokenizer.encode("11", plain) == std::vector<EncodedToken>{{9, 0, 1}, {9, 1, 2}});
  CHECK(tokenizer.encode("", plain).empty());
  CHECK(tokenizer.encode("") == std::vector<EncodedToken>{{7, 0, 0}});
  CHECK(tokenizer.vocabulary_size() == 11);
  CHECK(tokenizer.bos() == 7);
  CHECK(tokenizer.find("<end>") == 7);
  CHECK(tokenizer.find(" lo") == 6);
  CHECK_FALSE(tokenizer.find("x"));
}

TEST_CASE("added tokens are found in the text, special ones only where they are asked for") {
  const calm::Tokenizer tokenizer = read(byte_level);
  CHECK(tokenizer.encode("lo<end>l", plain) == std::vector<EncodedToken>{{5, 0, 2}, {7, 2, 7}, {0, 7, 8}});
  CHECK(tokenizer.encode("l  <pad>", plain) == std::vector<EncodedToken>{{0, 0, 1}, {8, 1, 8}});
  CHECK(ids_of(tokenizer.encode_piece("l<end>o")) == Ids{0, 1});  // no token has the bytes of "<end>"
  CHECK(tokenizer.is_special(7));
  CHECK_FALSE(tokenizer.is_special(8));
  CHECK_FALSE(tokenizer.is_special(-1));
}

TEST_CASE("white space that an added token has taken may be an added token itself, as in tokenizers") {
  const std::string added = R"({"id": 8, "content": "<pad>", "special": false, "normalized": false, "lstrip": true})";
  const calm::Tokenizer tokenizer = read(replaced(byte_level, added, R"(
      {"id": 8, "content": "R", "normalized": false, "rstrip": true},
      {"id": 11, "content": "Q", "normalized": false, "lstrip": true},
      {"id": 12, "content": "\n\n", "normalized": false}, {"id": 13, "content": "\t", "normalized": false,
       "lstrip": true})"));
  using Tokens = std::vector<EncodedToken>;
  CHECK(tokenizer.encode("l\n\n\n\nRo", plain) == Tokens{{0, 0, 1}, {12, 1, 3}, {12, 3, 5}, {8, 5, 6}, {1, 6, 7}});
  CHECK(tokenizer.encode("R\n\n\n\no", plain) == Tokens{{8, 0, 5}, {12, 1, 3}, {12, 3, 5}, {1, 5, 6}});
  CHECK(tokenizer.encode("R \n\n o", plain) == Tokens{{8, 0, 5}, {12, 2, 4}, {2, 4, 5}, {1, 5, 6}});
  CHECK(tokenizer.encode("R\n\n\n\nQ", plain) == Tokens{{8, 0, 5}, {12, 1, 3}, {12, 3, 5}, {11, 5, 6}});
  CHECK(tokenizer.encode("R  Q", plain) == Tokens{{8, 0, 3}, {11, 3, 4}});
  CHECK(tokenizer.encode("l\n\n  Q", plain) == Tokens{{0, 0, 1}, {12, 1, 3}, {11, 3, 6}});
  CHECK(tokenizer.encode("R \to", plain) == Tokens{{8, 0, 3}, {1, 3, 4}});  // here tokenizers stops with an error
}

TEST_CASE("a text that normalisation changes keeps the ranges of the raw text") {
  const calm::Tokenizer tokenizer = read(byte_level);
  // e and the combining acute accent, three bytes, become é.
  CHECK(tokenizer.encode("le\u0301o", plain) == std::vector<EncodedToken>{{0, 0, 1}, {3, 1, 4}, {4, 1, 4}, {1, 4, 5}});
}

TEST_CASE("pieces have a prefix, bytes for unknown characters, and come back as they were") {
  const calm::Tokenizer tokenizer = read(pieces);
  CHECK(tokenizer.encode("ab ab") == std::vector<EncodedToken>{{8, 0, 2}, {8, 2, 5}});
  CHECK(tokenizer.encode("\u00e9") == std::vector<EncodedToken>{{4, 0, 0}, {2, 0, 1}, {3, 1, 2}});
  CHECK(tokenizer.encode("zzb") == std::vector<EncodedToken>{{4, 0, 0}, {0, 0, 2}, {6, 2, 3}});  // fused
  CHECK(tokenizer.encode_piece("ab") == std::vector<EncodedToken>{{7, 0, 2}});
  CHECK(tokenizer.encode_piece(" ab") == std::vector<EncodedToken>{{8, 0, 3}});
  CHECK(tokenizer.decode(ids_of(tokenizer.encode("ab \u00e9 ab"))) == "ab \u00e9 ab");
  CHECK(tokenizer.token_bytes(8) == " ab");
  CHECK(tokenizer.token_bytes(2) == "\xC3");
  CHECK(tokenizer.token_bytes(99).empty());
  CHECK_THROWS_AS(tokenizer.decode(Ids{99}), calm::ConfigError);
  CHECK(tokenizer.decode(Ids{1, 8}) == "ab");
  CHECK(tokenizer.decode(Ids{1, 8}, false) == "<s> ab");
}

TEST_CASE("bytes that are no UTF-8 become byte tokens and come back") {
  const calm::Tokenizer by_bytes = read(byte_level), by_pieces = read(pieces);
  CHECK(by_bytes.encode("l\xC3lo\xA9", plain) == std::vector<EncodedToken>{{0, 0, 1}, {3, 1, 2}, {5, 2, 4}, {4, 4, 5}});
  CHECK(by_bytes.decode(ids_of(by_bytes.encode("l\xC3lo\xA9"))) == "l\xC3lo\xA9");
  CHECK(by_pieces.decode(ids_of(by_pieces.encode("ab\xA9\xC3"))) == "ab\xA9\xC3");
  CHECK(by_pieces.encode_piece("\xC3") == std::vector<EncodedToken>{{2, 0, 1}});
}

TEST_CASE("a stream of tokens holds back a character until it is whole") {
  const calm::Tokenizer tokenizer = read(byte_level);
  calm::TokenStream stream(tokenizer);
  CHECK(stream.push(5) == "lo");
  CHECK(stream.push(3).empty());
  CHECK(stream.push(4) == "\u00e9");
  CHECK(stream.push(3).empty());
  CHECK(stream.push(0) == "\xC3l");  // it will never be whole
  CHECK(stream.push(3).empty());
  CHECK(stream.finish() == "\xC3");
  CHECK(calm::incomplete_utf8_suffix("\xF0\x9F\x98") == 3);
  CHECK(calm::incomplete_utf8_suffix("\xED\xA0") == 0);
  CHECK(calm::incomplete_utf8_suffix("a\xE0") == 1);
}

TEST_CASE("what was encoded before changes no result") {
  const calm::Tokenizer tokenizer = read(byte_level);
  calm::Tokenizer::Scratch scratch;
  const auto first = tokenizer.encode("lo lo 11 \u00e9 lo", {}, scratch);
  CHECK(tokenizer.encode("lo lo 11 \u00e9 lo", {}, scratch) == first);
  CHECK(tokenizer.encode("lo lo 11 \u00e9 lo") == first);
}

TEST_CASE("the identity tells tokenizers apart, not how their file is written") {
  const std::string identity = read(byte_level).identity();
  CHECK(identity.size() == 32);
  CHECK(read(replaced(byte_level, "\"l o\"", "[\"l\",   \"o\"]")).identity() == identity);
  CHECK(read(replaced(byte_level, "NFC", "NFD")).identity() != identity);
  CHECK(read(replaced(byte_level, "\"1 1\"", "\"1 1\", \"l l\"")
                 .replace(0, 1, "{")
                 .insert(byte_level.find("\"11\": 10"), "\"ll\": 11, "))
            .identity() != identity);
  CHECK(read(replaced(byte_level, "\"individual_digits\": true", "\"individual_digits\": false")).identity() !=
        identity);
}

TEST_CASE("what is not supported is refused by its name and place") {
  CHECK(error_of(replaced(byte_level, "NFC", "Bert")) == R"(t.json: normalizer: the type "Bert" is not supported)");
  CHECK(error_of(replaced(byte_level, "Digits", "Lindera")) ==
        R"(t.json: pre_tokenizer/0: the type "Lindera" is not supported)");
  CHECK(has(error_of(replaced(byte_level, "\"type\": \"BPE\"", "\"type\": \"Unigram\"")),
            R"(t.json: model: the type "Unigram" is not supported)"));
  CHECK(has(error_of(replaced(pieces, "ByteFallback", "CTC")), R"(t.json: decoder/1: the type "CTC")"));
  CHECK(has(error_of(replaced(byte_level, "TemplateProcessing", "Strange")), R"(post_processor: the type "Strange")"));
  CHECK(has(error_of(replaced(byte_level, "\"unk_token\": null", "\"dropout\": 0.1")), "\"dropout\" is not supported"));
  CHECK(has(error_of(replaced(byte_level, "\"unk_token\": null", "\"end_of_word_suffix\": \"</w>\"")),
            "\"end_of_word_suffix\" is not supported"));
  CHECK(has(error_of(replaced(byte_level, "\"unk_token\": null", "\"unk_token\": \"<none>\"")), "\"<none>\""));
  CHECK(has(error_of(replaced(byte_level, "1 1", "1 2")), R"(t.json: model: merges/2: "2" is not in the vocabulary)"));
  CHECK(has(error_of(replaced(byte_level, "\"l\": 0", "\"l\": 1")), "two tokens have the id 1"));
  CHECK(has(error_of(replaced(byte_level, "\"l\": 0", "\"l\": 99999999")), "99999999"));
  CHECK(has(error_of(replaced(pieces, "\"id\": 1, ", "\"id\": 5, ")), "has the id 5 here and 1 in the vocabulary"));
}

TEST_CASE("a pattern that would mean something else is refused, one that never ends gives up") {
  const auto pattern = [](const std::string& text) {
    return replaced(byte_level, R"("type": "Digits", "individual_digits": true)",
                    R"("type": "Split", "behavior": "Isolated", "pattern": {"Regex": ")" + text + "\"}");
  };
  for (const std::string bad : {"\\\\h", "[a[b]]", "[a&&b]", "(?m:a)", "a{1,3}+", "(*ACCEPT)", "(", "\\\\"})
    CHECK_MESSAGE(has(error_of(pattern(bad)), "pre_tokenizer/0: the pattern"), bad);
  CHECK(error_of(pattern("\\\\p{L}++|\\\\p{N}{1,3}|\\\\s+(?!\\\\S)")) == "no error");
  const calm::Tokenizer endless = read(pattern("(?:l+)+$|(?:l|l)*x"));
  CHECK_THROWS_AS(endless.encode(std::string(40, 'l') + "o"), calm::FormatError);
  CHECK(read(pattern("\\\\s+")).encode(std::string(100000, ' '), plain).size() == 100000);
}

TEST_CASE("steps that multiply a text are refused by name before they take the memory") {
  const auto steps = [](const std::string& step, int count) {
    std::string list;
    for (int i = 0; i < count; ++i) list += (i == 0 ? "" : ",") + step;
    return list;
  };
  const auto normalizer = [&](const std::string& step, int count) {
    return replaced(byte_level, R"({"type": "NFC"})",
                    R"({"type": "Sequence", "normalizers": [)" + steps(step, count) + "]}");
  };
  const auto error_in = [](const auto& function) {
    try {
      function();
    } catch (const calm::FormatError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  const auto encode_error = [&](const std::string& file, const std::string& text) {
    const calm::Tokenizer tokenizer = read(file);
    return error_in([&] { tokenizer.encode(text); });
  };
  const auto replace = [](const std::string& pattern, const std::string& content) {
    return R"({"type": "Replace", "pattern": {")" + pattern + R"("}, "content": ")" + content + R"("})";
  };
  const std::string doubled = replace(R"(String": "a)", "aa"), many(4000, 'a');
  CHECK(encode_error(normalizer(doubled, 6), "a") == "no error");
  CHECK(has(encode_error(normalizer(doubled, 40), "a"), "t.json: normalizer/12: a text would become 4162 bytes"));
  CHECK(has(encode_error(normalizer(replace(R"(String": "a)", many), 3), "a"), "t.json: normalizer/1: a text would"));
  CHECK(has(encode_error(normalizer(replace(R"(String": "a)", std::string(4000, 'b')), 1), many),
            "t.json: normalizer/0: a text would become 264"));
  CHECK(has(encode_error(normalizer(R"({"type": "Prepend", "prepend": ")" + many + R"("})", 2), "b"),
            "t.json: normalizer/1: a text would"));
  std::string ligatures, dotted;
  for (int i = 0; i < 300; ++i) ligatures += "\uFDFA";
  for (int i = 0; i < 1400; ++i) dotted += "\u0130";
  for (const auto& [content, type] : {std::pair(ligatures, "NFKC"), std::pair(dotted, "Lowercase")})
    CHECK(has(encode_error(normalizer(replace(R"(String": "b)", content) + R"(,{"type": ")" + type + R"("})", 1), "b"),
              "t.json: normalizer/1: a text would"));

  // Many short parts between added tokens have one limit together.
  std::string parts;
  for (int i = 0; i < 100; ++i) parts += "a<end>";
  CHECK(has(encode_error(normalizer(replace(R"(String": "a)", many), 1), parts), "t.json: normalizer/0: a text would"));

  // When the file is read: added tokens are normalised.
  const std::string added = R"("added_tokens": [{"id": 50, "content": "aQ", "normalized": true},)";
  CHECK(has(error_of(replaced(normalizer(replace(R"(String": "a)", many), 3), R"("added_tokens": [)", added)),
            "t.json: normalizer/1: a text would"));

  const auto pre_tokenizer = [&](const std::string& step, int count) {
    return replaced(byte_level, R"({"type": "Digits", "individual_digits": true})", steps(step, count));
  };
  const auto metaspace = [](const std::string& scheme, const std::string& replacement) {
    return R"({"type": "Metaspace", "replacement": ")" + replacement + R"(", "prepend_scheme": ")" + scheme +
           R"(", "split": false})";
  };
  CHECK(has(encode_error(pre_tokenizer(metaspace("never", "  "), 40), " "), "t.json: pre_tokenizer/12: a text would"));
  CHECK(has(encode_error(pre_tokenizer(metaspace("always", many) + "," + metaspace("always", "b" + many), 1), "b"),
            "t.json: pre_tokenizer/1: a text would"));

  const auto decoder = [&](const std::string& step, int count) {
    return replaced(pieces, R"({"type": "Replace", "pattern": {"String": "▁"}, "content": " "})", steps(step, count));
  };
  CHECK(has(error_in([&] { read(decoder(replace(R"(Regex": "[^Z])", many), 3)).decode(Ids{5}); }),
            "t.json: decoder/1: a text would become 8"));
  CHECK(read(decoder(doubled, 6)).decode(Ids{5}) == std::string(64, 'a'));
}

TEST_CASE("long tokens are decoded in time that grows with them") {
  std::string file = replaced(pieces, R"("▁ab": 8)", R"("▁ab": 8, ")" + std::string(3 << 20, ' ') + R"(": 9)");
  file = replaced(file, R"({"type": "Replace", "pattern": {"String": "▁"}, "content": " "})",
                  R"({"type": "Strip", "content": " ", "start": 2000000, "stop": 1000000},
                     {"type": "Metaspace", "replacement": "  ", "prepend_scheme": "never"})");
  const calm::Tokenizer tokenizer = read(replaced(file, R"("start": 1,)", R"("start": 1000,)"));
  CHECK(tokenizer.decode(Ids{9}).size() == (145728 / 2) - 1000);
}

TEST_CASE("splits treat their matches as the behaviour says") {
  const calm::Regex pattern("-", "here");
  const auto cut = [&](calm::SplitBehavior behavior, bool invert) {
    calm::PreTokenizer pre_tokenizer;
    pre_tokenizer.add(calm::SplitAtMatches{pattern, behavior, invert});
    calm::Regex::Scratch scratch;
    calm::TextGrowth growth(100);
    const calm::CutText text = pre_tokenizer(calm::AlignedText("a--b-", 0), true, growth, scratch);
    std::string parts;
    for (const calm::ByteRange piece : text.pieces) parts += std::string(text.text.text(piece)) + '|';
    return parts;
  };
  using enum calm::SplitBehavior;
  CHECK(cut(removed, false) == "a|b|");
  CHECK(cut(removed, true) == "-|-|-|");
  CHECK(cut(isolated, false) == "a|-|-|b|-|");
  CHECK(cut(merged_with_previous, false) == "a-|-|b-|");
  CHECK(cut(merged_with_next, false) == "a|-|-b|-|");
  CHECK(cut(contiguous, false) == "a|--|b|-|");
}

TEST_CASE("a GGUF vocabulary of SentencePiece joins by score, the leftmost first") {
  const calm::Tokenizer tokenizer = calm::make_tokenizer(small_gguf(), "m.gguf");
  CHECK(tokenizer.encode("aba") == std::vector<EncodedToken>{{1, 0, 0}, {7, 0, 1}, {6, 1, 3}});
  CHECK(tokenizer.encode("<s>b") == std::vector<EncodedToken>{{1, 0, 0}, {1, 0, 3}, {2, 3, 3}, {4, 3, 4}});
  CHECK(ids_of(tokenizer.encode_piece("abab")) == Ids{3, 6, 4});
  CHECK(ids_of(tokenizer.encode_piece("\u00e9")) == Ids{8, 9});
  CHECK(ids_of(tokenizer.encode_piece("\u00ea")) == Ids{0});
  CHECK(tokenizer.decode(ids_of(tokenizer.encode("a ba"))) == "a ba");
  CHECK(tokenizer.bos() == 1);

  calm::GgufVocabulary file = small_gguf();
  file.add_bos = false;
  file.add_space_prefix = false;
  CHECK(ids_of(calm::make_tokenizer(file, "m.gguf").encode("ab")) == Ids{5});
}

TEST_CASE("a GGUF vocabulary of SentencePiece that names no BOS begins with <s> where token 1 is a control token") {
  calm::GgufVocabulary file = small_gguf();
  file.bos = file.eos = std::nullopt;
  CHECK(file.token_types[1] == 3);
  CHECK(ids_of(calm::make_tokenizer(file, "m.gguf").encode("aba")) == Ids{1, 7, 6});
  file.token_types[1] = 1;
  CHECK(ids_of(calm::make_tokenizer(file, "m.gguf").encode("aba")) == Ids{7, 6});
}

TEST_CASE("user defined tokens of SentencePiece are found after spaces have become marks, longest first") {
  calm::GgufVocabulary file = small_gguf();
  file.add_bos = false;
  file.add_space_prefix = false;  // as Gemma's
  for (const std::string token : {"  ", "   "}) {
    file.tokens.push_back(token);
    file.scores.push_back(0);
    file.token_types.push_back(4);
  }
  const calm::Tokenizer tokenizer = calm::make_tokenizer(file, "m.gguf");
  CHECK(tokenizer.encode("a\u2581 \u2581a") == std::vector<EncodedToken>{{3, 0, 1}, {11, 1, 8}, {3, 8, 9}});
  CHECK(tokenizer.encode("a     b") == std::vector<EncodedToken>{{3, 0, 1}, {11, 1, 4}, {10, 4, 6}, {4, 6, 7}});
  CHECK(tokenizer.decode(ids_of(tokenizer.encode("a     b"))) == "a     b");
}

TEST_CASE("a GGUF vocabulary of GPT-2 is the tokenizer of the same tokenizer.json") {
  calm::GgufVocabulary file;
  file.model = "gpt2";
  file.pre = "smollm";
  file.tokens = {"l", "o", "Ġ", "Ã", "©", "lo", "Ġlo", "<end>", "1", "11"};
  file.token_types = {1, 1, 1, 1, 1, 1, 1, 3, 1, 1};
  file.merges = {"l o", "Ġ lo", "1 1"};
  const calm::Tokenizer tokenizer = calm::make_tokenizer(file, "m.gguf");
  CHECK(tokenizer.encode("lo lo<end>") == std::vector<EncodedToken>{{5, 0, 2}, {6, 2, 5}, {7, 5, 10}});
  CHECK(ids_of(tokenizer.encode("11 lo")) == Ids{8, 8, 6});
  file.pre = "gpt-2";
  CHECK(ids_of(calm::make_tokenizer(file, "m.gguf").encode("11 lo")) == Ids{9, 6});
}

TEST_CASE("a GGUF file that does not say whether to add BOS has it as llama.cpp does, by the pre-tokenizer") {
  calm::GgufVocabulary file;
  file.model = "gpt2";
  file.tokens = {"l", "o", "lo", "<begin>"};
  file.token_types = {1, 1, 1, 3};
  file.merges = {"l o"};
  file.bos = 3;
  const auto ids = [&](const std::string& pre) {
    file.pre = pre;
    return ids_of(calm::make_tokenizer(file, "m.gguf").encode("lo"));
  };
  for (const std::string pre : {"llama-bpe", "llama3", "llama-v3"}) CHECK(ids(pre) == Ids{3, 2});
  for (const std::string pre : {"gpt-2", "smollm", "starcoder", "command-r", "qwen2", "default"})
    CHECK(ids(pre) == Ids{2});
  file.add_bos = false;
  CHECK(ids("llama-bpe") == Ids{2});
  file.add_bos = true;
  CHECK(ids("smollm") == Ids{3, 2});
}

TEST_CASE("a GGUF vocabulary that fits nothing is refused with the reason") {
  const auto refused = [](auto change) {
    calm::GgufVocabulary file = small_gguf();
    change(file);
    try {
      calm::make_tokenizer(file, "m.gguf");
    } catch (const calm::FormatError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  CHECK(has(refused([](auto& file) { file.model = "t5"; }), R"(m.gguf: the tokenizer model "t5" is not supported)"));
  CHECK(has(refused([](auto& file) { file.model = "gpt2", file.pre = "tekken"; }), R"(the pre-tokenizer "tekken")"));
  CHECK(has(refused([](auto& file) { file.scores.pop_back(); }), "10 tokens and 9 scores"));
  CHECK(has(refused([](auto& file) { file.scores[3] = 0.0F / 0.0F; }), "token 3: its score is not a finite number"));
  CHECK(has(refused([](auto& file) { file.token_types[3] = 7; }), "token 3: the token type 7 is not known"));
  CHECK(has(refused([](auto& file) { file.token_types[3] = 6; }), "is no byte token"));
  CHECK(has(
      refused([](auto& file) { file.tokens = {"<unk>", "<s>", "x", "b", "b", "ab", "ba", "y", "<0xC3>", "<0xA9>"}; }),
      "are both \"b\""));
  CHECK(has(refused([](auto& file) { file.bos = 10; }), "the bos token 10"));
  CHECK(has(refused([](auto& file) { file.tokens = {}; }), "0 tokens"));
}

TEST_CASE("a text ends with the token of tokenizer_config.json, then with those of the model's own files") {
  const calm_test::TemporaryFolder folder;
  const auto write = [&](const char* name, const std::string& text) { std::ofstream(folder.path / name) << text; };
  const auto ends = [&] { return calm::load_tokenizer(folder.path).ends(); };
  const auto error = [&] {
    try {
      ends();
    } catch (const calm::FormatError& failure) {
      return std::string(failure.what());
    }
    return std::string("no error");
  };
  write("tokenizer.json", byte_level);
  CHECK(ends().empty());
  CHECK_FALSE(calm::load_tokenizer(folder.path).eos().has_value());
  write("tokenizer_config.json", R"({"model_max_length": 1024})");
  write("config.json", R"({"eos_token_id": 9})");
  CHECK(ends() == Ids{9});
  write("config.json", R"({"text_config": {"eos_token_id": [9, 10]}})");
  CHECK(ends() == Ids{9, 10});
  write("generation_config.json", R"({"eos_token_id": null})");
  CHECK(ends() == Ids{9, 10});
  write("generation_config.json", R"({"eos_token_id": [10, 5]})");
  CHECK(ends() == Ids{10, 5});
  CHECK(calm::load_tokenizer(folder.path).eos() == 10);
  for (const char* value : {"\"</s>\"", "true", "-1", "1.5", "[1, \"x\"]", "{}", "99999999999"}) {
    CAPTURE(value);
    write("generation_config.json", std::string(R"({"eos_token_id": )") + value + "}");
    CHECK(has(error(), "generation_config.json: \"eos_token_id\": expected an integer"));
  }
  write("tokenizer_config.json", R"({"eos_token": "<end>"})");
  write("generation_config.json", R"({"eos_token_id": [10, 7]})");
  CHECK(ends() == Ids{7, 10});
}

TEST_CASE("a chat template is recognised by its marks or refused") {
  using calm::ChatFamily;
  const auto family_of = [](const std::string& text) { return calm::chat_family_of(text, "m.gguf"); };
  const auto refused = [&](const std::string& text) {
    try {
      family_of(text);
    } catch (const calm::FormatError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  CHECK(family_of("{{ '<|im_start|>' + role }}") == ChatFamily::chatml);
  CHECK(family_of("<start_of_turn>") == ChatFamily::gemma);
  CHECK(family_of("<|start_header_id|>") == ChatFamily::llama3);
  CHECK(has(refused("[INST]"), R"(m.gguf: the chat template "[INST]" is of no known family)"));
  CHECK(has(refused("<|im_start|> <start_of_turn>"), "m.gguf: the chat template"));
  CHECK(has(refused(""), "m.gguf: has no chat template"));
  // Llama 3.1 and 3.3, Llama 3.2, SmolLM3: what they write changes from day to day, or is not in the messages.
  for (const std::string date :
       {R"(set date_string = "26 Jul 2024")", R"(strftime_now("%d %b %Y"))", R"({{- "Cutting Knowledge Date: " }})"})
    for (const std::string mark : {"<|start_header_id|>", "<|im_start|>"})
      CHECK(has(refused(mark + date), "m.gguf: the chat template writes dates"));
  const std::vector<calm::ChatMessage> messages = {{"system", "Be kind."}, {"user", " Hi "}, {"assistant", "Yes"}};
  CHECK(
      calm::chat_prompt(ChatFamily::chatml, messages) ==
      "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
      "<|im_start|>assistant\n");
  CHECK(calm::chat_prompt(ChatFamily::gemma, messages) ==
        "<start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes<end_of_turn>\n"
        "<start_of_turn>model\n");
  CHECK(calm::chat_prompt(ChatFamily::llama3, std::vector<calm::ChatMessage>{{"user", " Hi "}}) ==
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n");
  CHECK_THROWS_AS(calm::chat_prompt(ChatFamily::chatml, std::vector<calm::ChatMessage>{{"tool", "x"}}),
                  calm::ConfigError);
  CHECK_FALSE(calm::chat_default_system("<|im_start|>"));
  CHECK(calm::chat_default_system("You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>")
            ->content.ends_with("Hugging Face"));
}

TEST_CASE("a template with ChatML's marks that writes what ChatML does not is refused") {
  const auto refused = [](const std::string& text) {
    try {
      calm::chat_family_of(text, "m.gguf");
    } catch (const calm::FormatError& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  const std::string turns =
      "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% endfor %}{% if add_generation_prompt %}";
  const std::string qwen3 =
      turns + R"({{- '<|im_start|>assistant\n' }}{% if not enable_thinking %}{{ '<think>\n\n</think>' }}{% endif %})";
  CHECK(refused(qwen3) == "no error");
  CHECK(has(refused(turns + R"({{- '<|im_start|>assistant\n<think>\n' }})"), R"(a beginning of the answer, "<think>)"));
  CHECK(has(refused("{{ '<|im_start|>user<|im_sep|>' }}"), R"(also the mark "<|im_sep|>", which calm does not write)"));
  for (const std::string words : {"You are a helpful assistant", "You are a helpful assistant."}) {
    const std::string text = R"({{ '<|im_start|>system\n)" + words + "<|im_end|>' }}";
    CHECK(refused(text) == "no error");
    CHECK(calm::chat_default_system(text)->content == words);
  }
  for (const std::string line_end : {R"(\n)", "\n"})
    CHECK(has(refused("{{ '<|im_start|>system" + line_end + "You are a pirate.<|im_end|>' }}"),
              R"(a system message of its own, "You are a pirate.")"));
  CHECK(refused(R"({{ '<|im_start|>system\n' + messages[0].content }}<|im_start|>system\n{{ system }})") == "no error");
}

TEST_CASE("a folder's chat template is that of chat_template.jinja, else of tokenizer_config.json") {
  const calm_test::TemporaryFolder folder;
  const auto write = [&](const std::string& name, const std::string& text) {
    std::ofstream(folder.path / name) << text;
  };
  const auto chat = [&] { return calm::load_tokenizer(folder.path).chat_template(); };
  const auto source = [&] { return calm::load_tokenizer(folder.path).chat_source(); };
  const std::string config = (folder.path / "tokenizer_config.json").string();
  write("tokenizer.json", byte_level);
  CHECK(chat().empty());
  CHECK(source() == folder.path.string());
  write("tokenizer_config.json", R"({"chat_template": "one"})");
  CHECK(chat() == "one");
  CHECK(source() == config);
  write("tokenizer_config.json", R"({"chat_template": [{"name": "tool_use", "template": "two"},
                                                       {"name": "default", "template": "three"}]})");
  CHECK(chat() == "three");
  CHECK(source() == config);
  write("chat_template.jinja", "four\n");
  CHECK(chat() == "four\n");
  CHECK(source() == (folder.path / "chat_template.jinja").string());
  std::filesystem::remove(folder.path / "chat_template.jinja");
  write("tokenizer_config.json", R"({"chat_template": [{"name": "tool_use", "template": "two"}]})");
  CHECK(chat().empty());
  write("tokenizer_config.json", R"({"chat_template": [{"name": "default"}]})");
  CHECK_THROWS_WITH_AS(chat(), (config + R"(: chat_template/0: the key "template" is missing)").c_str(),
                       calm::FormatError);
}

TEST_CASE("a file that was cut off anywhere is a FormatError") {
  for (const std::string& file : {byte_level, pieces})
    for (std::size_t length = 0; length < file.size(); ++length)
      CHECK_THROWS_AS(read(file.substr(0, length)), calm::FormatError);
}

TEST_CASE("10,000 mutated files give a tokenizer that works or a FormatError") {
  const std::string text = "lo 11 \u00e9 ab<end><s>\n\xff \u2581 e\u0301  zz";
  calm::Random random(3);
  int valid = 0;
  const auto below = [&](std::size_t bound) {
    return static_cast<std::size_t>(random.below(static_cast<calm::Index>(bound)));
  };
  for (int round = 0; round < 10000; ++round) {
    std::string file = round % 2 == 0 ? byte_level : pieces;
    for (calm::Index i = random.below(3); i >= 0; --i) {
      const std::size_t place = below(file.size());
      switch (random.below(4)) {
        case 0: file[place] = static_cast<char>(random.below(256)); break;
        case 1: file[place] = "0123456789\"\\[]{},:"[below(18)]; break;
        case 2: file.erase(place, 1 + below(5)); break;
        default: file.insert(place, file.substr(below(file.size()), 9));
      }
    }
    try {
      const calm::Tokenizer tokenizer = read(file);
      tokenizer.decode(ids_of(tokenizer.encode(text)));
      ++valid;
    } catch (const calm::FormatError&) {
    }
  }
  CHECK(valid > 200);
  CHECK(valid < 9500);
}

}  // namespace tokenizer_test
