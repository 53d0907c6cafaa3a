// Every architecture that calm knows, and the choice of one by the name that a file gives: the one place where a type
// is chosen at run time.
#pragma once

#include <calm/model/zoo/gemma3.hpp>
#include <calm/model/zoo/gpt2.hpp>
#include <calm/model/zoo/gpt_neox.hpp>
#include <calm/model/zoo/llama.hpp>
#include <calm/model/zoo/mistral.hpp>
#include <calm/model/zoo/olmo2.hpp>
#include <calm/model/zoo/phi3.hpp>
#include <calm/model/zoo/qwen2.hpp>
#include <calm/model/zoo/qwen3.hpp>

#include <optional>
#include <string>

namespace calm::inline CALM_ABI::zoo {

template <class... Architectures>
struct List {
  /// visitor(Architecture{}) for the architecture of this model_type. Throws FormatError for another one.
  template <class Visitor>
  static auto visit(std::string_view model_type, Visitor&& visitor) {
    using Result = std::common_type_t<decltype(visitor(Architectures{}))...>;
    if constexpr (std::is_void_v<Result>) {
      const bool found = ((Architectures::model_type == model_type && (visitor(Architectures{}), true)) || ...);
      require<FormatError>(found, "models of type \"", model_type, "\" are not known here; these are: ", names());
    } else {
      std::optional<Result> result;
      const bool found =
          ((Architectures::model_type == model_type && (result.emplace(visitor(Architectures{})), true)) || ...);
      require<FormatError>(found, "models of type \"", model_type, "\" are not known here; these are: ", names());
      return std::move(*result);
    }
  }

  static std::string names() {
    std::string all;
    ((all += (all.empty() ? "" : ", ") + std::string(Architectures::model_type)), ...);
    return all;
  }
};

using All = List<Llama, Mistral, Qwen2, Qwen3, Phi3, Gemma3, Olmo2, GptNeoX, Gpt2>;

}  // namespace calm::inline CALM_ABI::zoo
