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
    row("fnet", "FNetForMaskedLM", {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 2, "max_position_embeddings": 256}, inputs=tokens(), sites=0,
        **ONLY_EAGER),
)
