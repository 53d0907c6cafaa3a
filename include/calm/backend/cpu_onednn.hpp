// Products of CpuBackend with frozen weights by oneDNN, for programs that link the CMake target calm::onednn:
// Context<CpuBackend>(threads, onednn_products) in f32, which is then the default, and onednn_bf16_products, which
// rounds as bf16_products does. oneDNN packs a frozen weight once for y = x w^T and once for dx = dy w. Weights that
// change, which it would have to pack anew at each call, are multiplied by calm's own products.
//
// Results have the same bits for any number of threads: a product is cut into pieces of columns, packed one by one, and
// blocks of rows, from its sizes alone, and each is computed by one thread that oneDNN does not split further. They are
// not the bits of calm's own products, since oneDNN adds in another order. It lays weights out in blocks with AVX-512
// alone, where an element's bits, too, depend on its own row and column; elsewhere onednn_products are calm's own.
//
// Once it has met the sizes of a run calm allocates nothing, but oneDNN itself allocates at each call some small
// objects that hold the arguments (version 2.6: six), which nothing switches off.
//
// Source: oneDNN Developer Guide, "Matrix Multiplication" and "Memory Format Propagation".
#pragma once

#include <calm/backend/cpu_bf16.hpp>

#include <dlfcn.h>
#include <dnnl.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <memory>
#include <vector>

namespace calm::inline CALM_ABI {
namespace cpu {
namespace onednn {

using dnnl::memory;

/// While it lives oneDNN works with the calling thread alone. Where it is built for OpenMP it takes as many threads as
/// the caller has set, in the OpenMP that it was linked with; which need not be the compiler's, so that it is asked for
/// by name.
class OneThread {
 public:
  OneThread() : before_(maximum() ? maximum()() : 0) {
    if (before_ > 1) set()(1);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;
  ~OneThread() {
    if (before_ > 1) set()(before_);
  }

  /// Throws ConfigError where oneDNN has threads that it does not give up.
  static void check() {
    const auto runtime = dnnl::version()->cpu_runtime;
    require<ConfigError>(runtime == DNNL_RUNTIME_SEQ || (runtime == DNNL_RUNTIME_OMP && maximum() && set()),
                         "onednn_products: this oneDNN is built for threads that calm cannot hold to one (runtime ",
                         static_cast<int>(runtime),
                         "); link one that is built for OpenMP or without threads, as "
                         "Debian's libdnnl-dev is, or use calm's own products");
  }

 private:
  template <class Function>
  static Function* find(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
  }
  static auto maximum() -> int (*)() {
    static auto* const function = find<int()>("omp_get_max_threads");
    return function;
  }
  static auto set() -> void (*)(int) {
    static auto* const function = find<void(int)>("omp_set_num_threads");
    return function;
  }

  int before_;
};

inline const dnnl::engine& engine() {
  static const dnnl::engine host(dnnl::engine::kind::cpu, 0);
  return host;
}

template <class Value>
inline constexpr auto type_of = std::is_same_v<Value, float> ? memory::data_type::f32 : memory::data_type::bf16;

/// y [rows, columns] in f32 = x [rows, depth] w, in version 2 or 3 of oneDNN's interface.
template <class Value, class Matmul = dnnl::matmul>
typename Matmul::primitive_desc describe(Index rows, Index depth, Index columns, const memory::desc& w) {
  const memory::desc x({rows, depth}, type_of<Value>, memory::format_tag::ab);
  const memory::desc y({rows, columns}, memory::data_type::f32, memory::format_tag::ab);
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  if constexpr (requires { typename Matmul::desc; }) return {typename Matmul::desc(x, w, y), attributes, engine()};
  else return {engine(), x, w, y, attributes};
}

inline constexpr Index most_rows = 128, piece_columns = 128;  // of one call

enum class Side { forward, input_gradient };

/// A frozen weight as the factor [depth, columns] of one side of a layer, in pieces of columns that are each in the
/// layout which oneDNN chooses for them.
template <class Value, Side side>
struct PackedWeight {
  Index depth, columns;
  std::vector<memory> pieces;
  std::shared_ptr<std::byte> values;  // of all pieces

