"""What this session is: machine, precision, folder, clock. A session may end at any time; a run is its folder."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from kd_kit.cards import profile_for
from kd_kit.kaggle_place import kaggle_input, kaggle_working, on_kaggle
from kd_kit.mirror_places import open_place
from kd_kit.processes import join, own_device, refuse_sharding, waiting
from kd_kit.torch_builds import cure_for_kernels, kernels_for, missing_kernels

PRECISIONS = ("no", "fp16", "bf16")
"""What the student may be computed in, the oldest cards first."""

KAGGLE_HOURS = 11.0
"""Kaggle kills a GPU session after 12 hours and drops its output: stop an hour before."""


def shown(path: Path) -> Path:
    """A path as people read it: from the working directory where it lies below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def process_age() -> float:
    """Seconds since this process started, so that the clock also counts what ran before it was built."""
    try:
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(uptime - started / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError):  # not Linux: count from here
        return 0.0


def default_precision(device: torch.device) -> str:
    """``"bf16"`` where the card computes in it (capability 8.0), ``"fp16"`` on older cards from 6.0, else ``"no"``.

    ``torch.cuda.is_bf16_supported()`` is no guide: it counts emulation, which a T4 or P100 would crawl in.
    """
    return profile_for(torch.cuda.get_device_capability(device) if device.type == "cuda" else None).precision


def check_kernels(device: torch.device) -> None:
    """Raise before any work on a card that the torch that is installed has no kernels for.

    Raises:
        ValueError: it has none; with what to install.
    """
    if device.type != "cuda":
        return
    capability, held = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if kernels_for(capability, held) is None:
        card = torch.cuda.get_device_name(device)
        raise ValueError(
            f"build_session: expected a torch with kernels for this card, got: "
            f"{missing_kernels(card, capability, held, torch.__version__)}; "
            f"{cure_for_kernels(capability, torch.__version__)}"
        )


class Session:
    """Machine, precision, run folder and clock of this session. Made by :func:`build_session`.

    Attributes:
        folder: where the run keeps its history, checkpoints and figures.
        device: where the student trains.
        precision: "no", "fp16" or "bf16".
        budget: seconds this session may last, counted from the start of the process; None for no limit.
        name: of the run.
        mirror: address that the newest checkpoint is copied to; None for no copies.
        resume_from: where the user says that the run is to be gone on from. inputs: folders that are looked through
            for it, too.
        lone: the run is in its folder and nowhere else, and is not looked for.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device,
        precision: str,
        budget: float | None = None,
        clock=time.monotonic,
        name: str | None = None,
        mirror: str | None = None,
        resume_from: Path | None = None,
        inputs: tuple[Path, ...] = (),
        lone: bool = False,
    ):
        self.folder = folder
        self.name = name or folder.name
        self.mirror = mirror
        self.resume_from = resume_from
        self.inputs = inputs
        self.lone = lone
        self.device = torch.device(device)
        self.precision = precision
        self.budget = budget
        self._clock = clock
        self._started = clock() - process_age()

    def engine(self):
        """A new Accelerator with this session's device and precision.

        Every trainer has its own: an Accelerator holds on to all that it prepared and to one gradient scaler.

        Raises:
            ValueError: accelerate is set up to cut the student into pieces.
        """
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        # accelerate keeps one state per process and refuses another precision: a cell that chose one may run again
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != self.precision:
            AcceleratorState._reset_state()
        refuse_sharding()
        accelerator = Accelerator(
            mixed_precision=self.precision, cpu=self.device.type == "cpu", kwargs_handlers=[waiting()]
        )
        refuse_sharding(accelerator.distributed_type)
        return accelerator

    def within(self, name: str, *, lasting: bool = False) -> Session:
        """A session for a run inside this one's folder, on the same machine and clock.

        Args:
            lasting: it is copied to the mirror and looked for as this one is.
        """
        inner = Session(
            self.folder / name,
            device=self.device,
            precision=self.precision,
            budget=self.budget,
            clock=self._clock,
            name=f"{self.name}/{name}",
            mirror=self.mirror if lasting else None,
            inputs=self.inputs if lasting else (),
            lone=not lasting,
        )
        inner._started = self._started
        return inner

    def now(self) -> float:
        """Seconds on this session's clock, from some moment on; for differences."""
        return self._clock()

    def elapsed(self) -> float:
        """Seconds since the process started."""
        return self._clock() - self._started

    def remaining(self) -> float:
        """Seconds left of the budget; infinity without one."""
        return float("inf") if self.budget is None else self.budget - self.elapsed()

    @property
    def machine(self) -> str:
        """The device's kind and memory, the same in every session on such a one."""
        if self.device.type == "cuda":
            card = torch.cuda.get_device_properties(self.device)
            return f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
        return f"{self.device.type}, {platform.machine()}"

    def place(self):
        """Where the run's copies are, see :func:`kd_kit.mirror_places.open_place`; None without a mirror."""
        return None if self.mirror is None else open_place(self.mirror, self.name)

    def __repr__(self) -> str:
        if self.device.type == "cuda":
            card = torch.cuda.get_device_properties(self.device)
            machine = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, capability {card.major}.{card.minor}"
        else:
            machine = f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads used"
        where = "Kaggle" if on_kaggle() else platform.system()
        precision = {"no": "float32", "fp16": "float16 autocast with loss scaling", "bf16": "bfloat16 autocast"}
        free = shutil.disk_usage(self.folder).free / 2**30
        clock = (
            "no limit"
            if self.budget is None
            else f"{self.budget / 3600:.1f} h, of which {self.elapsed() / 60:.0f} min are gone"
        )
        found = sorted((self.folder / "ckpt").glob("step-*")) if (self.folder / "ckpt").is_dir() else []
        state = f"holds checkpoints up to {found[-1].name}: fit() goes on from there" if found else "new"
        return (
            f"machine    {machine} ({where})\n"
            f"precision  {precision.get(self.precision, self.precision)}\n"
            f"folder     {shown(self.folder)} ({state}; {free:.0f} GiB free)\n"
            f"clock      {clock}\n"
            + ("" if self.mirror is None else f"mirror     {self.mirror}\n")
            + f"versions   python {platform.python_version()}, torch {torch.__version__}, "
            + ", ".join(f"{n} {v}" for n, v in _versions(("transformers", "accelerate", "datasets")).items())
        )


