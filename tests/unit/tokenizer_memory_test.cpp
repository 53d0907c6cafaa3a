// Opening a tokenizer, a .gguf file or a tokenizer.json, takes at most twice the file and 64 MB, whatever the file
// holds.
#include <doctest/doctest.h>
#include <calm/io/tokenizer/pretrained_tokenizer.hpp>
#include <support/gguf_builder.hpp>

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <new>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

long live = 0, peak = 0;  // bytes of operator new; one thread

long bytes_of(void* p) {
#if defined(__GLIBC__)
  return static_cast<long>(malloc_usable_size(p));
#else
  static_cast<void>(p);
  return 0;
#endif
}

}  // namespace

void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  void* p = std::malloc(size);
  if (p != nullptr) live += bytes_of(p);
  peak = std::max(peak, live);
  return p;
}
void* operator new(std::size_t size) {
  void* p = operator new(size, std::nothrow);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void operator delete(void* p) noexcept {
  if (p != nullptr) live -= bytes_of(p);
  std::free(p);
}
void operator delete(void* p, std::size_t) noexcept { operator delete(p); }

namespace {

using calm::GgufType;

struct Vocabulary {
  std::vector<std::string> tokens, merges;
  std::vector<std::int32_t> types;
};

std::string file_name(const char* end) {
  return calm::message(std::filesystem::temp_directory_path().string(), "/calm_memory_test_",
                       static_cast<long>(getpid()), end);
}

/// Opens a file, removes it, and says what came of it.
template <class Open>
std::string outcome_of(const std::string& path, Open&& open) {
  const auto size = static_cast<long>(std::filesystem::file_size(path));
  const long before = peak = live;
  std::string outcome;
  try {
    outcome = calm::message(open().vocabulary_size(), " tokens");
  } catch (const calm::FormatError& error) {
    outcome = error.what();
  }
  std::filesystem::remove(path);
  CAPTURE(outcome);
  CAPTURE(size);
  CHECK(peak - before <= 2 * size + (64L << 20));
  if (std::getenv("CALM_TEST_SHOW_MEMORY") != nullptr)
    std::printf("%ld bytes of %ld for a file of %ld: %.60s\n", peak - before, 2 * size + (64L << 20), size,
                outcome.c_str());
  return outcome;
}

/// What comes of a file with this vocabulary: the number of tokens, or the message of its refusal.
std::string open(const std::string& model, const Vocabulary& vocabulary) {
  const std::string path = file_name(".gguf");
  {
    GgufBuilder file;
    file.set_string("tokenizer.ggml.model", model);
    file.set_strings("tokenizer.ggml.tokens", vocabulary.tokens);
    if (model == "llama")
      file.set_numbers("tokenizer.ggml.scores", GgufType::f32, std::vector<float>(vocabulary.tokens.size(), 0.0F));
    if (!vocabulary.types.empty()) file.set_numbers("tokenizer.ggml.token_type", GgufType::i32, vocabulary.types);
    if (!vocabulary.merges.empty()) file.set_strings("tokenizer.ggml.merges", vocabulary.merges);
    const std::string bytes = file.bytes();
    std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  CAPTURE(model);
  return outcome_of(path, [&] { return calm::open_tokenizer(path); });
}

/// The same for a tokenizer.json; every text is written as it is.
std::string open_json(const std::vector<std::string>& tokens, const std::vector<std::string>& merges,
                      const std::vector<std::string>& added = {}, const std::string& type = "ByteLevel") {
  const std::string path = file_name(".json");
  {
    std::ofstream file(path, std::ios::binary);
    file << R"({"added_tokens":[)";
    for (std::size_t i = 0; i < added.size(); ++i)
      file << (i == 0 ? "" : ",") << R"({"id":)" << tokens.size() + i << R"(,"content":")" << added[i] << "\"}";
    if (type == "ByteLevel") file << R"(],"pre_tokenizer":{"type":"ByteLevel"},"decoder":{"type":"ByteLevel"})";
    else file << "]";
    file << R"(,"model":{"type":"BPE","vocab":{)";
    for (std::size_t i = 0; i < tokens.size(); ++i) file << (i == 0 ? "\"" : ",\"") << tokens[i] << "\":" << i;
    file << R"(},"merges":[)";
    for (std::size_t i = 0; i < merges.size(); ++i) file << (i == 0 ? "" : ",") << merges[i];
    file << "]}}";
  }
  return outcome_of(path, [&] { return calm::load_tokenizer(path); });
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

std::vector<std::string> numbers(std::size_t count) {
  std::vector<std::string> tokens;
  for (std::size_t i = 0; i < count; ++i) tokens.push_back(std::to_string(i));
  return tokens;
}

/// Tokens of five characters, of which no two make a third.
std::vector<std::string> words(std::size_t count) {
  std::vector<std::string> tokens;
  for (std::size_t i = 0; i < count; ++i) {
    std::string token = "x";
    for (std::size_t rest = i, k = 0; k < 4; ++k, rest /= 64)
      token += static_cast<char>(rest % 64 == 44 ? '~' : '0' + rest % 64);  // no backslash
    tokens.push_back(token);
  }
  return tokens;
}

}  // namespace

TEST_CASE("the counter counts") {
  const long before = live;
  const std::vector<double> values(1000);
  CHECK(live - before >= 8000);
}

TEST_CASE("a vocabulary of as many tokens as are read, and of more") {
  for (const std::string model : {"llama", "gpt2"}) {
    CHECK(open(model, {std::vector<std::string>(2'097'152), {}, {}}) == "2097152 tokens");
    CHECK(has(open(model, {std::vector<std::string>(4'000'000), {}, {}}), "4000000 elements; at most 2097152"));
    CHECK(open(model, {words(2'000'000), {}, {}}) == "2000000 tokens");
  }
  CHECK(open("llama", {words(1'100'000), {}, {}}) == "1100000 tokens");
}

TEST_CASE("tokens that can be put together in many ways") {
  std::vector<std::string> tokens;
  for (std::size_t length = 1; length <= 18; ++length)
    for (std::size_t i = 0; i < std::size_t{1} << length; ++i) {
      std::string token;
      for (std::size_t bit = 0; bit < length; ++bit) token += (i >> bit & 1) != 0 ? 'a' : 'b';
      tokens.push_back(token);
    }
  CHECK(has(open("llama", {tokens, {}, {}}), "in more than 2097152 ways"));
  CHECK(has(open("llama", {numbers(2'000'000), {}, {}}), "in more than 2097152 ways"));
  tokens.resize((std::size_t{1} << 17) - 2);  // up to 16 letters
  CHECK(open("llama", {tokens, {}, {}}) == "131070 tokens");
}

TEST_CASE("as many merges as are read, and more") {
  Vocabulary vocabulary{numbers(3000), {}, {}};
  const auto add = [&](std::size_t i) { vocabulary.merges.push_back("1 " + std::to_string(i % 100)); };
  for (std::size_t i = 0; i < 2'097'152; ++i) add(i);
  CHECK(open("gpt2", vocabulary) == "3000 tokens");
  add(1);
  CHECK(has(open("gpt2", vocabulary), "2097153 elements; at most 2097152"));
}

TEST_CASE("many control tokens") {
  for (const std::string model : {"llama", "gpt2"}) {
    CHECK(open(model, {words(65'536), {}, std::vector<std::int32_t>(65'536, 3)}) == "65536 tokens");
    CHECK(has(open(model, {words(100'000), {}, std::vector<std::int32_t>(100'000, 4)}),
              "more than 65536 control and user defined tokens"));
  }
}

TEST_CASE("a tokenizer.json of as many tokens and merges as are read, and of more") {
  const std::vector<std::string> many = words(2'097'152);
  std::vector<std::string> pairs, texts;
  std::vector<std::string> tokens = numbers(100'000);
  for (std::size_t i = 0; i < 1'048'576; ++i) {
    const std::string left = std::to_string(1 + i % 90), right = std::to_string(i % 89);
    texts.push_back('"' + left + ' ' + right + '"');
    pairs.push_back("[\"" + left + "\",\"" + right + "\"]");
  }
  for (const std::string type : {"ByteLevel", "none"}) {
    CHECK(open_json(many, {}, {}, type) == "2097152 tokens");
    CHECK(open_json(tokens, texts, {}, type) == "100000 tokens");
    CHECK(open_json(tokens, pairs, {}, type) == "100000 tokens");
    CHECK(open_json({std::string(4'000'000, 'x'), std::string(3'000'000, 'x')}, {}, {}, type) == "2 tokens");
  }
  std::vector<std::string> both = words(2'000'000);  // with the numbers for the merges
  both.insert(both.end(), tokens.begin(), tokens.begin() + 10'000);
  CHECK(has(open_json(both, texts), "2010000 tokens"));
  texts.push_back(texts.front());
  CHECK(has(open_json(tokens, texts), "model: merges: more than 1048576 merges"));
  std::vector<std::string> more = words(2'097'153);
  CHECK(has(open_json(more, {}), "model: vocab: more than 2097152 tokens"));
}

TEST_CASE("a tokenizer.json with long tokens, many added tokens, or a list that is no list of tokens") {
  std::vector<std::string> tokens;
  for (int i = 0; i < 100; ++i) tokens.push_back(std::string(1'000'000, 'x') + std::to_string(i));
  CHECK(open_json(tokens, {}) == "100 tokens");
  for (const std::size_t count : {10'000U, 100'000U, 500'000U}) CHECK(open_json({}, {}, words(count)) != "0 tokens");
  CHECK(has(open_json({"a"}, std::vector<std::string>(1'000'000, "{}")), "merges/0: expected"));
  CHECK(has(open_json({"a", "a"}, {}), "the key \"a\" occurs twice"));
}
