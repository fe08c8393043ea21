#include "engine/step_time_file.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "engine_fixture.h"

namespace flexcore {
namespace {

class StepTimeFileTest : public EngineTest {
 protected:
  StepTimeFile file(int threads = 2) { return {ModelConfig::load(path()), small(), "a processor", threads}; }
  std::vector<std::filesystem::path> kept() {
    std::vector<std::filesystem::path> found;
    const std::filesystem::path directory = dir_.path("cache/step_time");
    if (std::filesystem::exists(directory))
      for (const auto& entry : std::filesystem::directory_iterator(directory)) found.push_back(entry.path());
    return found;
  }
  static std::vector<double> some() {
    std::vector<double> values(CostModel::kTerms);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = 0.1 + 0.7 * static_cast<double>(i);
    return values;
  }
};

TEST_F(StepTimeFileTest, WhatIsSavedIsLoadedByItsLikeOnly) {
  EXPECT_FALSE(file().load());
  file().save(some());
  EXPECT_EQ(file().load(), some());
  EXPECT_FALSE(file(3).load());
}

TEST_F(StepTimeFileTest, WhatIsBrokenIsNothing) {
  file().save(some());
  for (const char* text : {"", "{", "[]", R"({"engine": "other", "step_time_ms": {}})"}) {
    std::ofstream(kept().at(0)) << text;
    EXPECT_FALSE(file().load()) << text;
  }
  setenv("FLEXCORE_CACHE", "/proc/nowhere", 1);
  file().save(some());
  EXPECT_FALSE(file().load());
}

TEST_F(StepTimeFileTest, AnEngineLeavesOneForTheNext) {
  load();
  ASSERT_EQ(kept().size(), 1u);
  std::ifstream file(kept()[0]);
  const std::string text(std::istreambuf_iterator<char>(file), {});
  EXPECT_NE(text.find("LlamaForCausalLM 3x32x48"), std::string::npos) << text;
  for (const char* name : CostModel::term_names()) EXPECT_NE(text.find(name), std::string::npos) << name;
  load();
  EXPECT_EQ(kept().size(), 1u);
}

}  // namespace
}  // namespace flexcore
