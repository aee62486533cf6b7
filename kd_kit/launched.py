"""What :func:`kd_kit.launch` starts in every process: reads the function, runs it, and leaves word of how it ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

from kd_kit.processes import ProcessLost


def main(folder: Path) -> int:
    """Run what lies in the folder. Returns the exit status."""
    import dill

    rank = int(os.environ.get("RANK", "0"))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    output = os.open(folder / f"process-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(output, stream.fileno())
        stream.reconfigure(line_buffering=True, encoding="utf-8", errors="replace")
    threading.Thread(target=_end_with_the_notebook, name="kd_kit launch", daemon=True).start()
    try:
        fn, args = dill.loads((folder / "call").read_bytes())
        fn(*args)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # in order, and not while the interpreter is taken down
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (0, None):
            (folder / f"done-{rank}").touch()
            return 0
        traceback.print_exc()
        about = {
            "type": type(error).__name__,
            "text": str(error),
            "time": time.time(),
            "lost": isinstance(error, ProcessLost),
        }
        beside = folder / f".error-{rank}"
        beside.write_text(json.dumps(about))
        beside.replace(folder / f"error-{rank}")
        return 1
    (folder / f"done-{rank}").touch()
    return 0


def _end_with_the_notebook() -> None:
    """The other end of the standard input is the notebook's: where that closes, finish the step and save."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
