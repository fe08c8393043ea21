#pragma once

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "backends/cuda/context.h"

// Tables that kernels read about a batch. A plan is made on the host from what the batch holds; its arrays are copied
// to the device at once: to scratch, or to a place that a recording keeps and fills again at every replay.
namespace flexcore::cuda {

/// Views of a plan's arrays, one after the other.
class HostTables {
 public:
  /// Where a recorded launch has room for more elements than there are, the others are made of `filler` bytes, which
  /// its kernel takes for nothing to do.
  template <class T>
  HostTables& add(const std::vector<T>& table, unsigned char filler = 0) {
    static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= kAlignment);
    parts_.push_back({reinterpret_cast<const std::byte*>(table.data()), table.size(), sizeof(T), filler});
    return *this;
  }

 private:
  friend class DeviceTables;
  static constexpr std::size_t kAlignment = 16;
  struct Part {
    const std::byte* data;
    std::size_t count, element_bytes;
    unsigned char filler;
  };
  std::vector<Part> parts_;
};

/// Room on the device for such arrays.
class DeviceTables {
 public:
  DeviceTables() = default;
  /// Room for what is there, or for the next power of two of it, and at least for what `least` has room for.
  DeviceTables(const HostTables& tables, bool spare, const DeviceTables* least = nullptr);

  std::size_t bytes() const { return bytes_; }
  void put_at(const std::byte* device) { device_ = device; }
  /// The arrays in a host image of bytes(), filled up; the last ones may be left out. False: there is no room for one.
  bool write(const HostTables& tables, std::byte* image) const;

  /// Array number `part`, and how many elements a launch goes through.
  template <class T>
  const T* get(std::size_t part) const {
    if (device_ == nullptr) return nullptr;
    return reinterpret_cast<const T*>(device_ + parts_[part].offset);
  }
  std::int64_t count(std::size_t part) const { return static_cast<std::int64_t>(parts_[part].count); }

 private:
  struct Part {
    std::size_t offset, count, element_bytes;
    unsigned char filler;
  };
  std::vector<Part> parts_;
  std::size_t bytes_ = 0;
  const std::byte* device_ = nullptr;
};

/// A plan as it was when a launch was made, and its tables on the device.
template <class Plan>
struct Placed {
  Plan plan;
  DeviceTables device;
};

/// The launches of a batch shape while they are recorded (recording.cpp).
class TableKeeper {
 public:
  virtual ~TableKeeper() = default;
  /// Room that stays; `refill` writes the arrays of the batch that is there at a replay to an image of it, or says that
  /// they do not fit.
  virtual DeviceTables keep(const HostTables& tables, std::function<bool(const DeviceTables&, std::byte*)> refill) = 0;
};

/// A copy in scratch, in the order of the stream.
DeviceTables upload_tables(OpContext& context, const HostTables& tables);

/// Makes a plan and places its tables. `make()` returns a Plan with `HostTables tables() const` and `bool fits(const
/// Plan& recorded) const`: whether launches that were recorded for one plan compute another, its tables aside. It is
/// kept by a recording, so it may refer only to what outlives that: spans of the executor's, tensors by value.
template <class Make>
auto place(OpContext& context, Make make) {
  using Plan = decltype(make());
  auto placed = std::make_shared<Placed<Plan>>(Placed<Plan>{make(), {}});
  TableKeeper* keeper = stream_of(context).keeper;
  placed->device =
      keeper == nullptr
          ? upload_tables(context, placed->plan.tables())
          : keeper->keep(placed->plan.tables(), [make, placed](const DeviceTables& room, std::byte* image) {
              const Plan plan = make();
              return plan.fits(placed->plan) && room.write(plan.tables(), image);
            });
  return placed;
}

/// The same, kept for all calls with this key while OpContext::batch stays the same: plans that no layer changes.
/// Scratch is then the caller's: it must have no scope of its own open.
template <class Make>
auto place_once(OpContext& context, const BatchTables::Key& key, Make make) {
  using Plan = decltype(make());
  BatchTables& kept = stream_of(context).batch_tables;
  if (context.batch == 0) return place(context, std::move(make));
  if (kept.batch != context.batch) kept.tables.clear();
  kept.batch = context.batch;
  auto& entry = kept.tables[key];
  if (entry == nullptr) entry = place(context, std::move(make));
  return std::static_pointer_cast<Placed<Plan>>(entry);
}

/// `what`: an address of the plan's own; what else tells one plan from another.
template <class Span>
BatchTables::Key batch_key(const char* what, std::span<const Span> spans, std::initializer_list<std::int64_t> more) {
  const auto number = [](const void* p) { return static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(p)); };
  BatchTables::Key key{number(what), number(spans.data()), static_cast<std::int64_t>(spans.size())};
  key.insert(key.end(), more);
  return key;
}

/// Scratch that a call gives back, tables that are kept for the batch excepted.
class CallScope {
 public:
  explicit CallScope(OpContext& context) {
    if (context.batch == 0) scope_.emplace(*context.scratch);
  }

 private:
  std::optional<Arena::Scope> scope_;
};

}  // namespace flexcore::cuda
