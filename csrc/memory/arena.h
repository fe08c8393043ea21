#pragma once

#include <cstddef>
#include <initializer_list>
#include <vector>

#include "memory/buffer.h"

namespace flexcore {

/// Stack of temporary tensors, for kernels' scratch. Grows by whole buffers, which it keeps, when what was reserved is
/// not enough; all of it counts as workspace. Not thread-safe: take scratch for all workers before a parallel region.
class Arena {
 public:
  Arena(Allocator& allocator, MemoryLedger& ledger) : allocator_(&allocator), ledger_(&ledger) {}

  /// One buffer of at least `bytes`, in place of what there is; for before the first use.
  void reserve(std::size_t bytes);
  /// 64-byte aligned, uninitialised, valid until the enclosing Scope ends.
  void* allocate(std::size_t bytes);
  template <class T>
  T* allocate(std::size_t count) {
    return static_cast<T*>(allocate(count * sizeof(T)));
  }
  TensorView tensor(DType dtype, std::initializer_list<std::int64_t> shape);

  /// Gives back, on destruction, what was allocated since construction.
  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), chunk_(arena.chunk_), used_(arena.used_) {}
    ~Scope() {
      arena_.chunk_ = chunk_;
      arena_.used_ = used_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    std::size_t chunk_, used_;
  };

 private:
  Allocator* allocator_;
  MemoryLedger* ledger_;
  std::vector<Buffer> chunks_;
  std::size_t chunk_ = 0;  // index of the chunk in use
  std::size_t used_ = 0;   // bytes used of it
};

}  // namespace flexcore
