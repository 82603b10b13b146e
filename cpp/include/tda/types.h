// The vocabulary every other header is written in.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string_view>

namespace [[gnu::visibility("default")]] tda {

/// A token id, 0 <= id < vocab_size.
using Token = std::int32_t;
using Tokens = std::span<const Token>;

enum class Device { automatic, cpu, cuda };

/// How weight matrices are stored in memory (norms and biases are always f32). `automatic`: what
/// the checkpoint has: f32 or bf16 or, of a quantised file, int4 if half of its layers' weights or
/// more have 4 bits, else int8. int8: a scale for every 32 values. bf16c:
/// bf16, compressed to 12.4 bits without loss. int4: 4 bits, with a scale for every 16 values or,
/// where they had 4 bits before, their own scale and minimum for every 32; the head is graded, and so
/// are the embedding, unless its file has it apart from the head and in 4 bits, and matrices to which
/// a GGUF file of mixed types gave more than 4 bits.
/// graded: 8 bits of which 4 are read for every token and the others for the inputs that matter to
/// it (TdaOptions::inputs).
enum class WeightFormat { automatic, f32, bf16, int8, bf16c, int4, graded };

/// How keys and values are cached. `automatic`: f32 with f32 weights, else bf16. int8: a scale for
/// every head's key or value.
enum class KvFormat { automatic, f32, bf16, int8 };

std::string_view name_of(Device);
std::string_view name_of(WeightFormat);
std::string_view name_of(KvFormat);

/// Told how much of a long piece of work is done, now and then; what it throws ends the work.
using Progress = std::function<void(std::int64_t done, std::int64_t total)>;

/// The inverse of name_of ("auto", "cpu", "f32", ...); throws OptionError that lists what is valid.
Device parse_device(std::string_view);
WeightFormat parse_weight_format(std::string_view);
KvFormat parse_kv_format(std::string_view);

}  // namespace tda
