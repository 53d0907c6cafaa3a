// AnyAugment: an augment whose type a program learns from a file, behind a narrow erased interface, so that N anchors
// and N augments cost 2 N instantiations of the library and not N x N.
//
//   ComposedModel<Transformer<zoo::Llama>, AnyAugments<Ctx>>        // any number; Ctx: the context that runs them
#pragma once

#include <calm/compose/augment_list.hpp>
#include <calm/compose/layer_tap.hpp>

#include <memory>
#include <vector>

namespace calm::inline CALM_ABI {

template <class Ctx, class ScalarType = float>
class AnyAugment {
  struct AnyStates {
    virtual ~AnyStates() = default;
    virtual std::size_t bytes() const = 0;
  };
  struct AnySession {
    virtual ~AnySession() = default;
    virtual void clear(Index slot) = 0;
    virtual std::size_t bytes() const = 0;
  };

 public:
  using Scalar = ScalarType;
  using View = MatrixView<Scalar>;
  using Tap = LayerTap<Scalar>;

  class States {
   public:
    std::size_t bytes() const { return value_ ? value_->bytes() : 0; }

   private:
    friend AnyAugment;
    std::shared_ptr<AnyStates> value_;
  };

  class Session {
   public:
    void clear(Index slot) { value_->clear(slot); }
    std::size_t bytes() const { return value_->bytes(); }

   private:
    friend AnyAugment;
    explicit Session(std::unique_ptr<AnySession> value) : value_(std::move(value)) {}
    std::unique_ptr<AnySession> value_;
  };

  template <Decoder<Ctx> Model>
  explicit AnyAugment(std::shared_ptr<const Model> model)
      : model_(std::make_shared<const Holder<Model>>(std::move(model))) {}

  const ModelSpec& spec() const { return model_->spec(); }

  void prepare_augments(Ctx& ctx, const TokenBatch& batch, States& states) const {
    model_->prepare_augments(ctx, batch, states.value_);
  }
  View embed(Ctx& ctx, const TokenBatch& batch) const { return model_->embed(ctx, batch); }
  void run(Ctx& ctx, const TokenBatch& batch, const States& states, View& x, Index first, Index last, std::nullptr_t,
           Tap tap) const {
    model_->run(ctx, batch, *states.value_, x, first, last, tap);
  }
  Session make_session(Ctx& ctx, Index slots, Index capacity, const SessionOptions& options) const {
    return Session(model_->make_session(ctx, slots, capacity, options));
  }
  bool fits(const Session* session, Index slot, std::span<const TokenId> ids, Index prompt_length, Index more) const {
    return model_->fits(session ? session->value_.get() : nullptr, slot, ids, prompt_length, more);
  }
  void advance(Ctx& ctx, Session& session, const TokenBatch& batch, Tap tap) const {
    model_->advance(ctx, *session.value_, batch, tap);
  }

  /// fn(model) for the model itself, where it is one of these types.
  template <class... Models, class Fn>
  bool visit_as(Fn&& fn) const {
    const auto matches = [&]<class Model>(const Holder<Model>* holder) {
      if (holder) fn(*holder->model);
      return holder != nullptr;
    };
    return (matches(dynamic_cast<const Holder<Models>*>(model_.get())) || ...);
  }

 private:
  struct Interface {
    virtual ~Interface() = default;
    virtual const ModelSpec& spec() const = 0;
    virtual void prepare_augments(Ctx&, const TokenBatch&, std::shared_ptr<AnyStates>&) const = 0;
    virtual View embed(Ctx&, const TokenBatch&) const = 0;
    virtual void run(Ctx&, const TokenBatch&, const AnyStates&, View&, Index first, Index last, Tap) const = 0;
    virtual std::unique_ptr<AnySession> make_session(Ctx&, Index slots, Index capacity,
                                                     const SessionOptions&) const = 0;
    virtual bool fits(const AnySession*, Index slot, std::span<const TokenId>, Index prompt_length,
                      Index more) const = 0;
    virtual void advance(Ctx&, AnySession&, const TokenBatch&, Tap) const = 0;
  };

