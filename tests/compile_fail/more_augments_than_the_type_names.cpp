// expect: ComposedModel
// expect: no matching
#include <calm/compose.hpp>

using Model = calm::Transformer<calm::zoo::Llama>;
using Composed = calm::ComposedModel<Model, Model>;

Composed f(std::shared_ptr<const Model> anchor, std::shared_ptr<const Model> augment) {
#ifdef CALM_CORRECTED
  return Composed(anchor, {augment}, calm::links::evenly_spaced(1));
#else
  return Composed(anchor, {augment, augment}, calm::links::evenly_spaced(1));
#endif
}
