"""/v1/models, /v1/files, /v1/fine_tuning/jobs and the adapters' routes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from flexcore import Error, FinetuneConfig
from flexcore.server.errors import ApiError, not_found
from flexcore.server.finetuning import check_suffix
from flexcore.server.protocol import Body, LoadAdapterRequest, UnloadAdapterRequest
from flexcore.server.settings import adapter_of
from flexcore.server.state import ServerState, state_of
from flexcore.server.store import Row, Store
from flexcore.server.training import ACTIVE

router = APIRouter()
Limit = Annotated[int, Query(ge=1, le=10_000)]


def _page(
    store: Store,
    table: str,
    form: Callable[[Row], dict[str, Any]],
    after: str | None,
    limit: int,
    order: str = "desc",
    **equal: Any,
) -> dict[str, Any]:
    """Rows in the order of their making, behind the one `after`, whose columns (or paths in them) are `equal`."""
    where: list[str] = ["1"]
    values: list[Any] = []
    if after is not None:
        where.append(f"rowid {'<' if order == 'desc' else '>'} ?")
        values.append(store.place(table, after))
    for column, value in equal.items():
        name, _, key = column.partition("$")
        where.append(f"json_extract({name}, ?) = ?" if key else f"{name} = ?")
        values += [f"${key}", value] if key else [value]
    query = f"SELECT * FROM {table} WHERE {' AND '.join(where)} ORDER BY rowid {order} LIMIT {limit + 1}"
    rows = [form(row) for row in store.select(query, *values)]
    data = rows[:limit]
    ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, **ids, "has_more": len(rows) > limit}


# Models


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The base model, loaded adapters, finetuned models and their checkpoints."""
    return {"object": "list", "data": state_of(request).models.list()}


@router.get("/v1/models/{model:path}")
async def get_model(model: str, request: Request) -> dict[str, Any]:
    return state_of(request).models.get(model)


@router.delete("/v1/models/{model:path}")
async def delete_model(model: str, request: Request) -> dict[str, Any]:
    """Deletes a finetuned model; requests that run on it end first."""
    await state_of(request).models.delete(model)
    return {"id": model, "object": "model", "deleted": True}


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadAdapterRequest, request: Request) -> Response:
    """Serves a PEFT directory of this machine under a name."""
    await state_of(request).models.load(body.lora_name, body.lora_path, body.load_inplace)
    return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadAdapterRequest, request: Request) -> Response:
    await state_of(request).models.unload(body.lora_name)
    return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")


# Files


def _file(row: Row) -> dict[str, Any]:
    names = ("id", "bytes", "created_at", "filename", "purpose")
    fixed = {"object": "file", "status": "processed", "expires_at": None, "status_details": None}
    return {**{name: row[name] for name in names}, **fixed}


def _find_file(state: ServerState, file: str) -> Row:
    row = state.store.get("files", file)
    if row is None:
        raise not_found("file", file, "file_id")
    return row


@router.post("/v1/files")
async def upload_file(
    request: Request, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()]
) -> dict[str, Any]:
    """A data set, as JSON lines."""
    if purpose not in ("fine-tune", "user_data"):
        raise ApiError(400, f"purpose: got {purpose!r}, wanted fine-tune", "purpose")
    state = state_of(request)
    if not file.size:
        raise ApiError(400, "file: empty", "file")
    row = await asyncio.to_thread(state.store.add_file, file.file, file.filename or "upload.jsonl", purpose)
    return _file(row)


