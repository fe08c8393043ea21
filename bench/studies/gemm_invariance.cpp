// What it costs to have cuBLASLt add every element's products in one order, whatever the number of rows: products of m
// rows with a matrix, chosen freely and without split sums; are the bits of a row those of the row alone; microseconds
// of both, and of the best among the first algorithms. Needs a GPU and a built library:
//   g++ -std=c++20 -O2 -Icsrc -Icsrc/include -I$CUDA/include bench/studies/gemm_invariance.cpp build/.../libflexcore.a
//   -ldl
//       -lpthread -lrt -o gemm_invariance && ./gemm_invariance
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "backends/cuda/cublaslt_api.h"
#include "core/bfloat16.h"

namespace lt = flexcore::cuda::lt;

namespace {

constexpr std::size_t kWorkspace = 32 << 20;
constexpr int kMost = 2048, kTried = 8;

void ok(int status, const char* what) {
  if (status != 0) {
    std::fprintf(stderr, "%s: %d\n", what, status);
    std::exit(1);
  }
}

struct Buffer {
  explicit Buffer(std::size_t bytes) { ok(cudaMalloc(&data, bytes), "cudaMalloc"); }
  ~Buffer() { cudaFree(data); }
  void* data = nullptr;
};

struct Problem {
  int m, n, k;
  bool floats, float_output, transposed;  // weights are [n, k] if transposed, else [k, n]
};

class Product {
 public:
  Product(lt::Handle handle, const Problem& p, bool split) : handle_(handle) {
    const auto& api = lt::api();
    const int type = p.floats ? lt::kReal32F : lt::kReal16BF;
    const int out = p.floats || p.float_output ? lt::kReal32F : lt::kReal16BF;
    ok(api.MatmulDescCreate(&desc_, lt::kCompute32F, lt::kReal32F), "desc");
    const std::int32_t transpose = lt::kTranspose;
    if (p.transposed) ok(api.MatmulDescSetAttribute(desc_, lt::kDescTransA, &transpose, sizeof transpose), "transa");
    ok(api.MatrixLayoutCreate(&a_, type, p.transposed ? p.k : p.n, p.transposed ? p.n : p.k, p.transposed ? p.k : p.n),
       "a");
    ok(api.MatrixLayoutCreate(&b_, type, p.k, p.m, p.k), "b");
    ok(api.MatrixLayoutCreate(&c_, out, p.n, p.m, p.n), "c");
    lt::Preference preference;
    ok(api.MatmulPreferenceCreate(&preference), "preference");
    ok(api.MatmulPreferenceSetAttribute(preference, lt::kPreferenceWorkspace, &kWorkspace, sizeof kWorkspace),
       "workspace");
    const std::uint32_t none = 0;
    constexpr int kReductionSchemes = 3;  // CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK
    if (!split) ok(api.MatmulPreferenceSetAttribute(preference, kReductionSchemes, &none, sizeof none), "schemes");
    ok(api.MatmulAlgoGetHeuristic(handle_, desc_, a_, b_, c_, c_, preference, kTried, found_, &count_), "heuristic");
    api.MatmulPreferenceDestroy(preference);
  }
  ~Product() {
    lt::api().MatmulDescDestroy(desc_);
    for (auto* layout : {a_, b_, c_}) lt::api().MatrixLayoutDestroy(layout);
  }
  int count() const { return count_; }
  void run(int algorithm, const void* x, const void* w, void* y, void* workspace) const {
    const float one = 1, zero = 0;
    ok(lt::api().Matmul(handle_, desc_, &one, w, a_, x, b_, &zero, y, c_, y, c_, &found_[algorithm].algorithm,
                        workspace, found_[algorithm].workspace_bytes, nullptr),
       "matmul");
  }