  PackedWeight(ThreadPool& pool, Scratch& scratch, const StoredMatrix& w)
      : depth(side == Side::forward ? w.cols() : w.rows()), columns(side == Side::forward ? w.rows() : w.cols()),
        pieces(static_cast<std::size_t>(ceil_divide(columns, piece_columns))) {
    const auto layout_of = [&](Index piece) {
      const OneThread alone;
      const memory::desc any({depth, columns_of(piece)}, type_of<Value>, memory::format_tag::any);
      return memory::desc(describe<Value>(most_rows, depth, columns_of(piece), any).weights_desc());
    };
    const Index last = static_cast<Index>(pieces.size()) - 1;
    const memory::desc layout = layout_of(0), last_layout = layout_of(last);
    const std::size_t step = (layout.get_size() + 63) / 64 * 64;
    values = allocate_in_huge_pages(static_cast<std::size_t>(last) * step + last_layout.get_size());
    // Rows are read piece by piece; columns are cut from a copy of the whole.
    const bool copies = side == Side::input_gradient && !w.in_place<float>();
    const Matrix<float> copy = copies ? w.dense<float>() : Matrix<float>();
    const float* const all = copies ? copy.data() : w.in_place<float>();
    const memory::dims strides = side == Side::forward ? memory::dims{1, w.cols()} : memory::dims{w.cols(), 1};
    pool.for_each_tile(static_cast<Index>(pieces.size()), [&](Index p, int thread) {
      const OneThread alone;
      auto& arena = scratch[static_cast<std::size_t>(thread)];
      arena.reset();
      const Index first = p * piece_columns, count = columns_of(p);
      const float* part = all ? all + first * strides[1] : nullptr;
      if (!part) {
        const auto rows = arena.matrix<float>(count, w.cols());
        w.read_rows(first, count, rows.data);
        part = rows.data;
      }
      memory plain({{depth, count}, memory::data_type::f32, strides}, engine(), const_cast<float*>(part));
      memory packed(p == last ? last_layout : layout, engine(), values.get() + static_cast<std::size_t>(p) * step);
      dnnl::stream stream(engine());
      dnnl::reorder(plain, packed).execute(stream, plain, packed);
      stream.wait();
      pieces[static_cast<std::size_t>(p)] = packed;
    });
  }

  Index columns_of(Index piece) const { return std::min(piece_columns, columns - piece * piece_columns); }
  std::size_t bytes() const {
    std::size_t total = 0;
    for (const memory& piece : pieces) total += piece.get_desc().get_size();
    return total;
  }
};

/// The product of some rows with a piece, and what each thread needs to call it.
struct Tile {
  struct Call {
    dnnl::stream stream;
    memory x, y, scratchpad;
  };
  dnnl::matmul product;
  std::vector<Call> calls;

  template <class Description>
  Tile(const Description& description, int threads) : product(description) {
    const auto nowhere = [](const memory::desc& desc) { return memory(desc, engine(), nullptr); };
    for (int i = 0; i < threads; ++i)
      calls.push_back({dnnl::stream(engine()), nowhere(description.src_desc()), nowhere(description.dst_desc()),
                       memory(description.scratchpad_desc(), engine())});
  }

  template <class Value>
  void multiply(int thread, const Value* x, const memory& w, float* y) const {
    const Call& call = calls[static_cast<std::size_t>(thread)];
    call.x.set_data_handle(const_cast<Value*>(x));
    call.y.set_data_handle(y);
    const std::array arguments{dnnl_exec_arg_t{DNNL_ARG_SRC, call.x.get()}, dnnl_exec_arg_t{DNNL_ARG_WEIGHTS, w.get()},
                               dnnl_exec_arg_t{DNNL_ARG_DST, call.y.get()},
                               dnnl_exec_arg_t{DNNL_ARG_SCRATCHPAD, call.scratchpad.get()}};
    dnnl::error::wrap_c_api(
        dnnl_primitive_execute(product.get(), call.stream.get(), static_cast<int>(arguments.size()), arguments.data()),
        "onednn_products: a product cannot be executed");
  }
};

/// Own: calm's own products in the type Value, for weights that change.
template <class Value, class Own>
class OneDnnProducts final : public Own {
 public:
  explicit OneDnnProducts(ThreadPool& pool) : Own(pool), pool_(pool), scratch_(scratch_of(pool)) {
    OneThread::check();
    try {
      describe<Value>(1, 1, 1, memory::desc({1, 1}, type_of<Value>, memory::format_tag::any));
    } catch (const dnnl::error& error) {
      if (std::is_same_v<Value, float> || error.status != dnnl_unimplemented) throw;
      fail<ConfigError>({"onednn_bf16_products: oneDNN has no products in bf16 for this processor (", error.what(),
                         "); use calm::bf16_products"});
    }
  }

  using Own::multiply;
  using Own::multiply_input_gradient;

  void multiply(MatrixView<const float> x, const StoredMatrix& w, MatrixView<float> y, bool add) override {
    product<Side::forward>(x, w, y, add);
  }
  void multiply_input_gradient(MatrixView<const float> dy, const StoredMatrix& w, MatrixView<float> dx,
                               bool add) override {
    product<Side::input_gradient>(dy, w, dx, add);
  }

