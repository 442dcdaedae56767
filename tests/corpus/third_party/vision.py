"""Images and videos: timm, torchvision and open_clip."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tests.corpus.third_party.row import Row, found, ids, image

__all__ = ["ROWS"]

VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
FOUR = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
CLASSES = {"num_classes": 5}


def timm(name: str, path: str, side: int = 32, **config: Any) -> Row:
    made = {**config, **CLASSES}
    return Row(
        package="timm", name=name, make=f"timm.models.{path}", config=made, inputs=image(side)
    )


def maxxvit(block: str, side: int, **transformer: Any) -> Callable[[], nn.Module]:
    """Of timm's one family for MaxViT (``M``) and CoAtNet (``C``, ``T``)."""

    def make() -> nn.Module:
        of = functools.partial(found)
        kinds = tuple(block)
        config = of("timm.models.maxxvit:MaxxVitCfg")(
            embed_dim=(32, 32), depths=(1, 1), block_type=kinds, stem_width=16,
            transformer_cfg=of("timm.models.maxxvit:MaxxVitTransformerCfg")(
                dim_head=16, **transformer
            ),
        )  # fmt: skip
        return of("timm.models.maxxvit:MaxxVit")(config, img_size=side, **CLASSES)

    return make


def mvit() -> nn.Module:
    config = found("timm.models.mvitv2:MultiScaleVitCfg")(
        depths=(1, 1, 1), embed_dim=16, num_heads=1, expand_attn=True
    )
    return found("timm.models.mvitv2:MultiScaleVit")(config, img_size=(64, 64), **CLASSES)


