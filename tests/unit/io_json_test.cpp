#include <doctest/doctest.h>
#include <calm/core/random.hpp>
#include <calm/io/json.hpp>

#include <string>

namespace io_json_test {

namespace {

std::string error_of(const std::string& text, calm::JsonLimits limits = {}) {
  try {
    calm::parse_json(text, "some.json", limits);
  } catch (const calm::FormatError& error) {
    return error.what();
  }
  return "no error";
}

template <class Function>
std::string format_error_of(const Function& function) {
  try {
    function();
  } catch (const calm::FormatError& error) {
    return error.what();
  }
  return "no error";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

std::string repeated(const std::string& text, int times) {
  std::string result;
  for (int i = 0; i < times; ++i) result += text;
  return result;
}

}  // namespace

TEST_CASE("every kind of JSON value is read as nlohmann reads it") {
  const std::string text = R"( {"a": [1, -2, 3.5, 1e3, true, false, null, "x\u00e9\n", [], {}], "b": {"c": {"a": 1}},
                               "big": 18446744073709551615, "": ""} )";
  CHECK(calm::parse_json(text, "x") == nlohmann::json::parse(text));
  CHECK(calm::parse_json("7", "x") == 7);
}

TEST_CASE("a key that occurs twice is refused with its place") {
  CHECK(error_of(R"({"a": 1, "a": 1})") == R"(some.json: the key "a" occurs twice)");
  CHECK(error_of(R"({"m": [0, {"a": 1, "b": {}, "\u0061": 2}]})") ==
        R"(some.json: in "m/1": the key "a" occurs twice)");
  CHECK(error_of(R"([{"a": 1}, {"a": 1}, {"b": {"a": 2}}])") == "no error");
}

TEST_CASE("nesting is read up to the limit and not beyond") {
  const auto nested = [](int depth) { return repeated("[", depth) + repeated("]", depth); };
  CHECK(error_of(nested(64)) == "no error");
  CHECK(has(error_of(nested(65)), "more than 64 levels of nesting"));
  CHECK(has(error_of(repeated("[", 1000000)), "more than 64 levels of nesting"));
  CHECK(has(error_of(repeated(R"({"a":)", 100000)), "more than 64 levels of nesting"));
}

TEST_CASE("text that is no JSON is an error with the byte") {
  for (const std::string text : {"", " ", "{", "[1,]", "{\"a\" 1}", "nul", "01", "1 2", "\"\x01\"", "\"\xff\"", "{}x",
                                 "'a'", "// c\n1", "\"\\ud800\"", "1e999", "[1}", "\"abc"}) {
    CAPTURE(text);
    CHECK(has(error_of(text), "some.json: byte "));
    CHECK(has(error_of(text), "not valid JSON"));
  }
  CHECK(has(error_of(std::string("{}\0{", 4)), "byte 2: not valid JSON: a byte 0"));
  CHECK(has(error_of(std::string("\"a\\\0\"", 5)), "not valid JSON"));
}

TEST_CASE("a value that would take far more memory than its text is refused") {
  calm::JsonLimits limits;
  limits.memory_bytes = 1 << 20;
  CHECK(error_of("[" + repeated("1,", 10000) + "1]", limits) == "no error");
  CHECK(has(error_of("[" + repeated("1,", 100000) + "1]", limits), "more than 1048576 bytes of memory"));
  CHECK(has(error_of("[" + repeated("[],", 20000) + "1]", limits), "bytes of memory"));
  CHECK(has(error_of("[" + repeated("{},", 20000) + "1]", limits), "bytes of memory"));
  CHECK(has(error_of("[" + repeated("\"\",", 20000) + "1]", limits), "bytes of memory"));
  limits.token_bytes = 100;
  CHECK(error_of('"' + repeated("x", 90) + '"', limits) == "no error");
  CHECK(has(error_of('"' + repeated("x", 101) + '"', limits), "a string or number of more than 100 bytes"));
  CHECK(has(error_of('"' + repeated("\\\"", 51) + '"', limits), "a string or number of more than 100 bytes"));
  CHECK(has(error_of(repeated("1", 101), limits), "a string or number of more than 100 bytes"));
  CHECK(error_of('[' + repeated("\"\\\\\", 1,", 90) + "1]", limits) == "no error");
  limits.text_bytes = 10;
  CHECK(has(error_of(repeated(" ", 10) + "1", limits), "11 bytes of JSON; more than 10 are not read"));
}

