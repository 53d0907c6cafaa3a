// The exceptions that the library throws. A message names the file or argument, what was found, what was expected and,
// where a person can act on it, what to do. Mistakes that the types can know are compile errors instead.
#pragma once

#include <calm/core/config.hpp>

#include <concepts>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

namespace calm::inline CALM_ABI {

/// Base of all errors thrown by calm.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Two sizes that must agree do not, or an index lies outside its range.
class ShapeError : public Error {
 public:
  using Error::Error;
};

/// A configuration (of a model, a link, a run) that cannot work.
class ConfigError : public Error {
 public:
  using Error::Error;
};

/// The operating system refused a file operation.
class IoError : public Error {
 public:
  using Error::Error;
};

/// A file whose bytes are not what its format asks for, or that belongs to another model.
class FormatError : public Error {
 public:
  using Error::Error;
};

/// NaN or infinity in a loss or gradient.
class NumericError : public Error {
 public:
  using Error::Error;
};

/// More tokens than the model's context, or than a session was made for.
class ContextLimitError : public Error {
 public:
  using Error::Error;
};

/// One part of a message: text or a number. Made on the spot, for the length of a call; written only where a message
/// is, so that a check costs its caller a few stores in code that never runs.
class MessagePart {
 public:
  MessagePart(std::string_view text) : kind_(Kind::text), text_(text) {}         // NOLINT(google-explicit-constructor)
  MessagePart(const std::string& text) : MessagePart(std::string_view(text)) {}  // NOLINT(google-explicit-constructor)
  MessagePart(const char* text) : MessagePart(std::string_view(text)) {}         // NOLINT(google-explicit-constructor)
  MessagePart(char c) : kind_(Kind::character), character_(c) {}                 // NOLINT(google-explicit-constructor)
  template <std::signed_integral Number>
  MessagePart(Number x) : kind_(Kind::integer), integer_(x) {}  // NOLINT(google-explicit-constructor)
  template <std::unsigned_integral Number>
  MessagePart(Number x) : kind_(Kind::natural), natural_(x) {}  // NOLINT(google-explicit-constructor)
  template <std::floating_point Number>
  MessagePart(Number x) : kind_(Kind::real), real_(static_cast<double>(x)) {}  // NOLINT(google-explicit-constructor)

  [[gnu::cold]] void append_to(std::string& message) const {
    switch (kind_) {
      case Kind::text: message.append(text_); return;
      case Kind::character: message.push_back(character_); return;
      case Kind::integer: return print(message, "%lld", integer_);
      case Kind::natural: return print(message, "%llu", natural_);
      case Kind::real: return print(message, "%g", real_);
    }
  }

 private:
  enum class Kind : char { text, character, integer, natural, real };

  template <class Value>
  [[gnu::cold, gnu::noinline]] static void print(std::string& message, const char* format, Value value) {
    char text[32];
    std::snprintf(text, sizeof(text), format, value);
    message.append(text);
  }

  Kind kind_;
  union {
    std::string_view text_;
    char character_;
    long long integer_;
    unsigned long long natural_;
    double real_;
  };
};

[[gnu::cold]] inline std::string join(std::initializer_list<MessagePart> parts) {
  std::string text;
  for (const MessagePart& part : parts) part.append_to(text);
  return text;
}

/// Joins its arguments, texts and numbers, into one message.
template <class... Parts>
std::string message(const Parts&... parts) {
  return join({MessagePart(parts)...});
}

template <class E>
[[noreturn, gnu::cold, gnu::noinline]] void fail(std::initializer_list<MessagePart> parts) {
  throw E(join(parts));
}

/// Throws E with the joined message unless `condition` holds.
template <class E, class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    fail<E>({MessagePart(parts)...});
}

}  // namespace calm::inline CALM_ABI
