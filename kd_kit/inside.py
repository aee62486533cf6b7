"""The teacher at positions inside one of its own tokens.

Where the student stands between two boundaries of the teacher, the teacher has made no prediction. But it has
predicted the whole token: given that its first bytes are what the text has, the rest of it is a distribution over
what the student may say next.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kd_kit.vocab import Bridge, Vocabulary, added_up, build_bridge, homes_of


class InsideBridge(Bridge):
    """A bridge that also carries teacher probabilities to positions inside a teacher token.

    At a position that has read the bytes ``u`` since the teacher's last boundary, with ``p`` the teacher's
    distribution there:

        q(v) = sum of p(t) over {t : t starts with u, home(t after u) = v}  /  sum of p(t) over {t : t starts with u}

    With ``u`` empty, as at an aligned position, this is :meth:`Bridge.project`. A token that ends exactly with ``u``
    says nothing about what follows: its mass goes to the tail, as does all that has no home.

    Source: byte-prefix marginalisation, https://arxiv.org/abs/2607.22334
    """

    def __init__(self, teacher: Vocabulary, student: Vocabulary, specials: dict[int, int] | None = None):
        plain = build_bridge(teacher, student, specials)
        super().__init__(plain.table, plain.student_size, plain.shared)
        text = [t for t in range(teacher.size) if teacher.tokens[t] and t not in teacher.special]
        order = sorted(text, key=teacher.tokens.__getitem__)
        rank = torch.full((teacher.size,), -1)  # special tokens continue no text
        rank[torch.tensor(order)] = torch.arange(len(order))
        in_order = [teacher.tokens[t] for t in order]
        own = {
            "_tokens": teacher.tokens,
            "_student": student,
            "_lengths": np.array([len(token) for token in in_order], dtype=np.int64),
            "_shared": _shared_with_the_one_before(in_order),
            "_rank": rank,
            "_order": torch.tensor(order),
            "_orders": {},  # all filled as text asks for them
            "_homes": {},
            "_spans": {},
        }
        for name, value in own.items():  # the dataclass above is frozen
            object.__setattr__(self, name, value)

    def span(self, token: int, depth: int) -> tuple[int, int]:
        """The tokens that start with the first ``depth`` bytes of ``token``, as a range of ranks in byte order."""
        ((first, last),) = self.spans(np.array([token]), np.array([depth])).tolist()
        return first, last

    def spans(self, tokens: np.ndarray, depths: np.ndarray) -> np.ndarray:
        """:meth:`span` of many tokens, none of them special.

        Shapes:
            tokens, depths: [n] int64
            returns: [n, 2] int64
        """
        rank = self._rank.numpy()[tokens]
        # a token without bytes has no rank, and all tokens start like it
        depths = np.where(rank < 0, 0, np.minimum(depths, self._lengths[rank]))
        out = np.empty((len(tokens), 2), dtype=np.int64)
        for depth in np.unique(depths).tolist():
            if depth not in self._spans:
                self._spans[depth] = _runs(self._shared < depth)
            some = depths == depth
            out[some] = self._spans[depth][rank[some]]
        return out

    def homes(self, depth: int, device: torch.device | str = "cpu") -> Tensor:
        """[U] int64, the student's home of every teacher token without its first ``depth`` bytes."""
        key = (depth, torch.device(device))
        if key not in self._homes:
            if key[1].type == "cpu":
                self._homes[key] = homes_of([token[depth:] for token in self._tokens], self._student)
            else:  # each table is copied once, not once per batch
                self._homes[key] = self.homes(depth).to(device)
        return self._homes[key]

    def project_at(self, probs: Tensor, depth: int, first: Tensor, last: Tensor, widest: int | None = None) -> Tensor:
        """As :meth:`Bridge.project_at`, at aligned positions and at those ``depth`` bytes inside teacher tokens."""
        if depth == 0:
            return self.project(probs)
        device = probs.device
        if device not in self._orders:
            self._orders[device] = self._order.to(device)
        widest = int((last - first).max()) if widest is None and len(probs) else widest or 0
        # only the tokens that begin with what was read, which are neighbours in byte order
        ranks = first.unsqueeze(-1) + torch.arange(widest, device=device)
        fits = ranks < last.unsqueeze(-1)
        tokens = self._orders[device][ranks.clamp(max=len(self._order) - 1)]
        kept = torch.where(fits, probs.float().gather(1, tokens), 0.0)
        # the floor is far below what any loss can see, and keeps a teacher that gives 0 to all of them finite
        kept = kept / kept.sum(-1, keepdim=True).clamp(min=1e-30)
        return added_up(kept, self.homes(depth, device)[tokens], self.student_size + 1)


def _shared_with_the_one_before(tokens: list[bytes]) -> np.ndarray:
    """[n] int64, how many first bytes each of the tokens has in common with the one before it; -1 for the first."""
    lengths = np.array([len(token) for token in tokens], dtype=np.int64)
    text, starts = np.frombuffer(b"".join(tokens), dtype=np.uint8), np.cumsum(lengths) - lengths
    shared = np.zeros(len(tokens), dtype=np.int64)
    shared[:1] = -1
    alike = np.arange(1, len(tokens))
    while len(alike):
        at = shared[alike]
        alike = alike[np.minimum(lengths[alike], lengths[alike - 1]) > at]
        at = shared[alike]
        alike = alike[text[starts[alike] + at] == text[starts[alike - 1] + at]]
        shared[alike] += 1
    return shared


def _runs(begins: np.ndarray) -> np.ndarray:
    """[n, 2] int64, for every place the range between the last of ``begins`` up to it and the next one."""
    first = np.flatnonzero(begins)
    edges = np.stack([first, np.append(first[1:], len(begins))], axis=-1)
    return edges[np.cumsum(begins) - 1]
