"""A built kernel on Kaggle: push it, ask how it is, fetch what it made, and let its next version go on."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from kd_kit.kaggle_client import KaggleError, KernelStatus, Pushed, ask_client, read_push, read_status
from kd_kit.kernel_build import DATASET_METADATA, OUT, PAIR_SLUG, RECIPE, ROOT, read_recipe
from kd_kit.kernel_metadata import METADATA, read_metadata, validate

FETCHED = Path("build/kaggle-output")
_ABSENT = (403, 404)  # Kaggle says "denied" of what does not exist, too


def push(
    kernel: str,
    owner: str | None = None,
    out: str | Path = OUT,
    *,
    again: bool = False,
    limit: float = 300,
    ready: float = 300,
    root: str | Path = ROOT,
) -> Pushed:
    """Send a built kernel to Kaggle, which starts a session of it.

    Before that it is checked; the data set of the embedded pair is made where the account lacks it; and a kernel that
    has never run loses its own output as a source, which Kaggle would not find. One whose ``build.json`` says
    ``resume`` has it again from its second push on.

    Args:
        kernel: as given to :func:`~kd_kit.kernel_build.build`.
        owner: the account that it must have been built for; not compared by default.
        out: where the built kernel lies.
        again: push although a session of the kernel is running; both cost GPU hours.
        limit: seconds that one answer of Kaggle's may take.
        ready: seconds to wait until a data set that was just made can be attached.

    Raises:
        ValueError: the kernel is not built, built for another account, or would not be taken.
        KaggleError: Kaggle or its client refused; the message says why.
    """
    folder = Path(out) / kernel
    remarks = validate(folder)
    name = _name(folder, owner)
    _provide_pair(folder, name, limit, ready)
    before = _status_if_any(name, limit)
    if before is not None and before.running and not again:
        raise KaggleError(
            f"push: {name} is {before.state}, and another push would start a second session beside it; wait for its "
            f"end (python -m kd_kit kaggle status {kernel}), cancel it at https://www.kaggle.com/code/{name}, or say "
            "--again"
        )
    if before is None:
        _attach_own(folder, attach=False)
        if _goes_on(kernel, Path(root)):
            remarks.append(f"Kaggle shows no earlier session of {name}: this one begins the run")
    elif _goes_on(kernel, Path(root)):
        resume(kernel, out)
    pushed = read_push(name, *ask_client("kernels", "push", "-p", str(folder), limit=limit))
    if any("retired" in remark for remark in pushed.remarks):  # Kaggle says it itself
        remarks = [remark for remark in remarks if "retired" not in remark]
    return replace(pushed, remarks=(*remarks, *pushed.remarks))


def status(kernel: str, owner: str | None = None, out: str | Path = OUT, *, limit: float = 120) -> KernelStatus:
    """How the kernel's last session stands.

    Args:
        kernel: as built, or ``"owner/slug"`` of any.

    Raises:
        ValueError: it is neither built nor is its owner given.
        KaggleError: Kaggle or its client refused.
    """
    name = _address(kernel, owner, out)
    return read_status(name, ask_client("kernels", "status", name, limit=limit)[0])


def fetch(
    kernel: str,
    owner: str | None = None,
    into: str | Path | None = None,
    out: str | Path = OUT,
    *,
    limit: float = 4 * 3600,
) -> Path:
    """The output of the kernel's last session that ended, in a folder, in place of what was fetched before.

    Args:
        into: an empty or new folder; ``build/kaggle-output/SLUG`` by default.

    Raises:
        ValueError: the kernel is neither built nor is its owner given, or ``into`` holds something.
        KaggleError: Kaggle or its client refused, or there is no output.
    """
    name = _address(kernel, owner, out)
    folder = FETCHED / name.split("/")[1] if into is None else Path(into)
    if into is not None and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"fetch: expected an empty folder, got {str(folder)!r} with files in it; name another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # never into an older output: the client compares times across time zones, and leaves what is there no more
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        ask_client("kernels", "output", name, "-p", str(fresh), limit=limit)
        if not any(path.is_file() for path in fresh.rglob("*")):
            older = f"; what lies in {folder} is of an earlier session" if folder.is_dir() else ""
            raise KaggleError(
                f"fetch: {name} has no output yet{older}; it is kept when a session ends normally: "
                f"python -m kd_kit kaggle status {kernel}"
            )
        shutil.rmtree(folder, ignore_errors=True)
        fresh.chmod(0o755)
        fresh.replace(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def resume(kernel: str, out: str | Path = OUT) -> Path:
    """Attach the kernel's own last output to its next version, where the run is found and gone on with.

    Once is enough: it stays when the kernel is built again.

    Returns:
        the kernel's metadata file.

    Raises:
        ValueError: the kernel is not built.
    """
    folder = Path(out) / kernel
    _attach_own(folder, attach=True)
    return folder / METADATA


def _attach_own(folder: Path, *, attach: bool) -> None:
    """Write a kernel's own output into its sources, or out of them."""
    metadata = read_metadata(folder)
    name, before = metadata["id"], metadata.get("kernel_sources", [])
    own = [source for source in before if source == name or source.startswith(f"{name}/")]
    after = [source for source in before if source not in own] + ((own or [name]) if attach else [])
    if sorted(after) != sorted(before):
        metadata["kernel_sources"] = after
        (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _goes_on(kernel: str, root: Path) -> bool:
    return (root / "kaggle" / kernel / RECIPE).is_file() and bool(read_recipe(kernel, root).get("resume"))


def _name(folder: Path, owner: str | None) -> str:
    name = read_metadata(folder)["id"]
    if owner is not None and name.split("/")[0] != owner:
        raise ValueError(
            f"push: expected a kernel that was built for {owner!r}, got {name!r} in {str(folder)!r}; build it again: "
            f"python -m kd_kit kaggle build {folder.name} --owner {owner}"
        )
    return name


def _address(kernel: str, owner: str | None, out: str | Path) -> str:
    """``"owner/slug"`` of a kernel that is named by it, by slug and owner, or by its built folder."""
    if "/" in kernel:
        return kernel
    return f"{owner}/{kernel}" if owner is not None else _name(Path(out) / kernel, None)


def _status_if_any(name: str, limit: float) -> KernelStatus | None:
    """None for a kernel that was never pushed."""
    try:
        return status(name, limit=limit)
    except KaggleError as error:
        if error.status in _ABSENT:
            return None
        raise


def _provide_pair(folder: Path, name: str, limit: float, ready: float) -> None:
    """The data set of the embedded pair, if the kernel attaches the one of its own account and there is none."""
    pair = f"{name.split('/')[0]}/{PAIR_SLUG}"
    if pair not in read_metadata(folder).get("dataset_sources", []):
        return
    state = _dataset_state(pair, limit)
    if state is None:
        made = folder.parent / PAIR_SLUG
        about = made / DATASET_METADATA
        if not about.is_file() or json.loads(about.read_text(encoding="utf-8"))["id"] != pair:
            raise ValueError(f"push: expected the data set {pair} in {str(made)!r}, got none; build the kernel again")
        output, _ = ask_client("datasets", "create", "-p", str(made), limit=limit)
        if refused := re.search(r"Dataset creation error: (.*)", output):
            raise KaggleError(f"Kaggle refused to make the data set {pair}: {refused[1]}")
        if "is being created" not in output:
            raise KaggleError(f"the answer to making the data set {pair} is none that is known: {output}")
        state = _dataset_state(pair, limit)
    until = time.monotonic() + ready
    while state != "ready":
        if state in ("failed", "deleted") or time.monotonic() > until:
            raise KaggleError(
                f"push: the data set {pair} is {state or 'not there'}; look at https://www.kaggle.com/datasets/{pair}, "
                "then push again"
            )
        time.sleep(5)
        state = _dataset_state(pair, limit)


def _dataset_state(name: str, limit: float) -> str | None:
    """``"ready"`` or what comes before it; None if there is no such data set, or none that may be read."""
    try:
        output, _ = ask_client("datasets", "status", name, limit=limit)
    except KaggleError as error:
        if error.status in _ABSENT:
            return None
        raise
    return output.splitlines()[-1].strip().lower() if output else None
