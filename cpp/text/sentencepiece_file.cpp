// Reads a tokenizer.model: the fields of sentencepiece_model.proto that encoding and decoding need.
#include <tda/error.h>

#include <bit>
#include <cstring>
#include <string>

#include "text/field.h"
#include "text/sentencepiece.h"

namespace tda {
namespace {

enum class Wire { varint = 0, eight_bytes = 1, bytes = 2, four_bytes = 5 };

/// Iterates over the fields of one message. what: its name in error messages.
class Message {
 public:
  Message(std::string_view content, std::string what) : rest_(content), what_(std::move(what)) {}

  /// Advances to the next field; false at the end.
  bool next() {
    if (rest_.empty()) return false;
    const std::uint64_t key = varint();
    number_ = key >> 3;
    wire_ = static_cast<Wire>(key & 7);
    switch (wire_) {
      case Wire::varint:
        value_ = varint();
        return true;
      case Wire::eight_bytes:
        bytes_ = take(8);
        return true;
      case Wire::bytes:
        bytes_ = take(varint());
        return true;
      case Wire::four_bytes:
        bytes_ = take(4);
        return true;
    }
    fail("found wire type " + std::to_string(key & 7) + ", expected 0, 1, 2 or 5");
  }

  std::uint64_t number() const { return number_; }
  std::uint64_t integer() const {
    expect(Wire::varint);
    return value_;
  }
  bool flag() const { return integer() != 0; }
  std::string_view bytes() const {
    expect(Wire::bytes);
    return bytes_;
  }
  float real() const {
    expect(Wire::four_bytes);
    std::uint32_t bits = 0;  // little endian in the file
    for (std::size_t i = 4; i-- > 0;) bits = bits << 8 | static_cast<unsigned char>(bytes_[i]);
    return std::bit_cast<float>(bits);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw CheckpointError(what_ + ": " + what);
  }
  void expect(Wire wire) const {
    if (wire_ != wire)
      fail("field " + std::to_string(number_) + " has wire type " +
           std::to_string(static_cast<int>(wire_)) + ", expected " +
           std::to_string(static_cast<int>(wire)));
  }
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    fail("found a number of more than 64 bits, expected at most 64");
  }
  std::string_view take(std::uint64_t size) {
    if (size > rest_.size())
      fail("ends inside a field: found " + std::to_string(rest_.size()) + " bytes, expected " +
           std::to_string(size));
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }

  std::string_view rest_;
  std::string what_;
  std::uint64_t number_ = 0;
  Wire wire_ = Wire::varint;
  std::uint64_t value_ = 0;
  std::string_view bytes_;
};

}  // namespace

void SentencePiece::fail(const std::string& what) const {
  throw CheckpointError(file_ + ": " + what);
}

SentencePiece::SentencePiece(std::string_view content, const std::string& file) : file_(file) {
  read(content);
  if (pieces_.empty()) fail("found no pieces, expected a SentencePiece model");
  index();
}

void SentencePiece::read(std::string_view content) {
  for (Message model(content, file_); model.next();) {
    if (model.number() == 1) read_piece(model.bytes());
    if (model.number() == 2) read_trainer(model.bytes());
    if (model.number() == 3) read_normalizer(model.bytes(), false);
    if (model.number() == 5) read_normalizer(model.bytes(), true);
  }
}

void SentencePiece::read_piece(std::string_view message) {
  const std::string name = "piece " + std::to_string(pieces_.size());
  if (pieces_.size() == static_cast<std::size_t>(Field::max_tokens))
    fail("found more than " + std::to_string(Field::max_tokens) + " pieces, expected no more");
  Piece piece;
  for (Message fields(message, file_ + ": " + name); fields.next();) {
    if (fields.number() == 1) piece.text = fields.bytes();
    if (fields.number() == 2) piece.score = fields.real();
    if (fields.number() == 3) {
      if (fields.integer() < 1 || fields.integer() > 6)
        fail(name + " is of type " + std::to_string(fields.integer()) + ", expected 1 to 6");
      piece.kind = static_cast<Kind>(fields.integer());
    }
  }
  pieces_.push_back(std::move(piece));
}

void SentencePiece::read_trainer(std::string_view message) {
  for (Message fields(message, file_ + ": trainer_spec"); fields.next();) switch (fields.number()) {
      case 3:
        if (fields.integer() != 1 && fields.integer() != 2)
          fail("trainer_spec.model_type is " + std::to_string(fields.integer()) +
               ", expected 1 (unigram) or 2 (BPE)");
        is_bpe_ = fields.integer() == 2;
        break;
      case 24:
        prefix_at_end_ = fields.flag();
        break;
      case 35:
        byte_fallback_ = fields.flag();
        break;
      case 44:
        unknown_text_ = fields.bytes();
        break;
      case 46:
        bos_text_ = fields.bytes().empty() ? "<s>" : fields.bytes();
        break;
      case 47:
        eos_text_ = fields.bytes().empty() ? "</s>" : fields.bytes();
        break;
      default:
        break;  // the trainer's settings
    }
}

void SentencePiece::read_normalizer(std::string_view message, bool denormalizer) {
  const std::string name = denormalizer ? "denormalizer_spec" : "normalizer_spec";
  for (Message fields(message, file_ + ": " + name); fields.next();) {
    if (fields.number() == 2 && !fields.bytes().empty())
      fail(name + ".precompiled_charsmap has " + std::to_string(fields.bytes().size()) +
           " bytes, expected none: only the normalization \"identity\" is supported");
    if (denormalizer) continue;
    if (fields.number() == 3) add_prefix_ = fields.flag();
    if (fields.number() == 4) remove_spaces_ = fields.flag();
    if (fields.number() == 5) escape_spaces_ = fields.flag();
  }
}

}  // namespace tda
