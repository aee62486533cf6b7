"""The package in a notebook cell: the same bytes from the same files, and an installation that needs no network."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

import kd_kit
from kd_kit.offline import PAIR_FILE, PAIR_RECORD
from kd_kit.payload import LINE, build_pair, build_wheel, packed_cell

ROOT = Path(__file__).parent.parent


def copied(source: Path, folder: Path) -> Path:
    """What a build reads, elsewhere."""
    shutil.copytree(source / "kd_kit", folder / "kd_kit", copy_function=shutil.copyfile)
    for name in ("setup.cfg", "LICENSE"):
        shutil.copyfile(source / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project as it is now: an edit while the tests run would be another package."""
    return copied(ROOT, tmp_path_factory.mktemp("clone") / "project")


@pytest.fixture(scope="module")
def wheel(clone):
    return build_wheel(clone)


@pytest.fixture(scope="module")
def cell(wheel):
    return packed_cell(wheel)


@pytest.fixture(scope="module")
def pair(clone):
    return build_pair(clone)


def test_the_wheel_holds_every_python_file_and_nothing_else(clone, wheel):
    with zipfile.ZipFile(io.BytesIO(wheel.data)) as archive:
        names = archive.namelist()
        files = {name: archive.read(name) for name in names}
        entries = archive.infolist()
    sources = {
        path.relative_to(clone).as_posix(): path
        for path in (clone / "kd_kit").rglob("*")
        if path.is_file() and not {"__pycache__", "assets"} & set(path.parts)
    }
    info = f"kd_kit-{wheel.version}.dist-info"
    made = [f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")]
    made.append(f"kd_kit/offline/{PAIR_RECORD}")
    assert sorted(names) == sorted([*sources, *made]), "a file of another kind? the wheel takes *.py only"
    assert names == sorted(names)
    assert all(files[name] == path.read_bytes() for name, path in sources.items())
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {(entry.external_attr >> 16, entry.compress_type) for entry in entries} == {(0o100644, zipfile.ZIP_STORED)}


def test_the_wheel_describes_itself(wheel, pair):
    info = f"kd_kit-{wheel.version}.dist-info"
    with zipfile.ZipFile(io.BytesIO(wheel.data)) as archive:
        about = BytesParser().parsebytes(archive.read(f"{info}/METADATA"))
        rows = list(csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode())))
        for name, digest, size in rows:
            if name != f"{info}/RECORD":
                data = archive.read(name)
                found = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
                assert (digest, size) == (f"sha256={found}", str(len(data))), name
        assert {row[0] for row in rows} == set(archive.namelist())
        record = json.loads(archive.read(f"kd_kit/offline/{PAIR_RECORD}"))
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert (about["Name"], about["Version"], about["Requires-Python"]) == ("kd_kit", wheel.version, ">=3.11")
    assert re.fullmatch(rf"{re.escape(kd_kit.__version__)}\+h[0-9a-f]{{12}}", wheel.version)
    assert "torch>=2.6" in about.get_all("Requires-Dist") and "pillow>=9.1" in about.get_all("Requires-Dist")
    assert scripts.split("\n") == ["[console_scripts]", "kd_kit = kd_kit.__main__:main", ""]
    assert record == {"file": PAIR_FILE, "sha256": hashlib.sha256(pair).hexdigest()}


