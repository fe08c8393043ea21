#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/file.h"
#include "flexcore/tensor.h"

namespace flexcore {

/// The tensors of a safetensors file, or of a directory with model.safetensors or model.safetensors.index.json and its
/// shards, mapped into memory. Everything the headers say is checked before the constructor returns. Throws
/// ModelLoadError that names the file and the tensor; Unsupported for a directory that has weights only in another
/// format.
class SafetensorsModel {
 public:
  struct Entry {
    std::string name;
    std::string dtype;  // as in the file: "F32", "BF16", "F8_E4M3", ...
    std::vector<std::int64_t> shape;
    std::size_t file = 0;    // index of the shard
    std::size_t offset = 0;  // from the start of the shard's file
    std::size_t bytes = 0;
  };

  /// A file or a directory.
  explicit SafetensorsModel(const std::string& path);

  const std::string& path() const { return path_; }
  /// In the order of the files' bytes.
  std::span<const Entry> entries() const { return entries_; }
  /// Null when there is no such tensor.
  const Entry* find(std::string_view name) const;
  /// The mapped elements, read-only in spite of the type. They may begin at any byte: check the alignment before use.
  /// Unsupported for dtypes that TensorView has no name for; ModelLoadError for absent tensors and more than four
  /// dimensions.
  TensorView tensor(std::string_view name) const;
  /// File and tensor, for messages.
  std::string describe(const Entry& entry) const;

  void prefetch(const Entry& entry) const noexcept { files_[entry.file].prefetch(entry.offset, entry.bytes); }
  /// Drops the tensor's pages from memory; they come back from the file when read again.
  void release(const Entry& entry) const noexcept { files_[entry.file].release(entry.offset, entry.bytes); }

 private:
  void add_file(const std::string& path);
  void add_shards(const std::string& directory, const std::string& index_path);

  std::string path_;
  std::vector<MappedFile> files_;
  std::vector<Entry> entries_;
  std::unordered_map<std::string_view, std::size_t> by_name_;  // keys live in entries_
};

/// Writes host tensors as one file, in the order given, with the metadata {"format": "pt"}; whole or not at all
/// (AtomicFile). The tensors must be contiguous. Throws InvalidArgument for repeated names, Error when writing fails.
void write_safetensors(const std::string& path, std::span<const std::pair<std::string, TensorView>> tensors);

}  // namespace flexcore
