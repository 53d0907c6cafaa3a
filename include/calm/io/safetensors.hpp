// safetensors: named tensors in one file (https://github.com/huggingface/safetensors, README "Format").
//
//   8 bytes     N, the length of the header, little endian
//   N bytes     JSON: {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [BEGIN, END]}, ...,
//               "__metadata__": {"KEY": "VALUE"}}; begins with '{', may end in spaces
//   the rest    the values, row-major, little endian; offsets count from here and leave no gap and no byte over
//
// SafetensorsFile maps a file and hands out its tensors in place; SafetensorsWriter writes one.
// Not here: models in several files (model.safetensors.index.json).
#pragma once

#include <calm/core/arithmetic.hpp>
#include <calm/core/text.hpp>
#include <calm/io/atomic_file.hpp>
#include <calm/io/file_map.hpp>
#include <calm/io/json.hpp>
#include <calm/tensor/stored_matrix.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace calm::inline CALM_ABI {

static_assert(std::endian::native == std::endian::little, "safetensors are read in place: a little-endian machine");

/// What the header of a file says about one tensor.
struct SafetensorsEntry {
  std::string name;
  std::string dtype;  // as written: "F32", "I64", ...
  std::vector<Index> shape;
  Index offset = 0;  // from the beginning of the file
  Index bytes = 0;
};

/// "F32" and so on, in both directions.
constexpr std::string_view safetensors_name_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return "F64";
    case DType::f32: return "F32";
    case DType::bf16: return "BF16";
    case DType::f16: return "F16";
    default: return "";
  }
}

constexpr std::optional<DType> dtype_of_safetensors_name(std::string_view name) {
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16})
    if (safetensors_name_of(dtype) == name) return dtype;
  return {};
}

class SafetensorsFile {
 public:
  /// Reads the header. Throws IoError, or FormatError with the place and the reason.
  explicit SafetensorsFile(const std::filesystem::path& path) : SafetensorsFile(FileMap::open(path)) {}

  explicit SafetensorsFile(std::shared_ptr<const FileMap> file) : file_(std::move(file)) {
    const Index length = header_length();
    read_header(file_->text().substr(8, static_cast<std::size_t>(length)), 8 + length);
    check_layout(8 + length);
    by_name_.resize(entries_.size());
    for (std::size_t i = 0; i < by_name_.size(); ++i) by_name_[i] = i;
    std::sort(by_name_.begin(), by_name_.end(),
              [&](std::size_t a, std::size_t b) { return entries_[a].name < entries_[b].name; });
  }

  const std::string& path() const { return file_->path(); }
  const std::shared_ptr<const FileMap>& file() const { return file_; }

  /// All tensors, in the order of their values in the file; also of dtypes that calm cannot read.
  const std::vector<SafetensorsEntry>& tensors() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  bool contains(std::string_view name) const { return find(name) != nullptr; }

  const SafetensorsEntry& entry(std::string_view name) const {
    const SafetensorsEntry* found = find(name);
    require<FormatError>(found != nullptr, path(), ": has no tensor ", in_quotes(name), " among its ", entries_.size());
    return *found;
  }

  /// A tensor in place: [r, c] as r x c, [n] as 1 x n, [] as 1 x 1. The map lives as long as the result.
  StoredMatrix matrix(std::string_view name) const {
    const SafetensorsEntry& tensor = entry(name);
    const std::size_t rank = tensor.shape.size();
    require<FormatError>(rank <= 2, path(), ": tensor ", in_quotes(name), " has the shape ", shape_text(tensor.shape),
                         "; a matrix or vector was expected");
    return stored(tensor, rank < 2 ? 1 : tensor.shape[0], rank == 0 ? 1 : tensor.shape[rank - 1]);
  }

  /// The same, and the shape must be [rows, cols]; [cols] counts as [1, cols], [] as [1, 1].
  StoredMatrix matrix(std::string_view name, Index rows, Index cols) const {
    const SafetensorsEntry& tensor = entry(name);
    const std::size_t rank = tensor.shape.size();
    const bool fits = rank == 2   ? tensor.shape[0] == rows && tensor.shape[1] == cols
                      : rank == 1 ? rows == 1 && tensor.shape[0] == cols
                                  : rank == 0 && rows == 1 && cols == 1;
    require<FormatError>(fits, path(), ": tensor ", in_quotes(name), " has the shape ", shape_text(tensor.shape),
                         "; expected ", rows == 1 ? message("[", cols, "]") : message("[", rows, ", ", cols, "]"));
    return stored(tensor, rows, cols);
  }

