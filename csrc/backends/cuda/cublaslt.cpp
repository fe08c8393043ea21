#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <memory>
#include <tuple>

#include "backends/cuda/context.h"
#include "backends/cuda/cublaslt_api.h"
#include "backends/cuda/gemm.h"
#include "backends/cuda/scratch.h"

namespace flexcore::cuda {

namespace lt {

namespace {

template <class Function>
void find(void* library, const char* name, Function& function) {
  void* symbol = dlsym(library, name);
  require<DeviceError>(symbol != nullptr, "cuda: libcublasLt has no ", name);
  function = reinterpret_cast<Function>(symbol);
}

Api load() {
  // The environment's choice, then whatever the process has loaded (torch brings one) or the loader finds.
  const char* chosen = std::getenv("FLEXCORE_CUBLASLT");
  void* library = nullptr;
  for (const char* name : {chosen, "libcublasLt.so.13", "libcublasLt.so.12"})
    if (library == nullptr && name != nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  require<DeviceError>(library != nullptr, "cuda: libcublasLt.so.13 was not found (", dlerror(),
                       "); install nvidia-cublas, or name the file in FLEXCORE_CUBLASLT");
  Api api{};
#define FLEXCORE_FIND(name) find(library, "cublasLt" #name, api.name)
  FLEXCORE_FIND(Create);
  FLEXCORE_FIND(Destroy);
  FLEXCORE_FIND(GetStatusString);
  FLEXCORE_FIND(MatmulDescCreate);
  FLEXCORE_FIND(MatmulDescDestroy);
  FLEXCORE_FIND(MatmulDescSetAttribute);
  FLEXCORE_FIND(MatrixLayoutCreate);
  FLEXCORE_FIND(MatrixLayoutDestroy);
  FLEXCORE_FIND(MatmulPreferenceCreate);
  FLEXCORE_FIND(MatmulPreferenceDestroy);
  FLEXCORE_FIND(MatmulPreferenceSetAttribute);
  FLEXCORE_FIND(MatmulAlgoGetHeuristic);
  FLEXCORE_FIND(MatmulAlgoCheck);
  FLEXCORE_FIND(Matmul);
#undef FLEXCORE_FIND
  return api;
}

}  // namespace

const Api& api() {
  static const Api api = load();
  return api;
}

}  // namespace lt

namespace {

// What the library asks for on Hopper; its own default.
constexpr auto kWorkspaceBytes = static_cast<std::size_t>(kGemmWorkspaceBytes);

void require_lt(lt::Status status, const char* what) {
  if (status != 0) [[unlikely]]
    throw DeviceError(str("cuda: cublasLt", what, ": ", lt::api().GetStatusString(status)));
}

int type_of(DType dtype) { return dtype == DType::kBFloat16 ? lt::kReal16BF : lt::kReal32F; }

// Largest power of two, up to 256, at which every row of a matrix begins.
std::uint32_t alignment_of(const void* data, std::int64_t stride, DType dtype) {
  const auto bits = reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uintptr_t>(stride) * dtype_size(dtype) |
                    std::uintptr_t{256};
  return std::uint32_t{1} << std::countr_zero(bits);
}

template <class T>
using Owned = std::unique_ptr<std::remove_pointer_t<T>, lt::Status (*)(T)>;

Owned<lt::MatrixLayout> make_layout(DType dtype, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  lt::MatrixLayout layout = nullptr;
  require_lt(lt::api().MatrixLayoutCreate(&layout, type_of(dtype), static_cast<std::uint64_t>(rows),
                                          static_cast<std::uint64_t>(columns), stride),
             "MatrixLayoutCreate");
  return {layout, lt::api().MatrixLayoutDestroy};
}

/// A product of one shape: what the library was told, and the algorithm that it chose.
struct Plan {
  Owned<lt::MatmulDesc> desc;
  Owned<lt::MatrixLayout> a, b, c;  // the library's, column-major
  lt::Algorithm algorithm;
  std::size_t workspace_bytes;
  bool supported = false;
};

// The library refuses a workspace that is less aligned than a buffer of its own would be.
void* aligned_workspace(Arena& scratch, std::size_t bytes) {
  constexpr std::uintptr_t kAlignment = 256;
  const auto at = reinterpret_cast<std::uintptr_t>(scratch.allocate(bytes + kAlignment - 1));
  return reinterpret_cast<void*>((at + kAlignment - 1) / kAlignment * kAlignment);
}

/// Of one stream: not thread-safe, as the stream's work is not.
class Library {
 public:
  Library() { require_lt(lt::api().Create(&handle_), "Create"); }
  ~Library() {
    plans_.clear();
    lt::api().Destroy(handle_);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  /// False: the library has nothing for this shape.
  bool run(OpContext& context, const Gemm& g) {
    Plan& plan = plan_for(g);
    if (!plan.supported) return false;
    if (g.bias) set(plan.desc.get(), lt::kDescBiasPointer, g.bias.data());
    const Arena::Scope scope(*context.scratch);
    void* workspace = plan.workspace_bytes > 0 ? aligned_workspace(*context.scratch, plan.workspace_bytes) : nullptr;
    const float beta = g.accumulate ? 1.0f : 0.0f;
    require_lt(lt::api().Matmul(handle_, plan.desc.get(), &g.alpha, g.b.data(), plan.a.get(), g.a.data(), plan.b.get(),
                                &beta, g.c.data(), plan.c.get(), g.c.data(), plan.c.get(), &plan.algorithm, workspace,
                                plan.workspace_bytes, handle_of(context)),
               "Matmul");
    return true;
  }

 private:
  using Key = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::array<std::int64_t, 3>,
                         std::array<std::uint32_t, 3>, std::array<DType, 2>, std::array<bool, 4>>;

  template <class T>
  static void set(lt::MatmulDesc desc, int attribute, const T& value) {
    require_lt(lt::api().MatmulDescSetAttribute(desc, attribute, &value, sizeof value), "MatmulDescSetAttribute");
  }

  // The library is column-major: it computes the transpose, c^T = op(b)^T a^T, from the same bytes.
  Plan& plan_for(const Gemm& g) {
    const std::int64_t m = g.m(), k = g.k(), n = g.n();
    const std::array strides{g.b.stride(0), g.a.stride(0), g.c.stride(0)};
    const std::array alignments{alignment_of(g.b.data(), strides[0], g.b.dtype()),
                                alignment_of(g.a.data(), strides[1], g.a.dtype()),
                                alignment_of(g.c.data(), strides[2], g.c.dtype())};
    const Key key{m,
                  n,
                  k,
                  strides,
                  alignments,
                  {g.a.dtype(), g.c.dtype()},
                  {g.transpose_a, g.transpose_b, g.accumulate, static_cast<bool>(g.bias)}};
    if (const auto found = plans_.find(key); found != plans_.end()) return found->second;

    const lt::Api& api = lt::api();
    lt::MatmulDesc desc = nullptr;
    require_lt(api.MatmulDescCreate(&desc, lt::kCompute32F, lt::kReal32F), "MatmulDescCreate");
    Plan plan{{desc, api.MatmulDescDestroy},
              make_layout(g.b.dtype(), g.transpose_b ? k : n, g.transpose_b ? n : k, strides[0]),
              make_layout(g.a.dtype(), g.transpose_a ? m : k, g.transpose_a ? k : m, strides[1]),
              make_layout(g.c.dtype(), n, m, strides[2]),
              {},
              0};
    if (g.transpose_b) set(desc, lt::kDescTransA, lt::kTranspose);
    if (g.transpose_a) set(desc, lt::kDescTransB, lt::kTranspose);
    if (g.bias) {
      set(desc, lt::kDescEpilogue, lt::kEpilogueBias);
      set(desc, lt::kDescBiasPointer, g.bias.data());
    }
    const lt::Heuristic found = algorithm_for(plan, g, planned_rows(g), alignments);
    plan.supported = found.state == 0;
    plan.algorithm = found.algorithm;
    plan.workspace_bytes = found.workspace_bytes;
    return plans_.emplace(key, std::move(plan)).first->second;
  }

  // Rows that the algorithm is chosen for. The bits of a row must not depend on how many others there are: the
  // library's bfloat16 kernels add in one order as long as no sum is split, so that any of them will do. For narrow
  // matrices and few rows its first choice is meant for split sums, and slow without: they get that for more rows,
  // which has more blocks along the columns (bench/studies/gemm_invariance.cpp). Its float32 kernels differ in their
  // order: one for all.
  static std::int64_t planned_rows(const Gemm& g) {
    constexpr std::int64_t kRows = 128, kNarrow = 4608, kNarrowest = 2048, kFewRows = 17;
    const std::int64_t m = g.m(), n = g.n();
    if (g.transpose_a) return m;  // the rows are not those of a batch
    if (g.a.dtype() == DType::kFloat32) return kRows;
    return n < kNarrowest ? std::max(m, kRows) : n < kNarrow ? std::max(m, kFewRows) : m;
  }

  /// The library's first choice for so many rows, if it can do the plan's; `state` is not 0 if there is nothing.
  lt::Heuristic algorithm_for(const Plan& plan, const Gemm& g, std::int64_t rows,
                              const std::array<std::uint32_t, 3>& alignments) {
    const lt::Api& api = lt::api();
    lt::Preference preference = nullptr;
    require_lt(api.MatmulPreferenceCreate(&preference), "MatmulPreferenceCreate");
    const Owned<lt::Preference> owner(preference, api.MatmulPreferenceDestroy);
    const auto prefer = [&](int attribute, const auto& value) {
      require_lt(api.MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
                 "MatmulPreferenceSetAttribute");
    };
    prefer(lt::kPreferenceWorkspace, kWorkspaceBytes);
    prefer(lt::kPreferenceReductions, lt::kNoReduction);
    for (int i = 0; i < 4; ++i)  // a, b, c, d
      prefer(lt::kPreferenceAlignment + i, alignments[static_cast<std::size_t>(std::min(i, 2))]);
    const auto b = make_layout(g.a.dtype(), g.transpose_a ? rows : g.k(), g.transpose_a ? g.k() : rows, g.a.stride(0));
    const auto c = make_layout(g.c.dtype(), g.n(), rows, g.c.stride(0));
    lt::Heuristic found{};
    int count = 0;
    const lt::Status status = api.MatmulAlgoGetHeuristic(handle_, plan.desc.get(), plan.a.get(), b.get(), c.get(),
                                                         c.get(), preference, 1, &found, &count);
    if (status != lt::kNotSupported) require_lt(status, "MatmulAlgoGetHeuristic");
    const std::int64_t m = g.m();
    if (status != 0 || count == 0 || found.state != 0) {
      found.state = lt::kNotSupported;
    } else if (rows != m) {
      lt::Heuristic checked{};
      const lt::Algorithm algorithm = found.algorithm;
      found.state = api.MatmulAlgoCheck(handle_, plan.desc.get(), plan.a.get(), plan.b.get(), plan.c.get(),
                                        plan.c.get(), &algorithm, &checked);
      found.workspace_bytes = std::max(found.workspace_bytes, checked.workspace_bytes);
      if (found.workspace_bytes > kWorkspaceBytes) found.state = lt::kNotSupported;
    }
    // Without it bfloat16 rows have the same bits still; float32 rows fall to the plain kernel.
    if (found.state != 0 && rows != m && g.a.dtype() == DType::kBFloat16) return algorithm_for(plan, g, m, alignments);
    return found;
  }

  lt::Handle handle_ = nullptr;
  std::map<Key, Plan> plans_;
};

}  // namespace

void gemm(OpContext& context, const Gemm& args) {
  if (args.c.empty()) return;
  auto& state = stream_of(context).gemm;
  if (state == nullptr) state = std::make_shared<Library>();
  if (!static_cast<Library*>(state.get())->run(context, args)) simple_gemm(context, args);
}

}  // namespace flexcore::cuda