def _versions(packages) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for package in packages:
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    return out


def build_session(
    run: str = "run",
    *,
    hours: float | None = None,
    folder: str | os.PathLike | None = None,
    precision: str | None = None,
    mirror: str | os.PathLike | None = None,
    resume_from: str | os.PathLike | None = None,
) -> Session:
    """Look at the machine, choose precision and run folder, start the clock. Safe to call again in the same process.

    Of several processes (``accelerate launch --num_processes 2 script.py``) each gets its card; the run folder, the
    mirror and the clock are those of the first one.

    Args:
        run: name of the run; running the notebook again with the same name goes on with it.
        hours: of this session, from the start of the process; ``fit`` stops in time to save. Left out: 11 on Kaggle,
            no limit elsewhere.
        folder: where runs are kept; ``kd_runs`` here, or below /kaggle/working.
        precision: "no", "fp16" or "bf16"; chosen by the card if left out.
        mirror: where the newest checkpoint is copied to while the run trains, for machines that are lost with all
            their files: ``"hf://datasets/me/my-run"`` (a private repository of the Hugging Face hub; token in
            HF_TOKEN, also as a Kaggle Secret), ``"kaggle://me/my-run"`` (a private Kaggle data set), a folder, or any
            address of fsspec. A new session looks there, too.
        resume_from: a run folder, a checkpoint, or a folder above one, to go on from. Left out: the run folder, then
            everything below /kaggle/input, then the mirror; the checkpoint of the highest step wins.

    Raises:
        ValueError: hours that are not positive, an unknown precision, a folder that cannot be written, a path that
            does not exist, a mirror that cannot be used, a card that this torch has no kernels for, or an accelerate
            that is set up to cut models into pieces.
    """
    if hours is not None and not hours > 0:
        raise ValueError(f"build_session: expected hours above 0, got {hours}")
    if hours is None and on_kaggle():
        hours = KAGGLE_HOURS
    root = Path(folder) if folder is not None else (kaggle_working() if on_kaggle() else Path.cwd()) / "kd_runs"
    path = root / run
    check_writable(path)
    if resume_from is not None and not Path(resume_from).is_dir():
        raise ValueError(
            f"build_session: expected resume_from= as a folder that exists, got {str(resume_from)!r}; pass a run "
            "folder, a checkpoint, or a folder above one"
        )
    processes = join(cpu=not torch.cuda.is_available())
    device = own_device()
    check_kernels(device)
    chosen = precision or default_precision(device)
    if chosen not in PRECISIONS:
        raise ValueError(f"build_session: expected precision 'no', 'fp16' or 'bf16', got {precision!r}")
    chosen = min(processes.gather(chosen), key=PRECISIONS.index)  # what every card of the run computes in
    session = Session(
        path,
        device=device,
        precision=chosen,
        budget=None if hours is None else hours * 3600,
        name=run,
        mirror=None if mirror is None else os.fspath(mirror),
        resume_from=None if resume_from is None else Path(resume_from),
        inputs=(kaggle_input(),) if kaggle_input().is_dir() else (),
    )
    if processes.leads:
        session.place()  # what cannot be reached shows now
    session.engine()  # what accelerate cannot do on this machine shows now
    return session


def check_writable(folder: Path) -> None:
    """Raise before any long work if ``folder`` cannot be made or written.

    Raises:
        ValueError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"build_session: expected a run folder that can be written, got {str(folder)!r} "
            f"({type(error).__name__}: {error.strerror}); pass folder= with a place of your own"
        ) from error


class StopRequests:
    """Turns Interrupt (the notebook's stop button) and SIGTERM into a wish that the loop reads between two steps.

    A second Interrupt acts at once, as Python does it. Outside the main thread signals are left alone.

    Args:
        quiet: say nothing; of several processes one does.
    """

    def __init__(self, *, quiet: bool = False):
        self.reason: str | None = None
        self._quiet = quiet
        self._before: dict[int, object] = {}

    def _handle(self, number, frame):
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = "interrupted" if number == signal.SIGINT else "terminated"
        if not self._quiet:
            print(f"\n{self.reason}: finishing the step and saving", file=sys.stderr)

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
