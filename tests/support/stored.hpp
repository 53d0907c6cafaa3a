// Stored weights of every type, of random bytes.
#pragma once

#include <calm/core/random.hpp>
#include <calm/tensor/stored_matrix.hpp>

#include <cstddef>
#include <memory>
#include <vector>

namespace calm_test {
using calm::Index;

/// Random bytes with small finite scales, at an odd address: every other bit of every field is met, and also types that
/// calm cannot encode.
inline calm::StoredMatrix random_stored(calm::DType dtype, Index rows, Index cols, std::uint64_t seed) {
  const calm::StoredBlock block = calm::block_of(dtype);
  const Index bytes = rows * calm::bytes_of(dtype, cols);
  auto data = std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(bytes + 1));
  std::byte* first = data->data() + 1;
  calm::Random random(seed);
  for (Index i = 0; i < bytes; ++i) first[i] = static_cast<std::byte>(random.below(256));
  const bool at_end = block.values == 1 || dtype == calm::DType::q6_k;
  const bool has_minimum = dtype == calm::DType::q4_1 || dtype == calm::DType::q5_1 || dtype == calm::DType::q4_k ||
                           dtype == calm::DType::q5_k;
  for (Index i = 0; i < bytes; i += block.bytes) {  // keeps the highest bits of exponents clear
    first[i + (at_end ? block.bytes - 1 : 1)] &= std::byte{0xBB};
    if (has_minimum) first[i + 3] &= std::byte{0xBB};
  }
  return {data, first, dtype, rows, cols};
}

}  // namespace calm_test
