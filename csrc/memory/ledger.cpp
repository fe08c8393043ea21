#include "memory/ledger.h"

#include <algorithm>
#include <cstdio>
#include <utility>

namespace flexcore {

std::string_view memory_tag_name(MemoryTag tag) {
  switch (tag) {
    case MemoryTag::kWeights:
      return "weights";
    case MemoryTag::kKvPages:
      return "kv_pages";
    case MemoryTag::kSavedActivations:
      return "saved_activations";
    case MemoryTag::kAdapters:
      return "adapters";
    case MemoryTag::kGradients:
      return "gradients";
    case MemoryTag::kOptimizer:
      return "optimizer";
    case MemoryTag::kWorkspace:
      return "workspace";
    case MemoryTag::kSwapSpace:
      return "swap_space";
    case MemoryTag::kOffloadedActivations:
      return "offloaded_activations";
    case MemoryTag::kCount:
      break;
  }
  return "unknown";
}

void MemoryLedger::add(MemoryTag tag, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto i = static_cast<std::size_t>(tag);
  current_[i] += bytes;
  peak_[i] = std::max(peak_[i], current_[i]);
}

void MemoryLedger::remove(MemoryTag tag, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  auto& current = current_[static_cast<std::size_t>(tag)];
  current -= std::min(current, bytes);
}

std::size_t MemoryLedger::move(MemoryTag from, MemoryTag to, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  auto& source = current_[static_cast<std::size_t>(from)];
  bytes = std::min(source, bytes);
  source -= bytes;
  const auto i = static_cast<std::size_t>(to);
  current_[i] += bytes;
  peak_[i] = std::max(peak_[i], current_[i]);
  return bytes;
}

LedgerLoan::LedgerLoan(MemoryLedger& ledger, MemoryTag of, MemoryTag as, std::size_t bytes)
    : ledger_(&ledger), of_(of), as_(as), bytes_(ledger.move(of, as, bytes)) {}

LedgerLoan::LedgerLoan(LedgerLoan&& other) noexcept
    : ledger_(std::exchange(other.ledger_, nullptr)), of_(other.of_), as_(other.as_), bytes_(other.bytes_) {}

LedgerLoan& LedgerLoan::operator=(LedgerLoan&& other) noexcept {
  if (this == &other) return *this;
  end();
  ledger_ = std::exchange(other.ledger_, nullptr);
  of_ = other.of_, as_ = other.as_, bytes_ = other.bytes_;
  return *this;
}

void LedgerLoan::end() noexcept {
  if (ledger_ != nullptr) ledger_->move(as_, of_, bytes_);
  ledger_ = nullptr;
}

std::size_t MemoryLedger::current(MemoryTag tag) const {
  const std::lock_guard lock(mutex_);
  return current_[static_cast<std::size_t>(tag)];
}

std::size_t MemoryLedger::peak(MemoryTag tag) const {
  const std::lock_guard lock(mutex_);
  return peak_[static_cast<std::size_t>(tag)];
}

std::size_t MemoryLedger::total() const {
  const std::lock_guard lock(mutex_);
  std::size_t sum = 0;
  for (const auto bytes : current_) sum += bytes;
  return sum;
}

void MemoryLedger::reset_peak(MemoryTag tag) {
  const std::lock_guard lock(mutex_);
  peak_[static_cast<std::size_t>(tag)] = current_[static_cast<std::size_t>(tag)];
}

std::string MemoryLedger::describe() const {
  std::string text;
  for (std::size_t i = 0; i < kTags; ++i) {
    const auto tag = static_cast<MemoryTag>(i);
    char line[96];
    std::snprintf(line, sizeof line, "%s%.*s %.1f MB", i ? ", " : "", static_cast<int>(memory_tag_name(tag).size()),
                  memory_tag_name(tag).data(), static_cast<double>(current(tag)) / 1e6);
    text += line;
  }
  return text;
}

}  // namespace flexcore
