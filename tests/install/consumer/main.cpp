#include <flexcore/flexcore.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

// consumer MODEL: generates from a model directory; without it: an error is an exception of ours, and the program lives
// on.
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
  std::size_t tokens = 0;
  while (engine.has_work())
    for (auto& event : engine.step().outputs) tokens += event.request_id == id;
  std::printf("generated %zu tokens\n", tokens);
  return tokens == 64 ? 0 : 1;
}
