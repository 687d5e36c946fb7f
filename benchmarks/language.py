"""Networks of transformers in tiny configurations, randomly initialised.

One table of small sizes serves every family: each configuration class takes those it has a field for. What a family
needs beyond that stands in the tables below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLASSES, VOCABULARY = 13, 131  # sizes that occur nowhere else, so that output layers are known by them

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "num_labels": CLASSES,
    # other spellings of the same sizes
    "d_model": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_layers": 2, "n_heads": 4, "n_positions": 64, "dim": 64,
    "hidden_dim": 96, "ffn_dim": 96, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_layers": 2, "num_heads": 4,
    "attention_heads": 4, "d_kv": 16, "d_ff": 96, "ffn_hidden_size": 96, "rotary_dim": 8, "embedding_size": 64,
    "word_embed_proj_dim": 64, "max_seq_len": 64, "seq_length": 64, "emb_dim": 64,
    # mixtures of experts, latent attention, state spaces
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "moe_num_experts": 4, "moe_k": 2, "q_lora_rank": 32, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "sliding_window": 8, "state_size": 8,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    # images
    "image_size": 64, "patch_size": 16, "num_channels": 3,
}  # fmt: skip


class Pooled(nn.Module):
    """An encoder, the mean over its tokens, and a classifier, so that the encoder's own output can be pruned."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """The classes of a batch."""
        states = self.body(x).last_hidden_state  # n t c, or n c h w
        return self.head(states.mean(1) if states.ndim == 3 else states.mean((2, 3)))


def ids() -> Tensor:
    """A sentence."""
    return torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(0))


def image() -> Tensor:
    """An image."""
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def sound(*shape: int) -> Tensor:
    """A waveform or a spectrogram."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def configured(config_class: type, **overrides: Any) -> Any:
    """A configuration with every size of `SIZES` that the class has a field for."""
    fields = set(config_class().to_dict()) | set(config_class.attribute_map) | {"num_labels"}
    taken = {key: value for key, value in SIZES.items() if key in fields}
    if config_class.attribute_map:  # both spellings of one field: the configuration's own wins
        taken = {key: value for key, value in taken.items() if config_class.attribute_map.get(key) not in taken}
    return config_class(**(taken | overrides))


LATENT = {"num_key_value_heads": 4}  # latent attention has no key and value heads of its own
# Class of a decoder without "ForCausalLM", and what the family needs beyond `SIZES`.
DECODERS: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            "Llama Mistral Qwen2 Qwen3 Phi Phi3 Gemma Gemma2 Gemma3 "
            "GPTNeoX GPTJ OPT Bloom Falcon StableLm Starcoder2 Olmo Olmo2 "
            "Olmo3 Cohere Cohere2 Mpt CodeGen Mixtral Qwen2Moe Qwen3Moe Granite Glm Glm4 SmolLM3 Nemotron Persimmon "
            "Helium Exaone4 Ministral Apertus Olmoe DiffLlama GPTBigCode XGLM BioGpt Ernie4_5 HunYuanDenseV1 GptOss "
            "NanoChat Mamba Lfm2".split()
        )
    },
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "window_size": 8, "intermediate_size": 96},
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT | {"head_dim": 8},
    "Mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"]},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "GPT2LMHeadModel": {"n_inner": 96},
}
LATENT_8, HYBRID = LATENT | {"head_dim": 8}, {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTIONAL, MAMBA = {"layer_types": ["conv", "full_attention"]}, {"layer_types": ["mamba", "hybrid"]}
# Class of a further decoder, and what it needs beyond `SIZES`; those not named here need nothing.
FURTHER: dict[str, dict[str, Any]] = {
    **{
        f"{name}ForCausalLM": LATENT_8
        for name in "AXK1 AXK2 DeepseekV32 Glm4MoeLite MiniCPM3 LongcatFlash Youtu".split()
    },
    **{f"{name}ForCausalLM": HYBRID for name in "Qwen3_5 Qwen3_5Moe".split()},
    **{f"{name}ForCausalLM": HYBRID | LATENT_8 for name in "BailingHybrid KimiLinear".split()},
    "GlmMoeDsaForCausalLM": LATENT_8 | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "Dots3NoteForCausalLM": LATENT,
    "FalconH1ForCausalLM": {"mamba_d_ssm": 128},
    "Gemma3nForCausalLM": {
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 8,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 131, "activation_sparsity_pattern": [0.0, 0.0],
    },
    "GitForCausalLM": {
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
                          "image_size": 64, "patch_size": 32}
    },
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "Lfm2MoeForCausalLM": CONVOLUTIONAL | {"num_dense_layers": 1},
    "Lfm3ForCausalLM": CONVOLUTIONAL,
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "ReformerModelWithLMHead": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 16,
        "feed_forward_size": 96, "local_attn_chunk_length": 4,
    },
    "XmodForCausalLM": {"languages": ["en_XX"], "default_language": "en_XX", "is_decoder": True},
    "Zamba2ForCausalLM": MAMBA,
    "ZambaForCausalLM": MAMBA,
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}  # fmt: skip


def decoder(family: str, overrides: dict[str, Any]) -> tuple[nn.Module, tuple[Tensor]]:
    """A causal language model and a sentence."""
    import transformers

    model_class = getattr(transformers, family + "ForCausalLM", None) or getattr(transformers, family)
    return model_class(configured(model_class.config_class, **overrides)), (ids(),)


def built(name: str, config: str, inputs: tuple[Any, ...] | dict[str, Any], **overrides: Any) -> Any:
    """A network with an output layer of its own, and its inputs."""
    import transformers

    return getattr(transformers, name)(configured(getattr(transformers, config), **overrides)), inputs


def pooled(name: str, config: str, inputs: tuple[Any, ...], width: int = 64, **overrides: Any) -> Any:
    """A body without an output layer, inside `Pooled`."""
    model, inputs = built(name, config, inputs, **overrides)
    return Pooled(model, width), inputs


def sentence_classifier(family: str, **overrides: Any) -> Callable[[], Any]:
    """A maker of an encoder with a classifier."""
    return lambda: built(f"{family}ForSequenceClassification", f"{family}Config", (ids(),), **overrides)


def image_classifier(family: str, **overrides: Any) -> Callable[[], Any]:
    """A maker of an image network with a classifier."""
    return lambda: built(f"{family}ForImageClassification", f"{family}Config", (image(),), **overrides)


def translator(family: str, **overrides: Any) -> Callable[[], Any]:
    """A maker of an encoder and decoder with an output layer."""
    inputs = {"input_ids": ids(), "decoder_input_ids": ids()[:, :7]}
    return lambda: built(f"{family}ForConditionalGeneration", f"{family}Config", inputs, **overrides)


def whisper_encoder() -> tuple[nn.Module, tuple[Tensor]]:
    """The encoder of Whisper and a spectrogram."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = configured(WhisperConfig, max_source_positions=50, num_mel_bins=16)
    return Pooled(WhisperEncoder(config), 64), (sound(16, 100),)


