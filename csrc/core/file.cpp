#include "core/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

#include "core/check.h"

namespace flexcore {

namespace {

namespace fs = std::filesystem;

template <class E>
[[noreturn]] void fail(const std::string& path, std::string_view what, int error) {
  throw E(str(path, ": ", what, ": ", std::strerror(error)));
}

/// Closes on destruction.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

int retry_open(const char* path, int flags, mode_t mode = 0) {
  int fd;
  do fd = ::open(path, flags | O_CLOEXEC, mode);
  while (fd < 0 && errno == EINTR);
  return fd;
}

std::size_t open_for_reading(const std::string& path, int fd) {
  if (fd < 0) fail<ModelLoadError>(path, "cannot open", errno);
  struct stat status{};
  if (::fstat(fd, &status) != 0) fail<ModelLoadError>(path, "cannot stat", errno);
  require<ModelLoadError>(S_ISREG(status.st_mode), path, ": not a regular file");
  return static_cast<std::size_t>(status.st_size);
}

/// A name beside `path` that nobody else takes: process, then a count.
std::string temporary_name(const std::string& path) {
  static std::atomic<unsigned> count{0};
  const fs::path target(path);
  return (target.parent_path() / str(".", target.filename().string(), ".", ::getpid(), ".", count++, ".tmp")).string();
}

std::string parent_of(const std::string& path) {
  const auto parent = fs::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

// A rename is on disk when the directory that holds the names is. Some file systems cannot sync directories (EINVAL).
void sync_directory(const std::string& path) {
  const Descriptor directory(retry_open(path.c_str(), O_RDONLY | O_DIRECTORY));
  if (directory.get() < 0) fail<Error>(path, "cannot open", errno);
  if (::fsync(directory.get()) != 0 && errno != EINVAL) fail<Error>(path, "cannot sync", errno);
}

/// A new file or directory keeps the permissions of the one whose place it takes.
void copy_mode(const std::string& from, const std::string& to) {
  struct stat status{};
  if (::stat(from.c_str(), &status) == 0) ::chmod(to.c_str(), status.st_mode & 07777);
}

/// Advice on the part of a mapping that [offset, offset + bytes) covers; `whole` leaves partly covered pages out.
void advise(void* data, std::size_t size, std::size_t offset, std::size_t bytes, int advice, bool whole) noexcept {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::size_t begin = std::min(offset, size), end = begin + std::min(bytes, size - begin);
  // The last page of the file has nothing behind it.
  if (whole && end != size) end = end / page * page;
  begin = (whole ? begin + page - 1 : begin) / page * page;
  if (data != nullptr && begin < end) ::madvise(static_cast<std::byte*>(data) + begin, end - begin, advice);
}

}  // namespace

std::string read_file(const std::string& path) {
  const Descriptor file(retry_open(path.c_str(), O_RDONLY));
  std::string text(open_for_reading(path, file.get()), '\0');
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t got = ::read(file.get(), text.data() + done, text.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail<ModelLoadError>(path, "cannot read", errno);
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  text.resize(done);
  return text;
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const Descriptor file(retry_open(path.c_str(), O_RDONLY));
  bytes_ = open_for_reading(path, file.get());
  if (bytes_ == 0) return;
  void* data = ::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file.get(), 0);
  if (data == MAP_FAILED) fail<ModelLoadError>(path, "cannot map", errno);
  data_ = data;
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

void MappedFile::prefetch(std::size_t offset, std::size_t bytes) const noexcept {
  advise(data_, bytes_, offset, bytes, MADV_WILLNEED, false);
}

void MappedFile::release(std::size_t offset, std::size_t bytes) const noexcept {
  advise(data_, bytes_, offset, bytes, MADV_DONTNEED, true);
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  require(!path_.empty(), "path: empty");
  do {
    temporary_ = temporary_name(path_);
    file_ = retry_open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0666);
  } while (file_ < 0 && errno == EEXIST);
  if (file_ < 0) fail<Error>(path_, "cannot create a file beside it", errno);
}

AtomicFile::~AtomicFile() {
  if (file_ < 0) return;
  ::close(file_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, std::size_t bytes) {
  const auto* at = static_cast<const std::byte*>(data);
  while (bytes > 0) {
    const ssize_t done = ::write(file_, at, bytes);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail<Error>(path_, "cannot write", errno);
    at += done;
    bytes -= static_cast<std::size_t>(done);
  }
}

void AtomicFile::commit() {
  copy_mode(path_, temporary_);
  if (::fsync(file_) != 0) fail<Error>(path_, "cannot sync", errno);
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail<Error>(path_, "cannot replace", errno);
  ::close(std::exchange(file_, -1));
  sync_directory(parent_of(path_));
}

void write_file(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

AtomicDirectory::AtomicDirectory(const std::string& path) {
  require(!path.empty(), "directory: empty path");
  try {
    // A link to a directory stays a link; "." and "dir/" get a name that can be renamed.
    auto target = fs::exists(path) ? fs::canonical(path) : fs::absolute(path).lexically_normal();
    if (!target.has_filename()) target = target.parent_path();
    require<Error>(target.has_relative_path(), path, ": cannot replace a root directory");
    require<Error>(!fs::exists(target) || fs::is_directory(target), path, ": not a directory");
    fs::create_directories(target.parent_path());
    path_ = target.string();
    do temporary_ = temporary_name(path_);
    while (!fs::create_directory(temporary_));
  } catch (const fs::filesystem_error& error) {
    fail<Error>(path, "cannot create a directory beside it", error.code().value());
  }
}

AtomicDirectory::~AtomicDirectory() {
  if (temporary_.empty()) return;
  std::error_code ignored;
  fs::remove_all(temporary_, ignored);
}

std::string AtomicDirectory::file(const std::string& name) {
  require(!name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos, "file name: \"", name,
          "\"");
  if (std::find(names_.begin(), names_.end(), name) == names_.end()) names_.push_back(name);
  return temporary_ + "/" + name;
}

void AtomicDirectory::commit() {
  std::error_code ignored;
  for (const auto& name : names_)
    require<Error>(!fs::is_directory(fs::path(path_) / name, ignored), path_, "/", name,
                   ": a directory, wanted a file");
  copy_mode(path_, temporary_);
  sync_directory(temporary_);
  if (::rename(temporary_.c_str(), path_.c_str()) == 0) {  // nothing there, or an empty directory
    temporary_.clear();
  } else if (errno == ENOTEMPTY || errno == EEXIST) {
    replace_existing();
  } else {
    fail<Error>(path_, "cannot replace", errno);
  }
  sync_directory(parent_of(path_));
}

void AtomicDirectory::replace_existing() {
  std::string old = temporary_;
  if (::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, path_.c_str(), RENAME_EXCHANGE) != 0) {
    if (errno != EINVAL && errno != ENOSYS) fail<Error>(path_, "cannot replace", errno);
    // A file system that cannot exchange: for an instant there is none, and a failure puts the old one back.
    old = temporary_name(path_);
    if (::rename(path_.c_str(), old.c_str()) != 0) fail<Error>(path_, "cannot replace", errno);
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
      const int error = errno;
      ::rename(old.c_str(), path_.c_str());
      fail<Error>(path_, "cannot replace", error);
    }
  }
  temporary_.clear();
  // Only what was replaced is removed: other files may be all that their owner has.
  try {
    std::vector<fs::path> entries;
    for (const auto& entry : fs::directory_iterator(old)) entries.push_back(entry.path());
    for (const auto& entry : entries) {
      if (std::find(names_.begin(), names_.end(), entry.filename().string()) == names_.end())
        fs::rename(entry, fs::path(path_) / entry.filename());
      else
        fs::remove(entry);
    }
    fs::remove(old);
  } catch (const fs::filesystem_error& error) {
    throw Error(str(path_, ": written, but earlier files are left in ", old, ": ", error.code().message()));
  }
  sync_directory(path_);
}

}  // namespace flexcore
