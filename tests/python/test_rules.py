"""The tree keeps its rules, and every rule can fail."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "rules"))

import check  # noqa: E402
import rules  # noqa: E402

BROKEN = [
    (rules.arrows, "csrc/ops/linear.h", '#include "backends/register.h"\n'),
    (rules.arrows, "csrc/model/store.cpp", '#include "peft/lora.h"\n'),
    (rules.arrows, "csrc/train/job.cpp", '#include "sched/plan.h"\n'),
    (rules.arrows, "csrc/core/check.h", '#include "str.h"\n'),
    (rules.arrows, "csrc/attic/old.h", "int x;\n"),
    (rules.arrows, "csrc/bindings/core/engine.cpp", '#include "engine/step.h"\n'),
    (rules.arrows, "csrc/include/flexcore/json.h", "#include <nlohmann/json.hpp>\n"),
    (rules.arrows, "tests/install/consumer/main.cpp", '#include "core/check.h"\n'),
    (rules.allocation, "csrc/engine/step.cpp", "auto* p = new float[4];\n"),
    (rules.allocation, "csrc/backends/cpu/lora.cpp", "void* p = std::malloc(4);\n"),
    (rules.allocation, "csrc/backends/cuda/lora.cu", "cudaMallocAsync(&p, 4, s);\n"),
    (rules.process_survives, "csrc/core/check.h", "if (bad) std::abort();\n"),
    (rules.process_survives, "csrc/core/check.h", "  assert(x > 0);\n"),
    (rules.process_survives, "csrc/core/check.h", "#include <cassert>\n"),
    (rules.plain_headers, "csrc/include/flexcore/tensor.h", "#ifdef FLEXCORE_CUDA\n#endif\n"),
    (rules.sealed_kernels, "csrc/backends/cpu/kernels/gemm.cpp", "#include <vector>\n"),
    (rules.sealed_kernels, "csrc/backends/cpu/kernels/gemm.cpp", "float y = std::max(a, b);\n"),
    (rules.sealed_kernels, "csrc/backends/cpu/kernels/gemm.cpp", "#pragma omp parallel for\n"),
    (rules.sizes, "csrc/core/big.h", "\n" * 301),
    (rules.sizes, "csrc/core/big.cpp", "\n" * 601),
    (rules.machine_names, "bench/results.json", '{"model": "/' + 'root/model"}\n'),
    (rules.machine_names, "Makefile", "URL := https://" + "pypi" + ".org/simple\n"),
]
SOUND = [
    (
        "csrc/engine/step.cpp",
        '#include "sched/plan.h"\n#include "train/job.h"\n#include <mutex>\n// a new page\nauto s = "new";\n',
    ),
    ("csrc/memory/buffer.cpp", "void* p = std::aligned_alloc(64, 64);\n"),
    ("csrc/backends/cuda/allocator.cu", "cudaMalloc(&p, 4);\n"),
    ("csrc/core/check.h", "static_assert(true);\n/* abort() */ pool.exit();\n"),
    ("csrc/include/flexcore/tensor.h", "#pragma once\n#include <cstdint>\n"),
    ("csrc/backends/cpu/kernels/gemm.cpp", '#include "core/bfloat16.h"\nstd::int64_t n = 0;\n'),
    ("csrc/core/full.h", "\n" * 300),
    ("tests/install/consumer/main.cpp", "#include <flexcore/flexcore.h>\n"),
]


def plant(root: Path, path: str, text: str) -> rules.Tree:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
    return rules.Tree(root, [Path(path)])


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_rule_finds_what_breaks_it(tmp_path, rule, path, text):
    assert list(rule(plant(tmp_path, path, text)))


@pytest.mark.parametrize(("path", "text"), SOUND)
def test_rules_pass_what_is_allowed(tmp_path, path, text):
    tree = plant(tmp_path, path, text)
    assert [violation for rule in rules.RULES for violation in rule(tree)] == []


def test_every_rule_has_a_case():
    assert {rule for rule, _, _ in BROKEN} == set(rules.RULES)


def test_tree_keeps_the_rules():
    assert check.violations(ROOT) == []
