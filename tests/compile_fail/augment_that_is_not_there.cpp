// expect: there are fewer augments than this index asks for
#include <calm/compose.hpp>

using Model = calm::Transformer<calm::zoo::Llama>;
#ifdef CALM_CORRECTED
constexpr std::size_t last = 1;
#else
constexpr std::size_t last = 2;
#endif

const Model& f(const calm::ComposedModel<Model, Model, Model>& composed) { return composed.augment<last>(); }
