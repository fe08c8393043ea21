"""The compiled module's surface: records, conversions, errors. What an engine computes is tested elsewhere."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flexcore as fc


def test_records_keep_what_they_are_given() -> None:
    config = fc.EngineConfig(device="cpu", max_model_len=np.int64(64), kv_cache_memory_bytes=None, slo=fc.SLO(50, 900))
    assert (config.device, config.max_model_len, config.slo.tpot_ms) == ("cpu", 64, 50.0)
    config.slo.ttft_ms = 1.5
    assert config.slo == fc.SLO(tpot_ms=50, ttft_ms=1.5)
    assert fc.FinetuneConfig(betas=[0.5, 0.75]).betas == (0.5, 0.75)
    assert fc.SamplingParams(stop="x", logit_bias={3: -1}).logit_bias == {3: -1.0}
    assert fc.SamplingParams(stop="x").stop == ["x"]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(q|k)_proj", ["all-linear", "x"], ["a"]])
def test_target_modules_are_given_back_as_they_came(targets: Any) -> None:
    config = fc.LoraConfig(target_modules=targets, rank_pattern={"q_proj": 4}, alpha_pattern={"v": 2})
    assert config.target_modules == targets
    assert copy.copy(config) == config
    assert config.rank_pattern == {"q_proj": 4}


@pytest.mark.parametrize(
    "record", [fc.EngineConfig(seed=5), fc.SamplingParams(seed=2**64 - 1), fc.Example([1], [-100])]
)
def test_records_copy_pickle_and_print(record: Any) -> None:
    for other in (copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
        assert other == record
    names = {**vars(fc)}
    assert eval(repr(record), names) == record
    with pytest.raises(TypeError):
        hash(record)


def test_example_takes_arrays() -> None:
    for dtype in (np.int32, np.int64, np.uint16):
        assert fc.Example(np.arange(4, dtype=dtype), (1, 2, 3, 4)).input_ids == [0, 1, 2, 3]
    assert fc.Example(np.arange(8, dtype=np.int32)[::2], []).input_ids == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fc.EngineConfig(max_model_len="big"), "EngineConfig.max_model_len: got 'big' (str), wanted an int"),
        (lambda: fc.EngineConfig(max_model_len=True), "wanted an int"),
        (lambda: fc.EngineConfig(max_model_len=2**70), "64 bits"),
        (lambda: fc.EngineConfig(enable_prefix_caching=1), "EngineConfig.enable_prefix_caching"),
        (lambda: fc.EngineConfig(slo=3), "wanted a flexcore.SLO"),
        (lambda: fc.SamplingParams(temperature="hot"), "SamplingParams.temperature"),
        (lambda: fc.SamplingParams(seed=-1), "SamplingParams.seed"),
        (lambda: fc.SamplingParams(stop=[1]), "SamplingParams.stop[0]"),
        (lambda: fc.SamplingParams(logit_bias={"a": 1}), "SamplingParams.logit_bias"),
        (lambda: fc.FinetuneConfig(betas=[1]), "FinetuneConfig.betas"),
        (lambda: fc.Example([1, 2**40]), "Example.input_ids[1]"),
        (lambda: fc.Example(np.zeros(3)), "dtype float64"),
        (lambda: fc.Example(np.zeros((2, 2), int)), "2 dimensions"),
        (lambda: fc.Example("abc"), "wanted token ids"),
        (lambda: fc.Engine(3), "model: got 3 (int)"),
    ],
)
def test_wrong_types_name_the_argument(call: Any, message: str) -> None:
    with pytest.raises(fc.InvalidArgument) as info:
        call()
    assert message in str(info.value)
    assert isinstance(info.value, ValueError)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fc.EngineConfig(max_modellen=3),
            "EngineConfig: got a field 'max_modellen', wanted one of max_model_len,",
        ),
        (lambda: fc.SamplingParams(temprature=1), "wanted one of temperature, max_tokens"),
        (lambda: fc.LoraConfig(rank=8, task_type="CAUSAL_LM"), "'rank', wanted one of"),
        (lambda: fc.FinetuneConfig(lr=1), "one of num_epochs, batch_size"),
        (lambda: fc.Example(ids=[1]), "wanted one of input_ids"),
        (lambda: fc.SLO(tpot=3), "wanted one of tpot_ms, ttft_ms"),
    ],
)
def test_unknown_fields_name_what_there_is(call: Any, message: str) -> None:
    with pytest.raises(fc.InvalidArgument) as info:
        call()
    assert message in str(info.value)


def test_fields_of_peft_that_are_not_here(numpy_model: Path) -> None:
    with pytest.raises(fc.Unsupported, match=r"LoraConfig.bias: flexcore trains adapters only"):
        fc.LoraConfig(r=8, bias="all")  # type: ignore[call-arg]
    with pytest.raises(fc.InvalidArgument, match="got a field 'dtypo', wanted one of dtype"):
        fc.LLM(numpy_model, dtypo="float32")


def test_calls_that_python_refuses() -> None:
    with pytest.raises(TypeError, match="twice"):
        fc.SLO(1, tpot_ms=2)  # type: ignore[misc]


def test_errors_are_also_the_builtin_ones() -> None:
    assert issubclass(fc.InvalidArgument, ValueError)
    assert issubclass(fc.OutOfMemory, MemoryError)
    for name in ("InvalidArgument", "Unsupported", "OutOfMemory", "DeviceError", "ModelLoadError"):
        assert issubclass(getattr(fc, name), fc.Error)
    error = fc.InvalidArgument("x")
    assert pickle.loads(pickle.dumps(error)).args == ("x",)


@pytest.fixture(scope="module")
def engine(numpy_model: Path) -> fc.Engine:
    config = fc.EngineConfig(dtype="float32", max_model_len=64, max_num_seqs=4, max_num_batched_tokens=32)
    return fc.Engine(numpy_model, config)


def test_submit_takes_lists_and_arrays(engine: fc.Engine) -> None:
    sampling = fc.SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    ids = [engine.submit([1, 2, 3], sampling), engine.submit(np.array([1, 2, 3]), sampling)]
    ids += engine.submit_batch([(4,), np.array([5, 6], np.int32)], [sampling, sampling], adapter=[None, None])
    tokens: dict[int, list[int]] = {request: [] for request in ids}
    while engine.has_work():
        for event in engine.step().outputs:
            tokens[event.request_id].append(event.token_id)
            assert event.finish_reason in (None, "length")
    assert [len(found) for found in tokens.values()] == [2] * 4
    assert tokens[ids[0]] == tokens[ids[1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.submit("text"), "submit: prompt_token_ids"),
        (lambda e: e.submit([1.5]), "submit: prompt_token_ids[0]"),
        (lambda e: e.submit([1], {"max_tokens": 3}), "wanted a flexcore.SamplingParams"),
        (lambda e: e.submit([1], fc.SamplingParams(stop="x")), "stop_token_ids"),
        (lambda e: e.submit([1], adapter=3), "submit: adapter"),
        (lambda e: e.submit_batch([[1], [2]], [fc.SamplingParams()]), "one for each of 2 prompts"),
        (lambda e: e.submit_batch([[1], "b"]), "submit_batch: prompts[1]"),
        (lambda e: e.finetune("a", [3]), "finetune: examples[0]"),
        (lambda e: e.finetune("a", [{"labels": [1]}]), "input_ids"),
        (lambda e: e.load_adapter("a", 3), "load_adapter: directory"),
        (lambda e: e.job("x"), "job: job_id"),
    ],
)
def test_calls_refuse_wrong_types(engine: fc.Engine, call: Any, message: str) -> None:
    with pytest.raises(fc.InvalidArgument) as info:
        call(engine)
    assert message in str(info.value)


def test_long_text_is_cut_between_characters(engine: fc.Engine) -> None:
    for shift in range(3):
        with pytest.raises(fc.InvalidArgument, match="prompt"):
            engine.submit("a" * shift + "\u00e9" * 200)  # type: ignore[arg-type]
        with pytest.raises(fc.InvalidArgument, match="rms_norm: x"):
            fc.ops.rms_norm("a" * shift + "\u00e9" * 200, None, 1e-6)


def test_the_interpreter_ends_while_a_thread_is_in_a_step(numpy_model: Path) -> None:
    code = f"""
