#include <doctest/doctest.h>
#include <calm/tensor/arena.hpp>
#include <calm/tensor/buffer.hpp>
#include <calm/tensor/stored_matrix.hpp>
#include <support/values.hpp>

#include <atomic>
#include <bit>
#include <thread>

namespace tensor_test {
using namespace calm_test;
using calm::bf16;
using calm::DType;
using calm::f16;
using calm::StoredMatrix;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

std::uint32_t bits(float x) { return std::bit_cast<std::uint32_t>(x); }

/// What IEEE 754 says a half is worth, in double and without bit tricks.
double half_value(std::uint16_t pattern) {
  const int exponent = (pattern >> 10) & 31, fraction = pattern & 1023;
  const double sign = pattern >> 15 ? -1 : 1;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

}  // namespace

TEST_CASE("every bf16 keeps its bits on the way to f32 and back") {
  int wrong = 0, nans = 0;
  for (std::uint32_t pattern = 0; pattern < 65536; ++pattern) {
    const bf16 x{static_cast<std::uint16_t>(pattern)};
    const float value = to_float(x);
    if (bits(value) != pattern << 16) ++wrong;
    if (std::isnan(value)) {
      ++nans;
      if (!std::isnan(to_float(calm::to_bf16(value)))) ++wrong;
    } else if (calm::to_bf16(value).bits != pattern) {
      ++wrong;
    }
  }
  CHECK(wrong == 0);
  CHECK(nans == 2 * 127);
}

TEST_CASE("every f16 has its value and keeps its bits on the way to f32 and back") {
  int wrong = 0, nans = 0;
  for (std::uint32_t pattern = 0; pattern < 65536; ++pattern) {
    const f16 x{static_cast<std::uint16_t>(pattern)};
    const float value = to_float(x);
    if (((pattern >> 10) & 31) == 31) {
      if ((pattern & 1023) == 0) {
        if (value != (pattern >> 15 ? -infinity : infinity) || calm::to_f16(value).bits != pattern) ++wrong;
      } else {
        ++nans;
        if (!std::isnan(value) || !std::isnan(to_float(calm::to_f16(value)))) ++wrong;
      }
    } else if (static_cast<double>(value) != half_value(x.bits) || calm::to_f16(value).bits != pattern ||
               std::signbit(value) != (pattern >> 15 != 0)) {
      ++wrong;
    }
  }
  CHECK(wrong == 0);
  CHECK(nans == 2 * 1023);
}

TEST_CASE("between two neighbours f16 rounds to the nearest, and halfway to the even one") {
  int wrong = 0;
  for (std::uint16_t low = 0; low < 0x7BFF; ++low) {  // all finite non-negative numbers but the largest
    const auto high = static_cast<std::uint16_t>(low + 1);
    const auto middle = static_cast<float>((half_value(low) + half_value(high)) / 2);
    const unsigned even = low % 2 == 0 ? low : high;
    for (const unsigned sign : {0U, 0x8000U}) {
      const float s = sign ? -1.0F : 1.0F;
      if (calm::to_f16(s * middle).bits != (sign | even)) ++wrong;
      if (calm::to_f16(s * std::nextafter(middle, 0.0F)).bits != (sign | low)) ++wrong;
      if (calm::to_f16(s * std::nextafter(middle, infinity)).bits != (sign | high)) ++wrong;
    }
  }
  CHECK(wrong == 0);
  CHECK(calm::to_f16(65504.0F).bits == 0x7BFF);
  CHECK(calm::to_f16(65519.99F).bits == 0x7BFF);
  CHECK(calm::to_f16(65520.0F).bits == 0x7C00);
  CHECK(calm::to_f16(-1e30F).bits == 0xFC00);
  CHECK(calm::to_f16(0x1p-25F).bits == 0);  // halfway between nothing and the smallest number
  CHECK(calm::to_f16(std::nextafter(0x1p-25F, 1.0F)).bits == 1);
  CHECK(calm::to_f16(std::numeric_limits<float>::denorm_min()).bits == 0);
}

TEST_CASE("between two neighbours bf16 rounds to the nearest, and halfway to the even one") {
  int wrong = 0;
  for (std::uint32_t low = 0; low < 0x7F80; ++low) {  // all finite non-negative numbers; above the largest is infinity
    const std::uint32_t even = low % 2 == 0 ? low : low + 1, middle = (low << 16) | 0x8000;
    for (const std::uint32_t sign : {0U, 0x8000U}) {
      const auto rounded = [&](std::uint32_t pattern) {
        return calm::to_bf16(std::bit_cast<float>(pattern | sign << 16)).bits;
      };
      if (rounded(middle) != (sign | even)) ++wrong;
      if (rounded(middle - 1) != (sign | low)) ++wrong;
      if (rounded(middle + 1) != (sign | (low + 1))) ++wrong;
    }
  }
  CHECK(wrong == 0);
  CHECK(calm::to_bf16(std::numeric_limits<float>::max()).bits == 0x7F80);
  for (const std::uint32_t nan : {0x7F800001U, 0xFFFFFFFFU, 0x7FC00000U})
    CHECK(std::isnan(to_float(calm::to_bf16(std::bit_cast<float>(nan)))));
}

TEST_CASE("storage types know their names and sizes") {
  CHECK(calm::bytes_of(DType::f64, 1) == 8);
  CHECK(calm::bytes_of(DType::f32, 3) == 12);
  CHECK(calm::bytes_of(DType::bf16, 1) == 2);
  CHECK(calm::bytes_of(DType::f16, 1) == 2);
  CHECK(calm::name_of(DType::bf16) == "bf16");
  CHECK(calm::dtype_of<float> == DType::f32);
  CHECK(calm::dtype_of<double> == DType::f64);
  CHECK(calm::dtype_of<bf16> == DType::bf16);
  CHECK(calm::dtype_of<f16> == DType::f16);
}

TEST_CASE("values that are encoded are decoded to what their type can hold, from any address") {
  const double values[] = {1, -2.5, 1.0 / 3, 65504, 0};
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    std::byte bytes[5 * 8 + 1];
    calm::encode(dtype, values, 5, bytes + 1);
    double found[5];
    float narrow[5];
    calm::decode(dtype, bytes + 1, 5, found);
    calm::decode(dtype, bytes + 1, 5, narrow);
    for (int i = 0; i < 5; ++i) {
      const auto as_float = static_cast<float>(values[i]);
      const double expected = dtype == DType::f64   ? values[i]
                              : dtype == DType::f32 ? static_cast<double>(as_float)
                              : dtype == DType::f16 ? static_cast<double>(to_float(calm::to_f16(as_float)))
                                                    : static_cast<double>(to_float(calm::to_bf16(as_float)));
      CHECK(found[i] == expected);
      CHECK(narrow[i] == static_cast<float>(expected));
    }
  }
}

