#include <algorithm>
#include <cstring>
#include <span>

#include "backends/cuda/context.h"
#include "backends/cuda/families.h"
#include "backends/cuda/lora_plan.h"
#include "ops/lora.h"

namespace flexcore::cuda {

namespace {

/// Tables on their way to the device, in one copy.
class TableUpload {
 public:
  template <class T>
  std::size_t add(const std::vector<T>& table) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= kAlignment);
    const std::size_t at = bytes_.size();
    bytes_.resize((at + table.size() * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment);
    if (!table.empty()) std::memcpy(bytes_.data() + at, table.data(), table.size() * sizeof(T));
    return at;
  }
  void send(OpContext& context) { device_ = on_device(context, std::span<const std::byte>(bytes_)); }
  template <class T>
  const T* get(std::size_t at) const {
    return reinterpret_cast<const T*>(device_ + at);
  }

 private:
  static constexpr std::size_t kAlignment = 16;
  std::vector<std::byte> bytes_;
  const std::byte* device_ = nullptr;
};

/// The tables of a call on the device, and the launches that follow them.
class Launcher {
 public:
  Launcher(OpContext& context, const LoraTables& tables) : tables_(tables), stream_(handle_of(context)) {
    TableUpload upload;
    const auto parts = upload.add(tables.parts), stacks = upload.add(tables.stacks);
    std::array<std::size_t, 3> shrink, shrink_gradient, gradient;
    for (std::size_t mode = 0; mode < 3; ++mode) {
      shrink[mode] = upload.add(tables.shrink[mode].tasks);
      shrink_gradient[mode] = upload.add(tables.shrink_gradient[mode].tasks);
      gradient[mode] = upload.add(tables.gradient[mode].tasks);
    }
    const auto shrink_vector = upload.add(tables.shrink_vector.tasks);
    const std::array expand_vector = {upload.add(tables.expand_vector[0].tasks),
                                      upload.add(tables.expand_vector[1].tasks)};
    std::vector<std::size_t> expand;
    for (const auto& work : tables.expand) expand.push_back(upload.add(work.tasks));
    const auto slab_sums = upload.add(tables.slab_sums), gradient_sums = upload.add(tables.gradient_sums);
    upload.send(context);

    parts_ = upload.get<LoraPart>(parts);
    stacks_ = upload.get<LoraStack>(stacks);
    for (std::size_t mode = 0; mode < 3; ++mode) {
      shrink_[mode] = upload.get<LoraShrinkTask>(shrink[mode]);
      shrink_gradient_[mode] = upload.get<LoraShrinkTask>(shrink_gradient[mode]);
      gradient_[mode] = upload.get<LoraGradientTask>(gradient[mode]);
    }
    shrink_vector_ = upload.get<LoraShrinkTask>(shrink_vector);
    for (std::size_t i = 0; i < 2; ++i) expand_vector_[i] = upload.get<LoraVectorExpandTask>(expand_vector[i]);
    for (const auto at : expand) expand_.push_back(upload.get<LoraExpandTask>(at));
    slab_sums_ = upload.get<LoraSum>(slab_sums);
    gradient_sums_ = upload.get<LoraSum>(gradient_sums);
  }

  void shrink() const {
    shrink_in<LoraMode::kExact, false>(tables_.shrink, shrink_);
    shrink_in<LoraMode::kBf16, false>(tables_.shrink, shrink_);
    shrink_in<LoraMode::kSplit, false>(tables_.shrink, shrink_);
    const auto& vector = tables_.shrink_vector;
    launch_lora_shrink_vector({shrink_vector_, stacks_, parts_, vector.packs}, static_cast<int>(vector.tasks.size()),
                              vector.splits, stream_);
  }
  void shrink_gradients() const {
    shrink_in<LoraMode::kExact, true>(tables_.shrink_gradient, shrink_gradient_);
    shrink_in<LoraMode::kBf16, true>(tables_.shrink_gradient, shrink_gradient_);
    shrink_in<LoraMode::kSplit, true>(tables_.shrink_gradient, shrink_gradient_);
  }
  void add_slabs() const { sum(tables_.slab_sums, slab_sums_); }

