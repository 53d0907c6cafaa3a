// The composition API: models, bridges, the CPU backend. What most programs include; needs Eigen alone.
#pragma once

#include <calm/backend/cpu.hpp>
#include <calm/compose/composed_model.hpp>
#include <calm/model/random_weights.hpp>
#include <calm/model/transformer.hpp>
#include <calm/model/zoo/llama.hpp>