def test_the_same_files_give_the_same_bytes(clone, wheel, cell, pair, tmp_path):
    """In another folder, with other dates and permissions, and with what a used clone has lying about."""
    elsewhere = copied(clone, tmp_path / "elsewhere")
    (elsewhere / "kd_kit" / "notes.txt").write_text("mine")
    (elsewhere / "kd_kit" / "__pycache__").mkdir(exist_ok=True)
    (elsewhere / "kd_kit" / "__pycache__" / "x.py").write_text("1")
    for path in elsewhere.rglob("*.py"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    assert build_wheel(elsewhere) == wheel and build_pair(elsewhere) == pair
    assert packed_cell(build_wheel(elsewhere)) == cell
    with (elsewhere / "kd_kit" / "align.py").open("a") as file:
        file.write("# changed\n")
    other = build_wheel(elsewhere)
    assert other.version != wheel.version and other.digest != wheel.digest


OTHERS = [f"python3.{minor}" for minor in (11, 12, 13) if minor != sys.version_info[1]]


@pytest.mark.parametrize("python", OTHERS)
def test_another_python_gives_the_same_bytes(python, clone, wheel, cell, pair):
    code = f"""
import hashlib, sys, types
from pathlib import Path
package = types.ModuleType("kd_kit")       # without what its __init__ imports: torch is not needed here
package.__path__ = [{str(clone / "kd_kit")!r}]
sys.modules["kd_kit"] = package
from kd_kit.payload import build_pair, build_wheel, packed_cell
made = build_wheel(Path({str(clone)!r}))
for data in (made.data, build_pair(Path({str(clone)!r})), packed_cell(made).encode()):
    print(hashlib.sha256(data).hexdigest())
"""
    found = shutil.which(python)
    if found is None or subprocess.run([found, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"there is no {python}")
    done = subprocess.run([found, "-B", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [hashlib.sha256(data).hexdigest() for data in (wheel.data, pair, cell.encode())]
    assert done.stdout.split() == expected


def test_what_is_no_clone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="build_wheel: expected a clone of the project"):
        build_wheel(tmp_path)
    with pytest.raises(ValueError, match="build_pair: expected the embedded pair"):
        build_pair(tmp_path)


def payload(cell: str) -> str:
    return cell.split('"""')[1]


def test_the_cell_says_what_it_is_and_holds_the_wheel(wheel, cell):
    first, *lines = cell.splitlines()
    assert first.startswith(f"# kd_kit {wheel.version}: the package itself")
    text = payload(cell).split()
    assert lzma.decompress(base64.b85decode("".join(text))) == wheel.data
    assert {len(line) for line in text[:-1]} == {LINE} and len(cell) < 500_000
    code = cell.replace(payload(cell), "\n")
    assert len(code.splitlines()) < 45 and max(map(len, code.splitlines())) <= 120, "plain and short enough to read"
    compile(cell, "cell", "exec")
    assert not set("'\"\\") & set(payload(cell)), "nothing that Python or JSON would escape"
    assert lines


def run_cell(cell: str, target: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PIP_TARGET": str(target), "PIP_NO_INDEX": "", "http_proxy": "http://127.0.0.1:9"}
    program = [sys.executable, "-"]
    return subprocess.run(program, input=cell, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(cell, tmp_path_factory):
    """The package as the cell installs it, into a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    done = run_cell(cell, target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return target


def test_the_cell_installs_the_package(clone, installed, wheel):
    info = installed / f"kd_kit-{wheel.version}.dist-info"
    assert (info / "METADATA").is_file() and not (installed / "kd_kit" / "offline" / "assets").exists()
    source = clone / "kd_kit" / "trainer.py"
    assert (installed / "kd_kit" / "trainer.py").read_bytes() == source.read_bytes()


def test_the_installed_package_finds_the_attached_pair(installed, wheel, pair, tmp_path):
    """Without it a sentence, with another one a sentence, and with the right one the texts and the models' folders."""
    code = """
import json, sys
from importlib.metadata import version
from pathlib import Path
import kd_kit
from kd_kit.offline import STUDENT, TEACHER, asset_folder, corpus
def said(action):
    try:
        return action()
    except ValueError as error:
        return str(error)
found = {"file": kd_kit.__file__, "version": version("kd_kit"), "plain": kd_kit.__version__}
found["none"] = said(lambda: corpus("held_out"))
attached = Path(sys.argv[1], "input", "datasets", "ada", "kd-kit-embedded-pair")
attached.mkdir(parents=True)
pair = Path(sys.argv[2]).read_bytes()
(attached / "embedded_pair.whl").write_bytes(pair + b"x")
found["other"] = said(lambda: corpus("held_out"))
(attached / "embedded_pair.whl").write_bytes(pair)
found["chapters"], found["again"] = len(corpus("held_out")), corpus("held_out")[0][:12]
found["files"] = [sorted(p.name for p in asset_folder(name).iterdir()) for name in (TEACHER, STUDENT)]
found["temporary"] = sorted(p.name for p in Path(sys.argv[3]).iterdir())
print(json.dumps(found))
"""
    (tmp_path / "pair").write_bytes(pair)
    (tmp_path / "tmp").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "KD_KIT_KAGGLE": str(tmp_path / "kaggle"),
        "TMPDIR": str(tmp_path / "tmp"),
    }
    arguments = [sys.executable, "-c", code, str(tmp_path / "kaggle"), str(tmp_path / "pair"), str(tmp_path / "tmp")]
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["file"]).is_relative_to(installed)
    assert (found["version"], found["plain"]) == (wheel.version, kd_kit.__version__)
    assert "expected the embedded pair (embedded_pair.whl) in an attached data set" in found["none"]
    assert "--dataset OWNER/kd-kit-embedded-pair" in found["none"]
    digest = hashlib.sha256(pair).hexdigest()
    assert f"expected an embedded pair with SHA-256 {digest}, got" in found["other"]
    assert (found["chapters"], found["again"]) == (24, "Sir Walter E")
    assert "model.safetensors" in found["files"][0] and "config.json" in found["files"][1]
    assert found["temporary"] == [f"kd_kit-embedded-pair-{digest[:16]}"], "one folder, and nothing half done"


@pytest.mark.parametrize("change", ["letter", "cut", "nonsense"])
def test_a_changed_cell_stops_with_a_sentence(wheel, cell, tmp_path, change):
    text = payload(cell)
    middle = len(text) // 2
    letter = "a" if text[middle] != "a" else "b"
    changed = {
        "letter": text[:middle] + letter + text[middle + 1 :],
        "cut": text[:middle] + "\n",
        "nonsense": "\n\u00e9\n",
    }[change]
    done = run_cell(cell.replace(text, changed), tmp_path / "site")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: kd_kit: expected the package with SHA-256 {wheel.digest}, got another")
    assert "build the notebook again" in last
    assert not (tmp_path / "site").exists()


def test_a_failing_pip_is_quoted(wheel, cell, tmp_path):
    (tmp_path / "site").write_text("no folder")
    done = run_cell(cell, tmp_path / "site")
    last = [line for line in done.stderr.splitlines() if line.startswith("RuntimeError: ")]
    assert done.returncode == 1 and len(last) == 1
    assert f"pip could not install {wheel.name}:" in last[0] and len(last[0]) > 100