TEST_CASE("a matrix begins as zeros, is copied deeply and leaves nothing behind when moved") {
  Matrix<float> a(3, 4);
  for (const float x : a.values()) CHECK(x == 0);
  CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % 64 == 0);
  a(2, 3) = 5;
  Matrix<float> b = a;
  b(2, 3) = 6;
  CHECK(a(2, 3) == 5);
  const float* data = b.data();
  Matrix<float> c = std::move(b);
  CHECK(c.data() == data);
  CHECK(b.size() == 0);  // NOLINT(bugprone-use-after-move): this is the promise
  b = c;
  CHECK(b(2, 3) == 6);
  Matrix<float>& self = c;
  c = self;
  CHECK(c(2, 3) == 6);
  CHECK(Matrix<float>(0, 5).empty());
  CHECK(Matrix<float>(Matrix<float>(0, 5)).cols() == 5);
  volatile Index negative = -1;  // unknown to the compiler, which would warn
  CHECK_THROWS_AS(Matrix<float>(negative, 2), calm::ShapeError);
}

TEST_CASE("views take rows and columns apart, and flat refuses rows that lie apart") {
  Matrix<int> m(4, 5);
  for (int i = 0; i < 20; ++i) m.data()[i] = i;
  const auto part = m.view().middle_rows(1, 2).middle_cols(2, 3);
  CHECK(part.rows == 2);
  CHECK(part(0, 0) == 7);
  CHECK(part(1, 2) == 14);
  CHECK(*part.row(1) == 12);
  CHECK_THROWS_AS(calm::flat(part), calm::ShapeError);
  CHECK(calm::flat(m.view().middle_rows(1, 2)).size() == 10);
  CHECK(calm::flat(m.view().middle_rows(1, 1).middle_cols(1, 2)).size() == 2);
  CHECK(MatrixView<int>().empty());
}

