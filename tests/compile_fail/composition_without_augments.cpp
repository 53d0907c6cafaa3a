// expect: a composition needs at least one augment
#include <calm/compose.hpp>

using Model = calm::Transformer<calm::zoo::Llama>;
#ifdef CALM_CORRECTED
template class calm::ComposedModel<Model, Model>;
#else
template class calm::ComposedModel<Model>;
#endif