TEST_CASE("the values of a long list are taken one by one and not kept") {
  std::string taken;
  const std::vector<calm::JsonStream> streams = {
      {"m", "o", true,
       [&](const std::string& name, std::size_t i, const calm::Json& value) {
         taken += calm::message(i, name, '=', value.dump(), ' ');
       }},
      {"m", "a", false, [&](const std::string& name, std::size_t i, const calm::Json& value) {
         taken += calm::message(i, name, '=', value.dump(), ' ');
       }}};
  const auto parse = [&](const std::string& text) {
    taken.clear();
    return calm::parse_json(text, "f", {}, streams).dump();
  };
  CHECK(parse(R"({"m": {"a": [1, [2, {"o": [3]}], "x"], "o": {"p": {"q": [4]}, "r": null}, "z": 5}, "a": [6]})") ==
        R"({"a":[6],"m":{"a":[],"o":{},"z":5}})");
  CHECK(taken == R"(0=1 1=[2,{"o":[3]}] 2="x" 0p={"q":[4]} 1r=null )");
  for (const std::string text :
       {R"({"m":{"a":{"o":1},"o":[1]}})", R"({"n":{"a":[1]}})", R"([{"a":[1]}])", R"({"a":[1]})",
        R"({"m":[{"a":[1]}]})", R"({"m":{"b":{"a":[1]}}})", R"({"m":{"a":[],"o":{}}})"}) {
    CHECK(parse(text) == text);
    CHECK(taken.empty());
  }
  // Only one value at a time counts for the limit.
  calm::JsonLimits limits;
  limits.memory_bytes = 100'000;
  std::string many = R"({"m":{"a":[)";
  for (int i = 0; i < 10'000; ++i) many += "[\"a\"],";
  CHECK(calm::parse_json(many + "0]}}", "f", limits, streams).dump() == R"({"m":{"a":[]}})");
  CHECK_THROWS_AS(calm::parse_json(many + "0]}}", "f", limits), calm::FormatError);
}

TEST_CASE("an error shows no control characters and no long names of the file") {
  const std::string name = "\\u001b[31m" + repeated("é", 1000);
  const std::string error = error_of("{\"" + name + "\":1,\"" + name + "\":2}");
  CHECK(error.size() < 200);
  CHECK(has(error, "\"?[31m"));
  CHECK(has(error, "é...\" occurs twice"));
  CHECK(error_of("[\x1b]").find('\x1b') == std::string::npos);
}

TEST_CASE("a getter gives the value or names the file, the key and what was found") {
  const calm::Json config = calm::parse_json(
      R"({"size": 576, "neg": -1, "eps": 1e-5, "tie": true, "act": "silu", "list": [1], "sub": {}, "none": null,
          "huge": 9223372036854775808})",
      "config.json");
  CHECK(calm::get_integer(config, "size", "config.json") == 576);
  CHECK(calm::get_integer(config, "neg", "config.json", -5) == -1);
  CHECK(calm::get_number(config, "eps", "config.json") == 1e-5);
  CHECK(calm::get_number(config, "size", "config.json") == 576.0);
  CHECK(calm::get_boolean(config, "tie", "config.json"));
  CHECK(calm::get_string(config, "act", "config.json") == "silu");
  CHECK(calm::get_array(config, "list", "config.json").size() == 1);
  CHECK(calm::get_object(config, "sub", "config.json").empty());

  const auto integer_error = [&](const std::string& key, calm::Index most) {
    return format_error_of([&] { calm::get_integer(config, key, "config.json", 1, most); });
  };
  CHECK(integer_error("size", 100) == R"(config.json: "size": expected an integer from 1 to 100, found 576)");
  CHECK(integer_error("neg", 100) == R"(config.json: "neg": expected an integer from 1 to 100, found -1)");
  CHECK(has(integer_error("huge", std::numeric_limits<calm::Index>::max()), "found 9223372036854775808"));
  CHECK(integer_error("eps", 9) == R"(config.json: "eps": expected an integer, found a number with a fraction)");
  CHECK(integer_error("act", 9) == R"(config.json: "act": expected an integer, found a string)");
  CHECK(integer_error("missing", 9) == R"(config.json: the key "missing" is missing)");
  CHECK(integer_error("none", 9) == R"(config.json: the key "none" is missing)");
  CHECK(has(format_error_of([&] { calm::get_number(config, "act", "config.json"); }), "expected a number"));
  CHECK(has(format_error_of([&] { calm::get_boolean(config, "size", "config.json"); }), "expected true or false"));
  CHECK(has(format_error_of([&] { calm::get_string(config, "size", "config.json"); }), "expected a string"));
  CHECK(has(format_error_of([&] { calm::get_array(config, "sub", "config.json"); }), "expected an array"));
  CHECK(has(format_error_of([&] { calm::get_object(config, "list", "config.json"); }), "expected an object"));
  CHECK(has(format_error_of([&] { calm::get_integer(config["list"], "a", "config.json: list"); }), "found an array"));
}