 private:
  template <Side side>
  void product(MatrixView<const float> x, const StoredMatrix& stored, MatrixView<float> y, bool add) {
    if (y.rows == 0 || y.cols == 0) return;
    if (x.cols == 0) {
      for (Index t = 0; !add && t < y.rows; ++t) std::fill_n(y.row(t), y.cols, 0.0F);
      return;
    }
    using Weight = PackedWeight<Value, side>;
    const Weight& w = stored.packed<Weight>([&] { return Weight(pool_, scratch_, stored); });
    arena_.reset();
    const Value* rows = dense_rows(x);
    const auto pieces = static_cast<Index>(w.pieces.size());
    // Of many pieces, which stay in no cache, each is multiplied with many rows when it is read.
    const Index row_step = pieces < 64 ? most_rows : 8 * most_rows;
    for (const Index p : {Index{0}, pieces - 1})  // all others are as wide as the first
      for (Index row = 0; row < y.rows; row += rows_of_call(y.rows - row)) prepare(rows_of_call(y.rows - row), w, p);
    for_each_block(pool_, y.rows, row_step, pieces, 1, [&](const Block& b, int thread) {
      const OneThread alone;
      auto& arena = scratch_[static_cast<std::size_t>(thread)];
      arena.reset();
      const Index column = b.column * piece_columns, columns = w.columns_of(b.column);
      float* const buffer = arena.allocate<float>(most_rows * columns);  // oneDNN writes whole rows alone
      for (Index row = b.row, count = 0; row < b.row + b.rows; row += count) {
        count = rows_of_call(b.row + b.rows - row);
        const bool whole = !add && y.stride == columns;
        const MatrixView<float> target = y.middle_rows(row, count).middle_cols(column, columns);
        tiles_.at({count, w.depth, columns})
            .multiply(thread, rows + row * w.depth, w.pieces[static_cast<std::size_t>(b.column)],
                      whole ? target.data : buffer);
        for (Index t = 0; !whole && t < count; ++t) {
          const float* source = buffer + t * columns;
          float* const goal = target.row(t);
          if (add)
            for (Index j = 0; j < columns; ++j) goal[j] += source[j];
          else std::copy_n(source, columns, goal);
        }
      }
    });
  }

  /// So that few sizes of a call serve any number of rows: each is a description and code that oneDNN makes.
  static Index rows_of_call(Index left) {
    return left >= most_rows ? most_rows : static_cast<Index>(std::bit_floor(static_cast<std::uint64_t>(left)));
  }

  template <class Weight>
  void prepare(Index rows, const Weight& w, Index piece) {
    const std::array key{rows, w.depth, w.columns_of(piece)};
    if (tiles_.contains(key)) return;
    const OneThread alone;
    tiles_.try_emplace(key,
                       describe<Value>(rows, w.depth, key[2], w.pieces[static_cast<std::size_t>(piece)].get_desc()),
                       pool_.size());
  }

  /// The rows of x without gaps, as Value.
  const Value* dense_rows(MatrixView<const float> x) {
    if constexpr (std::is_same_v<Value, float>)
      if (x.stride == x.cols || x.rows == 1) return x.data;
    auto* const target = arena_.template allocate<Value>(x.rows * x.cols);
    constexpr Index at_once = 32;
    pool_.for_each_tile(ceil_divide(x.rows, at_once), [&](Index i, int) {
      for (Index t = i * at_once; t < std::min(x.rows, (i + 1) * at_once); ++t) {
        Value* row = target + t * x.cols;
        if constexpr (std::is_same_v<Value, float>) std::copy_n(x.row(t), x.cols, row);
        else if (x.cols % 2 == 0) round_row(x.row(t), x.cols, reinterpret_cast<Pair*>(row));
        else std::transform(x.row(t), x.row(t) + x.cols, row, to_bf16);
      }
    });
    return target;
  }

  ThreadPool& pool_;
  Arena<HostMemory> arena_;
  Scratch scratch_;  // one for each thread
  std::map<std::array<Index, 3>, Tile> tiles_;
};

}  // namespace onednn
}  // namespace cpu

/// Whether a row's bits depend on it alone here. Without AVX-512 oneDNN does not lay weights out in blocks, and they
/// depend on how many rows there are: a token would change what stands before it.
inline bool onednn_keeps_bits() {
  constexpr auto needed = static_cast<int>(dnnl::cpu_isa::avx512_core);
  return (static_cast<int>(dnnl::get_effective_cpu_isa()) & needed) == needed;
}

/// Where oneDNN does not keep the bits of a row: none, so that calm's own are used.
inline std::unique_ptr<cpu::Products> onednn_products(ThreadPool& pool) {
  if (!onednn_keeps_bits()) return nullptr;
  return std::make_unique<cpu::onednn::OneDnnProducts<float, cpu::OwnProducts>>(pool);
}
inline std::unique_ptr<cpu::Products> onednn_bf16_products(ThreadPool& pool) {
  return std::make_unique<cpu::onednn::OneDnnProducts<bf16, cpu::Bf16Products>>(pool);
}

}  // namespace calm::inline CALM_ABI
