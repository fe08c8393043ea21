#include "model/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <set>

#include "core/check.h"
#include "core/json.h"

namespace flexcore {

namespace {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

namespace fs = std::filesystem;

constexpr std::size_t kPrefix = 8;                 // header length, uint64
constexpr std::uint64_t kMaxHeader = 100'000'000;  // as in the reference implementation

struct DtypeBits {
  std::string_view name;
  std::size_t bits;
};
constexpr DtypeBits kDtypes[] = {
    {"F64", 64},    {"F32", 32},    {"F16", 16}, {"BF16", 16}, {"I64", 64},    {"I32", 32},    {"I16", 16},
    {"I8", 8},      {"U64", 64},    {"U32", 32}, {"U16", 16},  {"U8", 8},      {"BOOL", 8},    {"F8_E4M3", 8},
    {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F4", 4},   {"C64", 64},  {"F6_E2M3", 6}, {"F6_E3M2", 6},
};

struct DtypeName {
  std::string_view name;
  DType dtype;
};
constexpr DtypeName kViewable[] = {{"F32", DType::kFloat32}, {"BF16", DType::kBFloat16}, {"F16", DType::kFloat16},
                                   {"I32", DType::kInt32},   {"I64", DType::kInt64},     {"U8", DType::kUInt8}};

bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

/// Bytes that dtype and shape ask for; throws when they cannot be counted.
std::size_t expected_bytes(const SafetensorsModel::Entry& entry, const std::string& where) {
  const auto* dtype =
      std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](auto& d) { return d.name == entry.dtype; });
  require<ModelLoadError>(dtype != std::end(kDtypes), where, ": dtype \"", entry.dtype, "\" is unknown");
  std::size_t bits = dtype->bits;
  bool fits = true, zero = false;
  for (const auto extent : entry.shape) {
    if (extent == 0)
      zero = true;
    else
      fits = fits && !__builtin_mul_overflow(bits, static_cast<std::size_t>(extent), &bits);
  }
  require<ModelLoadError>(fits, where, ": more elements than memory can hold");
  require<ModelLoadError>(zero || bits % 8 == 0, where, ": ", bits, " bits, wanted whole bytes");
  return zero ? 0 : bits / 8;
}

std::int64_t natural(const Json& json, const std::string& where, const char* what) {
  require<ModelLoadError>(json.is_int() && json.as_int() >= 0, where, ": ", what, ": ", json.describe(),
                          ", wanted integers >= 0");
  return json.as_int();
}

/// One member of the header. Offsets are still relative to the end of the header.
SafetensorsModel::Entry read_entry(const std::string& name, const Json& json, const std::string& where) {
  const Json *dtype = json.find("dtype"), *shape = json.find("shape"), *offsets = json.find("data_offsets");
  require<ModelLoadError>(dtype != nullptr && dtype->is_string() && shape != nullptr && shape->is_array() &&
                              offsets != nullptr && offsets->is_array() && offsets->as_array().size() == 2,
                          where, ": ", json.describe(), ", wanted dtype, shape and two data_offsets");
  SafetensorsModel::Entry entry;
  entry.name = name;
  entry.dtype = dtype->as_string();
  for (const auto& extent : shape->as_array()) entry.shape.push_back(natural(extent, where, "shape"));
  const auto begin = natural(offsets->as_array()[0], where, "data_offsets");
  const auto end = natural(offsets->as_array()[1], where, "data_offsets");
  const std::size_t wanted = expected_bytes(entry, where);
  require<ModelLoadError>(begin <= end && static_cast<std::size_t>(end - begin) == wanted, where, ": data_offsets ",
                          offsets->describe(), ", wanted ", wanted, " bytes for ", entry.dtype, " ", shape->describe());
  entry.offset = static_cast<std::size_t>(begin);
  entry.bytes = wanted;
  return entry;
}

Json read_header(const MappedFile& file, std::size_t& length) {
  const auto& path = file.path();
  std::uint64_t stored = 0;
  require<ModelLoadError>(file.bytes() >= kPrefix, path, ": ", file.bytes(),
                          " bytes, too short for a safetensors file");
  std::memcpy(&stored, file.data(), kPrefix);
  require<ModelLoadError>(stored <= kMaxHeader, path, ": header of ", stored, " bytes, wanted at most ", kMaxHeader,
                          "; not a safetensors file?");
  require<ModelLoadError>(stored <= file.bytes() - kPrefix, path, ": truncated: header of ", stored,
                          " bytes in a file of ", file.bytes());
  length = static_cast<std::size_t>(stored);
  try {
    Json header = Json::parse({reinterpret_cast<const char*>(file.data()) + kPrefix, length});
    require<InvalidArgument>(header.is_object(), header.describe(), ", wanted an object");
    return header;
  } catch (const InvalidArgument& error) {
    throw ModelLoadError(str(path, ": header: ", error.what()));
  }
}

/// The entries of one file in the order of their bytes. As the format demands, they cover the file without gap or
/// overlap.
std::vector<SafetensorsModel::Entry> read_entries(const MappedFile& file, std::size_t file_index) {
  const auto& path = file.path();
  std::size_t header_bytes = 0;
  const Json header = read_header(file, header_bytes);
  const std::size_t begin = kPrefix + header_bytes, available = file.bytes() - begin;
  std::vector<SafetensorsModel::Entry> entries;
  for (const auto& [name, json] : header.as_object()) {
    if (name == "__metadata__") continue;
    entries.push_back(read_entry(name, json, str(path, ": tensor ", name)));
  }
  std::stable_sort(entries.begin(), entries.end(),
                   [](auto& a, auto& b) { return a.offset != b.offset ? a.offset < b.offset : a.bytes < b.bytes; });
  std::size_t end = 0;
  for (auto& entry : entries) {
    require<ModelLoadError>(entry.offset >= end, path, ": tensor ", entry.name, ": overlaps another: begins at ",
                            entry.offset, ", wanted ", end);
    require<ModelLoadError>(entry.offset == end, path, ": tensor ", entry.name, ": gap before it: begins at ",
                            entry.offset, ", wanted ", end);
    require<ModelLoadError>(entry.bytes <= available - end, path, ": truncated: tensor ", entry.name, " ends at byte ",
                            entry.offset + entry.bytes, " of ", available, " bytes of data");
    end += entry.bytes;
    entry.file = file_index;
    entry.offset += begin;
  }
  require<ModelLoadError>(end == available, path, ": ", available - end, " bytes after the last tensor");
  return entries;
}

}  // namespace