@router.get("/v1/files")
async def list_files(
    request: Request,
    purpose: str | None = None,
    after: str | None = None,
    limit: Limit = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    equal = {"purpose": purpose} if purpose is not None else {}
    return _page(state_of(request).store, "files", _file, after, limit, order, **equal)


@router.get("/v1/files/{file_id}")
async def get_file(file_id: str, request: Request) -> dict[str, Any]:
    return _file(_find_file(state_of(request), file_id))


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
async def get_file_content(file_id: str, request: Request) -> Response:
    state = state_of(request)
    row = _find_file(state, file_id)
    return FileResponse(state.store.path_of_file(row), media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, request: Request) -> dict[str, Any]:
    state = state_of(request)
    row = _find_file(state, file_id)
    if state.jobs.uses_file(file_id):
        raise ApiError(409, f"file {file_id} is used by a job that has not ended", "file_id", "file_in_use")
    await asyncio.to_thread(state.store.delete_file, row)
    return {"id": file_id, "object": "file", "deleted": True}


# Finetuning

Auto = Literal["auto"]


class Hyperparameters(Body):
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1e6)] = "auto"


class Supervised(Body):
    hyperparameters: Hyperparameters | None = None


class Method(Body):
    type: str
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


Name = Annotated[str, Field(max_length=256)]


class Lora(Body):
    """Fields of PEFT's LoraConfig."""

    r: Annotated[int, Field(ge=1, le=4096)] = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    target_modules: Annotated[str, Field(max_length=1024)] | Annotated[list[Name], Field(max_length=64)] = "all-linear"
    use_rslora: bool = False
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_dora: bool = False
    modules_to_save: Annotated[list[Name], Field(max_length=2)] = Field(default_factory=list)
    rank_pattern: dict[Name, int] = Field(default_factory=dict, max_length=64)
    alpha_pattern: dict[Name, float] = Field(default_factory=dict, max_length=64)


class Peft(BaseModel):
    """An adapter of any method: peft_type, and the fields of its configuration."""

    model_config = ConfigDict(extra="allow")
    peft_type: Name


