// expect: WeightSource
#include <calm/compose.hpp>

struct Source {
#ifdef CALM_CORRECTED
  calm::StoredMatrix operator()(const std::string&, calm::Index, calm::Index) const { return {}; }
#else
  int operator()(const std::string&, calm::Index, calm::Index) const { return 0; }
#endif
};

void f(const calm::ModelSpec& spec) { calm::Transformer<calm::zoo::Llama> model(spec, Source{}); }
