"""Language models of transformers: decoders, and encoders with masked tokens."""

from __future__ import annotations

from collections.abc import Callable

from tests.models import Case
from tests.zoo.build import language_model, without_dropout

SPECIAL = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
WIDTHS = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
    vocab_size=512, max_position_embeddings=64,
)
DECODER = dict(**WIDTHS, **SPECIAL, use_cache=False)
GROUPED = dict(**DECODER, num_key_value_heads=2)
GPT = dict(
    n_layer=3, n_embd=64, n_head=4, vocab_size=512, n_positions=64, use_cache=False, **SPECIAL
)
NO_INNER = {k: v for k, v in DECODER.items() if k != "intermediate_size"}

DECODERS: dict[str, Callable[[float], Case]] = {
    "gpt2": language_model("GPT2LMHeadModel", **GPT),
    "gpt_neo": language_model(
        "GPTNeoForCausalLM", hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128,
        vocab_size=512, max_position_embeddings=64, window_size=16, use_cache=False, **SPECIAL,
        attention_types=[[["global", "local"], 1]],
    ),
    "gptj": language_model("GPTJForCausalLM", **GPT, rotary_dim=8),
    "gpt_neox": language_model("GPTNeoXForCausalLM", **DECODER),
    "openai_gpt": language_model(
        "OpenAIGPTLMHeadModel", n_layer=3, n_embd=64, n_head=4, vocab_size=512, n_positions=64
    ),
    "ctrl": language_model("CTRLLMHeadModel", **GPT, dff=128),
    "opt": language_model("OPTForCausalLM", **NO_INNER, ffn_dim=128, word_embed_proj_dim=64),
    "bloom": language_model(
        "BloomForCausalLM", hidden_size=64, n_layer=3, n_head=4, vocab_size=512, use_cache=False
    ),
    "falcon": language_model("FalconForCausalLM", **NO_INNER, ffn_hidden_size=128),
    "falcon_alibi": language_model(
        "FalconForCausalLM", **NO_INNER, ffn_hidden_size=128, alibi=True
    ),
    "mpt": language_model(
        "MptForCausalLM", d_model=64, n_heads=4, n_layers=3, expansion_ratio=2, max_seq_len=64,
        vocab_size=512, use_cache=False,
    ),
    "xglm": language_model(
        "XGLMForCausalLM", d_model=64, num_layers=3, attention_heads=4, ffn_dim=128,
        vocab_size=512, max_position_embeddings=64, use_cache=False, **SPECIAL,
    ),
    "biogpt": language_model("BioGptForCausalLM", **DECODER),
    "gpt_bigcode": language_model("GPTBigCodeForCausalLM", **GPT),
    "llama": language_model("LlamaForCausalLM", **GROUPED),
    "mistral": language_model("MistralForCausalLM", **GROUPED, sliding_window=16),
    "qwen2": language_model("Qwen2ForCausalLM", **GROUPED),
    "qwen3": language_model("Qwen3ForCausalLM", **GROUPED, head_dim=16),
    "gemma": language_model("GemmaForCausalLM", **GROUPED, head_dim=16),
    "gemma2": language_model("Gemma2ForCausalLM", **GROUPED, head_dim=16, sliding_window=16),
    "gemma3": language_model("Gemma3ForCausalLM", **GROUPED, head_dim=16, sliding_window=16),
    "phi": language_model("PhiForCausalLM", **DECODER),
    "phi3": language_model("Phi3ForCausalLM", **GROUPED),
    "olmo2": language_model("Olmo2ForCausalLM", **GROUPED),
    "granite": language_model("GraniteForCausalLM", **GROUPED),
    "cohere": language_model("CohereForCausalLM", **GROUPED),
    "stablelm": language_model("StableLmForCausalLM", **GROUPED),
    "starcoder2": language_model("Starcoder2ForCausalLM", **GROUPED),
    "nemotron": language_model("NemotronForCausalLM", **GROUPED, head_dim=16),
    "glm4": language_model("Glm4ForCausalLM", **GROUPED, head_dim=16),
    "smollm3": language_model("SmolLM3ForCausalLM", **GROUPED),
    "diffllama": without_dropout(language_model("DiffLlamaForCausalLM", **GROUPED)),
}

