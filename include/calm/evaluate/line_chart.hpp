// LineChart: series of points as one SVG picture (learning curves).
//
// A series has a colour (of Okabe and Ito, whose colours colour-blind readers tell apart), a marker and a dash of its
// own, so that the picture also reads in grey. Plain SVG: no scripts, nothing from outside; text is escaped.
#pragma once

#include <calm/core/error.hpp>
#include <calm/evaluate/table.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

class LineChart {
 public:
  struct Point {
    double x, y;
  };

  LineChart(std::string title, std::string x_label, std::string y_label)
      : title_(std::move(title)), x_label_(std::move(x_label)), y_label_(std::move(y_label)) {}

  /// Points are joined in their order; one that is not finite leaves a gap.
  void add_series(std::string name, std::vector<Point> points) {
    series_.push_back({std::move(name), std::move(points)});
  }

  /// The y axis covers at least [low, high] (0 to 100 for percentages). Otherwise the points decide.
  void include_y(double low, double high) {
    require<ConfigError>(std::isfinite(low) && std::isfinite(high) && low <= high, "LineChart: the range ", low, " to ",
                         high);
    y_wish_ = {low, high};
  }

  std::string svg() const {
    const Axis x = axis([](const Point& p) { return p.x; }, {}, left, plot_width);
    const Axis y = axis([](const Point& p) { return p.y; }, y_wish_, top + plot_height, -plot_height);
    std::size_t longest = 0;
    for (const Series& series : series_) longest = std::max(longest, display_width(series.name));
    const double legend = series_.empty() ? 20 : 64 + 7.2 * static_cast<double>(longest);
    const double width = left + plot_width + legend, height = top + plot_height + 60;

    std::string out = "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" viewBox=\"0 0 " + number(width) + ' ' +
                      number(height) + "\" width=\"" + number(width) + "\" height=\"" + number(height) +
                      "\" font-family=\"sans-serif\" font-size=\"13\" fill=\"#222222\">\n<title>" + escaped(title_) +
                      "</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n";
    out += label(title_, left + plot_width / 2, 24, "middle", " font-size=\"16\" font-weight=\"bold\"");
    draw_axes(out, x, y);
    for (std::size_t i = 0; i < series_.size(); ++i) draw_series(out, i, x, y);
    for (std::size_t i = 0; i < series_.size(); ++i) draw_legend(out, i);
    return out + "</svg>\n";
  }

