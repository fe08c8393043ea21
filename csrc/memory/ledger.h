#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>

namespace flexcore {

/// What a reservation is for. These names are the keys of `Engine.memory()`.
enum class MemoryTag : std::uint8_t {
  kWeights,
  kKvPages,
  kSavedActivations,
  kAdapters,
  kGradients,
  kOptimizer,
  kWorkspace,
  kSwapSpace,             // in host memory
  kOffloadedActivations,  // there too
  kCount,
};

std::string_view memory_tag_name(MemoryTag tag);

/// Counts every byte that an engine holds, by tag. Thread-safe.
class MemoryLedger {
 public:
  void add(MemoryTag tag, std::size_t bytes);
  void remove(MemoryTag tag, std::size_t bytes);
  /// Bytes that are there already serve something else. Returns how many: no more than there are.
  std::size_t move(MemoryTag from, MemoryTag to, std::size_t bytes);

  std::size_t current(MemoryTag tag) const;
  std::size_t peak(MemoryTag tag) const;
  std::size_t total() const;
  /// Lets `peak` start again from the current value.
  void reset_peak(MemoryTag tag);
  std::string describe() const;  // "weights 269.1 MB, kv_pages 94.4 MB, ...", for messages

 private:
  static constexpr std::size_t kTags = static_cast<std::size_t>(MemoryTag::kCount);
  mutable std::mutex mutex_;
  std::array<std::size_t, kTags> current_{};
  std::array<std::size_t, kTags> peak_{};
};

/// Bytes of one tag that serve another for as long as this lives. Move-only.
class LedgerLoan {
 public:
  LedgerLoan() = default;
  LedgerLoan(MemoryLedger& ledger, MemoryTag of, MemoryTag as, std::size_t bytes);
  LedgerLoan(LedgerLoan&& other) noexcept;
  LedgerLoan& operator=(LedgerLoan&& other) noexcept;
  ~LedgerLoan() { end(); }
  void end() noexcept;

 private:
  MemoryLedger* ledger_ = nullptr;
  MemoryTag of_ = MemoryTag::kWorkspace, as_ = MemoryTag::kWorkspace;
  std::size_t bytes_ = 0;
};

}  // namespace flexcore
