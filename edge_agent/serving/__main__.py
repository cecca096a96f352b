"""Serves the personal model of a folder of artifacts: `python -m edge_agent.serving DIR --port N`."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import ssl
import sys
import time
from pathlib import Path

import uvicorn

from edge_agent.memory import hold_little
from edge_agent.serving.bodies import LARGEST_BODY_BYTES
from edge_agent.serving.guard import Guard, read_key
from edge_agent.serving.http import Application, ServerSettings
from edge_agent.serving.predictor import Predictor, Rules
from edge_agent.serving.pressure import Pressure
from edge_agent.serving.runner import MOST_IN_FLIGHT
from edge_agent.serving.trial import Band
from edge_agent.serving.web import Server
from export.proof import LARGEST_BATCH
from foundation.errors import ExportError, SettingsError
from foundation.hosts import is_loopback

logger = logging.getLogger(__name__)

DONE, FAILED, WRONG, REFUSED = 0, 1, 2, 3
DRAIN_S = 5
BACKLOG = 128
CONNECTIONS = 256
"""Open connections and their requests; a guard against running out of files, far above what is answered."""

_EXAMPLES = """examples:
  hedgerow serve vault/artifacts                          the page to try it: http://127.0.0.1:8090/
  hedgerow serve vault/artifacts --host 0.0.0.0 --api-key-file key --tls-cert cert.pem --tls-key key.pem
  curl http://127.0.0.1:8090/predict --data-binary @picture.png
  curl http://127.0.0.1:8090/predict -H "Authorization: Bearer $(cat key)" -d '{"inputs": [[0.1, 0.2]]}'

