// GGUF: a whole model in one file (https://github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3, little endian.
//
//   "GGUF", u32 version, u64 number of tensors, u64 number of metadata keys
//   the metadata (see gguf_metadata.hpp)
//   for each tensor: string name, u32 number of dimensions, u64 dimensions, u32 type, u64 offset
//   the values; offsets count from here, and all of it is aligned to general.alignment bytes (32)
// The first dimension is the length of a row: what is written as 64 x 10 is a matrix of 10 rows of 64.
//
// Between the tensors and after the last there may be bytes that belong to none. A type that ggml knows and calm does
// not read (Q2_K, IQ4_XS, ...) is refused when that tensor is asked for, so that the file can still be inspected; an
// unknown number is refused when the file is opened. Not here: big-endian files, models in several files, writing.
#pragma once

#include <calm/core/arithmetic.hpp>
#include <calm/io/gguf_metadata.hpp>
#include <calm/tensor/stored_matrix.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace calm::inline CALM_ABI {

static_assert(std::endian::native == std::endian::little, "GGUF files are read in place: a little-endian machine");

/// A tensor type of ggml: its number in files, its name, its blocks, and its DType where calm reads it.
struct GgufTensorType {
  std::uint32_t number;
  std::string_view name;
  StoredBlock block;
  std::optional<DType> dtype = {};
};

inline constexpr std::array gguf_tensor_types = [] {
  const auto read = [](std::uint32_t number, std::string_view name, DType dtype) {
    return GgufTensorType{number, name, block_of(dtype), dtype};
  };
  return std::array{
      read(0, "F32", DType::f32),
      read(1, "F16", DType::f16),
      read(2, "Q4_0", DType::q4_0),
      read(3, "Q4_1", DType::q4_1),
      read(6, "Q5_0", DType::q5_0),
      read(7, "Q5_1", DType::q5_1),
      read(8, "Q8_0", DType::q8_0),
      GgufTensorType{9, "Q8_1", {32, 40}},
      GgufTensorType{10, "Q2_K", {256, 84}},
      GgufTensorType{11, "Q3_K", {256, 110}},
      read(12, "Q4_K", DType::q4_k),
      read(13, "Q5_K", DType::q5_k),
      read(14, "Q6_K", DType::q6_k),
      GgufTensorType{15, "Q8_K", {256, 292}},
      GgufTensorType{16, "IQ2_XXS", {256, 66}},
      GgufTensorType{17, "IQ2_XS", {256, 74}},
      GgufTensorType{18, "IQ3_XXS", {256, 98}},
      GgufTensorType{19, "IQ1_S", {256, 50}},
      GgufTensorType{20, "IQ4_NL", {32, 18}},
      GgufTensorType{21, "IQ3_S", {256, 110}},
      GgufTensorType{22, "IQ2_S", {256, 82}},
      GgufTensorType{23, "IQ4_XS", {256, 136}},
      GgufTensorType{24, "I8", {1, 1}},
      GgufTensorType{25, "I16", {1, 2}},
      GgufTensorType{26, "I32", {1, 4}},
      GgufTensorType{27, "I64", {1, 8}},
      read(28, "F64", DType::f64),
      GgufTensorType{29, "IQ1_M", {256, 56}},
      read(30, "BF16", DType::bf16),
      GgufTensorType{34, "TQ1_0", {256, 54}},
      GgufTensorType{35, "TQ2_0", {256, 66}},
      GgufTensorType{39, "MXFP4", {32, 17}},
      GgufTensorType{40, "NVFP4", {64, 36}},
      GgufTensorType{41, "Q1_0", {128, 18}},
  };
}();

/// What the file says about one tensor.
struct GgufEntry {
  std::string_view name;  // in the file, as long as the GgufFile lives
  const GgufTensorType* type = nullptr;
  std::array<Index, 4> dimensions{};  // in the file's order: a row's length first
  Index rank = 0;
  Index offset = 0;  // from the beginning of the file
  Index bytes = 0;

  /// As other formats write it, a row's length last.
  std::vector<Index> shape() const {
    return {dimensions.rend() - static_cast<std::ptrdiff_t>(rank), dimensions.rend()};
  }
};

class GgufFile {
 public:
  /// Reads the metadata and the table of tensors. Throws IoError, or FormatError with the place and the reason.
  explicit GgufFile(const std::filesystem::path& path) : GgufFile(FileMap::open(path)) {}

