// expect: MatrixView<const float>
#include <calm/compose.hpp>

#ifdef CALM_CORRECTED
calm::MatrixView<const float> f(calm::MatrixView<float> view) { return view; }
#else
calm::MatrixView<float> f(calm::MatrixView<const float> view) { return view; }
#endif