 private:
  static constexpr double left = 76, top = 44, plot_width = 600, plot_height = 340;
  static constexpr std::array<std::string_view, 7> colours{"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                                           "#e69f00", "#56b4e9", "#000000"};
  static constexpr std::array<std::string_view, 4> dashes{"", "7 4", "2 3", "9 3 2 3"};

  struct Series {
    std::string name;
    std::vector<Point> points;
  };

  struct Axis {
    double low, high, step;
    double origin, length;  // in the picture
    double operator()(double value) const { return origin + (value - low) / (high - low) * length; }
    int digits() const { return std::max(0, static_cast<int>(-std::floor(std::log10(step) + 1e-9))); }
    int ticks() const { return static_cast<int>(std::lround((high - low) / step)); }
    std::string tick_text(int i) const {
      const double value = low + i * step;
      if (std::max(std::abs(low), std::abs(high)) < 1e7 && step >= 1e-6) return fixed(value, digits());
      return message(std::abs(value) < step / 2 ? 0.0 : value);
    }
  };

  /// An axis that covers all finite values and the wish, from tick to tick, with steps of 1, 2 or 5 times a power
  /// of 10.
  template <class Coordinate>
  Axis axis(const Coordinate& coordinate, std::optional<std::pair<double, double>> wish, double origin,
            double length) const {
    double low = std::numeric_limits<double>::infinity(), high = -low;
    for (const Series& series : series_)
      for (const Point& point : series.points)
        if (is_drawn(point)) low = std::min(low, coordinate(point)), high = std::max(high, coordinate(point));
    if (wish) low = std::min(low, wish->first), high = std::max(high, wish->second);
    if (low > high) low = 0, high = 1;
    const double least = std::max({std::abs(low), std::abs(high), 1e-300}) * 1e-9;  // where doubles still make ticks
    if (high - low < least) {
      const double margin = low == 0 ? 1 : std::abs(low) * 0.1;
      low -= margin;
      high += margin;
    }
    const double rough = (high - low) / 6, power = std::pow(10, std::floor(std::log10(rough)));
    const double step = power * (rough <= power ? 1 : rough <= 2 * power ? 2 : rough <= 5 * power ? 5 : 10);
    return {std::floor(low / step + 1e-9) * step, std::ceil(high / step - 1e-9) * step, step, origin, length};
  }

  /// Beyond 1e290 differences of coordinates would overflow.
  static bool is_drawn(const Point& p) { return std::abs(p.x) < 1e290 && std::abs(p.y) < 1e290; }

  void draw_axes(std::string& out, const Axis& x, const Axis& y) const {
    const double bottom = top + plot_height;
    for (int i = 0; i <= y.ticks(); ++i) {
      const double place = y(y.low + i * y.step);
      out += line(left, place, left + plot_width, place, "#dddddd");
      out += label(y.tick_text(i), left - 8, place + 4.5, "end");
    }
    for (int i = 0; i <= x.ticks(); ++i) {
      const double place = x(x.low + i * x.step);
      out += line(place, bottom, place, bottom + 5, "#222222");
      out += label(x.tick_text(i), place, bottom + 20, "middle");
    }
    out += line(left, bottom, left + plot_width, bottom, "#222222") + line(left, top, left, bottom, "#222222");
    out += label(x_label_, left + plot_width / 2, bottom + 46, "middle");
    const std::string turn = " transform=\"rotate(-90 18 " + number(top + plot_height / 2) + ")\"";
    out += label(y_label_, 18, top + plot_height / 2, "middle", turn);
  }

  void draw_series(std::string& out, std::size_t i, const Axis& x, const Axis& y) const {
    const std::vector<Point>& points = series_[i].points;
    std::string path, markers;
    bool joined = false;
    for (const Point& point : points) {
      if (is_drawn(point)) {
        path += (joined ? " L" : " M") + number(x(point.x)) + ' ' + number(y(point.y));
        joined = true;
      } else {
        joined = false;
      }
    }
    // About ten markers a series, the series a little apart so that curves that coincide still show.
    const std::size_t every = std::max<std::size_t>(1, points.size() / 10);
    for (std::size_t p = every == 1 ? 0 : i * every / 8 % every; p < points.size(); p += every)
      if (is_drawn(points[p])) markers += marker(i, x(points[p].x), y(points[p].y));
    if (!path.empty()) out += "<path d=\"" + path.substr(1) + '"' + stroke(i) + "/>\n";
    out += markers;
  }

  void draw_legend(std::string& out, std::size_t i) const {
    const double from = left + plot_width + 14, place = top + 10 + 22 * static_cast<double>(i);
    out += "<path d=\"M" + number(from) + ' ' + number(place) + " h30\"" + stroke(i) + "/>\n";
    out += marker(i, from + 15, place) + label(series_[i].name, from + 38, place + 4.5, "start");
  }

  static std::string stroke(std::size_t i) {
    // 7 colours and 4 dashes have no common factor: 28 series differ in one of them.
    const std::string_view dash = dashes[i % dashes.size()];
    return " fill=\"none\" stroke-width=\"1.8\" stroke=\"" + std::string(colours[i % colours.size()]) + '"' +
           (dash.empty() ? std::string() : " stroke-dasharray=\"" + std::string(dash) + '"');
  }

  static std::string marker(std::size_t i, double x, double y) {
    static constexpr std::array<std::string_view, 7> shapes{"m-4 0 a4 4 0 1 0 8 0 a4 4 0 1 0 -8 0z",
                                                            "m-3.5 -3.5h7v7h-7z",
                                                            "m0 -4.5 l4.5 8h-9z",
                                                            "m0 -5 l5 5 l-5 5 l-5 -5z",
                                                            "m-4 -4 l8 8 m0 -8 l-8 8",
                                                            "m0 4.5 l4.5 -8h-9z",
                                                            "m-5 0 h10 m-5 -5 v10"};
    const std::string colour(colours[i % colours.size()]);
    return "<path d=\"M" + number(x) + ' ' + number(y) + ' ' + std::string(shapes[i % shapes.size()]) + "\" fill=\"" +
           colour + "\" stroke=\"" + colour + "\"/>\n";
  }

  static std::string line(double x1, double y1, double x2, double y2, std::string_view colour) {
    return "<path d=\"M" + number(x1) + ' ' + number(y1) + " L" + number(x2) + ' ' + number(y2) + "\" stroke=\"" +
           std::string(colour) + "\"/>\n";
  }

  static std::string label(std::string_view text, double x, double y, std::string_view anchor,
                           std::string_view more = "") {
    return "<text x=\"" + number(x) + "\" y=\"" + number(y) + "\" text-anchor=\"" + std::string(anchor) + '"' +
           std::string(more) + '>' + escaped(text) + "</text>\n";
  }

  static std::string number(double x) { return fixed(x, 1); }

  static std::string escaped(std::string_view text) {
    std::string result;
    for (const char c : text) {
      if (c == '&') result += "&amp;";
      else if (c == '<') result += "&lt;";
      else if (c == '>') result += "&gt;";
      else if (c == '"') result += "&quot;";
      else result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;  // XML has no way to write control characters
    }
    return result;
  }

  std::string title_, x_label_, y_label_;
  std::optional<std::pair<double, double>> y_wish_;
  std::vector<Series> series_;
};

}  // namespace calm::inline CALM_ABI
