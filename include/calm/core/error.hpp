// The exceptions that the library throws. A message names the file or argument, what was found, what was expected and,
// where a person can act on it, what to do. Mistakes that the types can know are compile errors instead.
#pragma once

#include <calm/core/config.hpp>

#include <sstream>
#include <stdexcept>
#include <string>

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

/// Joins its arguments into one message.
template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

/// Throws E with the joined message unless `condition` holds.
template <class E, class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw E(message(parts...));
}

}  // namespace calm::inline CALM_ABI
