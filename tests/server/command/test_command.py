"""`slsnet`: its subcommands, its package, and the requirements that both are made of."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from server import VERSION
from server.command import COMMANDS, main
from tests.support import ROOT


@pytest.mark.parametrize("name", COMMANDS)
def test_each_subcommand_teaches_under_its_own_name(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["slsnet"])
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(f"usage: slsnet {name} ")


def test_what_there_is_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said and command.summary in said for name, command in COMMANDS.items())
    with pytest.raises(SystemExit) as ended:
        main(["diagnose"])
    assert ended.value.code == 2
    assert "diagnose" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"{VERSION}\n"


def test_it_runs_from_a_clone_that_is_not_installed() -> None:
    asked = [sys.executable, "-m", "server.command", "segment", "--help"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: slsnet segment")


def test_ctrl_c_is_told_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["slsnet"])
    monkeypatch.setattr("server.keys.main", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["keys"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_extras_are_the_requirement_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, pins in project["optional-dependencies"].items():
        lines = (ROOT / f"requirements-{name}.txt").read_text().splitlines()
        assert pins == [line.split("  #")[0] for line in lines if line[:1].isalpha()], name


def test_the_package_segments_without_the_repository(tmp_path: Path) -> None:
    """Built as `pip install .` builds it, with the dependencies that are here."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    where = ["--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    # A copy, so that nothing is left in the tree; only what is committed or about to be.
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git, and a clone")
    for name in files.decode().split("\0"):
        part = name.partition("/")[0]
        if (
            part in ("common", "engines", "model", "photos", "server", "trt_build")
            or "/" not in name
        ):
            source, target = ROOT / name, tmp_path / "tree" / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
    subprocess.run([*pip, "install", *where, str(tmp_path / "tree")], check=True)
    # A wheel of it has to install elsewhere: nothing that it needs lies on this machine alone.
    (metadata,) = (tmp_path / "site").glob("slsnet_server-*.dist-info/METADATA")
    needed = [line for line in metadata.read_text().splitlines() if "Requires-Dist" in line]
    assert any("onnxruntime==" in line for line in needed)
    assert not [line for line in needed if "file:" in line]
    run = "import sys; from server.command import main; sys.exit(main())"
    photo, out = str(ROOT / "docs/lesion.jpg"), str(tmp_path / "masks")
    done = subprocess.run(
        [sys.executable, "-c", run, "segment", photo, "-o", out],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lesion on 2" in done.stdout
    assert (tmp_path / "masks/lesion_mask.png").stat().st_size > 100
