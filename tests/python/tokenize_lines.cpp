// tokenize_lines MODE FILE LINES: encodes every line of LINES (JSON strings), for test_tokenizer.py to compare.
//
//   MODE json   FILE is a tokenizer.json
//   MODE gguf   FILE is JSON with the members of GgufVocabulary
//
// For every line one JSON array: [[id, begin, end], ...], the text of the ids without and with special tokens as
// hexadecimal bytes, and the same text from a TokenStream. On stderr the bytes encoded in a second.
#include <calm/io/tokenizer/gguf_vocabulary.hpp>
#include <calm/io/tokenizer/tokenizer_json.hpp>

#include <chrono>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

namespace {

std::string hexadecimal(std::string_view bytes) {
  std::string digits;
  for (const char c : bytes) {
    digits += "0123456789abcdef"[static_cast<unsigned char>(c) >> 4];
    digits += "0123456789abcdef"[static_cast<unsigned char>(c) & 15];
  }
  return digits;
}

calm::Tokenizer read_gguf(const std::string& path) {
  const calm::Json file = calm::read_json(path, {.memory_bytes = calm::Index{1} << 30});
  calm::GgufVocabulary vocabulary;
  vocabulary.model = calm::get_string(file, "model", path);
  vocabulary.pre = calm::get_string_or(file, "pre", "", path);
  vocabulary.tokens = calm::TextList(file.at("tokens").get<std::vector<std::string>>());
  vocabulary.scores = file.at("scores").get<std::vector<float>>();
  vocabulary.token_types = file.at("token_types").get<std::vector<std::int32_t>>();
  vocabulary.merges = calm::TextList(file.at("merges").get<std::vector<std::string>>());
  if (file.contains("bos")) vocabulary.bos = file.at("bos").get<calm::TokenId>();
  if (file.contains("add_bos")) vocabulary.add_bos = file.at("add_bos").get<bool>();
  if (file.contains("add_space_prefix")) vocabulary.add_space_prefix = file.at("add_space_prefix").get<bool>();
  return calm::make_tokenizer(vocabulary, path);
}

void encode_lines(const calm::Tokenizer& tokenizer, const std::string& path) {
  const auto file = calm::FileMap::open(path);
  std::string_view rest = file->text();
  calm::Tokenizer::Scratch scratch;
  std::chrono::duration<double> time{};
  double bytes = 0;
  while (!rest.empty()) {
    const std::size_t end = rest.find('\n');
    const auto text = calm::parse_json(rest.substr(0, end), path).get<std::string>();
    rest.remove_prefix(end == rest.npos ? rest.size() : end + 1);
    const auto start = std::chrono::steady_clock::now();
    const auto tokens = tokenizer.encode(text, {}, scratch);
    time += std::chrono::steady_clock::now() - start;
    bytes += static_cast<double>(text.size());
    std::vector<calm::TokenId> ids;
    calm::TokenStream stream(tokenizer, true);
    std::string line = "[[", streamed;
    for (const auto& [id, first, last] : tokens) {
      ids.push_back(id);
      streamed += stream.push(id);
      line += calm::message(line.size() > 2 ? "," : "", '[', id, ',', first, ',', last, ']');
    }
    streamed += stream.finish();
    line += "],\"" + hexadecimal(tokenizer.decode(ids)) + "\",\"" + hexadecimal(tokenizer.decode(ids, false)) +
            "\",\"" + hexadecimal(streamed) + "\"]\n";
    std::cout << line;
  }
  std::cerr << static_cast<long>(bytes / time.count()) << '\n';
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: tokenize_lines json|gguf FILE LINES\n";
    return 2;
  }
  try {
    const std::string mode = arguments[1];
    encode_lines(mode == "gguf" ? read_gguf(arguments[2]) : calm::load_tokenizer(arguments[2]), arguments[3]);
  } catch (const std::exception& error) {
    std::cerr << "tokenize_lines: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
