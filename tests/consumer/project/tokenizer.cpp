// Prints the ids of its arguments: consumer_tokenizer TOKENIZER_JSON TEXT...
#include <calm/io/tokenizer/tokenizer_json.hpp>

#include <iostream>

int main(int count, char** arguments) {
  if (count < 2) return 0;
  const calm::Tokenizer tokenizer = calm::load_tokenizer(arguments[1]);
  for (int i = 2; i < count; ++i)
    for (const auto& token : tokenizer.encode(arguments[i])) std::cout << token.id << '\n';
}
