// compiles
#include <calm/compose.hpp>

using Model = calm::Transformer<calm::zoo::Llama>;
template class calm::ComposedModel<Model, Model>;

int main() {}
