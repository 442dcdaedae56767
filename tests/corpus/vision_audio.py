"""Encoders of images, video and sound, and towers of two kinds."""

from __future__ import annotations

from typing import Any

from tests.corpus.inputs import both, features, frames, illustrated, images, tokens, waves
from tests.corpus.row import Row

__all__ = ["VISION_AUDIO"]

VIT = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 30, "patch_size": 6,
}  # fmt: skip
WAVES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "conv_dim": (24, 24), "conv_kernel": (10, 3), "conv_stride": (5, 4), "vocab_size": 32,
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
}  # fmt: skip
TEXT = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def vit(**sizes: Any) -> dict[str, Any]:
    return VIT | sizes


def row(name: str, model: str, config: dict[str, Any], **fields: Any) -> Row:
    given: dict[str, Any] = {"inputs": images(), "sites": 2} | fields
    return Row(name=name, model=model, config=config, **given)


SDPA = ("sdpa",)
ONLY_EAGER: Any = {"attention": ("eager",)}

# fmt: off
VISION_AUDIO: tuple[Row, ...] = (
    row("vit", "ViTForImageClassification", vit(), train=True, quick=SDPA),
    row("vit-square", "ViTModel", vit(image_size=42), inputs=images(42)),
    row("deit", "DeiTForImageClassificationWithTeacher", vit()),
    row("beit", "BeitForImageClassification", vit(use_relative_position_bias=True)),
    row("data2vec_vision", "Data2VecVisionModel", vit(use_shared_relative_position_bias=True)),
    row("dinov2", "Dinov2ForImageClassification", vit()),
    row("dinov2_registers", "Dinov2WithRegistersModel", vit(num_register_tokens=3)),
    row("dinov3", "DINOv3ViTModel", vit(num_register_tokens=3)),
    row("ijepa", "IJepaModel", vit()),
    row("siglip", "SiglipModel", {"text_config": TEXT | {"max_position_embeddings": 13},
        "vision_config": VIT}, inputs=both(), sites=4, declined=("one query pools",)),
    row("clip", "CLIPModel", {"text_config": TEXT, "vision_config": VIT, "projection_dim": 20},
        inputs=both(), sites=4),
    row("clip-vision", "CLIPVisionModel", vit(), inputs=images()),
    row("clip-text", "CLIPTextModel", TEXT, inputs=both()),
    row("yolos", "YolosForObjectDetection", vit(image_size=[30, 30], num_detection_tokens=5,
        num_labels=3)),
    row("vit_mae", "ViTMAEModel", vit(mask_ratio=0.0)),
    row("dpt", "DPTForDepthEstimation", vit(backbone_out_indices=[0, 1], neck_hidden_sizes=[12,
        16], reassemble_factors=[1, 1], fusion_hidden_size=12, head_in_index=-1)),
    row("pvt", "PvtForImageClassification", {"image_size": 32, "hidden_sizes": [16, 24],
        "depths": [1, 1], "num_attention_heads": [1, 2], "patch_sizes": [4, 2], "strides": [4, 2],
        "sequence_reduction_ratios": [2, 1], "mlp_ratios": [2, 2], "num_encoder_blocks": 2},
        inputs=images(32), **ONLY_EAGER),
    row("segformer", "SegformerForImageClassification", {"num_encoder_blocks": 2, "depths": [1, 1],
        "sr_ratios": [2, 1], "hidden_sizes": [16, 24], "patch_sizes": [7, 3], "strides": [4, 2],
        "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}, inputs=images(32), **ONLY_EAGER),
    row("swin", "SwinForImageClassification", {"image_size": 32, "patch_size": 4, "embed_dim": 16,
        "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}, inputs=images(32),
        sites={"sdpa": 3, "eager": 1}),
    row("swinv2", "Swinv2ForImageClassification", {"image_size": 32, "patch_size": 4,
        "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
        inputs=images(32), sites=1, declined=("its batch is cut from the tokens",), **ONLY_EAGER),
    row("siglip-vision", "SiglipVisionModel", vit(vision_use_head=False)),
    row("blip-vision", "BlipVisionModel", vit(), **ONLY_EAGER),
    row("blip-text", "BlipTextModel", TEXT | {"encoder_hidden_size": 48}, inputs=tokens(61,
        labels=False), **ONLY_EAGER),
    row("vit_msn", "ViTMSNModel", vit()),
    row("vitdet", "VitDetModel", vit(image_size=32, patch_size=4, window_block_indices=[0]),
        inputs=images(32), **ONLY_EAGER),
    row("hiera", "HieraModel", {"embed_dim": 16, "image_size": [32, 32], "patch_size": [7, 7],
        "patch_stride": [4, 4], "patch_padding": [3, 3], "depths": [1, 1], "num_heads": [1, 2],
        "masked_unit_size": [4, 4], "query_stride": [2, 2], "num_query_pool": 1},
        inputs=images(32), **ONLY_EAGER),
    row("aimv2-vision", "Aimv2VisionModel", vit(image_size=30, patch_size=6, use_head=False)),
    row("owlvit-vision", "OwlViTVisionModel", vit(), **ONLY_EAGER),
    row("clipseg", "CLIPSegVisionModel", vit()),
    row("chinese_clip", "ChineseCLIPVisionModel", vit()),
    row("pixtral", "PixtralVisionModel", {"hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 30, "patch_size": 6}),
    row("vilt", "ViltModel", VIT | {"vocab_size": 96, "max_position_embeddings": 64,
        "max_image_length": -1}, inputs=both(), **ONLY_EAGER),
    row("git", "GitForCausalLM", TEXT | {"vision_config": VIT}, inputs=both(), sites=4,
        **ONLY_EAGER),
    row("llava", "LlavaForConditionalGeneration", {"image_token_index": 90,
        "vision_feature_layer": -1, "vision_config": VIT | {"model_type": "clip_vision_model"},
        "text_config": TEXT | {"model_type": "llama"}}, inputs=illustrated(25), sites=4),
    row("paligemma", "PaliGemmaForConditionalGeneration", {"image_token_index": 90,
        "projection_dim": 48, "vision_config": VIT | {"model_type": "siglip_vision_model",
        "projection_dim": 48}, "text_config": TEXT | {"model_type": "gemma", "head_dim": 12,
        "num_key_value_heads": 2}}, inputs=illustrated(25, prefix=31), sites=4),
    row("detr-encoder", "ConditionalDetrModel", {"use_timm_backbone": False, "d_model": 48,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80,
        "num_queries": 9}, inputs=images(64), declined=("its keys are parameters",), **ONLY_EAGER),
    row("patchtst", "PatchTSTModel", {"num_input_channels": 3, "context_length": 96,
        "patch_length": 4, "patch_stride": 4, "num_hidden_layers": 2, "d_model": 48,
        "num_attention_heads": 4, "ffn_dim": 80, "random_mask_ratio": 0.0},
        inputs=features("past_values", 96, 3)),
    row("decision", "DecisionTransformerGPT2Model", {"hidden_size": 48, "n_layer": 2, "n_head": 4,
        "n_positions": 256, "vocab_size": 96}, inputs=tokens(61, labels=False)),
    row("videomae", "VideoMAEModel", vit(image_size=16, patch_size=8, num_frames=4,
        tubelet_size=2), inputs=frames()),
    row("timesformer", "TimesformerModel", vit(image_size=16, patch_size=8, num_frames=4),
        inputs=frames(), sites=2, declined=("its batch is cut from the tokens",), **ONLY_EAGER),
    row("vivit", "VivitModel", vit(image_size=16, num_frames=4, tubelet_size=[2, 8, 8]),
        inputs=frames()),
    row("wav2vec2", "Wav2Vec2Model", WAVES, inputs=waves()),
    row("wav2vec2-padded", "Wav2Vec2Model", WAVES | {"feat_extract_norm": "layer",
        "do_stable_layer_norm": True}, inputs=waves(padding=True)),
    row("hubert", "HubertModel", WAVES, inputs=waves()),
    row("wavlm", "WavLMModel", WAVES | {"num_buckets": 16, "max_bucket_distance": 32},
        inputs=waves(), **ONLY_EAGER),
    row("wav2vec2_conformer", "Wav2Vec2ConformerModel", WAVES | {"conv_depthwise_kernel_size": 5,
        "position_embeddings_type": "relative"}, inputs=waves(), **ONLY_EAGER),
    row("wav2vec2_bert", "Wav2Vec2BertModel", {"hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "feature_projection_input_dim": 20,
        "conv_depthwise_kernel_size": 5, "apply_spec_augment": False,
        "left_max_position_embeddings": 8, "right_max_position_embeddings": 4},
        inputs=features("input_features", 61, 20), **ONLY_EAGER),
    row("unispeech_sat", "UniSpeechSatModel", WAVES, inputs=waves()),
    row("sew", "SEWModel", WAVES | {"squeeze_factor": 2}, inputs=waves()),
    row("parakeet", "ParakeetEncoder", {"hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_mel_bins": 16, "conv_kernel_size": 5,
        "subsampling_conv_channels": 8, "max_position_embeddings": 256}, inputs=features(
        "input_features", 122, 16), **ONLY_EAGER),
    row("data2vec_audio", "Data2VecAudioModel", WAVES, inputs=waves()),
    row("ast", "ASTForAudioClassification", VIT | {"num_mel_bins": 16, "max_length": 61,
        "frequency_stride": 4, "time_stride": 4, "patch_size": 8}, inputs=features("input_values",
        61, 16)),
    row("whisper-encoder", "WhisperForAudioClassification", {"d_model": 48, "encoder_layers": 2,
        "encoder_attention_heads": 4, "encoder_ffn_dim": 80, "num_mel_bins": 16,
        "max_source_positions": 61, "vocab_size": 96, "decoder_layers": 1},
        inputs=features("input_features", 16, 122)),
)
