#include "train/train_state.h"

#include <algorithm>
#include <utility>

namespace flexcore {

namespace {

std::size_t gradients_offset(std::size_t saved_bytes) { return (saved_bytes + 63) / 64 * 64; }

bool first_is_target(const AdapterLayout& layout) {
  return layout.num_virtual_tokens > 0 && layout.modules.front().bypass.kind == BypassKind::kPrompt;
}

}  // namespace

TrainState::TrainState(const Example& example_, std::shared_ptr<Adapter> adapter_, TrainingProgram& program_,
                       float* gradients_, float grad_scale_)
    : example(&example_),
      adapter(std::move(adapter_)),
      program(&program_),
      gradients(gradients_),
      grad_scale(grad_scale_) {
  const AdapterLayout& layout = adapter->layout;
  with_virtual_tokens(example_.input_ids, layout.num_virtual_tokens, tokens);
  labels.assign(static_cast<std::size_t>(layout.num_virtual_tokens), -100);
  labels.insert(labels.end(), example_.labels.begin(), example_.labels.end());
  if (!first_is_target(layout)) labels[static_cast<std::size_t>(layout.num_virtual_tokens)] = -100;
  num_targets = count_targets(example_, layout);
}

KeptBytes TrainState::saved_bytes(const TrainingProgram& program, std::int64_t length) {
  const auto tokens = static_cast<std::size_t>(length);
  const KeptBytes& a_token = program.saved_bytes_per_token;
  return {.device = a_token.device * tokens, .host = a_token.host * tokens};
}

std::size_t TrainState::gradient_bytes(const TrainShape& shape, std::int64_t length) {
  return static_cast<std::size_t>((shape.hidden_size + 2 * shape.kv_width) * length) * sizeof(float);
}

KeptBytes TrainState::store_bytes(const TrainingProgram& program, const TrainShape& shape, std::int64_t length) {
  KeptBytes bytes = saved_bytes(program, length);
  bytes.device = gradients_offset(bytes.device) + gradient_bytes(shape, length);
  return bytes;
}

void TrainState::place(const Store& store, MemoryLedger& ledger, const TrainShape& shape) {
  shape_ = shape;
  const auto [device, host] = saved_bytes(*program, length());
  release();
  store_ = store;
  saved_loan_ = LedgerLoan(ledger, MemoryTag::kKvPages, MemoryTag::kSavedActivations, device);
  offloaded_loan_ = LedgerLoan(ledger, MemoryTag::kSwapSpace, MemoryTag::kOffloadedActivations, host);
  gradient_loan_ = LedgerLoan(ledger, MemoryTag::kKvPages, MemoryTag::kGradients, gradient_bytes(shape, length()));
}

void TrainState::restart() {
  release();
  loss_sum = 0.0;
}

void TrainState::release() {
  swap_out();
  offloaded_loan_.end();
}

void TrainState::swap_out() {
  store_ = {};
  saved_loan_.end();
  gradient_loan_.end();
}

float* TrainState::gradients_at() const {
  return reinterpret_cast<float*>(store_.device + gradients_offset(saved_bytes(*program, length()).device));
}

TensorView TrainState::saved(std::size_t index, std::int64_t begin, std::int64_t end) const {
  const auto& tensor = program->saved[index];
  const auto width = static_cast<std::int64_t>(tensor.bytes_per_token() / dtype_size(tensor.dtype));
  std::byte* store = tensor.in_host ? store_.host : store_.device;
  return TensorView(store + tensor.offset * static_cast<std::size_t>(length()), tensor.dtype, {length(), width})
      .rows(begin, end);
}

TensorView TrainState::grad_hidden(std::int64_t begin, std::int64_t end) const {
  return TensorView(gradients_at(), DType::kFloat32, {length(), shape_.hidden_size}).rows(begin, end);
}

float* TrainState::grad_k() const { return gradients_at() + shape_.hidden_size * length(); }

float* TrainState::grad_v() const { return grad_k() + shape_.kv_width * length(); }

TensorView TrainState::kv_gradients() const {
  return TensorView(grad_k(), DType::kFloat32, {2 * length(), shape_.kv_width});
}

std::int64_t count_targets(const Example& example, const AdapterLayout& layout) {
  const bool skip = !example.labels.empty() && !first_is_target(layout);
  return std::count_if(example.labels.begin() + (skip ? 1 : 0), example.labels.end(),
                       [](std::int32_t label) { return label != -100; });
}

}  // namespace flexcore
