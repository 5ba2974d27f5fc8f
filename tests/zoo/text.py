"""Language models of transformers: decoders, and encoders with masked tokens."""

from __future__ import annotations

from collections.abc import Callable

from tests.models import Case
from tests.zoo.build import language_model

WIDTHS = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
    vocab_size=512, max_position_embeddings=64,
)
NO_CACHE = dict(use_cache=False, bos_token_id=0, eos_token_id=0, pad_token_id=0)

DECODERS: dict[str, Callable[[float], Case]] = {
    "gpt2": language_model(
        "GPT2LMHeadModel", n_layer=3, n_embd=64, n_head=4, vocab_size=512, n_positions=64,
        **NO_CACHE,
    ),
    "gpt_neox": language_model("GPTNeoXForCausalLM", **WIDTHS, **NO_CACHE),
    "llama": language_model("LlamaForCausalLM", **WIDTHS, **NO_CACHE, num_key_value_heads=2),
    "qwen2": language_model("Qwen2ForCausalLM", **WIDTHS, **NO_CACHE, num_key_value_heads=2),
}
ENCODERS: dict[str, Callable[[float], Case]] = {
    "bert": language_model("BertForMaskedLM", **WIDTHS),
}
