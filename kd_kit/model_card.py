"""The README.md of an exported student: what it is, what it learnt from, how, how good it is, and what it is not."""

from __future__ import annotations

from importlib.metadata import version

from kd_kit.report import Report
from kd_kit.table import plain


def model_card(trainer, report: Report | None = None, *, teacher: str, student: str, text: str) -> str:
    """A model card in Markdown, with the hub's header.

    Args:
        trainer: of the run that the student comes from.
        report: of :func:`kd_kit.evaluate`; without it the card gives the run's own evaluations.
        teacher, student, text: their names, as people would look for them.
    """
    named = [name for name in (teacher, student) if name.count("/") == 1 and not name.startswith(("/", "."))]
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [knowledge-distillation]"]
    if student in named:
        header += [f"base_model: {student}"]
    header += ["---"]
    data, settings = trainer.data, trainer.settings
    weights = trainer.shares_at(trainer.total_steps)
    windows = data.batch_size * settings["accumulation"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        *header,
        "",
        f"# {student}, distilled from {teacher}",
        "",
        f"A causal language model that learnt from {text} and from what `{teacher}` says about it, made with kd_kit. "
        "Teacher and student cut text into different tokens; they were compared where both stand at the same byte.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        "```",
        "",
        "## How it was trained",
        "",
        f"- Steps: {trainer.step:,} of {trainer.total_steps:,}, {trainer.tokens:,} tokens of the student, windows of "
        f"{data.window}, {windows} {data.unit} per step.",
        f"- Text: {len(data.train.documents):,} documents; {len(data.held_out.documents):,} more were held out.",
        f"- Learning rate: {plain(settings['learning_rate'])} at its highest, AdamW, weight decay "
        f"{plain(settings['weight_decay'])}; precision {trainer.session.precision!r}; seed {settings['seed']}.",
        "- Loss terms and their shares of the total at the end: "
        + ", ".join(f"{name} {share:.0%}" for name, share in weights.items())
        + ".",
        f"- Versions: {versions}.",
        "",
        "## How good it is",
        "",
        *_figures(trainer, report),
        "",
        "## Limits",
        "",
        "Measured on held-out parts of the same text only. It inherits what its teacher and this text get wrong, and "
        "was not made safe in any way. The licences of teacher, student and text hold for what was made from them.",
    ]
    return "\n".join(lines) + "\n"


def _figures(trainer, report: Report | None) -> list[str]:
    if report is None:
        if trainer.best is None:
            return ["Not evaluated."]
        return [
            f"Held-out bits per byte {trainer.best:.4f} at step {trainer.best_step:,}, on "
            f"{trainer.settings['eval_windows']} windows."
        ]
    lines = [
        f"Held-out text of {report.bytes:,} bytes; bits per byte can be compared across tokenizers, lower is better.",
        "",
        "| | bits per byte | perplexity per own token |",
        "|---|---|---|",
    ]
    for name, row in report.rows.items():
        lines.append(f"| {name} | {row['bits_per_byte']:.4f} | {row['perplexity']:.2f} |")
    return [*lines, "", *report.sentences()]
