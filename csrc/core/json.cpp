#include "core/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "core/check.h"
#include "core/file.h"

namespace flexcore {

namespace {

constexpr int kMaxDepth = 64;  // the parser recurses; real files stay under ten

/// Length of the UTF-8 sequence at the start of `text`, its code point in `code`; 0 when malformed.
std::size_t decode_utf8(std::string_view text, std::uint32_t& code) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) {
    code = first;
    return 1;
  }
  const std::size_t length = first < 0xc2 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : first < 0xf5 ? 4 : 0;
  if (length == 0 || text.size() < length) return 0;
  code = first & (0x7fu >> length);
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
    code = code << 6 | (byte(i) & 0x3fu);
  }
  const bool overlong = (length == 3 && code < 0x800) || (length == 4 && code < 0x10000);
  const bool surrogate = code >= 0xd800 && code < 0xe000;
  return overlong || surrogate || code > 0x10ffff ? 0 : length;
}

void append_utf8(std::string& out, std::uint32_t code) {
  const auto put = [&](std::uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
    return;
  }
  if (code < 0x800) {
    put(0xc0 | code >> 6);
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3f));
  } else {
    put(0xf0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3f));
    put(0x80 | (code >> 6 & 0x3f));
  }
  put(0x80 | (code & 0x3f));
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json document() {
    Json value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) fail("text after the value");
    return value;
  }

 private:
  [[noreturn]] void fail(std::string_view what) const { throw InvalidArgument(str("json: ", what, " at byte ", at_)); }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (at_ < text_.size() && (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r')) ++at_;
  }

  void expect(char c) {
    if (at_ >= text_.size()) fail(str("end of text, wanted '", c, "'"));
    if (text_[at_] != c) fail(str("wanted '", c, "'"));
    ++at_;
  }

  Json parse_value(int depth) {
    if (depth > kMaxDepth) fail(str("more than ", kMaxDepth, " levels"));
    skip_space();
    if (at_ >= text_.size()) fail("end of text, wanted a value");
    switch (peek()) {
      case '{':
        return parse_object(depth);
      case '[':
        return parse_array(depth);
      case '"':
        return parse_string();
      case 't':
        return parse_word("true", true);
      case 'f':
        return parse_word("false", false);
      case 'n':
        return parse_word("null", nullptr);
      default:
        return parse_number();
    }
  }

  Json parse_word(std::string_view word, Json value) {
    if (text_.substr(at_, word.size()) != word) fail(str("wanted ", word));
    at_ += word.size();
    return value;
  }

  void skip_digits() {
    if (!is_digit(peek())) fail("wanted a digit");
    while (is_digit(peek())) ++at_;
  }

  Json parse_number() {
    const std::size_t begin = at_;
    if (peek() == '-') ++at_;
    if (!is_digit(peek())) {
      at_ = begin;
      fail("wanted a value");
    }
    if (peek() == '0') {
      ++at_;
      if (is_digit(peek())) fail("number with a leading zero");
    } else {
      skip_digits();
    }
    bool whole = true;
    if (peek() == '.') {
      whole = false;
      ++at_;
      skip_digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false;
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      skip_digits();
    }
    const char *first = text_.data() + begin, *last = text_.data() + at_;
    if (std::int64_t integer = 0; whole && std::from_chars(first, last, integer).ec == std::errc{}) return integer;
    double real = 0.0;
    if (std::from_chars(first, last, real).ec != std::errc{}) {
      at_ = begin;
      fail("number out of range");
    }
    return real;
  }

  std::uint32_t parse_hex4() {
    std::uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const int digit = is_digit(c)            ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail("wanted four hexadecimal digits");
      code = code << 4 | static_cast<std::uint32_t>(digit);
    }
    return code;
  }

  void parse_escape(std::string& out) {
    static constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
    const char name = peek();
    if (const auto i = kNames.find(name); i != std::string_view::npos) {
      ++at_;
      out.push_back(kValues[i]);
      return;
    }
    if (name != 'u') fail("unknown escape");
    ++at_;
    std::uint32_t code = parse_hex4();
    if (code >= 0xd800 && code < 0xdc00) {
      if (text_.substr(at_, 2) != "\\u") fail("half a surrogate pair");
      at_ += 2;
      const std::uint32_t low = parse_hex4();
      if (low < 0xdc00 || low >= 0xe000) fail("half a surrogate pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code >= 0xdc00 && code < 0xe000) {
      fail("half a surrogate pair");
    }
    append_utf8(out, code);
  }

  std::string parse_string() {
    expect('"');
    std::string out;
    while (true) {
      if (at_ >= text_.size()) fail("end of text in a string");
      const char c = text_[at_];
      if (c == '"') {
        ++at_;
        return out;
      }
      if (c == '\\') {
        ++at_;
        parse_escape(out);
        continue;
      }
      if (static_cast<unsigned char>(c) < 0x20) fail("control character in a string");
      std::uint32_t code = 0;
      const std::size_t length = decode_utf8(text_.substr(at_), code);
      if (length == 0) fail("bytes that are not UTF-8");
      out.append(text_.substr(at_, length));
      at_ += length;
    }
  }

  Json parse_array(int depth) {
    expect('[');
    Json::Array items;
    skip_space();
    if (peek() == ']') {
      ++at_;
      return items;
    }
    while (true) {
      items.push_back(parse_value(depth + 1));
      skip_space();
      if (peek() == ']') break;
      expect(',');
    }
    ++at_;
    return items;
  }

  Json parse_object(int depth) {
    expect('{');
    Json::Object members;
    skip_space();
    if (peek() == '}') {
      ++at_;
      return members;
    }
    while (true) {
      skip_space();
      std::string key = parse_string();
      skip_space();
      expect(':');
      members.emplace_back(std::move(key), parse_value(depth + 1));
      skip_space();
      if (peek() == '}') break;
      expect(',');
    }
    refuse_repeated_keys(members);
    ++at_;
    return members;
  }

  void refuse_repeated_keys(const Json::Object& members) const {
    std::vector<std::string_view> keys;
    keys.reserve(members.size());
    for (const auto& member : members) keys.push_back(member.first);
    std::sort(keys.begin(), keys.end());
    const auto twice = std::adjacent_find(keys.begin(), keys.end());
    if (twice != keys.end()) fail(str("key \"", *twice, "\" twice in the object that ends"));
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

class Writer {
 public:
  explicit Writer(int indent) : indent_(indent) {}

  void value(const Json& json, int depth) {
    if (json.is_null()) {
      out_ += "null";
    } else if (json.is_bool()) {
      out_ += json.as_bool() ? "true" : "false";
    } else if (json.is_int()) {
      out_ += std::to_string(json.as_int());
    } else if (json.is_number()) {
      number(json.as_double());
    } else if (json.is_string()) {
      string(json.as_string());
    } else if (json.is_array()) {
      list('[', ']', json.as_array(), depth, [&](const Json& item) { value(item, depth + 1); });
    } else {
      list('{', '}', json.as_object(), depth, [&](const auto& member) {
        string(member.first);
        out_ += indent_ > 0 ? ": " : ":";
        value(member.second, depth + 1);
      });
    }
  }

  std::string take() { return std::move(out_); }

 private:
  template <class Items, class WriteItem>
  void list(char open, char close, const Items& items, int depth, WriteItem&& write_item) {
    out_ += open;
    for (std::size_t i = 0; i < items.size(); ++i) {
      if (i > 0) out_ += ',';
      new_line(depth + 1);
      write_item(items[i]);
    }
    if (!items.empty()) new_line(depth);
    out_ += close;
  }

  void new_line(int depth) {
    if (indent_ > 0) out_.append(1, '\n').append(static_cast<std::size_t>(indent_ * depth), ' ');
  }

  // The shortest text that reads back as the same number, and as a real one.
  void number(double value) {
    require(std::isfinite(value), "json: ", value, ", wanted a finite number");
    char text[32];
    const auto end = std::to_chars(text, text + sizeof text, value).ptr;
    const std::string_view written(text, static_cast<std::size_t>(end - text));
    out_ += written;
    if (written.find_first_of(".e") == std::string_view::npos) out_ += ".0";
  }

  void escape(std::uint32_t unit) {
    static constexpr char kHex[] = "0123456789abcdef";
    out_ += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) out_ += kHex[unit >> shift & 0xf];
  }

  void string(std::string_view text) {
    out_ += '"';
    while (!text.empty()) {
      std::uint32_t code = 0;
      const std::size_t length = decode_utf8(text, code);
      require(length > 0, "json: string with bytes that are not UTF-8");
      text.remove_prefix(length);
      if (code == '"' || code == '\\') {
        out_ += '\\';
        out_ += static_cast<char>(code);
      } else if (code == '\n') {
        out_ += "\\n";
      } else if (code >= 0x20 && code < 0x7f) {
        out_ += static_cast<char>(code);
      } else if (code < 0x10000) {
        escape(code);
      } else {
        escape(0xd800 + ((code - 0x10000) >> 10));
        escape(0xdc00 + ((code - 0x10000) & 0x3ff));
      }
    }
    out_ += '"';
  }

  int indent_;
  std::string out_;
};

}  // namespace

