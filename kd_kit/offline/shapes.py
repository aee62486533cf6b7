"""The two tiny models of the embedded pair: their shapes, named as in the real pair they stand for.

The teacher is a mixture of experts whose head has more rows than its tokenizer has ids, the student a plain
Llama that starts from scratch.
"""

from typing import Any

CONTEXT = 1024  # positions: four windows of the size that the teacher is trained on
HEAD_MULTIPLE = 128  # Qwen rounds its 151,669 ids up to 151,936 rows; so do we, to have padded rows


def teacher_config(*, vocabulary: int, end_of_text: int) -> Any:
    """A ``Qwen3MoeConfig`` of about 2.3 million parameters: 4 layers, 8 experts of which 2 work per token.

    Args:
        vocabulary: ids of the tokenizer, added tokens included; the head gets up to 128 rows more.
        end_of_text: the id that ends (and here also begins) a document.
    """
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=vocabulary + HEAD_MULTIPLE - vocabulary % HEAD_MULTIPLE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        intermediate_size=256,  # of dense layers, of which there are none; must be stated all the same
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        output_router_logits=False,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )


def student_config(*, vocabulary: int) -> Any:
    """A ``LlamaConfig`` of 0.85 million parameters; id 0 begins and ends a document, as in SmolLM2."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.05,  # the usual 0.02 is for models ten times as wide; this one then learns nothing at first
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
