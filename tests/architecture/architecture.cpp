// Reads the lines of every header and holds the order of the folders and the rules of form.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;

// A header includes only from its own folder and from folders before it.
const std::vector<std::string> folders = {"core",    "tensor", "backend", "nn",       "model",
                                          "compose", "io",     "train",   "generate", "evaluate"};

// The umbrella headers: whose folder each may reach, at most. compose.hpp is for programs that read no foreign file, so
// nothing that it reaches may lie in io/.
const std::map<std::string, std::string> umbrellas = {{"compose.hpp", "evaluate"}, {"calm.hpp", "evaluate"}};

struct Header {
  std::string name;                   // as it is included: "calm/nn/linear.hpp"
  std::string folder;                 // "nn"; empty for an umbrella header
  std::vector<std::string> lines;     // as they stand
  std::vector<std::string> includes;  // <calm/nn/norm.hpp>, <vector>, "quoted.hpp": with what surrounds them
};

std::vector<Header> read_headers() {
  static const std::regex include_line(R"(^\s*#\s*include\s*([<"][^>"]*[>"]).*)");
  const fs::path root(CALM_INCLUDE_DIR);
  std::vector<Header> headers;
  for (const auto& entry : fs::recursive_directory_iterator(root / "calm")) {
    if (entry.path().extension() != ".hpp") continue;
    Header header;
    const fs::path name = entry.path().lexically_relative(root);
    header.name = name.generic_string();
    const fs::path below = name.lexically_relative("calm");
    if (below.has_parent_path()) header.folder = below.begin()->string();
    std::ifstream file(entry.path());
    for (std::string line; std::getline(file, line);) {
      std::smatch match;
      if (std::regex_match(line, match, include_line)) header.includes.push_back(match[1]);
      header.lines.push_back(line);
    }
    headers.push_back(header);
  }
  std::sort(headers.begin(), headers.end(), [](const Header& a, const Header& b) { return a.name < b.name; });
  return headers;
}

const std::vector<Header>& headers() {
  static const std::vector<Header> all = read_headers();
  return all;
}

std::ptrdiff_t rank(const std::string& folder) {
  return std::find(folders.begin(), folders.end(), folder) - folders.begin();
}

bool known(const std::string& folder) { return std::find(folders.begin(), folders.end(), folder) != folders.end(); }

// "calm/nn/norm.hpp" from "<calm/nn/norm.hpp>", empty for headers of others.
std::string own_header(const std::string& include) {
  return include.rfind("<calm/", 0) == 0 ? include.substr(1, include.size() - 2) : "";
}

// "nn" from "calm/nn/norm.hpp", empty for an umbrella header.
std::string folder_of(const std::string& name) {
  const std::size_t begin = 5, end = name.find('/', begin);
  return end == std::string::npos ? "" : name.substr(begin, end - begin);
}

// The names of all headers that `name` includes, itself among them, however far away.
std::set<std::string> reached_from(const std::string& name) {
  std::set<std::string> reached;
  std::vector<std::string> open = {name};
  while (!open.empty()) {
    const std::string current = open.back();
    open.pop_back();
    if (!reached.insert(current).second) continue;
    for (const Header& header : headers()) {
      if (header.name != current) continue;
      for (const auto& include : header.includes)
        if (const std::string own = own_header(include); !own.empty()) open.push_back(own);
    }
  }
  return reached;
}

// Lines that match, as "calm/nn/norm.hpp:12: text".
std::vector<std::string> lines_matching(const Header& header, const std::regex& pattern) {
  std::vector<std::string> found;
  for (std::size_t i = 0; i < header.lines.size(); ++i)
    if (std::regex_search(header.lines[i], pattern))
      found.push_back(header.name + ":" + std::to_string(i + 1) + ": " + header.lines[i]);
  return found;
}

}  // namespace

TEST_CASE("the headers are found") { CHECK(headers().size() >= 5); }

TEST_CASE("a header lies in one of the known folders, or is an umbrella header") {
  for (const Header& header : headers()) {
    CAPTURE(header.name);
    if (header.folder.empty()) CHECK(umbrellas.count(header.name.substr(5)) == 1);
    else CHECK(known(header.folder));
  }
}