SafetensorsModel::SafetensorsModel(const std::string& path) : path_(path) {
  std::error_code ignored;
  if (!fs::is_directory(path, ignored)) {
    add_file(path);
  } else {
    const fs::path folder(path);
    const auto whole = folder / "model.safetensors", index = folder / "model.safetensors.index.json";
    if (is_there(whole)) {
      add_file(whole.string());
    } else if (is_there(index)) {
      add_shards(path, index.string());
    } else {
      for (const char* other :
           {"pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin", "consolidated.00.pth"})
        require<Unsupported>(!is_there(folder / other), path, ": weights in ", other,
                             ", wanted model.safetensors or model.safetensors.index.json");
      throw ModelLoadError(str(path, ": no model.safetensors and no model.safetensors.index.json"));
    }
  }
  by_name_.reserve(entries_.size());
  for (std::size_t i = 0; i < entries_.size(); ++i)
    require<ModelLoadError>(by_name_.emplace(entries_[i].name, i).second, describe(entries_[i]),
                            ": there is another tensor of this name in another shard");
}

void SafetensorsModel::add_file(const std::string& path) {
  files_.emplace_back(path);
  auto entries = read_entries(files_.back(), files_.size() - 1);
  std::move(entries.begin(), entries.end(), std::back_inserter(entries_));
}

