"""Encoders of text."""

from __future__ import annotations

from typing import Any

from tests.corpus.inputs import padded, tokens
from tests.corpus.row import Row

__all__ = ["ENCODERS"]

BERT = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip


def bert(**sizes: Any) -> dict[str, Any]:
    return BERT | sizes


def row(name: str, model: str, config: dict[str, Any], **fields: Any) -> Row:
    given: dict[str, Any] = {"inputs": padded(), "sites": 2} | fields
    return Row(name=name, model=model, config=config, **given)


SDPA = ("sdpa",)
ONLY_EAGER: Any = {"attention": ("eager",)}

# fmt: off
ENCODERS: tuple[Row, ...] = (
    row("bert", "BertForMaskedLM", bert(), train=True, quick=SDPA),
    row("bert-square", "BertForMaskedLM", bert(vocab_size=48), inputs=tokens(48, vocab=48)),
    row("bert-classes", "BertForTokenClassification", bert(), inputs=tokens(61, labels=False)),
    row("bert-pooled", "BertModel", bert(), inputs=padded(labels=False)),
    row("roberta", "RobertaForMaskedLM", bert(), train=True),
    row("xlm_roberta", "XLMRobertaForMaskedLM", bert()),
    row("camembert", "CamembertForMaskedLM", bert()),
    row("electra", "ElectraForMaskedLM", bert(embedding_size=32)),
    row("distilbert", "DistilBertForMaskedLM", {"vocab_size": 96, "dim": 48, "hidden_dim": 80,
        "n_layers": 2, "n_heads": 4, "max_position_embeddings": 256}),
    row("albert", "AlbertForMaskedLM", bert(embedding_size=32)),
    row("deberta_v2", "DebertaV2ForMaskedLM", bert(relative_attention=True, pos_att_type=["p2c",
        "c2p"], position_buckets=16, max_relative_positions=64, norm_rel_ebd="layer_norm",
        share_att_key=True), **ONLY_EAGER),
    row("deberta", "DebertaForMaskedLM", bert(relative_attention=True, pos_att_type=["p2c", "c2p"],
        max_relative_positions=128), **ONLY_EAGER),
    row("modernbert", "ModernBertForMaskedLM", bert(local_attention=16,
        global_attn_every_n_layers=2), train=True),
    row("mpnet", "MPNetForMaskedLM", bert(), **ONLY_EAGER),
    row("esm", "EsmForMaskedLM", bert(position_embedding_type="rotary", token_dropout=False,
        mask_token_id=4)),
    row("nomic_bert", "NomicBertModel", bert(), inputs=padded(labels=False)),
    row("layoutlm", "LayoutLMForMaskedLM", bert()),
    row("ernie", "ErnieForMaskedLM", bert()),
    row("megatron_bert", "MegatronBertForMaskedLM", bert(), **ONLY_EAGER),
    row("rembert", "RemBertForMaskedLM", bert(input_embedding_size=24, output_embedding_size=32),
        **ONLY_EAGER),
    row("mobilebert", "MobileBertForMaskedLM", bert(embedding_size=24, intra_bottleneck_size=24,
        true_hidden_size=24)),
    row("squeezebert", "SqueezeBertForMaskedLM", bert(embedding_size=48), **ONLY_EAGER),
    row("roformer", "RoFormerForMaskedLM", bert(embedding_size=48), **ONLY_EAGER),
    row("convbert", "ConvBertForMaskedLM", bert(embedding_size=48, head_ratio=2), **ONLY_EAGER),
    row("eurobert", "EuroBertForMaskedLM", bert(num_key_value_heads=2)),
    row("longformer", "LongformerForMaskedLM", bert(attention_window=[8, 8]),
        inputs=tokens(64), sites=0, **ONLY_EAGER),
    row("big_bird", "BigBirdForMaskedLM", bert(attention_type="original_full"), **ONLY_EAGER),
    row("nystromformer", "NystromformerForMaskedLM", bert(num_landmarks=61,
        segment_means_seq_len=61, conv_kernel_size=3), inputs=tokens(61), **ONLY_EAGER),
    row("xmod", "XmodForMaskedLM", bert(languages=["en_XX"], default_language="en_XX"),
        **ONLY_EAGER),
    row("layoutlmv3", "LayoutLMv3ForTokenClassification", bert(visual_embed=False,
        max_2d_position_embeddings=64, coordinate_size=8, shape_size=8),
        inputs=tokens(61, labels=False), **ONLY_EAGER),
    row("bert_generation", "BertGenerationDecoder", bert(is_decoder=True)),
    row("ibert", "IBertForMaskedLM", bert(), **ONLY_EAGER),
    row("tapas", "TapasModel", bert(type_vocab_sizes=[3, 4, 4, 2, 4, 4, 4]),
        inputs=tokens(61, labels=False), **ONLY_EAGER),
    row("data2vec_text", "Data2VecTextForMaskedLM", bert()),
    row("roberta_prelayernorm", "RobertaPreLayerNormForMaskedLM", bert()),
    row("modernbert_decoder", "ModernBertDecoderForCausalLM", bert(local_attention=16,
        global_attn_every_n_layers=2), inputs=padded()),
    row("funnel", "FunnelForMaskedLM", {"vocab_size": 96, "d_model": 48, "n_head": 4, "d_head": 12,
        "d_inner": 80, "block_sizes": [1, 1], "num_decoder_layers": 1}, inputs=tokens(64), sites=3,
        **ONLY_EAGER),
    row("canine", "CanineModel", bert(num_hash_buckets=64, downsampling_rate=4,
        upsampling_kernel_size=4, local_transformer_stride=16), inputs=tokens(64, labels=False),
        sites=7, **ONLY_EAGER),
    row("fnet", "FNetForMaskedLM", {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "max_position_embeddings": 256}, inputs=tokens(), sites=0,
        **ONLY_EAGER),
)
