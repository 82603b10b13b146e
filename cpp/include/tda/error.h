// The exceptions that tdaengine throws; Python has the same tree with the same names. A failed small
// allocation throws std::bad_alloc (Python: MemoryError).
#pragma once

#include <stdexcept>

namespace [[gnu::visibility("default")]] tda {

/// Root of the tree. Every message names the file, tensor or option at fault, what was found there
/// and what was expected.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A checkpoint, thresholds or tokenizer file is missing, damaged, unsupported or another model's.
struct CheckpointError : Error {
  using Error::Error;
};

/// An option or argument is out of range, unknown, or contradicts another one.
struct OptionError : Error {
  using Error::Error;
};

/// The requested device is absent, out of memory, or failed.
struct DeviceError : Error {
  using Error::Error;
};

/// More tokens than fit into the context.
struct ContextOverflow : Error {
  using Error::Error;
};

}  // namespace tda
