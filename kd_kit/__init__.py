"""kd_kit: distil a language model into a smaller one with another tokenizer, cell by cell, and see why it learns."""

from kd_kit import looks, losses
from kd_kit.balance import fixed, gradient_share
from kd_kit.caching import build_cache, cache_report
from kd_kit.callbacks import Callback, EarlyStopping
from kd_kit.checkpoint import inspect_checkpoint
from kd_kit.checkup import doctor
from kd_kit.dashboard import build_dashboard
from kd_kit.data import build_data
from kd_kit.evaluation import agreement, evaluate
from kd_kit.expert_terms import router_term
from kd_kit.exporting import export
from kd_kit.fault import last_fault
from kd_kit.kd_terms import kd_term, span_term
from kd_kit.launching import launch
from kd_kit.learning_rate import LearningRate, cosine
from kd_kit.likelihood import score
from kd_kit.models import build_student, build_teacher, build_tokenizers
from kd_kit.plots import loss_figure, loss_table
from kd_kit.preflight import run_preflight
from kd_kit.probe_panel import build_probe
from kd_kit.readings import Needs
from kd_kit.sample import compare_text
from kd_kit.schedule_plot import plot_schedule
from kd_kit.session import build_session
from kd_kit.stages import Schedule, constant, curriculum, piecewise, progressive, two_stage
from kd_kit.state_terms import attention_term, contrastive_term, feature_term, layerwise_term, relation_term
from kd_kit.student_weights import load_weights
from kd_kit.students import dense_student
from kd_kit.term_evaluation import evaluate_terms
from kd_kit.terms import LossTerm, lm_term
from kd_kit.trainer_builder import build_trainer
from kd_kit.types import LossValue
from kd_kit.upcycling import upcycle
from kd_kit.verification import verify
from kd_kit.vocabulary_audit import audit

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "EarlyStopping",
    "LearningRate",
    "LossTerm",
    "LossValue",
    "Needs",
    "Schedule",
    "agreement",
    "attention_term",
    "audit",
    "build_cache",
    "build_dashboard",
    "build_data",
    "build_probe",
    "build_session",
    "build_student",
    "build_teacher",
    "build_tokenizers",
    "build_trainer",
    "cache_report",
    "compare_text",
    "constant",
    "contrastive_term",
    "cosine",
    "curriculum",
    "dense_student",
    "doctor",
    "evaluate",
    "evaluate_terms",
    "export",
    "feature_term",
    "fixed",
    "gradient_share",
    "inspect_checkpoint",
    "kd_term",
    "last_fault",
    "launch",
    "layerwise_term",
    "lm_term",
    "load_weights",
    "looks",
    "loss_figure",
    "loss_table",
    "losses",
    "piecewise",
    "plot_schedule",
    "progressive",
    "relation_term",
    "router_term",
    "run_preflight",
    "score",
    "span_term",
    "two_stage",
    "upcycle",
    "verify",
]
