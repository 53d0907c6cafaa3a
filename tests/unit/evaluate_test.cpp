#include <doctest/doctest.h>
#include <calm/evaluate/interval.hpp>
#include <calm/evaluate/line_chart.hpp>
#include <calm/evaluate/progress.hpp>
#include <calm/evaluate/table.hpp>

#include <chrono>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

namespace evaluate_test {

namespace {

int count(const std::string& text, const std::string& part) {
  int found = 0;
  for (auto place = text.find(part); place != text.npos; place = text.find(part, place + 1)) ++found;
  return found;
}

bool has(const std::string& text, const std::string& part) { return count(text, part) > 0; }

/// A clock that stands still until it is told to go on.
struct ManualClock {
  using duration = std::chrono::milliseconds;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::time_point<ManualClock>;
  static inline duration time{0};
  static time_point now() { return time_point(time); }
};
using TestProgress = calm::BasicProgress<ManualClock>;

/// The opening and closing tags of an SVG match, and no '<' or '&' stands alone.
bool is_well_formed(const std::string& svg) {
  std::vector<std::string> open;
  for (std::size_t i = 0; i < svg.size(); ++i) {
    if (svg[i] == '&') {
      const std::string name = svg.substr(i, svg.find(';', i) - i + 1);
      if (name != "&amp;" && name != "&lt;" && name != "&gt;" && name != "&quot;") return false;
    }
    if (svg[i] != '<') continue;
    const std::size_t end = svg.find('>', i);
    if (end == svg.npos || svg.substr(i + 1, end - i - 1).find('<') != std::string::npos) return false;
    const std::string tag = svg.substr(i + 1, svg.find_first_of(" >/", i + 2) - i - 1);
    if (svg[i + 1] == '/') {
      if (open.empty() || "/" + open.back() != svg.substr(i + 1, end - i - 1)) return false;
      open.pop_back();
    } else if (svg[end - 1] != '/') {
      open.push_back(tag);
    }
  }
  return open.empty();
}

}  // namespace

TEST_CASE("Wilson's interval has its published values and stays within 0 and 1") {
  // Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
  const auto check = [](calm::Index successes, calm::Index trials, double low, double high) {
    const calm::Interval interval = calm::wilson_interval(successes, trials);
    CHECK(interval.low == doctest::Approx(low).epsilon(1e-3));
    CHECK(interval.high == doctest::Approx(high).epsilon(1e-3));
  };
  check(81, 263, 0.2553, 0.3662);
  check(15, 148, 0.0624, 0.1605);
  check(0, 20, 0.0, 0.1611);
  check(1, 29, 0.0061, 0.1718);
  CHECK(calm::wilson_interval(0, 20).low == 0.0);
  CHECK(calm::wilson_interval(20, 20).high == 1.0);
  CHECK(calm::wilson_interval(0, 0).low == 0.0);
  CHECK(calm::wilson_interval(0, 0).high == 1.0);
  CHECK_THROWS_AS(calm::wilson_interval(3, 2), calm::ConfigError);
}

TEST_CASE("a paired difference counts the items on which the two differ") {
  const std::vector<bool> first{true, true, true, false, false}, second{true, false, false, true, false};
  const calm::PairedDifference d = calm::paired_difference(first, second);
  CHECK(d.only_first == 2);
  CHECK(d.only_second == 1);
  CHECK(d.difference == doctest::Approx(0.2));
  CHECK(d.interval.low < 0);
  CHECK(d.interval.high > 0.2);
  CHECK_THROWS_AS(calm::paired_difference(first, std::vector<bool>{true}), calm::ShapeError);
  CHECK_THROWS_AS(calm::paired_difference(3, 3, 5), calm::ConfigError);
}

TEST_CASE("a paired interval is what its formula gives, tight for many items and open for few") {
  // (b - c) / N with b = 20.5, c = 10.5, N = 102: 0.0980 -+ 1.96 sqrt(31 - 100 / 102) / 102.
  const calm::PairedDifference d = calm::paired_difference(20, 10, 100);
  CHECK(d.difference == doctest::Approx(0.1));
  CHECK(d.interval.low == doctest::Approx(-0.00724).epsilon(1e-2));
  CHECK(d.interval.high == doctest::Approx(0.20332).epsilon(1e-3));
  CHECK(calm::paired_difference(0, 0, 1000).interval.high < 0.003);
  CHECK(calm::paired_difference(0, 0, 4).interval.high > 0.25);
  CHECK(calm::paired_difference(0, 0, 0).interval.low == -1);
}

TEST_CASE("a table is aligned, numbers to the right, and UTF-8 counts by letters") {
  calm::Table table({"model", "exact", "note"});
  table.add_row({"m_A", "3.5", "größer"});
  table.add_row({"composed", "-", "a"});
  table.add_row({"é", "100.0 ± 2", ""});
  CHECK(table.text() ==
        "model         exact  note\n"
        "--------  ---------  ------\n"
        "m_A             3.5  größer\n"
        "composed          -  a\n"
        "é         100.0 ± 2\n");
  CHECK(table.markdown() ==
        "| model    |     exact | note   |\n"
        "|----------|----------:|--------|\n"
        "| m_A      |       3.5 | größer |\n"
        "| composed |         - | a      |\n"
        "| é        | 100.0 ± 2 |        |\n");
  CHECK_THROWS_AS(table.add_row({"a", "b"}), calm::ShapeError);
}

TEST_CASE("cells that would break a format are quoted or escaped") {
  calm::Table table({"a,b", "c"});
  table.add_row({"say \"hi\"", "two\nlines"});
  table.add_row({"x|y", "plain"});
  CHECK(table.csv() == "\"a,b\",c\n\"say \"\"hi\"\"\",\"two\nlines\"\nx|y,plain\n");
  CHECK(has(table.markdown(), "| x\\|y "));
  CHECK(has(table.markdown(), "| two lines |"));
  CHECK(has(table.text(), "two lines"));
}

TEST_CASE("a number has the digits asked for and no negative zero") {
  CHECK(calm::fixed(84.3456, 1) == "84.3");
  CHECK(calm::fixed(-0.04, 1) == "0.0");
  CHECK(calm::fixed(-0.06, 1) == "-0.1");
  CHECK(calm::fixed(2, 0) == "2");
  CHECK(calm::fixed(std::numeric_limits<double>::quiet_NaN(), 2) == "nan");
  CHECK(calm::fixed(std::numeric_limits<double>::max(), 3).size() == 313);
}

TEST_CASE("a chart names its axes and series and escapes what they are called") {
  calm::LineChart chart("loss <1> & \"2\"", "step", "nats");
  chart.add_series("a<script>b", {{0, 1}, {10, 0.5}, {20, 0.25}});
  chart.add_series("two", {{0, 2}, {20, 1}});
  const std::string svg = chart.svg();
  CHECK(is_well_formed(svg));
  CHECK(has(svg, "loss &lt;1&gt; &amp; &quot;2&quot;</title>"));
  CHECK(has(svg, ">a&lt;script&gt;b</text>"));
  CHECK(!has(svg, "<script"));
  CHECK(has(svg, ">step</text>"));
  CHECK(has(svg, ">nats</text>"));
  CHECK(has(svg, ">0.5</text>"));
  CHECK(has(svg, ">20</text>"));
  CHECK(svg == chart.svg());
}

TEST_CASE("the points of a chart stand where their values are") {
  calm::LineChart chart("t", "x", "y");
  chart.include_y(0, 100);
  chart.add_series("s", {{0, 0}, {10, 100}});
  // The plot is 600 x 340 at (76, 44).
  CHECK(has(chart.svg(), "<path d=\"M76.0 384.0 L676.0 44.0\" fill=\"none\""));
}

TEST_CASE("28 series of a chart differ in colour, marker or dash") {
  calm::LineChart chart("many", "x", "y");
  for (int i = 0; i < 28; ++i) chart.add_series("s", {{0, 0}, {1, 1}});
  const std::string svg = chart.svg();
  CHECK(is_well_formed(svg));
  std::vector<std::string> styles;
  for (auto place = svg.find(" h30\""); place != svg.npos; place = svg.find(" h30\"", place + 1))
    styles.push_back(svg.substr(place, svg.find('\n', place) - place));
  REQUIRE(styles.size() == 28);
  std::sort(styles.begin(), styles.end());
  CHECK(std::adjacent_find(styles.begin(), styles.end()) == styles.end());
}

TEST_CASE("a chart of no points, one point, equal points, huge and missing values is still a chart") {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const std::vector<std::vector<calm::LineChart::Point>> cases{{},
                                                               {{3, 4}},
                                                               {{1, 5}, {2, 5}},
                                                               {{nan, nan}},
                                                               {{0, 1}, {1, infinity}, {2, 3}},
                                                               {{0, -1e308}, {1, 1e308}},
                                                               {{0, 1e280}, {1, -1e280}},
                                                               {{0, 1e-300}, {1, 2e-300}},
                                                               {{1e9, 1e9}, {1e9 + 1e-3, 1e9 + 1e-3}},
                                                               {{0, 1e-320}, {0, 0}}};
  for (const auto& points : cases) {
    calm::LineChart chart("t", "x", "y");
    chart.add_series("s", points);
    const std::string svg = chart.svg();
    CHECK(is_well_formed(svg));
    CHECK(!has(svg, "nan"));
    CHECK(!has(svg, "inf"));
    CHECK(svg.size() < 20000);
  }
  calm::LineChart gap("t", "x", "y");
  gap.add_series("s", {{0, 1}, {1, 2}, {2, nan}, {3, 2}, {4, 1}});
  const std::string svg = gap.svg(), path = svg.substr(svg.rfind("<path d=\"", svg.find("fill=\"none\"")));
  CHECK(count(path.substr(0, path.find("fill")), "M") == 2);
}

TEST_CASE("progress on a terminal overwrites its line at most five times a second") {
  ManualClock::time = {};
  std::ostringstream out;
  int described = 0;
  {
    TestProgress progress("train", 100, 0, out, true);
    for (int step = 1; step <= 100; ++step) {
      ManualClock::time += std::chrono::milliseconds(10);
      progress.update(step, [&] {
        ++described;
        return calm::message("loss ", step);
      });
    }
  }
  CHECK(described == 5);  // at 10, 210, 410, 610 and 810 ms
  CHECK(count(out.str(), "\r") == 5);
  CHECK(has(out.str(), "\rtrain  21/100  21 %  loss 21  0:01 left\x1b[K"));
  CHECK(count(out.str(), "\n") == 1);
  CHECK(out.str().back() == '\n');
}

TEST_CASE("progress elsewhere is a plain line every five seconds") {
  ManualClock::time = {};
  std::ostringstream out;
  TestProgress progress("eval", 2000, 0, out, false);
  for (int step = 1; step <= 1100; ++step) {
    ManualClock::time += std::chrono::milliseconds(10);
    progress.update(step);
  }
  CHECK(out.str() ==
        "eval  1/2000  0 %  0:20 left\neval  501/2000  25 %  0:15 left\neval  1001/2000  50 %  0:10 left\n");
  progress.finish("exact 84.3");
  CHECK(has(out.str(), "eval  1100/2000  55 %  exact 84.3  0:11\n"));
  CHECK(!has(out.str(), "\r"));
}

TEST_CASE("the time left counts only the steps of this run, and is not guessed without a total") {
  ManualClock::time = {};
  std::ostringstream out;
  TestProgress progress("train", 1000, 900, out, false);
  ManualClock::time += std::chrono::seconds(60);
  progress.update(910);
  CHECK(out.str() == "train  910/1000  91 %  9:00 left\n");
  TestProgress open_end("read", 0, 0, out, false);
  ManualClock::time += std::chrono::seconds(7300);
  open_end.update(7);
  CHECK(has(out.str(), "\nread  7\n"));
  open_end.finish();
  CHECK(has(out.str(), "\nread  7  2:01:40\n"));
}

TEST_CASE("a note stands on a line of its own") {
  ManualClock::time = {};
  std::ostringstream out;
  TestProgress progress("t", 10, 0, out, true);
  progress.update(1);
  progress.note("checkpoint kept");
  CHECK(has(out.str(), "\r\x1b[Kcheckpoint kept\n"));
}

}  // namespace evaluate_test
