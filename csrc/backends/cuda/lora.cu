#include <algorithm>
#include <vector>

#include "backends/cuda/families.h"
#include "backends/cuda/kernels/lora_activation.cuh"
#include "backends/cuda/lora_plan.h"
#include "backends/cuda/tables.h"
#include "ops/lora.h"

namespace flexcore::cuda {

namespace {

/// Numbers of the arrays among a plan's tables, in the order of lora_host_tables.
struct LoraArrays {
  static constexpr std::size_t kParts = 0, kStacks = 1, kShrink = 2, kShrinkGradient = 5, kGradient = 8, kSlabSums = 11,
                               kGradientSums = 12, kActivations = 13, kExpand = 14;
};

/// The launches that follow the tables of a call.
class Launcher {
 public:
  Launcher(OpContext& context, const LoraTables& tables, const DeviceTables& device)
      : tables_(tables),
        device_(device),
        parts_(device.get<LoraPart>(LoraArrays::kParts)),
        stacks_(device.get<LoraStack>(LoraArrays::kStacks)),
        stream_(handle_of(context)) {}

  void shrink() const { shrink_all<false>(tables_.shrink, LoraArrays::kShrink); }
  void shrink_gradients() const { shrink_all<true>(tables_.shrink_gradient, LoraArrays::kShrinkGradient); }
  void add_slabs() const { sum(tables_.slab_sums, LoraArrays::kSlabSums); }
  void activate() const {
    std::int64_t most = 0;
    for (const auto& a : tables_.activations) most = std::max(most, a.size);
    launch_lora_activation(get<LoraActivation>(LoraArrays::kActivations), tables_.activations.size(), most, stream_);
  }

  /// `along`: the matrix is A, and y is grad_x.
  template <bool along>
  void expand(bool exact) const {
    for (std::size_t i = 0; i < tables_.expand.size(); ++i) {
      const auto& work = tables_.expand[i];
      const std::size_t array = LoraArrays::kExpand + i;
      const LoraExpand args{
          get<LoraExpandTask>(array), stacks_, parts_, work.tiles, work.tile_rows, work.num_stacks, work.packs};
      const int tasks = count(array);
      if (exact)
        launch_exact_lora_expand<along>(args, tasks, work.most_width, stream_);
      else if (!work.is_bf16)
        launch_lora_expand<float, along>(args, tasks, work.most_width, stream_);
      else if constexpr (!along)
        launch_lora_expand<bf16, along>(args, tasks, work.most_width, stream_);
    }
  }

  void gradients() const {
    gradients_in<LoraMode::kExact>();
    gradients_in<LoraMode::kBf16>();
    gradients_in<LoraMode::kSplit>();
    sum(tables_.gradient_sums, LoraArrays::kGradientSums);
  }

 private:
  template <class T>
  const T* get(std::size_t array) const {
    return device_.get<T>(array);
  }
  int count(std::size_t array) const { return static_cast<int>(device_.count(array)); }

  template <bool turned>
  void shrink_all(const LoraWorkByMode<LoraShrinkTask>& all, std::size_t first_array) const {
    const auto in = [&](LoraMode mode, auto&& start) {
      const auto& work = all[static_cast<std::size_t>(mode)];
      const std::size_t array = first_array + static_cast<std::size_t>(mode);
      start(LoraShrink{get<LoraShrinkTask>(array), stacks_, parts_, work.packs}, count(array), work);
    };
    in(LoraMode::kExact, [&](const LoraShrink& args, int tasks, const auto& work) {
      launch_exact_lora_shrink<turned>(args, tasks, work.splits, stream_);
    });
    in(LoraMode::kBf16, [&](const LoraShrink& args, int tasks, const auto& work) {
      launch_lora_shrink<true, turned>(args, tasks, work.splits, work.most_columns, stream_);
    });
    in(LoraMode::kSplit, [&](const LoraShrink& args, int tasks, const auto& work) {
      launch_lora_shrink<false, turned>(args, tasks, work.splits, work.most_columns, stream_);
    });
  }
  template <LoraMode mode>
  void gradients_in() const {
    const auto& work = tables_.gradient[static_cast<std::size_t>(mode)];
    const std::size_t array = LoraArrays::kGradient + static_cast<std::size_t>(mode);
    launch_lora_gradient<mode>({get<LoraGradientTask>(array), stacks_, parts_, work.packs}, count(array),
                               work.most_width, stream_);
  }
  void sum(const std::vector<LoraSum>& sums, std::size_t array) const {
    std::int64_t most = 0;
    bool packs = true;
    for (const auto& s : sums) {
      most = std::max(most, s.size);
      packs = packs && s.size % 4 == 0 && reinterpret_cast<std::uintptr_t>(s.to) % 16 == 0 &&
              reinterpret_cast<std::uintptr_t>(s.slabs) % 16 == 0;
    }
    launch_lora_sums(get<LoraSum>(array), sums.size(), most, packs, stream_);
  }

