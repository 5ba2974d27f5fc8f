"""Mixtures of experts, state spaces and linear recurrences of transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.models import Case, hf_loss
from tests.zoo.build import language_model, tokens, transformer
from tests.zoo.text import DECODER, GROUPED


def switch_transformers(dropout: float) -> Case:
    """Switch transformers: one expert for each token."""
    model = transformer(
        "SwitchTransformersForConditionalGeneration", dropout, vocab_size=512, d_model=64, d_kv=16,
        d_ff=128, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_heads=4, num_experts=4, use_cache=False,
        decoder_start_token_id=0, pad_token_id=0,
    )
    return model, tokens(attention_mask=torch.ones(4, 64, dtype=torch.long)), hf_loss


EXPERTS: dict[str, Callable[[float], Case]] = {
    "mixtral": language_model(
        "MixtralForCausalLM", **GROUPED, num_local_experts=4, output_router_logits=True
    ),
    "qwen2_moe": language_model(
        "Qwen2MoeForCausalLM", **GROUPED, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, shared_expert_intermediate_size=64,
    ),
    "qwen3_moe": language_model(
        "Qwen3MoeForCausalLM", **GROUPED, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, head_dim=16,
    ),
    "olmoe": language_model(
        "OlmoeForCausalLM", **GROUPED, num_experts=4, num_experts_per_tok=2
    ),
    "phimoe": language_model("PhimoeForCausalLM", **GROUPED, num_local_experts=4),
    "granitemoe": language_model("GraniteMoeForCausalLM", **GROUPED, num_local_experts=4),
    "deepseek_v2": language_model(
        "DeepseekV2ForCausalLM", **DECODER, num_key_value_heads=4, n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=64, kv_lora_rank=16,
        q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_group=1,
        topk_group=1, first_k_dense_replace=1,
    ),
    "deepseek_v3": language_model(
        "DeepseekV3ForCausalLM", **DECODER, num_key_value_heads=4, n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=64, kv_lora_rank=16,
        q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_group=2,
        topk_group=1, first_k_dense_replace=1,
    ),
    "gpt_oss": language_model(
        "GptOssForCausalLM", **GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=16,
        sliding_window=16,
    ),
    "switch_transformers": switch_transformers,
    "nllb_moe": language_model(
        "NllbMoeForConditionalGeneration", vocab_size=512, d_model=64, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, num_experts=4, expert_capacity=64,
        encoder_sparse_step=2, decoder_sparse_step=2, use_cache=False, max_position_embeddings=64,
    ),
}

_MAMBA = dict(
    hidden_size=64, state_size=8, num_hidden_layers=2, vocab_size=512, use_cache=False
)
# Scans are unrolled where the compiled kernels are missing: few tokens.
STATE_SPACES: dict[str, Callable[[float], Case]] = {
    "mamba": language_model("MambaForCausalLM", num_tokens=16, **_MAMBA),
    "mamba2": language_model(
        "Mamba2ForCausalLM", num_tokens=32,
        **_MAMBA, num_heads=8, head_dim=16, n_groups=2, chunk_size=16
    ),
    "falcon_mamba": language_model("FalconMambaForCausalLM", num_tokens=16, **_MAMBA),
    "rwkv": language_model(
        "RwkvForCausalLM", num_tokens=8,
        hidden_size=64, num_hidden_layers=2, vocab_size=512, context_length=64,
        use_cache=False,
    ),
    "jamba": language_model(
        "JambaForCausalLM", num_tokens=16, **(GROUPED | dict(num_hidden_layers=4)), num_experts=4,
        attn_layer_period=4, attn_layer_offset=2, expert_layer_period=2, expert_layer_offset=1,
        mamba_d_state=8, use_mamba_kernels=False,
    ),
    "zamba": language_model(
        "ZambaForCausalLM", num_tokens=16, **(GROUPED | dict(num_hidden_layers=4)), mamba_d_state=8,
        n_mamba_heads=2, use_mamba_kernels=False, attention_head_dim=32,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    ),
    "zamba2": language_model(
        "Zamba2ForCausalLM", num_tokens=32,
        **DECODER, mamba_d_state=8, n_mamba_heads=8, use_mamba_kernels=False,
        layers_block_type=["mamba", "hybrid", "mamba"], chunk_size=16, num_mem_blocks=1,
    ),
    "bamba": language_model(
        "BambaForCausalLM", num_tokens=32,
        **GROUPED, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16,
        mamba_d_state=8, mamba_chunk_size=16, mamba_n_groups=1,
    ),
    "recurrent_gemma": language_model(
        "RecurrentGemmaForCausalLM", num_tokens=32,
        **DECODER, lru_width=64, attention_window_size=16,
    ),
    "xlstm": language_model(
        "xLSTMForCausalLM", num_tokens=32,
        hidden_size=64, num_hidden_layers=2, num_heads=4, vocab_size=512,
        use_cache=False, qk_dim_factor=0.5, v_dim_factor=1.0, chunk_size=16,
    ),
    "lfm2": language_model(
        "Lfm2ForCausalLM", **GROUPED, layer_types=["conv", "full_attention", "conv"],
        block_multiple_of=16,
    ),
    "qwen3_next": language_model(
        "Qwen3NextForCausalLM", **GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=64, shared_expert_intermediate_size=64, linear_key_head_dim=16,
        linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
}
