"""One real step of tiny models on a device: what a list of capabilities promises may still fail in the first operation.

A matrix product can work on a card while a sum does not, so a whole Llama learns for one step and a whole mixture of
experts reads one batch, in the precision and with the implementations that a run would use.
"""

from __future__ import annotations

import warnings

import torch

from kd_kit.cards import Profile

_VOCAB = 96
_WIDTHS = {
    "vocab_size": _VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
_FAR = 0.05  # relative; float16 and bfloat16 are off by less than a hundredth of that


def real_pass(device: str, profile: Profile) -> str | None:
    """Train a tiny student for a step and run a tiny mixture of experts on ``device``; None if all went well.

    Returns:
        Otherwise what failed and its error, in one line: ``"forward and backward: RuntimeError: ..."``. Nothing is
        raised, and the caller's random state is as before.
    """
    part = "loading transformers"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers

            part = "forward and backward"
            _student_step(transformers, torch.device(device), profile)
            part = f"mixture of experts in {profile.teacher_dtype}"
            _teacher_pass(transformers, torch.device(device), profile)
    except Exception as error:  # whatever it is, it would have ended the run
        return f"{part}: {type(error).__name__}: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


def _student_step(transformers, device: torch.device, profile: Profile) -> None:
    model = _drawn(transformers, transformers.LlamaConfig(**_WIDTHS), attn_implementation=profile.attention).train()
    ids = (torch.arange(32).reshape(2, 16) * 7) % _VOCAB
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0  # padded, as batches are: that asks for another attention kernel
    with torch.no_grad():
        expected = float(_loss(model, ids, mask))
    model, ids, mask = model.to(device), ids.to(device), mask.to(device)
    dtype = torch.bfloat16 if profile.precision == "bf16" else torch.float16
    with torch.autocast(device.type, dtype=dtype, enabled=profile.precision != "no"):
        loss = _loss(model, ids, mask)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=profile.precision == "fp16")
    scaler.scale(loss).backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    found, norm = float(loss), float(norm)  # waits for the device: its errors come late
    if not abs(found - expected) < _FAR * expected:
        raise RuntimeError(f"expected a loss of {expected:.3f} as on the CPU, got {found:.3f}")
    if not 0 < norm < float("inf"):
        raise RuntimeError(f"expected a finite gradient, got a norm of {norm}")


def _loss(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Next-token loss over the positions whose target is not padding, in nats."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits[mask[:, 1:] > 0], ids[:, 1:][mask[:, 1:] > 0])


def _teacher_pass(transformers, device: torch.device, profile: Profile) -> None:
    extra = {"attn_implementation": profile.attention} | profile.experts_argument(transformers.__version__)
    model = _drawn(transformers, transformers.Qwen3MoeConfig(**_WIDTHS, **_EXPERTS), **extra)
    model = model.to(device=device, dtype=getattr(torch, profile.teacher_dtype)).eval()
    ids = (torch.arange(32, device=device).reshape(2, 16) * 5) % _VOCAB
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    if not bool(logits.isfinite().all()):
        raise RuntimeError("expected finite logits, got NaN or infinity")


def _drawn(transformers, config, **arguments):
    """A model with random float32 weights, drawn on the CPU: the states of cards are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, **arguments)


def sdpa_backends(device: str, dtype: str) -> tuple[str, ...]:
    """The kernels that torch's attention really has on a device for this dtype, fastest first."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    named = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    found = []
    for name, backend in named.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about each reason why a kernel is not there
                query = torch.linspace(-1, 1, 2 * 16 * 16, device=device).reshape(1, 2, 16, 16)
                query = query.to(getattr(torch, dtype))
                with sdpa_kernel(backend):
                    out = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
                if bool(out.float().isfinite().all()):
                    found.append(name)
        except RuntimeError:
            continue
    return tuple(found)