  const LoraTables& tables_;
  const DeviceTables& device_;
  const LoraPart* parts_;
  const LoraStack* stacks_;
  cudaStream_t stream_;
};

bool is_float32(const TensorView& t) { return t.dtype() == DType::kFloat32; }

HostTables lora_host_tables(const LoraTables& t) {
  HostTables host;
  host.add(t.parts).add(t.stacks);
  for (const auto* by_mode : {&t.shrink, &t.shrink_gradient})
    for (const auto& work : *by_mode) host.add(work.tasks);
  for (const auto& work : t.gradient) host.add(work.tasks);
  host.add(t.slab_sums).add(t.gradient_sums).add(t.activations);
  for (const auto& work : t.expand) host.add(work.tasks);
  return host;
}

/// Whether launches for `recorded` compute this work, given room for its tasks.
template <class Task>
bool covers(const LoraWork<Task>& recorded, const LoraWork<Task>& work) {
  return work.tasks.empty() || (work.splits <= recorded.splits && work.most_width <= recorded.most_width &&
                                work.most_columns <= recorded.most_columns && (work.packs || !recorded.packs));
}

/// Forward's plan. Only this one is recorded, and never with activations.
struct ForwardPlan {
  LoraTables all;
  HostTables tables() const { return lora_host_tables(all); }
  // Expand's launches differ in number and in shared memory; a recording serves the same list of them.
  bool fits(const ForwardPlan& recorded) const {
    const LoraTables& other = recorded.all;
    bool fit = all.expand.size() <= other.expand.size() && all.activations.empty() && other.activations.empty();
    for (std::size_t i = 0; i < 3; ++i) fit = fit && covers(other.shrink[i], all.shrink[i]);
    for (std::size_t i = 0; fit && i < all.expand.size(); ++i) {
      const auto &a = all.expand[i], &b = other.expand[i];
      fit = a.pass == b.pass && a.tile_rows == b.tile_rows && a.is_bf16 == b.is_bf16 && a.num_stacks <= b.num_stacks &&
            covers(b, a);
    }
    return fit;
  }
};

/// A call whose members are by value: what a recording keeps.
struct ForwardCall {
  OpContext* context;
  TensorView x;
  std::vector<LoraArgs::Member> members;
  bool exact;

  ForwardPlan operator()() const {
    LoraPlanner planner(*context, stream_of(*context).num_multiprocessors, exact);
    planner.list_pieces(members, [](const auto& m) { return m.y; });
    if (planner.empty()) return {};
    planner.plan_shrink(x);
    planner.plan_activations();
    planner.plan_expand({x, members});
    return {planner.take_tables()};
  }
};

void lora_forward(OpContext& context, const LoraArgs& args) {
  const Arena::Scope scope(*context.scratch);
  const bool exact = is_float32(args.x) && std::all_of(args.members.begin(), args.members.end(),
                                                       [](const auto& m) { return is_float32(m.y); });
  const auto placed = place(context, ForwardCall{&context, args.x, {args.members.begin(), args.members.end()}, exact});
  const Launcher launcher(context, placed->plan.all, placed->device);
  launcher.shrink();
  launcher.add_slabs();
  launcher.activate();
  launcher.expand<false>(exact);
  check_launch(args.kName);
}

void lora_backward(OpContext& context, const LoraBackwardArgs& args) {
  const Arena::Scope scope(*context.scratch);
  const bool exact = is_float32(args.x) && std::all_of(args.members.begin(), args.members.end(),
                                                       [](const auto& m) { return is_float32(m.grad_y); });
  LoraPlanner planner(context, stream_of(context).num_multiprocessors, exact);
  planner.list_pieces(args.members, [](const auto& m) { return m.grad_y; });
  if (planner.empty()) return;
  planner.plan_shrink(args.x);
  planner.plan_shrink_gradient(args);
  planner.plan_slab_sums();
  planner.plan_activations();
  if (args.grad_x) planner.plan_grad_x(args.grad_x);
  planner.plan_gradients(args);

  const LoraTables tables = planner.take_tables();
  const DeviceTables device = upload_tables(context, lora_host_tables(tables));
  const Launcher launcher(context, tables, device);
  launcher.shrink();
  launcher.shrink_gradients();
  launcher.add_slabs();
  launcher.activate();
  launcher.gradients();
  launcher.expand<true>(exact);
  check_launch(args.kName);
}

}  // namespace

void register_lora(OpRegistry& registry) {
  registry.add<LoraArgs>(DeviceKind::kCuda, lora_forward);
  registry.add<LoraBackwardArgs>(DeviceKind::kCuda, lora_backward);
}

}  // namespace flexcore::cuda
