#include "core/json.h"

#include <limits>
#include <random>

#include "flexcore/error.h"
#include "temp_dir.h"

namespace flexcore {
namespace {

TEST(Json, ParsesEveryKind) {
  const Json json =
      Json::parse(R"( {"a": null, "b": [true, false], "c": -12, "d": 1.5e2, "e": "x", "f": {}, "g": []} )");
  EXPECT_TRUE(json.find("a")->is_null());
  EXPECT_TRUE(json.find("b")->as_array()[0].as_bool());
  EXPECT_FALSE(json.find("b")->as_array()[1].as_bool());
  EXPECT_EQ(json.find("c")->as_int(), -12);
  EXPECT_EQ(json.find("c")->as_double(), -12.0);
  EXPECT_EQ(json.find("d")->as_double(), 150.0);
  EXPECT_FALSE(json.find("d")->is_int());
  EXPECT_EQ(json.find("e")->as_string(), "x");
  EXPECT_TRUE(json.find("f")->as_object().empty());
  EXPECT_TRUE(json.find("g")->as_array().empty());
  EXPECT_EQ(json.find("h"), nullptr);
  EXPECT_EQ(json.as_object()[4].first, "e");
}

TEST(Json, KeepsIntegersThatFitAndTurnsOthersIntoReals) {
  EXPECT_EQ(Json::parse("9223372036854775807").as_int(), std::numeric_limits<std::int64_t>::max());
  EXPECT_EQ(Json::parse("-9223372036854775808").as_int(), std::numeric_limits<std::int64_t>::min());
  const Json large = Json::parse("1000000000000000019884624838656");
  EXPECT_FALSE(large.is_int());
  EXPECT_EQ(large.as_double(), 1e30);
}

TEST(Json, DecodesEscapes) {
  EXPECT_EQ(Json::parse(R"("\"\\\/\b\f\n\r\t")").as_string(), "\"\\/\b\f\n\r\t");
  EXPECT_EQ(Json::parse(R"("\u0041\u00e9\u20ac\ud83d\ude00")").as_string(), "A\u00e9\u20ac\U0001F600");
  EXPECT_EQ(Json::parse("\"\\u0000x\"").as_string(), std::string("\0x", 2));
}

TEST(Json, RefusesWhatIsNotJsonAndSaysWhere) {
  const char* wrong[] = {
      "",
      " ",
      "{",
      "[1,]",
      "{\"a\":1,}",
      "{'a':1}",
      "[1 2]",
      "01",
      "1.",
      ".5",
      "+1",
      "1e",
      "-",
      "NaN",
      "Infinity",
      "tru",
      "1 2",
      "\"a",
      "\"\n\"",
      "\"\\x\"",
      "\"\\u12\"",
      "\"\\ud800\"",
      "\"\\udc00\"",
      "\"\\ud800\\u0041\"",
      "\"\xff\"",
      "\"\xc0\x80\"",
      "\"\xed\xa0\x80\"",
      "\"\xf4\x90\x80\x80\"",
      "\"\xe2\x82",
      "{\"a\":1,\"a\":2}",
      "1e999",
      "\xef\xbb\xbf{}",
      "{\"a\"}",
      "{1:2}",
      "// x\n1",
      "[1]]",
      "nul",
      "\"\xe2\x82\"",
  };
  for (const char* text : wrong) EXPECT_THROW(Json::parse(text), InvalidArgument) << text;
  EXPECT_HAS(message_of<InvalidArgument>([] { Json::parse("[1, 2, x]"); }), "at byte 7");
  EXPECT_HAS(message_of<InvalidArgument>([] { Json::parse("{\"ab\":1,\"ab\":2}"); }), "\"ab\" twice");
}

TEST(Json, LimitsDepth) {
  const auto nested = [](int levels) { return std::string(levels, '[') + std::string(levels, ']'); };
  EXPECT_NO_THROW(Json::parse(nested(60)));
  EXPECT_HAS(message_of<InvalidArgument>([&] { Json::parse(nested(100)); }), "levels");
  EXPECT_THROW(Json::parse(std::string(1000000, '[')), InvalidArgument);
}

TEST(Json, WritesCompactAndPretty) {
  const Json json(Json::Object{
      {"b", Json::Array{1, 2.0, nullptr}}, {"a", Json::Object{{"k", "v\n\"\u00e9\U0001F600"}}}, {"e", Json::Array{}}});
  EXPECT_EQ(json.dump(), R"({"b":[1,2.0,null],"a":{"k":"v\n\"\u00e9\ud83d\ude00"},"e":[]})");
  EXPECT_EQ(Json(Json::Object{{"a", Json::Array{1, true}}}).dump(2), "{\n  \"a\": [\n    1,\n    true\n  ]\n}");
  EXPECT_EQ(Json::parse(json.dump(2)), json);
}

TEST(Json, WritesRealsThatReadBackTheSame) {
  for (const double value : {0.1, 1e-5, 16.0, -0.0, 1e300, 5e-324, 1.0 / 3.0}) {
    const Json back = Json::parse(Json(value).dump());
    EXPECT_FALSE(back.is_int());
    EXPECT_EQ(back.as_double(), value);
  }
  EXPECT_THROW(Json(std::numeric_limits<double>::quiet_NaN()).dump(), InvalidArgument);
  EXPECT_THROW(Json(std::numeric_limits<double>::infinity()).dump(), InvalidArgument);
  EXPECT_THROW(Json("\xff").dump(), InvalidArgument);
}

TEST(Json, NamesTheKindThatWasWanted) {
  EXPECT_HAS(message_of<InvalidArgument>([] { Json("x").as_int(); }), "\"x\", wanted an integer");
  EXPECT_THROW(Json(1.5).as_int(), InvalidArgument);
  EXPECT_THROW(Json(1).as_bool(), InvalidArgument);
  EXPECT_THROW(Json(1).as_array(), InvalidArgument);
}

TEST(Json, SurvivesDamagedText) {
  const std::string whole = R"({"a":[1,-2.5e3,"\u20ac\ud83d\ude00x",{"b":null,"c":[true,false]}],"d":"é"})";
  std::mt19937 random(1);
  for (int round = 0; round < 20000; ++round) {
    std::string text = whole.substr(0, 1 + random() % whole.size());
    for (int i = 0; i < 3; ++i) text[random() % text.size()] = static_cast<char>(random());
    try {
      const Json json = Json::parse(text);
      EXPECT_EQ(Json::parse(json.dump()), json);
    } catch (const InvalidArgument&) {
    }
  }
}

TEST(Json, NamesTheFileInErrors) {
  const TempDir dir;
  const auto path = dir.write("x.json", "{\"a\": }");
  EXPECT_HAS(message_of<ModelLoadError>([&] { load_json(path); }), path);
  EXPECT_HAS(message_of<ModelLoadError>([&] { load_json(dir.path("none.json")); }), "No such file");
}

}  // namespace
}  // namespace flexcore
