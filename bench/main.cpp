// flexcore_bench: every op at the shapes of real models, beside the time that memory or arithmetic alone would take.
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <regex>

#include "backends/register.h"
#include "memory/arena.h"
#include "report.h"

namespace flexcore::bench {
namespace {

constexpr const char* kUsage =
    R"(usage: flexcore_bench [--filter REGEX] [--threads N] [--quick] [--probe] [--list] [--json FILE]
  --filter REGEX  only cases whose name matches, for example linear/smollm2 or lora
  --threads N     threads of the ops and of the probes (default: all cores)
  --quick         one short repetition a case: to see that all runs, not to compare
  --probe         the machine's peaks alone
  --list          names, nothing is run
  --json FILE     write the numbers; - is standard output, and nothing else is printed there
)";

struct Options {
  std::string filter, json;
  int threads = 0;
  bool quick = false, probe = false, list = false;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const auto value = [&]() -> std::string {
      if (++i == argc) throw InvalidArgument(flag + ": wanted a value after it");
      return argv[i];
    };
    if (flag == "--filter")
      options.filter = value();
    else if (flag == "--json")
      options.json = value();
    else if (flag == "--threads")
      options.threads = std::atoi(value().c_str());
    else if (flag == "--quick")
      options.quick = true;
    else if (flag == "--probe")
      options.probe = true;
    else if (flag == "--list")
      options.list = true;
    else
      throw InvalidArgument(flag + ": no such option\n" + kUsage);
  }
  return options;
}

/// Copies of a case's data that together do not fit in the cache: each call finds its own cold.
std::int64_t copies(const cases::Cost& cost) {
  constexpr double kMost = 400;
  return static_cast<std::int64_t>(
      std::clamp(std::ceil(2 * cache_bytes() / (cost.read + cost.written)) + 1, 1.0, kMost));
}

/// The case whose data are in memory. Google Benchmark calls a function once a repetition, and data take longer to make
/// than to use.
class Stage {
 public:
  explicit Stage(OpContext& context) : context_(context) {}

  void time(benchmark::State& state, const cases::CaseSpec& spec) {
    try {
      if (spec_ != &spec) set_up(spec);
      for (auto _ : state) case_->run(context_, turn_++);
    } catch (const std::exception& error) {
      state.SkipWithError(error.what());
    }
  }

 private:
  void set_up(const cases::CaseSpec& spec) {
    spec_ = nullptr;
    case_.reset();  // before the next one takes its memory
    case_ = spec.make(context_, copies(spec.cost));
    case_->run(context_, turn_++);
    spec_ = &spec;
  }

  OpContext& context_;
  const cases::CaseSpec* spec_ = nullptr;
  std::unique_ptr<cases::OpCase> case_;
  std::int64_t turn_ = 0;
};

void write(const std::string& path, const Json& value) {
  const std::string text = value.dump(1) + "\n";
  if (path == "-") {
    std::cout << text;
    return;
  }
  std::ofstream file(path);
  file << text;
  file.close();
  if (!file) throw Error("--json: cannot write " + path);
}

int run(const Options& options) {
  auto table = cases::all_cases();
  const std::regex filter(options.filter);
  std::erase_if(table, [&](const auto& spec) { return !std::regex_search(spec.name(), filter); });
  if (options.list) {
    for (const auto& spec : table) std::printf("%s\n", spec.name().c_str());
    return 0;
  }
  MemoryLedger ledger;
  Arena scratch(host_allocator(), ledger);
  ThreadPool threads(options.threads);
  const OpRegistry registry = make_op_registry();
  OpContext context;
  context.registry = &registry;
  context.threads = &threads;
  context.scratch = &scratch;

  const bool quiet = options.json == "-";
  Peaks peaks = measure_peaks(threads);
  Report report(table, peaks, quiet);
  if (!quiet) std::printf("%s\n%s\n", machine(threads.size()).dump().c_str(), to_json(peaks).dump().c_str());
  if (!options.probe) {
    Stage stage(context);
    for (const auto& spec : table)
      benchmark::RegisterBenchmark(spec.name().c_str(), [&](benchmark::State& state) { stage.time(state, spec); })
          ->UseRealTime()
          ->MinTime(options.quick ? 0.01 : 0.1)
          ->Repetitions(options.quick ? 1 : 5)
          ->ReportAggregatesOnly(false);
    benchmark::RunSpecifiedBenchmarks(&report);
    peaks.take_best(measure_peaks(threads));
  }
  if (options.json.empty()) return 0;
  Json::Object out{{"machine", machine(threads.size())}, {"peaks", to_json(peaks)}};
  if (!options.probe) out.emplace_back("kernels", report.rows(peaks));
  write(options.json, out);
  return 0;
}

}  // namespace
}  // namespace flexcore::bench

int main(int argc, char** argv) {
  try {
    return flexcore::bench::run(flexcore::bench::parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "flexcore_bench: %s\n", error.what());
    return 1;
  }
}
