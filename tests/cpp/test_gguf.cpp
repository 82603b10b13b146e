// GGUF files: damage of every kind, and the checkpoint that a good one is.
#include <sys/resource.h>
#include <tda/error.h>
#include <tda/tokenizer.h>

#include <algorithm>

#include "check.h"
#include "checkpoint/gguf.h"
#include "gguf_file.h"
#include "weights/model.h"

namespace {

using namespace fixtures;
using tda::CheckpointError;

TEST(gguf_values_of_every_kind) {
  Folder folder;
  const std::string keys =
      entry("u8", 0, raw(std::uint8_t{200})) + entry("i8", 1, raw(std::int8_t{-100})) +
      entry("u16", 2, raw(std::uint16_t{60000})) + entry("i16", 3, raw(std::int16_t{-30000})) +
      entry("u32", 4, u32(4'000'000'000)) + entry("i32", 5, raw(std::int32_t{-2'000'000'000})) +
      entry("f32", 6, raw(0.5f)) + entry("true", 7, "\1") + entry("also true", 7, "\2") +
      text_entry("text", "\xc3\xbc") + entry("u64", 10, u64(~0ull)) +
      entry("i64", 11, u64(1ull << 63)) + entry("f64", 12, raw(0.1)) +
      array_entry("numbers", 5, 2, raw(std::int32_t{1}) + raw(std::int32_t{-2})) +
      array_entry("texts", 8, 2, gguf_text("") + gguf_text("a")) + array_entry("none", 8, 0) +
      array_entry("flags", 7, 2, std::string("\1\0", 2));
  for (const std::uint32_t version : {2, 3}) {
    const tda::GgufFile file(folder.write("a.gguf", gguf(17, 0, keys, version)));
    CHECK(file.value("u8") == 200 && file.value("i8") == -100 && file.value("u16") == 60000);
    CHECK(file.value("i16") == -30000 && file.value("u32") == 4'000'000'000);
    CHECK(file.value("i32") == -2'000'000'000 && file.value("f32") == 0.5);
    CHECK(file.value("true") == true && file.value("also true") == true);
    CHECK(file.value("text") == "\xc3\xbc" && file.value("u64") == ~0ull);
    CHECK(file.value("i64") == std::int64_t{1} << 63 && file.value("f64") == 0.1);
    CHECK(file.value("numbers") == json({1, -2}) && file.value("texts") == json({"", "a"}));
    CHECK(file.value("none") == json::array() && file.value("flags") == json({true, false}));
    CHECK(file.value("absent").is_null() && file.tensors().empty());
  }
}

TEST(gguf_tensors_and_alignment) {
  Folder folder;
  for (const std::uint32_t alignment : {8u, 32u, 4096u}) {
    const std::uint32_t end = (24 + alignment - 1) / alignment * alignment;
    std::string head = gguf(1, 2,
                            entry("general.alignment", kU32, u32(alignment)) +
                                described("a", {3, 2}) + described("b", {32}, 2, end));
    head.resize((head.size() + alignment - 1) / alignment * alignment);
    const std::size_t begin = head.size();
    head += encode("F32", {1, 2, 3, 4, 5, 6});
    head.resize(begin + end);
    const tda::GgufFile file(folder.write("a.gguf", head + std::string(18, '\1')));
    const tda::TensorView& a = file.tensors().at("a");
    CHECK((a.shape == std::vector<std::int64_t>{2, 3}) && a.dtype == tda::DType::f32);
    CHECK(a.begin == static_cast<std::int64_t>(begin) && a.bytes == 24 && a.dtype_name == "F32");
    float row[3];
    a.read_rows(1, 1, reinterpret_cast<std::byte*>(row));
    CHECK(row[0] == 4 && row[1] == 5 && row[2] == 6);
    const tda::TensorView& b = file.tensors().at("b");
    CHECK(b.dtype == tda::DType::q4_0 && b.bytes == 18 && b.dtype_name == "Q4_0");
  }
}

TEST(gguf_refuses_damaged_files) {
  struct Case {
    std::string content;
    const char* message;
  };
  const std::string data(99, '\0');
  const Case cases[] = {
      {"", "begins with fewer than 8 bytes, expected a GGUF file"},
      {"GGUF", "begins with fewer than 8 bytes"},
      {"GGML" + data, "begins with \"GGML\", expected a GGUF file"},
      {"\xff\xfe\n\t" + data, "begins with \"\\ufffd\\ufffd\\n\\t\""},
      {gguf(0, 0, "", 0), "version 0 of GGUF, expected 2 or 3"},
      {gguf(0, 0, "", 1), "version 1 of GGUF, expected 2 or 3"},
      {gguf(0, 0, "", 4), "version 4 of GGUF, expected 2 or 3"},
      {gguf(0, 0, "", 3u << 24), "a big-endian GGUF file, expected a little-endian one"},
      {gguf(0, 0, "").substr(0, 12), "8 bytes of the number of tensors at byte 8"},
      {gguf(1ull << 60, 0, ""), "found 1152921504606846976 keys, expected at most 65536"},
      {gguf(0, 1ull << 63, ""), "found 9223372036854775808 tensors, expected at most 65536"},
      {gguf(2, 0, entry("a", kU8, "1")), "up to the end of the file"},
      {gguf(1, 0, gguf_text(std::string(70'000, 'a'))), "key 0 with a name of 70000 bytes"},
      {gguf(1, 0, u64(1ull << 40)), "found 1099511627776 bytes of key 0 at byte 32"},
      {gguf(1, 0, u64(~0ull)), "found 2^63 or more bytes of key 0"},
      {gguf(1, 0, gguf_text("\xff") + data), "key 0 named \"\\ufffd\", expected printable ASCII"},
      {gguf(1, 0, entry("a", 13, "")), "found type 13 for a, expected a type of values, 0 to 12"},
      {gguf(1, 0, entry("a", kString, u64(1ull << 40))), "found 1099511627776 bytes of a at"},
      {gguf(1, 0, entry("a", kString, u64(1ull << 63))), "found 2^63 or more bytes of a at"},
      {gguf(1, 0, entry("a", kU64, "1234567")), "found 8 bytes of a at byte 37, expected at most"},
      {gguf(1, 0, array_entry("a", kU8, 1ull << 60)), "found 1152921504606846976 bytes of a"},
      {gguf(1, 0, array_entry("a", kU64, 1ull << 61)), "found 2^63 or more bytes of a"},
      {gguf(1, 0, array_entry("a", kString, 1ull << 60)), "found 2^63 or more bytes of a"},
      {gguf(1, 0, array_entry("a", kString, 1, u64(1ull << 60))), "1152921504606846976 bytes of a"},
      {gguf(1, 0, array_entry("a", kArray, 1)), "an array of type 9 for a, expected one of"},
      {gguf(1, 0, array_entry("a", 13, 1)), "an array of type 13 for a, expected one of"},
      {gguf(2, 0, entry("a", kU8, "1") + entry("a", kU8, "1")), "the key a twice"},
      {gguf(0, 1, described("t", {})), "tensor \"t\" with 0 dimensions, expected 1 to 4"},
      {gguf(0, 1, described("t", {1, 1, 1, 1, 1})), "tensor \"t\" with 5 dimensions"},
      {gguf(0, 1, gguf_text("t") + u32(1u << 31)), "with 2147483648 dimensions"},
      {gguf(0, 1, described("t", {4, 0})), "a dimension of 0, expected 1 to 2^63 - 1"},
      {gguf(0, 1, described("t", {1ull << 63})), "a dimension of 9223372036854775808"},
      {gguf(0, 1, described("t\n", {1})), "tensor 0 named \"t\\n\", expected printable ASCII"},
      {gguf(0, 1, described("t", {4}, 99)), "of type 99, expected a type that GGML defines"},
      {gguf(0, 1, described("t", {1ull << 32, 1ull << 32, 2})), "tensor \"t\" of 2^63 or more"},
      {gguf(0, 1, described("t", {1ull << 61})), "tensor \"t\" of 2^63 or more bytes"},
      {gguf(0, 1, described("t", {33}, 2)), "of type Q4_0 with rows of 33, expected a multiple"},
      {gguf(0, 1, described("t", {8})), "tensor \"t\" up to byte 96, expected no more than the 57"},
      {gguf(0, 1, described("t", {1}, 0, 1ull << 63) + data), "at byte 9223372036854775808"},
      {gguf(0, 1, described("t", {1}, 0, 32) + data), "at byte 32 of the data, expected byte 0"},
      {gguf(0, 2, described("t", {1}) + described("u", {1}) + data), "expected byte 32"},
      {gguf(0, 2, described("t", {1}) + described("t", {1}, 0, 32) + data), "\"t\" twice"},
      {gguf(1, 0, entry("general.alignment", kU32, u32(0))), "general.alignment is 0"},
      {gguf(1, 0, entry("general.alignment", kU32, u32(3))), "general.alignment is 3"},
      {gguf(1, 0, entry("general.alignment", kU64, u64(1ull << 63))), "9223372036854775808"},
      {gguf(1, 0, entry("general.alignment", kU32, u32(~0u))), "expected a power of two"},
      {gguf(1, 0, text_entry("general.alignment", "32")), "general.alignment is \"32\""},
      {gguf(0, 0, ""), "general.architecture is missing, expected a string"},
  };
  Folder folder;
  for (const Case& c : cases) {
    const fs::path path = folder.write("damaged.gguf", c.content);
    CHECK_THROWS(tda::GgufModel(path), CheckpointError, c.message);
    CHECK_THROWS(tda::Checkpoint(path), CheckpointError, "damaged.gguf: ");
  }
}

TEST(gguf_types_that_are_not_supported_are_named) {
  Folder folder;
  const std::pair<std::uint32_t, const char*> types[] = {
      {4, "Q4_2"},      {16, "IQ2_XXS"}, {18, "IQ3_XXS"}, {29, "IQ1_M"},
      {31, "Q4_0_4_4"}, {34, "TQ1_0"},   {39, "MXFP4"},   {26, "I32"}};
  for (const auto& [id, name] : types) {
    const auto path = folder.write("a.gguf", gguf(0, 1, described("t", {256}, id)));
    CHECK_THROWS(tda::GgufFile(path), CheckpointError, "\"t\" of type " + std::string(name) + ",");
    CHECK_THROWS(tda::GgufFile(path), CheckpointError, "llama-quantize");
  }
}

TEST(gguf_long_arrays_cost_nothing_until_asked_for) {
  Folder folder;
  constexpr std::uint64_t count = 100'000'000;
  const fs::path path = folder.write("a.gguf", gguf(1, 0, array_entry("a", kU8, count)));
  fs::resize_file(path, fs::file_size(path) + count);
  rusage before, after;
  getrusage(RUSAGE_SELF, &before);
  const tda::GgufFile file(path);
  getrusage(RUSAGE_SELF, &after);
  CHECK(file.values().at("a").count == count);
  CHECK(after.ru_maxrss - before.ru_maxrss < 4096);  // KiB
  CHECK_THROWS(file.value("a"), CheckpointError, "an array of 100000000, expected at most 4194304");
}

TEST(gguf_that_changes_while_it_is_read) {
  Folder folder;
  const std::string good =
      gguf(1, 0, array_entry("a", kString, 2, gguf_text("x") + gguf_text("y")));
  const fs::path path = folder.write("a.gguf", good);
  const tda::GgufFile file(path);
  for (const std::uint64_t length : {std::uint64_t{2}, std::uint64_t{9}, ~std::uint64_t{0}}) {
    std::string changed = good;
    changed.replace(good.size() - 18, 8, u64(length));
    folder.write("a.gguf", changed);
    CHECK_THROWS(file.value("a"), CheckpointError, "a has changed meanwhile");
  }
  folder.write("a.gguf", good.substr(0, good.size() - 1));
  CHECK_THROWS(file.value("a"), CheckpointError, "cut short");
}

// ---- models -------------------------------------------------------------------------------------

const std::pair<const char*, const char*> tensor_names[] = {
    {"model.embed_tokens", "token_embd"},
    {"model.norm", "output_norm"},
    {"lm_head", "output"},
    {"input_layernorm", "attn_norm"},
    {"self_attn.q_proj", "attn_q"},
    {"self_attn.k_proj", "attn_k"},
    {"self_attn.v_proj", "attn_v"},
    {"self_attn.o_proj", "attn_output"},
    {"self_attn.q_norm", "attn_q_norm"},
    {"self_attn.k_norm", "attn_k_norm"},
    {"post_attention_layernorm", "ffn_norm"},
    {"mlp.gate_proj", "ffn_gate"},
    {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"},
};

std::string gguf_name(std::string name) {
  for (const auto& [from, to] : tensor_names)
    if (const auto at = name.find(from); at != name.npos)
      name.replace(at, std::string(from).size(), to);
  return name.starts_with("model.layers.") ? "blk." + name.substr(13) : name;
}

/// Rows i and i + head / 2 of each head become neighbours.
Tensor in_pairs(const Tensor& tensor, std::int64_t heads) {
  const std::int64_t rows = tensor.shape[0], head = rows / heads;
  const std::int64_t cols = std::ssize(tensor.values) / rows;
  Tensor result{tensor.shape, {}};
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t in_head = r % head;
    const auto from =
        tensor.values.begin() + (r - in_head + in_head % 2 * (head / 2) + in_head / 2) * cols;
    result.values.insert(result.values.end(), from, from + cols);
  }
  return result;
}

GgufWriter model_of(const json& config, const Tensors& tensors, const std::string& architecture) {
  GgufWriter writer{gguf_entries(config, architecture), {}};
  for (const auto& [name, tensor] : tensors) {
    const bool q = name.find("q_proj") != name.npos, k = name.find("k_proj") != name.npos;
    const char* const heads = q ? "num_attention_heads" : "num_key_value_heads";
    const bool rotated = architecture == "llama" && (q || k);
    writer.tensors.emplace_back(
        gguf_name(name), rotated ? in_pairs(tensor, config[heads].get<std::int64_t>()) : tensor);
  }
  return writer;
}

json with_type(const char* type, const json& changes = json::object()) {
  json config = updated(tiny, changes);
  config["model_type"] = type;
  config.erase("architectures");
  return config;
}

TEST(gguf_gives_the_same_model_as_its_folder) {
  struct Case {
    json config;
    const char* architecture;
  };
  const Case cases[] = {
      {with_type("llama", {{"bos_token_id", nullptr}, {"eos_token_id", nullptr}}), "llama"},
      {with_type("llama", {{"tie_word_embeddings", true}}), "llama"},
      {with_type("llama", {{"attention_bias", true}}), "llama"},
      {with_type("qwen2"), "qwen2"},
      {with_type("qwen3", {{"head_dim", 12}, {"tie_word_embeddings", true}}), "qwen3"},
  };
  for (const Case& c : cases) {
    Folder folder;
    const Tensors tensors = tensors_of(c.config);
    GgufWriter writer = model_of(c.config, tensors, c.architecture);
    if (c.config.contains("head_dim"))
      writer.entries.push_back(
          entry("qwen3.attention.key_length", kU32, u32(c.config["head_dim"].get<unsigned>())));
    write_model(folder, updated(c.config, {{"rms_norm_eps", 1e-5}}), tensors, "F32");
    const tda::Checkpoint expected(folder.path);
    const tda::Checkpoint found(folder.write("model.gguf", writer.file()));
    CHECK(found.parameters() == expected.parameters() && found.name() == "model.gguf");
    CHECK(found.natural_format() == tda::WeightFormat::f32);
    CHECK(found.config().rms_norm_eps == 1e-5 && found.config().head_dim == 12);
    CHECK(found.config().model_type == c.config["model_type"]);
    for (const tda::WeightFormat format :
         {tda::WeightFormat::f32, tda::WeightFormat::bf16, tda::WeightFormat::int8,
          tda::WeightFormat::int4, tda::WeightFormat::graded, tda::WeightFormat::bf16c}) {
      const auto a = tda::load_model(expected, format, 2), b = tda::load_model(found, format, 2);
      CHECK(a->weight_bytes == b->weight_bytes);
      const auto* const first = static_cast<const std::byte*>(a->storage.get());
      CHECK(std::equal(first, first + a->weight_bytes,
                       static_cast<const std::byte*>(b->storage.get())));
    }
  }
}

TEST(gguf_fingerprints_differ_by_any_tensor) {
  Folder folder;
  const json config = with_type("llama");
  GgufWriter writer = model_of(config, tensors_of(config), "llama");
  const auto fingerprint = [&] {
    return tda::Checkpoint(folder.write("a.gguf", writer.file())).fingerprint();
  };
  const std::string one = fingerprint();
  CHECK(one.size() == 16 && fingerprint() == one);
  writer.entries.push_back(text_entry("general.name", "another"));
  CHECK(fingerprint() == one);
  writer.tensors[3].second.values[0] += 1;
  CHECK(fingerprint() != one);
}

TEST(gguf_in_several_files) {
  const json config = with_type("llama");
  const GgufWriter whole = model_of(config, tensors_of(config), "llama");
  const auto middle = whole.tensors.begin() + 9;
  const auto part = [](std::uint32_t number, std::uint32_t count) {
    return std::vector{entry("split.no", 2, raw(static_cast<std::uint16_t>(number))),
                       entry("split.count", 2, raw(static_cast<std::uint16_t>(count)))};
  };
  Folder folder;
  const std::string first = "m-00001-of-00002.gguf", second = "m-00002-of-00002.gguf";
  const auto write = [&](const std::string& name, std::vector<std::string> entries,
                         std::vector<std::pair<std::string, Tensor>> tensors) {
    return folder.write(name, GgufWriter{std::move(entries), std::move(tensors)}.file());
  };
  std::vector<std::string> entries = part(0, 2);
  entries.insert(entries.end(), whole.entries.begin(), whole.entries.end());
  const fs::path path = write(first, entries, {whole.tensors.begin(), middle});
  const auto opened = [&] { return tda::Checkpoint(path); };
  CHECK_THROWS(opened(), CheckpointError, second + ": No such file");
  const fs::path other = write(second, part(1, 2), {middle, whole.tensors.end()});
  const tda::Checkpoint one(folder.write("one.gguf", whole.file()));
  CHECK(opened().fingerprint() == one.fingerprint() && opened().parameters() == one.parameters());
  CHECK_THROWS(tda::Checkpoint(other), CheckpointError, "one of the 2 files of a model, expected");
  write(second, part(0, 2), {middle, whole.tensors.end()});
  CHECK_THROWS(opened(), CheckpointError, second + ": split.no is 0, expected 1");
  write(second, part(1, 3), {middle, whole.tensors.end()});
  CHECK_THROWS(opened(), CheckpointError, second + ": split.count is 3, expected 2");
  write(second, part(1, 2), {middle - 1, whole.tensors.end()});
  CHECK_THROWS(opened(), CheckpointError, (middle - 1)->first + "\" is also in ");
  write(second, part(1, 2), {middle + 1, whole.tensors.end()});
  CHECK_THROWS(opened(), CheckpointError, middle->first + "\" is missing");
  write(first, {text_entry("split.count", "two")}, {});
  CHECK_THROWS(opened(), CheckpointError, "split.count is \"two\", expected 1 to 99999");
}

TEST(gguf_keys_and_tensors_of_no_model) {
  struct Case {
    std::string added;
    const char* message;
  };
  const auto number = [](const char* key, float value) { return entry(key, kF32, raw(value)); };
  const Case keys[] = {
      {text_entry("general.type", "adapter"), "general.type is \"adapter\", expected \"model\""},
      {entry("llama.expert_count", kU32, u32(8)), "llama.expert_count is 8, expected 0"},
      {entry("llama.of_the_future", kU32, u32(1)), "llama.of_the_future is 1, expected no key"},
      {number("llama.rope.freq_base", 0.0f / 0.0f), "llama.rope.freq_base is null, expected"},
      {number("llama.rope.freq_base", 0.5f), "rope_theta is 0.5, expected a number above 1"},
      {entry("llama.rope.freq_base", kU32, u32(9)), "expected a floating-point number"},
      {number("llama.attention.scale", 0.5f),
       "llama.attention.scale is 0.5, expected 1 / sqrt(12)"},
      {entry("llama.vocab_size", kU32, u32(8)), "llama.vocab_size is 8, expected 7"},
      {entry("llama.attention.key_length", kU64, u64(1ull << 63)), "an integer below 2^63"},
      {entry("llama.attention.key_length", kU32, u32(0)), "head_dim is 0, expected an integer"},
      {entry("tokenizer.ggml.eos_token_id", kU32, u32(7)), "eos_token_id is 7, expected 0 to 6"},
      {text_entry("llama.rope.scaling.type", "longrope"), "\"longrope\", expected none, linear or"},
      {number("llama.rope.scaling.factor", -2), "scaling.factor is -2.0, expected a number above"},
      {entry("split.tensors.count", kU32, u32(99)), "split.tensors.count is 99, expected"},
  };
  const json config = with_type("llama");
  const GgufWriter good = model_of(config, tensors_of(config), "llama");
  Folder folder;
  const auto refused = [&](const GgufWriter& writer, const std::string& message) {
    const fs::path path = folder.write("a.gguf", writer.file());
    CHECK_THROWS(tda::Checkpoint(path), CheckpointError, message);
    CHECK_THROWS(tda::Checkpoint(path), CheckpointError, "a.gguf");
  };
  for (const Case& c : keys) {
    GgufWriter bad = good;
    bad.entries.push_back(c.added);
    refused(bad, c.message);
  }
  GgufWriter bad = good;
  bad.entries[0] = text_entry("general.architecture", "gemma");
  refused(bad, "general.architecture is \"gemma\", expected llama, qwen2, qwen3");
  bad = good;
  bad.tensors[5].first = "blk.0.another.weight";
  refused(bad, "tensor \"" + good.tensors[5].first + "\" is missing");
  bad = good;
  bad.tensors.emplace_back("blk.9.ffn_up.weight", Tensor{{1}, {1}});
  refused(bad, "tensor \"blk.9.ffn_up.weight\" is unknown, expected those of a dense llama model");
  bad = good;
  const auto norm =
      std::ranges::find(bad.tensors, "output_norm.weight", &std::pair<std::string, Tensor>::first);
  norm->second.shape = {2, 36};
  refused(bad, "tensor \"output_norm.weight\" has shape [2,36], expected [72]");
}

}  // namespace

int main() { return run_tests(); }
