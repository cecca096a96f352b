"""Coverage-guided fuzzing of everything that reads bytes of somebody else (bench/fuzz_targets.py).

    python bench/fuzz.py --list
    python bench/fuzz.py --target frame --seconds 120 --corpus fuzz-corpus
    python bench/fuzz.py --seconds 120 --json            # every target in turn

Needs atheris, which is no dependency of ours: pip install atheris, where there is a wheel for this Python.
Each target runs in a process of its own, with at most `--memory` MiB and `--each` seconds an input; inputs
that found something new are kept in CORPUS/TARGET, findings in CORPUS/TARGET-findings, to be read with
`python bench/fuzz.py --target TARGET --try FILE`. Exits with 1 where anything was found.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

MEMORY_MIB, EACH_S, LONGEST = 1_024, 10, 8_192
PROGRESS = re.compile(r"#(\d+)\s+\w+\s+(?:cov: (\d+) )?(?:ft: (\d+) )?")
MISSING = (
    "atheris is not here. It fuzzes with coverage, and is no dependency of ours:\n"
    "    pip install atheris        # wheels for CPython 3.11 to 3.13 on Linux\n"
    "into this environment, or into another that sees Hedgerow's packages. Without it the same targets run\n"
    "on their seeds and on what hypothesis makes: pytest tests/foundation/test_fuzz.py\n"
)


def main() -> int:
    options = parser().parse_args()
    if options.list:
        from bench.fuzz_targets import TARGETS

        print("\n".join(TARGETS))
        return 0
    if options.attempt is not None:
        return _try(options.target, options.attempt)
    if options.inside:
        return _inside(options.target, options.libfuzzer)
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.stderr.write(MISSING)
        return 2
    names = [options.target] if options.target else _names()
    found = [_fuzzed(name, options) for name in names]
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for one in found:
            print(
                f"{one['target']:<10} {one['executions']:>10,} executions {one['edges']:>6,} edges"
                f" {one['corpus']:>6,} inputs kept {len(one['findings']):>3} findings, {one['seconds']:.0f} s"
            )
            for file in one["findings"]:
                print(f"    {file}")
    return 1 if any(one["findings"] or one["broken"] for one in found) else 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--target", choices=_names(), help="one of them (all, in turn)")
    result.add_argument("--seconds", type=int, default=120, help="for each target (120)")
    result.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"), help="folder (fuzz-corpus)")
    result.add_argument("--memory", type=int, default=MEMORY_MIB, help=f"MiB of a process ({MEMORY_MIB})")
    result.add_argument("--each", type=int, default=EACH_S, help=f"seconds for one input ({EACH_S})")
    result.add_argument("--try", dest="attempt", type=Path, metavar="FILE", help="run one input, and say why")
    result.add_argument("--list", action="store_true", help="name the targets")
    result.add_argument("--json", action="store_true", help="print JSON")
    result.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    result.add_argument("libfuzzer", nargs="*", help=argparse.SUPPRESS)
    return result


def _names() -> list[str]:
    # Without importing the decoders: inside the fuzzer they have to be imported under its eyes.
    text = (Path(__file__).parent / "fuzz_targets.py").read_text(encoding="utf-8")
    return re.findall(r'^    "([a-z]+)": Target\(', text, re.MULTILINE)


def _try(name: str, file: Path) -> int:
    from bench.fuzz_targets import TARGETS

    print("taken" if TARGETS[name](file.read_bytes()) else "refused")
    return 0


def _fuzzed(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fuzz one target in a process of its own; returns figures."""
    corpus, findings = options.corpus / name, options.corpus / f"{name}-findings"
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    command = [
        sys.executable, str(Path(__file__).resolve()), "--inside", "--target", name, "--", str(corpus),
        f"-max_total_time={options.seconds}", f"-rss_limit_mb={options.memory}", f"-timeout={options.each}",
        f"-artifact_prefix={findings}/", f"-max_len={LONGEST}", "-print_final_stats=1", "-detect_leaks=0",
    ]  # fmt: skip
    began, said = time.monotonic(), 0.0
    executions = edges = 0
    tail: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            tail = [*tail[-40:], line]
            if progress := PROGRESS.match(line):
                executions = int(progress[1])
                edges = int(progress[2] or edges)
            if time.monotonic() - said > 10 and not options.json:
                said = time.monotonic()
                print(f"{name}: {said - began:.0f} s, {executions:,} executions, {edges:,} edges", flush=True)
    new = sorted(set(findings.iterdir()) - before)
    broken = child.returncode != 0 and not new
    if child.returncode != 0:
        sys.stderr.write("".join(tail))
    return {
        "target": name,
        "seconds": time.monotonic() - began,
        "executions": executions,
        "edges": edges,
        "corpus": sum(1 for _ in corpus.iterdir()),
        "findings": [str(file) for file in new],
        "broken": broken,
    }


def _inside(name: str, words: list[str]) -> int:
    """Hand this process over to libFuzzer; it does not come back."""
    import atheris

    with atheris.instrument_imports(
        include=["foundation", "export", "edge_agent", "coordinator", "tomllib", "bench"]
    ):
        from bench.fuzz_targets import TARGETS
    target = TARGETS[name]
    corpus = Path(words[0])
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *words], lambda data: (target(data), None)[1])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
