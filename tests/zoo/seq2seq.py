"""Encoder-decoders of transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.models import Case, hf_loss
from tests.zoo.build import language_model, tokens, transformer

_T5 = dict(
    vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4,
    use_cache=False, decoder_start_token_id=0,
)
_BART = dict(
    vocab_size=512, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, use_cache=False,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    forced_eos_token_id=2, decoder_start_token_id=2,
)
_LED = {k: v for k, v in _BART.items() if k != "max_position_embeddings"}



def longt5(dropout: float) -> Case:
    """LongT5, which cannot be traced without a mask."""
    model = transformer(
        "LongT5ForConditionalGeneration", dropout, **_T5, local_radius=7, global_block_size=8,
        encoder_attention_type="transient-global",
    )
    return model, tokens(attention_mask=torch.ones(4, 64, dtype=torch.long)), hf_loss


ENCODER_DECODERS: dict[str, Callable[[float], Case]] = {
    "t5": language_model("T5ForConditionalGeneration", **_T5),
    "mt5": language_model("MT5ForConditionalGeneration", **_T5, feed_forward_proj="gated-gelu"),
    "umt5": language_model("UMT5ForConditionalGeneration", **_T5),
    "longt5": longt5,
    "bart": language_model("BartForConditionalGeneration", **_BART),
    "mbart": language_model("MBartForConditionalGeneration", **_BART),
    "pegasus": language_model("PegasusForConditionalGeneration", **_BART),
    "pegasus_x": language_model(
        "PegasusXForConditionalGeneration", **_BART, block_size=16, num_global_tokens=4
    ),
    "bigbird_pegasus": language_model(
        "BigBirdPegasusForConditionalGeneration", **_BART, attention_type="block_sparse",
        block_size=4, num_random_blocks=2,
    ),
    "marian": language_model("MarianMTModel", **_BART),
    "blenderbot": language_model("BlenderbotForConditionalGeneration", **_BART),
    "m2m_100": language_model("M2M100ForConditionalGeneration", **_BART),
    "led": language_model(
        "LEDForConditionalGeneration", **_LED, max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64, attention_window=[16, 16],
    ),
    "prophetnet": language_model(
        "ProphetNetForConditionalGeneration", vocab_size=512, hidden_size=64, encoder_ffn_dim=128,
        decoder_ffn_dim=128, num_encoder_layers=2, num_decoder_layers=2,
        num_encoder_attention_heads=4, num_decoder_attention_heads=4, ngram=2,
        max_position_embeddings=80, use_cache=False, decoder_start_token_id=0, pad_token_id=0,
        num_buckets=8, relative_max_distance=32,
    ),
}