 private:
  static constexpr Index longest_header = 100'000'000;  // as in the reference implementation

  Index header_length() const {
    const Index size = file_->size();
    require<FormatError>(!file_->text().starts_with("version https://git-lfs"), path(),
                         ": is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`");
    require<FormatError>(size >= 8, path(), ": byte 0: the length of the header takes 8 bytes, the file has ", size);
    std::uint64_t length = 0;
    std::memcpy(&length, file_->data(), 8);
    require<FormatError>(length <= static_cast<std::uint64_t>(size - 8), path(), ": byte 0: a header of ", length,
                         " bytes in a file of ", size, "; it was cut off, or is no safetensors file");
    require<FormatError>(length <= static_cast<std::uint64_t>(longest_header), path(), ": byte 0: a header of ", length,
                         " bytes; more than ", longest_header, " are not read");
    return static_cast<Index>(length);
  }

  void read_header(std::string_view text, Index data_begin) {
    require<FormatError>(text.starts_with('{'), path(), ": byte 8: the header does not begin with '{'");
    JsonLimits limits;
    limits.depth = 4;
    limits.memory_bytes = file_->size() + (Index{32} << 20);  // the other half is for the entries made from it
    const std::string where = path() + ": header";
    const Json header = parse_json(text, where, limits);
    require<FormatError>(header.is_object(), where, ": expected an object, found ", kind_of(header));
    entries_.reserve(header.size());
    for (const auto& [name, value] : header.items()) {
      if (name == "__metadata__") read_metadata(value, where);
      else entries_.push_back(read_entry(name, value, data_begin));
    }
  }

  void read_metadata(const Json& object, const std::string& where) {
    require<FormatError>(object.is_object(), where, ": \"__metadata__\": expected an object, found ", kind_of(object));
    for (const auto& [key, value] : object.items()) {
      require<FormatError>(value.is_string(), where, ": \"__metadata__\": ", in_quotes(key),
                           ": expected a string, found ", kind_of(value));
      metadata_.emplace(key, value.get_ref<const std::string&>());
    }
  }

  SafetensorsEntry read_entry(const std::string& name, const Json& value, Index data_begin) const {
    const std::string where = message(path(), ": tensor ", in_quotes(name));
    SafetensorsEntry result{name, get_string(value, "dtype", where), {}, 0, 0};
    const Index bits = bits_of(result.dtype);
    require<FormatError>(bits > 0, where, ": unknown dtype ", in_quotes(result.dtype));
    const Json& shape = get_array(value, "shape", where);
    require<FormatError>(shape.size() <= 32, where, ": ", shape.size(), " dimensions; at most 32 are read");
    Index values = 1;
    for (const Json& dimension : shape) {
      result.shape.push_back(to_integer(dimension, where + ": shape"));
      values = checked_multiply(values, result.shape.back(), where);
    }
    const Index all_bits = checked_multiply(values, bits, where);
    require<FormatError>(all_bits % 8 == 0, where, ": ", values, " values of ", bits, " bits do not end with a byte");
    result.bytes = all_bits / 8;

    const Json& offsets = get_array(value, "data_offsets", where);
    require<FormatError>(offsets.size() == 2, where, ": data_offsets: expected [begin, end], found ", offsets.size(),
                         " values");
    const Index data_size = file_->size() - data_begin;
    const Index begin = to_integer(offsets[0], where + ": data_offsets");
    const Index end = to_integer(offsets[1], where + ": data_offsets");
    require<FormatError>(begin <= end && end <= data_size, where, ": data_offsets [", begin, ", ", end,
                         "] do not lie in the ", data_size, " bytes of values that the file has");
    require<FormatError>(end - begin == result.bytes, where, ": data_offsets [", begin, ", ", end, "] hold ",
                         end - begin, " bytes; ", result.dtype, ' ', shape_text(result.shape), " takes ", result.bytes);
    result.offset = data_begin + begin;
    return result;
  }

