"""flexcore, through its Python API."""

from __future__ import annotations

import time

import common

import flexcore
from flexcore.bench import coserve
from flexcore.bench._sharing import Engines, Finetuning


def main() -> None:
    args = common.arguments(__doc__)
    load = common.workload(args)
    versions = {"flexcore": flexcore.__version__}
    if args.what == "coserve":
        common.finish(versions, run_coserve(args, load), load)
    memory = common.Memory()
    results: dict[str, object] = {}
    engine = open_engine(args, max_model_len=load.train, max_num_seqs=2)
    memory.start_peak()
    results["loaded_extra_bytes"] = memory.now_above(engine.memory()["weights"])
    results["finetune"] = load.train / finetune_seconds(engine, load)
    results["finetune_peak_bytes"] = memory.peak_above(engine.memory()["weights"])
    results["finetune_ledger_bytes"] = {k: v for k, v in engine.memory_peak().items() if v}
    del engine
    engine = open_engine(args, max_model_len=load.prefill + 32, max_num_seqs=load.batch)
    for batch in (1, load.batch):
        seconds = common.median_seconds(lambda batch=batch: decode_seconds(engine, batch, load), load)
        results[f"decode_{batch}"] = batch * load.decode / seconds
    results["prefill"] = load.prefill / common.median_seconds(lambda: prefill_seconds(engine, load), load)
    common.finish(versions, results, load)


def open_engine(args, **sizes) -> flexcore.Engine:
    config = flexcore.EngineConfig(
        device="cpu", dtype=args.dtype, num_threads=args.threads, enable_prefix_caching=False, **sizes
    )
    return flexcore.Engine(args.model, config)


def greedy(tokens: int) -> flexcore.SamplingParams:
    return flexcore.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def decode_seconds(engine: flexcore.Engine, batch: int, load: common.Workload) -> float:
    """From when every sequence has its first token."""
    vocab = engine.model().vocab_size
    prompts = [common.ids(load.prompt, vocab, k) for k in range(batch)]
    waiting = set(engine.submit_batch(prompts, greedy(load.decode + 1)))
    start = 0.0
    while engine.has_work():
        report = engine.step()
        if waiting:
            waiting -= {event.request_id for event in report.outputs}
            start = time.perf_counter()
    return time.perf_counter() - start


def prefill_seconds(engine: flexcore.Engine, load: common.Workload) -> float:
    prompt = common.ids(load.prefill, engine.model().vocab_size, 1)
    start = time.perf_counter()
    engine.submit(prompt, greedy(1))
    while engine.has_work():
        engine.step()
    return time.perf_counter() - start


def finetune_seconds(engine: flexcore.Engine, load: common.Workload) -> float:
    """Of an optimizer step on one sequence."""
    lora = flexcore.LoraConfig(r=load.rank, lora_alpha=load.alpha, target_modules="all-linear")
    engine.create_adapter("bench", lora)
    row = common.ids(load.train, engine.model().vocab_size, 1)
    config = flexcore.FinetuneConfig(batch_size=1, num_epochs=1000, learning_rate=1e-4, max_grad_norm=0.0)
    job = engine.finetune("bench", [flexcore.Example(row, row)], config)

    def step() -> None:
        target = engine.job(job).step + 1
        while engine.job(job).step < target:
            engine.step()

    seconds = common.median_seconds(step, load)
    engine.cancel_job(job)
    engine.unload_adapter("bench")
    return seconds


def run_coserve(args, load: common.Workload) -> dict[str, object]:
    engine = open_engine(args, max_model_len=1024, max_num_seqs=64)
    lora = flexcore.LoraConfig(r=load.rank, lora_alpha=load.alpha, target_modules="all-linear")
    traffic = coserve.Traffic(seconds=3.0 if args.quick else 12.0, output_len=(32, 32))
    slo, finetuning = flexcore.SLO(), Finetuning(lora, load.train)
    place = Engines(engine, slo, finetuning)
    result = coserve.Benchmark(place, slo, traffic, finetuning).run(None, (0.2, 0.7), ("hybrid",))
    del result["finetune_alone_tokens_per_s_of_runs"]
    for run in result["runs"]:
        run.pop("series", None)  # step by step: not what rounds have in common
    result["loads"] = []
    for name, alone, both in zip(("light", "heavy"), result["runs"][::2], result["runs"][1::2], strict=True):
        result["loads"].append({"load": name, "serving_alone": alone, "coserving": both})
    del result["runs"]
    return result


if __name__ == "__main__":
    main()
