"""flexcore demo: serve and finetune a real model at once"""

from __future__ import annotations

import argparse

from flexcore import SLO
from flexcore.cli import options
from flexcore.cli.console import load_llm, out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--duration", type=float, default=60.0, metavar="SECONDS", help="of the live part")
    parser.add_argument(
        "--request-rate", type=float, metavar="PER_SECOND", help="of arriving chats (default: by this machine)"
    )
    parser.add_argument("--rows", type=int, default=800, metavar="N", help="training rows")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="rows of an optimizer step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--json", default="demo.json", metavar="FILE", help="default: %(default)s; '' writes none")
    options.add_adapter(parser)
    options.add_engine(parser)
    # Modest, for a laptop's memory; an objective that nobody asked for may be fitted to the machine.
    parser.set_defaults(max_model_len=1024, max_num_seqs=16, slo_tpot_ms=None)


def run(args: argparse.Namespace) -> int:
    from flexcore import demo

    fixed_objective = args.slo_tpot_ms is not None
    args.slo_tpot_ms = args.slo_tpot_ms if fixed_objective else SLO().tpot_ms
    llm = load_llm(options.model_of(args), options.engine_config(args))
    chosen = demo.Options(
        duration=args.duration,
        request_rate=args.request_rate,
        rows=args.rows,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        fixed_objective=fixed_objective,
        seed=args.seed or 0,
        json=args.json or None,
    )
    demo.run(llm, chosen, options.adapter_of(args), out)
    return 0
