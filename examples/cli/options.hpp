// The command line of the program `calm`, read.
#pragma once

#include <calm/core/config.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace cli {

enum class Command { inspect, tokenize, logits, gradients, init, train, generate, eval };

struct Options {
  Command command = Command::inspect;
  std::string model, anchor, adapter, out;
  std::vector<std::string> augments;
  std::string text, file, ids;  // what a command reads; ids: "1,2,3"
  std::string data, valid, prompt, links, alignment, preset, metric = "exact";
  std::vector<std::string> stop;
  calm::Index links_count = 0, heads = 0, steps = 200, batch_tokens = 2048, accumulate = 1, max_new_tokens = 128;
  calm::Index top_k = 0, tokens = 128;
  double learning_rate = 1e-3, temperature = 0, top_p = 1;
  std::uint64_t seed = 0;
  int threads = 0;
  std::string compute = "f32";
  bool has_text = false, has_ids = false;  // --text and --ids are given, if with nothing
  bool json = false, no_special = false, hidden = false, chat = false, resume = false, allow_requantised = false,
       cost = false;

  bool composed() const { return !anchor.empty(); }
  /// The model whose tokenizer reads and writes text.
  const std::string& main_model() const { return composed() ? anchor : model; }
};

}  // namespace cli
