"""Encoder-decoders of text and speech."""

from __future__ import annotations

from typing import Any

from tests.corpus.inputs import features, seq2seq
from tests.corpus.row import Row

__all__ = ["SEQ2SEQ"]

BART = {
    "vocab_size": 96, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 64, "max_position_embeddings": 256, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 96, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip


def row(name: str, model: str, config: dict[str, Any], **fields: Any) -> Row:
    given: dict[str, Any] = {"inputs": seq2seq(), "sites": 3} | fields
    return Row(name=name, model=model, config=config, **given)


SDPA = ("sdpa",)
ONLY_EAGER: Any = {"attention": ("eager",)}

# fmt: off
SEQ2SEQ: tuple[Row, ...] = (
    row("t5", "T5ForConditionalGeneration", T5, train=True),
    row("t5-gated", "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu",
        "num_layers": 2}, sites=6),
    row("umt5", "UMT5ForConditionalGeneration", T5),
    row("mt5", "MT5ForConditionalGeneration", T5),
    row("longt5", "LongT5ForConditionalGeneration", T5 | {"encoder_attention_type": "local",
        "local_radius": 7}, sites=2, **ONLY_EAGER),
    row("bart", "BartForConditionalGeneration", BART, quick=SDPA),
    row("bart-train", "BartForConditionalGeneration", BART, train=True),
    row("bart-square", "BartForConditionalGeneration", BART | {"vocab_size": 48},
        inputs=seq2seq(48, 48, padding=False, vocab=48)),
    row("mbart", "MBartForConditionalGeneration", BART),
    row("pegasus", "PegasusForConditionalGeneration", BART),
    row("marian", "MarianMTModel", BART),
    row("m2m_100", "M2M100ForConditionalGeneration", BART),
    row("blenderbot", "BlenderbotForConditionalGeneration", BART),
    row("blenderbot_small", "BlenderbotSmallForConditionalGeneration", BART),
    row("plbart", "PLBartForConditionalGeneration", BART),
    row("nllb_moe", "NllbMoeForConditionalGeneration", BART | {"num_experts": 4,
        "encoder_sparse_step": 1, "decoder_sparse_step": 1, "expert_capacity": 64},
        dtype="float64", **ONLY_EAGER),
    row("fsmt", "FSMTForConditionalGeneration", BART | {"langs": ["en", "de"], "src_vocab_size": 96,
        "tgt_vocab_size": 96}, **ONLY_EAGER),
    row("mvp", "MvpForConditionalGeneration", BART, **ONLY_EAGER),
    row("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", BART | {
        "attention_type": "original_full"}, **ONLY_EAGER),
    row("pegasus_x", "PegasusXForConditionalGeneration", BART | {"block_size": 16,
        "num_global_tokens": 8, "stagger_local_blocks": False}, inputs=seq2seq(64, 37),
        **ONLY_EAGER),
    row("led", "LEDForConditionalGeneration", {"vocab_size": 96, "d_model": 48,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 64,
        "max_encoder_position_embeddings": 256, "max_decoder_position_embeddings": 256,
        "attention_window": 8, "decoder_start_token_id": 2}, inputs=seq2seq(64, 37), sites=2,
        **ONLY_EAGER),
    row("prophetnet", "ProphetNetForConditionalGeneration", {"vocab_size": 96, "hidden_size": 48,
        "encoder_ffn_dim": 80, "decoder_ffn_dim": 64, "num_encoder_layers": 1,
        "num_decoder_layers": 1, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "max_position_embeddings": 256,
        "decoder_start_token_id": 0}, sites=4, **ONLY_EAGER),
    row("switch_transformers", "SwitchTransformersForConditionalGeneration",
        T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
        "num_decoder_layers": 1}, dtype="float64", **ONLY_EAGER),
    row("t5gemma", "T5GemmaForConditionalGeneration", {"encoder": {"vocab_size": 96,
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 16},
        "decoder": {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
        "sliding_window": 16}, "vocab_size": 96}, attention=("eager",)),
    row("whisper", "WhisperForConditionalGeneration", BART | {"num_mel_bins": 16,
        "max_source_positions": 61, "max_target_positions": 64, "suppress_tokens": [],
        "begin_suppress_tokens": []}, inputs=features("input_features", 16, 122, target=37)),
    row("speech_to_text", "Speech2TextForConditionalGeneration",
        BART | {"input_feat_per_channel": 20, "num_conv_layers": 2, "conv_kernel_sizes": (5, 5),
        "conv_channels": 24, "max_source_positions": 256, "max_target_positions": 256,
        "input_channels": 1}, inputs=features("input_features", 121, 20, target=37,
        mask="attention_mask"), **ONLY_EAGER),
    row("moonshine", "MoonshineForConditionalGeneration", {"vocab_size": 96, "hidden_size": 48,
        "intermediate_size": 80, "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1,
        "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
        "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4,
        "max_position_embeddings": 256}, inputs=features("input_values", 4000, target=23)),
)
