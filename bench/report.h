#pragma once

#include <benchmark/benchmark.h>

#include <map>
#include <string>
#include <vector>

#include "core/json.h"
#include "peaks.h"

namespace flexcore::bench {

/// Prints a row for each case as it is done, and keeps all for the JSON file.
class Report : public benchmark::BenchmarkReporter {
 public:
  Report(const std::vector<cases::CaseSpec>& table, const Peaks& peaks, bool quiet);

  bool ReportContext(const Context& context) override;
  void ReportRuns(const std::vector<Run>& runs) override;

  /// Rows with floors by `peaks`, which may have improved since the rows were printed.
  Json::Array rows(const Peaks& peaks) const;

 private:
  struct Row {
    const cases::CaseSpec* spec;
    double median, fastest, slowest;  // seconds a call
    std::int64_t repetitions;
  };
  std::map<std::string, const cases::CaseSpec*> specs_;
  Peaks peaks_;
  bool quiet_;
  std::vector<Row> rows_;
};

Json to_json(const Peaks& peaks);
/// CPU, instruction set, cores, threads; the GPU if its name is given.
Json machine(int num_threads, const std::string& gpu);

}  // namespace flexcore::bench
