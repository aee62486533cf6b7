"""Run a notebook from the shell: cells top to bottom, what they print as it comes, the result as .ipynb and .html."""

from __future__ import annotations

import os
import time
from pathlib import Path


def run_notebook(path: Path, out: Path, *, timeout: int = 3600) -> Path:
    """Execute a notebook in this environment's own Python, in the folder of the caller.

    Args:
        out: where the executed notebook goes, without suffix; ``.ipynb`` and ``.html`` are written.
        timeout: seconds that one cell may take.

    Returns:
        the executed notebook's path. It is written up to the failing cell if one fails.

    Raises:
        ValueError: there is no such notebook.
        RuntimeError: a cell failed; the message holds its error.
    """
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    if not path.is_file():
        raise ValueError(f"run_notebook: expected a notebook, got {str(path)!r}, which does not exist")
    notebook = nbformat.read(path, as_version=4)
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def before(cell, cell_index):
        if cell.cell_type == "code":
            first = next((line for line in cell.source.splitlines() if line.strip()), "")
            print(f"[{time.monotonic() - started:5.0f} s] cell {cell_index}: {first}", flush=True)

    class Telling(NotebookClient):
        """Passes the text that cells print through to the terminal while they run."""

        def process_message(self, message, cell, cell_index):
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                print(message["content"]["text"], end="", flush=True)
            return super().process_message(message, cell, cell_index)

    client = Telling(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        store_widget_state=False,  # code-hosting pages refuse a notebook whose widgets they cannot show
        resources={"metadata": {"path": str(Path.cwd())}},
        on_cell_execute=before,
    )
    # the kernel of this environment, whatever else is registered under that name on this machine
    client.km = client.create_kernel_manager()
    client.km.kernel_spec_manager = KernelSpecManager(ensure_native_kernel=True, allowed_kernelspecs=set())
    if os.name == "posix":
        client.km.transport = "ipc"  # files of this user instead of open TCP ports
    executed = out.with_suffix(".ipynb")
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise RuntimeError(f"run_notebook: {path.name} stopped: {error}") from error
    finally:
        nbformat.write(notebook, executed)
        _write_html(notebook, out.with_suffix(".html"))
    print(f"[{time.monotonic() - started:5.0f} s] done: {executed} and {out.with_suffix('.html')}")
    return executed


def _write_html(notebook, path: Path) -> None:
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter().from_notebook_node(notebook)
    path.write_text(body, encoding="utf-8")
