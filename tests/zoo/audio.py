"""Audio and time series models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.models import Case, hf_loss
from tests.zoo.build import transformer

_WAVES = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    conv_dim=[16, 16, 16], conv_stride=[5, 4, 2], conv_kernel=[10, 5, 3], vocab_size=32,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, num_feat_extract_layers=3,
)
# Masks of time and features are drawn by numpy, on the host: another graph in each step.
_UNMASKED = dict(apply_spec_augment=False, mask_time_prob=0.0, mask_feature_prob=0.0)


def frame_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of a unit for each frame, as in HuBERT's training."""
    logits = model(batch["input_values"]).logits
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, : logits.shape[1]])


def recognizer(class_name: str, loss_fn: Any = frame_loss, **settings: Any) -> Any:
    """Return a maker of a speech recognizer over waves."""

    def make(dropout: float) -> Case:
        model = transformer(class_name, dropout, **(_WAVES | _UNMASKED | settings))
        # As in fine-tuning; else it asks for the gradient of the waves in its forward.
        model.freeze_feature_encoder()
        num_labels = 64 if loss_fn is frame_loss else 8
        labels = torch.randint(1, 32, (4, num_labels))
        return model, {"input_values": torch.randn(4, 2000), "labels": labels}, loss_fn

    return make


def whisper(dropout: float) -> Case:
    """Whisper: mel spectrograms to tokens."""
    model = transformer(
        "WhisperForConditionalGeneration", dropout, vocab_size=512, num_mel_bins=16, d_model=64,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=50, max_target_positions=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
    )
    labels = torch.randint(3, 512, (4, 16))
    return model, {"input_features": torch.randn(4, 16, 100), "labels": labels}, hf_loss


def speech_to_text(dropout: float) -> Case:
    """Speech2Text: filter banks to tokens."""
    model = transformer(
        "Speech2TextForConditionalGeneration", dropout, vocab_size=512, d_model=64,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=128,
        max_target_positions=32, conv_channels=32, input_feat_per_channel=16, use_cache=False,
        decoder_start_token_id=2,
    )
    labels = torch.randint(3, 512, (4, 16))
    return model, {"input_features": torch.randn(4, 100, 16), "labels": labels}, hf_loss


def ast(dropout: float) -> Case:
    """Audio spectrogram transformer."""
    model = transformer(
        "ASTForAudioClassification", dropout, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128, max_length=64, num_mel_bins=32, patch_size=8,
        frequency_stride=8, time_stride=8, num_labels=10,
    )
    batch = {"input_values": torch.randn(4, 64, 32), "labels": torch.randint(0, 10, (4,))}
    return model, batch, hf_loss


def patchtst(dropout: float) -> Case:
    """Patches of a time series, forecast."""
    model = transformer(
        "PatchTSTForPrediction", dropout, num_input_channels=3, context_length=64,
        patch_length=8, patch_stride=8, d_model=32, num_attention_heads=4, num_hidden_layers=2,
        ffn_dim=64, prediction_length=16, loss="mse",
    )
    batch = {"past_values": torch.randn(8, 64, 3), "future_values": torch.randn(8, 16, 3)}
    return model, batch, hf_loss


def patchtsmixer(dropout: float) -> Case:
    """Patches of a time series mixed by MLPs."""
    model = transformer(
        "PatchTSMixerForPrediction", dropout, num_input_channels=3, context_length=64,
        patch_length=8, patch_stride=8, d_model=32, num_layers=3, prediction_length=16,
    )
    batch = {"past_values": torch.randn(8, 64, 3), "future_values": torch.randn(8, 16, 3)}
    return model, batch, hf_loss


def _forecast(class_name: str, dropout: float, **settings: Any) -> Case:
    model = transformer(
        class_name, dropout, prediction_length=8, context_length=24, input_size=1,
        num_time_features=1, lags_sequence=[1, 2, 3], d_model=32, encoder_layers=2,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_static_categorical_features=0, **settings,
    )
    batch = {
        "past_values": torch.randn(4, 27), "future_values": torch.randn(4, 8),
        "past_time_features": torch.randn(4, 27, 1), "future_time_features": torch.randn(4, 8, 1),
        "past_observed_mask": torch.ones(4, 27), "future_observed_mask": torch.ones(4, 8),
    }
    return model, batch, hf_loss


def informer(dropout: float) -> Case:
    """Informer: sparse attention to the queries that matter, negative log-likelihood."""
    return _forecast("InformerForPrediction", dropout, attention_type="prob", sampling_factor=2)


def time_series_transformer(dropout: float) -> Case:
    """A probabilistic forecaster whose loss is the likelihood of a Student's t."""
    return _forecast("TimeSeriesTransformerForPrediction", dropout)


def autoformer(dropout: float) -> Case:
    """Autoformer: attention by autocorrelation (FFT), series decomposition."""
    return _forecast("AutoformerForPrediction", dropout, autocorrelation_factor=1)


AUDIO: dict[str, Callable[[float], Case]] = {
    "wav2vec2": recognizer("Wav2Vec2ForCTC"),
    "wav2vec2_ctc": recognizer("Wav2Vec2ForCTC", hf_loss),
    "hubert": recognizer("HubertForCTC"),
    "wavlm": recognizer("WavLMForCTC"),
    "unispeech": recognizer("UniSpeechForCTC", num_codevectors_per_group=16),
    "data2vec_audio": recognizer("Data2VecAudioForCTC", num_conv_pos_embeddings=2,
                                 conv_pos_kernel_size=5),
    "sew": recognizer("SEWForCTC", squeeze_factor=2),
    "whisper": whisper,
    "speech_to_text": speech_to_text,
    "ast": ast,
}
SERIES: dict[str, Callable[[float], Case]] = {
    "patchtst": patchtst,
    "patchtsmixer": patchtsmixer,
    "informer": informer,
    "time_series_transformer": time_series_transformer,
    "autoformer": autoformer,
}
