"""The teacher at positions inside one of its own tokens.

Where the student stands between two boundaries of the teacher, the teacher has made no prediction. But it has
predicted the whole token: given that its first bytes are what the text has, the rest of it is a distribution over
what the student may say next.
"""

from __future__ import annotations

from bisect import bisect_left

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
        own = {
            "_tokens": teacher.tokens,
            "_student": student,
            "_sorted": [teacher.tokens[t] for t in order],
            "_order": torch.tensor(order),  # special tokens continue no text
            "_orders": {},  # all filled as text asks for them
            "_homes": {},
            "_spans": {},
        }
        for name, value in own.items():  # the dataclass above is frozen
            object.__setattr__(self, name, value)

    def span(self, token: int, depth: int) -> tuple[int, int]:
        """The tokens that start with the first ``depth`` bytes of ``token``, as a range of ranks in byte order."""
        found = self._spans.get((token, depth))
        if found is None:
            prefix = self._tokens[token][:depth]
            found = bisect_left(self._sorted, prefix), bisect_left(self._sorted, _after(prefix))
            self._spans[token, depth] = found
        return found

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


def _after(prefix: bytes) -> bytes:
    """A byte string that is larger than all tokens that start with ``prefix`` and no larger than any other."""
    kept = prefix.rstrip(b"\xff")  # UTF-8 has no such byte, a vocabulary may
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else prefix + b"\xff" * 256
