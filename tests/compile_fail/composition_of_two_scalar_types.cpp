// expect: the anchor and its augments must compute in the same scalar type
#include <calm/compose.hpp>

template <class Scalar>
using Model = calm::Transformer<calm::zoo::Llama, calm::Frozen, Scalar>;
#ifdef CALM_CORRECTED
template class calm::ComposedModel<Model<double>, Model<double>>;
#else
template class calm::ComposedModel<Model<double>, Model<float>>;
#endif
