"""llama.cpp, through llama-cpp-python's low-level API.

Greedy tokens are picked with numpy, so that the Python side of its samplers costs nothing.
"""

from __future__ import annotations

import os
import time

import common
import llama_cpp as llama
import numpy as np


class Model:
    def __init__(self, path: str, threads: int, load: common.Workload) -> None:
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        params = llama.llama_context_default_params()
        per_sequence = load.prompt + load.decode + 1
        params.n_ctx = max(load.prefill, load.batch * (per_sequence + 32)) + 64
        params.n_batch = max(load.prefill, load.batch * load.prompt)
        params.n_seq_max = load.batch
        params.n_threads = params.n_threads_batch = threads
        if hasattr(params, "kv_unified"):
            params.kv_unified = True  # one pool; otherwise each sequence has its share of n_ctx only
        self.context = llama.llama_init_from_model(self.model, params)
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(params.n_batch, 0, 1)

    def clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Rows are (token, position, sequence, logits wanted); the greedy token of each row that wants one."""
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = wanted
        code = llama.llama_decode(self.context, self.batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        return [self._best(i) for i, row in enumerate(rows) if row[3]]

    def _best(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())


def main() -> None:
    args = common.arguments(__doc__)
    load = common.workload(args)
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    model = Model(args.model, args.threads, load)
    results: dict[str, object] = {}
    for batch in (1, load.batch):
        seconds = common.median_seconds(lambda batch=batch: decode_seconds(model, batch, load), load)
        results[f"decode_{batch}"] = batch * load.decode / seconds
    results["prefill"] = load.prefill / common.median_seconds(lambda: prefill_seconds(model, load), load)
    results["file_bytes"] = os.path.getsize(args.model)
    common.finish({"llama_cpp_python": llama.__version__}, results, load)


def decode_seconds(model: Model, batch: int, load: common.Workload) -> float:
    model.clear()
    prompts = [common.ids(load.prompt, model.vocab_size, k) for k in range(batch)]
    rows = [
        (token, position, sequence, position == load.prompt - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    tokens = model.decode(rows)
    start = time.perf_counter()
    for step in range(load.decode):
        tokens = model.decode([(token, load.prompt + step, k, True) for k, token in enumerate(tokens)])
    return time.perf_counter() - start


def prefill_seconds(model: Model, load: common.Workload) -> float:
    model.clear()
    prompt = common.ids(load.prefill, model.vocab_size, 1)
    rows = [(token, position, 0, position == load.prefill - 1) for position, token in enumerate(prompt)]
    start = time.perf_counter()
    model.decode(rows)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
