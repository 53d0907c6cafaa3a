// A tokenizer: a .gguf file with its vocabulary where the bytes begin with GGUF, else a tokenizer.json. One that opens
// must encode any text to tokens with ordered ranges inside of it, and decode them.
#include <calm/io/tokenizer/pretrained_tokenizer.hpp>

#include "fuzz.hpp"

namespace {

void use_tokenizer(const calm::Tokenizer& tokenizer) {
  for (const std::string_view text :
       {"", "Hello  world's 123\n", "\xc3\xa9t\xc3\xa9 \xe6\x97\xa5\xf0\x9f\x99\x82 a\xcc\x81",
        "\xff\xe6\x97 <s><|im_end|> \x01"}) {
    try {
      std::vector<calm::TokenId> ids;
      for (const auto& token : tokenizer.encode(text)) {
        const bool in_range = token.begin >= 0 && token.begin <= token.end &&
                              token.end <= static_cast<calm::Index>(text.size()) && token.id >= 0 &&
                              token.id < tokenizer.vocabulary_size();
        if (!in_range) std::abort();
        ids.push_back(token.id);
      }
      fuzz::use(static_cast<double>(tokenizer.decode(ids).size() + tokenizer.decode(ids, false).size()));
      calm::TokenStream stream(tokenizer);
      for (const calm::TokenId id : ids) fuzz::use(static_cast<double>(stream.push(id).size()));
    } catch (const calm::FormatError&) {  // a pattern that gives up, or a step that multiplies the text
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes = fuzz::text_of(data, size);
  try {
    if (bytes.starts_with("GGUF")) {
      const calm::GgufFile file(calm::FileMap::of_bytes("m.gguf", bytes));
      use_tokenizer(calm::make_tokenizer(calm::read_gguf_vocabulary(file), "m.gguf"));
    } else {
      use_tokenizer(calm::Tokenizer(calm::parse_tokenizer_json(bytes, "tokenizer.json")));
    }
  } catch (const calm::FormatError&) {
  } catch (const calm::ConfigError&) {
  }
  return 0;
}
