#include "model/safetensors.h"

#include <numeric>
#include <random>

#include "core/check.h"
#include "flexcore/error.h"
#include "temp_dir.h"

namespace flexcore {
namespace {

/// A file with this header, and `bytes` bytes of data: 0, 1, 2, ...
std::string file_of(const std::string& header, std::size_t bytes) {
  std::uint64_t length = header.size();
  std::string text(reinterpret_cast<const char*>(&length), 8);
  text += header;
  for (std::size_t i = 0; i < bytes; ++i) text += static_cast<char>(i);
  return text;
}

std::string refusal(const std::string& content) {
  const TempDir dir;
  const auto path = dir.write("x.safetensors", content);
  const auto message = message_of<ModelLoadError>([&] { SafetensorsModel model(path); });
  EXPECT_HAS(message, path);
  return message;
}

std::string refusal(const std::string& header, std::size_t bytes) { return refusal(file_of(header, bytes)); }

class Safetensors : public testing::Test {
 protected:
  Safetensors() { std::iota(values_.begin(), values_.end(), 0.5f); }

  void write(const std::string& name, std::vector<std::string> tensors) {
    std::vector<std::pair<std::string, TensorView>> views;
    for (auto& tensor : tensors)
      views.emplace_back(std::move(tensor), TensorView(values_.data(), DType::kFloat32, {2, 3}));
    write_safetensors(dir_.path(name), views);
  }

  TempDir dir_;
  std::vector<float> values_ = std::vector<float>(6);
};

TEST_F(Safetensors, WritesWhatItReads) {
  std::vector<std::uint16_t> half{1, 2, 3};
  std::int64_t scalar = -7;
  const std::vector<std::pair<std::string, TensorView>> tensors{
      {"half", {half.data(), DType::kBFloat16, {3}}},
      {"matrix", {values_.data(), DType::kFloat32, {3, 2}}},
      {"none", {nullptr, DType::kFloat32, {0, 4}}},
      {"scalar", {&scalar, DType::kInt64, {}}},
  };
  const auto path = dir_.path("model.safetensors");
  write_safetensors(path, tensors);
  const SafetensorsModel model(dir_.path());
  ASSERT_EQ(model.entries().size(), 4u);
  for (const auto& [name, tensor] : tensors) {
    const auto back = model.tensor(name);
    EXPECT_EQ(back.describe(), tensor.describe());
    ASSERT_EQ(back.bytes(), tensor.bytes());
    EXPECT_EQ(std::string_view(back.as<char>(), back.bytes()), std::string_view(tensor.as<char>(), tensor.bytes()));
  }
  model.prefetch(*model.find("matrix"));
  model.release(*model.find("matrix"));
  EXPECT_EQ(model.tensor("matrix").as<char>()[1], reinterpret_cast<char*>(values_.data())[1]);
  EXPECT_EQ(model.find("matrx"), nullptr);
  EXPECT_HAS(message_of<ModelLoadError>([&] { model.tensor("matrx"); }), "no tensor matrx");
  EXPECT_HAS(dir_.read("model.safetensors"), R"({"__metadata__":{"format":"pt"},"half":{"dtype":"BF16")");
}

TEST_F(Safetensors, AlignsTheData) {
  write("f", {"a"});
  const SafetensorsModel model(dir_.path("f"));
  EXPECT_EQ(model.entries()[0].offset % 8, 0u);
}

TEST_F(Safetensors, RefusesToWriteNonsense) {
  EXPECT_HAS(message_of<InvalidArgument>([&] { write("f", {"a", "a"}); }), "tensor a: name taken");
  const std::vector<std::pair<std::string, TensorView>> empty{{"a", {nullptr, DType::kFloat32, {2}}}};
  EXPECT_THROW(write_safetensors(dir_.path("f"), empty), InvalidArgument);
  EXPECT_EQ(dir_.entries(), 0u);
}

TEST_F(Safetensors, ReadsShards) {
  write("model-1.safetensors", {"a", "b"});
  write("model-2.safetensors", {"c"});
  const auto index = [&](const char* map) {
    dir_.write("model.safetensors.index.json", str(R"({"metadata": {}, "weight_map": )", map, "}"));
    return dir_.path();
  };
  const SafetensorsModel model(
      index(R"({"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"})"));
  EXPECT_EQ(model.entries().size(), 3u);
  EXPECT_HAS(model.describe(*model.find("c")), "model-2.safetensors: tensor c");
  const auto refused = [&](const char* map) {
    return message_of<ModelLoadError>([&] { SafetensorsModel bad(index(map)); });
  };
  EXPECT_HAS(refused(R"({"a": "model-3.safetensors"})"), "model-3.safetensors: missing shard");
  EXPECT_HAS(refused(R"({"z": "model-1.safetensors"})"), "no tensor z");
  EXPECT_HAS(refused(R"({"a": "../x"})"), "wanted a file name");
  EXPECT_HAS(refused(R"({"a": 1})"), "wanted a file name");
  EXPECT_HAS(refused("[]"), "weight_map");
  EXPECT_HAS(refused("{}"), "weight_map");
  write("model-2.safetensors", {"a"});
  EXPECT_HAS(refused(R"({"b": "model-1.safetensors", "a": "model-2.safetensors"})"), "tensor a: there is another");
}

TEST_F(Safetensors, SaysWhenWeightsAreMissingOrOfAnotherFormat) {
  EXPECT_HAS(message_of<ModelLoadError>([&] { SafetensorsModel model(dir_.path()); }), "no model.safetensors");
  EXPECT_HAS(message_of<ModelLoadError>([&] { SafetensorsModel model(dir_.path("none")); }), "No such file");
  dir_.write("pytorch_model.bin", "x");
  EXPECT_HAS(message_of<Unsupported>([&] { SafetensorsModel model(dir_.path()); }), "pytorch_model.bin");
}

TEST(SafetensorsHeader, IsCheckedWhole) {
  EXPECT_HAS(refusal(""), "too short");
  EXPECT_HAS(refusal("1234567"), "too short");
  EXPECT_HAS(refusal(std::string(8, '\xff')), "header of 18446744073709551615 bytes");
  EXPECT_HAS(refusal(file_of("{}", 0).substr(0, 9)), "truncated");
  EXPECT_HAS(refusal("{", 0), "header: json");
  EXPECT_HAS(refusal("[]", 0), "wanted an object");
  EXPECT_HAS(refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}})", 4), "twice");
  EXPECT_HAS(refusal(R"({"a":{}})", 0), "tensor a");
  EXPECT_HAS(refusal(R"({"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}})", 4), "dtype \"X\" is unknown");
  EXPECT_HAS(refusal(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4), "-1");
  EXPECT_HAS(refusal(R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", 4), "1.0");
  EXPECT_HAS(refusal(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4), "wanted 8 bytes");
  EXPECT_HAS(refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4), "data_offsets [4,0]");
  EXPECT_HAS(refusal(R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})", 0),
             "more elements");
  EXPECT_HAS(refusal(R"({"a":{"dtype":"F4","shape":[1],"data_offsets":[0,0]}})", 0), "whole bytes");
  EXPECT_HAS(refusal(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4), "truncated: tensor a");
  EXPECT_HAS(refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 5), "1 bytes after the last");
  EXPECT_HAS(refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8), "gap");
  EXPECT_HAS(
      refusal(
          R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[2],"data_offsets":[6,8]}})",
          8),
      "tensor b: overlaps");
}

