#include "memory/buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/check.h"

namespace flexcore {

namespace {

class HostAllocator final : public HostMemory {
 public:
  void* allocate(std::size_t bytes) override {
    constexpr std::size_t kAlignment = 64, kHugePage = std::size_t{2} << 20;
    const bool huge = bytes >= 2 * kHugePage;
    void* data = nullptr;
    if (posix_memalign(&data, huge ? kHugePage : kAlignment, std::max(bytes, kAlignment)) != 0) return nullptr;
#ifdef MADV_HUGEPAGE
    // Weights and pages of the pool are far apart: fewer misses of the TLB. Where the system has none to give, none.
    if (huge) madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    return data;
  }
  void deallocate(void* data, std::size_t) noexcept override { std::free(data); }
};

}  // namespace

void HostMemory::copy(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

Allocator& host_allocator() {
  static HostAllocator allocator;
  return allocator;
}

Buffer::Buffer(Allocator& allocator, MemoryLedger& ledger, MemoryTag tag, std::size_t bytes)
    : allocator_(&allocator), ledger_(&ledger), tag_(tag) {
  if (bytes == 0) return;
  data_ = allocator.allocate(bytes);
  require<OutOfMemory>(data_ != nullptr, "out of memory: ", bytes, " bytes for ", memory_tag_name(tag),
                       "; held: ", ledger.describe());
  bytes_ = bytes;
  ledger.add(tag, bytes);
}

Buffer::Buffer(Buffer&& other) noexcept { *this = std::move(other); }

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this == &other) return *this;
  reset();
  data_ = std::exchange(other.data_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  allocator_ = other.allocator_;
  ledger_ = other.ledger_;
  tag_ = other.tag_;
  return *this;
}

Buffer::~Buffer() { reset(); }

void Buffer::reset() noexcept {
  if (data_ == nullptr) return;
  allocator_->deallocate(data_, bytes_);
  ledger_->remove(tag_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

TensorView Buffer::view(DType dtype, std::initializer_list<std::int64_t> shape, std::size_t offset) const {
  TensorView view(data_ == nullptr ? nullptr : data() + offset, dtype, shape);
  require(offset + view.bytes() <= bytes_, "buffer view: ", view.describe(), " at ", offset, " in ", bytes_, " bytes");
  return view;
}

}  // namespace flexcore