  template <class Model>
  struct Holder final : Interface {
    struct TypedStates final : AnyStates {
      typename Model::States value;
      std::size_t bytes() const override { return value.bytes(); }
    };
    struct TypedSession final : AnySession {
      typename Model::Session value;
      explicit TypedSession(typename Model::Session session) : value(std::move(session)) {}
      void clear(Index slot) override { value.clear(slot); }
      std::size_t bytes() const override { return value.bytes(); }
    };

    std::shared_ptr<const Model> model;
    explicit Holder(std::shared_ptr<const Model> m) : model(std::move(m)) {}

    const ModelSpec& spec() const override { return model->spec(); }
    void prepare_augments(Ctx& ctx, const TokenBatch& batch, std::shared_ptr<AnyStates>& states) const override {
      if (!states) states = std::make_shared<TypedStates>();
      model->prepare_augments(ctx, batch, static_cast<TypedStates&>(*states).value);
    }
    View embed(Ctx& ctx, const TokenBatch& batch) const override { return model->embed(ctx, batch); }
    void run(Ctx& ctx, const TokenBatch& batch, const AnyStates& states, View& x, Index first, Index last,
             Tap tap) const override {
      model->run(ctx, batch, static_cast<const TypedStates&>(states).value, x, first, last, nullptr, tap);
    }
    std::unique_ptr<AnySession> make_session(Ctx& ctx, Index slots, Index capacity,
                                             const SessionOptions& options) const override {
      return std::make_unique<TypedSession>(model->make_session(ctx, slots, capacity, options));
    }
    bool fits(const AnySession* session, Index slot, std::span<const TokenId> ids, Index prompt_length,
              Index more) const override {
      return model->fits(session ? &static_cast<const TypedSession*>(session)->value : nullptr, slot, ids,
                         prompt_length, more);
    }
    void advance(Ctx& ctx, AnySession& session, const TokenBatch& batch, Tap tap) const override {
      model->advance(ctx, static_cast<TypedSession&>(session).value, batch, tap);
    }
  };

  std::shared_ptr<const Interface> model_;
};

/// In place of the types of augments: any number of erased ones.
template <class Ctx, class ScalarType = float>
struct AnyAugments {
  using Scalar = ScalarType;
};

template <class Ctx, class Scalar>
class AugmentList<AnyAugments<Ctx, Scalar>> {
 public:
  using Augment = AnyAugment<Ctx, Scalar>;
  using Pointers = std::vector<std::shared_ptr<const Augment>>;
  using States = std::vector<typename Augment::States>;
  using Sessions = std::vector<typename Augment::Session>;
  static constexpr std::size_t static_size = 1;  // at least

  AugmentList(Pointers augments) : augments_(std::move(augments)) {  // NOLINT(google-explicit-constructor): a list
    require<ConfigError>(!augments_.empty(), "a composition needs at least one augment");
    for (const auto& augment : augments_) require<ConfigError>(augment != nullptr, "an augment is a null pointer");
  }

  std::size_t size() const { return augments_.size(); }

  template <class Fn>
  void for_each(Fn&& fn) const {
    for (std::size_t i = 0; i < augments_.size(); ++i) fn(i, *augments_[i]);
  }
  template <class Items, class Fn>
  void for_each(Items& items, Fn&& fn) const {
    if constexpr (std::is_same_v<Items, States>) items.resize(augments_.size());  // states begin empty
    for (std::size_t i = 0; i < augments_.size(); ++i) fn(i, *augments_[i], items[i]);
  }
  template <class Fn>
  Sessions make_sessions(Fn&& fn) const {
    Sessions sessions;
    for (std::size_t i = 0; i < augments_.size(); ++i) sessions.push_back(fn(i, *augments_[i]));
    return sessions;
  }
  template <class Items, class Fn>
  static void visit(Items& items, Fn&& fn) {
    for (auto& item : items) fn(item);
  }

 private:
  Pointers augments_;
};

}  // namespace calm::inline CALM_ABI