import threading, time, flexcore as fc
engine = fc.Engine({str(numpy_model)!r}, fc.EngineConfig(device="cpu", num_threads=1))
def work():
    while True:
        engine.score([5] * 40)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_numbers_come_as_arrays(engine: fc.Engine) -> None:
    scores, logits = engine.score([1, 2, 3, 4]), engine.logits([1, 2, 3, 4])
    assert scores.dtype == logits.dtype == np.float32
    assert scores.shape == (3,)
    assert logits.shape == (4, engine.model().vocab_size)
    assert all(isinstance(value, int) for value in engine.memory().values())
    assert all(isinstance(value, float) for value in engine.stats().values())


def test_threads_may_share_an_engine(engine: fc.Engine) -> None:
    sampling = fc.SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                engine.submit([1, 2, 3], sampling)
                while engine.has_work():
                    engine.step()
                engine.memory()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_arguments_that_change_while_they_are_read(engine: fc.Engine) -> None:
    ids: list[Any] = []

    class Shrinks:
        def __index__(self) -> int:
            ids.clear()
            return 3

    ids.extend([Shrinks()] * 50)
    engine.cancel(engine.submit(ids, fc.SamplingParams(max_tokens=1)))
    bias: dict[Any, Any] = {}

    class Clears:
        def __float__(self) -> float:
            bias.clear()
            return 1.0

    bias.update({i: Clears() for i in range(40)})
    assert len(fc.SamplingParams(logit_bias=bias).logit_bias) == 40


def test_ids_at_odd_addresses(engine: fc.Engine) -> None:
    for dtype in (np.int64, np.int32):
        ids = np.frombuffer(b"\0" + np.array([3, 4], dtype).tobytes(), dtype, 2, 1)
        engine.cancel(engine.submit(ids, fc.SamplingParams(max_tokens=1)))