  explicit GgufFile(std::shared_ptr<const FileMap> file) : file_(std::move(file)) {
    GgufCursor cursor(*file_);
    read_version(cursor);
    // The least that an entry takes: its strings' lengths, its numbers and one byte of value.
    const std::string place = cursor.place();
    const Index tensors = cursor.read_count("the number of tensors", 24);
    require<FormatError>(tensors <= most_tensors, place, tensors, " tensors; at most ", most_tensors, " are read");
    const Index keys = cursor.read_count("the number of metadata keys", 13);
    metadata_ = GgufMetadata(file_, cursor, keys);
    alignment_ = metadata_.get_integer_or("general.alignment", 32, 1, Index{1} << 30);
    require<FormatError>(std::has_single_bit(static_cast<std::uint64_t>(alignment_)), path(),
                         ": key \"general.alignment\": ", alignment_, " is not a power of two");
    entries_.reserve(static_cast<std::size_t>(tensors));
    for (Index i = 0; i < tensors; ++i) entries_.push_back(read_entry(cursor));
    place_values(ceil_divide(cursor.position(), alignment_) * alignment_);
    index_names();
  }

  const std::string& path() const { return file_->path(); }
  const std::shared_ptr<const FileMap>& file() const { return file_; }
  Index version() const { return version_; }
  Index alignment() const { return alignment_; }
  const GgufMetadata& metadata() const { return metadata_; }

  /// All tensors, in the order of their values in the file; also of types that calm cannot read.
  const std::vector<GgufEntry>& tensors() const { return entries_; }

  bool contains(std::string_view name) const { return find(name) != nullptr; }

  const GgufEntry& entry(std::string_view name) const {
    const GgufEntry* found = find(name);
    if (found == nullptr)
      fail<FormatError>({path(), ": has no tensor ", in_quotes(name), " among its ", entries_.size()});
    return *found;
  }

  /// A tensor in place: dimensions c x r as r x c, n as 1 x n, none as 1 x 1. The map lives as long as the result.
  StoredMatrix matrix(std::string_view name) const {
    const GgufEntry& tensor = entry(name);
    require<FormatError>(tensor.rank <= 2, path(), ": tensor ", in_quotes(name), " has the shape ",
                         shape_text(tensor.shape()), "; a matrix or vector was expected");
    return stored(tensor);
  }

  /// The same, and the shape must be [rows, cols]; [cols] counts as [1, cols], [] as [1, 1].
  StoredMatrix matrix(std::string_view name, Index rows, Index cols) const {
    const GgufEntry& tensor = entry(name);
    const bool fits = tensor.rank <= 2 && tensor.dimensions[1] == rows && tensor.dimensions[0] == cols;
    require<FormatError>(fits, path(), ": tensor ", in_quotes(name), " has the shape ", shape_text(tensor.shape()),
                         "; expected ", rows == 1 ? message("[", cols, "]") : message("[", rows, ", ", cols, "]"));
    return stored(tensor);
  }

 private:
  static constexpr Index most_tensors = 1 << 18;  // together with the metadata's limits this bounds the memory

  void read_version(GgufCursor& cursor) {
    const std::string_view text = file_->text();
    require<FormatError>(!text.starts_with("version https://git-lfs"), path(),
                         ": is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`");
    require<FormatError>(text.starts_with("GGUF"), path(), ": byte 0: expected \"GGUF\", found ",
                         in_quotes(text.substr(0, 4)), "; it is no GGUF file");
    cursor.take(4, "the name of the format");
    const auto version = cursor.read<std::uint32_t>("the version of the format");
    require<FormatError>((version & 0xFFFFU) != 0 || version == 0, path(),
                         ": byte 4: is a big-endian GGUF file; calm reads little-endian ones");
    require<FormatError>(version == 2 || version == 3, path(), ": byte 4: is of version ", version,
                         " of GGUF; calm reads 2 and 3");
    version_ = version;
  }