  /// Sorts the tensors by place and checks that they cover the values without gap and overlap.
  void check_layout(Index data_begin) {
    std::sort(entries_.begin(), entries_.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
      return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
    });
    Index position = data_begin;
    for (const SafetensorsEntry& tensor : entries_) {
      require<FormatError>(tensor.offset == position, path(), ": tensor ", in_quotes(tensor.name), ": begins at byte ",
                           tensor.offset, " of the file, ", tensor.offset < position ? "inside" : "with a gap after",
                           " the values before it, which end at byte ", position);
      position += tensor.bytes;
    }
    require<FormatError>(position == file_->size(), path(), ": byte ", position, ": ", file_->size() - position,
                         " bytes after the last tensor belong to none");
  }

  /// 0 for an unknown dtype.
  static Index bits_of(std::string_view dtype) {
    constexpr std::array<std::pair<std::string_view, Index>, 20> known{{
        {"F64", 64},    {"F32", 32},    {"BF16", 16}, {"F16", 16}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8},
        {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4},    {"I64", 64}, {"I32", 32},    {"I16", 16},    {"I8", 8},
        {"U64", 64},    {"U32", 32},    {"U16", 16},  {"U8", 8},   {"BOOL", 8},    {"C64", 64},
    }};
    for (const auto& [name, bits] : known)
      if (name == dtype) return bits;
    return 0;
  }

  const SafetensorsEntry* find(std::string_view name) const {
    const auto place = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                        [&](std::size_t i, std::string_view n) { return entries_[i].name < n; });
    return place != by_name_.end() && entries_[*place].name == name ? &entries_[*place] : nullptr;
  }

  StoredMatrix stored(const SafetensorsEntry& tensor, Index rows, Index cols) const {
    const std::optional<DType> dtype = dtype_of_safetensors_name(tensor.dtype);
    require<FormatError>(dtype.has_value(), path(), ": tensor ", in_quotes(tensor.name), ": values of dtype ",
                         tensor.dtype, " cannot be read; calm reads F64, F32, BF16 and F16");
    return {file_, file_->data() + tensor.offset, *dtype, rows, cols, file_->release()};
  }

  std::shared_ptr<const FileMap> file_;
  std::vector<SafetensorsEntry> entries_;
  std::vector<std::size_t> by_name_;
  std::map<std::string, std::string> metadata_;
};

/// Collects tensors and writes them into one file. The same calls give the same bytes.
///
/// The header keeps the order of add(). The values stand in that order too, but wider types first, so that each tensor
/// is aligned to its type; the first begins at a multiple of 64 bytes.
class SafetensorsWriter {
 public:
  /// A tensor of float or double values, written as `dtype`. The values are read by write() and must live until then.
  template <class Scalar>
  void add(std::string name, std::vector<Index> shape, std::span<const Scalar> values, DType dtype = dtype_of<Scalar>) {
    check_shape(name, shape, static_cast<Index>(values.size()));
    add_tensor({std::move(name), dtype, std::move(shape), [values, dtype](Index first, Index count, std::byte* target) {
                  encode(dtype, values.data() + first, count, target);
                }});
  }

  /// A matrix as [rows, cols].
  template <class Scalar>
  void add(std::string name, const Matrix<Scalar>& values, DType dtype = dtype_of<Scalar>) {
    add<Scalar>(std::move(name), {values.rows(), values.cols()}, values.values(), dtype);
  }

  /// Stored values as they are, bit for bit. The writer keeps them alive.
  void add(std::string name, std::vector<Index> shape, const StoredMatrix& values) {
    check_shape(name, shape, values.size());
    const DType dtype = values.dtype();
    add_tensor({std::move(name), dtype, std::move(shape), [values](Index first, Index count, std::byte* target) {
                  const auto bytes = static_cast<std::size_t>(bytes_of(values.dtype(), count));
                  std::memcpy(target, values.data() + bytes_of(values.dtype(), first), bytes);
                }});
  }

  void set_metadata(const std::string& key, std::string value) { metadata_[key] = std::move(value); }

  /// Replaces the file at `path` whole or not at all. Throws IoError, or FormatError where a name is not UTF-8.
  template <class System = PosixFiles>
  void write(const std::filesystem::path& path, System system = {}) const {
    write_file_atomically(
        path, [&](AtomicFile<System>& file) { write_to(file); }, std::move(system));
  }

