// The table of the experiment as text and CSV, and the learning curves as a picture.
#pragma once

#include "rows.hpp"

#include <calm/evaluate/interval.hpp>
#include <calm/evaluate/line_chart.hpp>
#include <calm/evaluate/table.hpp>
#include <calm/io/atomic_file.hpp>

namespace key_value {

/// The results of one row over the seeds it was run with.
struct RowOverSeeds {
  std::vector<RowResult> runs;     // one for each seed
  std::vector<const Score*> base;  // what m_B scored with each seed's evaluation
};

inline std::string with_spread(const std::vector<double>& values, const std::string& single) {
  if (values.size() == 1) return single;
  double mean = 0, squares = 0;
  for (const double v : values) mean += v / static_cast<double>(values.size());
  for (const double v : values) squares += (v - mean) * (v - mean);
  return calm::message(calm::fixed(mean, 1), " +- ",
                       calm::fixed(std::sqrt(squares / static_cast<double>(values.size() - 1)), 1));
}

/// Percent with its 95 % interval for one seed; mean and standard deviation for several.
inline std::string cell(const RowOverSeeds& row, std::size_t column) {
  std::vector<double> values;
  for (const RowResult& run : row.runs) values.push_back(run.score.percent(column));
  const auto& right = row.runs.front().score.right[column];
  const auto interval =
      calm::wilson_interval(std::count(right.begin(), right.end(), true), static_cast<Index>(right.size()));
  return with_spread(values, calm::message(calm::fixed(values[0], 1), " [", calm::fixed(100 * interval.low, 1), ", ",
                                           calm::fixed(100 * interval.high, 1), "]"));
}

/// What the row lost on Numeric Arithmetic against m_B, on the same items: percentage points, positive where it lost.
inline std::string forgetting(const RowOverSeeds& row) {
  std::vector<double> values;
  std::string single;
  for (std::size_t i = 0; i < row.runs.size(); ++i) {
    const auto d = calm::paired_difference(row.base[i]->right[numeric], row.runs[i].score.right[numeric]);
    values.push_back(100 * d.difference);
    single = calm::message(calm::fixed(100 * d.difference, 1), " [", calm::fixed(100 * d.interval.low, 1), ", ",
                           calm::fixed(100 * d.interval.high, 1), "]");
  }
  return with_spread(values, single);
}

inline calm::Table table_of(const std::vector<RowOverSeeds>& rows) {
  std::vector<std::string> titles{""};
  titles.insert(titles.end(), column_names.begin(), column_names.end());
  for (const char* title : {"trained parameters", "seconds", "forgetting"}) titles.emplace_back(title);
  calm::Table table(titles);
  for (const RowOverSeeds& row : rows) {
    std::vector<std::string> cells{row.runs.front().name};
    for (std::size_t c = 0; c < columns; ++c) cells.push_back(cell(row, c));
    std::vector<double> seconds;
    for (const RowResult& run : row.runs) seconds.push_back(run.seconds);
    cells.push_back(std::to_string(row.runs.front().trained_parameters));
    cells.push_back(with_spread(seconds, calm::fixed(seconds[0], 0)));
    cells.push_back(forgetting(row));
    table.add_row(cells);
  }
  return table;
}

inline std::string curves_of(const std::vector<RowOverSeeds>& rows) {
  calm::LineChart chart("Keys arithmetic while the bridges train (first seed, samples of 100)", "optimizer steps",
                        "exact match, percent");
  chart.include_y(0, 100);
  for (const RowOverSeeds& row : rows) {
    const auto& curve = row.runs.front().curve;
    if (curve.empty()) continue;
    std::vector<calm::LineChart::Point> seen, unseen;
    for (const CurvePoint& point : curve) {
      seen.push_back({static_cast<double>(point.step), point.seen});
      unseen.push_back({static_cast<double>(point.step), point.unseen});
    }
    chart.add_series(row.runs.front().name + ": seen keys", seen);
    chart.add_series(row.runs.front().name + ": unseen keys", unseen);
  }
  return chart.svg();
}

}  // namespace key_value
