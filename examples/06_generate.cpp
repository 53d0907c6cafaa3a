// Generation with the models of the key-value experiment: greedy and sampled, streamed, with log-probabilities and stop
// strings, many prompts of different lengths side by side.
#include "key_value_arithmetic/dictionary.hpp"
#include "key_value_arithmetic/text.hpp"

#include <calm/calm.hpp>

#include <iostream>

int main() {
  using Model = calm::Transformer<calm::zoo::Llama>;
  const std::filesystem::path models = std::filesystem::path(CALM_SOURCE_DIR) / "examples/key_value_arithmetic/models";
  const auto arithmetic = calm::load_model<Model>(models / "m_B"), dictionary = calm::load_model<Model>(models / "m_A");
  calm::Context<calm::CpuBackend> ctx;
  const auto text_of = [](calm::TokenId id) { return key_value::decode({id}); };
  const auto prompts_of = [](const std::vector<std::string>& texts) {
    std::vector<std::vector<calm::TokenId>> prompts;
    for (const std::string& text : texts) prompts.push_back(key_value::encode("^" + text));
    return prompts;
  };

  std::cout << "streamed, greedy:  123+456-78=";
  const auto one = prompts_of({"123+456-78="});
  calm::generate(ctx, arithmetic, std::span(one),
                 {.max_new_tokens = 40, .end_tokens = {key_value::end_token}, .text_of = text_of},
                 [](const calm::StreamedToken& token) { std::cout << token.text << std::flush; });
  std::cout << "\n\nprompts of different lengths, side by side:\n";
  const std::vector<std::string> questions{"5+7=", "640-125-99=", "17 plus 203=", "from 500 take 45="};
  const auto many = prompts_of(questions);
  const auto answers = calm::generate(ctx, arithmetic, std::span(many),
                                      {.max_new_tokens = 40, .end_tokens = {key_value::end_token}, .text_of = text_of});
  for (std::size_t i = 0; i < answers.size(); ++i) {
    double log_probability = 0;
    for (const double p : answers[i].log_probabilities) log_probability += p;
    std::cout << "  " << questions[i] << answers[i].text << "   log-probability " << calm::fixed(log_probability, 3)
              << '\n';
  }

  const key_value::Dictionary keys(1000, 1, 1);
  const std::string question = keys.keys()[0] + "+" + keys.keys()[1] + "=";
  const auto key_prompt = prompts_of({question});
  const auto values =
      calm::generate(ctx, dictionary, std::span(key_prompt), {.max_new_tokens = 40, .stop = {"="}, .text_of = text_of});
  std::cout << "\nthe other model reads keys:  " << question << values[0].text
            << "   (stopped at \"=\"; true: " << keys.value(keys.keys()[0]) << '+' << keys.value(keys.keys()[1])
            << ")\n\nsampled at temperature 2, three seeds:\n";
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    calm::GenerateOptions options{.max_new_tokens = 24, .end_tokens = {key_value::end_token}, .text_of = text_of};
    options.sampler = {.temperature = 2, .top_k = 10, .top_p = 0.95, .seed = seed};
    std::cout << "  123+456-78=" << calm::generate(ctx, arithmetic, std::span(one), options)[0].text << '\n';
  }
}
