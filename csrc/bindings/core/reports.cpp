#include <pybind11/stl.h>

#include "flexcore/engine.h"
#include "record.h"
#include "register.h"

namespace flexcore::python {
namespace {

py::object finish_reason(const TokenEvent& event) {
  switch (event.finish_reason) {
    case FinishReason::kStop:
      return py::str("stop");
    case FinishReason::kLength:
      return py::str("length");
    case FinishReason::kCancelled:
      return py::str("cancelled");
    case FinishReason::kError:
      return py::str("error");
    case FinishReason::kNone:
      break;
  }
  return py::none();
}

template <class T>
py::object status(const T& report) {
  return py::str(job_status_name(report.status));
}

void register_step(py::module_& m) {
  Report<TokenEvent>(m, "TokenEvent",
                     "One new token of one request; token_id is -1 when the request was cancelled, or failed: then "
                     "finish_reason is \"error\", and error says why. ttft_ms is 0 until a token came.")
      .field("request_id", &TokenEvent::request_id)
      .field("token_id", &TokenEvent::token_id)
      .field("logprob", &TokenEvent::logprob)
      .property("finish_reason", finish_reason)
      .field("top_logprobs", &TokenEvent::top_logprobs)
      .field("prompt_logprobs", &TokenEvent::prompt_logprobs)
      .field("num_cached_tokens", &TokenEvent::num_cached_tokens)
      .field("queue_ms", &TokenEvent::queue_ms)
      .field("ttft_ms", &TokenEvent::ttft_ms)
      .field("error", &TokenEvent::error)
      .done();
  Report<FinetuneEvent>(m, "FinetuneEvent", "One optimizer step of a job, or a change of its status.")
      .field("job_id", &FinetuneEvent::job_id)
      .field("step", &FinetuneEvent::step)
      .field("loss", &FinetuneEvent::loss)
      .field("target_tokens", &FinetuneEvent::target_tokens)
      .field("learning_rate", &FinetuneEvent::learning_rate)
      .field("grad_norm", &FinetuneEvent::grad_norm)
      .property("status", status<FinetuneEvent>)
      .done();
  Report<StepReport>(m, "StepReport", "What one iteration did, how long it was to take and took, and why this mix.")
      .field("outputs", &StepReport::outputs)
      .field("finetune", &StepReport::finetune)
      .field("num_decode_tokens", &StepReport::num_decode_tokens)
      .field("num_prefill_tokens", &StepReport::num_prefill_tokens)
      .field("num_finetune_forward_tokens", &StepReport::num_finetune_forward_tokens)
      .field("num_finetune_backward_tokens", &StepReport::num_finetune_backward_tokens)
      .field("num_backward_units", &StepReport::num_backward_units)
      .field("predicted_ms", &StepReport::predicted_ms)
      .field("predicted_upper_ms", &StepReport::predicted_upper_ms)
      .field("elapsed_ms", &StepReport::elapsed_ms)
      .field("explain", &StepReport::explain)
      .done();
}

}  // namespace

void register_reports(py::module_& m) {
  register_step(m);
  Report<AdapterInfo>(m, "AdapterInfo", "An adapter; its version grows by one with every published training step.")
      .field("name", &AdapterInfo::name)
      .field("version", &AdapterInfo::version)
      .field("peft_type", &AdapterInfo::peft_type)
      .field("rank", &AdapterInfo::rank)
      .field("target_modules", &AdapterInfo::target_modules)
      .field("bytes", &AdapterInfo::bytes)
      .field("training", &AdapterInfo::training)
      .done();
  Report<JobInfo>(m, "JobInfo", "A finetuning job: queued, running, paused, succeeded, failed or cancelled.")
      .field("id", &JobInfo::id)
      .field("adapter", &JobInfo::adapter)
      .property("status", status<JobInfo>)
      .field("step", &JobInfo::step)
      .field("total_steps", &JobInfo::total_steps)
      .field("epoch", &JobInfo::epoch)
      .field("loss", &JobInfo::loss)
      .field("trained_tokens", &JobInfo::trained_tokens)
      .field("error", &JobInfo::error)
      .done();
  Report<ModelInfo>(m, "ModelInfo", "What a loaded model is.")
      .field("architecture", &ModelInfo::architecture)
      .field("device", &ModelInfo::device)
      .field("dtype", &ModelInfo::dtype)
      .field("quantization", &ModelInfo::quantization)
      .field("quantization_group_size", &ModelInfo::quantization_group_size)
      .field("num_layers", &ModelInfo::num_layers)
      .field("hidden_size", &ModelInfo::hidden_size)
      .field("intermediate_size", &ModelInfo::intermediate_size)
      .field("num_heads", &ModelInfo::num_heads)
      .field("num_kv_heads", &ModelInfo::num_kv_heads)
      .field("head_dim", &ModelInfo::head_dim)
      .field("vocab_size", &ModelInfo::vocab_size)
      .field("max_position_embeddings", &ModelInfo::max_position_embeddings)
      .field("num_parameters", &ModelInfo::num_parameters)
      .field("eos_token_ids", &ModelInfo::eos_token_ids)
      .field("num_blocks", &ModelInfo::num_blocks)
      .field("block_size", &ModelInfo::block_size)
      .field("max_model_len", &ModelInfo::max_model_len)
      .field("num_threads", &ModelInfo::num_threads)
      .done();
}

}  // namespace flexcore::python
