"""Losses as pure functions, one value per position, span or window, float32 inside whatever comes in.

The teacher's side never receives a gradient. Nothing here averages over a batch or weighs: that is
:mod:`kd_kit.reduce` and :mod:`kd_kit.terms`.
"""

from kd_kit.losses.attention import common_heads, relation_kl, relations
from kd_kit.losses.contrastive import info_nce
from kd_kit.losses.divergence import forward_kl, jensen_shannon, reverse_kl, sampled_kl, skew_kl
from kd_kit.losses.hidden import cosine_distance, gram_distance
from kd_kit.losses.lm import cross_entropy
from kd_kit.losses.moe import router_z, routing_kl, switch_balance
from kd_kit.losses.sorted import sorted_distance, sorted_distance_cells
from kd_kit.losses.span import span_divergence
from kd_kit.losses.support import sampled_cells, sorted_cells, student_cells, tempered, top_k_cells

__all__ = [
    "common_heads",
    "cosine_distance",
    "cross_entropy",
    "forward_kl",
    "gram_distance",
    "info_nce",
    "jensen_shannon",
    "relation_kl",
    "relations",
    "reverse_kl",
    "router_z",
    "routing_kl",
    "sampled_cells",
    "sampled_kl",
    "skew_kl",
    "sorted_cells",
    "sorted_distance",
    "sorted_distance_cells",
    "span_divergence",
    "student_cells",
    "switch_balance",
    "tempered",
    "top_k_cells",
]