TEST_CASE("a header includes only from its own folder and from folders before it") {
  for (const Header& header : headers()) {
    const auto umbrella = umbrellas.find(header.name.substr(5));
    const std::string folder = umbrella == umbrellas.end() ? header.folder : umbrella->second;
    for (const auto& include : header.includes) {
      const std::string own = own_header(include);
      if (own.empty()) continue;
      CAPTURE(header.name);
      CAPTURE(include);
      if (folder_of(own).empty()) {
        CHECK_MESSAGE(umbrella != umbrellas.end(), "only an umbrella header includes another one");
      } else {
        CHECK(known(folder_of(own)));
        CHECK(rank(folder_of(own)) <= rank(folder));
      }
    }
  }
}

TEST_CASE("the headers of calm are included by their full name in angle brackets, and exist") {
  for (const Header& header : headers()) {
    for (const auto& include : header.includes) {
      CAPTURE(header.name);
      CAPTURE(include);
      CHECK(include.front() == '<');
      if (const std::string own = own_header(include); !own.empty())
        CHECK(fs::exists(fs::path(CALM_INCLUDE_DIR) / own));
    }
  }
}

TEST_CASE("files are no concern of nn, model and compose") {
  for (const Header& header : headers()) {
    if (header.folder != "nn" && header.folder != "model" && header.folder != "compose") continue;
    for (const auto& reached : reached_from(header.name)) {
      CAPTURE(header.name);
      CHECK(folder_of(reached) != "io");
    }
  }
}

TEST_CASE("compose.hpp needs Eigen alone") {
  const std::regex foreign("nlohmann|xxhash|pcre2|utf8proc");
  for (const auto& name : reached_from("calm/compose.hpp")) {
    for (const Header& header : headers()) {
      if (header.name != name) continue;
      for (const auto& include : header.includes) {
        CAPTURE(name);
        CAPTURE(include);
        CHECK_FALSE(std::regex_search(include, foreign));
      }
    }
  }
}

TEST_CASE("PCRE2 and utf8proc are included in io/tokenizer alone, and reached by no header outside of it") {
  for (const Header& header : headers()) {
    if (header.name.rfind("calm/io/tokenizer/", 0) == 0) continue;
    for (const auto& include : header.includes) {
      CAPTURE(header.name);
      CHECK_FALSE(std::regex_search(include, std::regex("pcre2|<utf8proc|calm/io/tokenizer/")));
    }
  }
}

TEST_CASE("nlohmann-json and xxHash are included in io alone, Eigen in backend alone") {
  for (const Header& header : headers()) {
    for (const auto& include : header.includes) {
      CAPTURE(header.name);
      CAPTURE(include);
      if (std::regex_search(include, std::regex("nlohmann|xxhash"))) CHECK(header.folder == "io");
      if (include.rfind("<Eigen/", 0) == 0) CHECK(header.folder == "backend");
    }
  }
}

TEST_CASE("a header opens with a comment that says what it is, and is included once") {
  for (const Header& header : headers()) {
    CAPTURE(header.name);
    REQUIRE(!header.lines.empty());
    CHECK(header.lines.front().rfind("//", 0) == 0);
    CHECK(lines_matching(header, std::regex("^#pragma once$")).size() == 1);
  }
}

TEST_CASE("a header has at most 400 lines") {
  for (const Header& header : headers()) {
    CAPTURE(header.name);
    CHECK(header.lines.size() <= 400);
  }
}

TEST_CASE("no header says 'using namespace'") {
  for (const Header& header : headers())
    for (const auto& line : lines_matching(header, std::regex(R"(^\s*using\s+namespace\b)"))) FAIL_CHECK(line);
}

TEST_CASE("preprocessor conditions stand in core and backend alone") {
  for (const Header& header : headers()) {
    if (header.folder == "core" || header.folder == "backend") continue;
    for (const auto& line : lines_matching(header, std::regex(R"(^\s*#\s*(if|ifdef|ifndef|elif)\b)"))) FAIL_CHECK(line);
  }
}
