// Everything: composition, files, training, generation, evaluation. Needs calm::io beside Eigen.
#pragma once

#include <calm/compose.hpp>
#include <calm/evaluate/interval.hpp>
#include <calm/evaluate/line_chart.hpp>
#include <calm/evaluate/link_report.hpp>
#include <calm/evaluate/progress.hpp>
#include <calm/evaluate/table.hpp>
#include <calm/generate/generate.hpp>
#include <calm/io/adapter.hpp>
#include <calm/io/gguf.hpp>
#include <calm/train/checkpoint.hpp>
#include <calm/train/muon.hpp>
