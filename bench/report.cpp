#include "report.h"

#include <algorithm>
#include <cstdio>
#include <thread>

#include "backends/cpu/isa.h"
#include "backends/register.h"

namespace flexcore::bench {

namespace {

const char* bound(const Peaks& peaks, const cases::Cost& cost) {
  return peaks.arithmetic_seconds(cost) > peaks.memory_seconds(cost) ? "arithmetic" : "memory";
}

}  // namespace

Report::Report(const std::vector<cases::CaseSpec>& table, const Peaks& peaks, bool quiet)
    : peaks_(peaks), quiet_(quiet) {
  for (const auto& spec : table) specs_.emplace(spec.name(), &spec);
}

bool Report::ReportContext(const Context&) {
  if (!quiet_)
    std::printf("%-70s %12s %9s %9s %12s %6s  %s\n", "case", "median us", "GB/s", "GFLOP/s", "floor us", "of it",
                "bound by");
  return true;
}

void Report::ReportRuns(const std::vector<Run>& runs) {
  std::vector<double> seconds;
  std::string name;
  for (const auto& run : runs) {
    if (run.run_type != Run::RT_Iteration) continue;
    name = run.run_name.function_name;
    if (run.error_occurred)
      std::fprintf(stderr, "%s: %s\n", name.c_str(), run.error_message.c_str());
    else
      seconds.push_back(run.real_accumulated_time / static_cast<double>(run.iterations));
  }
  if (seconds.empty()) return;
  std::sort(seconds.begin(), seconds.end());
  const auto& spec = *specs_.at(name);
  const Row row{&spec, seconds[seconds.size() / 2], seconds.front(), seconds.back(),
                static_cast<std::int64_t>(seconds.size())};
  rows_.push_back(row);
  if (quiet_) return;
  std::printf("%-70s %12.1f %9.1f %9.1f %12.1f %5.0f%%  %s\n", name.c_str(), 1e6 * row.median,
              1e-9 * (spec.cost.read + spec.cost.written) / row.median, 1e-9 * spec.cost.flops / row.median,
              1e6 * peaks_.floor(spec.cost), 100 * peaks_.floor(spec.cost) / row.median, bound(peaks_, spec.cost));
  std::fflush(stdout);
}

Json::Array Report::rows(const Peaks& peaks) const {
  Json::Array out;
  for (const auto& row : rows_) {
    const auto& spec = *row.spec;
    out.push_back(Json::Object{{"name", spec.name()},
                               {"op", spec.op},
                               {"model", spec.model},
                               {"shape", spec.shape},
                               {"median_us", 1e6 * row.median},
                               {"fastest_us", 1e6 * row.fastest},
                               {"slowest_us", 1e6 * row.slowest},
                               {"repetitions", row.repetitions},
                               {"bytes_read", spec.cost.read},
                               {"bytes_written", spec.cost.written},
                               {"flops", spec.cost.flops},
                               {"floor_us", 1e6 * peaks.floor(spec.cost)},
                               {"fraction_of_floor", peaks.floor(spec.cost) / row.median},
                               {"bound", bound(peaks, spec.cost)}});
  }
  return out;
}

Json to_json(const Peaks& peaks) {
  return Json::Object{{"read_bytes_per_s", peaks.read_bandwidth},
                      {"copy_bytes_per_s", peaks.copy_bandwidth},
                      {"float32_flops", peaks.float32_flops},
                      {"bfloat16_flops", peaks.bfloat16_flops}};
}

Json machine(int num_threads, const std::string& gpu) {
  Json::Object out{{"cpu", open_device({})->name()},
                   {"isa", cpu::isa_name(cpu::active_isa())},
                   {"cores", static_cast<std::int64_t>(std::thread::hardware_concurrency())},
                   {"threads", num_threads}};
  if (!gpu.empty()) out.emplace_back("gpu", gpu);
  return out;
}

}  // namespace flexcore::bench