TEST_CASE("an arena hands out aligned memory that does not overlap") {
  calm::Arena<> arena;
  std::vector<std::pair<std::byte*, Index>> taken;
  for (Index i = 0; i < 200; ++i) {
    const Index size = 1 + i * 37 % 5000;
    auto* p = arena.allocate<std::byte>(size);
    CHECK(reinterpret_cast<std::uintptr_t>(p) % 64 == 0);
    std::fill_n(p, size, static_cast<std::byte>(i));
    taken.emplace_back(p, size);
  }
  for (std::size_t i = 0; i < taken.size(); ++i)
    CHECK(std::all_of(taken[i].first, taken[i].first + taken[i].second,
                      [&](std::byte b) { return b == static_cast<std::byte>(i); }));
}

namespace {

/// Host memory that counts what it is asked for.
struct CountedMemory {
  static inline int pieces = 0, alive = 0;
  static std::byte* allocate(std::size_t bytes) {
    ++pieces, ++alive;
    return calm::HostMemory::allocate(bytes);
  }
  static void release(std::byte* p) {
    --alive;
    calm::HostMemory::release(p);
  }
};

}  // namespace

TEST_CASE("an arena asks for several pieces once, joins them at its reset, and then for nothing more") {
  CountedMemory::pieces = 0;
  {
    calm::Arena<CountedMemory> arena;
    const auto pass = [&] {
      arena.reset();
      for (int i = 0; i < 10; ++i) arena.allocate<double>(100000);
    };
    pass();
    CHECK(CountedMemory::pieces > 1);
    CHECK(arena.peak() >= 10 * 800000);
    pass();
    const int pieces = CountedMemory::pieces;
    CHECK(CountedMemory::alive == 1);
    for (int i = 0; i < 10; ++i) pass();
    CHECK(CountedMemory::pieces == pieces);
    CHECK(arena.capacity() >= arena.peak());
  }
  CHECK(CountedMemory::alive == 0);
}

TEST_CASE("an arena that was made large enough asks once") {
  CountedMemory::pieces = 0;
  calm::Arena<CountedMemory> arena(1 << 20);
  for (int pass = 0; pass < 3; ++pass) {
    arena.reset();
    arena.allocate<std::byte>(1 << 19);
    arena.allocate<std::byte>(1 << 19);
  }
  CHECK(CountedMemory::pieces == 1);
}

TEST_CASE("a mark takes back what was allocated after it and keeps what was before, within marks and over pieces") {
  calm::Arena<> arena;
  double* kept = arena.allocate<double>(3);
  kept[0] = 1.5;
  double* first = nullptr;
  {
    const calm::Arena<>::Mark outer(arena);
    first = arena.allocate<double>(100);
    double* inner_first = nullptr;
    {
      const calm::Arena<>::Mark inner(arena);
      inner_first = arena.allocate<double>(50);
      arena.allocate<double>(1 << 20);  // a piece of its own
      arena.allocate<double>(1 << 22);
    }
    CHECK(arena.allocate<double>(50) == inner_first);
  }
  CHECK(arena.allocate<double>(100) == first);
  CHECK(kept[0] == 1.5);
  std::size_t capacity = 0;
  for (int i = 0; i < 5; ++i) {
    const calm::Arena<>::Mark mark(arena);
    arena.allocate<double>(1 << 22);
    arena.allocate<double>(1 << 20);
    if (i == 0) capacity = arena.capacity();
    CHECK(arena.capacity() == capacity);
  }
}

TEST_CASE("a mark on an arena without memory is allowed") {
  calm::Arena<> arena;
  {
    const calm::Arena<>::Mark mark(arena);
    arena.allocate<int>(5);
  }
  CHECK(arena.allocate<int>(5) != nullptr);
  CHECK(arena.matrix<float>(3, 4).stride == 4);
  CHECK(arena.vector<Index>(7).size() == 7);
}

TEST_CASE("a buffer keeps its memory when it shrinks and grows back") {
  calm::Buffer<float> buffer;
  CHECK(buffer.view().empty());
  float* data = buffer.resize(10, 8).data;
  CHECK(buffer.bytes() == 320);
  CHECK(buffer.resize(2, 3).data == data);
  CHECK(buffer.view().rows == 2);
  CHECK(std::as_const(buffer).view().cols == 3);
  CHECK(buffer.resize(20, 4).data == data);
  buffer.resize(100, 8);
  CHECK(buffer.bytes() == 3200);
}

