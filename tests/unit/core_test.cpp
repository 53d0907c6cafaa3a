#include <doctest/doctest.h>
#include <calm/core/arithmetic.hpp>
#include <calm/core/error.hpp>
#include <calm/core/parallel.hpp>
#include <calm/core/random.hpp>
#include <support/values.hpp>

#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <thread>

namespace core_test {
using namespace calm_test;
using calm::Random;
using calm::ThreadPool;

TEST_CASE("Philox4x32-10 gives the known answers of Random123") {
  using Block = std::array<std::uint32_t, 4>;
  CHECK(calm::philox4x32({0, 0, 0, 0}, {0, 0}) == Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(calm::philox4x32({~0U, ~0U, ~0U, ~0U}, {~0U, ~0U}) == Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(calm::philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
  static_assert(calm::philox4x32({0, 0, 0, 0}, {0, 0})[0] == 0x6627e8d5);
}

TEST_CASE("Random hands out the blocks of Philox in order: counter, stream, seed") {
  Random random(0x1122334455667788, 0x99aabbccddeeff00);
  for (std::uint32_t counter = 0; counter < 3; ++counter)
    for (const std::uint32_t expected :
         calm::philox4x32({counter, 0, 0xddeeff00, 0x99aabbcc}, {0x55667788, 0x11223344}))
      CHECK(random() == expected);
  static_assert(std::uniform_random_bit_generator<Random>);
}

TEST_CASE("seeds and streams are worlds apart") {
  std::set<std::uint32_t> first;
  for (std::uint64_t seed = 0; seed < 40; ++seed)
    for (std::uint64_t stream = 0; stream < 40; ++stream) first.insert(Random(seed, stream)());
  CHECK(first.size() == 1600);
  Random a(5, 6), b(5, 6);
  for (int i = 0; i < 100; ++i) CHECK(a() == b());
}

TEST_CASE("uniform numbers are even over [0, 1) and the same in float and double") {
  Random random(1);
  const int n = 100000;
  std::array<int, 10> bins{};
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    const double x = random.uniform();
    REQUIRE((x >= 0 && x < 1));
    REQUIRE(static_cast<double>(static_cast<float>(x)) == x);
    ++bins[static_cast<std::size_t>(x * 10)];
    sum += x;
  }
  for (const int count : bins) CHECK(std::abs(count - n / 10) < 5 * 95);  // five deviations
  CHECK(std::abs(sum / n - 0.5) < 5 * 0.2887 / std::sqrt(n));
}

TEST_CASE("normal numbers have mean 0, deviation 1 and the tails of a normal") {
  Random random(2);
  const int n = 100000;
  double sum = 0, squares = 0;
  int beyond_two = 0;
  for (int i = 0; i < n; ++i) {
    const double x = random.normal();
    REQUIRE(std::isfinite(x));
    sum += x;
    squares += x * x;
    beyond_two += std::abs(x) > 2 ? 1 : 0;
  }
  CHECK(std::abs(sum / n) < 0.016);
  CHECK(std::abs(squares / n - 1) < 0.023);
  CHECK(std::abs(beyond_two / static_cast<double>(n) - 0.0455) < 0.0033);
}

TEST_CASE("below(n) reaches every number below n, evenly, and no other") {
  Random random(3);
  std::array<int, 7> bins{};
  for (int i = 0; i < 70000; ++i) {
    const Index x = random.below(7);
    REQUIRE((x >= 0 && x < 7));
    ++bins[static_cast<std::size_t>(x)];
  }
  for (const int count : bins) CHECK(std::abs(count - 10000) < 5 * 93);
  for (int i = 0; i < 100; ++i) CHECK(random.below(1) == 0);
}

TEST_CASE("the pool runs every tile once, on threads that it names, for any number of threads") {
  for (const int threads : {1, 2, 3, 4, 7}) {
    ThreadPool pool(threads);
    CHECK(pool.size() == threads);
    for (const Index count : {0, 1, 2, 3, 17, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(count));
      std::vector<std::atomic<int>> inside(static_cast<std::size_t>(threads));
      std::atomic<bool> named{true}, alone{true};
      pool.for_each_tile(count, [&](Index i, int thread) {
        if (thread < 0 || thread >= threads) named = false;
        else if (++inside[static_cast<std::size_t>(thread)] != 1) alone = false;
        ++runs[static_cast<std::size_t>(i)];
        if (thread >= 0 && thread < threads) --inside[static_cast<std::size_t>(thread)];
      });
      for (const auto& run : runs) CHECK(run == 1);
      CHECK(named);
      CHECK(alone);  // no two tiles at once under one name
    }
  }
}

TEST_CASE("ranges are all that is to be done, once, the largest first and none too small") {
  for (const int threads : {1, 2, 4, 64}) {
    ThreadPool pool(threads);
    for (const Index count : {0, 1, 2, 3, 17, 1000, 1000000})
      for (const Index least : {1, 2, 5}) {
        CAPTURE(threads);
        CAPTURE(count);
        std::mutex mutex;
        std::map<Index, Index> ranges;
        pool.for_each_range(count, least, [&](Index begin, Index end, int) {
          const std::lock_guard lock(mutex);
          CHECK(ranges.emplace(begin, end).second);
        });
        Index reached = 0, before = count;
        for (const auto& [begin, end] : ranges) {
          CHECK(begin == reached);
          CHECK(end > begin);
          CHECK(end - begin <= std::max(before, least));
          CHECK((end - begin >= least || end == count));
          before = end - begin;
          reached = end;
        }
        CHECK(reached == count);
        if (count >= 1000) CHECK(static_cast<int>(ranges.size()) >= std::min(threads, 60));
      }
  }
}

TEST_CASE("the pool has a thread for each core unless told otherwise, and at least one") {
  CHECK(ThreadPool().size() >= 1);
}

TEST_CASE("the pool works on several threads at once") {
  ThreadPool pool(3);
  // Every tile waits for the two others: with fewer threads this would not end.
  std::atomic<int> arrived{0};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  pool.for_each_tile(3, [&](Index, int) {
    ++arrived;
    while (arrived < 3 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  });
  CHECK(arrived == 3);
  CHECK(std::chrono::steady_clock::now() < deadline);
}

TEST_CASE("the pool can be used thousands of times, with pauses and without, and what tiles wrote is seen after") {
  for (const int threads : {2, 4}) {
    ThreadPool pool(threads);
    std::vector<Index> values(64);
    for (Index round = 0; round < 5000; ++round) {
      const Index count = 1 + round % 64;
      pool.for_each_tile(count, [&](Index i, int) { values[static_cast<std::size_t>(i)] = round + i; });  // not atomic
      bool correct = true;
      for (Index i = 0; i < count; ++i) correct = correct && values[static_cast<std::size_t>(i)] == round + i;
      REQUIRE(correct);
      if (round % 1000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the threads go to sleep
    }
  }
}

TEST_CASE("pools come and go") {
  for (int i = 0; i < 300; ++i) {
    ThreadPool pool(1 + i % 4);
    std::atomic<Index> sum{0};
    if (i % 3 != 0) pool.for_each_tile(10, [&](Index tile, int) { sum += tile; });
    CHECK(sum == (i % 3 != 0 ? 45 : 0));
  }
}

TEST_CASE("an exception of a tile is rethrown to the caller, and the pool goes on working") {
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 200; ++round) {
      std::string found;
      try {
        pool.for_each_tile(50, [&](Index i, int) { calm::require<calm::NumericError>(i % 10 != 7, "tile ", i); });
      } catch (const calm::NumericError& error) {
        found = error.what();
      }
      CHECK(found.substr(0, 5) == "tile ");
      std::atomic<int> runs{0};
      pool.for_each_tile(50, [&](Index, int) { ++runs; });
      CHECK(runs == 50);
    }
  }
}

TEST_CASE("sizes that do not fit are refused and named") {
  constexpr Index largest = std::numeric_limits<Index>::max();
  CHECK(calm::checked_multiply(3, 5, "x") == 15);
  CHECK(calm::checked_multiply(largest, 1, "x") == largest);
  CHECK(calm::checked_multiply(largest, 0, "x") == 0);
  CHECK(calm::checked_multiply(0, largest, "x") == 0);
  CHECK(calm::checked_multiply(largest / 2, 2, "x") == largest - 1);
  CHECK(calm::checked_add(largest - 1, 1, "x") == largest);
  CHECK_THROWS_AS(calm::checked_multiply(largest / 2 + 1, 2, "x"), calm::FormatError);
  CHECK_THROWS_AS(calm::checked_multiply(Index{1} << 32, Index{1} << 31, "x"), calm::FormatError);
  CHECK_THROWS_AS(calm::checked_multiply(-1, 2, "x"), calm::FormatError);
  CHECK_THROWS_AS(calm::checked_multiply(2, -1, "x"), calm::FormatError);
  CHECK_THROWS_AS(calm::checked_add(largest, 1, "x"), calm::FormatError);
  CHECK_THROWS_AS(calm::checked_add(-1, 1, "x"), calm::FormatError);
  CHECK_THROWS_AS(calm::checked_add(1, -1, "x"), calm::FormatError);
  CHECK(contains(
      message_of<calm::FormatError>([] { calm::checked_multiply(largest, 2, "the tensor w of f.safetensors"); }),
      "the tensor w of f.safetensors"));
  CHECK(calm::ceil_divide(0, 4) == 0);
  CHECK(calm::ceil_divide(8, 4) == 2);
  CHECK(calm::ceil_divide(9, 4) == 3);
}

TEST_CASE("every error is a calm::Error and keeps its message") {
  CHECK(message_of<calm::Error>([] { calm::require<calm::ShapeError>(false, "a ", 1, " b ", 2.5); }) == "a 1 b 2.5");
  CHECK_NOTHROW(calm::require<calm::IoError>(true, "no"));
  static_assert(
      std::is_base_of_v<calm::Error, calm::ConfigError> && std::is_base_of_v<calm::Error, calm::IoError> &&
      std::is_base_of_v<calm::Error, calm::FormatError> && std::is_base_of_v<calm::Error, calm::NumericError> &&
      std::is_base_of_v<calm::Error, calm::ContextLimitError> && std::is_base_of_v<std::runtime_error, calm::Error>);
}

}  // namespace core_test
