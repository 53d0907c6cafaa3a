// Looking inside a composition: what each link adds to the anchor's stream, and what the loss is without it.
#pragma once

#include <calm/compose/composed_model.hpp>
#include <calm/train/trainer.hpp>

namespace calm::inline CALM_ABI {

struct LinkReport {
  Link link;
  double contribution = 0;  // norm of what the link adds against the norm of the stream it is added to, over all tokens
  double loss = 0;          // of the whole composition, in nats a scored token
  double loss_without = 0;  // with this link switched off
};

/// One report a link, measured on a batch. Throws ConfigError where the batch scores no token.
template <class... Models>
std::vector<LinkReport> report_links(auto& ctx, const ComposedModel<Models...>& model, const PackedBatch& batch) {
  using Model = ComposedModel<Models...>;
  using Scalar = typename Model::Scalar;
  require<ConfigError>(!batch.empty(), "report_links: no token is scored");
  const auto scored = static_cast<double>(batch.rows().size());
  KeptStates<Model> kept;
  typename Model::Tape tape;
  std::vector<LinkReport> reports;
  const double loss = batch_loss(ctx, model, batch, kept, nullptr, 1.0) / scored;
  ctx.arena.reset();
  model.forward(ctx, batch.tokens(), kept.states, &tape);  // of all tokens, not of the scored ones alone
  const auto squares = [&](MatrixView<const Scalar> m) {
    double sum = 0;
    ctx.backend.sum_of_squares(std::span<const Scalar>(flat(m)), &sum);
    return sum;
  };
  for (std::size_t k = 0; k < model.links().size(); ++k) {
    const double gate = model.bridges()[k].gate_value();
    const auto& [bridge, before] = tape.links[k];
    reports.push_back({model.links()[k], std::abs(gate) * std::sqrt(squares(bridge.delta) / squares(before)), loss, 0});
  }
  for (std::size_t k = 0; k < reports.size(); ++k) {
    kept.states.disabled.assign(reports.size(), false);
    kept.states.disabled[k] = true;
    reports[k].loss_without = batch_loss(ctx, model, batch, kept, nullptr, 1.0) / scored;
  }
  return reports;
}

}  // namespace calm::inline CALM_ABI
