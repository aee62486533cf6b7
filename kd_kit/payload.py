"""The package as one notebook cell: a wheel, byte for byte the same from the same files, and the code that installs it.

Kaggle uploads one file, so what a notebook imports must lie in it. The wheel leaves out the embedded pair (6 MB, where
a source may have 1 MB): that travels as a data set, which the wheel knows by its hash.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import io
import json
import lzma
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kd_kit.offline import PAIR_FILE, PAIR_RECORD

LINE = 10_000  # characters of a line of the packed cell: pages show hidden cells, and few lines are scrolled over


@dataclass(frozen=True)
class Wheel:
    """A wheel in memory.

    ``version`` is the package's with the start of a hash of its files as the local part, so that ``pip`` tells two
    builds apart; ``kd_kit.__version__`` has no such part.
    """

    version: str
    data: bytes

    @property
    def name(self) -> str:
        return f"kd_kit-{self.version}-py3-none-any.whl"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def build_wheel(root: Path) -> Wheel:
    """The package of a clone as a wheel: Python files only, in order, with fixed dates and permissions, not compressed.

    Args:
        root: the folder with ``setup.cfg`` and ``kd_kit``.

    Raises:
        ValueError: it is no clone of the project, or its embedded pair is not there.
    """
    package, setup = root / "kd_kit", root / "setup.cfg"
    if not all(path.is_file() for path in (setup, root / "LICENSE", package / "__init__.py")):
        raise ValueError(
            f"build_wheel: expected a clone of the project with setup.cfg, LICENSE and kd_kit/, got {str(root)!r}; "
            "use the package of a clone (python -m pip install -e .), or name the clone: root="
        )
    files = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in package.rglob("*.py")
        if not {"assets", "__pycache__"} & set(path.relative_to(package).parts)
    }
    pair = {"file": PAIR_FILE, "sha256": hashlib.sha256(build_pair(root)).hexdigest()}
    files[f"kd_kit/offline/{PAIR_RECORD}"] = (json.dumps(pair) + "\n").encode()
    settings = configparser.ConfigParser()
    settings.read_string(setup.read_text(encoding="utf-8"))
    version, about = settings["metadata"]["version"], (root / "LICENSE").read_bytes()
    content = _zip({**files, "METADATA": _metadata(settings, version), "LICENSE": about})
    version += f"+h{hashlib.sha256(content).hexdigest()[:12]}"

    info = f"kd_kit-{version}.dist-info"
    files[f"{info}/METADATA"] = _metadata(settings, version)
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: kd_kit\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = f"[console_scripts]{_scripts(settings)}\n".encode()
    files[f"{info}/licenses/LICENSE"] = about
    record = [f"{name},sha256={_record_hash(data)},{len(data)}" for name, data in sorted(files.items())]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    return Wheel(version, _zip(files))


def build_pair(root: Path) -> bytes:
    """The embedded teacher, student and texts as one zip, which ``kd_kit.offline`` reads where they are attached.

    Raises:
        ValueError: they do not lie in the package, as in one that was installed from a notebook.
    """
    assets = root / "kd_kit" / "offline" / "assets"
    files = {path.relative_to(assets).as_posix(): path for path in assets.rglob("*") if path.is_file()}
    if "teacher/model.safetensors" not in files:
        raise ValueError(
            f"build_pair: expected the embedded pair in {str(assets)!r}, which is not there; build in a clone of the "
            "project"
        )
    return _zip({name: path.read_bytes() for name, path in files.items()})


def packed_cell(wheel: Wheel) -> str:
    """The source of a cell that installs a wheel without a network, and says so when what it holds was changed.

    Its lines of text are the wheel, compressed (xz) and in base 85, an alphabet without quotes and backslashes.
    """
    packed = base64.b85encode(lzma.compress(wheel.data, preset=9 | lzma.PRESET_EXTREME)).decode()
    lines = "\n".join(packed[i : i + LINE] for i in range(0, len(packed), LINE))
    return INSTALL.format(version=wheel.version, name=wheel.name, digest=wheel.digest, lines=lines)


INSTALL = '''\
# kd_kit {version}: the package itself (a wheel, xz, base 85), so that it installs with internet off, too.
# Made by `python -m kd_kit kaggle build`. The code stands above the text; nothing else of this cell runs.
def install_kd_kit(text):
    import base64, hashlib, importlib, lzma, pathlib, subprocess, sys, tempfile

    name = "{name}"
    digest = "{digest}"
    try:
        wheel = lzma.decompress(base64.b85decode("".join(text.split())))
    except (ValueError, lzma.LZMAError):
        wheel = b""
    if hashlib.sha256(wheel).hexdigest() != digest:
        raise ValueError(
            f"kd_kit: expected the package with SHA-256 {{digest}}, got another: the text of this cell was changed; "
            "build the notebook again and push it"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, name)
        path.write_bytes(wheel)
        flags = ["--no-deps", "--no-index", "--force-reinstall", "--quiet", "--disable-pip-version-check"]
        pip = [sys.executable, "-m", "pip", "install", *flags, str(path)]
        done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"kd_kit: pip could not install {{name}}: {{done.stderr.strip()}}")
    importlib.invalidate_caches()
    if "kd_kit" in sys.modules:
        print("kd_kit was imported before: restart the session to use the one of this notebook")


install_kd_kit("""
{lines}
""")
'''


def _zip(files: Mapping[str, bytes]) -> bytes:
    """A zip that depends on names and contents only: in order, of 1980, for everyone to read, not compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def _metadata(settings: configparser.ConfigParser, version: str) -> bytes:
    """The wheel's METADATA, without the README: what ``pip`` and ``importlib.metadata`` read."""
    about, options = settings["metadata"], settings["options"]
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {about['name']}",
        f"Version: {version}",
        f"Summary: {about['description']}",
        f"License: {about['license']}",
        f"Requires-Python: {options['python_requires']}",
    ]
    needed = (line.strip() for line in options["install_requires"].splitlines())
    lines += [f"Requires-Dist: {line}" for line in needed if line and not line.startswith("#")]
    return "\n".join([*lines, ""]).encode()


def _scripts(settings: configparser.ConfigParser) -> str:
    return settings["options.entry_points"]["console_scripts"].rstrip()


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
