// Table: named columns and rows of text, printed for a person (aligned), as CSV and as Markdown.
//
// A column whose cells all begin like numbers stands to the right. Widths count code points, which is right for the
// letters and signs of most scripts and too narrow for wide ones (CJK).
#pragma once

#include <calm/core/error.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

/// x with `digits` digits after the point, in every locale; "nan" and "inf" as words, never "-0.0".
inline std::string fixed(double x, int digits) {
  char text[400];
  const auto end = std::to_chars(text, text + sizeof(text), x, std::chars_format::fixed, digits).ptr;
  std::string result(text, end);
  const bool is_zero = result.find_first_not_of("-0.") == std::string::npos;
  return is_zero && result.starts_with('-') ? result.substr(1) : result;
}

/// Code points of UTF-8 text.
inline std::size_t display_width(std::string_view text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U; }));
}

class Table {
 public:
  explicit Table(std::vector<std::string> columns) : columns_(std::move(columns)) {}

  /// One cell for each column.
  void add_row(std::vector<std::string> cells) {
    require<ShapeError>(cells.size() == columns_.size(), "Table: a row of ", cells.size(), " cells; the table has ",
                        columns_.size(), " columns");
    rows_.push_back(std::move(cells));
  }

  const std::vector<std::string>& columns() const { return columns_; }
  const std::vector<std::vector<std::string>>& rows() const { return rows_; }

  /// Aligned, two spaces between columns, a line under the titles.
  std::string text() const {
    const Layout layout = measure([](const std::string& cell) { return one_line(cell); });
    std::string result;
    for (std::size_t row = 0; row < layout.cells.size(); ++row) {
      std::string line;
      for (std::size_t column = 0; column < columns_.size(); ++column)
        line += (column > 0 ? "  " : "") + layout.padded(row, column);
      line.erase(line.find_last_not_of(' ') + 1);
      result += line + '\n';
      if (row > 0) continue;
      for (std::size_t column = 0; column < columns_.size(); ++column)
        result += (column > 0 ? "  " : "") + std::string(layout.widths[column], '-');
      result += '\n';
    }
    return result;
  }

  /// RFC 4180 quoting; lines end in '\n'.
  std::string csv() const {
    std::string result = csv_line(columns_);
    for (const auto& row : rows_) result += csv_line(row);
    return result;
  }

  /// A Markdown table that is also aligned as text.
  std::string markdown() const {
    const Layout layout = measure([](const std::string& cell) {
      std::string escaped;
      for (const char c : one_line(cell)) escaped += c == '|' ? std::string("\\|") : std::string(1, c);
      return escaped;
    });
    std::string result;
    for (std::size_t row = 0; row < layout.cells.size(); ++row) {
      for (std::size_t column = 0; column < columns_.size(); ++column)
        result += "| " + layout.padded(row, column) + ' ';
      result += "|\n";
      if (row > 0) continue;
      for (std::size_t column = 0; column < columns_.size(); ++column)
        result += '|' + std::string(layout.widths[column] + 1, '-') + (layout.right[column] ? ':' : '-');
      result += "|\n";
    }
    return result;
  }

 private:
  struct Layout {
    std::vector<std::vector<std::string>> cells;  // the titles first
    std::vector<std::size_t> widths;
    std::vector<bool> right;

    std::string padded(std::size_t row, std::size_t column) const {
      const std::string& cell = cells[row][column];
      const std::string space(widths[column] - display_width(cell), ' ');
      return right[column] ? space + cell : cell + space;
    }
  };

  template <class Render>
  Layout measure(const Render& render) const {
    Layout layout;
    layout.cells.push_back(columns_);
    layout.cells.insert(layout.cells.end(), rows_.begin(), rows_.end());
    layout.widths.assign(columns_.size(), 3);
    layout.right.assign(columns_.size(), !rows_.empty());
    for (std::size_t row = 0; row < layout.cells.size(); ++row)
      for (std::size_t column = 0; column < columns_.size(); ++column) {
        std::string& cell = layout.cells[row][column];
        if (row > 0 && !begins_like_a_number(cell)) layout.right[column] = false;
        cell = render(cell);
        layout.widths[column] = std::max(layout.widths[column], display_width(cell));
      }
    return layout;
  }

  /// Also what stands for a number that is not there.
  static bool begins_like_a_number(std::string_view cell) {
    if (cell.empty() || cell == "-" || cell == "–" || cell == "n/a" || cell == "nan" || cell == "inf") return true;
    if (cell.front() == '+' || cell.front() == '-' || cell.front() == '.') cell.remove_prefix(1);
    return !cell.empty() && cell.front() >= '0' && cell.front() <= '9';
  }

  static std::string one_line(std::string cell) {
    std::replace_if(
        cell.begin(), cell.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20; }, ' ');
    return cell;
  }

  static std::string csv_line(const std::vector<std::string>& cells) {
    std::string line;
    for (const std::string& cell : cells) {
      if (&cell != &cells.front()) line += ',';
      if (cell.find_first_of(",\"\r\n") == std::string::npos) {
        line += cell;
        continue;
      }
      line += '"';
      for (const char c : cell) line += c == '"' ? std::string("\"\"") : std::string(1, c);
      line += '"';
    }
    return line + '\n';
  }

  std::vector<std::string> columns_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace calm::inline CALM_ABI