void SafetensorsModel::add_shards(const std::string& directory, const std::string& index_path) {
  const Json index = load_json(index_path);
  const Json* map = index.find("weight_map");
  require<ModelLoadError>(map != nullptr && map->is_object() && !map->as_object().empty(), index_path,
                          ": weight_map: wanted an object, tensor name -> file name");
  std::set<std::string> names;
  for (const auto& [tensor, file] : map->as_object()) {
    require<ModelLoadError>(
        file.is_string() && !file.as_string().empty() && file.as_string().find('/') == std::string::npos, index_path,
        ": weight_map: ", tensor, ": ", file.describe(), ", wanted a file name");
    names.insert(file.as_string());
  }
  std::set<std::pair<std::string_view, std::string_view>> present;  // file, tensor
  for (const auto& name : names) {
    const auto path = (fs::path(directory) / name).string();
    require<ModelLoadError>(is_there(path), path, ": missing shard, named in ", index_path);
    add_file(path);
  }
  const std::vector<std::string> files(names.begin(), names.end());
  for (const auto& entry : entries_) present.emplace(files[entry.file], entry.name);
  for (const auto& [tensor, file] : map->as_object())
    require<ModelLoadError>(present.contains({file.as_string(), tensor}), directory, "/", file.as_string(),
                            ": no tensor ", tensor, ", though ", index_path, " says so");
}

const SafetensorsModel::Entry* SafetensorsModel::find(std::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? nullptr : &entries_[found->second];
}

std::string SafetensorsModel::describe(const Entry& entry) const {
  return str(files_[entry.file].path(), ": tensor ", entry.name);
}

TensorView SafetensorsModel::tensor(std::string_view name) const {
  const Entry* entry = find(name);
  require<ModelLoadError>(entry != nullptr, path_, ": no tensor ", name);
  const auto* dtype =
      std::find_if(std::begin(kViewable), std::end(kViewable), [&](auto& d) { return d.name == entry->dtype; });
  require<Unsupported>(dtype != std::end(kViewable), describe(*entry), ": dtype ", entry->dtype,
                       ", wanted F32, BF16, F16, I32, I64 or U8");
  // TensorView has no read-only form; whoever writes through it meets the write protection of the mapping.
  auto* data = const_cast<std::byte*>(files_[entry->file].data()) + entry->offset;
  const auto& s = entry->shape;
  switch (s.size()) {
    case 0:
      return {data, dtype->dtype, {}};
    case 1:
      return {data, dtype->dtype, {s[0]}};
    case 2:
      return {data, dtype->dtype, {s[0], s[1]}};
    case 3:
      return {data, dtype->dtype, {s[0], s[1], s[2]}};
    case 4:
      return {data, dtype->dtype, {s[0], s[1], s[2], s[3]}};
    default:
      throw ModelLoadError(str(describe(*entry), ": ", s.size(), " dimensions, wanted at most 4"));
  }
}

void write_safetensors(const std::string& path, std::span<const std::pair<std::string, TensorView>> tensors) {
  Json::Object header{{"__metadata__", Json::Object{{"format", "pt"}}}};
  std::size_t end = 0;
  std::set<std::string_view> names{"__metadata__"};
  for (const auto& [name, tensor] : tensors) {
    require(names.insert(name).second, "safetensors: tensor ", name, ": name taken");
    require(tensor.contiguous(), "safetensors: tensor ", name, ": not contiguous");
    const auto* dtype =
        std::find_if(std::begin(kViewable), std::end(kViewable), [&](auto& d) { return d.dtype == tensor.dtype(); });
    Json::Array shape;
    bool empty = false;
    for (int i = 0; i < tensor.ndim(); ++i) {
      shape.emplace_back(tensor.shape(i));
      empty = empty || tensor.shape(i) == 0;
    }
    require(tensor || empty, "safetensors: tensor ", name, ": no data");
    const auto begin = static_cast<std::int64_t>(end);
    end += tensor.bytes();
    header.emplace_back(name, Json::Object{{"dtype", std::string(dtype->name)},
                                           {"shape", std::move(shape)},
                                           {"data_offsets", Json::Array{begin, static_cast<std::int64_t>(end)}}});
  }
  std::string text = Json(std::move(header)).dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the data is aligned
  const std::uint64_t length = text.size();
  AtomicFile file(path);
  file.write(&length, sizeof length);
  file.write(text);
  for (const auto& [name, tensor] : tensors) file.write(tensor.data(), tensor.bytes());
  file.commit();
}

}  // namespace flexcore
