// write_composition FOLDER: small random models and adapters as calm saves them, and the logits that calm gives for
// them, for test_adapter.py to open in PyTorch.
//
//   anchor, augment_0, augment_1     model folders (f32; bf16 with tied embeddings; f32)
//   adapter_default, adapter_tanh    adapters over these three
//   logits.safetensors               ids [T], and logits [T, V] of each under the name of its folder
#include <calm/compose.hpp>
#include <calm/io/adapter.hpp>

#include <exception>
#include <filesystem>
#include <iostream>
#include <memory>

namespace {

using Model = calm::Transformer<calm::zoo::Llama>;
using Composed = calm::ComposedModel<Model, Model, Model>;

calm::ModelSpec small(calm::Index width, calm::Index blocks, calm::HeadShape heads, bool tied) {
  return {.vocabulary = 41,
          .width = width,
          .hidden = 2 * width,
          .blocks = blocks,
          .heads = heads,
          .norm_epsilon = 1e-5,
          .rotary_base = tied ? 1000.0 : 10000.0,
          .context = 64,
          .tied_embeddings = tied};
}

/// Saves random weights and opens what was saved.
std::shared_ptr<const Model> make(const std::filesystem::path& folder, const calm::ModelSpec& spec, std::uint64_t seed,
                                  calm::DType dtype) {
  calm::save_model(Model(spec, calm::RandomWeights{.seed = seed, .embedding_deviation = 1}), folder, dtype);
  return std::make_shared<const Model>(calm::load_model<Model>(folder));
}

/// Composes, gives the trained numbers that start as constants other values, saves, and opens what was saved.
Composed make_adapter(const std::filesystem::path& folder, const calm::BridgeOptions& options,
                      const std::shared_ptr<const Model>& anchor, const std::shared_ptr<const Model>& first,
                      const std::shared_ptr<const Model>& second) {
  auto model = calm::compose(anchor, {{0, 1, 0}, {0, 1, 2}, {1, 0, 2}}, options, first, second);
  calm::Random random(7);
  calm::for_each_parameter(model, [&](const std::string&, auto& parameter) {
    if (parameter.decay) return;
    for (float& x : parameter.value.values()) x += static_cast<float>(0.3 * random.normal());
  });
  calm::save_adapter(model, folder);
  return calm::load_adapter(folder, anchor, first, second);
}

template <class AnyModel>
calm::Matrix<float> logits_of(const AnyModel& model, std::span<const calm::TokenId> ids) {
  calm::Context<calm::CpuBackend> ctx(1);
  const std::vector<calm::Index> offsets{0, static_cast<calm::Index>(ids.size())};
  const calm::TokenBatch batch{ids, offsets, {}, {}};
  typename AnyModel::States states;
  typename AnyModel::HeadCache head;
  model.prepare(ctx, batch, states);
  const auto x = model.forward(ctx, batch, states, nullptr);
  calm::Matrix<float> logits(x.rows, model.spec().vocabulary);
  model.head(ctx, calm::MatrixView<const float>(x), logits.view(), head);
  return logits;
}

void write_all(const std::filesystem::path& folder) {
  const auto anchor = make(folder / "anchor", small(32, 3, {4, 2, 8}, false), 1, calm::DType::f32);
  const auto first = make(folder / "augment_0", small(24, 2, {3, 3, 8}, true), 2, calm::DType::bf16);
  const auto second = make(folder / "augment_1", small(16, 1, {2, 1, 16}, false), 3, calm::DType::f32);
  const calm::BridgeOptions standard{.zero_output = false, .rotary = true, .seed = 4};
  const calm::BridgeOptions gated{.heads = 2, .gate = calm::Gate::tanh, .rank = 5, .seed = 5};
  const Composed with_standard = make_adapter(folder / "adapter_default", standard, anchor, first, second);
  const Composed with_gates = make_adapter(folder / "adapter_tanh", gated, anchor, first, second);

  const std::vector<calm::TokenId> ids{3, 17, 0, 40, 8, 8, 25, 11, 2};
  const calm::Matrix<float> anchor_logits = logits_of(*anchor, ids), first_logits = logits_of(*first, ids),
                            second_logits = logits_of(*second, ids), standard_logits = logits_of(with_standard, ids),
                            gated_logits = logits_of(with_gates, ids);
  const std::vector<float> stored_ids(ids.begin(), ids.end());
  calm::SafetensorsWriter writer;
  writer.add<float>("ids", {static_cast<calm::Index>(ids.size())}, stored_ids);
  writer.add("anchor", anchor_logits);
  writer.add("augment_0", first_logits);
  writer.add("augment_1", second_logits);
  writer.add("adapter_default", standard_logits);
  writer.add("adapter_tanh", gated_logits);
  writer.write(folder / "logits.safetensors");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::cerr << "usage: write_composition FOLDER\n";
    return 2;
  }
  try {
    write_all(arguments[1]);
  } catch (const std::exception& error) {
    std::cerr << "write_composition: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
