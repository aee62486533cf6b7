"""The README.md of an exported student: what it is, what it learnt from, how, how good it is, and what it is not."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from kd_kit.data import WindowSet
from kd_kit.report import Report
from kd_kit.speed import machine_words
from kd_kit.table import plain, span

_PACKAGES = ("kd_kit", "torch", "transformers", "accelerate", "tokenizers")


def model_card(
    trainer, report: Report | None = None, *, teacher: str, student: str, text: str, picture: str | None = None
) -> str:
    """A model card in Markdown, with the hub's header: data, recipe, versions, figures, limits.

    Args:
        trainer: of the run that the student comes from.
        report: of :func:`kd_kit.evaluate`; without it the card gives the run's own evaluations.
        teacher, student, text: their names, as people would look for them.
        picture: the file beside it that shows the report, if there is one.
    """
    taught = trainer.teacher is not None
    named = student.count("/") == 1 and not student.startswith(("/", "."))
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [knowledge-distillation]"]
    if named:
        header += [f"base_model: {student}"]
    what = (
        f"A causal language model that learnt from {text} and from what {teacher} says about it, made with kd_kit. "
        "The two models were compared where their tokens stand at the same byte of the text, or where the teacher's "
        "token can be read from its first bytes on."
        if taught
        else f"A causal language model that learnt from {text}, without a teacher, made with kd_kit."
    )
    lines = [
        *header,
        "---",
        "",
        f"# {student}, distilled from {teacher}" if taught else f"# {student}, trained further",
        "",
        what,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        "```",
        "",
        "## Data",
        "",
        f"- Text: {text}.",
        f"- Trained on {_amount(trainer.data.train)}; {_refused(trainer.data.train)}.",
        f"- Held out, and never trained on: {_amount(trainer.data.held_out)}.",
        "",
        "## How it was trained",
        "",
        *_recipe(trainer),
        "",
        "## How good it is",
        "",
        *_figures(trainer, report, picture),
        "",
        "## Limits",
        "",
        "- Measured on held-out parts of the same text only: on other text, and as an assistant, it was not tried.",
        "- It inherits what its teacher, its start and this text get wrong, and was not made safe in any way.",
        "- The end of a document was no training target: a student from scratch does not know when to stop.",
        "- The licences of teacher, student and text hold for what was made from them.",
    ]
    return "\n".join(lines) + "\n"


def _amount(windows: WindowSet) -> str:
    documents = windows.documents
    size = sum(int(document.student_ends[-1]) for document in documents)
    tokens = sum(len(document.student_ids) for document in documents)
    some = "1 document" if len(documents) == 1 else f"{len(documents):,} documents"
    return f"{some}, {size / 1e6:,.2f} MB, {tokens:,} tokens of the student"


def _refused(windows: WindowSet) -> str:
    refused = windows.report.refused
    return f"{len(refused):,} rows could not be used and were left out" if refused else "no row was left out"


def _recipe(trainer) -> list[str]:
    data, settings, rates = trainer.data, trainer.settings, trainer.lr_schedule
    shares = trainer.shares_at(trainer.total_steps)
    total = trainer.total_steps
    epochs = trainer.step * settings["accumulation"] / data.batches_per_epoch
    lines = [
        f"- Steps: {trainer.step:,} of {total:,}, {trainer.tokens:,} tokens of the student ({epochs:.2f} epochs), "
        f"windows of {data.window}, {data.batch_size * settings['accumulation']} {data.unit} per step.",
    ]
    if trainer._holds_best:
        lines.append(f"- These are the weights of step {trainer.best_step:,}, the best evaluation.")
    lines += [
        f"- Learning rate: {plain(settings['learning_rate'])} at its highest, steps of "
        f"warm-up {rates.warmup_steps(total):,}, of decay at the end {rates.decay_steps(total):,}; AdamW, weight decay "
        f"{plain(settings['weight_decay'])}, gradients clipped at {plain(settings['max_grad_norm'])}; precision "
        f"{trainer.session.precision!r}; seed {settings['seed']}.",
        "- Loss terms and their shares of the total at the end: "
        + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        + ".",
    ]
    for term in trainer.terms:
        if term.settings:
            lines.append(f"  - `{term.name}`: " + ", ".join(f"{k} {_short(v)}" for k, v in term.settings.items()) + ".")
    if trainer.seconds:
        lines.append(f"- Time: {span(trainer.seconds)} of training on {machine_words(trainer.session.device)}.")
    lines.append(f"- Versions: Python {platform.python_version()}, {', '.join(_versions())}.")
    return lines


def _short(value) -> str:
    return plain(value) if isinstance(value, float) else str(value)


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # the kit itself runs from a folder, too
            found.append(f"{package} (not installed as a package)")
    return found


def _figures(trainer, report: Report | None, picture: str | None) -> list[str]:
    if report is None:
        if trainer.best is None:
            return ["Not evaluated."]
        return [
            f"Held-out bits per byte {trainer.best:.4f} at step {trainer.best_step:,}, on "
            f"{trainer.settings['eval_windows']} windows."
        ]
    table = report.table
    lines = [
        f"Held-out text of {report.bytes:,} bytes; bits per byte and perplexity per word can be compared across "
        "tokenizers, lower is better.",
        "",
        f"| {' | '.join(table.columns)} |",
        "|---" + "|---:" * (len(table.columns) - 1) + "|",
        *(f"| {' | '.join(row)} |" for row in table.rows),
        "",
        *(f"- {line}" for line in table.note.splitlines()),
    ]
    if picture is not None:
        lines += ["", f"![Bits per byte, agreement with the teacher, and reliability of each model]({picture})"]
    return lines
