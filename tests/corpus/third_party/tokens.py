"""Tokens: x-transformers, vit-pytorch and other packages built with einops; torchtune."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.corpus.third_party.row import Call, Row, found, ids, image, noise, plainly

__all__ = ["ROWS"]

SIZES = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16}
LENGTH = 61
Tensor = torch.Tensor


def x_model(layers: str, wrapper: dict[str, Any], **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        inner = found(f"x_transformers:{layers}")(**SIZES, **options)
        return found("x_transformers:TransformerWrapper")(
            num_tokens=50, max_seq_len=64, attn_layers=inner, **wrapper
        )

    return make


def x(name: str, layers: str = "Decoder", wrapper: dict[str, Any] | None = None, **o: Any) -> Row:
    made = x_model(layers, wrapper or {}, **o)
    return Row(package="x-transformers", name=name, make=made, inputs=ids(LENGTH))


def x_seq2seq() -> nn.Module:
    return found("x_transformers:XTransformer")(
        dim=32, enc_num_tokens=50, enc_depth=1, enc_heads=2, enc_max_seq_len=64,
        dec_num_tokens=50, dec_depth=1, dec_heads=2, dec_max_seq_len=64,
    )  # fmt: skip


def x_latents() -> nn.Module:
    """Few learned queries over many tokens."""

    class Latents(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(4, 32))
            self.attend = found("x_transformers:CrossAttender")(**SIZES)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.attend(self.latents.expand(len(tokens), -1, -1), context=tokens)

    return Latents()


def x_image() -> nn.Module:
    return found("x_transformers:ViTransformerWrapper")(
        image_size=32,
        patch_size=4,
        num_classes=5,
        attn_layers=found("x_transformers:Encoder")(**SIZES),
    )


X_TRANSFORMERS = (
    x("decoder"),
    x("encoder", "Encoder"),
    x("rotary", rotary_pos_emb=True),
    x("alibi", alibi_pos_bias=True, alibi_num_heads=1),
    x("t5-bias", rel_pos_bias=True),
    x("dynamic-bias", dynamic_pos_bias=True, dynamic_pos_bias_log_distance=False),
    x("talking-heads", attn_pre_talking_heads=True, attn_post_talking_heads=True),
    x("sparse-topk", attn_sparse_topk=8),
    x("qk-norm", attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    x("memory-kv", attn_num_mem_kv=4),
    x("memory-tokens", wrapper={"num_memory_tokens": 4}),
    x("flash", attn_flash=True),
    x("grouped-heads", attn_kv_heads=1),
    x("gated-glu", attn_gate_values=True, ff_glu=True, ff_swish=True, use_rmsnorm=True),
    x("shift-tokens", shift_tokens=1),
    x("residual-scores", "Encoder", residual_attn=True),
    x("soft-clamp", attn_softclamp_logits=True),
    x("on-attention", "Encoder", attn_on_attn=True),
    x("macaron", "Encoder", macaron=True),
    Row(package="x-transformers", name="seq2seq", make=x_seq2seq, inputs=lambda: [
        *ids(LENGTH)(), *ids(33)()]),
    Row(package="x-transformers", name="latents", make=x_latents,
        inputs=lambda: [noise(2, LENGTH, 32)]),
    Row(package="x-transformers", name="vit", make=x_image, inputs=image(32)),
)  # fmt: skip

SMALL: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2,
    "mlp_dim": 64,
}  # fmt: skip


def vit(name: str, path: str, inputs: Any = None, call: Call = plainly, **config: Any) -> Row:
    return Row(
        package="vit-pytorch", name=name, make=f"vit_pytorch.{path}", config=config,
        inputs=inputs or image(32), call=call,
    )  # fmt: skip


def without(*names: str, **more: Any) -> dict[str, Any]:
    return {k: v for k, v in SMALL.items() if k not in names} | more


VIT_PYTORCH = (
    vit("vit", "vit:ViT", **SMALL),
    vit("simple-vit", "simple_vit:SimpleViT", **SMALL),
    vit("registers", "simple_vit_with_register_tokens:SimpleViT", **SMALL),
    vit("qk-norm", "simple_vit_with_qk_norm:SimpleViT", **SMALL),
    vit("vit-1d", "vit_1d:ViT", lambda: [noise(2, 3, 128)],
        **without("image_size", seq_len=128)),
    vit("vit-3d", "vit_3d:ViT", image(16, frames=8),
        **without("image_size", "patch_size", image_size=16, image_patch_size=4, frames=8,
                  frame_patch_size=2)),
    vit("vivit", "vivit:ViViT", image(16, frames=8),
        **without("image_size", "patch_size", "depth", image_size=16, image_patch_size=4,
                  frames=8, frame_patch_size=2, spatial_depth=1, temporal_depth=1)),
    vit("deep-vit", "deepvit:DeepViT", **SMALL),
    vit("cait", "cait:CaiT", **SMALL, cls_depth=1),
    vit("parallel-vit", "parallel_vit:ViT", **SMALL),
    vit("look-vit", "look_vit:LookViT", image(48),
        **without("mlp_dim", "image_size", "patch_size", image_size=48, patch_size=12,
                  highres_patch_size=6, cross_attn_heads=2)),
    vit("cct", "cct:CCT", img_size=32, embedding_dim=32, n_conv_layers=1, kernel_size=3, stride=2,
        padding=1, pooling_kernel_size=3, pooling_stride=2, pooling_padding=1, num_layers=2,
        num_heads=2, mlp_ratio=2.0, num_classes=5, positional_embedding="learnable"),
    vit("cross-vit", "cross_vit:CrossViT", image_size=32, num_classes=5, sm_dim=32, lg_dim=32,
        sm_patch_size=4, sm_enc_depth=1, sm_enc_heads=2, sm_enc_mlp_dim=64, lg_patch_size=8,
        lg_enc_depth=1, lg_enc_heads=2, lg_enc_mlp_dim=64, cross_attn_depth=1, depth=1),
    vit("t2t", "t2t:T2TViT", image(64), image_size=64, num_classes=5, dim=32, depth=2, heads=2,
        mlp_dim=64, t2t_layers=((7, 4), (3, 2))),
    vit("cvt", "cvt:CvT", image(64), num_classes=5, s1_emb_dim=16, s1_heads=1, s1_depth=1,
        s2_emb_dim=32, s2_heads=2, s2_depth=1, s3_emb_dim=32, s3_heads=2, s3_depth=1),
    vit("twins-svt", "twins_svt:TwinsSVT", image(64), num_classes=5, s1_emb_dim=16,
        s1_patch_size=4, s1_local_patch_size=4, s1_global_k=4, s1_depth=1, s2_emb_dim=32,
        s2_patch_size=2, s2_local_patch_size=4, s2_global_k=4, s2_depth=1, s3_emb_dim=32,
        s3_patch_size=2, s3_local_patch_size=2, s3_global_k=2, s3_depth=1, s4_emb_dim=32,
        s4_patch_size=1, s4_local_patch_size=2, s4_global_k=2, s4_depth=1),
    vit("crossformer", "crossformer:CrossFormer", image(64), num_classes=5, dim=(32, 32, 32, 32),
        depth=(1, 1, 1, 1), global_window_size=(4, 2, 1, 1), local_window_size=(4, 4, 2, 1),
        cross_embed_kernel_sizes=((4, 8), (2, 4), (2, 4), (2, 4)),
        cross_embed_strides=(4, 2, 2, 2)),
    vit("sep-vit", "sep_vit:SepViT", image(112), num_classes=5, dim=32, dim_head=16, depth=(1, 1),
        heads=(1, 2)),
    vit("max-vit", "max_vit:MaxViT", image(64), num_classes=5, dim=32, dim_head=16, depth=(1, 1),
        window_size=4, dim_conv_stem=16),
    vit("nest", "nest:NesT", image_size=32, patch_size=2, dim=32, heads=2, num_hierarchies=2,
        block_repeats=(1, 1), num_classes=5),
    vit("xcit", "xcit:XCiT", **SMALL, cls_depth=1, dim_head=16),
)  # fmt: skip


def attention(name: str, path: str, **config: Any) -> Row:
    return Row(
        package=name,
        name=path.split(":")[1],
        make=path,
        config=config,
        inputs=lambda: [noise(2, 64, 32)],
    )


def of_ids(name: str, path: str, length: int = 64, **config: Any) -> Row:
    return Row(package=name, name=path.split(":")[1], make=path, config=config, inputs=ids(length))


OTHERS = (
    of_ids("local-attention", "local_attention:LocalTransformer", num_tokens=50, dim=32, depth=2,
           max_seq_len=64, causal=True, local_attn_window_size=16, heads=2, dim_head=16),
    attention("linformer", "linformer:Linformer", dim=32, seq_len=64, depth=2, k=16, heads=2),
    attention("nystrom-attention", "nystrom_attention:Nystromformer", dim=32, dim_head=16, heads=2,
              depth=1, num_landmarks=16),
    Row(package="perceiver-pytorch", name="Perceiver", make="perceiver_pytorch:Perceiver",
        config={"num_freq_bands": 4, "depth": 1, "max_freq": 10.0, "input_channels": 3,
                "input_axis": 2, "num_latents": 8, "latent_dim": 32, "cross_heads": 1,
                "latent_heads": 2, "cross_dim_head": 16, "latent_dim_head": 16, "num_classes": 5},
        inputs=lambda: [noise(2, 16, 16, 3)]),
    Row(package="axial-attention", name="AxialAttention", make="axial_attention:AxialAttention",
        config={"dim": 32, "dim_index": 1, "heads": 2, "num_dimensions": 2},
        inputs=lambda: [noise(2, 32, 16, 12)]),
    of_ids("g-mlp-pytorch", "g_mlp_pytorch:gMLP", num_tokens=50, dim=32, depth=2, seq_len=64),
    attention("conformer", "conformer:ConformerBlock", dim=32, dim_head=16, heads=2, ff_mult=2,
              conv_kernel_size=7),
)  # fmt: skip

DECODER = {"vocab_size": 50, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32,
           "max_seq_len": 64, "intermediate_dim": 64}  # fmt: skip


def tune(name: str, path: str, **more: Any) -> Row:
    return Row(
        package="torchtune", name=name, make=f"torchtune.models.{path}",
        config={**DECODER, **more}, inputs=ids(LENGTH),
    )  # fmt: skip


TORCHTUNE = (
    tune("llama3", "llama3_1:llama3_1"),
    tune("qwen2", "qwen2:qwen2"),
    tune("gemma", "gemma:gemma", head_dim=8),
    tune("mistral", "mistral:mistral"),
)

ROWS = (*X_TRANSFORMERS, *VIT_PYTORCH, *OTHERS, *TORCHTUNE)
