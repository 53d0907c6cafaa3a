// Stored weights of every type, of random bytes.
#pragma once

#include <calm/core/random.hpp>
#include <calm/tensor/stored_matrix.hpp>

#include <cstddef>
#include <cstring>
#include <memory>
#include <string_view>
#include <vector>

namespace calm_test {
using calm::Index;

/// Random bytes with small finite scales, at an odd address: every other bit of every field is met, and also types that
/// calm cannot encode. The scales of the last block, or all first bytes of it, are `last` where that is given.
inline calm::StoredMatrix random_stored(calm::DType dtype, Index rows, Index cols, std::uint64_t seed,
                                        std::string_view last = {}) {
  const calm::StoredBlock block = calm::block_of(dtype);
  const Index bytes = rows * calm::bytes_of(dtype, cols);
  auto data = std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(bytes + 1));
  std::byte* first = data->data() + 1;
  calm::Random random(seed);
  for (Index i = 0; i < bytes; ++i) first[i] = static_cast<std::byte>(random.below(256));
  const bool at_end = block.values == 1 || dtype == calm::DType::q6_k;
  const bool has_minimum = dtype == calm::DType::q4_1 || dtype == calm::DType::q5_1 || dtype == calm::DType::q4_k ||
                           dtype == calm::DType::q5_k;
  const auto mask = static_cast<std::byte>(!has_minimum         ? 0xBB
                                           : block.values == 32 ? 0x9B
                                                                : 0x8B);  // of high exponents
  for (Index i = 0; i < bytes; i += block.bytes) {
    first[i + (at_end ? block.bytes - 1 : 1)] &= mask;
    if (has_minimum) first[i + 3] &= mask;
  }
  const Index last_scales = at_end ? bytes - static_cast<Index>(last.size()) : bytes - block.bytes;
  if (!last.empty()) std::memcpy(first + last_scales, last.data(), last.size());
  return {data, first, dtype, rows, cols};
}

}  // namespace calm_test