  /// Gives the bytes of the file to `sink.write(const std::byte*, Index count)`, in pieces.
  template <class Sink>
  void write_to(Sink& sink) const {
    const std::vector<const Tensor*> order = order_of_values();
    const std::string text = header(order);
    const auto length = static_cast<std::uint64_t>(text.size());
    std::array<std::byte, 8> prefix;
    std::memcpy(prefix.data(), &length, 8);
    sink.write(prefix.data(), 8);
    sink.write(reinterpret_cast<const std::byte*>(text.data()), static_cast<Index>(text.size()));
    constexpr Index piece = 1 << 16;  // values encoded at once
    std::vector<std::byte> buffer;
    for (const Tensor* tensor : order) {
      buffer.resize(static_cast<std::size_t>(bytes_of(tensor->dtype, std::min(piece, tensor->size()))));
      for (Index first = 0; first < tensor->size(); first += piece) {
        const Index count = std::min(piece, tensor->size() - first);
        tensor->read(first, count, buffer.data());
        sink.write(buffer.data(), bytes_of(tensor->dtype, count));
      }
    }
  }

 private:
  struct Tensor {
    std::string name;
    DType dtype;
    std::vector<Index> shape;
    std::function<void(Index first, Index count, std::byte* target)> read;

    Index size() const {
      Index product = 1;
      for (const Index dimension : shape) product *= dimension;
      return product;
    }
    Index bytes() const { return bytes_of(dtype, size()); }
  };

  static void check_shape(const std::string& name, const std::vector<Index>& shape, Index values) {
    Index product = 1;
    for (const Index dimension : shape) product = checked_multiply(product, dimension, "tensor " + in_quotes(name));
    require<ShapeError>(product == values, "tensor ", in_quotes(name), ": the shape ", shape_text(shape), " takes ",
                        product, " values, ", values, " were given");
  }

  void add_tensor(Tensor tensor) {
    require<ConfigError>(tensor.name != "__metadata__", "\"__metadata__\" cannot be the name of a tensor");
    require<ConfigError>(!safetensors_name_of(tensor.dtype).empty(), "tensor ", in_quotes(tensor.name),
                         ": safetensors has no dtype ", name_of(tensor.dtype));
    require<ConfigError>(names_.emplace(tensor.name, true).second, "two tensors are named ", in_quotes(tensor.name));
    tensors_.push_back(std::move(tensor));
  }

  std::vector<const Tensor*> order_of_values() const {
    std::vector<const Tensor*> order;
    for (const Tensor& tensor : tensors_) order.push_back(&tensor);
    std::stable_sort(order.begin(), order.end(), [](const Tensor* a, const Tensor* b) {
      return block_of(a->dtype).bytes > block_of(b->dtype).bytes;
    });
    return order;
  }

  std::string header(const std::vector<const Tensor*>& order) const {
    std::map<const Tensor*, Index> begin;
    Index position = 0;
    for (const Tensor* tensor : order) {
      begin[tensor] = position;
      position = checked_add(position, tensor->bytes(), "tensor " + in_quotes(tensor->name));
    }
    std::string text = "{";
    const auto separate = [&] { text += text.size() > 1 ? "," : ""; };
    if (!metadata_.empty()) {
      text += "\"__metadata__\":{";
      for (const auto& [key, value] : metadata_)
        text += (key == metadata_.begin()->first ? "" : ",") + json_literal(key) + ':' + json_literal(value);
      text += '}';
    }
    for (const Tensor& tensor : tensors_) {
      separate();
      std::string shape = shape_text(tensor.shape);
      shape.erase(std::remove(shape.begin(), shape.end(), ' '), shape.end());
      text += message(json_literal(tensor.name), ":{\"dtype\":\"", safetensors_name_of(tensor.dtype),
                      "\",\"shape\":", shape, ",\"data_offsets\":[", begin[&tensor], ',',
                      begin[&tensor] + tensor.bytes(), "]}");
    }
    text += '}';
    text.resize((text.size() + 8 + 63) / 64 * 64 - 8, ' ');
    return text;
  }

  std::vector<Tensor> tensors_;
  std::map<std::string, bool> names_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace calm::inline CALM_ABI
