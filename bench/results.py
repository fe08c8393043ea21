"""Results as Markdown, for the README and docs/share.md.

usage: python bench/results.py bench/results/smollm2_cpu.json
       python bench/results.py bench/results/coserve_cpu.json [bench/results/coserve_cpu_external.json]
"""

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


def sharing(record: dict, external: dict | None) -> str:
    """`flexcore bench coserve`, and bench/coserve_external.py under the same arrivals."""
    lines = [
        "| requests/s | | kept the objective | TPOT p50 / p99, ms | longest gap p99, ms | TTFT p99, ms "
        "| finetuning, tok/s | of finetuning alone | efficiency |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    alone = record["finetune_alone_tokens_per_s"]
    rate = None
    for run in record["runs"]:
        if rate is not None and run["requests_per_s"] != rate:
            lines += _external(external, rate)
        own = run["policy"] == "hybrid"
        name = "**flexcore**" if own else run["policy"].replace("inference-only", "serving alone")
        bold = "**" if own else ""
        serving = "sharing_efficiency" not in run
        cells = [
            f"{run['requests_per_s']:.2f}" if run["requests_per_s"] != rate else "",
            name,
            f"{bold}{run['attainment']:.1%}{bold} of {run['num_prompts']}",
            f"{run['median_tpot_ms']:.0f} / {run['p99_tpot_ms']:.0f}",
            f"{run['p99_itl_ms']:.0f}",
            f"{run['p99_ttft_ms']:,.0f}",
            "-" if serving else f"{run['finetune_tokens_per_s']:.0f}",
            f"load {run['busy_share']:.2f}" if serving else f"{bold}{run['finetuning_kept']:.0%}{bold}",
            "-" if serving else f"{run['sharing_efficiency']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        rate = run["requests_per_s"]
    lines += _external(external, rate)
    slo, traffic, machine = record["slo"], record["traffic"], record["machine"]
    where = f"{machine['threads']} threads of {machine['cpu']}" if machine["device"] == "cpu" else machine["device"]
    text = (
        f"{machine['model'].split('.')[0]}, {where}; "
        f"prompts of {traffic['input_len'][0]} to {traffic['input_len'][1]} tokens, "
        f"answers of {traffic['output_len'][0]} to {traffic['output_len'][1]}, Poisson; {record['repeats']} x "
        f"{traffic['seconds']:.0f} s each, interleaved; objective {slo['tpot_ms']:.0f} ms a token, "
        f"{slo['ttft_ms']:,.0f} ms to the first; finetuning on sequences of {record['train_len']} tokens, alone "
        f"{alone:.0f} tokens/s."
    )
    return "\n".join(lines) + "\n\n" + text


def _external(external: dict | None, rate: float | None) -> list[str]:
    """llama.cpp's server and PEFT beside each other, at this rate."""
    rows = []
    for run in external["runs"] if external else []:
        if rate is None or abs(run["requests_per_s"] - rate) > 1e-9:
            continue
        alone = external["finetune_alone_tokens_per_s"]
        tuned = run.get("finetune_tokens_per_s")
        cells = [
            "",
            "llama.cpp server + PEFT" if run["finetuning"] else "llama.cpp server alone",
            f"{run['attainment']:.1%} of {run['num_prompts']}",
            f"{run['median_tpot_ms']:.0f} / {run['p99_tpot_ms']:.0f}",
            f"{run['p99_itl_ms']:.0f}",
            f"{run['p99_ttft_ms']:,.0f}",
            f"{tuned:.0f}" if tuned else "-",
            f"{tuned / alone:.0%}" if tuned else "-",
            "-",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    records = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
    if "runs" in records[0]:
        print(sharing(records[0], records[1] if len(records) > 1 else None))
    else:
        print(markdown(records[0]))
