"""Decoder-only language models."""

from __future__ import annotations

from typing import Any

from tests.corpus.inputs import packed, padded, tokens
from tests.corpus.row import Row

__all__ = ["DECODERS"]

LLAMA = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
GPT = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
SQUARE = {"vocab_size": 48}
"""With 48 tokens: sequence, hidden size and vocabulary coincide."""
OPT = {
    "vocab_size": 96, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 20, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 10, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
WINDOW = ["sliding_attention", "full_attention"]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def llama(**sizes: Any) -> dict[str, Any]:
    return LLAMA | sizes


def gpt(**sizes: Any) -> dict[str, Any]:
    return GPT | sizes


def neox(**sizes: Any) -> dict[str, Any]:
    return NEOX | sizes


def row(name: str, model: str, config: dict[str, Any], **fields: Any) -> Row:
    given: dict[str, Any] = {"inputs": tokens(), "sites": 2} | fields
    return Row(name=name, model=model, config=config, **given)


SDPA = ("sdpa",)
ONLY_EAGER: Any = {"attention": ("eager",)}
EXACT: Any = {"dtype": "float64"}
NO_CACHE = {"use_cache": False}
"""Packed documents are told apart by position only where no cache is filled."""
TRAIN: Any = {"train": True}

# fmt: off
DECODERS: tuple[Row, ...] = (
    # Grouped heads, rotary positions, causal masks.
    row("llama", "LlamaForCausalLM", llama(), train=True, quick=SDPA),
    row("llama-padded", "LlamaForCausalLM", llama(), inputs=padded(batch=3)),
    row("llama-left-padded", "LlamaForCausalLM", llama(), inputs=padded(left=True)),
    row("llama-packed", "LlamaForCausalLM", llama(), inputs=packed(20, 1, 33, 7), calls=NO_CACHE,
        quick=SDPA),
    row("llama-square", "LlamaForCausalLM", llama(**SQUARE), inputs=tokens(48, vocab=48)),
    row("llama-no-cache", "LlamaForCausalLM", llama(use_cache=False), inputs=tokens(60, 1),
        train=True),
    row("mistral", "MistralForCausalLM", llama(sliding_window=16), inputs=padded()),
    row("mistral-packed", "MistralForCausalLM", llama(sliding_window=9), inputs=packed(30, 19, 12),
        calls=NO_CACHE),
    row("qwen2", "Qwen2ForCausalLM", llama(), train=True),
    row("qwen2-window", "Qwen2ForCausalLM", llama(use_sliding_window=True, sliding_window=16,
        layer_types=WINDOW)),
    row("qwen3", "Qwen3ForCausalLM", llama(head_dim=16), inputs=padded()),
    row("gemma", "GemmaForCausalLM", llama(head_dim=16)),
    row("gemma2", "Gemma2ForCausalLM", llama(head_dim=16, sliding_window=16,
        attn_logit_softcapping=5.0, final_logit_softcapping=4.0), **ONLY_EAGER),
    row("gemma3", "Gemma3ForCausalLM", llama(head_dim=16, sliding_window=16, layer_types=WINDOW),
        inputs=padded(), quick=SDPA),
    row("gemma3-square", "Gemma3ForCausalLM", llama(head_dim=12, sliding_window=16,
        layer_types=WINDOW, **SQUARE), inputs=tokens(48, vocab=48)),
    row("smollm3", "SmolLM3ForCausalLM", llama(no_rope_layers=[1, 0]), train=True),
    row("granite", "GraniteForCausalLM", llama(attention_multiplier=0.2, residual_multiplier=0.7,
        logits_scaling=3.0, embedding_multiplier=2.0)),
    row("cohere", "CohereForCausalLM", llama(use_qk_norm=True)),
    row("cohere2", "Cohere2ForCausalLM", llama(sliding_window=16, layer_types=WINDOW),
        inputs=packed(25, 36), calls=NO_CACHE),
    row("olmo", "OlmoForCausalLM", llama(clip_qkv=2.0)),
    row("olmo2", "Olmo2ForCausalLM", llama(), train=True),
    row("olmo3", "Olmo3ForCausalLM", llama(sliding_window=16, layer_types=WINDOW)),
    row("starcoder2", "Starcoder2ForCausalLM", llama(sliding_window=16)),
    row("stablelm", "StableLmForCausalLM", llama(num_key_value_heads=4, qk_layernorm=True,
        use_parallel_residual=True, partial_rotary_factor=0.5)),
    row("phi", "PhiForCausalLM", llama(partial_rotary_factor=0.5, qk_layernorm=True),
        inputs=padded()),
    row("phi3", "Phi3ForCausalLM", llama(sliding_window=16)),
    row("glm", "GlmForCausalLM", llama(head_dim=12)),
    row("glm4", "Glm4ForCausalLM", llama(head_dim=12)),
    row("nemotron", "NemotronForCausalLM", llama()),
    row("helium", "HeliumForCausalLM", llama(head_dim=12)),
    row("exaone4", "Exaone4ForCausalLM", llama(sliding_window=16, sliding_window_pattern=2,
        layer_types=WINDOW)),
    row("seed_oss", "SeedOssForCausalLM", llama(head_dim=12)),
    row("arcee", "ArceeForCausalLM", llama(head_dim=12)),
    row("hunyuan", "HunYuanDenseV1ForCausalLM", llama(head_dim=12)),
    row("ernie4_5", "Ernie4_5ForCausalLM", llama(head_dim=12)),
    row("apertus", "ApertusForCausalLM", llama()),
    row("diffllama", "DiffLlamaForCausalLM", llama(), sites=4),
    row("persimmon", "PersimmonForCausalLM", neox(qk_layernorm=True, partial_rotary_factor=0.5)),
    row("biogpt", "BioGptForCausalLM", neox(), inputs=padded()),
    row("xglm", "XGLMForCausalLM", {"vocab_size": 96, "d_model": 48, "ffn_dim": 80,
        "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 256}, **ONLY_EAGER),
    row("opt", "OPTForCausalLM", OPT, inputs=padded()),
    row("nanochat", "NanoChatForCausalLM", llama(), **TRAIN),
    # GPT's line: learned positions, packed projections, partial rotary, ALiBi.
    row("gpt2", "GPT2LMHeadModel", gpt(), train=True),
    row("gpt2-square", "GPT2LMHeadModel", gpt(**SQUARE), inputs=tokens(48, vocab=48)),
    row("gpt2-padded", "GPT2LMHeadModel", gpt(scale_attn_by_inverse_layer_idx=True),
        inputs=padded()),
    row("gpt_bigcode", "GPTBigCodeForCausalLM", gpt(multi_query=True)),
    row("gpt_neo", "GPTNeoForCausalLM", {"vocab_size": 96, "hidden_size": 48, "num_layers": 2,
        "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16,
        "max_position_embeddings": 256}, **ONLY_EAGER),
    row("gpt_neox", "GPTNeoXForCausalLM", neox(rotary_pct=0.5), inputs=padded()),
    row("gptj", "GPTJForCausalLM", gpt(rotary_dim=4), **ONLY_EAGER),
    row("codegen", "CodeGenForCausalLM", gpt(rotary_dim=4), **ONLY_EAGER),
    row("bloom", "BloomForCausalLM", {"vocab_size": 96, "hidden_size": 48, "n_layer": 2,
        "n_head": 4}, inputs=padded(), **ONLY_EAGER),
    row("falcon", "FalconForCausalLM", {"vocab_size": 96, "hidden_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4}),
    row("falcon-alibi", "FalconForCausalLM", {"vocab_size": 96, "hidden_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "parallel_attn": False,
        "multi_query": False, "bias": True}, inputs=padded()),
    row("mpt", "MptForCausalLM", {"vocab_size": 96, "d_model": 48, "n_heads": 4, "n_layers": 2,
        "max_seq_len": 256}, **ONLY_EAGER),
    row("ctrl", "CTRLLMHeadModel", {"vocab_size": 96, "n_embd": 48, "dff": 80, "n_layer": 2,
        "n_head": 4, "n_positions": 256}, **ONLY_EAGER),
    # Experts.
    row("mixtral", "MixtralForCausalLM", llama(**EXPERTS)),
    row("mixtral-aux", "MixtralForCausalLM", llama(output_router_logits=True, **EXPERTS),
        inputs=padded()),
    row("mixtral-batched", "MixtralForCausalLM", llama(**EXPERTS), experts="batched_mm", **EXACT),
    row("mixtral-loop", "MixtralForCausalLM", llama(**EXPERTS), experts="eager", **EXACT),
    row("qwen2_moe", "Qwen2MoeForCausalLM", llama(shared_expert_intermediate_size=32, **ROUTED)),
    row("qwen3_moe", "Qwen3MoeForCausalLM", llama(head_dim=12, **ROUTED)),
    row("olmoe", "OlmoeForCausalLM", llama(num_experts=4, num_experts_per_tok=2)),
    row("phimoe", "PhimoeForCausalLM", llama(**EXPERTS)),
    row("granitemoe", "GraniteMoeForCausalLM", llama(attention_multiplier=0.2, **EXPERTS)),
    row("jetmoe", "JetMoeForCausalLM", {"vocab_size": 96, "hidden_size": 48,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 12,
        "intermediate_size": 40, "max_position_embeddings": 256} | EXPERTS, **EXACT),
    row("dbrx", "DbrxForCausalLM", {"vocab_size": 96, "d_model": 48, "n_heads": 4, "n_layers": 2,
        "max_seq_len": 256, "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0,
        "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4,
        "moe_top_k": 2, "hidden_size": 48}}, autocast=False, **EXACT),
    row("gpt_oss", "GptOssForCausalLM", llama(head_dim=12, sliding_window=16, layer_types=WINDOW,
        **EXPERTS), attention=("eager",)),
    row("deepseek_v2", "DeepseekV2ForCausalLM", llama(**LATENT)),
    row("deepseek_v3", "DeepseekV3ForCausalLM", llama(n_group=2, topk_group=1, **LATENT)),
    row("llama4", "Llama4ForCausalLM", llama(intermediate_size_mlp=64, head_dim=12,
        attention_chunk_size=16, no_rope_layers=[1, 0], num_local_experts=4,
        num_experts_per_tok=1), **EXACT),
    row("glm4_moe", "Glm4MoeForCausalLM", llama(head_dim=12, moe_intermediate_size=24,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
        n_group=1, topk_group=1, partial_rotary_factor=0.5)),
    row("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", llama(moe_intermediate_size=24,
        moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1,
        moe_layer_end_index=1)),
    row("hunyuan_moe", "HunYuanMoEV1ForCausalLM", llama(head_dim=12, num_experts=4, moe_topk=2)),
    row("minimax", "MiniMaxForCausalLM", llama(head_dim=12, layer_types=["linear_attention",
        "full_attention"], block_size=16, **EXPERTS), sites=1),
    row("flex_olmo", "FlexOlmoForCausalLM", llama(num_experts=4, num_experts_per_tok=2)),
    row("dots1", "Dots1ForCausalLM", llama(head_dim=12, moe_intermediate_size=24,
        n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
        n_group=1, topk_group=1)),
    row("granitemoeshared", "GraniteMoeSharedForCausalLM", llama(shared_intermediate_size=32,
        attention_multiplier=0.2, **EXPERTS)),
    row("qwen3_next", "Qwen3NextForCausalLM", llama(head_dim=12, layer_types=["linear_attention",
        "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, shared_expert_intermediate_size=24,
        **ROUTED), sites=1),
    row("gemma3n", "Gemma3nForCausalLM", llama(head_dim=12, sliding_window=16,
        layer_types=WINDOW, vocab_size_per_layer_input=96, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, laurel_rank=8, activation_sparsity_pattern=[0.0, 0.0])),
    row("openai_gpt", "OpenAIGPTLMHeadModel", gpt(), **ONLY_EAGER),
    row("xlnet", "XLNetLMHeadModel", {"vocab_size": 96, "d_model": 48, "n_layer": 2, "n_head": 4,
        "d_inner": 80}, **ONLY_EAGER),
    row("xlm", "XLMWithLMHeadModel", {"vocab_size": 96, "emb_dim": 48, "n_layers": 2,
        "n_heads": 4, "max_position_embeddings": 256}, inputs=padded(), **ONLY_EAGER),
    row("imagegpt", "ImageGPTForCausalImageModeling", gpt(vocab_size=97), **ONLY_EAGER),
    row("trocr", "TrOCRForCausalLM", {"vocab_size": 96, "d_model": 48, "decoder_layers": 2,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 80, "max_position_embeddings": 256},
        **ONLY_EAGER),
    # Attention beside recurrences, which stay whole.
    row("jamba", "JambaForCausalLM", llama(attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=4, num_experts_per_tok=2,
        mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False), sites=1),
    row("bamba", "BambaForCausalLM", llama(attn_layer_indices=[1], mamba_n_heads=8,
        mamba_d_head=12, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=16), sites=1),
    row("falcon_h1", "FalconH1ForCausalLM", llama(head_dim=12, mamba_d_ssm=48, mamba_n_heads=4,
        mamba_d_head=12, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=16)),
    row("recurrent_gemma", "RecurrentGemmaForCausalLM", llama(lru_width=48,
        attention_window_size=16, block_types=["recurrent", "attention"]), sites=1, **ONLY_EAGER),
    row("mamba", "MambaForCausalLM", {"vocab_size": 96, "hidden_size": 48, "state_size": 8,
        "num_hidden_layers": 2}, sites=0, **ONLY_EAGER),
    row("lfm2", "Lfm2ForCausalLM", llama(layer_types=["conv", "full_attention"],
        block_multiple_of=8), sites=1),
)
