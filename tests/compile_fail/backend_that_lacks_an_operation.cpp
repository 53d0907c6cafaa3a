// expect: backend.adamw
#include <calm/compose.hpp>

struct Incomplete : calm::CpuBackend {
#ifndef CALM_CORRECTED
  void adamw() {}
#endif
};

static_assert(calm::Backend<Incomplete>);
