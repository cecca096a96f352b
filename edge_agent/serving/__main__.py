"""Serves the personal model of a folder of artifacts: `python -m edge_agent.serving DIR --port N`."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from edge_agent.memory import hold_little
from edge_agent.serving.http import create_app
from edge_agent.serving.predictor import Predictor, Rules
from edge_agent.serving.pressure import Pressure
from edge_agent.serving.trial import Band
from foundation.errors import ExportError

logger = logging.getLogger(__name__)

DONE, FAILED, REFUSED = 0, 1, 3
DRAIN_S = 5
BACKLOG = 128


class _AnnouncingServer(uvicorn.Server):
    """Says where it answers, once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as usual, then print one line with the address."""
        await super().startup(sockets)
        for bound in sockets or []:
            host, port = bound.getsockname()[:2]
            sys.stdout.write(f"serving http://{f'[{host}]' if ':' in host else host}:{port}\n")
        sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0 done, 1 the address is taken, 3 no artifact proves itself."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    hold_little()  # models are loaded in threads, each of which would have a pool of its own
    try:
        predictor = Predictor(options.folder, _rules(options))
    except ExportError as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    try:
        listening = _listen(options.host, options.port)
    except OSError as error:
        sys.stderr.write(f"failed: {options.host}:{options.port}: {error}\n")
        return FAILED
    # uvicorn drains and then raises the signal again, which would end in failure; this ends in success.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(DONE))
    pressure = None if options.report is None else Pressure()
    if pressure is not None:
        pressure.report(options.report)
    config = uvicorn.Config(
        create_app(predictor, options.name, watch_s=options.watch or None, pressure=pressure),
        access_log=False,
        log_level="warning",
        limit_concurrency=64,
        timeout_graceful_shutdown=DRAIN_S,
        server_header=False,
    )
    with listening:
        _AnnouncingServer(config).run(sockets=[listening])
    return DONE


def _rules(options: argparse.Namespace) -> Rules:
    band = None if options.no_rollback else Band(options.rollback_errors, options.rollback_p95)
    return Rules(options.agent, options.canary_drop, band)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only for sockets that say they are TCP; 44 ms per answer otherwise.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hedgerow serve", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with a `current` artifact, or one artifact")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8090, help="0 picks a free one")
    parser.add_argument("--name", default="model", help="the model's name in the protocol")
    parser.add_argument(
        "--watch",
        type=float,
        default=1.0,
        help="seconds between two looks for a newer artifact and at a new one's trial; 0 never",
    )
    parser.add_argument(
        "--agent", help="refuse models made for another agent; without it, the vault's own name counts"
    )
    parser.add_argument(
        "--canary-drop",
        type=float,
        metavar="POINTS",
        help="accuracy that a newer model may lose on the canary set; without it, what chance explains",
    )
    parser.add_argument(
        "--rollback-errors",
        type=float,
        default=Band().errors,
        metavar="SHARE",
        help="of its requests that a new model may fail and the one before answers; more rolls it back",
    )
    parser.add_argument(
        "--rollback-p95",
        type=float,
        default=Band().p95,
        metavar="TIMES",
        help="the p95 of the model before that a new one may take; more rolls it back",
    )
    parser.add_argument("--no-rollback", action="store_true", help="a model that was taken stays")
    parser.add_argument("--report", type=int, metavar="FD", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