  /// All but its place in the file: `offset` is relative still.
  GgufEntry read_entry(GgufCursor& cursor) const {
    GgufEntry result;
    const std::string place = cursor.place();
    result.name = cursor.read_string("the name of a tensor");
    const std::string where = message(place, "tensor ", in_quotes(result.name));
    const auto rank = cursor.read<std::uint32_t>("the number of dimensions of a tensor");
    require<FormatError>(rank <= result.dimensions.size(), where, ": ", rank, " dimensions; GGUF has at most 4");
    result.rank = static_cast<Index>(rank);
    result.dimensions.fill(1);
    Index values = 1;
    for (std::size_t i = 0; i < rank; ++i) {
      const auto dimension = cursor.read<std::uint64_t>("a dimension of a tensor");
      require<FormatError>(dimension <= static_cast<std::uint64_t>(std::numeric_limits<Index>::max()), where,
                           ": the dimension ", dimension, " does not fit into 63 bits");
      result.dimensions[i] = static_cast<Index>(dimension);
      values = checked_multiply(values, result.dimensions[i], where);
    }
    const auto number = cursor.read<std::uint32_t>("the type of a tensor");
    const auto* type = std::find_if(gguf_tensor_types.begin(), gguf_tensor_types.end(),
                                    [&](const GgufTensorType& t) { return t.number == number; });
    require<FormatError>(type != gguf_tensor_types.end(), where, ": unknown type ", number,
                         "; it was removed from GGUF, or is newer than this version of calm");
    result.type = type;
    require<FormatError>(result.dimensions[0] % type->block.values == 0, where, ": rows of ", result.dimensions[0],
                         " values are not whole blocks of ", type->name, ", which have ", type->block.values);
    result.bytes = checked_multiply(values / type->block.values, type->block.bytes, where);
    const auto offset = cursor.read<std::uint64_t>("the offset of a tensor");
    require<FormatError>(offset <= static_cast<std::uint64_t>(file_->size()), where, ": the offset ", offset,
                         " lies outside of the file of ", file_->size(), " bytes; it was cut off or is damaged");
    result.offset = static_cast<Index>(offset);
    require<FormatError>(result.offset % alignment_ == 0, where, ": the offset ", offset,
                         " is not a multiple of the alignment, ", alignment_);
    return result;
  }

  /// Sorts the tensors by place and checks that they lie in the file and do not overlap.
  void place_values(Index begin) {
    std::sort(entries_.begin(), entries_.end(), [](const GgufEntry& a, const GgufEntry& b) {
      return std::tie(a.offset, a.bytes, a.name) < std::tie(b.offset, b.bytes, b.name);
    });
    Index position = begin;
    for (GgufEntry& tensor : entries_) {
      tensor.offset += begin;
      if (tensor.offset < position)
        fail<FormatError>({path(), ": tensor ", in_quotes(tensor.name), ": begins at byte ", tensor.offset,
                           " of the file, inside the values before it, which end at byte ", position});
      if (tensor.offset > file_->size() || tensor.bytes > file_->size() - tensor.offset)
        fail<FormatError>({path(), ": tensor ", in_quotes(tensor.name), ": its ", tensor.bytes, " bytes from byte ",
                           tensor.offset, " on end outside of the file of ", file_->size(),
                           " bytes; it was cut off or is damaged"});
      position = tensor.offset + tensor.bytes;
    }
  }

  void index_names() {
    by_name_.resize(entries_.size());
    for (std::size_t i = 0; i < by_name_.size(); ++i) by_name_[i] = i;
    std::sort(by_name_.begin(), by_name_.end(),
              [&](std::size_t a, std::size_t b) { return entries_[a].name < entries_[b].name; });
    const auto twice = std::adjacent_find(by_name_.begin(), by_name_.end(), [&](std::size_t a, std::size_t b) {
      return entries_[a].name == entries_[b].name;
    });
    if (twice != by_name_.end())
      fail<FormatError>({path(), ": two tensors are named ", in_quotes(entries_[*twice].name)});
  }

  const GgufEntry* find(std::string_view name) const {
    const auto place = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                        [&](std::size_t i, std::string_view n) { return entries_[i].name < n; });
    return place != by_name_.end() && entries_[*place].name == name ? &entries_[*place] : nullptr;
  }

  StoredMatrix stored(const GgufEntry& tensor) const {
    if (!tensor.type->dtype) {
      std::string known;
      for (const GgufTensorType& type : gguf_tensor_types)
        if (type.dtype) known += message(known.empty() ? "" : ", ", type.name);
      fail<FormatError>({path(), ": tensor ", in_quotes(tensor.name), ": values of type ", tensor.type->name,
                         " cannot be read; calm reads ", known});
    }
    const Index cols = tensor.dimensions[0], rows = tensor.dimensions[1];
    return {file_, file_->data() + tensor.offset, *tensor.type->dtype, rows, cols, file_->release()};
  }

  std::shared_ptr<const FileMap> file_;
  Index version_ = 0, alignment_ = 32;
  GgufMetadata metadata_;
  std::vector<GgufEntry> entries_;
  std::vector<std::size_t> by_name_;
};

}  // namespace calm::inline CALM_ABI