  /// `along`: the matrix is A, and y is grad_x.
  template <bool along>
  void expand(bool exact) const {
    for (std::size_t i = 0; i < tables_.expand.size(); ++i) {
      const auto& work = tables_.expand[i];
      const LoraExpand args{expand_[i], stacks_, parts_, work.tiles, work.tile_rows, work.num_stacks, work.packs};
      const int tasks = static_cast<int>(work.tasks.size());
      if (exact)
        launch_lora_expand<LoraMode::kExact, float, along>(args, tasks, work.most_width, stream_);
      else if (!work.is_bf16)
        launch_lora_expand<LoraMode::kSplit, float, along>(args, tasks, work.most_width, stream_);
      else if constexpr (!along)
        launch_lora_expand<LoraMode::kSplit, bf16, along>(args, tasks, work.most_width, stream_);
    }
    for (std::size_t i = 0; i < 2; ++i) {
      const auto& vector = tables_.expand_vector[i];
      launch_lora_expand_vector({expand_vector_[i], parts_, tables_.expand_vector_columns},
                                static_cast<int>(vector.tasks.size()), vector.most_width, i == 1, stream_);
    }
  }

  void gradients() const {
    gradients_in<LoraMode::kExact>();
    gradients_in<LoraMode::kBf16>();
    gradients_in<LoraMode::kSplit>();
    sum(tables_.gradient_sums, gradient_sums_);
  }

 private:
  using ShrinkTasks = std::array<const LoraShrinkTask*, 3>;

  template <LoraMode mode, bool turned>
  void shrink_in(const LoraWorkByMode<LoraShrinkTask>& all, const ShrinkTasks& tasks) const {
    const auto& work = all[static_cast<int>(mode)];
    launch_lora_shrink<mode, turned>({tasks[static_cast<int>(mode)], stacks_, parts_, work.packs},
                                     static_cast<int>(work.tasks.size()), work.splits, stream_);
  }
  template <LoraMode mode>
  void gradients_in() const {
    const auto& work = tables_.gradient[static_cast<int>(mode)];
    launch_lora_gradient<mode>({gradient_[static_cast<int>(mode)], stacks_, parts_, work.packs},
                               static_cast<int>(work.tasks.size()), work.most_width, stream_);
  }
  void sum(const std::vector<LoraSum>& sums, const LoraSum* device) const {
    std::int64_t most = 0;
    bool packs = true;
    for (const auto& s : sums) {
      most = std::max(most, s.size);
      packs = packs && s.size % 4 == 0 && reinterpret_cast<std::uintptr_t>(s.to) % 16 == 0 &&
              reinterpret_cast<std::uintptr_t>(s.slabs) % 16 == 0;
    }
    launch_lora_sums(device, sums.size(), most, packs, stream_);
  }

  const LoraTables& tables_;
  cudaStream_t stream_;
  const LoraPart* parts_;
  const LoraStack* stacks_;
  ShrinkTasks shrink_, shrink_gradient_;
  const LoraShrinkTask* shrink_vector_;
  std::vector<const LoraExpandTask*> expand_;
  std::array<const LoraVectorExpandTask*, 2> expand_vector_;
  std::array<const LoraGradientTask*, 3> gradient_;
  const LoraSum *slab_sums_, *gradient_sums_;
};

bool is_float32(const TensorView& t) { return t.dtype() == DType::kFloat32; }

void lora_forward(OpContext& context, const LoraArgs& args) {
  const Arena::Scope scope(*context.scratch);
  const bool exact = is_float32(args.x) && std::all_of(args.members.begin(), args.members.end(),
                                                       [](const auto& m) { return is_float32(m.y); });
  LoraPlanner planner(context, stream_of(context).num_multiprocessors, exact);
  planner.list_pieces(args.members, [](const auto& m) { return m.y; }, true);
  if (planner.empty()) return;
  planner.plan_shrink(args.x);
  planner.plan_expand(args);

  const Launcher launcher(context, planner.tables());
  launcher.shrink();
  launcher.expand<false>(exact);
  check_launch(args.kName);
}

void lora_backward(OpContext& context, const LoraBackwardArgs& args) {
  const Arena::Scope scope(*context.scratch);
  const bool exact = is_float32(args.x) && std::all_of(args.members.begin(), args.members.end(),
                                                       [](const auto& m) { return is_float32(m.grad_y); });
  LoraPlanner planner(context, stream_of(context).num_multiprocessors, exact);
  planner.list_pieces(args.members, [](const auto& m) { return m.grad_y; }, false);
  if (planner.empty()) return;
  planner.plan_shrink(args.x);
  planner.plan_shrink_gradient(args);
  planner.plan_slab_sums();
  if (args.grad_x) planner.plan_grad_x(args.grad_x);
  planner.plan_gradients(args);

  const Launcher launcher(context, planner.tables());
  launcher.shrink();
  launcher.shrink_gradients();
  launcher.add_slabs();
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
