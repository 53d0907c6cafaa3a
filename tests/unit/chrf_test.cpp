#include <doctest/doctest.h>
#include <calm/evaluate/chrf.hpp>

namespace chrf_test {

namespace {
double chrf(const char* text, const char* reference) {
  calm::Chrf score;
  score.add(text, reference);
  return score.score();
}
}  // namespace

// The expected values are sacrebleu's (2.5, CHRF() with its defaults).
TEST_CASE("chrF agrees with sacrebleu") {
  CHECK(chrf("the cat sat on the mat", "the cat sat on the mat") == doctest::Approx(100));
  CHECK(chrf("abc", "xyz") == 0);
  CHECK(chrf("", "xyz") == 0);
  CHECK(chrf("the cat is here", "the cat sat on the mat") == doctest::Approx(28.953206340).epsilon(1e-6));
  CHECK(chrf("größe né", "grösse né 日本") == doctest::Approx(23.084468772).epsilon(1e-6));
  calm::Chrf corpus;
  corpus.add("the cat is here", "the cat sat on the mat");
  corpus.add("a dog", "a big dog");
  CHECK(corpus.score() == doctest::Approx(27.453774520).epsilon(1e-6));
}

}  // namespace chrf_test