 private:
  lt::Handle handle_;
  lt::MatmulDesc desc_;
  lt::MatrixLayout a_, b_, c_;
  lt::Heuristic found_[kTried];
  int count_ = 0;
};

void fill(void* data, std::size_t count, bool floats, std::uint64_t seed) {
  std::vector<float> values(std::min<std::size_t>(count, 1 << 20));
  std::mt19937 rng(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  for (auto& v : values) v = normal(rng);
  std::vector<flexcore::bfloat16> rounded(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) rounded[i] = flexcore::to_bfloat16(values[i]);
  const std::size_t size = floats ? 4 : 2;
  for (std::size_t at = 0; at < count; at += values.size())
    ok(cudaMemcpy(static_cast<char*>(data) + at * size, floats ? static_cast<void*>(values.data()) : rounded.data(),
                  std::min(values.size(), count - at) * size, cudaMemcpyHostToDevice),
       "memcpy");
}

}  // namespace

int main() {
  lt::Handle handle;
  ok(lt::api().Create(&handle), "create");
  cudaEvent_t begin, end;
  ok(cudaEventCreate(&begin), "event");
  ok(cudaEventCreate(&end), "event");
  struct Shape {
    int n, k;
    bool floats, float_output, transposed;
  };
  const Shape shapes[] = {
      {4096, 4096, false, false, true},  {1024, 4096, false, false, true},  {6144, 4096, false, false, true},
      {14336, 4096, false, false, true}, {4096, 14336, false, false, true}, {128256, 4096, false, true, true},
      {2048, 2048, false, false, true},  {4096, 4096, false, true, false},  {4096, 14336, false, true, false},
      {1024, 1024, true, true, true},    {1024, 1024, true, true, false},   {70, 45, true, true, true},
      {192, 576, true, true, true}};
  Buffer workspace(kWorkspace);
  std::printf("%28s %6s | %9s %9s %5s | %9s %9s %5s\n", "n x k", "m", "free us", "best us", "bits", "one us", "best us",
              "bits");
  for (const auto& s : shapes) {
    const std::size_t in = s.floats ? 4 : 2, out = s.floats || s.float_output ? 4 : 2;
    const std::size_t weight = static_cast<std::size_t>(s.n) * s.k;
    const int copies = static_cast<int>(std::clamp<std::size_t>((100 << 20) / (weight * in) + 1, 2, 16));
    const int most = s.n > 100000 ? 256 : kMost;
    Buffer x(static_cast<std::size_t>(most) * s.k * in), w(weight * in * copies),
        y(static_cast<std::size_t>(most) * s.n * out);
    fill(x.data, static_cast<std::size_t>(most) * s.k, s.floats, 1);
    fill(w.data, weight * copies, s.floats, 2);
    std::vector<char> alone[2], rows;
    for (const int m : {1, 2, 5, 16, 17, 64, 100, 128, 256, 512, 1000, 2048}) {
      if (m > most) continue;
      std::printf("%8d x %-6d %s%s%s %6d |", s.n, s.k, s.floats ? "f32 " : "bf16", s.float_output ? ">f32" : "    ",
                  s.transposed ? " NT" : " NN", m);
      for (const bool split : {true, false}) {
        const Product product(handle, {m, s.n, s.k, s.floats, s.float_output, s.transposed}, split);
        if (product.count() == 0) {
          std::printf(" %9s %9s %5s |", "-", "-", "-");
          continue;
        }
        double first = 0, best = 1e30;
        for (int a = product.count() - 1; a >= 0; --a) {
          const auto once = [&](int i) {
            product.run(a, x.data, static_cast<char*>(w.data) + weight * in * (i % copies), y.data, workspace.data);
          };
          constexpr int kCalls = 10;
          for (int i = 0; i < 3; ++i) once(i);
          cudaEventRecord(begin);
          for (int i = 0; i < kCalls; ++i) once(i);
          cudaEventRecord(end);
          ok(cudaDeviceSynchronize(), "run");
          float ms = 0;
          cudaEventElapsedTime(&ms, begin, end);
          first = 1e3 * ms / kCalls;
          best = std::min(best, first);
        }
        product.run(0, x.data, w.data, y.data, workspace.data);
        rows.resize(static_cast<std::size_t>(m) * s.n * out);
        ok(cudaMemcpy(rows.data(), y.data, rows.size(), cudaMemcpyDeviceToHost), "memcpy");
        auto& known = alone[split ? 0 : 1];  // rows as first seen, each at the smallest m that has it
        const std::size_t common = std::min(known.size(), rows.size());
        const bool same = std::memcmp(known.data(), rows.data(), common) == 0;
        if (rows.size() > known.size())
          known.insert(known.end(), rows.begin() + static_cast<std::ptrdiff_t>(known.size()), rows.end());
        std::printf(" %9.1f %9.1f %5s |", first, best, same ? "same" : "OTHER");
      }
      std::printf("\n");
      std::fflush(stdout);
    }
  }
  return 0;
}
