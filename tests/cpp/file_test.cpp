#include "core/file.h"

#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <cstring>
#include <utility>

#include "flexcore/error.h"
#include "temp_dir.h"

namespace flexcore {
namespace {

namespace fs = std::filesystem;

/// Writing past `bytes` fails, after a short write, as on a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) : handler_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_{};
  void (*handler_)(int);
};

void write_set(const std::string& directory, const std::string& text) {
  AtomicDirectory set(directory);
  write_file(set.file("a"), text + "a");
  write_file(set.file("b"), text + "b");
  set.commit();
}

TEST(File, ReadsAndMaps) {
  const TempDir dir;
  const std::string text(10000, 'x');
  const auto path = dir.write("f", text);
  EXPECT_EQ(read_file(path), text);
  MappedFile mapped(path);
  ASSERT_EQ(mapped.bytes(), text.size());
  mapped.prefetch(0, 1 << 20);
  mapped.release(0, 1 << 20);
  mapped.release(1 << 30, 5);
  EXPECT_EQ(std::memcmp(mapped.data(), text.data(), text.size()), 0);
  const MappedFile moved = std::move(mapped);
  EXPECT_EQ(moved.path(), path);
  EXPECT_EQ(static_cast<char>(moved.data()[9999]), 'x');
  EXPECT_EQ(mapped.data(), nullptr);
}

TEST(File, ReadsEmptyFiles) {
  const TempDir dir;
  const auto path = dir.write("f", "");
  EXPECT_EQ(read_file(path), "");
  EXPECT_EQ(MappedFile(path).bytes(), 0u);
}

TEST(File, ReadingNamesPathAndReason) {
  const TempDir dir;
  const auto message = message_of<ModelLoadError>([&] { MappedFile(dir.path("none")); });
  EXPECT_HAS(message, dir.path("none"));
  EXPECT_HAS(message, "No such file");
  EXPECT_THROW(read_file(dir.path()), ModelLoadError);
}

TEST(AtomicFile, ReplacesWholeAndKeepsPermissions) {
  const TempDir dir;
  write_file(dir.path("f"), "one");
  EXPECT_EQ(dir.read("f"), "one");
  ::chmod(dir.path("f").c_str(), 0640);
  write_file(dir.path("f"), "two");
  EXPECT_EQ(dir.read("f"), "two");
  EXPECT_EQ(fs::status(dir.path("f")).permissions(), fs::perms(0640));
  EXPECT_EQ(dir.entries(), 1u);
}

TEST(AtomicFile, LeavesNothingWithoutCommit) {
  const TempDir dir;
  dir.write("f", "old");
  {
    AtomicFile file(dir.path("f"));
    file.write("new");
    EXPECT_EQ(dir.read("f"), "old");
  }
  EXPECT_EQ(dir.read("f"), "old");
  EXPECT_EQ(dir.entries(), 1u);
}

TEST(AtomicFile, KeepsTheOldFileWhenTheDiskIsFull) {
  const TempDir dir;
  dir.write("f", "old");
  std::string message;
  {
    const FileSizeLimit limit(1000);
    message = message_of<Error>([&] { write_file(dir.path("f"), std::string(5000, 'x')); });
  }
  EXPECT_HAS(message, dir.path("f"));
  EXPECT_HAS(message, "File too large");
  EXPECT_EQ(dir.read("f"), "old");
  EXPECT_EQ(dir.entries(), 1u);
}

TEST(AtomicFile, NamesPathsThatCannotBeWritten) {
  const TempDir dir;
  EXPECT_HAS(message_of<Error>([&] { write_file(dir.path("none/f"), "x"); }), "none/f: cannot create");
  EXPECT_THROW(write_file("", "x"), InvalidArgument);
  fs::create_directory(dir.path("d"));
  EXPECT_HAS(message_of<Error>([&] { write_file(dir.path("d"), "x"); }), "cannot replace");
  EXPECT_EQ(dir.entries(), 1u);
}

TEST(AtomicDirectory, CreatesWithParentsThenReplaces) {
  const TempDir dir;
  write_set(dir.path("deep/set"), "1");
  EXPECT_EQ(dir.read("deep/set/a"), "1a");
  write_set(dir.path("deep/set/"), "2");
  EXPECT_EQ(dir.read("deep/set/a"), "2a");
  EXPECT_EQ(dir.read("deep/set/b"), "2b");
  EXPECT_EQ(std::distance(fs::directory_iterator(dir.path("deep")), {}), 1);
  fs::create_directory(dir.path("empty"));
  write_set(dir.path("empty"), "3");
  EXPECT_EQ(dir.read("empty/b"), "3b");
}

TEST(AtomicDirectory, KeepsFilesThatAreNotItsOwn) {
  const TempDir dir;
  write_set(dir.path("set"), "1");
  dir.write("set/notes.txt", "mine");
  fs::create_directories(dir.path("set/sub"));
  dir.write("set/sub/x", "mine too");
  write_set(dir.path("set"), "2");
  EXPECT_EQ(dir.read("set/a"), "2a");
  EXPECT_EQ(dir.read("set/notes.txt"), "mine");
  EXPECT_EQ(dir.read("set/sub/x"), "mine too");
  EXPECT_EQ(dir.entries(), 1u);
}

TEST(AtomicDirectory, FollowsLinks) {
  const TempDir dir;
  write_set(dir.path("set"), "1");
  fs::create_directory_symlink("set", dir.path("link"));
  write_set(dir.path("link"), "2");
  EXPECT_TRUE(fs::is_symlink(dir.path("link")));
  EXPECT_EQ(dir.read("set/a"), "2a");
}

TEST(AtomicDirectory, LeavesTheOldSetWhenOneFileFails) {
  const TempDir dir;
  write_set(dir.path("set"), "1");
  {
    const FileSizeLimit limit(1000);
    EXPECT_THROW(write_set(dir.path("set"), std::string(5000, 'x')), Error);
  }
  EXPECT_EQ(dir.read("set/a"), "1a");
  EXPECT_EQ(dir.read("set/b"), "1b");
  EXPECT_EQ(dir.entries(), 1u);
}

TEST(AtomicDirectory, RefusesWhatItCannotReplace) {
  const TempDir dir;
  dir.write("file", "x");
  EXPECT_HAS(message_of<Error>([&] { AtomicDirectory set(dir.path("file")); }), "not a directory");
  EXPECT_THROW(AtomicDirectory(""), InvalidArgument);
  EXPECT_THROW(AtomicDirectory("/"), Error);
  EXPECT_THROW(AtomicDirectory(dir.path("file/set")), Error);
  AtomicDirectory set(dir.path("set"));
  for (const char* name : {"", ".", "..", "a/b"}) EXPECT_THROW(set.file(name), InvalidArgument);
  fs::create_directories(dir.path("set/a/sub"));
  write_file(set.file("a"), "x");
  EXPECT_HAS(message_of<Error>([&] { set.commit(); }), "wanted a file");
  EXPECT_TRUE(fs::exists(dir.path("set/a/sub")));
}

}  // namespace
}  // namespace flexcore
