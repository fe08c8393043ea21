// The native GEMMs beside oneDNN matmul, on the shapes of SmolLM2-135M: interleaved bursts, medians, GFLOP/s.
// Weights cycle through more bytes than the caches hold, as the layers of a model do. Needs oneDNN and a built library:
//   g++ -std=c++20 -fopenmp -O3 -Icsrc -Icsrc/include -I$ONEDNN/include bench/studies/gemm_onednn.cpp
//       build/csrc/libflexcore.a -L$ONEDNN/lib -Wl,-rpath,$ONEDNN/lib -ldnnl -lpthread -o gemm_onednn
//   ./gemm_onednn [float32|bfloat16] [forward|backward] [threads=2] [quantile=0.5] [num_tokens ...]
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <dnnl.hpp>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "backends/cpu/families.h"
#include "backends/cpu/isa.h"
#include "core/bfloat16.h"
#include "ops/linear.h"

namespace {

using namespace flexcore;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kWorkingSet = 160 << 20;  // bytes of distinct weights, several times the last-level cache
constexpr int kRounds = 7;

struct Options {
  int threads = 2;
  double quantile = 0.5;  // of the calls' times; 0 is the fastest call, for a machine that others use too
};

struct Case {
  bool backward;
  DType dtype;
  std::int64_t m, n, k;  // weight [n, k]
  std::size_t weight_bytes() const { return static_cast<std::size_t>(n * k) * dtype_size(dtype); }
  int copies() const { return static_cast<int>(std::max<std::size_t>(1, kWorkingSet / weight_bytes())); }
};

struct Contender {
  std::string name;
  std::function<void(int)> run;  // with copy i of the weight
};

struct Native {
  MemoryLedger ledger;
  Arena scratch{host_allocator(), ledger};
  ThreadPool threads;
  OpRegistry registry;
  OpContext context;
  explicit Native(int num_threads) : threads(num_threads) {
    cpu::register_linear(registry);
    context.registry = &registry;
    context.threads = &threads;
    context.scratch = &scratch;
  }
};

std::vector<bfloat16> random_bits(std::size_t count) {
  std::vector<bfloat16> values(count);
  std::uint32_t state = 1;
  for (auto& v : values)
    v = to_bfloat16(static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) * 0x1p-24f - 0.5f);
  return values;
}

Buffer filled(MemoryLedger& ledger, DType dtype, std::size_t count) {
  Buffer buffer(host_allocator(), ledger, MemoryTag::kWorkspace, count * dtype_size(dtype));
  const auto values = random_bits(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (dtype == DType::kBFloat16)
      reinterpret_cast<bfloat16*>(buffer.data())[i] = values[i];
    else
      reinterpret_cast<float*>(buffer.data())[i] = to_float(values[i]);
  }
  return buffer;
}

// Adds the seconds of each call of a burst, after a pause that lets the other team fall asleep and two calls to warm
// up.
void burst(const Contender& contender, int copies, int& next, std::vector<double>& seconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(8));
  for (int i = 0; i < 2; ++i) contender.run(next++ % copies);
  const auto burst_start = Clock::now();
  auto start = burst_start;
  do {
    contender.run(next++ % copies);
    const auto end = Clock::now();
    seconds.push_back(std::chrono::duration<double>(end - start).count());
    start = end;
  } while (start - burst_start < std::chrono::milliseconds(30));
}

// y = a W^T, or a W in the backward, by oneDNN on copies of the weight in its own layout or on row-major ones.
std::pair<std::function<void(int)>, std::string> make_onednn(const Case& c, const std::vector<Buffer>& plain, void* a,
                                                             void* y, bool packed) {
  using dnnl::memory;
  const std::int64_t in = c.backward ? c.n : c.k, out = c.backward ? c.k : c.n;
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  const auto type = c.dtype == DType::kBFloat16 ? memory::data_type::bf16 : memory::data_type::f32;
  const memory::desc a_desc({c.m, in}, type, memory::format_tag::ab);
  const memory::desc y_desc({c.m, out}, memory::data_type::f32, memory::format_tag::ab);
  // W^T [k, n] of a row-major W [n, k] is `ba`; the backward multiplies by W itself.
  const memory::desc plain_desc({in, out}, type, c.backward ? memory::format_tag::ab : memory::format_tag::ba);
  const memory::desc any_desc({in, out}, type, memory::format_tag::any);
  const dnnl::matmul::primitive_desc pd(engine, a_desc, packed ? any_desc : plain_desc, y_desc);
  dnnl::stream stream(engine);
  std::vector<memory> weights;
  for (const auto& copy : plain) {
    memory row_major(plain_desc, engine, copy.data());
    weights.push_back(packed ? memory(pd.weights_desc(), engine) : row_major);
    if (packed) dnnl::reorder(row_major, weights.back()).execute(stream, row_major, weights.back());
  }
  stream.wait();
  const auto run = [matmul = dnnl::matmul(pd), weights, stream, a = memory(a_desc, engine, a),
                    y = memory(y_desc, engine, y)](int i) mutable {
    matmul.execute(stream, {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, weights[i]}, {DNNL_ARG_DST, y}});
    stream.wait();
  };
  return {run, pd.impl_info_str()};
}