docs/models.md has the rest. Ends with 0 when stopped, 1 when the address is taken, 2 when an option is wrong,
3 when no artifact in the folder proves itself."""


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; 0 done, 1 address taken, 2 wrong option, 3 no artifact proves itself."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    hold_little()  # models are loaded in threads, each of which would have a pool of its own
    start = time.perf_counter()
    try:
        guard = _guard(options)
        predictor = Predictor(options.folder, _rules(options))
    except SettingsError as error:
        sys.stderr.write(f"failed: {error}\n")
        return WRONG
    except ExportError as error:
        sys.stderr.write(f"refused: {error}\n")
        return REFUSED
    pressure = None if options.report is None else Pressure()
    application = Application(
        predictor,
        _settings(options),
        guard,
        load_s=time.perf_counter() - start,
        answered=None if pressure is None else pressure.answered,
    )
    try:
        listening = _listen(options.host, options.port)
    except OSError as error:
        sys.stderr.write(f"failed: {options.host}:{options.port}: {error}\n")
        return FAILED
    # uvicorn drains and then raises the signal again, which would end in failure; this ends in success.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(DONE))
    if pressure is not None:
        pressure.report(options.report)
    config = uvicorn.Config(
        application,
        interface="asgi3",
        http="auto",  # httptools, or h11 where that is not installed: 0.1 ms a request slower
        lifespan="on",
        ws="none",
        proxy_headers=False,
        access_log=False,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=DRAIN_S,
        server_header=False,
        date_header=False,  # the application's: uvicorn would have to wake for it every second
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )
    with listening:
        Server(config, application.leave).run(sockets=[listening])
    return DONE


def _settings(options: argparse.Namespace) -> ServerSettings:
    return ServerSettings(
        name=options.name,
        watch_s=options.watch,
        window_s=options.batch_window_ms / 1e3,
        most_bytes=options.max_body_bytes,
        most_samples=options.max_batch,
        most_in_flight=options.max_in_flight,
        control=options.folder if options.control else None,
    )


def _rules(options: argparse.Namespace) -> Rules:
    band = None if options.no_rollback else Band(options.rollback_errors, options.rollback_p95)
    return Rules(options.agent, options.canary_drop, band, options.optimized)


def _guard(options: argparse.Namespace) -> Guard:
    """Return who is let in. Raises `SettingsError` for options that contradict each other or are unsafe."""
    key = read_key(options.api_key_file) if options.api_key_file else None
    loopback = is_loopback(options.host)
    if not loopback and key is None and not options.insecure:
        raise SettingsError(
            f"--host {options.host} lets the network ask, and nobody would be asked for a key: name a file"
            " with one (--api-key-file), or say that it is meant (--insecure)"
        )
    if options.control and key is None and not loopback:
        raise SettingsError("--control beyond loopback needs a key: anybody could replace the model")
    if bool(options.tls_cert) != bool(options.tls_key):
        raise SettingsError("--tls-cert and --tls-key go together")
    if options.tls_cert:
        try:
            # Without a password, so that an encrypted key is an error and not a question.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.tls_cert, options.tls_key, "")
        except OSError as error:
            raise SettingsError(f"--tls-cert and --tls-key cannot be used: {error}") from error
    elif key is not None and not loopback:
        logger.warning("the key travels in the clear: --tls-cert and --tls-key encrypt it")
    admin_key = read_key(options.admin_key_file) if options.admin_key_file else None
    return Guard(key, loopback=loopback, admin_key=admin_key)


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
    parser = argparse.ArgumentParser(
        prog="hedgerow serve",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder with a `current` artifact, or one artifact")
    parser.add_argument("--name", type=_name, default="model", help="the model's name in the protocol")
    parser.add_argument(
        "--watch",
        type=_not_negative,
        default=1.0,
        help="seconds between two looks for a newer artifact and at a new one's trial; 0 never",
    )
    where = parser.add_argument_group("where, and for whom")
    where.add_argument("--host", default="127.0.0.1", help="beyond loopback only with a key, or --insecure")
    where.add_argument("--port", type=int, default=8090, help="0 picks a free one")
    where.add_argument("--api-key-file", type=Path, help="file with the key that clients have to send")
    where.add_argument(
        "--admin-key-file",
        type=Path,
        help="file with the key for /admin/ (pin, unpin, roll back); without it, the clients' key",
    )
    where.add_argument("--tls-cert", type=Path, help="certificate chain in PEM: serve HTTPS")
    where.add_argument("--tls-key", type=Path, help="its private key in PEM, not encrypted")
    where.add_argument("--insecure", action="store_true", help="the network may ask without a key")
    where.add_argument(
        "--control", action="store_true", help="clients may send another artifact, and unload the model"
    )
    which = parser.add_argument_group("which model answers")
    which.add_argument(
        "--agent", help="refuse models made for another agent; without it, the vault's own name counts"
    )
    which.add_argument(
        "--canary-drop",
        type=float,
        metavar="POINTS",
        help="accuracy that a newer model may lose on the canary set; without it, what chance explains",
    )
    which.add_argument(
        "--rollback-errors",
        type=float,
        default=Band().errors,
        metavar="SHARE",
        help="of its requests that a new model may fail and the one before answers; more rolls it back",
    )
    which.add_argument(
        "--rollback-p95",
        type=float,
        default=Band().p95,
        metavar="TIMES",
        help="the p95 of the model before that a new one may take; more rolls it back",
    )
    which.add_argument(
        "--optimized",
        choices=("auto", "on", "off"),
        default="auto",
        help="keep onnxruntime's optimized form of a model for the next start; auto where it pays",
    )
    which.add_argument("--no-rollback", action="store_true", help="a model that was taken stays")
    parser.add_argument("--report", type=int, metavar="FD", help=argparse.SUPPRESS)
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument(
        "--batch-window-ms",
        type=_not_negative,
        default=0.0,
        help="how long a request waits for others to share a run with, where sharing pays; 0 off (default)",
    )
    bounds.add_argument("--max-batch", type=_samples, default=LARGEST_BATCH, help="samples of one request")
    bounds.add_argument(
        "--max-body-bytes", type=_positive, default=LARGEST_BODY_BYTES, help="of one body, unpacked too"
    )
    bounds.add_argument(
        "--max-in-flight", type=_positive, default=MOST_IN_FLIGHT, help="requests at once; more get 503"
    )
    return parser


def _name(text: str) -> str:
    if not text or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in text) or text == "stats":
        raise argparse.ArgumentTypeError("a name is letters, digits, - _ and .")
    return text


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return value


def _samples(text: str) -> int:
    value = _positive(text)
    if value > LARGEST_BATCH:
        raise argparse.ArgumentTypeError(f"at most {LARGEST_BATCH}")
    return value


if __name__ == "__main__":
    sys.exit(main())
