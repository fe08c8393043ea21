#include "compile/program.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "core/check.h"

namespace flexcore {

namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kColumnAlignment = 16;  // of what is joined, in every row

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
                 std::vector<TensorId> outputs, const RowCounts& capacity, bool join)
    : graph_(std::move(graph)), nodes_(std::move(nodes)), inputs_(std::move(inputs)) {
  observed_.resize(nodes_.size());
  assign_memory(capacity, outputs, join);
}

// By TensorId: some reader, of it or of what takes over its memory, wants its rows side by side.
std::vector<bool> Program::without_gaps() const {
  std::vector<bool> wanted(graph_->tensors.size(), false);
  for (std::size_t i = nodes_.size(); i-- > 0;) {
    const auto& node = graph_->nodes[static_cast<std::size_t>(nodes_[i])];
    for (const auto input : node.inputs)
      if (!node.op->takes_gaps(graph_->tensor(input).width)) wanted[static_cast<std::size_t>(input)] = true;
    for (std::size_t o = 0; o < node.outputs.size(); ++o) {
      const auto out = static_cast<std::size_t>(node.outputs[o]);
      if (!node.op->takes_gaps(graph_->tensors[out].width)) wanted[out] = true;
      const int alias = node.op->alias(static_cast<int>(o));
      if (alias >= 0 && wanted[out])
        wanted[static_cast<std::size_t>(node.inputs[static_cast<std::size_t>(alias)])] = true;
    }
  }
  return wanted;
}

void Program::assign_memory(const RowCounts& capacity, const std::vector<TensorId>& outputs, bool join) {
  place_.assign(graph_->tensors.size(), {});
  std::vector<std::size_t> last_read(graph_->tensors.size(), 0);
  for (std::size_t i = 0; i < nodes_.size(); ++i)
    for (const auto input : graph_->nodes[static_cast<std::size_t>(nodes_[i])].inputs)
      last_read[static_cast<std::size_t>(input)] = i;
  for (const auto output : outputs) last_read[static_cast<std::size_t>(output)] = nodes_.size();

  std::vector<Life> lives;
  std::vector<int> life_of(graph_->tensors.size(), -1);
  std::vector<std::size_t> column_of(graph_->tensors.size(), 0);  // bytes into its life's rows
  const std::vector<bool> apart = join ? without_gaps() : std::vector<bool>(graph_->tensors.size(), true);
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
    std::optional<std::size_t> joined;  // the node's output to which this one may be joined
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
          column_of[out] = column_of[source];
          if (life_of[out] >= 0) {
            auto& life = lives[static_cast<std::size_t>(life_of[out])];
            life.last = std::max(life.last, last);
          }
          continue;
        }
      }
      const auto rows = static_cast<std::size_t>(capacity[static_cast<std::size_t>(tensor.rows)]);
      const std::size_t row_bytes = static_cast<std::size_t>(tensor.width) * dtype_size(tensor.dtype);
      const auto rounded = [](std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; };
      place_[out] = {.stride = tensor.width, .known = true};
      const bool joins = node.op->joins_outputs() && !apart[out] && row_bytes % kColumnAlignment == 0;
      const auto* first = joined ? &graph_->tensors[*joined] : nullptr;
      if (joins && first != nullptr && first->dtype == tensor.dtype && first->rows == tensor.rows) {
        auto& life = lives[static_cast<std::size_t>(life_of[*joined])];
        life_of[out] = life_of[*joined];
        column_of[out] = static_cast<std::size_t>(place_[*joined].stride) * dtype_size(tensor.dtype);
        life.last = std::max(life.last, last);
        for (std::size_t t = 0; t <= o; ++t)
          if (const auto other = static_cast<std::size_t>(node.outputs[t]); life_of[other] == life_of[out])
            place_[other].stride = static_cast<std::int64_t>(column_of[out] / dtype_size(tensor.dtype)) + tensor.width;
        life.bytes = rounded(rows * static_cast<std::size_t>(place_[out].stride) * dtype_size(tensor.dtype));
        continue;
      }
      if (joins) joined = out;
      life_of[out] = static_cast<int>(lives.size());
      lives.push_back({rounded(rows * row_bytes), i, last, 0});
    }
  }
  place(lives, workspace_bytes_);
  for (std::size_t t = 0; t < place_.size(); ++t)
    if (life_of[t] >= 0) place_[t].offset = lives[static_cast<std::size_t>(life_of[t])].offset + column_of[t];
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
  TensorView view(workspace + place.offset, tensor.dtype, {count, tensor.width});
  view.set_stride(0, place.stride);
  return view;
}

void Program::run(const RunState& state, const RowCounts& rows, std::byte* workspace,
                  std::span<const TensorView> inputs, ProgramObserver* observer) const {
  require<Error>(inputs.size() == inputs_.size(), "program: ", inputs.size(), " inputs, wanted ", inputs_.size());
  std::vector<TensorView> in, out;
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const auto& node = graph_->nodes[static_cast<std::size_t>(nodes_[i])];
    if (!node.op->idle(*state.batch)) {
      in.clear();
      out.clear();
      for (const auto id : node.inputs) in.push_back(value(id, rows, workspace, inputs));
      for (const auto id : node.outputs) out.push_back(value(id, rows, workspace, inputs));
      node.op->run(state, node, in, out);
    }
    if (observer != nullptr)
      for (const auto id : observed_[i]) observer->ready(id, value(id, rows, workspace, inputs));
  }
}

}  // namespace flexcore
