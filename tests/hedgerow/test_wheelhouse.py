"""`hedgerow wheelhouse`: pip itself, against a folder of made-up wheels."""

from __future__ import annotations

import json
import platform
import subprocess
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foundation.errors import SettingsError
from hedgerow.cli import app
from hedgerow.wheelhouse import Target, requirements_of


def wheel(folder: Path, name: str, version: str, tag: str, *lines: str) -> Path:
    """A wheel with metadata and nothing in it."""
    path, info = folder / f"{name}-{version}-{tag}.whl", f"{name}-{version}.dist-info"
    metadata = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""])
    about = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", about)
        archive.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Hedgerow's wheel, and an index as a folder: numpy for both, torch for x86-64 alone."""
    index = tmp_path / "index"
    index.mkdir()
    for machine in ("aarch64", "x86_64"):
        wheel(index, "numpy", "2.0", f"cp311-cp311-manylinux_2_28_{machine}")
    wheel(index, "torch", "2.9", "cp311-cp311-manylinux_2_28_x86_64")
    wheel(index, "words", "1.0", "py3-none-any")
    lines = ["Requires-Dist: numpy>=1.26"]
    for extra, needs in (("export", "words"), ("train", "torch>=2.4"), ("demo", "hedgerow[export]")):
        lines += [f"Provides-Extra: {extra}", f'Requires-Dist: {needs}; extra == "{extra}"']
    return wheel(tmp_path, "hedgerow", "0.1.0", "py3-none-any", *lines)


def asked(own: Path, out: Path, *words: str) -> tuple[int, str, str]:
    told = [
        "wheelhouse",
        "-o",
        str(out),
        "--wheel",
        str(own),
        "--no-index",
        "--find-links",
        str(own.parent / "index"),
    ]
    (own.parent / "none.txt").write_text("")
    told += ["--python", "3.11", "--constraints", str(own.parent / "none.txt"), *words]
    done = CliRunner().invoke(app, told)
    return done.exit_code, done.stdout, done.stderr


def test_everything_for_the_board_is_in_the_folder(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "wheels"
    code, said, _ = asked(own, out, "--platform", "aarch64", "--extra", "export", "--json")
    assert code == 0, said
    told = json.loads(said)
    assert told["wheels"] == [
        "hedgerow-0.1.0-py3-none-any.whl", "numpy-2.0-cp311-cp311-manylinux_2_28_aarch64.whl",
        "words-1.0-py3-none-any.whl",
    ]  # fmt: skip
    assert (out / "constraints.txt").read_text() == "hedgerow==0.1.0\nnumpy==2.0\nwords==1.0\n"
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=out, capture_output=True, check=False)
    assert checked.returncode == 0
    script = (out / "install.sh").read_text()
    assert '"hedgerow[export]"' in script
    assert subprocess.run(["sh", "-n", out / "install.sh"], check=False).returncode == 0
    if platform.machine() != "aarch64":
        done = subprocess.run(["sh", out / "install.sh"], capture_output=True, text=True, check=False)
        assert (done.returncode, "these wheels are for aarch64" in done.stdout) == (2, True)


def test_what_has_no_wheel_is_named(own: Path, tmp_path: Path) -> None:
    code, _, said = asked(own, tmp_path / "wheels", "--platform", "aarch64", "--extra", "train")
    assert code == 1
    assert "no wheel for Python 3.11 on aarch64 with glibc 2.31: torch>=2.4. Leave out" in said


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--platform", "armv7l"], "aarch64 or x86_64"),
        (["--python", "3.8"], "3.11 or newer"),
        (["--glibc", "musl"], "2.17 or newer"),
        (["--extra", "trian"], "no extra called trian"),
        (["--wheel", "/nowhere/hedgerow.whl"], "is no wheel of Hedgerow"),
    ],
)
def test_wrong_wishes_are_said_at_once(own: Path, tmp_path: Path, words: list[str], why: str) -> None:
    code, _, said = asked(own, tmp_path / "wheels", *words)
    assert (code, why in said) == (2, True), said


def test_a_folder_with_something_in_it_stays_as_it_is(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "wheels"
    out.mkdir()
    (out / "mine").write_text("")
    code, _, said = asked(own, out)
    assert (code, "not empty" in said) == (2, True)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_extras_of_extras_are_followed(own: Path) -> None:
    assert requirements_of(own, ["train", "demo"]) == ["numpy>=1.26", "torch>=2.4", "words"]
    assert requirements_of(own, []) == ["numpy>=1.26"]


def test_tags_go_down_from_the_boards_c_library() -> None:
    told = Target("aarch64", "3.12", "2.28").options()
    platforms = [told[i + 1] for i, word in enumerate(told) if word == "--platform"]
    assert platforms[0] == "manylinux_2_28_aarch64"
    assert platforms[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    assert [told[i + 1] for i, word in enumerate(told) if word == "--abi"] == ["cp312", "abi3", "none"]
    with pytest.raises(SettingsError):
        Target("aarch64", "2.7").options()
