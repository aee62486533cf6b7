"""``python -m kd_kit kaggle build|validate|push|status|fetch|resume|plan``."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

from kd_kit.kaggle_io import build, fetch, plan, push, resume, status, validate
from kd_kit.kernel_build import OUT
from kd_kit.kernel_plan import HOURS, LEAD, QUOTA


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the verb ``kaggle``."""
    verbs = parser.add_subparsers(dest="do", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=text, description=text)
        found.add_argument("kernel", help="a folder of kaggle/, such as distill-p100")
        found.add_argument("--out", type=Path, default=OUT, help="where built kernels lie (%(default)s)")
        return found

    made = verb("build", "the kernel as a folder that Kaggle's client can push")
    made.add_argument("--owner", required=True, help="your Kaggle account")
    made.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the notebook; repeatable"
    )
    made.add_argument("--dataset", action="append", default=[], metavar="OWNER/SLUG", help="attach it; repeatable")
    made.add_argument(
        "--kernel", action="append", default=[], metavar="OWNER/SLUG", help="attach its output", dest="of"
    )
    made.add_argument("--model", action="append", default=[], metavar="OWNER/MODEL/FRAMEWORK/VARIATION/VERSION")

    verb("validate", "check a built kernel without sending anything")

    sent = verb("push", "send a built kernel to Kaggle, which starts a session")
    sent.add_argument("--owner", help="the account that it must have been built for")
    sent.add_argument("--again", action="store_true", help="although a session of it is running")
    sent.add_argument("--limit", type=float, default=300, help="seconds that one answer may take (%(default)g)")

    asked = verb("status", "how its last session stands; the exit status is 1 for one that failed")
    asked.add_argument("--owner", help="the account, for a kernel that is not built here")

    got = verb("fetch", "load the output of its last session")
    got.add_argument("--owner", help="the account, for a kernel that is not built here")
    got.add_argument("--into", type=Path, help="the folder for it (build/kaggle-output/KERNEL)")

    verb("resume", "attach the kernel's own last output to its next version")

    left = verbs.add_parser("plan", help="how many sessions and weeks a run still needs")
    left.add_argument("folder", type=Path, help="a run folder, or one above it, as fetch makes it")
    left.add_argument("--run", help="its name, where there are several")
    left.add_argument("--hours", type=float, default=HOURS, help="of a session (%(default)g)")
    left.add_argument("--quota", type=float, default=QUOTA, help="GPU hours of a week (%(default)g)")
    left.add_argument("--lead", type=float, default=LEAD, help="seconds of a session that do not train (%(default)g)")


def run(given: argparse.Namespace) -> int:
    """Do what was asked; the exit status.

    Raises:
        ValueError, RuntimeError: with a sentence that says what is wrong and what to do.
    """
    if given.do == "build":
        sources = {"datasets": given.dataset, "kernels": given.of, "models": given.model}
        folder = build(given.kernel, given.owner, given.out, parameters(given.set), **sources)
        _say(*validate(folder))
        print(f"{folder}: built; push it: python -m kd_kit kaggle push {given.kernel}")
        print(f"(or kaggle kernels push -p {folder}, which checks less and makes no data set)")
    elif given.do == "validate":
        _say(*validate(given.out / given.kernel))
        print(f"{given.out / given.kernel}: Kaggle would take it")
    elif given.do == "push":
        print(push(given.kernel, given.owner, given.out, again=given.again, limit=given.limit))
        print(f"how it stands: python -m kd_kit kaggle status {given.kernel}")
    elif given.do == "status":
        found = status(given.kernel, given.owner, given.out)
        print(found)
        return 1 if found.state == "ERROR" else 0
    elif given.do == "fetch":
        folder = fetch(given.kernel, given.owner, given.into, given.out)
        print(f"{folder}: {sum(path.is_file() for path in folder.rglob('*')):,} files")
        if (folder / "summary.txt").is_file():
            print((folder / "summary.txt").read_text(encoding="utf-8").rstrip())
    elif given.do == "resume":
        print(f"{resume(given.kernel, given.out)}: the next version finds the last one's output; push the kernel")
    else:
        print(plan(given.folder, given.run, hours=given.hours, quota=given.quota, lead=given.lead))
    return 0


def parameters(pairs: list[str]) -> dict[str, Any]:
    """Values of ``NAME=VALUE``: Python's own notation where it is that, text elsewhere.

    Example:
        >>> parameters(["HOURS=8.5", "TEACHER=Qwen/Qwen3-0.6B", "CONTROL=False"])
        {'HOURS': 8.5, 'TEACHER': 'Qwen/Qwen3-0.6B', 'CONTROL': False}
    """
    found = {}
    for pair in pairs:
        name, is_there, value = pair.partition("=")
        if not is_there or not name.isidentifier():
            raise ValueError(
                f"build: expected --set NAME=VALUE, got {pair!r}; write the parameter's name and its value"
            )
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _say(*remarks: str) -> None:
    for remark in remarks:
        print(remark)
