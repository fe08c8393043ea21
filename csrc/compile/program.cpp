#include "compile/program.h"

#include <algorithm>
#include <utility>

#include "core/check.h"

namespace flexcore {

namespace {

constexpr std::size_t kAlignment = 64;

struct Life {
  std::size_t bytes = 0, first = 0, last = 0, offset = 0;
};

// Lowest gap among the lives that overlap; in order of birth.
void place(std::vector<Life>& lives, std::size_t& total) {
  std::vector<const Life*> placed;
  for (auto& life : lives) {
    std::vector<const Life*> overlapping;
    for (const auto* other : placed)
      if (other->first <= life.last && life.first <= other->last) overlapping.push_back(other);
    std::sort(overlapping.begin(), overlapping.end(),
              [](const Life* a, const Life* b) { return a->offset < b->offset; });
    std::size_t offset = 0;
    for (const auto* other : overlapping) {
      if (offset + life.bytes <= other->offset) break;
      offset = std::max(offset, other->offset + other->bytes);
    }
    life.offset = offset;
    total = std::max(total, offset + life.bytes);
    placed.push_back(&life);
  }
}

}  // namespace

Program::Program(std::shared_ptr<const Graph> graph, std::vector<NodeId> nodes, std::vector<TensorId> inputs,
                 std::vector<TensorId> outputs, const RowCounts& capacity)
    : graph_(std::move(graph)), nodes_(std::move(nodes)), inputs_(std::move(inputs)) {
  observed_.resize(nodes_.size());
  assign_memory(capacity, outputs);
}

void Program::assign_memory(const RowCounts& capacity, const std::vector<TensorId>& outputs) {
  place_.assign(graph_->tensors.size(), {});
  std::vector<std::size_t> last_read(graph_->tensors.size(), 0);
  for (std::size_t i = 0; i < nodes_.size(); ++i)
    for (const auto input : graph_->nodes[static_cast<std::size_t>(nodes_[i])].inputs)
      last_read[static_cast<std::size_t>(input)] = i;
  for (const auto output : outputs) last_read[static_cast<std::size_t>(output)] = nodes_.size();

  std::vector<Life> lives;
  std::vector<int> life_of(graph_->tensors.size(), -1);
  for (std::size_t i = 0; i < inputs_.size(); ++i) {
    auto& place = place_[static_cast<std::size_t>(inputs_[i])];
    place.known = true;
    place.input = static_cast<int>(i);
  }
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const auto& node = graph_->nodes[static_cast<std::size_t>(nodes_[i])];
    for (const auto input : node.inputs)
      require<Error>(place_[static_cast<std::size_t>(input)].known, "program: ", node.op->name(), " of layer ",
                     node.layer, " reads ", graph_->tensor(input).name, " before it is made");
    for (std::size_t o = 0; o < node.outputs.size(); ++o) {
      const auto out = static_cast<std::size_t>(node.outputs[o]);
      const auto& tensor = graph_->tensors[out];
      const int alias = node.op->alias(static_cast<int>(o));
      const std::size_t last = std::max(last_read[out], i);
      if (alias >= 0) {
        const auto source = static_cast<std::size_t>(node.inputs[static_cast<std::size_t>(alias)]);
        const auto& from = graph_->tensors[source];
        const bool same_size = from.width == tensor.width && from.dtype == tensor.dtype && from.rows == tensor.rows;
        const bool free = last_read[source] <= i && same_size;
        require<Error>(free || !node.op->in_place_only(), "program: ", node.op->name(), " of layer ", node.layer,
                       " cannot update ", from.name, " in place: it is read later");
        // An input belongs to the caller: overwritten only by kernels that must.
        if (free && (place_[source].input < 0 || node.op->in_place_only())) {
          place_[out] = place_[source];
          life_of[out] = life_of[source];
          if (life_of[out] >= 0) {
            auto& life = lives[static_cast<std::size_t>(life_of[out])];
            life.last = std::max(life.last, last);
          }
          continue;
        }
      }
      const auto rows = static_cast<std::size_t>(capacity[static_cast<std::size_t>(tensor.rows)]);
      const std::size_t bytes = rows * static_cast<std::size_t>(tensor.width) * dtype_size(tensor.dtype);
      life_of[out] = static_cast<int>(lives.size());
      lives.push_back({(bytes + kAlignment - 1) / kAlignment * kAlignment, i, last, 0});
      place_[out].known = true;
    }
  }
  place(lives, workspace_bytes_);
  for (std::size_t t = 0; t < place_.size(); ++t)
    if (life_of[t] >= 0) place_[t].offset = lives[static_cast<std::size_t>(life_of[t])].offset;
}

void Program::observe(TensorId tensor) {
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const auto& outputs = graph_->nodes[static_cast<std::size_t>(nodes_[i])].outputs;
    if (std::find(outputs.begin(), outputs.end(), tensor) == outputs.end()) continue;
    auto& list = observed_[i];
    if (std::find(list.begin(), list.end(), tensor) == list.end()) list.push_back(tensor);
    return;
  }
  throw Error(str("program: observed tensor ", graph_->tensor(tensor).name, " is not made by it"));
}

TensorView Program::value(TensorId id, const RowCounts& rows, std::byte* workspace,
                          std::span<const TensorView> inputs) const {
  const auto& tensor = graph_->tensor(id);
  const auto& place = place_[static_cast<std::size_t>(id)];
  const std::int64_t count = rows[static_cast<std::size_t>(tensor.rows)];
  if (place.input >= 0) return inputs[static_cast<std::size_t>(place.input)];
  return TensorView(workspace + place.offset, tensor.dtype, {count, tensor.width});
}

void Program::run(const RunState& state, const RowCounts& rows, std::byte* workspace,
                  std::span<const TensorView> inputs, ProgramObserver* observer) const {
  require<Error>(inputs.size() == inputs_.size(), "program: ", inputs.size(), " inputs, wanted ", inputs_.size());
  std::vector<TensorView> in, out;
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const auto& node = graph_->nodes[static_cast<std::size_t>(nodes_[i])];
    in.clear();
    out.clear();
    for (const auto id : node.inputs) in.push_back(value(id, rows, workspace, inputs));
    for (const auto id : node.outputs) out.push_back(value(id, rows, workspace, inputs));
    node.op->run(state, node, in, out);
    if (observer != nullptr)
      for (const auto id : observed_[i]) observer->ready(id, value(id, rows, workspace, inputs));
  }
}

}  // namespace flexcore