TEST(SafetensorsHeader, AllowsDtypesThatNobodyLooksAt) {
  const TempDir dir;
  const auto path = dir.write(
      "x",
      file_of(
          R"({"a":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[3,4]}})",
          4));
  const SafetensorsModel model(path);
  EXPECT_HAS(message_of<Unsupported>([&] { model.tensor("a"); }), "tensor a: dtype F8_E4M3");
  EXPECT_HAS(message_of<ModelLoadError>([&] { model.tensor("b"); }), "5 dimensions");
}

TEST(SafetensorsHeader, SurvivesDamage) {
  const TempDir dir;
  const auto whole = file_of(
      R"({"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}})",
      14);
  std::mt19937 random(1);
  for (int round = 0; round < 500; ++round) {
    std::string text = whole.substr(0, random() % 4 == 0 ? random() % whole.size() : whole.size());
    for (int i = 0; i < 2 && !text.empty(); ++i) text[random() % text.size()] = static_cast<char>(random());
    const auto path = dir.write("x", text);
    try {
      const SafetensorsModel model(path);
      for (const auto& entry : model.entries()) {
        const auto view = model.tensor(entry.name);
        unsigned sum = 0;
        for (std::size_t i = 0; i < view.bytes(); ++i) sum += view.as<unsigned char>()[i];
        EXPECT_LE(sum, 255u * view.bytes());
      }
    } catch (const Error&) {
    }
  }
}

}  // namespace
}  // namespace flexcore
