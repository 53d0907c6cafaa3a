// The augments of a composition and what belongs to each of them, by position. AugmentList<A, B> holds models whose
// types the program names; AugmentList<AnyAugments<Ctx>> (any_augment.hpp) holds any number of erased ones.
//
// for_each(fn) calls fn(i, augment); for_each(items, fn) calls fn(i, augment, item) for the States or Sessions of each.
#pragma once

#include <calm/model/decoder.hpp>

#include <memory>
#include <tuple>

namespace calm::inline CALM_ABI {

template <class... Augments>
class AugmentList {
 public:
  using Pointers = std::tuple<std::shared_ptr<const Augments>...>;
  using States = std::tuple<typename Augments::States...>;
  using Sessions = std::tuple<typename Augments::Session...>;
  static constexpr std::size_t static_size = sizeof...(Augments);

  AugmentList(Pointers augments) : augments_(std::move(augments)) {  // NOLINT(google-explicit-constructor): a list
    std::apply([](const auto&... augment) { require<ConfigError>(((augment != nullptr) && ...), null_message); },
               augments_);
  }

  static constexpr std::size_t size() { return static_size; }
  template <std::size_t I>
  const auto& get() const {
    return *std::get<I>(augments_);
  }

  template <class Fn>
  void for_each(Fn&& fn) const {
    [&]<std::size_t... I>(std::index_sequence<I...>) { (fn(I, *std::get<I>(augments_)), ...); }
    (std::index_sequence_for<Augments...>{});
  }
  template <class Items, class Fn>
  void for_each(Items& items, Fn&& fn) const {
    [&]<std::size_t... I>(std::index_sequence<I...>) { (fn(I, *std::get<I>(augments_), std::get<I>(items)), ...); }
    (std::index_sequence_for<Augments...>{});
  }

  /// fn(i, augment) gives the session of each.
  template <class Fn>
  Sessions make_sessions(Fn&& fn) const {
    return [&]<std::size_t... I>(std::index_sequence<I...>) { return Sessions(fn(I, *std::get<I>(augments_))...); }
    (std::index_sequence_for<Augments...>{});
  }

  /// fn(item) for the states or sessions alone.
  template <class Items, class Fn>
  static void visit(Items& items, Fn&& fn) {
    std::apply([&](auto&... item) { (fn(item), ...); }, items);
  }

 private:
  static constexpr const char* null_message = "an augment is a null pointer";
  Pointers augments_;
};

}  // namespace calm::inline CALM_ABI