ENCODERS: dict[str, Callable[[float], Case]] = {
    "bert": language_model("BertForMaskedLM", **WIDTHS),
    "roberta": language_model("RobertaForMaskedLM", **(WIDTHS | dict(max_position_embeddings=80))),
    "distilbert": language_model(
        "DistilBertForMaskedLM", dim=64, n_layers=3, n_heads=4, hidden_dim=128, vocab_size=512,
        max_position_embeddings=64,
    ),
    "electra": language_model("ElectraForMaskedLM", **WIDTHS, embedding_size=32),
    "deberta": language_model(
        "DebertaForMaskedLM", **WIDTHS, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "deberta_v2": language_model(
        "DebertaV2ForMaskedLM", **WIDTHS, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True,
    ),
    "mpnet": language_model("MPNetForMaskedLM", **(WIDTHS | dict(max_position_embeddings=80))),
    "xlnet": language_model(
        "XLNetLMHeadModel", d_model=64, n_layer=3, n_head=4, d_inner=128, vocab_size=512,
        use_mems_train=False,
    ),
    "fnet": language_model(
        "FNetForMaskedLM", hidden_size=64, num_hidden_layers=3, intermediate_size=128,
        vocab_size=512, max_position_embeddings=64,
    ),
    "longformer": language_model(
        "LongformerForMaskedLM", **(WIDTHS | dict(max_position_embeddings=80)),
        attention_window=[16, 16, 16],
    ),
    "big_bird": language_model(
        "BigBirdForMaskedLM", **WIDTHS, attention_type="block_sparse", block_size=4,
        num_random_blocks=2,
    ),
    "funnel": language_model(
        "FunnelForMaskedLM", vocab_size=512, block_sizes=[1, 1], d_model=64, n_head=4, d_head=16,
        d_inner=128, num_decoder_layers=1, initializer_std=0.02,
    ),
    "nystromformer": language_model(
        "NystromformerForMaskedLM", **WIDTHS, segment_means_seq_len=64, num_landmarks=16,
        conv_kernel_size=5,
    ),
    "modernbert": language_model(
        "ModernBertForMaskedLM", **WIDTHS, **SPECIAL, cls_token_id=1, sep_token_id=2,
        local_attention=16,
    ),
    "esm": language_model(
        "EsmForMaskedLM", **WIDTHS, position_embedding_type="rotary", pad_token_id=1,
        mask_token_id=2, token_dropout=True,
    ),
    "convbert": language_model("ConvBertForMaskedLM", **WIDTHS, embedding_size=64),
    "mobilebert": language_model(
        "MobileBertForMaskedLM", **(WIDTHS | dict(hidden_size=64, num_hidden_layers=2)),
        embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32,
    ),
    "squeezebert": language_model("SqueezeBertForMaskedLM", **WIDTHS, embedding_size=64),
    "ibert": language_model("IBertForMaskedLM", **(WIDTHS | dict(max_position_embeddings=80))),
    "roformer": language_model("RoFormerForMaskedLM", **WIDTHS, embedding_size=64),
    "yoso": language_model("YosoForMaskedLM", **(WIDTHS | dict(max_position_embeddings=80))),
    "reformer": language_model(
        "ReformerForMaskedLM", hidden_size=64, num_attention_heads=4, attention_head_size=16,
        feed_forward_size=128, vocab_size=512, attn_layers=["local", "lsh"], is_decoder=False,
        axial_pos_shape=[8, 8], axial_pos_embds_dim=[32, 32], max_position_embeddings=64,
        local_attn_chunk_length=16, lsh_attn_chunk_length=16, num_buckets=4, hash_seed=0,
    ),
}

SHARED: dict[str, Callable[[float], Case]] = {
    "albert": language_model("AlbertForMaskedLM", **WIDTHS, embedding_size=32),
}
