// TensorPlace: where a file keeps a weight that the library calls by its own name, which is the name in Llama's Hugging
// Face files: "model.layers.3.self_attn.q_proj.weight". Files of other families name it otherwise, join several in one
// tensor, or store it transposed.
#pragma once

#include <calm/core/text.hpp>
#include <calm/model/spec.hpp>

#include <optional>
#include <string_view>

namespace calm::inline CALM_ABI {

struct TensorPlace {
  std::string name;
  bool transposed = false;   // stored as [in, out]
  Index first = 0, all = 0;  // rows (values of a vector) [first, first + wanted) of `all`; all 0: the whole tensor
  Index part = -1;           // 0, 1, 2: the queries, keys, values of tensors that keep them for each head
  Index turned_heads = 0;    // rows of each of so many heads lie as pairs that turn together
  double plus = 0;           // added to every value
};

/// "model.layers.3.self_attn.q_proj.weight" as 3 and "self_attn.q_proj.weight".
struct BlockWeight {
  Index block;
  std::string_view rest;
};

inline std::optional<BlockWeight> block_weight(std::string_view name) {
  constexpr std::string_view prefix = "model.layers.";
  if (!name.starts_with(prefix)) return std::nullopt;
  name.remove_prefix(prefix.size());
  const std::size_t dot = name.find('.');
  return BlockWeight{std::stoll(std::string(name.substr(0, dot))), name.substr(dot + 1)};
}

/// "self_attn.q_proj.weight" as "self_attn.q_proj" and ".weight".
inline std::pair<std::string, std::string> split_kind(std::string_view rest) {
  const std::size_t dot = rest.rfind('.');
  return {std::string(rest.substr(0, dot)), std::string(rest.substr(dot))};
}

namespace places {

inline StoredMatrix with_rows(const StoredMatrix& m, Index rows, auto&& row_of) {
  const Index bytes = m.stored_bytes() / m.rows();
  auto copy = std::make_shared<Matrix<std::byte>>(rows, bytes);
  for (Index i = 0; i < rows; ++i)
    std::memcpy(&(*copy)(i, 0), m.data() + row_of(i) * bytes, static_cast<std::size_t>(bytes));
  const std::byte* data = copy->data();
  return {std::move(copy), data, m.dtype(), rows, m.cols()};
}

/// Columns [first, first + count) of values that are stored one by one, as a row each.
inline StoredMatrix as_column(const StoredMatrix& row) { return {row.owner(), row.data(), row.dtype(), row.cols(), 1}; }

inline StoredMatrix transposed(const StoredMatrix& m, const std::string& where) {
  require<FormatError>(block_of(m.dtype()).values == 1, where, ": a tensor of type ", name_of(m.dtype()),
                       " cannot be transposed");
  const Index bytes = bytes_of(m.dtype(), 1);
  auto copy = std::make_shared<Matrix<std::byte>>(m.cols(), m.rows() * bytes);
  for (Index i = 0; i < m.rows(); ++i)
    for (Index j = 0; j < m.cols(); ++j)
      std::memcpy(&(*copy)(j, i * bytes), m.data() + (i * m.cols() + j) * bytes, static_cast<std::size_t>(bytes));
  const std::byte* data = copy->data();
  return {std::move(copy), data, m.dtype(), m.cols(), m.rows()};
}

}  // namespace places

/// The weight [rows, cols] of a place in `files`, which offers matrix(name) and path(). Copies only what is moved.
template <class Files>
StoredMatrix fetch(const Files& files, const TensorPlace& place, HeadShape heads, Index rows, Index cols) {
  StoredMatrix m = files.matrix(place.name);
  const std::string where = message(files.path(), ": tensor ", in_quotes(place.name));
  if (place.transposed) m = places::transposed(m, where);
  const bool vector = rows == 1 && m.rows() == 1;
  const bool moves_values = vector && (place.all > 0 || place.part >= 0 || place.turned_heads > 0);
  if (moves_values) {
    require<FormatError>(block_of(m.dtype()).values == 1, where, ": a vector of type ", name_of(m.dtype()));
    m = places::as_column(m);
  }
  const Index wanted = moves_values ? cols : rows;
  const Index expected = place.all > 0 ? place.all : place.part >= 0 ? 3 * wanted : wanted;
  require<FormatError>(m.rows() == expected && m.cols() == (moves_values ? 1 : cols), where, " has the shape [",
                       m.rows(), ", ", m.cols(), "]; expected [", expected, ", ", moves_values ? 1 : cols, "]");
  if (place.part >= 0)
    m = places::with_rows(m, wanted, [&](Index i) {
      return i / heads.width * 3 * heads.width + place.part * heads.width + i % heads.width;
    });
  else if (place.all > 0) m = m.middle_rows(place.first, wanted);
  if (place.turned_heads > 0) {
    const Index width = wanted / place.turned_heads, half = width / 2;
    m = places::with_rows(m, wanted, [&](Index i) {  // value i of a half stands beside its partner
      const Index in_head = i % width;
      return i - in_head + in_head % half * 2 + in_head / half;
    });
  }
  if (moves_values) m = {m.owner(), m.data(), m.dtype(), 1, cols};
  if (place.plus != 0) {
    Matrix<float> values = m.template dense<float>();
    for (float& x : values.values()) x += static_cast<float>(place.plus);
    m = StoredMatrix::from(values);
  }
  return m;
}

}  // namespace calm::inline CALM_ABI
