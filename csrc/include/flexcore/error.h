#pragma once

#include <stdexcept>
#include <string>

namespace flexcore {

/// Base of everything the library throws. The message names the argument, what came and what was wanted.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller passed something that no engine could accept.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// The request is meaningful, but this build, model or device cannot do it.
class Unsupported : public Error {
 public:
  using Error::Error;
};

/// A memory pool is too small; the text holds the ledger.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

/// A device or its driver failed.
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// A model directory, weight file or adapter could not be read.
class ModelLoadError : public Error {
 public:
  using Error::Error;
};

}  // namespace flexcore
