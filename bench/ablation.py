"""FlexLLM's memory ablation for a 70B model, as flexcore plans it, beside the paper's figures.

usage: python bench/ablation.py [--out ablation_70b_planned]

Llama-2-70B's shape, one sequence of 1,024 tokens, bfloat16, on the CPU's layout: activations, their gradients and
workspace at each stage of the compiler, from `flexcore.plan`; no weights are loaded and nothing runs. That engines take
what is planned is measured elsewhere (`flexcore bench memory`, tests/python/test_recompute.py). Writes
bench/results/<out>.json, .svg and .png; prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import flexcore  # noqa: E402

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LENGTH, WINDOW = 1024, 128
STAGES = ("no optimisation", "graph pruning", "rematerialization", "token-level")
# GB, by stage: of the plotting data that come with FlexLLM (arXiv 2402.18789), computed there too.
PAPER = {
    "LoRA": (84.56, 21.47, 16.11, 12.50),
    "adapter": (84.56, 21.47, 21.47, 12.83),
    "(IA)^3": (97.98, 28.19, 20.13, 12.75),
}
METHODS: dict[str, Any] = {
    "LoRA": flexcore.LoraConfig(r=16, target_modules=["down_proj"]),
    "adapter": flexcore.BottleneckConfig(64, "relu"),
    "(IA)^3": flexcore.IA3Config(),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="ablation_70b_planned", metavar="NAME")
    args = parser.parse_args()
    from compare import commit

    record: dict[str, Any] = {"shape": SHAPE, "sequence_length": LENGTH, "window": WINDOW, "commit": commit()}
    record["methods"] = {}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(SHAPE))
        for name, method in METHODS.items():
            stages = [(kind, LENGTH) for kind in ("all", "read", "exact")] + [("exact", WINDOW), ("int8", WINDOW)]
            plans = [planned(directory, method, kind, rows) for kind, rows in stages]
            record["methods"][name] = {"paper_gb": PAPER[name], "stages": plans}
    target = HERE / "results" / args.out
    target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(record, target)
    print(table(record))
    return 0


def planned(directory: str, method: Any, kind: str, rows: int) -> dict[str, Any]:
    config = flexcore.EngineConfig(
        device="cpu",
        max_model_len=LENGTH,
        max_num_seqs=1,
        max_num_batched_tokens=rows,
        kv_cache_memory_bytes=1 << 42,  # whatever it takes
        finetune_activations=kind,
    )
    plan = flexcore.plan(directory, config, method, LENGTH)
    adapter = plan.optimizer // 2  # its gradients are in plan.gradients too
    parts = {
        "saved_activations": plan.saved_activations,
        "gradients_in_flight": plan.gradients - adapter,
        "workspace": plan.workspace,
    }
    return {"activations": kind, "window": rows, **parts, "gb": sum(parts.values()) / 1e9}


def table(record: dict[str, Any]) -> str:
    lines = ["| | " + " | ".join(STAGES) + " | 8-bit groups |", "|---|" + "--:|" * 5]
    for name, method in record["methods"].items():
        ours = " | ".join(f"{stage['gb']:.2f}" for stage in method["stages"])
        lines.append(f"| {name}, planned, GB | {ours} |")
        lines.append(f"| {name}, the paper's | " + " | ".join(f"{gb:.2f}" for gb in method["paper_gb"]) + " | - |")
    return "\n".join(lines)


def draw(record: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from flexcore.bench._coserve_figures import FAINT, GRID, INK, OWN

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "svg.hashsalt": "flexcore"})
    figure, axes = plt.subplots(1, 3, figsize=(11.2, 4.2), facecolor="white", sharey=True)
    labels = ["nothing\nleft out", "pruned", "rebuilt", "token by\ntoken", "8-bit\ngroups"]
    for axis, (name, method) in zip(axes, record["methods"].items(), strict=True):
        ours = [stage["gb"] for stage in method["stages"]]
        theirs = list(method["paper_gb"])
        for i, value in enumerate(theirs):
            axis.bar(i - 0.2, value, width=0.38, color="#ced4da", zorder=2)
            axis.text(i - 0.2, value + 1.2, f"{value:.1f}", ha="center", fontsize=7.5, color=FAINT)
        for i, value in enumerate(ours):
            x = i + 0.2 if i < len(theirs) else i
            axis.bar(x, value, width=0.38, color=OWN, zorder=2)
            axis.text(x, value + 1.2, f"{value:.1f}", ha="center", fontsize=7.5, color=INK, fontweight="bold")
        axis.set_title(name, fontsize=10.5, fontweight="bold", loc="left")
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.set_ylim(0, 108)
        axis.grid(axis="y", color=GRID, zorder=0)
        axis.tick_params(length=0, colors=FAINT)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color(GRID)
    axes[0].set_ylabel("GB", color=FAINT)
    figure.text(0.015, 0.955, "Activations of one sequence, a 70B model", fontsize=15, fontweight="bold", va="center")
    note = "1,024 tokens, bfloat16. Colour: flexcore's plan. Grey: what FlexLLM's authors computed (arXiv 2402.18789)."
    figure.text(0.015, 0.895, note, fontsize=8.5, color=FAINT, va="center")
    figure.subplots_adjust(left=0.055, right=0.99, top=0.78, bottom=0.12, wspace=0.07)
    for suffix in (".svg", ".png"):
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(target.with_suffix(suffix), dpi=160, metadata=metadata)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
