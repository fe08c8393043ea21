"""The comparison as Markdown, for the README: python bench/results.py bench/results/smollm2_cpu.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PEERS = ["transformers bf16", "transformers fp32", "llama.cpp bf16", "llama.cpp f16", "llama.cpp Q4_1"]
HEADINGS = {name: name.replace("transformers", "transformers + PEFT") for name in PEERS}


def measurements(load: dict) -> list[tuple[str, str, str]]:
    """(key, label, unit)"""
    return [
        ("decode_1", "decode, batch 1", "tok/s"),
        (f"decode_{load['batch']}", f"decode, batch {load['batch']}", "tok/s"),
        ("prefill", f"prefill, {load['prefill']:,} tokens", "tok/s"),
        ("finetune", f"LoRA r{load['rank']} on every linear, {load['train']} tokens, AdamW", "tok/s"),
        ("finetune_peak_bytes", "its peak memory above the weights", "MB"),
    ]


def markdown(record: dict) -> str:
    systems, load = record["systems"], record["workload"]
    ours = systems.get("flexcore", {"results": {}, "floors": {}})
    peers = [name for name in PEERS if name in systems]
    head = ["", "flexcore bf16", "best possible here", "reached", *(HEADINGS[name] for name in peers)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for key, label, unit in measurements(load):
        if key not in ours["results"]:
            continue
        own, floor = ours["results"][key], ours["floors"][key]
        cells = [
            f"{label}, {unit}",
            f"**{_number(own, unit)}**",
            _number(floor["best"], unit),
            f"{floor['reached']:.0%}",
        ]
        for name in peers:
            value = systems[name]["results"].get(key)
            ratio = None if not value else (value / own if unit == "MB" else own / value)
            cells.append(f"{_number(value, unit)} ({ratio:.2g}x)" if ratio else "-")
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    if "coserve" in record:
        text += "\n\n" + _coserve(record["coserve"])
    return f"{text}\n\n{footnote(record)}"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    value = value / 1e6 if unit == "MB" else value
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _coserve(coserve: dict) -> str:
    lines = [
        "| load | requests/s | finetuning kept | finetuning, tok/s | TPOT p50 / p99, ms | serving alone "
        "| TTFT p50 / p99, ms |",
        "|---|--:|--:|--:|--:|--:|--:|",
        f"| none | 0 | 100% | {coserve['finetune_alone_tokens_per_s']:,.0f} | - | - | - |",
    ]
    for load in coserve["loads"]:
        both, alone = load["coserving"], load["serving_alone"]
        cells = [
            load["load"],
            f"{both['requests_per_s']:.1f}",
            f"**{both['finetuning_kept']:.0%}**",
            f"{both['finetune_tokens_per_s']:,.0f}",
            _pair(both, "tpot_ms"),
            _pair(alone, "tpot_ms"),
            _pair(both, "ttft_ms"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pair(served: dict, name: str) -> str:
    key = f"p99_{name}"
    return f"{served[f'median_{name}']:.0f} / {served[key]:.0f}" if key in served else "-"


def footnote(record: dict) -> str:
    machine, peaks, versions = record["machine"], record["peaks"], record["versions"]
    rounds = max(len(system["runs"]) for system in record["systems"].values())
    libraries = ", ".join(f"{name.replace('_', '-')} {version}" for name, version in sorted(versions.items()))
    best = f"{peaks['read_bytes_per_s'] / 1e9:.1f} GB/s read, {peaks['bfloat16_flops'] / 1e9:.0f} GFLOP/s"
    where = f"{record['model']['name']}, {machine['threads']} threads of {machine['cpu']} ({machine['isa']})"
    return (
        f"{where}; medians of up to {rounds} interleaved rounds, a fresh process each; {libraries}; commit "
        f"{record['commit']}. The best possible is {best}, measured in the same run; for memory it is the LoRA "
        "parameters, gradients and AdamW's moments alone. In brackets: flexcore against it."
    )


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
