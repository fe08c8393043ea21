#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace flexcore {

// Reading throws ModelLoadError, writing throws Error; both name the path and the system's reason.

/// The whole file.
std::string read_file(const std::string& path);

/// A file mapped read-only. Move-only; empty files are legal and have no data.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  const std::byte* data() const { return static_cast<const std::byte*>(data_); }
  std::size_t bytes() const { return bytes_; }
  const std::string& path() const { return path_; }

  /// Asks the system to read [offset, offset + bytes) ahead.
  void prefetch(std::size_t offset, std::size_t bytes) const noexcept;
  /// Gives the whole pages inside [offset, offset + bytes) back; reading them again fetches them again.
  void release(std::size_t offset, std::size_t bytes) const noexcept;

 private:
  std::string path_;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// A file that appears under its name whole or not at all. It is written beside its place; until `commit` returns, and
/// after any failure, what was there before is untouched. Destroyed without `commit`: nothing remains.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  void write(const void* data, std::size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  /// Reaches the disk (fsync), then takes its name.
  void commit();

 private:
  std::string path_, temporary_;
  int file_ = -1;
};

/// AtomicFile for text that is at hand.
void write_file(const std::string& path, std::string_view text);

/// Several files that appear in a directory together or not at all. Missing parent directories are made. Files of an
/// existing directory that are not among the new ones stay in it.
class AtomicDirectory {
 public:
  explicit AtomicDirectory(const std::string& path);
  AtomicDirectory(const AtomicDirectory&) = delete;
  AtomicDirectory& operator=(const AtomicDirectory&) = delete;
  ~AtomicDirectory();

  /// Where to write the file that is to become `path/name`; `name` has no slash.
  std::string file(const std::string& name);
  /// Swaps the directory in. Every file must be complete and on disk, as AtomicFile leaves it.
  void commit();

 private:
  void replace_existing();

  std::string path_, temporary_;
  std::vector<std::string> names_;
};

}  // namespace flexcore
