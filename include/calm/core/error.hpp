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

/// One part of a message: text or a number. Made on the spot, for the length of a call.
class MessagePart {
 public:
  MessagePart(std::string_view text) : text_(text) {}    // NOLINT(google-explicit-constructor)
  MessagePart(const std::string& text) : text_(text) {}  // NOLINT(google-explicit-constructor)
  MessagePart(const char* text) : text_(text) {}         // NOLINT(google-explicit-constructor)
  MessagePart(char c) : size_(1) { digits_[0] = c; }     // NOLINT(google-explicit-constructor)
  template <std::integral Number>
  MessagePart(Number x) {  // NOLINT(google-explicit-constructor)
    if constexpr (std::signed_integral<Number>) print("%lld", static_cast<long long>(x));
    else print("%llu", static_cast<unsigned long long>(x));
  }
  template <std::floating_point Number>
  MessagePart(Number x) {  // NOLINT(google-explicit-constructor)
    print("%g", static_cast<double>(x));
  }

  void append_to(std::string& message) const { message.append(size_ > 0 ? std::string_view(digits_, size_) : text_); }

 private:
  template <class Number>
  void print(const char* format, Number x) {
    size_ = static_cast<std::size_t>(std::snprintf(digits_, sizeof(digits_), format, x));
  }

  std::string_view text_;
  char digits_[32] = {};
  std::size_t size_ = 0;
};

inline std::string join(std::initializer_list<MessagePart> parts) {
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
