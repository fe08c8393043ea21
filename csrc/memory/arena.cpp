#include "memory/arena.h"

#include <algorithm>

#include "core/check.h"

namespace flexcore {

void Arena::reserve(std::size_t bytes) {
  require<Error>(chunk_ == 0 && used_ == 0, "arena: reserved while in use");
  chunks_.clear();
  chunks_.emplace_back(*allocator_, *ledger_, MemoryTag::kWorkspace, bytes);
}

void* Arena::allocate(std::size_t bytes) {
  constexpr std::size_t kAlignment = 64, kMinChunk = 1 << 20;
  bytes = std::max<std::size_t>((bytes + kAlignment - 1) / kAlignment * kAlignment, kAlignment);
  while (chunk_ < chunks_.size() && used_ + bytes > chunks_[chunk_].bytes()) {
    ++chunk_;
    used_ = 0;
  }
  if (chunk_ == chunks_.size())
    chunks_.emplace_back(*allocator_, *ledger_, MemoryTag::kWorkspace, std::max(bytes, kMinChunk));
  void* data = chunks_[chunk_].data() + used_;
  used_ += bytes;
  return data;
}

TensorView Arena::tensor(DType dtype, std::initializer_list<std::int64_t> shape) {
  std::size_t bytes = dtype_size(dtype);
  for (const auto extent : shape) bytes *= static_cast<std::size_t>(extent);
  return TensorView(allocate(bytes), dtype, shape);
}

}  // namespace flexcore
