"""flexcore serve MODEL"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from flexcore import InvalidArgument
from flexcore.cli import options
from flexcore.cli.console import err, load_llm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0: every interface (default: %(default)s)")
    group.add_argument("--port", type=options.port, default=8000, help="(default: %(default)s)")
    group.add_argument("--uds", metavar="PATH", help="a Unix socket instead of host and port")
    group.add_argument("--served-model-name", nargs="+", metavar="NAME", help="default: the model's own")
    group.add_argument("--api-key", action="append", default=[], metavar="KEY", help="also $FLEXCORE_API_KEY")
    group.add_argument("--data-dir", type=Path, metavar="DIR", help="files, jobs and finetuned models")
    group.add_argument("--allowed-origins", nargs="*", default=[], metavar="ORIGIN", help="of pages elsewhere (CORS)")
    group.add_argument("--disable-dashboard", action="store_true", help="no page at /")
    group.add_argument("--log-format", choices=["text", "json"], default="text")
    group.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    group.add_argument("--ssl-keyfile", metavar="FILE")
    group.add_argument("--ssl-certfile", metavar="FILE")
    group = parser.add_argument_group("limits")
    group.add_argument("--max-waiting-requests", type=options.positive, default=1024, metavar="N")
    group.add_argument("--max-body-bytes", type=options.byte_count, default=32 << 20, metavar="BYTES")
    group.add_argument("--max-file-bytes", type=options.byte_count, default=512 << 20, metavar="BYTES")
    group.add_argument("--max-finetune-jobs", type=options.positive, default=4, metavar="N", help="that train at once")
    group.add_argument("--max-loras", type=options.positive, default=64, metavar="N", help="adapters kept loaded")
    group.add_argument("--drain-seconds", type=float, default=30.0, help="that requests have at SIGTERM")
    group.add_argument("--chat-template", metavar="FILE", help="jinja2, instead of the model's own")
    options.add_adapters(parser)
    options.add_engine(parser)


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from flexcore.server.app import create_app
        from flexcore.server.state import ServerConfig
    except ImportError as error:
        raise InvalidArgument(
            f"serve: {error.name} is not installed (pip install 'flexcore[serve]', or '.[serve]' in a clone)"
        ) from None

    _set_up_logging(args.log_format, args.log_level)
    model = options.model_of(args)
    llm = load_llm(model, options.engine_config(args), chat_template=args.chat_template)
    names = tuple(args.served_model_name or [_name_of(model)])
    keys = [*args.api_key, *filter(None, [os.environ.get("FLEXCORE_API_KEY")])]
    if not all(keys):
        raise InvalidArgument("--api-key: empty; leave it out to serve without keys")
    config = ServerConfig(
        served_names=names,
        data_dir=args.data_dir or _default_data_dir(),
        api_keys=tuple(keys),
        lora_modules=tuple(options.adapters_of(args)),
        max_loras=args.max_loras,
        max_waiting=args.max_waiting_requests,
        max_body_bytes=args.max_body_bytes,
        max_file_bytes=args.max_file_bytes,
        max_finetune_jobs=args.max_finetune_jobs,
        allowed_origins=tuple(args.allowed_origins),
        dashboard=not args.disable_dashboard,
    )
    app = create_app(llm, config)
    where = args.uds or f"http://{args.host}:{args.port}"
    if err.is_terminal:
        err.print(f"[bold]{names[0]}[/] on [bold]{where}[/]  (data in {config.data_dir}; Ctrl-C ends)")
    # uvicorn ends in order at these, and then raises them again.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        uds=args.uds,
        log_config=None,
        access_log=args.log_level == "debug",
        timeout_graceful_shutdown=int(args.drain_seconds),
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
    )
    return 0


def _name_of(model: str) -> str:
    """A hub name as it is; of a path, the directory's or file's name."""
    path = Path(model)
    return path.name.removesuffix(".gguf") if path.exists() else model


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "flexcore"


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _set_up_logging(form: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")
    handler.setFormatter(_JsonLines() if form == "json" else text)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger("uvicorn.access").setLevel(level.upper())
