#include <flexcore/flexcore.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <vector>

// consumer MODEL: generates from a model directory. First: an error is an exception of ours, and the program lives on.
int main(int argc, char** argv) {
  try {
    flexcore::Engine::load("no/such/model", {.device = "cpu"});
    std::puts("a missing model was loaded");
    return 1;
  } catch (const flexcore::ModelLoadError& error) {
    std::printf("caught: %s\n", error.what());
  }
  if (argc < 2) return 0;

  const std::vector<std::int32_t> ids = {1, 2, 3};
  auto engine = flexcore::Engine::load(argv[1], {.device = "cpu"});
  auto id = engine.submit({.prompt_token_ids = ids, .max_tokens = 64});
  const auto to_the_end = engine.submit({.prompt_token_ids = ids, .sampling = {.ignore_eos = true}, .max_tokens = 40});
  std::map<flexcore::RequestId, int> tokens;
  while (engine.has_work())
    for (auto& event : engine.step().outputs) ++tokens[event.request_id];
  std::printf("generated %d and %d tokens\n", tokens[id], tokens[to_the_end]);
  return tokens[id] >= 1 && tokens[id] <= 64 && tokens[to_the_end] == 40 ? 0 : 1;
}