void measure(Native& native, const Options& options, const Case& c) {
  auto& ledger = native.ledger;
  const std::int64_t in = c.backward ? c.n : c.k, out = c.backward ? c.k : c.n;
  Buffer a = filled(ledger, c.dtype, static_cast<std::size_t>(c.m * in));
  Buffer y(host_allocator(), ledger, MemoryTag::kWorkspace, static_cast<std::size_t>(c.m * out) * 4);
  std::vector<Buffer> packed, plain;
  std::size_t packed_bytes = 0;
  run(native.context, PackedWeightBytesArgs{c.n, c.k, c.dtype, &packed_bytes});
  const Buffer source = filled(ledger, c.dtype, static_cast<std::size_t>(c.n * c.k));
  for (int i = 0; i < c.copies(); ++i) {
    plain.emplace_back(host_allocator(), ledger, MemoryTag::kWorkspace, c.weight_bytes());
    std::memcpy(plain.back().data(), source.data(), c.weight_bytes());
    packed.emplace_back(host_allocator(), ledger, MemoryTag::kWorkspace, packed_bytes);
    run(native.context, PackWeightArgs{source.view(c.dtype, {c.n, c.k}), c.dtype, packed.back().data()});
  }

  const TensorView a_view = a.view(c.dtype, {c.m, in}), y_view = y.view(DType::kFloat32, {c.m, out});
  std::vector<Contender> contenders{{"native", [&](int i) {
                                       const WeightView weight{packed[i].data(), c.dtype, c.n, c.k, true};
                                       if (c.backward) {
                                         const LinearBackwardArgs::Member member{weight, a_view};
                                         run(native.context, LinearBackwardArgs{{&member, 1}, y_view});
                                       } else {
                                         const LinearArgs::Member member{weight, {}, y_view};
                                         run(native.context, LinearArgs{a_view, {&member, 1}});
                                       }
                                     }}};
  std::string implementation = "none for this dtype";
  try {
    const auto [packed_run, name] = make_onednn(c, plain, a.data(), y.data(), true);
    contenders.push_back({"packed", packed_run});
    contenders.push_back({"unpacked", make_onednn(c, plain, a.data(), y.data(), false).first});
    implementation = name;
  } catch (const dnnl::error&) {  // this machine has no such matmul
  }

  std::vector<std::vector<double>> seconds(contenders.size());
  int next = 0;
  for (int round = 0; round < kRounds; ++round)
    for (std::size_t i = 0; i < contenders.size(); ++i) burst(contenders[i], c.copies(), next, seconds[i]);
  const auto quantile = [&](std::vector<double>& s) {
    const auto at = s.begin() + static_cast<std::ptrdiff_t>(options.quantile * static_cast<double>(s.size() - 1));
    std::nth_element(s.begin(), at, s.end());
    return *at;
  };
  const double flop = 2.0 * static_cast<double>(c.m) * static_cast<double>(c.n) * static_cast<double>(c.k);
  std::printf("%-8s %-8s %5ld x %5ld x %4ld", dtype_name(c.dtype).data(), c.backward ? "backward" : "forward",
              long(c.m), long(out), long(in));
  std::vector<double> results;
  for (auto& s : seconds) results.push_back(quantile(s));
  for (const double result : results) std::printf(" | %7.1f", flop / result * 1e-9);
  std::printf(" | native reads %5.1f GB/s | oneDNN: %s\n", static_cast<double>(c.weight_bytes()) / results[0] * 1e-9,
              implementation.c_str());
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  bool dtypes[] = {true, true}, directions[] = {true, true};
  Options options;
  std::vector<std::int64_t> tokens;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "float32")
      dtypes[1] = false;
    else if (arg == "bfloat16")
      dtypes[0] = false;
    else if (arg == "forward")
      directions[1] = false;
    else if (arg == "backward")
      directions[0] = false;
    else if (arg.starts_with("threads="))
      options.threads = std::stoi(arg.substr(8));
    else if (arg.starts_with("quantile="))
      options.quantile = std::stod(arg.substr(9));
    else
      tokens.push_back(std::stol(arg));
  }
  if (tokens.empty()) tokens = {1, 4, 16, 64, 128, 512, 1024};
  omp_set_num_threads(options.threads);
  Native native(options.threads);
  std::printf("isa %s, %d threads, quantile %.2f of the calls, GFLOP/s: native | oneDNN packed | oneDNN unpacked\n",
              cpu::isa_name(cpu::active_isa()), options.threads, options.quantile);
  const std::pair<std::int64_t, std::int64_t> shapes[] = {
      {576, 576}, {192, 576}, {1536, 576}, {576, 1536}, {49152, 576}};
  for (const int dtype : {1, 0})
    for (const bool backward : {false, true})
      for (const auto& [n, k] : shapes)
        for (const auto m : tokens)
          if (dtypes[dtype] && directions[backward])
            measure(native, options, {backward, dtype ? DType::kBFloat16 : DType::kFloat32, m, n, k});
}
