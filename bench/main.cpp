// flexcore_bench: every op at the shapes of real models, beside the time that memory or arithmetic alone would take.
#include <benchmark/benchmark.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <regex>

#include "backends/register.h"
#include "cases/array.h"
#include "device_peaks.h"
#include "engine/impl.h"
#include "memory/arena.h"
#include "report.h"

namespace flexcore::bench {
namespace {

constexpr const char* kUsage =
    R"(usage: flexcore_bench [--device DEVICE] [--filter REGEX] [--threads N] [--quick] [--probe] [--list] [--json FILE]
  --device DEVICE cpu (default), cuda, cuda:1; auto: a GPU if there is one
  --filter REGEX  only cases whose name matches, for example linear/smollm2 or lora
  --threads N     threads of the CPU's ops and probes (default: all cores)
  --quick         one short repetition a case: to see that all runs, not to compare
  --probe         the machine's peaks alone
  --list          names, nothing is run
  --json FILE     write the numbers; - is standard output, and nothing else is printed there
)";

struct Options {
  std::string device = "cpu", filter, json;
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
    if (flag == "--device")
      options.device = value();
    else if (flag == "--filter")
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
std::int64_t copies(const cases::Cost& cost, double cache_bytes) {
  constexpr double kMost = 400;
  return static_cast<std::int64_t>(std::clamp(std::ceil(2 * cache_bytes / (cost.read + cost.written)) + 1, 1.0, kMost));
}

/// The case whose data are in memory. Google Benchmark calls a function once a repetition, and data take longer to make
/// than to use.
class Stage {
 public:
  Stage(OpContext& context, DeviceRuntime& device) : context_(context), device_(device) {}

  void time(benchmark::State& state, const cases::CaseSpec& spec) {
    try {
      if (spec_ != &spec) set_up(spec);
      while (state.KeepRunningBatch(calls_)) run();
    } catch (const std::exception& error) {
      state.SkipWithError(error.what());
    }
  }

 private:
  // Calls in a row, all of them done at the end: a device is waited for once.
  void run() {
    for (std::int64_t i = 0; i < calls_; ++i) case_->run(context_, turn_++);
    device_.synchronize();
  }

  void set_up(const cases::CaseSpec& spec) {
    spec_ = nullptr;
    case_.reset();  // before the next one takes its memory
    case_ = spec.make(context_, copies(spec.cost, static_cast<double>(device_.cache_bytes())));
    calls_ = 1;
    run();
    if (context_.device.kind != DeviceKind::kCpu) {
      constexpr double kLeastSeconds = 2e-3;  // of a row of calls, beside which waiting for it is nothing
      const double start = seconds();
      run();
      calls_ = static_cast<std::int64_t>(std::clamp(kLeastSeconds / (seconds() - start), 1.0, 1000.0));
    }
    spec_ = &spec;
  }

  static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  OpContext& context_;
  DeviceRuntime& device_;
  const cases::CaseSpec* spec_ = nullptr;
  std::unique_ptr<cases::OpCase> case_;
  std::int64_t turn_ = 0, calls_ = 1;
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
  const Device place = parse_device(options.device);
  const bool on_cpu = place.kind == DeviceKind::kCpu;
  const auto device = open_device(place);
  MemoryLedger ledger;
  Arena scratch(device->allocator(), ledger);
  ThreadPool threads(options.threads);
  const OpRegistry registry = make_op_registry();
  OpContext context;
  context.registry = &registry;
  context.device = place;
  context.threads = &threads;
  context.scratch = &scratch;
  context.stream = device->stream();
  cases::array_allocator() = &device->allocator();

  const bool quiet = options.json == "-";
  const auto probe = [&] { return on_cpu ? measure_peaks(threads) : measure_device_peaks(context, *device); };
  const Json where = machine(threads.size(), on_cpu ? "" : device->name());
  Peaks peaks = probe();
  Report report(table, peaks, quiet);
  if (!quiet) std::printf("%s\n%s\n", where.dump().c_str(), to_json(peaks).dump().c_str());
  if (!options.probe) {
    Stage stage(context, *device);
    const double least_seconds = options.quick ? 0.01 : on_cpu ? 0.1 : 0.02;
    for (const auto& spec : table)
      benchmark::RegisterBenchmark(spec.name().c_str(), [&](benchmark::State& state) { stage.time(state, spec); })
          ->UseRealTime()
          ->MinTime(least_seconds)
          ->Repetitions(options.quick ? 1 : 5)
          ->ReportAggregatesOnly(false);
    benchmark::RunSpecifiedBenchmarks(&report);
    peaks.take_best(probe());
  }
  if (options.json.empty()) return 0;
  Json::Object out{{"machine", where}, {"peaks", to_json(peaks)}};
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
