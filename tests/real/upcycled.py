"""A mixture of experts that somebody trained: SmolLM2 with every MLP copied into several experts."""

from __future__ import annotations

import torch


def upcycled(dense, *, experts: int = 4, active: int = 2, seed: int = 0):
    """A Mixtral that computes what a Llama computes, whatever its routers say; float32.

    Every expert is a copy of the layer's MLP, and the weights of the chosen ones sum to 1.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    known = dense.config
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "rope_theta"]
    names += ["bos_token_id", "eos_token_id"]
    config = MixtralConfig(
        **{name: getattr(known, name) for name in names if hasattr(known, name)},
        tie_word_embeddings=True,
        num_local_experts=experts,
        num_experts_per_tok=active,
        sliding_window=None,
    )
    model = MixtralForCausalLM(config).float()
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    for name, tensor in model.state_dict().items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if name.endswith("gate.weight"):
            state[name] = 0.02 * torch.randn(tensor.shape, generator=generator)
        elif ".experts." in name:
            mlp = dense.model.layers[layer].mlp
            if name.endswith("gate_up_proj"):
                both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
                state[name] = both[None].repeat(experts, 1, 1)
            elif name.endswith("experts.down_proj"):
                state[name] = mlp.down_proj.weight[None].repeat(experts, 1, 1)
            else:  # transformers 4 keeps the experts apart
                part = {"w1": mlp.gate_proj, "w2": mlp.down_proj, "w3": mlp.up_proj}[name.split(".")[-2]]
                state[name] = part.weight
    model.load_state_dict(state)
    return model.eval()