TEST_CASE("a key that is absent or null has the fallback, one of another kind is an error") {
  const calm::Json config = calm::parse_json(R"({"a": 3, "none": null, "text": "x"})", "c");
  CHECK(calm::get_integer_or(config, "a", 9, "c") == 3);
  CHECK(calm::get_integer_or(config, "b", 9, "c") == 9);
  CHECK(calm::get_integer_or(config, "none", 9, "c") == 9);
  CHECK(calm::get_number_or(config, "none", 0.5, "c") == 0.5);
  CHECK(calm::get_boolean_or(config, "none", true, "c"));
  CHECK(calm::get_string_or(config, "none", "y", "c") == "y");
  CHECK_THROWS_AS(calm::get_integer_or(config, "text", 9, "c"), calm::FormatError);
}

TEST_CASE("a literal is valid JSON, and text that is not UTF-8 is refused") {
  CHECK(calm::json_literal("a\"\\\n") == R"("a\"\\\n")");
  CHECK_THROWS_AS(calm::json_literal("\xff"), calm::FormatError);
}

TEST_CASE("10,000 mutated texts give a value or a FormatError") {
  const std::string good = R"({"model_type": "llama", "rope": {"f": [1.5, -2e7, 3], "x\u00e9": null}, "tie": true})";
  calm::Random random(1);
  int valid = 0;
  for (int round = 0; round < 10000; ++round) {
    std::string text = good;
    for (calm::Index i = random.below(4); i >= 0; --i) {
      const auto place = static_cast<std::size_t>(random.below(static_cast<calm::Index>(text.size())));
      const calm::Index kind = random.below(3);
      if (kind == 0) text[place] = static_cast<char>(random.below(256));
      else if (kind == 1) text.erase(place, 1 + static_cast<std::size_t>(random.below(5)));
      else
        text.insert(place,
                    text.substr(static_cast<std::size_t>(random.below(static_cast<calm::Index>(text.size()))), 9));
    }
    try {
      calm::parse_json(text, "x");
      ++valid;
    } catch (const calm::FormatError&) {
    }
  }
  CHECK(valid > 100);
  CHECK(valid < 9000);
}

}  // namespace io_json_test
