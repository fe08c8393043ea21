#include "backends/cuda/tables.h"

#include <bit>
#include <cstring>

namespace flexcore::cuda {

DeviceTables::DeviceTables(const HostTables& tables, bool spare, const DeviceTables* least) {
  const bool alike = least != nullptr && least->parts_.size() == tables.parts_.size();
  for (const auto& part : tables.parts_) {
    std::size_t count = spare && part.count > 0 ? std::bit_ceil(part.count) : part.count;
    if (alike) count = std::max(count, least->parts_[parts_.size()].count);
    parts_.push_back({bytes_, count, part.element_bytes, part.filler});
    bytes_ +=
        (count * part.element_bytes + HostTables::kAlignment - 1) / HostTables::kAlignment * HostTables::kAlignment;
  }
}

bool DeviceTables::write(const HostTables& tables, std::byte* image) const {
  if (tables.parts_.size() > parts_.size()) return false;
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    const auto& room = parts_[i];
    const std::size_t count = i < tables.parts_.size() ? tables.parts_[i].count : 0;
    if (count > room.count) return false;
    std::byte* to = image + room.offset;
    if (count > 0) std::memcpy(to, tables.parts_[i].data, count * room.element_bytes);
    std::memset(to + count * room.element_bytes, room.filler, (room.count - count) * room.element_bytes);
  }
  return true;
}

DeviceTables upload_tables(OpContext& context, const HostTables& tables) {
  DeviceTables device(tables, false);
  if (device.bytes() == 0) return device;
  auto* data = context.scratch->allocate<std::byte>(device.bytes());
  stream_of(context).staging.upload(data, device.bytes(), [&](std::byte* image) { device.write(tables, image); });
  device.put_at(data);
  return device;
}

}  // namespace flexcore::cuda