Json Json::parse(std::string_view text) { return Parser(text).document(); }

std::string Json::dump(int indent) const {
  Writer writer(indent);
  writer.value(*this, 0);
  return writer.take();
}

std::string Json::describe() const {
  constexpr std::size_t kLongest = 120;
  std::string text = dump();
  if (text.size() > kLongest) text.replace(kLongest, std::string::npos, "...");
  return text;
}

template <class T>
const T& Json::get(const char* wanted) const {
  const T* value = std::get_if<T>(&value_);
  if (value == nullptr) throw InvalidArgument(str("json: ", describe(), ", wanted ", wanted));
  return *value;
}

bool Json::as_bool() const { return get<bool>("true or false"); }
std::int64_t Json::as_int() const { return get<std::int64_t>("an integer"); }
double Json::as_double() const { return is_int() ? static_cast<double>(as_int()) : get<double>("a number"); }
const std::string& Json::as_string() const& { return get<std::string>("a string"); }
const Json::Array& Json::as_array() const& { return get<Array>("a list"); }
const Json::Object& Json::as_object() const& { return get<Object>("an object"); }

const Json* Json::find(std::string_view key) const {
  const auto* members = std::get_if<Object>(&value_);
  if (members == nullptr) return nullptr;
  const auto member = std::find_if(members->begin(), members->end(), [&](const auto& m) { return m.first == key; });
  return member == members->end() ? nullptr : &member->second;
}

Json load_json(const std::string& path) {
  try {
    return Json::parse(read_file(path));
  } catch (const InvalidArgument& error) {
    throw ModelLoadError(str(path, ": ", error.what()));
  }
}

}  // namespace flexcore
