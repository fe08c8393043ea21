#include <gtest/gtest.h>

#include "cases/array.h"
#include "cases/op_case.h"
#include "op_fixture.h"

namespace flexcore::test {
namespace {

using cases::CaseSpec;

// Cases of a second or a gigabyte are for flexcore_bench alone.
std::vector<CaseSpec> quick_cases() {
  const double most_flops = emulated() ? 1e8 : 4e9, most_bytes = 100e6;
  auto table = cases::all_cases();
  std::erase_if(
      table, [&](const CaseSpec& c) { return c.cost.flops > most_flops || c.cost.read + c.cost.written > most_bytes; });
  return table;
}

class OpCases : public testing::TestWithParam<CaseSpec> {};

// What flexcore_bench times is right, at the shapes of real models.
TEST_P(OpCases, ComputesWhatItSays) {
  cases::array_allocator() = &test_runtime().pinned();
  OpFixture ops(2);
  const auto op = GetParam().make(ops.context(), 1);
  op->run(ops.context(), 0);
  test_runtime().synchronize();
  const auto accuracy = op->check();
  EXPECT_LE(accuracy.worst, accuracy.allowed);
}

INSTANTIATE_TEST_SUITE_P(Models, OpCases, testing::ValuesIn(quick_cases()), [](const auto& info) {
  std::string name = info.param.name();
  for (auto& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name;
});

TEST(OpCaseTable, NamesAreDistinct) {
  std::vector<std::string> names;
  for (const auto& c : cases::all_cases()) names.push_back(c.name());
  std::sort(names.begin(), names.end());
  EXPECT_EQ(std::adjacent_find(names.begin(), names.end()), names.end());
}

}  // namespace
}  // namespace flexcore::test