class Training(Body):
    """Of FinetuneConfig; the learning rate goes before learning_rate_multiplier."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    optimizer: Literal["adamw", "sgd"] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    max_grad_norm: Annotated[float, Field(ge=0)] | None = None
    lr_scheduler: Literal["constant", "linear", "cosine"] | None = None
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    shuffle: bool | None = None
    weight: Annotated[float, Field(gt=0)] | None = None


class JobRequest(Body):
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    integrations: list[dict[str, Any]] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None  # deprecated by OpenAI, and common
    lora: Lora | None = None  # flexcore's, by extra_body, as those below
    peft: Peft | None = None
    training: Training | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None


def _job(state: ServerState, row: Row) -> dict[str, Any]:
    ended = row["status"] not in ACTIVE
    settings = row["settings"]
    hyperparameters = {name: settings[name] for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}
    return {
        "id": row["id"],
        "object": "fine_tuning.job",
        "created_at": row["created_at"],
        "finished_at": row["finished_at"],
        "estimated_finish": state.jobs.estimated_finish(row),
        # The SDK has no name for paused; a job that waits is the nearest.
        "status": "queued" if row["paused"] and row["status"] == "running" else row["status"],
        "model": row["model"],
        "fine_tuned_model": row["fine_tuned_model"],
        "organization_id": "org-flexcore",
        "training_file": row["training_file"],
        "validation_file": row["validation_file"],
        "result_files": row["result_files"],
        "trained_tokens": row["trained_tokens"] if ended else None,
        "hyperparameters": hyperparameters,
        "seed": row["seed"],
        "error": row["error"],
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "metadata": row["metadata"],
        "integrations": [],
        "suffix": row["suffix"],
        "paused": bool(row["paused"]),
        "step": row["step"],
        "total_steps": row["total_steps"],
        "lora": settings["lora"],
        "peft": settings.get("peft"),
    }


@router.post("/v1/fine_tuning/jobs")
async def create_job(body: JobRequest, request: Request) -> dict[str, Any]:
    """Finetunes the base model on a file; the result answers by its name as soon as the job has ended."""
    state = state_of(request)
    if body.model not in state.models.names:
        raise ApiError(400, f"model: got {body.model!r}, wanted {state.models.names[0]!r}", "model", "model_not_found")
    for param in ("training_file", "validation_file"):
        file = getattr(body, param)
        if file is None:
            continue
        row = state.store.get("files", file)
        if row is None:
            raise ApiError(400, f"invalid {param}: no file {file!r}", param, "file_not_found")
        if row["purpose"] not in ("fine-tune", "user_data"):
            raise ApiError(400, f"invalid {param}: the purpose of {file!r} is {row['purpose']!r}", param)
    if body.method is not None and body.method.type != "supervised":
        raise ApiError(400, f"method.type: got {body.method.type!r}, wanted supervised", "method.type")
    if body.integrations:
        raise ApiError(400, "integrations: none are here", "integrations")
    for key, value in (body.metadata or {}).items():
        if len(key) > 64 or len(value) > 512:
            raise ApiError(400, "metadata: wanted keys of at most 64 characters, values of at most 512", "metadata")
    check_suffix(body.suffix)
    given = body.method.supervised if body.method is not None else None
    hyperparameters = (given.hyperparameters if given else None) or body.hyperparameters or Hyperparameters()
    training = body.training.model_dump(exclude_none=True) if body.training else {}
    if body.lora is not None and body.peft is not None:
        raise ApiError(400, "peft: the job has lora already, wanted one of them", "peft")
    peft = body.peft.model_dump() if body.peft is not None else None
    lora = (body.lora or Lora()).model_dump() if peft is None else None
    seed = body.seed if body.seed is not None else int(time.time())
    settings = {**hyperparameters.model_dump(), "training": training, "lora": lora, "peft": peft, "seed": seed}
    settings["max_length"] = body.max_length
    try:
        adapter_of(settings)
    except (Error, TypeError) as error:  # what it does not know
        raise ApiError(400, str(error), "lora" if peft is None else "peft") from error
    FinetuneConfig(**training)
    row = state.jobs.create(body.model_dump(exclude_none=True), settings, body.metadata)
    return _job(state, row)


@router.get("/v1/fine_tuning/jobs")
async def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """The newest first; metadata[key]=value chooses."""
    state = state_of(request)
    equal = {
        "metadata$." + json.dumps(name[len("metadata[") : -1].replace('"', "")): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    return _page(state.store, "jobs", lambda row: _job(state, row), after, limit, **equal)


@router.get("/v1/fine_tuning/jobs/{job_id}")
async def get_job(job_id: str, request: Request) -> dict[str, Any]:
    state = state_of(request)
    return _job(state, state.jobs.get(job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, request: Request) -> dict[str, Any]:
    state = state_of(request)
    return _job(state, await state.jobs.cancel(job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/pause")
async def pause_job(job_id: str, request: Request) -> dict[str, Any]:
    state = state_of(request)
    return _job(state, await state.jobs.pause(job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/resume")
async def resume_job(job_id: str, request: Request) -> dict[str, Any]:
    state = state_of(request)
    return _job(state, await state.jobs.resume(job_id))


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
async def list_events(job_id: str, request: Request, after: str | None = None, limit: Limit = 20) -> dict[str, Any]:
    """The newest first."""
    state = state_of(request)
    state.jobs.get(job_id)
    names = ("id", "created_at", "level", "message", "type", "data")

    def form(row: Row) -> dict[str, Any]:
        return {"object": "fine_tuning.job.event", **{name: row[name] for name in names}}

    return _page(state.store, "events", form, after, limit, job=job_id)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: str, request: Request, after: str | None = None, limit: Limit = 10
) -> dict[str, Any]:
    """The newest first; each answers by its fine_tuned_model_checkpoint."""
    state = state_of(request)
    state.jobs.get(job_id)

    def form(row: Row) -> dict[str, Any]:
        return {
            "id": row["id"],
            "object": "fine_tuning.job.checkpoint",
            "created_at": row["created_at"],
            "fine_tuning_job_id": job_id,
            "fine_tuned_model_checkpoint": row["model"],
            "step_number": row["step"],
            "metrics": row["metrics"],
        }

    return _page(state.store, "checkpoints", form, after, limit, job=job_id)
