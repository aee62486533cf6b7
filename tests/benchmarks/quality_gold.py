"""TRL's GOLD trainer on the same teacher, student, text, tokens and seeds: the outside anchor of the quality bench.

GOLD wants conversations. Here every window is a completion to a prompt that is the document-start token alone; the
trainer adds an end token behind it. ``lmbda=0``: nothing is generated, the text is the data. AdamW, weight decay,
clipping and the shape of the learning rate are those of the other arms; the order of the windows is GOLD's own.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
import warnings
from pathlib import Path

from quality_arms import Setting
from quality_scenes import Scene

INSTALL = "python -m pip install -e '.[bench]'"


def available() -> bool:
    """Whether TRL with its GOLD trainer is installed."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return importlib.util.find_spec("trl") is not None and importlib.util.find_spec("trl.experimental.gold") is not None


def version() -> str:
    import trl

    return trl.__version__


def train(scene: Scene, setting: Setting, seed: int, steps: int):
    """The student that GOLD's trainer makes.

    ``variant`` "observed" is the trainer's default loss; "hybrid" a Jensen-Shannon divergence where both vocabularies
    have a token and sorted probabilities elsewhere, with the "bayesian" merge of split tokens. The KD weight is
    ``uld_distillation_weight``, the rest to 1 ``uld_crossentropy_weight``: by default there would be no loss on the
    text, without which an untrained student learns no language.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        from datasets import Dataset, disable_progress_bars
        from transformers import PrinterCallback, ProgressCallback
        from trl.experimental.gold import GOLDConfig, GOLDTrainer

        disable_progress_bars()
        source, data = scene.source, scene.data()
        tokenizer = copy.deepcopy(source.tokenizers.student)
        tokenizer.pad_token = tokenizer.eos_token
        source.tokenizers.teacher.save_pretrained(Path(folder) / "tokenizer")
        texts = [data.train.text(number) for number in range(len(data.train))]
        config = GOLDConfig(
            output_dir=folder,
            use_uld_loss=True,
            uld_use_hybrid_loss=setting.variant == "hybrid",
            uld_token_merge_strategy="bayesian" if setting.variant == "hybrid" else "observed",
            uld_crossentropy_weight=1 - setting.kd_weight,
            uld_distillation_weight=setting.kd_weight,
            lmbda=0.0,
            teacher_tokenizer_name_or_path=str(Path(folder) / "tokenizer"),
            max_length=None,
            learning_rate=setting.rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": round(0.2 * steps), "decay_type": "1-sqrt"},
            warmup_steps=round(0.1 * steps),
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            per_device_train_batch_size=scene.batch_size,
            gradient_accumulation_steps=1,
            max_steps=steps,
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = GOLDTrainer(
            model=source.student(seed),
            teacher_model=copy.deepcopy(source.teacher()),
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [tokenizer.eos_token] * len(texts), "completion": texts}),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
        return trainer.model