STAGES = {"hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2}
SWIN = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
PYRAMID = {"hidden_sizes": [32, 64], "depths": [2, 2], "num_attention_heads": [2, 4], "patch_sizes": [7, 3],
           "strides": [4, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}  # fmt: skip
WAVES = {"conv_dim": [32, 32], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
OTHERS: dict[str, Callable[[], Any]] = {
    **{
        name: sentence_classifier(name)
        for name in "Bert Roberta Electra Albert DistilBert Deberta DebertaV2 MPNet ConvBert ModernBert RemBert "
        "MegatronBert RoFormer Nystromformer SqueezeBert MobileBert Funnel FNet XLNet".split()
    },
    **{name: translator(name) for name in "T5 MT5 UMT5 Bart MBart Pegasus Blenderbot LED PLBart".split()},
    **{name: image_classifier(name) for name in "ViT DeiT Beit Dinov2 Dinov2WithRegisters ViTMSN SwiftFormer".split()},
    "PoolFormer": image_classifier("PoolFormer", hidden_sizes=[32, 32, 64, 64], depths=[1, 1, 2, 1]),
    "MobileViT": image_classifier(
        "MobileViT", hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64]
    ),
    "ResNet": image_classifier("ResNet", **STAGES, embedding_size=32),
    "RegNet": image_classifier("RegNet", hidden_sizes=[32, 64], depths=[2, 2], groups_width=16, embedding_size=32),
    "FocalNet": image_classifier("FocalNet", embed_dim=32, depths=[2, 2], hidden_sizes=[32, 64]),
    "Swin": image_classifier("Swin", **SWIN),
    "Swinv2": image_classifier("Swinv2", **SWIN),
    "ConvNext": image_classifier("ConvNext", **STAGES, patch_size=4),
    "ConvNextV2": image_classifier("ConvNextV2", **STAGES, patch_size=4),
    "Segformer": image_classifier("Segformer", **PYRAMID, num_encoder_blocks=2, decoder_hidden_size=48),
    "WhisperEncoder": whisper_encoder,
    "CLIPVision": lambda: pooled("CLIPVisionModel", "CLIPVisionConfig", (image(),)),
    "CLIPText": lambda: pooled("CLIPTextModel", "CLIPTextConfig", (ids(),)),
    "SiglipVision": lambda: pooled("SiglipVisionModel", "SiglipVisionConfig", (image(),)),
    "Wav2Vec2": lambda: built("Wav2Vec2ForCTC", "Wav2Vec2Config", (sound(400),), **WAVES),
    "Hubert": lambda: built("HubertForSequenceClassification", "HubertConfig", (sound(400),), **WAVES),
}
