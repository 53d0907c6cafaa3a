// expect: the additions of LoRA have no place in a folder of plain weights
#include <calm/io/model_folder.hpp>
#include <calm/model/transformer.hpp>
#include <calm/model/zoo/llama.hpp>

#ifdef CALM_CORRECTED
using Model = calm::Transformer<calm::zoo::Llama, calm::Trainable>;
#else
using Model = calm::Transformer<calm::zoo::Llama, calm::Lora>;
#endif
void save(const Model& model) { calm::save_model(model, "folder"); }