def open_clip(vision: Mapping[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        text = {
            "context_length": 24, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2,
        }  # fmt: skip
        return found("open_clip.model:CLIP")(embed_dim=32, vision_cfg=dict(vision), text_cfg=text)

    return make


def coca() -> nn.Module:
    text = {
        "context_length": 24, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2,
        "embed_cls": True, "output_tokens": True,
    }  # fmt: skip
    vision = {
        "image_size": 32, "patch_size": 4, "width": 32, "head_width": 16, "layers": 2,
        "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True,
    }  # fmt: skip
    several = {"context_length": 24, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    return found("open_clip.coca_model:CoCa")(
        embed_dim=32, multimodal_cfg=several, text_cfg=text, vision_cfg=vision
    )


def pair() -> list[Any]:
    return [*image(32)(), *ids(24)()]


TIMM = (
    timm("vit", "vision_transformer:VisionTransformer", **VIT),
    timm("vit-registers-mean", "vision_transformer:VisionTransformer", **VIT, class_token=False,
         global_pool="avg", reg_tokens=4, qk_norm=True, init_values=0.1),
    timm("vit-map-pool", "vision_transformer:VisionTransformer", **VIT, class_token=False,
         global_pool="map"),
    timm("vit-relpos", "vision_transformer_relpos:VisionTransformerRelPos", **VIT),
    timm("vit-sam", "vision_transformer_sam:VisionTransformerSAM", **VIT, window_size=4,
         global_attn_indexes=(1,), use_rel_pos=True),
    timm("vit-naflex", "naflexvit:NaFlexVit", **VIT, reg_tokens=2, pos_embed_grid_size=(8, 8)),
    timm("deit-distilled", "deit:VisionTransformerDistilled", **VIT),
    timm("beit", "beit:Beit", **VIT, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
    timm("eva", "eva:Eva", **VIT, use_rot_pos_emb=True, swiglu_mlp=True, qkv_fused=True),
    timm("cait", "cait:Cait", **VIT, depth_token_only=1),
    timm("xcit", "xcit:Xcit", 64, **{**VIT, "img_size": 64, "patch_size": 8}),
    timm("convit", "convit:ConVit", **VIT, local_up_to_layer=1),
    timm("volo", "volo:VOLO", 64, layers=(1, 1), img_size=64, patch_size=8, stem_hidden_dim=16,
         embed_dims=(32, 32), num_heads=(2, 2), downsamples=(True, False),
         outlook_attention=(True, False), post_layers=("ca",)),
    timm("tnt", "tnt:TNT", 32, img_size=32, patch_size=8, embed_dim=32, inner_dim=16, depth=2,
         num_heads_inner=2, num_heads_outer=2),
    timm("crossvit", "crossvit:CrossVit", 48, img_size=48, img_scale=(1.0, 1.0), patch_size=(4, 8),
         embed_dim=(32, 32), depth=((1, 1, 0),), num_heads=(2, 2), mlp_ratio=(2.0, 2.0, 1.0)),
    timm("swin", "swin_transformer:SwinTransformer", img_size=32, patch_size=2, window_size=4,
         embed_dim=32, depths=(2, 2), num_heads=(2, 2)),
    timm("swin-v2", "swin_transformer_v2:SwinTransformerV2", img_size=32, patch_size=2,
         window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 2)),
    timm("swin-v2-cr", "swin_transformer_v2_cr:SwinTransformerV2Cr", img_size=32, patch_size=2,
         window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 2)),
    timm("twins", "twins:Twins", 64, img_size=64, patch_size=4, embed_dims=(32, 32, 32, 32),
         **FOUR, sr_ratios=(4, 2, 1, 1), wss=(4, 4, 2, 2)),
    timm("pvt-v2", "pvt_v2:PyramidVisionTransformerV2", 64,
         embed_dims=(16, 32, 32, 32), **FOUR),
    timm("nest", "nest:Nest", 32, img_size=32, patch_size=2, num_levels=2, embed_dims=(32, 32),
         num_heads=(2, 2), depths=(1, 1)),
    timm("davit", "davit:DaVit", 64, embed_dims=(16, 32), depths=(1, 1), num_heads=(2, 2),
         window_size=4),
    timm("gcvit", "gcvit:GlobalContextVit", 64, img_size=(64, 64), embed_dim=16, depths=(2, 2),
         num_heads=(2, 2), window_size=(4, 4), window_ratio=(2, 2)),
    timm("hiera", "hiera:Hiera", 64, img_size=(64, 64), embed_dim=16, num_heads=1,
         stages=(1, 1, 1), q_pool=2, mask_unit_size=(4, 4), mask_unit_attn=(True, True, False)),
    timm("coat", "coat:CoaT", 64, img_size=64, patch_size=4, embed_dims=(32, 32, 32, 32),
         serial_depths=(1, 1, 1, 1), parallel_depth=0, num_heads=8, mlp_ratios=(2, 2, 2, 2)),
    timm("pit", "pit:PoolingVisionTransformer", 32, img_size=32, patch_size=4, stride=2,
         base_dims=(16, 16), depth=(1, 1), heads=(1, 2), mlp_ratio=2.0),
    timm("levit", "levit:Levit", 64, img_size=64, embed_dim=(32, 32), key_dim=16, depth=(1, 1),
         num_heads=(2, 2), attn_ratio=(2, 2), mlp_ratio=(2, 2)),
    timm("focalnet", "focalnet:FocalNet", 64, embed_dim=16, depths=(1, 1), focal_levels=(2, 2),
         focal_windows=(3, 3)),
    timm("edgenext", "edgenext:EdgeNeXt", 224, dims=(16, 16, 32, 32), depths=(1, 1, 1, 1),
         global_block_counts=(0, 1, 1, 1), heads=(2, 2, 2, 2), d2_scales=(2, 2, 3, 4)),
    timm("efficientvit-linear", "efficientvit_mit:EfficientVit", 64, widths=(8, 16, 32, 32, 32),
         depths=(1, 1, 1, 1, 1), head_dim=16, head_widths=(32, 32)),
    timm("poolformer", "metaformer:MetaFormer", 64, depths=(1, 1), dims=(16, 32)),
    timm("convnext", "convnext:ConvNeXt", 224, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    timm("convnext-v2", "convnext:ConvNeXt", 224, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32),
         use_grn=True, ls_init_value=None),
    timm("inception-next", "inception_next:MetaNeXt", 64, depths=(1, 1), dims=(16, 32)),
    timm("mlp-mixer", "mlp_mixer:MlpMixer", img_size=32, patch_size=4, num_blocks=2, embed_dim=32),
    Row(package="timm", name="maxvit", make=maxxvit("MM", 64, window_size=8), inputs=image(64)),
    Row(package="timm", name="coatnet", make=maxxvit("CT", 64), inputs=image(64)),
    Row(package="timm", name="mvit-v2", make=mvit, inputs=image(64)),
)  # fmt: skip

TORCHVISION = (
    Row(package="torchvision", name="vit",
        make="torchvision.models.vision_transformer:VisionTransformer",
        config={"image_size": 32, "patch_size": 4, "num_layers": 2, "num_heads": 2,
                "hidden_dim": 32, "mlp_dim": 64, "num_classes": 5}, inputs=image(32)),
    Row(package="torchvision", name="swin",
        make="torchvision.models.swin_transformer:SwinTransformer",
        config={"patch_size": [2, 2], "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 2],
                "window_size": [4, 4], "num_classes": 5}, inputs=image(32)),
    Row(package="torchvision", name="swin3d",
        make="torchvision.models.video.swin_transformer:SwinTransformer3d",
        config={"patch_size": [2, 4, 4], "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 2],
                "window_size": [2, 4, 4], "num_classes": 5}, inputs=image(32, frames=8)),
    Row(package="torchvision", name="maxvit", make="torchvision.models.maxvit:MaxVit",
        config={"input_size": (64, 64), "stem_channels": 16, "partition_size": 4,
                "block_channels": [32, 32], "block_layers": [1, 1], "head_dim": 16,
                "stochastic_depth_prob": 0.0, "num_classes": 5}, inputs=image(64)),
    Row(package="torchvision", name="convnext", make=lambda: found(
            "torchvision.models.convnext:ConvNeXt")(
                [found("torchvision.models.convnext:CNBlockConfig")(16, 32, 1),
                 found("torchvision.models.convnext:CNBlockConfig")(32, None, 1)], num_classes=5),
        inputs=image(64)),
)  # fmt: skip

CLIP = {"image_size": 32, "patch_size": 4, "width": 32, "head_width": 16, "layers": 2}

OPEN_CLIP = (
    Row(package="open_clip", name="clip", make=open_clip(CLIP), inputs=pair),
    Row(package="open_clip", name="clip-attention-pool",
        make=open_clip({**CLIP, "attentional_pool": True, "attn_pooler_heads": 2}), inputs=pair),
    Row(package="open_clip", name="coca", make=coca, inputs=pair),
)  # fmt: skip

ROWS = (*TIMM, *TORCHVISION, *OPEN_CLIP)