TEST_CASE("a stored matrix gives its values back, rounded to its type") {
  const Matrix<double> m = random_matrix<double>(7, 5, 1);
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const StoredMatrix stored = StoredMatrix::from(m, dtype);
    CHECK(stored.rows() == 7);
    CHECK(stored.cols() == 5);
    CHECK(stored.dtype() == dtype);
    CHECK(stored.stored_bytes() == calm::bytes_of(dtype, 35));
    const double step = dtype == DType::f64 ? 0 : dtype == DType::f32 ? 1e-7 : dtype == DType::f16 ? 1e-3 : 8e-3;
    CHECK(relative_difference(stored.dense<double>(), m) <= step);
    double row[5];
    stored.read_rows(3, 1, row);
    for (Index j = 0; j < 5; ++j) CHECK(row[j] == stored.dense<double>()(3, j));
  }
  CHECK(StoredMatrix().empty());
  CHECK(StoredMatrix().packed_bytes() == 0);
}

TEST_CASE("a stored matrix is read in place where type and address allow it") {
  const StoredMatrix stored = StoredMatrix::from(random_matrix<float>(3, 4, 1));
  CHECK(reinterpret_cast<const std::byte*>(stored.in_place<float>()) == stored.data());
  CHECK(stored.in_place<double>() == nullptr);
  CHECK(StoredMatrix::from(random_matrix<float>(3, 4, 1), DType::bf16).in_place<float>() == nullptr);
  const auto bytes = std::make_shared<std::vector<std::byte>>(64);
  const std::byte* odd = bytes->data() + 1;
  CHECK(StoredMatrix(bytes, odd, DType::f32, 2, 2).in_place<float>() == nullptr);
  CHECK(StoredMatrix(bytes, odd, DType::f32, 2, 2).dense<float>()(1, 1) == 0);
}

TEST_CASE("a stored matrix keeps the memory that it views alive") {
  auto bytes = std::make_shared<Matrix<float>>(2, 2);
  const std::weak_ptr<Matrix<float>> watch = bytes;
  {
    const StoredMatrix stored(bytes, reinterpret_cast<const std::byte*>(bytes->data()), DType::f32, 2, 2);
    const StoredMatrix copy = stored;  // NOLINT(performance-unnecessary-copy-initialization)
    bytes.reset();
    CHECK(!watch.expired());
    CHECK(copy.dense<float>()(1, 1) == 0);
  }
  CHECK(watch.expired());
}

TEST_CASE(
    "a packed form is made once for each kind, shared by copies, counted, and safe to ask for from many threads") {
  struct First {
    int number;
    std::size_t bytes() const { return 100; }
  };
  struct Second {
    std::size_t bytes() const { return 7; }
  };
  const StoredMatrix stored = StoredMatrix::from(random_matrix<float>(3, 4, 1)), copy = stored,
                     other = StoredMatrix::from(random_matrix<float>(3, 4, 1));
  std::atomic<int> made{0};
  std::vector<const First*> found(8);
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < found.size(); ++i)
    threads.emplace_back([&, i] {
      found[i] = &(i % 2 ? stored : copy).packed<First>([&] {
        ++made;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        return First{42};
      });
    });
  for (auto& thread : threads) thread.join();
  CHECK(made == 1);
  for (const First* form : found) CHECK(form == found[0]);
  CHECK(found[0]->number == 42);
  CHECK(stored.packed_bytes() == 100);
  copy.packed<Second>([] { return Second{}; });
  CHECK(stored.packed_bytes() == 107);
  CHECK(&stored.packed<First>([]() -> First { throw calm::Error("made again"); }) == found[0]);
  CHECK(other.packed_bytes() == 0);
}

TEST_CASE("a packed form that could not be made is made at the next call") {
  struct Form {
    std::size_t bytes() const { return 1; }
  };
  const StoredMatrix stored = StoredMatrix::from(random_matrix<float>(1, 1, 1));
  CHECK_THROWS_AS(stored.packed<Form>([]() -> Form { throw calm::Error("no memory"); }), calm::Error);
  CHECK(stored.packed_bytes() == 0);
  stored.packed<Form>([] { return Form{}; });
  CHECK(stored.packed_bytes() == 1);
}

}  // namespace tensor_test
