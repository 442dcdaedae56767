"""Denoisers and autoencoders: diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tests.corpus.third_party.row import Row, noise

__all__ = ["ROWS"]

Tensor = torch.Tensor
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def row(
    name: str, model: str, names: Sequence[str], inputs: Callable[[], list[Tensor]], **config: Any
) -> Row:
    """``names``: of the arguments that the inputs are."""

    def call(made: nn.Module, *args: Tensor) -> Any:
        return made(**dict(zip(names, args, strict=True)), return_dict=False)

    return Row(
        package="diffusers", name=name, make=f"diffusers:{model}", config=config, inputs=inputs,
        call=call,
    )  # fmt: skip


def time() -> Tensor:
    return torch.tensor([3, 500])


TEXT = 12
USUAL = ("hidden_states", "encoder_hidden_states", "timestep")

ROWS = (
    row("dit", "DiTTransformer2DModel", ("hidden_states", "timestep", "class_labels"),
        lambda: [noise(2, 4, 16, 16), time(), torch.tensor([1, 2])], **HEADS, in_channels=4,
        out_channels=8, num_layers=2, sample_size=16, patch_size=2, num_embeds_ada_norm=10,
        norm_num_groups=4, dropout=0.0),
    row("pixart", "PixArtTransformer2DModel", USUAL,
        lambda: [noise(2, 4, 16, 16), noise(2, TEXT, 16), time()], **HEADS, in_channels=4,
        out_channels=8, num_layers=2, sample_size=16, patch_size=2, cross_attention_dim=32,
        caption_channels=16, norm_num_groups=4, use_additional_conditions=False),
    row("sd3", "SD3Transformer2DModel", (*USUAL, "pooled_projections"),
        lambda: [noise(2, 4, 16, 16), noise(2, TEXT, 32), time(), noise(2, 16)], **HEADS,
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=16),
    row("flux", "FluxTransformer2DModel",
        (*USUAL, "pooled_projections", "img_ids", "txt_ids"),
        lambda: [noise(2, 64, 4), noise(2, TEXT, 32), torch.rand(2), noise(2, 16),
                 torch.rand(64, 3), torch.rand(TEXT, 3)], **HEADS, patch_size=1, in_channels=4,
        num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8), guidance_embeds=False),
    row("aura-flow", "AuraFlowTransformer2DModel", USUAL,
        lambda: [noise(2, 4, 16, 16), noise(2, TEXT, 16), torch.rand(2)], **HEADS, sample_size=16,
        patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        joint_attention_dim=16, caption_projection_dim=32, out_channels=4, pos_embed_max_size=64),
    row("sana", "SanaTransformer2DModel", USUAL,
        lambda: [noise(2, 4, 16, 16), noise(2, TEXT, 16), time()], **HEADS, in_channels=4,
        out_channels=4, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=16, sample_size=16, patch_size=1),
    row("latte", "LatteTransformer3DModel", ("hidden_states", "timestep", "encoder_hidden_states"),
        lambda: [noise(2, 4, 4, 8, 8), time(), noise(2, TEXT, 16)], **HEADS, in_channels=4,
        out_channels=8, num_layers=1, sample_size=8, patch_size=2, cross_attention_dim=32,
        caption_channels=16, video_length=4, norm_elementwise_affine=False),
    row("cogvideox", "CogVideoXTransformer3DModel", USUAL,
        lambda: [noise(2, 4, 4, 8, 8), noise(2, TEXT, 16), time()], **HEADS, in_channels=4,
        out_channels=4, time_embed_dim=8, text_embed_dim=16, num_layers=2, sample_width=8,
        sample_height=8, sample_frames=13, patch_size=2, max_text_seq_length=TEXT),
    row("wan", "WanTransformer3DModel", ("hidden_states", "timestep", "encoder_hidden_states"),
        lambda: [noise(2, 4, 4, 8, 8), time(), noise(2, TEXT, 16)], **HEADS, patch_size=(1, 2, 2),
        in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=2),
    row("unet", "UNet2DModel", ("sample", "timestep"),
        lambda: [noise(2, 3, 16, 16), time()], sample_size=16, block_out_channels=(16, 32),
        layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=8),
    row("unet-conditional", "UNet2DConditionModel",
        ("sample", "timestep", "encoder_hidden_states"),
        lambda: [noise(2, 4, 16, 16), time(), noise(2, TEXT, 32)], sample_size=16,
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32),
    row("vae", "AutoencoderKL", ("sample",), lambda: [noise(2, 3, 32, 32)], sample_size=32,
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
)  # fmt: skip
